// Hits as files: JSON and CSV of the hits on the page; Parquet comes from the service.

const OURS = ["id", "score"];

// Returns the hits as CSV (RFC 4180) that spreadsheets open: with a mark that says UTF-8, and no cell that runs as a
// formula. Metadata named id or score is called metadata.id and metadata.score, as ours come first.
export function toCsv(hits) {
  const columns = [...new Set(hits.flatMap(hit => Object.keys(hit.metadata)))];
  const names = columns.map(name => (OURS.includes(name) ? `metadata.${name}` : name));
  const lines = hits.map(hit => [hit.id, hit.score, ...columns.map(name => hit.metadata[name])]);
  return `\ufeff${[[...OURS, ...names], ...lines].map(line => line.map(cell).join(",")).join("\r\n")}\r\n`;
}

// Quotes a cell that contains a comma, a quote or a line break, and doubles its quotes. A text that a spreadsheet would
// take for a formula begins with an apostrophe.
function cell(value) {
  if (value === null || value === undefined) return "";
  const plain = typeof value === "object" ? JSON.stringify(value) : String(value);
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(plain) ? `'${plain}` : plain;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const fileName = (words, ending) => `hits-${words.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "all"}.${ending}`;
