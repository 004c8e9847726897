// The page. Its state is in the address; every change of the state searches, and Back restores the previous one.

import { ask, Refused } from "./api.js";
import { showChips, thumbs } from "./chips.js";
import { $, later, safeUrl } from "./dom.js";
import { fromJson, readFile, Unreadable } from "./files.js";
import { createFilters } from "./filters.js";
import { createGrid, LESS } from "./hits.js";
import { kept, recent } from "./memory.js";
import { loadDirectly, nameOf, showCaptions, urlOf } from "./picture.js";
import { describe, describeFilters, empty, FLAGS, fromAddress, isEmpty, isFiltered, packVector, toAddress, toRequest } from "./query.js";
import { fileName, save, toCsv } from "./save.js";
import { createViewer } from "./viewer.js";
import { createWelcome } from "./welcome.js";
import { say, translate } from "./words.js";

const FIRST = 60;   // hits of the first request; each further request asks for twice as many
const REMEMBERED = 20;   // searches whose hits are kept, so that Back shows them at once
const QUICK = 250;   // milliseconds: when searches take less, they begin while one types
const PAUSE = 280;   // milliseconds without a key after which such a search begins
const PARQUET = "application/vnd.apache.parquet";

let query = empty();
let server = { indices: [], features: {}, max_k: 10_000, page_images: "off" };
let facts = null;   // of the index that is searched
let learning = null;   // until they are known
let running = new AbortController();   // of the latest search
let results = null;   // {address, query, index, version, k, done} of the hits on the page
let loading = false;   // whether more hits are being requested
let quick = false;
let left = null;   // {address, k, anchor} of the page before it was loaded anew
const seen = new Map();   // address -> {results, hits, anchor}

const note = (text, bad = false) => {
  $("note").textContent = text;
  $("note").classList.toggle("bad", bad);
};
const trouble = error => {
  if (error.name === "AbortError") return;
  const expected = error instanceof Refused || error instanceof Unreadable;
  if (!expected) console.error(error);
  note(say(expected ? "cannotSearch" : "wentWrong", { reason: error.message }), true);
  if (error instanceof Refused && !grid.hits.length) nothing(say("cannotSearch", { reason: "" }).replace(/[\s:]+$/, ""), error.message, say("tryAgain"), () => search());
};
const term = (kind, value, label, weight = 1) => ({ kind, value, label, weight });
const indexName = () => query.index || server.indices[0]?.name || "";
const current = () => server.indices.find(({ name }) => name === indexName());
const like = (hit, weight) => term("id", hit.id, nameOf(hit).slice(0, 60), weight);

const grid = createGrid({ open: hit => go({}, hit.id), similar, add, more: loadMore });
const viewer = createViewer({ similar, add, step, close: closeViewer });
const filters = createFilters(change => go(change));
const welcome = createWelcome({ search: text => go({ text }), go: address => visit(address) });

function similar(hit) {
  return go({ text: "", terms: [like(hit)] });
}
function add(hit, weight) {
  return go({ text: $("text").value.trim(), terms: [...query.terms, like(hit, weight)] });
}

// The address of a query, and of the hit that the viewer shows.
const addressOf = (query, view) => [toAddress(query), view === null ? "" : `view=${view}`].filter(Boolean).join("&");
function viewOf(address) {
  const view = new URLSearchParams(address).get("view");
  return /^\d{1,15}$/.test(view ?? "") ? Number(view) : null;
}

// Changes the query, or what the viewer shows, writes it into the address, and searches.
function go(change, view = null, { replace = false, typed = false } = {}) {
  query = { ...query, ...change };
  const fresh = Object.keys(change).length > 0;
  return visit(addressOf(query, view), { replace, typed, fresh });
}

function visit(address, { replace = false, typed = false, fresh = true } = {}) {
  typing.cancel();
  rememberScroll();
  const here = address === location.hash.slice(1) || replace || (typed && history.state?.typed);
  const opened = viewOf(address) !== null && viewOf(location.hash.slice(1)) === null;
  history[here ? "replaceState" : "pushState"]({ typed, opened: opened || (here && history.state?.opened) }, "", `${location.pathname}#${address}`);
  return show(fresh);
}

// Shows what the address says: it opens or closes the viewer, and searches unless the hits are there or, with `fresh`,
// even then.
async function show(fresh = false) {
  const address = location.hash.slice(1);
  query = fromAddress(address);
  showQuery();
  if (fresh || results?.address !== toAddress(query)) await search(fresh);
  else stop();
  await view(viewOf(address));
}

function showQuery() {
  if (document.activeElement !== $("text") || query.text !== $("text").value.trim()) $("text").value = query.text;
  showChips(query.terms, indexName(), terms => go({ terms, text: $("text").value.trim() }));
  $("text").placeholder = say(current()?.text ?? true ? "describe" : "describeNoText") + (server.features.image_url ? say("orAddress") : "");
  const modalities = current()?.modalities ?? [];
  $("modality").hidden = modalities.length < 2;
  showCaptions(modalities.join() === "text");
  if ($("index").value !== indexName()) $("index").value = indexName();
  for (const choice of document.querySelectorAll("#modality input")) choice.checked = choice.value === query.modality;
  for (const flag of FLAGS) $(flag).checked = query[flag];
  $("aesthetic").value = query.aesthetic;
  filters.show(query);
  document.title = isEmpty(query) ? "clip-batch search" : `${describe(query)} – clip-batch`;
  showKept();
  if (facts?.index !== indexName()) learning = learn();
}

function showKept() {
  const on = kept.has(toAddress(query));
  $("keep").setAttribute("aria-pressed", on);
  $("keep").ariaLabel = $("keep").title = say(on ? "unsaveSearch" : "saveSearch");
}

// Asks what is in the index, for the first screen and the filters. The page works without.
async function learn() {
  const index = indexName();
  if (!index) return;
  facts = { index };
  try {
    const learned = await (await ask(`v1/facts/${encodeURIComponent(index)}`)).json();
    if (index !== indexName()) return;
    facts = learned;
  } catch {
    return;
  }
  filters.learn(facts);
  if (isEmpty(query)) greet();
}

function greet() {
  results = { address: toAddress(query), query, done: true };
  nothing();
  $("welcome").hidden = false;
  $("keep").hidden = $("save").hidden = true;
  $("end").textContent = "";
  note("");
  const known = facts?.sample ? facts : null;
  welcome.show(current(), known);
  welcome.remember();
  grid.show(known?.sample ?? []);
  tellUrlsOnly();
}

function nothing(title = "", help = "", button = "", act = null) {
  $("nothing").hidden = !title;
  $("nothing-name").textContent = title;
  $("nothing-help").textContent = help;
  $("nothing-button").textContent = button;
  $("nothing-button").hidden = !act;
  $("nothing-button").onclick = act;
  if (title) $("welcome").hidden = $("inside").hidden = true;
}

// Ends the search that runs, if any: the page shows something else now.
function stop() {
  running.abort();
  running = new AbortController();
  loading = false;
  $("hits").removeAttribute("aria-busy");
}

async function search(fresh = true) {
  stop();
  const { signal } = running, searched = query, address = toAddress(query), start = performance.now();
  if (isEmpty(searched)) {
    greet();
    return grid.restore(seen.get(address)?.anchor);
  }
  if (!fresh && seen.has(address)) return reshow(seen.get(address));
  const late = setTimeout(() => {
    note(say("searching"));
    $("hits").setAttribute("aria-busy", "true");
  }, 150);
  try {
    const again = left?.address === address ? left : {};
    left = null;
    if (!searched.text && !searched.terms.length) await learning;   // filters alone search by a row of the sample
    const k = Math.min(Math.max(FIRST, again.k ?? 0), server.max_k);
    const response = await (await ask("v1/search", toRequest(searched, k, facts?.sample?.[0]?.id), { signal, waiting: text => note(text) })).json();
    clearTimeout(late);
    const took = Math.round(performance.now() - start);
    if (searched.text) quick = took < QUICK;
    results = { address, query: searched, index: response.index, version: response.version, k, took, done: response.hits.length < k || k >= server.max_k };
    showHits(response.hits, again.anchor);
    if (!history.state?.typed) recent.add(address, describe(searched));
  } catch (error) {
    if (error.name !== "AbortError") results = null;
    trouble(error);
  } finally {
    clearTimeout(late);
    if (!signal.aborted) $("hits").removeAttribute("aria-busy");
  }
}

function showHits(hits, anchor, place = 0) {
  const { query: searched } = results;
  $("welcome").hidden = $("inside").hidden = true;
  $("printed").textContent = [describe(searched), ...describeFilters(searched), `${location.host} · ${results.index}`].join("\n");
  if (hits.length) nothing();
  else if (isFiltered(searched)) nothing(say("nothingFound"), say("nothingHelp"), say("clearFilters"), () => go({ filters: [], threshold: null }));
  else nothing(say("nothingFound"), say("nothingHelp"));
  grid.show(hits, place);
  grid.restore(anchor);
  $("save").hidden = !hits.length;
  $("keep").hidden = false;
  $("end").textContent = "";
  if (hits.length) filters.best(hits[0].score);
  tell();
  tellUrlsOnly();
}

function reshow(kept) {
  results = kept.results;
  showHits(kept.hits, kept.anchor, kept.place);
}

function tell() {
  const n = grid.hits.length, text = say(n ? "hitsFor" : "noHits", { n, query: describe(results.query) });
  note(n ? say("took", { text, ms: results.took }) : text);
}

function tellUrlsOnly() {
  $("urls-only").hidden = server.page_images !== "off" || !grid.hits.length || !grid.hits.slice(0, FIRST).every(hit => !hit.image && urlOf(hit));
}

// Remembers the hits and the place on the page, for Back and for a page that is loaded anew.
function rememberScroll() {
  if (!results) return;
  const { address } = results;
  seen.delete(address);
  seen.set(address, { results, hits: grid.hits, anchor: grid.anchor(), place: grid.current });
  if (seen.size > REMEMBERED) seen.delete(seen.keys().next().value);
}

// Infinite scroll: the service has no paging, so request twice as many hits and add the new ones.
async function loadMore() {
  if (loading || !results || results.done) {
    if (results?.done && !isEmpty(results.query) && grid.hits.length) $("end").textContent ||= say("theseAreAll");
    return;
  }
  loading = true;
  const { signal } = running, shown = results;
  try {
    const k = Math.min(shown.k * 2, server.max_k);
    const response = await (await ask("v1/search", toRequest(shown.query, k, facts?.sample?.[0]?.id), { signal })).json();
    if (shown !== results) return;
    if (response.version !== shown.version) {   // in a new version of the index, rows have other ids
      seen.clear();
      facts = null;
      showQuery();
      return void search();
    }
    const known = new Set(grid.hits.map(hit => hit.id));
    const fresh = response.hits.filter(hit => !known.has(hit.id));
    shown.k = k;
    shown.done = !fresh.length || response.hits.length < k || k >= server.max_k;
    loading = false;
    grid.add(fresh);
    if (shown.done && !fresh.length) $("end").textContent = say("theseAreAll");
    tell();
  } catch (error) {
    if (shown === results && error.name !== "AbortError") {   // for example, the service limits k
      shown.done = true;
      $("end").textContent = error.message;
    }
  } finally {
    if (shown === results) loading = false;
  }
}

// Opens the viewer at a row, or closes it at null.
async function view(id) {
  if (id === null) {
    const closed = viewer.id;
    viewer.close();
    const place = grid.hits.findIndex(hit => hit.id === closed);
    if (closed !== null && place >= 0) grid.focus(place);
    return;
  }
  const place = grid.hits.findIndex(hit => hit.id === id);
  if (place >= 0) return viewer.show(grid.hits[place], place, grid.hits.length);
  try {   // a link to a row that this search does not show
    const { hits } = await (await ask("v1/search", { id, k: 1, ...(query.index && { index: query.index }) })).json();
    const [hit] = hits.filter(hit => hit.id === id);
    if (!hit) throw new Refused(say("notHere", { id: String(id) }));
    delete hit.score;
    if (viewOf(location.hash.slice(1)) === id) viewer.show(hit, null, 0);
  } catch (error) {
    trouble(error);
  }
}

function step(by) {
  const place = grid.hits.findIndex(hit => hit.id === viewer.id), next = grid.hits[place + by];
  if (place < 0 || !next) return;
  grid.reveal(place + by);   // which requests more hits near the end
  go({}, next.id, { replace: true });
}

function closeViewer() {
  if (history.state?.opened) history.back();
  else go({}, null, { replace: true });
}

// Returns the typed text as a term: an address, an embedding, or words.
function typedTerm(weight) {
  const text = $("text").value.trim();
  if (text.startsWith("[")) {
    const vector = fromJson(text);
    return term("embedding", packVector(vector), say("vectorOf", { n: vector.length }), weight);
  }
  if (safeUrl(text) && server.features.image_url) return term("image_url", text, text.replace(/^.*\/(?=.)/, "").slice(0, 60), weight);
  return term("text", text, text, weight);
}

function submit(weight) {
  try {
    if (!$("text").value.trim()) {
      if (weight && !query.terms.length) note(say("typeFirst"));
      else go({ text: "" });
      return;
    }
    const part = typedTerm(weight || 1);
    if (part.kind === "text" && !weight) {
      recent.add(toAddress({ ...query, text: part.value }), describe({ ...query, text: part.value }));
      go({ text: part.value });
    } else {
      $("text").value = "";
      go({ text: "", terms: [...query.terms, part] });
    }
  } catch (error) {
    trouble(error);
  }
}

// Searches by the text while it is typed, if searches are quick.
const typing = later(() => {
  const text = $("text").value.trim();
  if (text !== query.text && text && !text.startsWith("[") && !safeUrl(text)) go({ text }, null, { typed: true });
}, PAUSE);

// Searches by a file. A picture is replaced by its embedding, so that it is sent once and fits into the address.
async function searchFile(file) {
  try {
    const content = await readFile(file);
    let { vector } = content;
    if (content.image) {
      note(say("readingImage"));
      const answer = await ask("v1/embed", { images: [content.image], index: query.index || undefined }, { waiting: text => note(text) });
      [vector] = (await answer.json()).images;
    }
    const packed = packVector(vector);
    if (content.image) thumbs.set(packed, URL.createObjectURL(file));
    $("text").value = "";
    await go({ text: "", terms: [term("embedding", packed, file.name || say("pasted"))] });
  } catch (error) {
    trouble(error);
  }
}

function searchDropped(text) {
  const ours = new RegExp(`^${location.origin}${location.pathname}v1/image/([^/]+)/(\\d+)(\\?|$)`).exec(text);
  if (ours && decodeURIComponent(ours[1]) === indexName()) return go({ text: "", terms: [term("id", Number(ours[2]), say("rowName", { id: ours[2] }))] });
  $("text").value = text;
  submit();
}

async function download(kind) {
  const { query: saved, index } = results, words = describe(saved);
  try {
    if (kind === "json") save(new Blob([JSON.stringify({ index, query: toAddress(saved), hits: grid.hits }, null, 1)], { type: "application/json" }), fileName(words, kind));
    if (kind === "csv") save(new Blob([toCsv(grid.hits)], { type: "text/csv" }), fileName(words, kind));
    if (kind === "parquet") save(await (await ask("v1/search", toRequest(saved, results.k, facts?.sample?.[0]?.id), { accept: PARQUET })).blob(), fileName(words, kind));
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
  $("theme-button").ariaLabel = $("theme-button").title = say("colours", { name: say(now || "automatic") });
}

function showFilters(open) {
  $("filters").hidden = !open;
  $("filter-button").setAttribute("aria-expanded", open);
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
  $("surprise").onclick = () => go({ text: "", terms: [term("id", Math.floor(Math.random() * current().rows), say("surpriseLabel"))] });
  $("theme-button").onclick = () => theme(1);
  $("filter-button").onclick = () => showFilters($("filters").hidden);
  $("close-filters").onclick = () => {
    showFilters(false);
    $("filter-button").focus();
  };
  // ids of rows and filters mean nothing in another index
  $("index").onchange = () => go({ index: $("index").value, filters: [], terms: query.terms.filter(({ kind }) => kind !== "id") });
  $("modality").onchange = event => go({ modality: event.target.value });
  for (const flag of FLAGS) $(flag).onchange = event => go({ [flag]: event.target.checked });
  $("aesthetic").onchange = event => go({ aesthetic: Number(event.target.value) });
  $("keep").onclick = () => {
    const address = toAddress(query);
    if (kept.has(address)) kept.remove(address);
    else kept.add(address, describe(query));
    showKept();
  };
  $("save").onchange = event => {
    download(event.target.value);
    event.target.value = "";
  };
  $("text").oninput = () => {
    if (quick && localStorage.getItem("typing") !== "off") typing();
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
    if (event.key === "f") showFilters($("filters").hidden);
    else if (event.key === "/" || event.key === "Escape") {
      $("text").focus();
      $("text").select();
    } else return;
    event.preventDefault();
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
  history.scrollRestoration = "manual";
  addEventListener("popstate", () => {
    rememberScroll();
    show();
  });
  addEventListener("pagehide", () => {
    if (results) sessionStorage.setItem("left", JSON.stringify({ address: results.address, k: results.k, anchor: grid.anchor() }));
  });
}

// Asks the service what it can do, and shows the controls for that.
async function start() {
  translate();
  document.body.dataset.drop = say("dropHere");
  theme(0);
  listen();
  left = JSON.parse(sessionStorage.getItem("left"));
  try {
    server = await (await ask("v1/indices")).json();
  } catch (error) {
    return trouble(error);
  }
  loadDirectly(server.page_images === "direct");
  $("index").replaceChildren(...server.indices.map(({ name }) => new Option(name)));
  $("index").hidden = server.indices.length < 2;
  for (const name of [...FLAGS, "aesthetic"]) $(name).closest("label").hidden = !server.features[name];
  const typed = $("text").value, shown = show();
  if (!query.text) $("text").value = typed;   // what was typed while the service was asked
  return shown;
}

start();
