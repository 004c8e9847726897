// The first screen: what can be searched here, and how to begin.

import { $, el, iconButton } from "./dom.js";
import { kept, recent } from "./memory.js";
import { number, say } from "./words.js";

const day = seconds => new Date(seconds * 1000).toLocaleDateString(document.documentElement.lang, { dateStyle: "medium" });

// `act` has search(text) and go(address).
export function createWelcome(act) {
  function memories(box, list, name) {
    const entries = list.all();
    box.hidden = !entries.length;
    const parts = entries.map(({ address, label }) => el("li", {},
      el("button", { type: "button", className: "pill", dir: "auto", textContent: label, onclick: () => act.go(address) }),
      iconButton("close", say("forget", { name: label }), () => {
        list.remove(address);
        remember();
      })));
    const clear = el("button", { type: "button", className: "quiet", textContent: say("forgetAll") });
    clear.onclick = () => {
      list.clear();
      remember();
    };
    box.replaceChildren(el("h3", {}, say(name), " ", clear), el("ul", { className: "pills" }, ...parts));
  }

  function remember() {
    memories($("kept"), kept, "kept");
    memories($("recent"), recent, "recent");
  }

  function fact(name, value, title = "") {
    return el("div", {}, el("dt", { textContent: name }), el("dd", { dir: "auto", textContent: value, title }));
  }

  return {
    remember,
    // Shows an index as /v1/indices and /v1/facts tell of it; `facts` is null until they are known.
    show(index, facts) {
      const words = index?.modalities.join() === "text";
      $("size").textContent = say(words ? "searchCaptions" : "searchImages", { n: index?.rows ?? 0 });
      $("surprise").hidden = !index?.rows;
      $("examples").replaceChildren(...(index?.text !== false ? facts?.examples ?? [] : []).map(text =>
        el("button", { type: "button", className: "pill", dir: "auto", textContent: text, onclick: () => act.search(text) })));
      $("facts").hidden = !facts;
      $("inside").hidden = !facts?.sample.length;
      if (!facts) return;
      const recall = Object.values(index.recall?.image ?? index.recall ?? {}).map(one => (typeof one === "number" ? one : one?.["10"])).find(Number.isFinite);
      const names = facts.columns.map(column => column.name);
      $("facts").replaceChildren(fact(say(words ? "captions" : "rows"), number(facts.rows)), fact(say("model"), facts.model),
        ...(names.length ? [fact(say("columns"), names.slice(0, 6).join(", ") + (names.length > 6 ? " …" : ""), names.join(", "))] : []),
        ...(recall === undefined ? [] : [fact(say("recall"), recall.toFixed(3))]),
        fact(say("version"), day(facts.created), facts.version));
    },
  };
}
