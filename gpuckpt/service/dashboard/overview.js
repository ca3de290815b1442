// The head of the page: the service itself, what needs attention, the totals.

import {$, icon, make, show} from "./dom.js";
import {phases} from "./pool.js";
import {ago, count, moment, plural, span} from "./words.js";

const STATES = {starting: "starting", ready: "ready", draining: "draining: takes no more requests"};

export function drawService(pool) {
  const {view, now} = pool;
  const pill = $("#state");
  pill.hidden = false;
  pill.className = `pill ${view.state}`;
  pill.textContent = STATES[view.state] ?? view.state;
  show($("#facts"),
    fact("up", span(now - view.started), `since ${moment(view.started)}`),
    fact("version", view.version),
    fact("pid", String(view.pid)),
    fact("listens on", view.listen.length ? view.listen.join(", ") : "nothing"));
}
const fact = (name, value, title) => make("div", {"data-key": name}, make("dt", {text: name}), make("dd", {text: value, title}));

/** Whether the connection is there; `lost`: why not, and when it is tried again; `locked`: a key is asked for. */
export function drawLink(pool, lost, locked) {
  const link = $("#link"), bar = $("#lost");
  $(".dot", link).className = `dot ${lost || locked ? "dead" : pool.view ? "live" : ""}`;
  const seen = pool.view ? `last seen ${span(pool.unseen)} ago` : "";
  const words = lost ? "not connected" : locked ? "needs a key" : pool.view ? "live" : "connecting";
  if (link.lastElementChild.textContent !== words) link.lastElementChild.textContent = words;
  document.body.classList.toggle("stale", Boolean((lost || locked) && pool.view));
  bar.hidden = !lost;
  if (!lost) return;
  const left = Math.ceil((lost.next - Date.now()) / 1000);
  const head = pool.view ? "Connection lost" : "No connection";
  // Read out when it comes, not each second anew.
  show($("p", bar), make("strong", {text: `${head}${seen ? ", " : ""}`}), make("strong", {"aria-live": "off", text: seen}),
    make("span", {"aria-live": "off", text: `: ${lost.why}; ${left > 0 ? `next attempt in ${left} s` : "trying again"}.`}));
}

export function drawAttention(pool) {
  const {view, now} = pool;
  const found = view.models.filter((model) => model.trouble || model.golden.tier === "quarantined");
  const bar = $("#attention");
  bar.hidden = found.length === 0;
  if (!found.length) return;
  show(bar, icon("warning"), make("div", {},
    make("strong", {text: `${plural(found.length, "model")} in trouble`}),
    make("ul", {}, found.slice(0, 5).map((model) => make("li", {"data-key": model.name},
      make("a", {href: `#m-${view.models.indexOf(model)}`, text: model.name}),
      ` ${model.trouble ? "could not be started" : "has its golden in quarantine"}`,
      model.trouble && model.retry_at !== null && model.retry_at > now ? `, next attempt in ${span(model.retry_at - now)}` : ""))),
    found.length > 5 && make("p", {text: `and ${plural(found.length - 5, "other")}`})));
}

export function drawTotals(pool) {
  const {view, now} = pool, by = phases(view);
  const add = (what) => Object.values(what ?? {}).reduce((total, number) => total + number, 0);
  const parts = (what, ...bare) => Object.entries(what).filter(([name]) => !bare.includes(name)).map(([name, number]) => `${number} ${name}`).join(", ");
  const each = (name) => view.models.reduce((total, model) => total + model[name], 0);
  const asked = Math.max(...view.models.map((model) => model.asked ?? 0), 0);
  show($("#totals"),
    make("dl", {"aria-label": "Replicas"},
      tile("hot", "hot", add(by.hot), "answer at once"),
      tile("coming", "coming up", add(by.coming), parts(by.coming)),
      tile("standby", "standby", add(by.standby), parts(by.standby, "standby") || "frozen"),
      tile("going", "going", add(by.going), parts(by.going))),
    make("dl", {"aria-label": "Requests"},
      tile("", "at work", each("requests"), asked ? `last asked ${ago(now, asked)}` : "never asked"),
      tile("", "waiting", each("waiting"), "for a replica", each("waiting") > 0 && "wait"),
      tile("", "answered", each("answered"), `in ${span(now - view.started)}`),
      tile("", "failed", each("failed"), "got no answer", each("failed") > 0 && "bad")));
}
const tile = (glyph, name, number, note, mood) => make("div", {"data-key": name, class: mood || (number ? "" : "none")},
  make("dt", {}, glyph && icon(glyph), name), make("dd", {text: count(number)}), make("dd", {class: "note", text: note}));
