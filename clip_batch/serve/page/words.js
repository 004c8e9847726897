// The words of the page, in the first language of the browser's that there is a file for; English for what it lacks.

import english from "./words/en.js";

const LANGUAGES = ["en", "de", "zh", "fr", "es", "pt"];

export const language = navigator.languages.map(tag => tag.slice(0, 2).toLowerCase()).find(tag => LANGUAGES.includes(tag)) ?? "en";
const words = language === "en" ? english : { ...english, ...(await import(`./words/${language}.js`)).default };
const plurals = new Intl.PluralRules(language);
const numbers = new Intl.NumberFormat(language);

export const number = value => numbers.format(value);

// Returns the text of a name, with {values} filled in. Texts with a number `n` may have several forms.
export function say(name, values = {}) {
  const form = words[name];
  const text = typeof form === "string" ? form : form[plurals.select(values.n)] ?? form.other;
  return text.replace(/\{(\w+)\}/g, (_, key) => (typeof values[key] === "number" ? number(values[key]) : String(values[key])));
}

// Writes the words into the document: data-say is the text, data-label the name, data-hint the tooltip.
export function translate() {
  document.documentElement.lang = language;
  for (const part of document.querySelectorAll("[data-say]")) part.textContent = say(part.dataset.say);
  for (const part of document.querySelectorAll("[data-label]")) part.setAttribute("aria-label", say(part.dataset.label));
  for (const part of document.querySelectorAll("[data-hint]")) part.title = say(part.dataset.hint);
}
