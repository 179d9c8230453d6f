(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const view = document.getElementById("view"), box = document.getElementById("search");
  const hits = document.getElementById("hits"), found = document.getElementById("found");
  const MOST = 40;
  // Everything from the data goes through textContent: it is never markup.
  const make = (tag, text, parent, set) => {
    const node = document.createElement(tag);
    if (text !== null) node.textContent = text;
    if (set) for (const [k, v] of Object.entries(set)) node.setAttribute(k, v);
    if (parent) parent.append(node);
    return node;
  };
  const href = (kind, name) => "#" + kind + "/" + encodeURIComponent(name);
  const link = (kind, name, parent) => make("a", name, parent, { href: href(kind, name) });
  const facts = (pairs, parent) => {
    const list = make("dl", null, parent);
    for (const [name, value] of pairs) { const row = make("div", null, list); make("dt", name, row); make("dd", value, row); }
  };
  const table = (heads, rows, parent, label) => {
    const scroll = make("div", null, parent, { class: "scroll", tabindex: "0", role: "region", "aria-label": label });
    const t = make("table", null, scroll, { "aria-label": label });
    const head = make("tr", null, make("thead", null, t));
    heads.forEach((h, i) => make("th", h, head, i ? { scope: "col", class: "number" } : { scope: "col" }));
    const body = make("tbody", null, t);
    for (const row of rows) {
      const line = make("tr", null, body);
      row.forEach((value, i) => {
        const cell = make("td", null, line, i ? { class: "number", "data-name": heads[i] } : { "data-name": heads[i] });
        if (value instanceof Node) cell.append(value); else cell.textContent = value;
      });
    }
  };
  const percent = x => (100 * x).toFixed(1) + " %", small = x => x === null ? "" : x.toPrecision(3);
  const snippets = (unit, most, parent) => {
    const list = make("ul", null, parent, { class: "snippets" });
    for (const [value, pieces] of unit.q.slice(0, most)) {
      const item = make("li", null, list);
      make("span", small(value), item, { class: "value", title: "value at the peak" });
      for (const [text, how] of pieces) {
        if (how) make("mark", text, item, how === 2 ? { class: "peak" } : null); else item.append(text);
      }
    }
    if (!unit.q.length) make("p", "It is above its threshold nowhere.", parent);
  };
  const concept = c => {
    make("h3", c.n, view);
    make("p", c.a + ".", view);
    facts([["kind", c.k], ["tokens", c.t.toLocaleString("en") + " (" + percent(c.s) + " of the stream)"],
      ["best concept of", c.d + (c.d === 1 ? " detector" : " detectors")], ["possible IoU", c.m.toFixed(3) + ", the largest with a full top"]], view);
    if (c.x.length) {
      make("h4", "What its detectors cause", view);
      table(["act", "detectors, nats", "random units", "difference [95 %]"], c.x, view, "What the detectors of " + c.n + " cause");
    }
    for (const [u] of c.u.slice(0, 3)) {
      const title = make("h4", "At the top of ", view);
      link("unit", data.units[u].n, title);
      snippets(data.units[u], 4, view);
    }
    make("h4", "Units by IoU", view);
    table(["unit", "IoU", "precision", "recall", "selectivity"], c.u.map(([u, i, p, r, s]) =>
      [link("unit", data.units[u].n), i.toFixed(3), percent(p), percent(r), s.toFixed(1)]), view, "Units by IoU with " + c.n);
  };
  const unit = u => {
    make("h3", u.n, view);
    facts([["threshold", small(u.t)], ["mean ± sd", small(u.m) + " ± " + small(u.d)],
      ["tokens above", u.a.toLocaleString("en")], ["by chance", u.p === null ? "not drawn" : "IoU as large: p = " + small(u.p)]], view);
    make("h4", "Where it is largest", view);
    snippets(u, u.q.length, view);
    make("h4", "Concepts by IoU", view);
    table(["concept", "IoU", "precision", "recall", "selectivity"], u.c.map(([c, i, p, r, s]) =>
      [link("concept", data.concepts[c].n), i.toFixed(3), percent(p), percent(r), s.toFixed(1)]), view, "Concepts of " + u.n);
  };
  const show = () => {
    const [kind, name] = location.hash.slice(1).split("/").map(part => { try { return decodeURIComponent(part); } catch { return part; } });
    const known = kind === "concept" ? data.concepts : kind === "unit" ? data.units : null;
    if (!known) return;
    const one = known.find(k => k.n === name);
    view.replaceChildren();
    if (one) (kind === "concept" ? concept : unit)(one); else make("p", "There is no page for " + name + ".", view);
    view.focus({ preventScroll: true });
    view.scrollIntoView();
  };
  const text = u => u.q.map(([, pieces]) => pieces.map(p => p[0]).join("")).join("\n");
  const search = () => {
    const word = box.value.trim().toLowerCase();
    hits.replaceChildren();
    if (!word) {
      for (const c of data.concepts) { const item = make("li", null, hits); link("concept", c.n, item); item.append(" " + c.d); }
      found.textContent = data.concepts.length + " concepts with the number of their detectors, and " + data.units.length.toLocaleString("en") + " units with a page.";
      return;
    }
    const named = [...data.concepts.filter(c => (c.n + " " + c.a + " " + c.k).toLowerCase().includes(word)).map(c => ["concept", c, ""]),
      ...data.units.filter(u => u.n.toLowerCase().includes(word)).map(u => ["unit", u, ""])];
    const inText = [];
    for (const u of data.units) {
      const all = text(u), at = all.toLowerCase().indexOf(word);
      if (at >= 0) inText.push(["unit", u, all.slice(Math.max(0, at - 30), at + word.length + 30).replace(/\n/g, " ")]);
    }
    for (const [kind, one, context] of [...named.slice(0, MOST), ...inText.slice(0, MOST)]) {
      const item = make("li", null, hits, context ? { class: "in-text" } : null);
      link(kind, one.n, item);
      if (context) item.append(" …" + context + "…");
    }
    const shown = Math.min(named.length, MOST) + Math.min(inText.length, MOST), all = named.length + inText.length;
    found.textContent = all ? all + " found" + (shown < all ? ", the first " + shown + " shown." : ".") : "Nothing found.";
  };
  document.getElementById("browser").hidden = false;
  box.addEventListener("input", search);
  addEventListener("hashchange", show);
  search();
  show();
})();
