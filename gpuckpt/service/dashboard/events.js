// What happened, in words: the newest first.

import {$, icon, make, show} from "./dom.js";
import {sortOf} from "./pool.js";
import {ago, moment, plural, took} from "./words.js";

const PAGE = 30;
const EVERY = "", SERVICE = "\0service";
const ICONS = {up: "coming", down: "standby"};

let rows = PAGE, pool = null;

export function prepareEvents(known, draw) {
  pool = known;
  $("#of").addEventListener("change", () => { rows = PAGE; draw(); });
  $("#failures").addEventListener("change", () => { rows = PAGE; draw(); });
  $("#more").addEventListener("click", () => { rows += 100; draw(); });
}

export function drawEvents() {
  const {events, now} = pool, of = $("#of");
  $("#events").hidden = false;
  const names = [...new Set([...pool.view.models.map((model) => model.name), ...events.map((event) => event.model).filter(Boolean)])];
  const option = (value, text) => make("option", {value, text, "data-key": value});
  show(of, option(EVERY, "all models"), names.map((name) => option(name, name)), events.some((event) => !event.model) && option(SERVICE, "the service"));
  const bad = $("#failures").checked;
  const wanted = events.filter((event) => (of.value === EVERY || (event.model || SERVICE) === of.value) && (!bad || sortOf(event) === "bad")).reverse();
  const more = $("#more"), left = wanted.length - rows;
  more.hidden = left <= 0;
  more.textContent = `Show ${plural(left, "older event")}`;
  if (!wanted.length) {
    const none = events.length ? "No event is like that." : "Nothing has happened yet.";
    show($("#happened"), make("p", {class: "empty", "data-key": "\0none", text: none}));
    return;
  }
  show($("#happened"), make("ol", {class: "happened", "data-key": "\0list", "aria-label": "Events, the newest first"}, wanted.slice(0, rows).map((event) => {
    const kind = sortOf(event);
    return make("li", {"data-key": String(event.seq), class: kind},
      make("time", {title: moment(event.time), datetime: new Date(event.time * 1000).toISOString(), text: ago(now, event.time)}),
      make("span", {class: "kind"}, icon(ICONS[kind] ?? kind), event.kind),
      make("span", {class: "what"},
        make("b", {text: event.replica || event.model || "the service"}),
        event.reason && make("span", {class: "reason", text: event.reason})),
      make("span", {class: "took", text: event.seconds === null ? "" : took(event.seconds)}));
  })));
}

/** For those who hear the page: what has just gone wrong. */
export function sayFailures() {
  const bad = pool.fresh.filter((event) => sortOf(event) === "bad");
  if (bad.length) $("#spoken").textContent = bad.map((event) => `${event.replica || event.model} ${event.kind}: ${event.reason}`).join(". ");
}
