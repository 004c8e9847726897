// Hits as files: JSON and CSV of the hits on the page; Parquet comes from the service.

export function toCsv(hits) {
  const columns = [...new Set(hits.flatMap(hit => Object.keys(hit.metadata)))];
  const lines = hits.map(hit => [hit.id, hit.score, ...columns.map(name => hit.metadata[name])]);
  return [["id", "score", ...columns], ...lines].map(line => line.map(cell).join(",")).join("\r\n") + "\r\n";
}

// Quotes a cell that contains a comma, a quote or a line break, and doubles its quotes (RFC 4180).
function cell(value) {
  if (value === null || value === undefined) return "";
  const text = typeof value === "object" ? JSON.stringify(value) : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

export function save(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export const fileName = (words, ending) => `hits-${words.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "all"}.${ending}`;
