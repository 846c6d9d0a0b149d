for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    // Numbers are wanted largest first, words from A on; a second click turns the order around. Unknown is always last.
    const order = row => row.cells[column].dataset.order;
    const unknown = row => order(row) === "-inf" || order(row) === "";
    const known = [...body.rows].filter(row => !unknown(row));
    const numbers = known.every(row => !isNaN(order(row)));
    const now = head.getAttribute("aria-sort");
    const down = now ? now === "ascending" : numbers;
    const compare = numbers
      ? (a, b) => Number(order(a)) - Number(order(b))
      : (a, b) => order(a).localeCompare(order(b), "en", {numeric: true});
    known.sort((a, b) => down ? compare(b, a) : compare(a, b));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...known, ...[...body.rows].filter(unknown));
  }));
}
