// Creating elements from data. Text is only ever inserted as text, and links lead only to http or https.

export const $ = id => document.getElementById(id);

export function el(tag, properties = {}, ...children) {
  const { data, label, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  if (label) element.setAttribute("aria-label", label);
  element.append(...children);
  return element;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function iconButton(name, label, onclick) {
  return el("button", { type: "button", className: "icon", label, title: label, onclick }, icon(name));
}

// Returns the URL if it is http or https, otherwise null.
export function safeUrl(value) {
  if (typeof value !== "string" || !/^https?:\/\//i.test(value)) return null;
  try {
    return new URL(value).href;
  } catch {
    return null;
  }
}

export function link(url, ...children) {
  return el("a", { href: url, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

// Calls `act` once it has not been asked for during some milliseconds.
export function later(act, milliseconds) {
  let timer = 0;
  const ask = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), milliseconds);
  };
  ask.cancel = () => clearTimeout(timer);
  return ask;
}
