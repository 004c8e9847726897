// The terms of the query in the search box: each has a picture or a name, a weight, and a button that removes it.

import { $, el, iconButton } from "./dom.js";
import { say } from "./words.js";

// The pictures of embeddings that were computed from a file in this session, by packed vector.
export const thumbs = new Map();

function thumb(term, index) {
  const src = term.kind === "id" ? `v1/image/${encodeURIComponent(index)}/${term.value}?width=160` : thumbs.get(term.value);
  if (!src) return [];
  const image = el("img", { src, alt: "" });
  image.onerror = () => image.remove();
  return [image];
}

// Shows the terms. `change` is called with the new list when the user changes one.
export function showChips(terms, index, change) {
  const replace = (place, ...others) => change(terms.toSpliced(place, 1, ...others));
  $("chips").replaceChildren(...terms.map((term, place) => {
    const weight = el("input", { type: "number", step: 0.25, min: -100, max: 100, value: String(term.weight), label: say("weight", { name: term.label }) });
    weight.onchange = () => {
      const value = Number(weight.value);
      if (value && Math.abs(value) <= 100) replace(place, { ...term, weight: value });
      else weight.value = String(term.weight);
    };
    return el("li", { className: term.weight < 0 ? "chip less" : "chip", title: term.label }, ...thumb(term, index),
      el("span", { className: "name", dir: "auto", textContent: term.label }), weight,
      iconButton("close", say("remove", { name: term.label }), () => replace(place)));
  }));
}
