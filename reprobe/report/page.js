(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const dark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const label = () => { button.textContent = dark() ? "Light theme" : "Dark theme"; };
  const asked = location.hash.slice(1);
  if (asked === "dark" || asked === "light") root.dataset.theme = asked;
  button.addEventListener("click", () => { root.dataset.theme = dark() ? "light" : "dark"; label(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", label);
  label();
  button.hidden = false;

  // Tables of more than one row sort by a column: numbers first from the greatest, then the other way, then as written.
  const shown = cell => cell ? cell.textContent.trim() : "";
  const number = cell => { const found = shown(cell).replace(/\u2212/g, "-").replace(/,/g, "").match(/[-+]?\d*\.?\d+(e[-+]?\d+)?/i); return found ? parseFloat(found[0]) : NaN; };
  const turns = { none: ["ascending", "descending"], ascending: ["descending", "none"], descending: ["none", "ascending"] };
  for (const table of document.querySelectorAll("main table")) {
    const body = table.tBodies[0];
    if (!body || body.rows.length < 2) continue;
    const written = [...body.rows], heads = [...table.tHead.rows[0].cells];
    table.classList.add("sorts");
    heads.forEach((head, column) => {
      const numeric = head.classList.contains("number"), press = document.createElement("button");
      press.type = "button";
      press.append(...head.childNodes);
      head.append(press);
      head.setAttribute("aria-sort", "none");
      press.addEventListener("click", () => {
        const now = turns[head.getAttribute("aria-sort")][numeric ? 1 : 0];
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", now);
        const sign = now === "descending" ? -1 : 1;
        const order = (a, b) => {
          const [x, y] = [a.cells[column], b.cells[column]];
          if (!numeric) return sign * shown(x).localeCompare(shown(y), "en", { numeric: true });
          const [p, q] = [number(x), number(y)];
          return isNaN(p) || isNaN(q) ? isNaN(p) - isNaN(q) : sign * (p - q);
        };
        body.append(...(now === "none" ? written : [...written].sort(order)));
      });
    });
  }
})();
