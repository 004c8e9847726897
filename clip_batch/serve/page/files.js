// Reading files that users drop, paste or choose: pictures, and embeddings as .npy or JSON.

import { say } from "./words.js";

export class Unreadable extends Error {}

// Returns {image: base64} or {vector: numbers}. Throws Unreadable, with the reason, if the file is neither.
export async function readFile(file) {
  if (file.name.endsWith(".npy")) return { vector: fromNpy(await file.arrayBuffer()) };
  if (file.name.endsWith(".json") || file.type === "application/json") return { vector: fromJson(await file.text()) };
  if (!file.type.startsWith("image/")) throw new Unreadable(say("neither", { name: file.name }));
  return { image: await toBase64(file) };
}

function toBase64(file) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => fail(new Unreadable(say("unreadable", { name: file.name })));
    reader.readAsDataURL(file);
  });
}

// Reads [0.1, ...] or [[0.1, ...]].
export function fromJson(text) {
  let values;
  try {
    values = JSON.parse(text);
  } catch {
    throw new Unreadable(say("notJson"));
  }
  if (Array.isArray(values) && values.length === 1 && Array.isArray(values[0])) [values] = values;
  if (!Array.isArray(values) || !values.length || !values.every(value => Number.isFinite(value)))
    throw new Unreadable(say("notVector"));
  return values;
}

const READ = {
  "<f2": [2, (view, at) => fromHalf(view.getUint16(at, true))],
  "<f4": [4, (view, at) => view.getFloat32(at, true)],
  "<f8": [8, (view, at) => view.getFloat64(at, true)],
};

// Reads NumPy's format (numpy.lib.format): magic, version, length of the header, a Python dict as text, then the numbers.
export function fromNpy(buffer) {
  const view = new DataView(buffer);
  const magic = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59];
  if (buffer.byteLength < 12 || magic.some((byte, place) => view.getUint8(place) !== byte)) throw new Unreadable(say("notNpy"));
  const wide = view.getUint8(6) > 1;
  const start = (wide ? 12 : 10) + (wide ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(buffer.slice(10, start));
  const kind = /'descr':\s*'([^']+)'/.exec(header)?.[1];
  const shape = /'shape':\s*\(([^)]*)\)/.exec(header)?.[1].split(",").filter(part => part.trim()).map(Number) ?? [];
  const size = shape.at(-1);
  if (!(kind in READ) || !size || !(shape.length === 1 || (shape.length === 2 && shape[0] === 1)))
    throw new Unreadable(say("npyShape", { kind: kind ?? "?", shape: shape.join(", ") }));
  const [width, read] = READ[kind];
  if (buffer.byteLength < start + size * width) throw new Unreadable(say("npyCut"));
  const values = Array.from({ length: size }, (_, place) => read(view, start + place * width));
  if (!values.every(Number.isFinite)) throw new Unreadable(say("npyNan"));
  return values;
}

function fromHalf(bits) {
  const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
