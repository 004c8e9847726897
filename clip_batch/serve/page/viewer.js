// The viewer: one hit as large as the screen, with all that is known of it.

import { $, el, link, safeUrl } from "./dom.js";
import { LESS } from "./hits.js";
import { copyOf, instead, nameOf, originalOf, placeholder, proportions } from "./picture.js";
import { number, say } from "./words.js";
import { createZoom } from "./zoom.js";

const SMALL = 320;   // pixels: the width of the copy that is shown until the large one is there
const LONG = 280;   // characters of a caption from which it is folded

// `act` has similar(hit), add(hit, weight), step(number) and close(), which change the page's state.
export function createViewer(act) {
  const viewer = $("viewer"), stage = $("stage");
  let hit = null;
  const zoom = createZoom(stage, {
    swiped: way => (way === "close" ? act.close() : act.step(way === "next" ? 1 : -1)),
    zoomed: sharpen,
  });

  function show(shown, place, count) {
    hit = shown;
    const name = nameOf(hit);
    $("viewer-name").textContent = name;
    $("viewer-name").classList.toggle("folded", name.length > LONG);
    $("fold").hidden = name.length <= LONG;
    $("fold").textContent = say("more");
    $("place").textContent = place === null ? "" : say("place", { place: place + 1, count });
    $("previous").disabled = !place;
    $("next").disabled = place === null || place + 1 >= count;
    const original = originalOf(hit);
    $("original").hidden = !original;
    if (original) $("original").href = original;
    showFacts();
    showPicture(name);
    if (!viewer.open) {
      viewer.showModal();
      $("viewer-panel").scrollTop = 0;
    }
  }

  function showPicture(name) {
    if (!originalOf(hit)) {
      $("picture").replaceChildren(instead(hit));
      return zoom.on(null);
    }
    const image = el("img", { alt: name, draggable: false, decoding: "async" });
    image.onerror = () => image.replaceWith(placeholder(say("cannotShow")));
    image.onload = () => {   // the small copy that the page showed has the proportions, the large one the size
      image.style.setProperty("--ratio", proportions(image));
      if (image.naturalWidth < SMALL || image.src !== small) image.style.setProperty("--most", `${Math.max(image.naturalWidth, SMALL)}px`);
      if (image.src === small) replace(image, copyOf(hit, Math.max(innerWidth, innerHeight) * devicePixelRatio > 1400 ? 2560 : 1280));
    };
    image.src = copyOf(hit, SMALL);
    const small = image.src;
    $("picture").replaceChildren(image);
    zoom.on(image);
  }

  // Shows another copy of the same picture in its place, as soon as it is there.
  function replace(image, address) {
    const other = el("img", { src: address });
    other.onload = () => {
      if (image.isConnected && image.src !== other.src) image.src = other.src;
    };
  }

  // Loads the original in place of the copy, once it is looked at closely.
  function sharpen(image) {
    if (!image || image.dataset.sharp || !hit.image) return;
    image.dataset.sharp = "1";
    replace(image, originalOf(hit));
  }

  function showFacts() {
    const ours = [[say("id"), number(hit.id)], ...(hit.score === undefined ? [] : [[say("score"), hit.score.toFixed(4)]]),
      ...(hit.aesthetic === undefined ? [] : [[say("aesthetic"), hit.aesthetic.toFixed(3)]])];
    $("ours").replaceChildren(...ours.flatMap(([name, value]) => [el("dt", { textContent: name }), el("dd", { textContent: value })]));
    const theirs = Object.entries(hit.metadata).filter(([, value]) => value !== null && value !== "");
    $("theirs").replaceChildren(...theirs.flatMap(([name, value]) => [
      el("dt", { dir: "auto", textContent: name }), el("dd", { dir: "auto" }, worded(value))]));
  }

  function worded(value) {
    if (safeUrl(value)) return link(safeUrl(value), String(value));
    return typeof value === "object" ? JSON.stringify(value, null, 1) : typeof value === "boolean" ? say(value ? "yes" : "no") : String(value);
  }

  async function copyLink() {
    try {
      await navigator.clipboard.writeText(location.href);
    } catch {   // a page without TLS may not: the old way
      const field = el("textarea", { value: location.href, readOnly: true });
      viewer.append(field);
      field.select();
      document.execCommand("copy");
      field.remove();
    }
    $("copy").classList.add("done");
    $("copy-text").textContent = say("copied");
    setTimeout(() => {
      $("copy").classList.remove("done");
      $("copy-text").textContent = say("copyLink");
    }, 1600);
  }

  $("fold").onclick = () => {
    const folded = $("viewer-name").classList.toggle("folded");
    $("fold").textContent = say(folded ? "more" : "less");
  };
  $("viewer-close").onclick = () => act.close();
  $("previous").onclick = () => act.step(-1);
  $("next").onclick = () => act.step(1);
  $("zoom-in").onclick = () => zoom.by(1.6);
  $("zoom-out").onclick = () => zoom.by(1 / 1.6);
  $("like").onclick = () => act.similar(hit);
  $("more").onclick = () => act.add(hit, 1);
  $("fewer").onclick = () => act.add(hit, LESS);
  $("copy").onclick = copyLink;
  let pressed = null;
  viewer.addEventListener("pointerdown", event => (pressed = event.target));
  viewer.addEventListener("click", event => {   // the backdrop, or the empty part of the stage
    const empty = [viewer, stage, $("picture")];
    if (empty.includes(pressed) && empty.includes(document.elementFromPoint(event.clientX, event.clientY)) && !stage.classList.contains("zoomed")) act.close();
  });
  viewer.addEventListener("cancel", event => {   // Escape
    event.preventDefault();
    act.close();
  });
  viewer.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const rtl = document.dir === "rtl" ? -1 : 1;
    const keys = {
      ArrowRight: () => act.step(rtl), ArrowLeft: () => act.step(-rtl), s: () => act.similar(hit), c: copyLink,
      "+": () => zoom.by(1.6), "=": () => zoom.by(1.6), "-": () => zoom.by(1 / 1.6), "0": () => zoom.by(1 / 100),
      o: () => $("original").hidden || open($("original").href, "_blank", "noopener"),
    };
    if (!(event.key in keys)) return;
    event.preventDefault();
    keys[event.key]();
  });

  return {
    show,
    close() {
      if (!viewer.open) return;
      viewer.close();
      $("picture").replaceChildren();
      zoom.on(null);
    },
    get id() { return viewer.open ? hit.id : null; },
  };
}
