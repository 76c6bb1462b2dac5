/* Sorts tables that hold figures: a click or the enter key on a column's heading, once more for the
   other direction. Blank cells stay at the end, and a cell like "90.1 ± 0.5" counts by its mean. */

(function () {
  "use strict";

  const LEAST_ROWS = 4;

  function value(cell) {
    const text = cell.textContent.trim().replace(/−/g, "-").replace(/(\d),(?=\d{3}\b)/g, "$1");
    const number = /^[-+]?\d+(\.\d+)?(e[-+]?\d+)?(?=$|\s|%|±)/i.exec(text);
    return { text, number: number ? parseFloat(number[0]) : null };
  }

  /* Numbers before words, words by the alphabet, blanks last in either direction. */
  function compare(a, b, sign) {
    if (!a.text || !b.text) return (a.text ? 0 : 1) - (b.text ? 0 : 1);
    if (a.number !== null && b.number !== null) return sign * (a.number - b.number);
    if (a.number !== null || b.number !== null) return a.number !== null ? -1 : 1;
    return sign * a.text.localeCompare(b.text);
  }

  function sort(table, column, button) {
    const heads = [...table.tHead.rows[0].cells];
    const down = heads[column].getAttribute("aria-sort") === "ascending";
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => ({ row, key: value(row.cells[column]) }));
    rows.sort((a, b) => compare(a.key, b.key, down ? -1 : 1));  // equal rows keep their order
    rows.forEach(({ row }) => body.appendChild(row));
    button.focus();
  }

  function prepare(table) {
    const [head, body] = [table.tHead, table.tBodies[0]];
    if (!head || !body || head.rows.length !== 1 || body.rows.length < LEAST_ROWS) return;
    const columns = head.rows[0].cells.length;
    const rows = [...body.rows];
    if (rows.some((row) => row.cells.length !== columns)) return;
    if (!rows.some((row) => [...row.cells].some((cell) => value(cell).number !== null))) return;
    [...head.rows[0].cells].forEach((cell, column) => {
      if (!cell.textContent.trim()) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "mtl-sort";
      button.title = "Sort by this column";
      button.append(...cell.childNodes);
      cell.append(button);
      button.addEventListener("click", () => sort(table, column, button));
    });
  }

  function run() {
    document.querySelectorAll(".bd-article table:not(.mtl-methods)").forEach(prepare);
  }
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", run);
  else run();
}());
