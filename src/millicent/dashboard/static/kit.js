// Tables can be sorted by any column, where there is JavaScript: each heading becomes a button.

const compare = new Intl.Collator(undefined, { numeric: true }).compare;

function key(row, index) {
  const cell = row.cells[index];
  return cell?.dataset.sort ?? cell?.textContent.trim() ?? "";
}

/** What is unknown comes last, whichever way. */
function order(table, index, descending) {
  const body = table.tBodies[0];
  const rows = [...body.rows].map((row) => ({ row, value: key(row, index) }));
  const numbers = rows.every(({ value }) => value === "" || !Number.isNaN(Number(value)));
  rows.sort((one, other) => {
    if (one.value === "" || other.value === "") return (one.value === "") - (other.value === "");
    const by = numbers ? Number(one.value) - Number(other.value) : compare(one.value, other.value);
    return descending ? -by : by;
  });
  body.append(...rows.map(({ row }) => row));
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, index) => {
    if (!head.textContent.trim()) return; // what has no name is not sorted by
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const descending = was ? was === "ascending" : head.classList.contains("num");
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      order(table, index, descending);
    });
  });
}

for (const table of document.querySelectorAll("table.sortable")) if (table.tBodies[0].rows.length > 1) sortable(table);
