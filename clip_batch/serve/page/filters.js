// The panel of filters, made from what the service says is in the index.

import { $, el, later } from "./dom.js";
import { number, say } from "./words.js";

const SHOWN = 8;   // values of a column that are shown before it is unfolded
const PATIENCE = 350;   // milliseconds after the last change of a slider or a text

// `change` gets the new filters, or the new threshold.
export function createFilters(change) {
  let facts = null, filters = [], drawn = "";
  const soon = later((column, filter) => set(column, filter), PATIENCE);
  const of = column => filters.find(filter => filter.column === column) ?? {};

  function set(column, filter) {
    const others = filters.filter(one => one.column !== column);
    filters = filter ? [...others, { column, ...filter }] : others;
    drawn = JSON.stringify(filters);   // the panel shows them already
    change({ filters });
  }

  function choices(column, current) {
    const chosen = new Set(current.in ?? []);
    const values = column.kind === "number" ? column.values.toSorted((a, b) => a.value - b.value) : column.values;
    const boxes = values.map(({ value, count }, place) => {
      const box = el("input", { type: "checkbox", checked: chosen.has(value) });
      box.onchange = () => {
        if (box.checked) chosen.add(value);
        else chosen.delete(value);
        set(column.name, chosen.size ? { in: [...chosen] } : null);
      };
      const text = typeof value === "boolean" ? say(value ? "yes" : "no") : String(value);
      return el("label", { className: "choice", hidden: place >= SHOWN && !chosen.has(value) }, box,
        el("span", { dir: "auto", textContent: text || "“”" }), el("small", { textContent: number(count) }));
    });
    if (boxes.every(box => !box.hidden)) return boxes;
    const more = el("button", { type: "button", className: "quiet", textContent: say("more") });
    more.onclick = () => {
      boxes.forEach(box => (box.hidden = false));
      more.remove();
    };
    return [...boxes, more];
  }

  function range(column, current) {
    const { min, max, histogram } = column, whole = Number.isInteger(min) && Number.isInteger(max);
    const step = whole ? 1 : Number(((max - min) / 200).toPrecision(2));
    const tallest = Math.max(...histogram, 1);
    const bars = histogram.map(count => {
      const bar = el("i");
      bar.style.height = `${count ? Math.max(4, (100 * count) / tallest) : 0}%`;
      return bar;
    });
    const field = (end, label) => el("input", { type: "number", step: "any", value: current[end] ?? "", placeholder: String(column[end]), label });
    const thumb = (end, label) => el("input", { type: "range", min, max, step, value: current[end] ?? column[end], label });
    const low = field("min", say("from", { name: column.name })), high = field("max", say("to", { name: column.name }));
    const left = thumb("min", say("from", { name: column.name })), right = thumb("max", say("to", { name: column.name }));
    const paint = () => bars.forEach((bar, place) => {
      const at = min + ((place + 0.5) * (max - min)) / bars.length;
      bar.classList.toggle("out", (low.value !== "" && at < Number(low.value)) || (high.value !== "" && at > Number(high.value)));
    });
    const tell = () => {
      paint();
      const ends = {};
      if (low.value !== "") ends.min = Number(low.value);
      if (high.value !== "") ends.max = Number(high.value);
      soon(column.name, Object.keys(ends).length ? ends : null);
    };
    left.oninput = () => {
      if (Number(left.value) > Number(right.value)) left.value = right.value;
      low.value = Number(left.value) <= min ? "" : left.value;
      tell();
    };
    right.oninput = () => {
      if (Number(right.value) < Number(left.value)) right.value = left.value;
      high.value = Number(right.value) >= max ? "" : right.value;
      tell();
    };
    low.oninput = high.oninput = () => {
      left.value = low.value === "" ? min : low.value;
      right.value = high.value === "" ? max : high.value;
      tell();
    };
    paint();
    return [el("div", { className: "bars" }, ...bars), el("div", { className: "thumbs" }, left, right),
      el("div", { className: "ends" }, low, el("span", { textContent: "–" }), high)];
  }

  function days(column, current) {
    const field = (end, label) => el("input", { type: "date", min: column.min, max: column.max, value: current[end] ?? "", label });
    const low = field("min", say("from", { name: column.name })), high = field("max", say("to", { name: column.name }));
    low.onchange = high.onchange = () => {
      const ends = { ...(low.value && { min: low.value }), ...(high.value && { max: high.value }) };
      set(column.name, Object.keys(ends).length ? ends : null);
    };
    return [low, high];
  }

  function words(column, current) {
    const field = el("input", { type: "search", dir: "auto", value: current.contains ?? "", placeholder: say("contains"), label: say("containsLabel", { name: column.name }) });
    field.oninput = () => soon(column.name, field.value.trim() ? { contains: field.value.trim() } : null);
    return [field];
  }

  function part(column) {
    const current = of(column.name);
    const kind = column.values.length ? choices : column.kind === "number" ? range : column.kind === "date" ? days : words;
    return el("fieldset", { className: "filter" }, el("legend", { dir: "auto", textContent: column.name }), ...kind(column, current));
  }

  // A column of which all rows have one value filters nothing.
  const useful = column => column.values.length !== 1 && (column.min === null || column.min !== column.max);
  const order = column => (column.values.length ? 0 : { number: 1, date: 2 }[column.kind] ?? 3);

  function draw() {
    drawn = JSON.stringify(filters);
    const columns = facts ? facts.columns.filter(useful).toSorted((a, b) => order(a) - order(b)) : [];
    $("columns").replaceChildren(...columns.map(part));
    $("no-columns").hidden = columns.length > 0;
    $("looked-at").textContent = facts && facts.looked_at < facts.rows ? say("lookedAt", { n: facts.looked_at, rows: facts.rows }) : "";
  }

  const threshold = later(value => change({ threshold: value }), PATIENCE);
  $("lowest").oninput = event => {
    const value = Number(event.target.value) || null;
    tellLowest(value);
    threshold(value);
  };
  const tellLowest = value => ($("lowest-value").textContent = value === null ? say("anyScore") : value.toFixed(2));
  $("clear-filters").onclick = () => change({ filters: [], threshold: null });

  return {
    // Shows the facts of an index; null where there are none.
    learn(learned) {
      facts = learned;
      draw();
    },
    // Shows the filters of a query.
    show(query) {
      filters = query.filters;
      if (JSON.stringify(filters) !== drawn) draw();
      $("lowest").value = query.threshold ?? 0;
      tellLowest(query.threshold);
      const count = filters.length + (query.threshold !== null);
      $("filter-count").textContent = count || "";
      $("filter-button").setAttribute("aria-label", count ? say("filtersOn", { n: count }) : say("filters"));
      $("clear-filters").hidden = !count;
    },
    // Fits the slider of scores to the best score that was seen.
    best(score) {
      const most = Math.max(0.1, Math.ceil(score * 20) / 20);
      if (Number($("lowest").value) <= most) $("lowest").max = most;
    },
  };
}
