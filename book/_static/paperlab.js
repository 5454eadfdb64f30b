// What the pages need of a script, and no more: names for the sliders, and tables that sort and filter.
(() => {
  "use strict";

  // --- sliders -------------------------------------------------------------------------------------------------------
  // The widgets draw a slider without a name, and with its index instead of its value. A screen reader needs both.
  function nameSlider(slider) {
    const handle = slider.querySelector(".noUi-handle");
    const label = slider.querySelector(".widget-label");
    const readout = slider.querySelector(".widget-readout");
    if (!handle || !label || !readout || handle.hasAttribute("aria-label")) return;
    handle.setAttribute("aria-label", label.textContent);
    label.removeAttribute("title");
    readout.setAttribute("contenteditable", "false"); // typing there changes nothing
    readout.setAttribute("aria-hidden", "true"); // the handle says it
    const say = () => {
      const value = readout.textContent;
      if (handle.getAttribute("aria-valuetext") !== value) handle.setAttribute("aria-valuetext", value);
    };
    new MutationObserver(say).observe(readout, { childList: true, characterData: true, subtree: true });
    new MutationObserver(say).observe(handle, { attributes: true, attributeFilter: ["aria-valuetext"] });
    say();
  }

  function nameSliders() {
    if (!document.querySelector('script[type="application/vnd.jupyter.widget-view+json"]')) return;
    const name = () => document.querySelectorAll(".widget-slider").forEach(nameSlider);
    new MutationObserver(name).observe(document.querySelector("main") || document.body, { childList: true, subtree: true });
    name();
  }

  // --- filters -------------------------------------------------------------------------------------------------------
  // A form filters the rows that follow it: every list by the row's data of the same name, the text by all its words.
  function filterable(box) {
    const form = box.querySelector("form");
    const scope = box.querySelector("tbody") ? box : box.closest("section");
    const rows = [...scope.querySelectorAll("tbody tr, .paperlab-papers li")];
    const sections = [...scope.querySelectorAll("section")];
    const text = new Map(rows.map((row) => [row, row.textContent.toLowerCase()]));
    const count = form.querySelector("output");

    function apply() {
      const asked = [...new FormData(form)].filter(([, value]) => value.trim());
      let shown = 0;
      for (const row of rows) {
        const kept = asked.every(([name, value]) =>
          name === "text"
            ? value.toLowerCase().split(/\s+/).every((word) => text.get(row).includes(word))
            : name === "verdict" && row.matches("tr") ? row.dataset.verdict === value
            : (row.dataset[name] || "").split(" ").includes(value));
        row.toggleAttribute("data-filtered-out", !kept);
        shown += kept;
      }
      for (const section of sections)
        section.toggleAttribute("data-filtered-out", !section.querySelector("li:not([data-filtered-out])"));
      const noun = box.dataset.noun + (rows.length === 1 ? "" : "s");
      count.textContent = asked.length ? `${shown} of ${rows.length} ${noun}` : `${rows.length} ${noun}`;
      const query = new URLSearchParams(asked).toString();
      history.replaceState(null, "", query ? `?${query}${location.hash}` : location.pathname + location.hash);
    }

    for (const [name, value] of new URLSearchParams(location.search))
      if (form.elements[name]) form.elements[name].value = value;
    form.addEventListener("input", apply);
    form.addEventListener("reset", () => setTimeout(apply));
    form.addEventListener("submit", (event) => event.preventDefault());
    form.hidden = false;
    apply();
  }

  // --- sorting -------------------------------------------------------------------------------------------------------
  // Headers become buttons, so that a keyboard reaches them. A cell sorts by its data-key, or by what it says.
  function sortable(table) {
    const body = table.tBodies[0];
    const key = (row, column) => row.cells[column].dataset.key ?? row.cells[column].textContent.trim();
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (!head.dataset.sort) return;
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") === "ascending";
        for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const compare = head.dataset.sort === "number"
          ? (a, b) => Number(key(a, column)) - Number(key(b, column))
          : (a, b) => key(a, column).localeCompare(key(b, column), "en", { numeric: true });
        const rows = [...body.rows].sort(compare);
        body.append(...(falling ? rows.reverse() : rows));
      });
    });
  }

  document.addEventListener("DOMContentLoaded", () => {
    nameSliders();
    document.querySelectorAll(".paperlab-filtered").forEach(filterable);
    document.querySelectorAll("table.paperlab-all").forEach(sortable);
  });
})();
