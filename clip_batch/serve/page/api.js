// Asking the service: JSON in and out, its token, and its "not now".

import { $ } from "./dom.js";

const TRIES = 3;

export class Refused extends Error {}

const sleep = seconds => new Promise(done => setTimeout(done, seconds * 1000));

// POST where there is a body, else GET; the Response, whose status is 2xx. Refused says why it is not.
export async function ask(path, body, { signal, accept = "application/json" } = {}) {
  const options = { signal, headers: { accept } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  for (let attempt = 1; ; attempt++) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("the service cannot be reached");
    }
    if (answer.ok) return answer;
    if (answer.status === 401) {
      await enter();
    } else if ((answer.status === 503 || answer.status === 429) && attempt < TRIES) {
      await sleep(Math.min(Number(answer.headers.get("retry-after")) || 1, 10));
    } else {
      throw new Refused(await reason(answer));
    }
    signal?.throwIfAborted();
  }
}

async function reason(answer) {
  try {
    const { detail } = await answer.json();
    return typeof detail === "string" ? detail : detail.map(part => `${part.loc.slice(1).join(".")}: ${part.msg}`).join("; ");
  } catch {
    return `the service answers ${answer.status}`;
  }
}

// Ask for the token; it goes into a cookie of this session, as pictures are asked for without a header.
let entering = null;
function enter() {
  entering ??= new Promise(done => {
    const door = $("door");
    door.addEventListener("close", () => {
      document.cookie = `clip_batch_token=${$("token").value.trim()}; path=/; samesite=strict${location.protocol === "https:" ? "; secure" : ""}`;
      $("token").value = "";
      entering = null;
      done();
    }, { once: true });
    door.showModal();
  });
  return entering;
}
