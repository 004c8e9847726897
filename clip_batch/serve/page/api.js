// Requests to the service: JSON in and out, the token, and a retry when the service is busy.

import { $ } from "./dom.js";

const TRIES = 3;

export class Refused extends Error {}

const sleep = seconds => new Promise(done => setTimeout(done, seconds * 1000));

// Sends POST if there is a body, otherwise GET, and returns the Response if its status is 2xx.
// Throws Refused, with the reason, for any other status.
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
      await enterToken();
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

// Asks the user for the token. It is stored in a session cookie, because the browser requests pictures without a header.
let tokenEntered = null;
function enterToken() {
  tokenEntered ??= new Promise(done => {
    const door = $("door");
    door.addEventListener("close", () => {
      document.cookie = `clip_batch_token=${$("token").value.trim()}; path=/; samesite=strict${location.protocol === "https:" ? "; secure" : ""}`;
      $("token").value = "";
      tokenEntered = null;
      done();
    }, { once: true });
    door.showModal();
  });
  return tokenEntered;
}
