// The grid: one card a hit, moved through by arrows, one of them reachable by Tab at a time.

import { $, el, icon, iconButton, link, safeUrl } from "./dom.js";

export const EAGER = 12;   // cards that come first, their pictures asked for at once; the others when they are near
export const LESS = -0.5;   // a whole vector taken away leaves little of what was asked for
const NARROW = 0.5, WIDE = 2.4;

export const nameOf = hit => String(hit.metadata.caption || hit.metadata.key || `row ${hit.id}`);

// The hit's own web address, if its metadata has one.
export function urlOf(hit) {
  const { url, image_url, link } = hit.metadata;
  return [url, image_url, link].map(safeUrl).find(Boolean) ?? null;
}

// The picture of a hit; what stands in for it where there is none, or where it does not load.
export function picture(hit, lazy, onload = () => {}) {
  const none = text => el("span", { className: "none" }, icon("broken"), text);
  if (!hit.image) return none("no image");
  const image = el("img", { alt: "", decoding: "async", draggable: true });
  image.loading = lazy ? "lazy" : "eager";
  image.onload = () => onload(image.naturalWidth / image.naturalHeight);
  image.onerror = () => image.replaceWith(none("cannot be shown"));
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

  // Only the current card's buttons are stops of Tab; the arrows go from card to card.
  function setCurrent(box) {
    for (const [one, stop] of [[current, -1], [box, 0]]) one?.querySelectorAll("button, a").forEach(part => (part.tabIndex = stop));
    current = box;
  }

  function add(found) {
    const boxes = found.map((hit, place) => card(hit, hits.length + place, act));
    for (const box of boxes) box.querySelectorAll("button, a").forEach(part => (part.tabIndex = -1));
    hits = hits.concat(found);
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

  // The card above or below whose middle is nearest.
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
