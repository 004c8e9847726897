// The grid of hits: justified rows, of which only those near the screen exist, so that 30,000 hits scroll as 30 do.
// Arrow keys move between cards, and Tab reaches only the current one.

import { $, el, icon, iconButton, link } from "./dom.js";
import { between, justify } from "./layout.js";
import { nameOf, originalOf, picture, ratioOf, urlOf } from "./picture.js";
import { number, say } from "./words.js";

export const LESS = -0.5;   // the weight of a subtracted hit: subtracting a whole vector would leave little of the query
const GUESS = 1.2;   // the proportions of a picture until it is there
const TOGETHER = 140;   // milliseconds in which pictures that arrive are arranged at once, so that cards jump once at most
const PRINTED = 60;   // cards on the printed page

const known = new Map();   // proportions of the pictures that were seen, by address

export function createGrid(act) {
  const grid = $("hits");
  let hits = [], ratios = [], layout = { boxes: [], height: 0 };
  let current = 0, width = 0, arrived = [];
  const cards = new Map();   // by place

  const top = () => grid.getBoundingClientRect().top + scrollY;

  // Returns the first card that is wholly on the screen, and how far down; null at the top of the page.
  function anchor() {
    const above = scrollY - top();
    if (above <= 0) return null;
    const [place] = between(layout.boxes, above, above), at = layout.boxes.findIndex((box, at) => at >= place && box.top >= above);
    return at > 0 ? { place: at, down: layout.boxes[at].top - above } : null;
  }

  // Scrolls so that a card is as far down the screen as `anchor` said.
  function restore(kept) {
    const box = layout.boxes[kept?.place];
    scrollTo({ top: box ? top() + box.top - kept.down : 0, behavior: "instant" });
    draw();
  }

  function arrange() {
    const kept = anchor();   // what is read stays where it is
    const small = width < 620;
    layout = justify(ratios, width, { row: small ? 116 : width < 1100 ? 172 : 204, gap: small ? 10 : 16, about: small ? 40 : 46, narrowest: small ? 84 : 124 });
    grid.style.height = `${layout.height}px`;
    if (kept) restore(kept);
    else draw();
  }

  function range() {
    const start = scrollY - top(), screens = innerHeight;
    return between(layout.boxes, start - 0.8 * screens, start + 1.8 * screens);
  }

  function draw([from, to] = range()) {
    for (const [place, box] of cards) {
      if (place >= from && place < to || box.contains(document.activeElement)) continue;
      box.remove();
      cards.delete(place);
    }
    let next = null;
    for (let place = to - 1; place >= from; place--) {
      const box = cards.get(place) ?? card(place);
      cards.set(place, box);
      const { left, top, width, height } = layout.boxes[place];
      Object.assign(box.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` });
      if (box.parentNode !== grid || box.nextElementSibling !== next) grid.insertBefore(box, next);
      next = box;
    }
    if (hits.length && scrollY + 2.5 * innerHeight > top() + layout.height) act.more();
  }

  function card(place) {
    const hit = hits[place], name = nameOf(hit), url = urlOf(hit), address = originalOf(hit);
    const look = el("button", { type: "button", className: "picture", label: say("open", { name }), title: name, onclick: () => act.open(hit) });
    const box = el("li", { className: "hit", data: { id: hit.id, place } }, look,
      el("div", { className: "acts" },
        iconButton("similar", say("similar", { name }), () => act.similar(hit)),
        iconButton("plus", say("add", { name }), () => act.add(hit, 1)),
        iconButton("minus", say("subtract", { name }), () => act.add(hit, LESS))),
      el("div", { className: "about" },
        el("span", { className: "caption", dir: "auto", textContent: name }),
        ...(url ? [Object.assign(link(url, icon("link")), { title: url, ariaLabel: say("web", { name }) })] : []),
        ...(hit.score === undefined ? [] : [el("span", { className: "score", textContent: hit.score.toFixed(3), title: say("score") })])));
    box.setAttribute("aria-posinset", place + 1);
    box.setAttribute("aria-setsize", hits.length);
    const told = known.has(address) || ratioOf(hit) !== null;
    const image = picture(hit, layout.boxes[place].width, ratio => {
      known.set(address, ratio);
      if (told && Math.abs(ratio / ratios[place] - 1) < 0.03) return look.classList.add("shown");
      if (hits[place] !== hit) return;
      ratios[place] = ratio;
      if (!arrived.length) setTimeout(settle, TOGETHER);
      arrived.push(look);
    });
    if (!address) look.classList.add("shown");
    box.classList.toggle("worded", image.className === "words");   // which needs no caption below
    image.addEventListener("error", () => look.classList.add("shown"));
    look.append(image);
    reach(box, place === current);
    return box;
  }

  function settle() {
    for (const look of arrived) look.classList.add("shown");
    arrived = [];
    arrange();
  }

  function reach(box, on) {
    box?.querySelectorAll("button, a").forEach(part => (part.tabIndex = on ? 0 : -1));
  }

  // Makes only the current card's buttons reachable by Tab.
  function setCurrent(place) {
    reach(cards.get(current), false);
    current = place;
    reach(cards.get(current), true);
  }

  function add(more) {
    ratios.push(...more.map(hit => known.get(originalOf(hit)) ?? ratioOf(hit) ?? (originalOf(hit) ? GUESS : 1.6)));
    hits = hits.concat(more);
    arrange();
  }

  // Shows other hits, of which `place` is the current one; the focus stays on the hits if it is there.
  function show(shown, place = 0) {
    const focused = grid.contains(document.activeElement);
    clear();
    add(shown);
    if (focused) focus(place);
    else setCurrent(place);
  }

  function clear() {
    for (const box of cards.values()) box.remove();
    cards.clear();
    hits = [];
    ratios = [];
    arrived = [];
    current = 0;
    layout = { boxes: [], height: 0 };
    grid.style.height = "0";
  }

  // Scrolls a card into view, below the header that covers the top.
  function reveal(place) {
    const box = layout.boxes[place], start = top() + box.top, covered = document.querySelector("header").offsetHeight + 12;
    if (start - covered < scrollY) scrollTo({ top: start - covered, behavior: "instant" });
    else if (start + box.height + 12 > scrollY + innerHeight) scrollTo({ top: start + box.height + 12 - innerHeight, behavior: "instant" });
    draw();
  }

  function focus(place) {
    if (place === null || !hits[place]) return;
    reveal(place);
    setCurrent(place);
    cards.get(place).querySelector(".picture").focus({ preventScroll: true });
  }

  // Returns the card in the row above or below whose centre is nearest, or null.
  function across(step) {
    const middle = box => box.left + box.width / 2, here = layout.boxes[current];
    let best = null;
    for (let place = current + step; layout.boxes[place]; place += step) {
      const box = layout.boxes[place];
      if (box.row === here.row) continue;
      if (box.row !== here.row + step) break;
      if (best === null || Math.abs(middle(box) - middle(here)) < Math.abs(middle(layout.boxes[best]) - middle(here))) best = place;
    }
    return best;
  }

  grid.addEventListener("focusin", event => {
    const box = event.target.closest(".hit");
    if (box) setCurrent(Number(box.dataset.place));
  });
  grid.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const hit = hits[current];
    const keys = {
      ArrowRight: () => focus(current + 1), ArrowLeft: () => focus(current - 1),
      ArrowDown: () => focus(across(1)), ArrowUp: () => focus(across(-1)),
      Home: () => focus(0), End: () => focus(hits.length - 1),
      "+": () => act.add(hit, 1), "-": () => act.add(hit, LESS), s: () => act.similar(hit),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  let asked = false;
  addEventListener("scroll", () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  }, { passive: true });
  new ResizeObserver(() => {
    if (grid.clientWidth === width) return;
    width = grid.clientWidth;
    arrange();
  }).observe(grid);
  addEventListener("beforeprint", () => draw([0, Math.min(PRINTED, hits.length)]));
  addEventListener("afterprint", () => draw());

  width = grid.clientWidth;
  return { add, anchor, restore, show, clear, focus, focusCurrent: () => focus(current), reveal, get hits() { return hits; }, get current() { return current; }, count: () => number(hits.length) };
}
