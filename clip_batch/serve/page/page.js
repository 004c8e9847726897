// The page. Its state is in the address; every change of the state searches, and Back restores the previous one.

import { ask, Refused } from "./api.js";
import { showChips, thumbs } from "./chips.js";
import { $, safeUrl } from "./dom.js";
import { fromJson, readFile, Unreadable } from "./files.js";
import { createGrid, EAGER, LESS, nameOf, showDetails } from "./hits.js";
import { describe, empty, FLAGS, fromAddress, isEmpty, packVector, toAddress, toRequest } from "./query.js";
import { fileName, save, toCsv } from "./save.js";

const FIRST = 60;   // hits of the first request; each further request asks for twice as many
const PARQUET = "application/vnd.apache.parquet";

let query = empty();
let server = { indices: [], features: {}, max_k: 10_000 };
let running = new AbortController();   // of the latest search
let results = null;   // {query, index, version, k, done} of the hits on the page
let loading = false;   // whether more hits are being requested

const say = (text, bad = false) => {
  $("note").textContent = text;
  $("note").classList.toggle("bad", bad);
};
const trouble = error => {
  if (error.name === "AbortError") return;
  say(error instanceof Refused || error instanceof Unreadable ? `Cannot search: ${error.message}` : `Something went wrong: ${error.message}`, true);
};
const indexName = () => query.index || server.indices[0]?.name || "";
const term = (kind, value, label, weight = 1) => ({ kind, value, label, weight });

const painted = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)));

const grid = createGrid({
  similar: hit => go({ text: "", terms: [term("id", hit.id, nameOf(hit).slice(0, 60))] }),
  add: (hit, weight) => go({ text: $("text").value.trim(), terms: [...query.terms, term("id", hit.id, nameOf(hit).slice(0, 60), weight)] }),
  details: showDetails,
});

// Changes the query, writes it into the address, and searches.
function go(change) {
  query = { ...query, ...change };
  const address = toAddress(query);
  history[address === location.hash.slice(1) ? "replaceState" : "pushState"](null, "", `${location.pathname}#${address}`);
  show();
  return search();
}

function show() {
  if (document.activeElement !== $("text") || query.text !== $("text").value.trim()) $("text").value = query.text;
  showChips(query.terms, indexName(), terms => go({ terms, text: $("text").value.trim() }));
  $("text").placeholder = (current()?.text ?? true ? "Describe an image" : "Drop, paste or choose an image: this index reads no text")
    + (server.features.image_url ? ", or paste its address" : "");
  $("index").value = indexName();
  for (const choice of document.querySelectorAll("#modality input")) choice.checked = choice.value === query.modality;
  for (const flag of FLAGS) $(flag).checked = query[flag];
  $("aesthetic").value = query.aesthetic;
  document.title = isEmpty(query) ? "clip-batch search" : `${describe(query)} – clip-batch`;
}

async function search() {
  running.abort();
  running = new AbortController();
  const { signal } = running, searched = query, start = performance.now();
  loading = false;
  if (isEmpty(searched)) return clear();
  const late = setTimeout(() => {
    say("Searching…");
    $("hits").setAttribute("aria-busy", "true");
  }, 150);
  try {
    const k = Math.min(FIRST, server.max_k);
    const response = await (await ask("v1/search", toRequest(searched, k), { signal })).json();
    clearTimeout(late);
    const took = Math.round(performance.now() - start);
    results = { query: searched, index: response.index, version: response.version, k, done: response.hits.length === 0 || k >= server.max_k };
    $("welcome").hidden = true;
    const focused = $("hits").contains(document.activeElement);   // the focus stays on the hits if it is there
    grid.clear();
    grid.add(response.hits.slice(0, EAGER));
    if (focused) grid.focusCurrent();
    scrollTo({ top: 0 });
    $("save").hidden = !response.hits.length;
    $("end").textContent = "";
    say(response.hits.length ? `${response.hits.length} hits for ${describe(searched)} · ${took} ms` : `No hits for ${describe(searched)}`);
    await painted();
    if (signal.aborted) return;
    grid.add(response.hits.slice(EAGER));
    watch();
  } catch (error) {
    trouble(error);
  } finally {
    clearTimeout(late);
    if (!signal.aborted) $("hits").removeAttribute("aria-busy");
  }
}

function clear() {
  results = null;
  grid.clear();
  $("welcome").hidden = false;
  $("save").hidden = true;
  $("end").textContent = "";
  $("hits").removeAttribute("aria-busy");
  say("");
}

// Infinite scroll: the service has no paging, so request twice as many hits and add the new ones.
async function loadMore() {
  if (loading || !results || results.done) return;
  loading = true;
  const { signal } = running, shown = results;
  try {
    const k = Math.min(shown.k * 2, server.max_k);
    const response = await (await ask("v1/search", toRequest(shown.query, k), { signal })).json();
    if (shown !== results) return;
    if (response.version !== shown.version) return void search();   // in a new version of the index, rows have other ids
    const known = new Set(grid.hits.map(hit => hit.id));
    const fresh = response.hits.filter(hit => !known.has(hit.id));
    shown.k = k;
    shown.done = !fresh.length || k >= server.max_k;
    grid.add(fresh);
    if (shown.done) $("end").textContent = "These are all.";
    say(`${grid.hits.length} hits for ${describe(shown.query)}`);
    watch();
  } catch (error) {
    if (shown === results && error.name !== "AbortError") {   // for example, the service limits k
      shown.done = true;
      $("end").textContent = error.message;
    }
  } finally {
    if (shown === results) loading = false;
  }
}

const nearEnd = new IntersectionObserver(entries => entries.some(entry => entry.isIntersecting) && loadMore(), { rootMargin: "0px 0px 900px" });
function watch() {   // observing it again fires even if the end is still in sight
  nearEnd.disconnect();
  nearEnd.observe($("end"));
}

// Returns the typed text as a term: an address, an embedding, or words.
function typedTerm(weight) {
  const text = $("text").value.trim();
  if (text.startsWith("[")) {
    const vector = fromJson(text);
    return term("embedding", packVector(vector), `vector of ${vector.length}`, weight);
  }
  if (safeUrl(text) && server.features.image_url) return term("image_url", text, text.replace(/^.*\/(?=.)/, "").slice(0, 60), weight);
  return term("text", text, text, weight);
}

function submit(weight) {
  try {
    if (!$("text").value.trim()) {
      if (weight && !query.terms.length) say("Type the text to add or subtract");
      else go({ text: "" });
      return;
    }
    const part = typedTerm(weight || 1);
    if (part.kind === "text" && !weight) go({ text: part.value });
    else {
      $("text").value = "";
      go({ text: "", terms: [...query.terms, part] });
    }
  } catch (error) {
    trouble(error);
  }
}

// Searches by a file. A picture is replaced by its embedding, so that it is sent once and fits into the address.
async function searchFile(file) {
  try {
    const content = await readFile(file);
    let { vector } = content;
    if (content.image) {
      say("Reading the image…");
      const answer = await ask("v1/embed", { images: [content.image], index: query.index || undefined });
      [vector] = (await answer.json()).images;
    }
    const packed = packVector(vector);
    if (content.image) thumbs.set(packed, URL.createObjectURL(file));
    $("text").value = "";
    await go({ text: "", terms: [term("embedding", packed, file.name || "pasted image")] });
  } catch (error) {
    trouble(error);
  }
}

function searchDropped(text) {
  const ours = new RegExp(`^${location.origin}${location.pathname}v1/image/([^/]+)/(\\d+)(\\?|$)`).exec(text);
  if (ours && decodeURIComponent(ours[1]) === indexName()) return go({ text: "", terms: [term("id", Number(ours[2]), `row ${ours[2]}`)] });
  $("text").value = text;
  submit();
}

async function download(kind) {
  const { query: saved, index } = results, words = describe(saved);
  try {
    if (kind === "json") save(new Blob([JSON.stringify({ index, query: toAddress(saved), hits: grid.hits }, null, 1)], { type: "application/json" }), fileName(words, kind));
    if (kind === "csv") save(new Blob([toCsv(grid.hits)], { type: "text/csv" }), fileName(words, kind));
    if (kind === "parquet") save(await (await ask("v1/search", toRequest(saved, results.k), { accept: PARQUET })).blob(), fileName(words, kind));
  } catch (error) {
    trouble(error);
  }
}

// Switches the colours: the system's, dark, light.
function theme(next) {
  const root = document.documentElement, order = ["", "dark", "light"];
  const now = order[(order.indexOf(root.dataset.theme ?? "") + next) % 3];
  if (now) root.dataset.theme = now;
  else delete root.dataset.theme;
  localStorage.setItem("theme", now);
  $("theme-button").ariaLabel = $("theme-button").title = `Colours: ${now || "automatic"}`;
}

function listen() {
  $("form").onsubmit = event => {
    event.preventDefault();
    submit();
  };
  $("add").onclick = () => submit(1);
  $("subtract").onclick = () => submit(LESS);
  $("file").onchange = event => {
    const [file] = event.target.files;
    if (file) searchFile(file);
    event.target.value = "";
  };
  $("surprise").onclick = () => go({ text: "", terms: [term("id", Math.floor(Math.random() * current().rows), "a random image")] });
  $("theme-button").onclick = () => theme(1);
  $("index").onchange = () => go({ index: $("index").value, terms: query.terms.filter(({ kind }) => kind !== "id") });   // ids of rows mean nothing in another index
  $("modality").onchange = event => go({ modality: event.target.value });
  for (const flag of FLAGS) $(flag).onchange = event => go({ [flag]: event.target.checked });
  $("aesthetic").onchange = event => go({ aesthetic: Number(event.target.value) });
  $("save").onchange = event => {
    download(event.target.value);
    event.target.value = "";
  };
  $("text").onkeydown = event => {
    if (event.key === "Escape") go({ ...empty(), index: query.index, modality: query.modality });
    else if (event.key === "Backspace" && !$("text").value && query.terms.length) go({ terms: query.terms.slice(0, -1) });
    else if (event.key === "ArrowDown" && grid.hits.length) grid.focusCurrent();
    else return;
    event.preventDefault();
  };
  addEventListener("keydown", event => {
    if (event.target.matches("input, select, textarea") || document.querySelector("dialog[open]") || event.ctrlKey || event.metaKey) return;
    if (event.key !== "/" && event.key !== "Escape") return;
    event.preventDefault();
    $("text").focus();
    $("text").select();
  });
  addEventListener("dragover", event => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", event => event.relatedTarget || document.body.classList.remove("dropping"));
  addEventListener("drop", event => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    const [file] = event.dataTransfer.files, text = event.dataTransfer.getData("text/uri-list") || event.dataTransfer.getData("text");
    if (file) searchFile(file);
    else if (text) searchDropped(text.trim());
  });
  addEventListener("paste", event => {
    const [file] = event.clipboardData.files;
    if (file) searchFile(file);
    else if (!event.target.matches("input")) searchDropped(event.clipboardData.getData("text").trim());
  });
  addEventListener("popstate", restore);
}

const current = () => server.indices.find(({ name }) => name === indexName());

function restore() {
  query = fromAddress(location.hash.slice(1));
  show();
  return search();
}

// Asks the service what it can do, and shows the controls for that.
async function start() {
  theme(0);
  listen();
  try {
    server = await (await ask("v1/indices")).json();
  } catch (error) {
    return trouble(error);
  }
  $("index").replaceChildren(...server.indices.map(({ name }) => new Option(name)));
  $("index").hidden = server.indices.length < 2;
  $("modality").hidden = !server.indices.some(({ modalities }) => modalities.length > 1);
  for (const name of [...FLAGS, "aesthetic"]) $(name).closest("label").hidden = !server.features[name];
  const rows = server.indices.reduce((sum, index) => sum + index.rows, 0);
  $("size").textContent = `Search ${rows.toLocaleString("en")} images`;
  $("surprise").hidden = !rows;
  return restore();
}

start();
