// Keeps the live page current from one event stream, closed while nobody can see the page. What is kept is as long as the
// lines are; elements are reused, and the tables have a row for each thing there is.

const KEPT = 150;
const HEIGHT = 30;
const state = document.getElementById("now-state");
const trouble = document.getElementById("now-trouble");
const figures = new Map(
  [...document.querySelectorAll("#now [data-figure]")].map((each) => [
    each.dataset.figure,
    { number: each.querySelector(".number"), line: each.querySelector("polyline"), values: [] },
  ]),
);
let source = null;

function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function written(value) {
  if (value === null) return "unknown";
  if (value >= 100 || value === 0) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

function draw({ line, values }) {
  const most = Math.max(...values.filter((value) => value !== null), 0) || 1;
  const points = values.map((value, i) =>
    value === null ? "" : `${KEPT - values.length + i},${(HEIGHT - 1 - (value / most) * (HEIGHT - 2)).toFixed(1)}`,
  );
  line.setAttribute("points", points.filter(Boolean).join(" "));
}

function add(name, value) {
  const { values } = figures.get(name);
  values.push(value);
  if (values.length > KEPT) values.shift();
}

// The rows that are there are filled; only what is more or fewer is made or taken away.
function fill(body, rows, none) {
  const wanted = rows.length ? rows : none ? [[none]] : [];
  while (body.rows.length > wanted.length) body.deleteRow(-1);
  wanted.forEach((cells, i) => {
    let row = body.rows[i];
    if (!row || row.cells.length !== cells.length) {
      const fresh = document.createElement("tr");
      cells.forEach((_, at) => {
        const cell = document.createElement(at === 0 && rows.length ? "th" : "td");
        if (at === 0 && rows.length) {
          cell.scope = "row";
          cell.className = "text";
        } else if (!rows.length) {
          cell.colSpan = 4;
          cell.className = "absent";
        } else if (cells.length > 2) cell.className = "num";
        fresh.append(cell);
      });
      if (row) row.replaceWith(fresh);
      else body.append(fresh);
      row = fresh;
    }
    cells.forEach((text, at) => say(row.cells[at], text));
  });
}

function show(sample) {
  for (const [name, figure] of figures) {
    const value = sample.figures[name] ?? null;
    add(name, value);
    say(figure.number, written(value));
    draw(figure);
  }
  say(trouble, sample.trouble ?? "");
  trouble.hidden = !sample.trouble;
  fill(document.getElementById("now-engines-rows"), [
    ...sample.engines.map((each) => [each.device, each.state]),
    ...sample.deployments.map((each) => [
      each.placement ? `${each.model} at ${each.placement}` : each.model,
      each.available ? "takes calls" : "takes no calls",
    ]),
  ]);
  fill(
    document.getElementById("now-budgets-rows"),
    sample.budgets.map((each) => [each.name, each.used, each.limit, `${each.percent}%`]),
    "No budget is used.",
  );
  say(state, "live");
}

function open() {
  if (source || document.hidden) return;
  source = new EventSource("/live/events");
  source.addEventListener("history", (event) => {
    const past = JSON.parse(event.data).figures;
    for (const [name, figure] of figures) {
      figure.values = past.map((each) => each[name] ?? null);
      draw(figure);
    }
  });
  source.addEventListener("sample", (event) => show(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    say(state, "not updating; trying again");
    // Refused, the browser doesn't try again by itself.
    if (source?.readyState === EventSource.CLOSED) {
      close();
      setTimeout(open, 30000);
    }
  });
}

function close() {
  source?.close();
  source = null;
}

document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
addEventListener("pagehide", close);
addEventListener("pageshow", open);
open();
