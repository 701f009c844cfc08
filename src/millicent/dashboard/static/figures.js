// Figures as the pages show them. `human` says what core.money.Money.human says, for reading only:
// exact money is on the receipt.

function threeDigits(value) {
  const digits = Math.max(0, Math.min(12, 2 - Math.floor(Math.log10(value))));
  return Number(value.toFixed(digits));
}

function plain(value) {
  return value.toLocaleString("en-US", { maximumFractionDigits: 12, useGrouping: false });
}

/** Dollars in the unit a person can read: "$1.20", "3.4 cents", "210 millicents". */
export function human(usd) {
  const sign = usd < 0 ? "-" : "";
  const magnitude = Math.abs(usd);
  if (magnitude === 0) return "$0.00";
  const millicents = threeDigits(magnitude * 1e5);
  if (millicents < 1000) return `${sign}${plain(millicents)} ${millicents === 1 ? "millicent" : "millicents"}`;
  const cents = threeDigits(magnitude * 100);
  if (cents < 100) return `${sign}${plain(cents)} ${cents === 1 ? "cent" : "cents"}`;
  const dollars = magnitude.toLocaleString("en-US", { minimumFractionDigits: 2, maximumFractionDigits: 2 });
  return `${sign}$${dollars}`;
}

/** `cost` as the API gives it: a number of dollars, null when unpriced, absent before the first report. */
export function cost(usd) {
  if (usd === undefined) return "—";
  return usd === null ? "unpriced" : human(usd);
}

export function count(number) {
  return number === null || number === undefined ? "unknown" : number.toLocaleString("en-US");
}

/** Puts "3.4 cents" into `element` as a number and a quieter unit; the exact text becomes the title. */
export function show(element, text, exact) {
  const space = text.indexOf(" ");
  const number = document.createElement("span");
  number.className = "number";
  number.textContent = space < 0 ? text : text.slice(0, space);
  element.replaceChildren(number);
  if (space >= 0) {
    const unit = document.createElement("span");
    unit.className = "unit";
    unit.textContent = text.slice(space);
    element.append(unit);
  }
  if (exact) element.title = exact;
  else element.removeAttribute("title");
}
