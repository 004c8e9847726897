// The page: its state is the address, every change of it is a search, and Back takes it back.

import { ask, Refused } from "./api.js";
import { showChips, thumbs } from "./chips.js";
import { $, safeUrl } from "./dom.js";
import { fromJson, readFile, Unreadable } from "./files.js";
import { createGrid, EAGER, LESS, nameOf, showDetails } from "./hits.js";
import { describe, empty, FLAGS, fromAddress, isEmpty, packVector, toAddress, toRequest } from "./query.js";
import { fileName, save, toCsv } from "./save.js";

const FIRST = 60;   // hits of the first answer; each further one doubles what is asked for
const PARQUET = "application/vnd.apache.parquet";

let query = empty();
let server = { indices: [], features: {}, max_k: 10_000 };
let running = new AbortController();
let answered = null;   // {query, index, version, k, done} of what is on the page
let growing = false;

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

// Change the query, remember it in the address, and search.
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
  const { signal } = running, asked = query, start = performance.now();
  growing = false;
  if (isEmpty(asked)) return clear();
  const late = setTimeout(() => {
    say("Searching…");
    $("hits").setAttribute("aria-busy", "true");
  }, 150);
  try {
    const k = Math.min(FIRST, server.max_k);
    const found = await (await ask("v1/search", toRequest(asked, k), { signal })).json();
    clearTimeout(late);
    const took = Math.round(performance.now() - start);
    answered = { query: asked, index: found.index, version: found.version, k, done: found.hits.length === 0 || k >= server.max_k };
    $("welcome").hidden = true;
    const within = $("hits").contains(document.activeElement);   // who is among the hits stays there
    grid.clear();
    grid.add(found.hits.slice(0, EAGER));
    if (within) grid.focusCurrent();
    scrollTo({ top: 0 });
    $("save").hidden = !found.hits.length;
    $("end").textContent = "";
    say(found.hits.length ? `${found.hits.length} hits for ${describe(asked)} · ${took} ms` : `No hits for ${describe(asked)}`);
    await painted();
    if (signal.aborted) return;
    grid.add(found.hits.slice(EAGER));
    watch();
  } catch (error) {
    trouble(error);
  } finally {
    clearTimeout(late);
    if (!signal.aborted) $("hits").removeAttribute("aria-busy");
  }
}

function clear() {
  answered = null;
  grid.clear();
  $("welcome").hidden = false;
  $("save").hidden = true;
  $("end").textContent = "";
  $("hits").removeAttribute("aria-busy");
  say("");
}

// Infinite scroll: the service has no pages, so twice as many are asked for and the new ones added.
async function more() {
  if (growing || !answered || answered.done) return;
  growing = true;
  const { signal } = running, mine = answered;
  try {
    const k = Math.min(mine.k * 2, server.max_k);
    const found = await (await ask("v1/search", toRequest(mine.query, k), { signal })).json();
    if (mine !== answered) return;
    if (found.version !== mine.version) return void search();   // a new index took over: its rows are others
    const known = new Set(grid.hits.map(hit => hit.id));
    const fresh = found.hits.filter(hit => !known.has(hit.id));
    mine.k = k;
    mine.done = !fresh.length || k >= server.max_k;
    grid.add(fresh);
    if (mine.done) $("end").textContent = "These are all.";
    say(`${grid.hits.length} hits for ${describe(mine.query)}`);
    watch();
  } catch (error) {
    if (mine === answered && error.name !== "AbortError") {   // such as: the service goes no deeper
      mine.done = true;
      $("end").textContent = error.message;
    }
  } finally {
    if (mine === answered) growing = false;
  }
}

const nearEnd = new IntersectionObserver(entries => entries.some(entry => entry.isIntersecting) && more(), { rootMargin: "0px 0px 900px" });
function watch() {   // observed anew, it tells even if the end is still in sight
  nearEnd.disconnect();
  nearEnd.observe($("end"));
}

// What was typed: an address, an embedding, or words.
function typed(weight) {
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
      if (weight && !query.terms.length) say("Type what to add or to take away");
      else go({ text: "" });
      return;
    }
    const part = typed(weight || 1);
    if (part.kind === "text" && !weight) go({ text: part.value });
    else {
      $("text").value = "";
      go({ text: "", terms: [...query.terms, part] });
    }
  } catch (error) {
    trouble(error);
  }
}

// A picture becomes its embedding, so that the address can carry it and it is sent once.
async function searchFile(file) {
  try {
    const read = await readFile(file);
    let { vector } = read;
    if (read.image) {
      say("Reading the image…");
      const answer = await ask("v1/embed", { images: [read.image], index: query.index || undefined });
      [vector] = (await answer.json()).images;
    }
    const packed = packVector(vector);
    if (read.image) thumbs.set(packed, URL.createObjectURL(file));
    $("text").value = "";
    await go({ text: "", terms: [term("embedding", packed, file.name || "pasted image")] });
  } catch (error) {
    trouble(error);
  }
}

function searchDropped(text) {
  const own = new RegExp(`^${location.origin}${location.pathname}v1/image/([^/]+)/(\\d+)(\\?|$)`).exec(text);
  if (own && decodeURIComponent(own[1]) === indexName()) return go({ text: "", terms: [term("id", Number(own[2]), `row ${own[2]}`)] });
  $("text").value = text;
  submit();
}

async function download(kind) {
  const { query: asked, index } = answered, words = describe(asked);
  try {
    if (kind === "json") save(new Blob([JSON.stringify({ index, query: toAddress(asked), hits: grid.hits }, null, 1)], { type: "application/json" }), fileName(words, kind));
    if (kind === "csv") save(new Blob([toCsv(grid.hits)], { type: "text/csv" }), fileName(words, kind));
    if (kind === "parquet") save(await (await ask("v1/search", toRequest(asked, answered.k), { accept: PARQUET })).blob(), fileName(words, kind));
  } catch (error) {
    trouble(error);
  }
}

// Colours: the system's, dark, light.
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
  $("index").onchange = () => go({ index: $("index").value, terms: query.terms.filter(({ kind }) => kind !== "id") });   // rows of the other index
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

// What the service can do decides which controls there are.
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
