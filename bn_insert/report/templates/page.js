// Table headings become buttons that sort by their column; a second click or Enter reverses the order.
const order = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  if (a === "" || b === "") return (a === "") - (b === "");
  const [x, y] = [a, b].map((text) => Number(text.replace(/[,%\s]/g, "")));
  return Number.isNaN(x) || Number.isNaN(y) ? order.compare(a, b) : x - y;
}

function sortBy(table, column) {
  const heading = table.tHead.rows[0].cells[column];
  const direction = heading.ariaSort === "ascending" ? "descending" : "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", direction);
  const rows = [...table.tBodies[0].rows];
  const text = (row) => row.cells[column].textContent.trim();
  rows.sort((a, b) => (direction === "ascending" ? 1 : -1) * compare(text(a), text(b)));
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    heading.scope = "col";
    const title = heading.textContent.trim();
    if (title === "" || table.tBodies[0].rows.length < 2) return;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title;
    button.addEventListener("click", () => sortBy(table, column));
    heading.replaceChildren(button);
  });
}
