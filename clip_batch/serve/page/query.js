// A query (text, weighted terms, filters and options), in the page's address and as a request to the service.

import { say } from "./words.js";

export const FLAGS = ["deduplicate", "safety", "violence"];
const KINDS = ["text", "image_url", "embedding", "id"];

export const empty = () => ({
  text: "", terms: [], filters: [], threshold: null, index: "", modality: "image",
  deduplicate: false, safety: false, violence: false, aesthetic: 0,
});

// Vectors are written as base64url of little-endian float32: 4 bytes a number, without loss.
export function packVector(values) {
  const bytes = new Uint8Array(values.length * 4);
  const view = new DataView(bytes.buffer);
  values.forEach((value, place) => view.setFloat32(place * 4, value, true));
  return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""))
    .replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export function unpackVector(text) {
  const bytes = Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), char => char.charCodeAt(0));
  if (!bytes.length || bytes.length % 4) throw new RangeError("not a vector");
  const view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 4 }, (_, place) => view.getFloat32(place * 4, true));
}

export function toAddress(query) {
  const parts = new URLSearchParams();
  if (query.text) parts.set("q", query.text);
  for (const { weight, kind, value, label } of query.terms) parts.append("t", [weight, kind, value, label].map(escape).join("~"));
  for (const filter of query.filters) parts.append("f", JSON.stringify(filter));
  if (query.threshold !== null) parts.set("score", query.threshold);
  if (query.index) parts.set("index", query.index);
  if (query.modality !== "image") parts.set("in", query.modality);
  for (const flag of FLAGS) if (query[flag]) parts.set(flag, "1");
  if (query.aesthetic) parts.set("aesthetic", query.aesthetic);
  return parts.toString();
}

export function fromAddress(text) {
  const parts = new URLSearchParams(text);
  const query = { ...empty(), text: parts.get("q") ?? "", index: parts.get("index") ?? "" };
  query.terms = parts.getAll("t").map(toTerm).filter(Boolean);
  query.filters = parts.getAll("f").map(toFilter).filter(Boolean);
  query.threshold = parts.has("score") && Math.abs(Number(parts.get("score"))) <= 1 ? Number(parts.get("score")) : null;
  query.modality = parts.get("in") === "text" ? "text" : "image";
  for (const flag of FLAGS) query[flag] = parts.get(flag) === "1";
  query.aesthetic = Math.min(Math.max(Number(parts.get("aesthetic")) || 0, 0), 1);
  return query;
}

// A term is written as weight~kind~value~label.
const escape = part => String(part).replaceAll("%", "%25").replaceAll("~", "%7E");

// Returns a term, or null if the text is not one, since the address can come from anywhere.
function toTerm(text) {
  const [weight, kind, value, label] = text.split("~").map(part => part.replaceAll("%7E", "~").replaceAll("%25", "%"));
  const term = { weight: Number(weight), kind, value, label: label || value };
  if (!KINDS.includes(kind) || !value || !weight || !(Math.abs(term.weight) <= 100)) return null;
  if (kind === "id") {
    term.value = Number(value);
    if (!Number.isSafeInteger(term.value) || term.value < 0) return null;
  }
  if (kind === "embedding") {
    try {
      unpackVector(value);
    } catch {
      return null;
    }
  }
  return term;
}

// Returns a filter of the service, or null if the text is not one.
function toFilter(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch {
    return null;
  }
  if (typeof given?.column !== "string") return null;
  const { column, contains, min, max } = given, plain = value => ["number", "string", "boolean"].includes(typeof value);
  if (Array.isArray(given.in)) return given.in.length && given.in.every(plain) ? { column, in: given.in } : null;
  if (typeof contains === "string") return contains ? { column, contains } : null;
  const ends = Object.entries({ min, max }).filter(([, end]) => plain(end));
  return ends.length ? { column, ...Object.fromEntries(ends) } : null;
}

export const isEmpty = query => !query.text && !query.terms.length && !isFiltered(query);
export const isFiltered = query => query.filters.length > 0 || query.threshold !== null;

// Returns the request of a query. Filters alone are a search too: by `seed`, the id of any row.
export function toRequest(query, k, seed = 0) {
  const terms = query.terms.map(({ kind, value, weight }) => ({ [kind]: kind === "embedding" ? unpackVector(value) : value, weight }));
  if (query.text) terms.push({ text: query.text, weight: 1 });
  if (!terms.length) terms.push({ id: seed, weight: 1 });
  const request = { modality: query.modality, k };
  if (terms.length === 1 && terms[0].weight === 1) {
    delete terms[0].weight;
    Object.assign(request, terms[0]);
  } else request.queries = terms;
  if (query.filters.length) request.filters = query.filters.map(wholeDay);
  if (query.threshold !== null) request.threshold = query.threshold;
  if (query.index) request.index = query.index;
  for (const flag of FLAGS) if (query[flag]) request[flag] = true;
  if (query.aesthetic) request.aesthetic = query.aesthetic;
  return request;
}

// Dates are texts, and "2024-05-03T10:00" comes after "2024-05-03": "~" comes after all that may follow a day.
const wholeDay = filter => (typeof filter.max === "string" ? { ...filter, max: `${filter.max}~` } : filter);

// Describes the query in words, for the status line, the title and file names.
export function describe(query) {
  const names = query.terms.map(({ kind, label, weight }) =>
    `${weight < 0 ? "− " : "+ "}${kind === "text" ? `“${label}”` : kind === "id" ? say("imagesLike", { name: label }) : label}`);
  if (query.text) names.unshift(`+ “${query.text}”`);
  if (!names.length) return say(isFiltered(query) ? "filtered" : "all");
  return names.join(" ").replace(/^\+ /, "");
}

// Describes the filters, for the printed page.
export const describeFilters = query => query.filters.map(({ column, contains, min, max, ...rest }) =>
  contains ? `${column}: “${contains}”` : rest.in ? `${column}: ${rest.in.join(", ")}` : `${column}: ${min ?? ""} – ${max ?? ""}`)
  .concat(query.threshold === null ? [] : [`${say("lowestScore")}: ${query.threshold}`]);
