// Requests to the service: JSON in and out, the token, and a retry when the service is busy.

import { $ } from "./dom.js";
import { say } from "./words.js";

const TRIES = 3;
const PATIENCE = 2;   // seconds: a service that asks for more time than this is not busy, it has a problem

export class Refused extends Error {}

const sleep = seconds => new Promise(done => setTimeout(done, seconds * 1000));

// Sends POST if there is a body, otherwise GET, and returns the Response if its status is 2xx.
// Throws Refused, with the reason, for any other status. `waiting` is told why it is tried again.
export async function ask(path, body, { signal, accept = "application/json", waiting = () => {} } = {}) {
  const options = { signal, headers: { accept } };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["content-type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  for (let attempt = 1, entered = false; ; attempt++) {
    let answer;
    try {
      answer = await fetch(path, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused(say("unreachable"));
    }
    if (answer.ok) return answer;
    const wait = Number(answer.headers.get("retry-after")) || 1;
    if (answer.status === 401) {
      await enterToken(entered);
      entered = true;
      attempt = 0;
    } else if ((answer.status === 503 || answer.status === 429) && attempt < TRIES && wait <= PATIENCE) {
      waiting(say("busy", { reason: await reason(answer) }));
      await sleep(wait);
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
    return say("answers", { status: String(answer.status) });
  }
}

// Asks the user for the token; `wrong` is whether the one they entered was refused. It is stored in a session cookie,
// because the browser requests pictures without a header.
let tokenEntered = null;
function enterToken(wrong) {
  tokenEntered ??= new Promise(done => {
    const door = $("door");
    $("wrong").hidden = !wrong;
    door.addEventListener("close", () => {
      document.cookie = `clip_batch_token=${encodeURIComponent($("token").value.trim())}; path=/; samesite=strict${location.protocol === "https:" ? "; secure" : ""}`;
      $("token").value = "";
      tokenEntered = null;
      done();
    }, { once: true });
    door.showModal();
  });
  return tokenEntered;
}
