// The grid of hits, one card each. Arrow keys move between cards, and Tab reaches only the current one.

import { $, el, icon, iconButton, link, safeUrl } from "./dom.js";

export const EAGER = 12;   // the first cards load their pictures at once, the others when they are near the screen
export const LESS = -0.5;   // the weight of a subtracted hit: subtracting a whole vector would leave little of the query
const NARROW = 0.5, WIDE = 2.4;

export const nameOf = hit => String(hit.metadata.caption || hit.metadata.key || `row ${hit.id}`);

// Returns the web address in the hit's metadata, or null.
export function urlOf(hit) {
  const { url, image_url, link } = hit.metadata;
  return [url, image_url, link].map(safeUrl).find(Boolean) ?? null;
}

// Returns the picture of a hit, or a placeholder if it has none. A picture that does not load is replaced by one.
export function picture(hit, lazy, onload = () => {}) {
  const placeholder = text => el("span", { className: "none" }, icon("broken"), text);
  if (!hit.image) return placeholder("no image");
  const image = el("img", { alt: "", decoding: "async", draggable: true });
  image.loading = lazy ? "lazy" : "eager";
  image.onload = () => onload(image.naturalWidth / image.naturalHeight);
  image.onerror = () => image.replaceWith(placeholder("cannot be shown"));
  image.src = hit.image.replace(/^\//, "");
  return image;
}

function card(hit, place, act) {
  const name = nameOf(hit), url = urlOf(hit);
  const shape = ratio => ratio > 0 && box.style.setProperty("--ratio", Math.min(Math.max(ratio, NARROW), WIDE).toFixed(3));
  const look = el("button", { type: "button", className: "picture", label: `Find images like: ${name}`, title: name, onclick: () => act.similar(hit) });
  const box = el("li", { className: "hit", data: { id: hit.id } }, look,
    el("div", { className: "acts" },
      iconButton("plus", `Add to the query: ${name}`, () => act.add(hit, 1)),
      iconButton("minus", `Subtract from the query: ${name}`, () => act.add(hit, LESS)),
      iconButton("info", `Details: ${name}`, () => act.details(hit))),
    el("div", { className: "about" },
      el("span", { className: "caption", textContent: name }),
      ...(url ? [Object.assign(link(url, icon("link")), { title: url, ariaLabel: `Open the web address of: ${name}` })] : []),
      el("span", { className: "score", textContent: hit.score.toFixed(3), title: "cosine" })));
  shape(hit.metadata.width / hit.metadata.height);
  look.append(picture(hit, place >= EAGER, shape));
  return box;
}

export function createGrid(act) {
  const grid = $("hits");
  let hits = [], current = null;

  // Makes only the current card's buttons reachable by Tab.
  function setCurrent(box) {
    for (const [one, stop] of [[current, -1], [box, 0]]) one?.querySelectorAll("button, a").forEach(part => (part.tabIndex = stop));
    current = box;
  }

  function add(more) {
    const boxes = more.map((hit, place) => card(hit, hits.length + place, act));
    for (const box of boxes) box.querySelectorAll("button, a").forEach(part => (part.tabIndex = -1));
    hits = hits.concat(more);
    grid.append(...boxes);
    if (!current && boxes.length) setCurrent(boxes[0]);
  }

  function clear() {
    hits = [];
    current = null;
    grid.replaceChildren();
  }

  function focus(box) {
    if (!box) return;
    setCurrent(box);
    box.querySelector(".picture").focus({ preventScroll: true });
    box.scrollIntoView({ block: "nearest" });
  }

  // Returns the card in the row above or below whose centre is nearest.
  function across(down) {
    const middle = box => box.offsetLeft + box.offsetWidth / 2;
    let row = null, best = null;
    for (let box = current; (box = down ? box.nextElementSibling : box.previousElementSibling);) {
      if (box.offsetTop === current.offsetTop) continue;
      row ??= box.offsetTop;
      if (box.offsetTop !== row) break;
      if (!best || Math.abs(middle(box) - middle(current)) < Math.abs(middle(best) - middle(current))) best = box;
    }
    return best;
  }

  grid.addEventListener("focusin", event => setCurrent(event.target.closest(".hit")));
  grid.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const hit = hits[[...grid.children].indexOf(current)];
    const keys = {
      ArrowRight: () => focus(current.nextElementSibling), ArrowLeft: () => focus(current.previousElementSibling),
      ArrowDown: () => focus(across(true)), ArrowUp: () => focus(across(false)),
      Home: () => focus(grid.firstElementChild), End: () => focus(grid.lastElementChild),
      "+": () => act.add(hit, 1), "-": () => act.add(hit, LESS), i: () => act.details(hit),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  return { add, clear, focusCurrent: () => focus(current), get hits() { return hits; } };
}

export function showDetails(hit) {
  const value = text => (safeUrl(text) ? link(safeUrl(text), String(text)) : typeof text === "object" ? JSON.stringify(text) : String(text));
  const fields = { row: hit.id, score: hit.score.toFixed(4), ...hit.metadata };
  $("detail-name").textContent = nameOf(hit);
  $("detail-picture").replaceChildren(picture(hit, false));
  $("detail-fields").replaceChildren(...Object.entries(fields).filter(([, text]) => text !== null && text !== "")
    .flatMap(([name, text]) => [el("dt", { textContent: name }), el("dd", {}, value(text))]));
  $("detail").showModal();
}
