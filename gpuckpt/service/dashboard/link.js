// The connection to the service: the state at once, then as it changes; again and again when it is lost.

const KEY = "gpuckpt.key";
const SILENCE = 12_000; // ms; the service sends at least every five seconds
const FIRST = 1_000, LONGEST = 8_000; // ms between attempts

/** What it tells:
 * `view(PoolView)`, `lost(why, next)` with the time of the next attempt, `asked(refused)` when a key is needed. */
export class Link {
  #tell; #wait = FIRST; #timer = 0; #stop = new AbortController(); #asking = false;

  constructor(tell) {
    this.#tell = tell;
    addEventListener("online", () => this.again());
  }

  get keyed() { return sessionStorage.getItem(KEY) !== null; }

  use(key) {
    sessionStorage.setItem(KEY, key);
    this.#asking = false;
    this.again();
  }

  forget() { sessionStorage.removeItem(KEY); }

  /** Connect now; whatever is under way is given up. */
  again() {
    if (this.#asking) return;
    clearTimeout(this.#timer);
    this.#stop.abort();
    this.#stop = new AbortController();
    this.#follow(this.#stop);
  }

  async #follow(stop) {
    let silence = 0;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => stop.abort(new Error("the service has gone silent")), SILENCE);
    };
    let why = "the service ended the connection";
    try {
      heard();
      this.#tell.view(await (await this.#get("state", stop)).json());
      const answer = await this.#get("events", stop);
      for await (const data of messages(answer.body, heard)) {
        this.#tell.view(JSON.parse(data));
        this.#wait = FIRST;
      }
    } catch (error) {
      if (stop !== this.#stop) return; // somebody has asked for another attempt meanwhile
      if (error instanceof Refused) {
        this.#asking = true;
        this.#tell.asked(this.keyed);
        return;
      }
      why = error instanceof TypeError ? "the service does not answer" : error.message;
    } finally {
      clearTimeout(silence);
      if (stop === this.#stop) stop.abort(); // of what is left of it
    }
    if (stop !== this.#stop) return;
    this.#tell.lost(why, Date.now() + this.#wait);
    this.#timer = setTimeout(() => this.again(), this.#wait);
    this.#wait = Math.min(2 * this.#wait, LONGEST);
  }

  async #get(name, stop) {
    const key = sessionStorage.getItem(KEY);
    const answer = await fetch(new URL(name, import.meta.url), {
      headers: key === null ? {} : {Authorization: `Bearer ${key}`},
      signal: stop.signal,
      cache: "no-store",
      credentials: "omit",
    });
    if (answer.status === 401) throw new Refused();
    if (!answer.ok) throw new Error(`the service answers ${answer.status}`);
    return answer;
  }
}

class Refused extends Error {}

/** The data of server-sent events. EventSource would do this, but it cannot send a key. */
async function* messages(body, heard) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    heard();
    const parts = (held + value.replaceAll("\r", "")).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
