// What happened when, a lane for each model: bars as long as it took, on an axis that ends now.

import {$, drawn, icon, make, show} from "./dom.js";
import {chart, settle} from "./marks.js";
import {sortOf} from "./pool.js";
import {ago, clock, moment, span, took} from "./words.js";

const SPANS = [[60, "1 min"], [300, "5 min"], [900, "15 min"], [3600, "1 h"], [Infinity, "all"]];
const STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 21600, 43200, 86400, 604800];
const ROW = 14, BAR = 10, LEAST = 5, ROWS = 6, TICK = 78, LANE = 47; // pixels
const KEY = [["up", "made ready"], ["down", "frozen or stopped"], ["moved", "golden moved"], ["bad", "failed"], ["note", "service"], ["running", "under way"]];
const SERVICE = "\0service";

let chosen = null; // how far back; null: as far as fits what there is
let pool = null, redraw = null;

export function prepareWakes(known, draw) {
  pool = known;
  redraw = draw;
  show($("#spans"), SPANS.map(([seconds, name]) => make("button", {type: "button", "data-seconds": seconds, text: name})));
  $("#spans").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    chosen = Number(button.dataset.seconds);
    draw();
  });
  chart($("#lanes"), (name) => {
    const event = pool.events.find((one) => String(one.seq) === name);
    return event ? told(event) : null;
  });
  new ResizeObserver(() => redraw()).observe($("#lanes"));
  show($("#lanes-key"), KEY.map(([kind, words]) => make("span", {}, glyph(kind), words)));
}
const glyph = (kind) => drawn("svg", {class: `mark ${kind}`, width: 16, height: 12, "aria-hidden": "true"}, shape(kind, 1, 1, 14, BAR));

const begin = (event) => event.time - (event.seconds ?? 0);

export function drawWakes() {
  const {view, now, events} = pool;
  $("#wakes").hidden = false;
  const oldest = Math.min(now - 30, ...events.map(begin));
  const far = chosen ?? SPANS.find(([seconds]) => seconds >= Math.min(900, now - oldest))[0];
  for (const button of $("#spans").children) button.setAttribute("aria-pressed", String(Number(button.dataset.seconds) === far));
  const from = far === Infinity ? oldest - (now - oldest) / 50 : now - far;
  const seen = events.filter((event) => event.time >= from);
  const busy = view.models.flatMap((model) => model.replicas.filter((one) => ["restoring", "starting"].includes(one.phase)).map((one) => ({model: model.name, ...one})));
  const named = new Set([...seen, ...busy].map((one) => one.model || SERVICE));
  const order = [...view.models.map((model) => model.name), SERVICE];
  const lanes = [...order.filter((name) => named.has(name)), ...[...named].filter((name) => !order.includes(name))];
  $("#lanes-key").hidden = lanes.length === 0;
  if (!lanes.length) { show($("#lanes"), make("p", {class: "empty", "data-key": "\0empty", text: nothing(events, now)})); return; }

  const width = track(), scale = (width - 6) / (now - from);
  const x = (time) => Math.max(0, (time - from) * scale);
  const times = ticks(from, now, width);
  const grid = () => times.map((time) => drawn("line", {class: "grid", x1: x(time), x2: x(time), y1: 0, y2: "100%"}));
  const lane = (name) => {
    const own = seen.filter((event) => (event.model || SERVICE) === name);
    const running = busy.filter((one) => one.model === name);
    const placed = pack([...own.map((event) => ({event, left: x(begin(event)), right: x(event.time)})),
      ...running.map((replica) => ({replica, left: x(replica.since), right: x(now)}))]);
    const rows = Math.max(1, ...placed.map(({row}) => row + 1)), height = Math.max(rows * ROW + 10, narrow() ? 0 : LANE);
    const top = (height - rows * ROW) / 2 + (ROW - BAR) / 2;
    return make("div", {class: "lane", "data-key": name, "data-row": true, role: "group", "aria-label": name === SERVICE ? "the service" : name},
      label(name, own, now),
      drawn("svg", {class: "track", height, width}, grid(), placed.map((one) => bar({...one, top: top + one.row * ROW}, now))));
  };
  show($("#lanes"),
    make("div", {class: "lanes", "data-key": "\0lanes", role: "group", "aria-label": "Events on a time axis; the arrow keys go from one to the next"}, lanes.map(lane)),
    make("div", {class: "lane axis", "data-key": "\0axis", "aria-hidden": "true"}, make("div"),
      drawn("svg", {class: "track", height: 20, width}, times.filter((time) => x(time) > 24 && x(time) < width - 62)
        .map((time) => drawn("text", {x: x(time), y: 14, "text-anchor": "middle", text: clock(time, far < 600)})),
      drawn("text", {x: width, y: 14, "text-anchor": "end", class: "now", text: pool.standing ? "last seen" : "now"}))));
  settle($("#lanes"), String(seen.at(-1)?.seq));
}

const nothing = (events, now) => (events.length
  ? `Nothing happened in this time; the last event was ${ago(now, events.at(-1).time)}.`
  : "Nothing has happened yet. When a replica is restored, woken, frozen or removed, a bar as long as that took appears here.");

/** Pixels for bars; as the style sheet lays the lanes out. */
function track() {
  const own = $("#lanes").clientWidth;
  return Math.max(120, narrow() ? own : own - 212);
}
const narrow = () => matchMedia("(max-width: 760px)").matches;

function ticks(from, to, width) {
  const step = STEPS.find((one) => ((to - from) / one) * TICK <= width) ?? STEPS.at(-1);
  // On the hour of where the reader is.
  const zone = -new Date(to * 1000).getTimezoneOffset() * 60;
  const found = [];
  for (let time = (Math.floor((from + zone) / step) + 1) * step - zone; time < to; time += step) found.push(time);
  return found;
}

/** One below the other where they overlap; what is short is drawn longer, and ends when it ended. */
function pack(bars) {
  const ends = [];
  bars.sort((one, other) => one.left - other.left || one.right - other.right);
  return bars.map((one) => {
    const left = Math.min(one.left, one.right - LEAST), right = one.right;
    let row = ends.findIndex((end) => end + 1 <= left);
    if (row < 0) row = Math.min(ends.length, ROWS - 1);
    ends[row] = right;
    return {...one, left, right, row};
  });
}

function bar({event, replica, left, right, top}, now) {
  const wide = right - left;
  if (replica) {
    return drawn("g", {"data-key": `\0${replica.name}`, class: "mark running"},
      drawn("title", {text: `${replica.name}: ${replica.phase} for ${span(now - replica.since)}`}), shape("running", left, top, wide, BAR));
  }
  const kind = sortOf(event);
  return drawn("g", {"data-key": String(event.seq), "data-mark": String(event.seq), class: `mark ${kind}`, tabindex: "-1", role: "img", "aria-label": sentence(event)},
    drawn("rect", {class: "reach", x: left - 3, y: top - 2, width: wide + 6, height: ROW}),
    shape(kind, left, top, wide, BAR), wide >= 24 && parts(event, left, top, wide));
}

/** Each kind has a form of its own beside its colour. */
function shape(kind, left, top, wide, high) {
  const right = left + wide, middle = top + high / 2;
  if (kind === "bad") {
    const centre = Math.max(right - 5, left), arm = 4;
    return drawn("g", {}, wide > 16 && drawn("line", {class: "stem", x1: left, x2: centre - 5, y1: middle, y2: middle}),
      drawn("path", {d: `M${centre - arm} ${middle - arm}l${2 * arm} ${2 * arm}m0 ${-2 * arm}l${-2 * arm} ${2 * arm}`}));
  }
  if (kind === "note") return drawn("path", {d: `M${right - 5} ${middle - 5}l5 5-5 5-5-5z`});
  if (kind === "moved") return drawn("rect", {x: left, y: middle - 2.5, width: wide, height: 5, rx: 1});
  if (kind === "down" || kind === "running") return drawn("rect", {x: left + 0.75, y: top + 0.75, width: Math.max(1, wide - 1.5), height: high - 1.5, rx: 2});
  return drawn("rect", {x: left, y: top, width: wide, height: high, rx: 2});
}

/** Where the phases of a bar end, if it is long enough to see them. */
function parts(event, left, top, wide) {
  const all = Object.values(event.phases), whole = all.reduce((total, seconds) => total + seconds, 0);
  let sum = 0;
  return all.slice(0, -1).map((seconds) => {
    sum += seconds;
    const at = left + (wide * sum) / whole;
    return drawn("line", {class: "seam", x1: at, x2: at, y1: top, y2: top + BAR});
  });
}

function label(name, own, now) {
  const last = own.filter((event) => sortOf(event) === "up" && event.seconds !== null).at(-1);
  const bad = own.filter((event) => sortOf(event) === "bad").length;
  return make("div", {class: "who"},
    make("div", {class: "name"}, make("i", {class: name === SERVICE ? "swatch" : `swatch c${pool.colour(name)}`}), make("span", {title: name === SERVICE ? null : name, text: name === SERVICE ? "the service" : name})),
    make("div", {class: "last"}, last && make("span", {title: ago(now, last.time)}, `${last.kind} in `, make("b", {text: took(last.seconds)})),
      bad > 0 && make("span", {class: "refused"}, icon("bad"), `${bad} failed`)));
}

const sentence = (event) => [event.model, event.replica, event.kind, event.seconds === null ? "" : `in ${took(event.seconds)}`, `at ${clock(event.time)}`, event.reason]
  .filter(Boolean).join(", ");

/** What the tooltip says of an event. */
function told(event) {
  const phases = Object.entries(event.phases), whole = phases.reduce((total, [, seconds]) => total + seconds, 0);
  return [
    make("div", {class: "title"}, icon({up: "coming", down: "standby"}[sortOf(event)] ?? sortOf(event)), make("b", {text: event.kind}),
      event.seconds !== null && make("span", {class: "number", text: `in ${took(event.seconds)}`})),
    make("div", {class: "soft", text: [event.replica || event.model, `${clock(event.time)}, ${ago(pool.now, event.time)}`].filter(Boolean).join(" · ")}),
    event.reason && make("p", {text: event.reason}),
    phases.length > 0 && make("dl", {class: "phases"}, phases.map(([name, seconds]) => make("div", {},
      make("dt", {text: name}), make("dd", {}, make("span", {class: "bar"}, make("i", {style: {width: `${whole > 0 ? (100 * Math.max(0, seconds)) / whole : 0}%`}})),
        make("span", {class: "number", text: took(Math.max(0, seconds))}))))),
    make("div", {class: "off", text: event.phases && phases.length ? "" : moment(event.time)}),
  ];
}
