// The picture of a hit, in the width that the screen needs.

import { el, icon, safeUrl } from "./dom.js";
import { say } from "./words.js";

const WIDTHS = [160, 320, 640, 1280, 2560];   // copies that the service makes

let direct = false;   // whether the browser loads pictures that only have an address
export const loadDirectly = on => (direct = on);

let captionsAlone = false;   // whether the index has captions and no images
export const showCaptions = on => (captionsAlone = on);

export const nameOf = hit => String(hit.metadata.caption || hit.metadata.key || say("rowName", { id: String(hit.id) }));

// Returns the web address in the hit's metadata, or null.
export function urlOf(hit) {
  const { url, image_url, link } = hit.metadata;
  return [url, image_url, link].map(safeUrl).find(Boolean) ?? null;
}

// Returns the address of a hit's original picture, or null if it has none that can be shown.
export const originalOf = hit => hit.image?.replace(/^\//, "") ?? (direct ? urlOf(hit) : null);

// Returns the address of a copy that is at least so many device pixels wide.
export function copyOf(hit, width) {
  if (!hit.image) return originalOf(hit);
  return `${originalOf(hit)}&width=${WIDTHS.find(one => one >= width) ?? WIDTHS.at(-1)}`;
}

// Returns the proportions that the metadata tells, or null.
export function ratioOf(hit) {
  const { width, height } = hit.metadata, ratio = width / height;
  return ratio > 0.01 && ratio < 100 ? ratio : null;
}

// Returns the proportions of a picture that was loaded. A browser rounds its sizes, of a tiny one to 0.
export function proportions(image) {
  const ratio = image.naturalWidth / image.naturalHeight;
  return Number.isNaN(ratio) ? 1 : Math.min(Math.max(ratio, 0.01), 100);
}

export const placeholder = text => el("span", { className: "none" }, icon("broken"), text);

// Returns what stands for the picture of a hit that has none: its caption, where captions are all that the index has.
export const instead = hit =>
  captionsAlone ? el("span", { className: "words", dir: "auto", textContent: nameOf(hit) }) : placeholder(say("noImage"));

// Returns the picture of a hit for a box of so many CSS pixels, or a placeholder if it has none or it does not load.
// `onload` gets its proportions.
export function picture(hit, width, onload = () => {}) {
  if (!originalOf(hit)) return instead(hit);
  const image = el("img", { alt: "", decoding: "async", draggable: true });
  image.onload = () => {
    image.classList.add("there");
    onload(proportions(image));
  };
  image.onerror = () => image.replaceWith(placeholder(say("cannotShow")));
  if (hit.image) {
    image.sizes = `${Math.ceil(width)}px`;
    image.srcset = WIDTHS.slice(0, 4).map(one => `${copyOf(hit, one)} ${one}w`).join(", ");
  } else image.referrerPolicy = "no-referrer";
  image.src = copyOf(hit, WIDTHS[1]);
  return image;
}
