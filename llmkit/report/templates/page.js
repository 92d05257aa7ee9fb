"use strict";
// Show the values at a step of a curve on hover or touch; without script, tooltips have them.
for (const plot of document.querySelectorAll(".plot")) {
  const readout = plot.nextElementSibling;
  readout.hidden = false;
  const read = (event) => {
    const band = document.elementFromPoint(event.clientX, event.clientY)?.closest(".band");
    if (!band || !plot.contains(band)) return;
    plot.querySelector(".band.read")?.classList.remove("read");
    band.classList.add("read");
    readout.textContent = band.textContent.replaceAll("\n", " · ");
  };
  plot.addEventListener("pointerdown", read);
  plot.addEventListener("pointermove", read);
}

// Search, file selection and sorting for the table of samples, which is complete without them.
(() => {
  const form = document.getElementById("browse");
  if (!form) return;
  const body = document.querySelector("#records tbody");
  const rows = [...body.rows];
  const textOf = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
  const query = document.getElementById("query");
  const file = document.getElementById("file");
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  const PAGE = 25;
  let room = PAGE;

  function filter() {
    const wanted = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const row of body.rows) {
      const text = textOf.get(row);
      const fits = (!file.value || row.dataset.file === file.value) && wanted.every((word) => text.includes(word));
      found += fits;
      row.hidden = !fits || found > room;
    }
    count.textContent = `${found} of ${rows.length} records`;
    more.hidden = found <= room;
    more.textContent = `Show ${Math.min(PAGE, found - room)} more`;
  }

  function show(rowsAtMost) {
    room = rowsAtMost;
    filter();
  }

  const keyOf = (row, column) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  const isNumber = (text) => text !== "" && Number.isFinite(Number(text));

  function compare(a, b) {
    if (isNumber(a) && isNumber(b)) return Number(a) - Number(b);
    if (isNumber(a) !== isNumber(b)) return isNumber(a) ? -1 : 1;
    return a.localeCompare(b);
  }

  document.querySelectorAll("#records thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      document.querySelectorAll("#records thead th").forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const ordered = [...rows].sort((a, b) => sign * compare(keyOf(a, column), keyOf(b, column)));
      body.append(...ordered);
      show(PAGE);
    });
  });

  form.addEventListener("submit", (event) => event.preventDefault());
  query.addEventListener("input", () => show(PAGE));
  file.addEventListener("input", () => show(PAGE));
  more.addEventListener("click", () => show(room + PAGE));
  form.hidden = false;
  show(PAGE);
})();
