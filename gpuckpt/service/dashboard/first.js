// Time to first token: how the requests were spread, by the tier that they found.

import {$, drawn, make, show} from "./dom.js";
import {chart, settle} from "./marks.js";
import {ladder} from "./models.js";
import {TIERS} from "./pool.js";
import {count, plural, round, took} from "./words.js";

const HIGH = 58; // pixels
const NOTHING = "No request has been answered since the service began. For each tier that a request finds, its time to the "
  + "first token is shown here: how long a hot replica takes, one that wakes, one that is restored first.";

let pool = null, redraw = null;

export function prepareFirst(known, draw) {
  pool = known;
  redraw = draw;
  chart($("#tiers"), told);
  new ResizeObserver(() => redraw()).observe($("#tiers"));
}

const total = (histogram) => histogram.counts.reduce((sum, number) => sum + number, 0);
// The first bucket begins at nothing and the last one never ends: on this scale as wide as their neighbours.
const edges = ({bounds}) => [bounds[0] ** 2 / (bounds[1] ?? 2 * bounds[0]), ...bounds, bounds.at(-1) ** 2 / (bounds.at(-2) ?? bounds.at(-1) / 2)];

function told(name) {
  const at = name.lastIndexOf("/"), tier = name.slice(0, at), index = Number(name.slice(at + 1));
  const histogram = pool.view.ttft[tier];
  if (!histogram || !(index in histogram.counts)) return null;
  return [make("div", {class: "title"}, make("b", {text: tier}), make("span", {class: "number", text: range(histogram, index)})),
    make("div", {text: `${plural(histogram.counts[index], "request")} of ${count(total(histogram))}`})];
}
function range({bounds}, index) {
  if (index === 0) return `at most ${took(bounds[0])}`;
  return index < bounds.length ? `${took(bounds[index - 1])} to ${took(bounds[index])}` : `longer than ${took(bounds.at(-1))}`;
}

export function drawFirst() {
  const {ttft} = pool.view;
  $("#first").hidden = false;
  const order = [...TIERS.filter((tier) => tier in ttft), ...Object.keys(ttft).filter((tier) => !TIERS.includes(tier))];
  const asked = order.filter((tier) => ttft[tier].bounds.length && total(ttft[tier]) > 0);
  if (!asked.length) { show($("#tiers"), make("p", {class: "empty", text: NOTHING})); return; }

  // As much of the scale as is used, with a bucket of air on both sides.
  const used = asked.flatMap((tier) => {
    const {counts} = ttft[tier], sides = edges(ttft[tier]);
    const first = Math.max(0, counts.findIndex((number) => number > 0) - 1), last = Math.min(counts.length, counts.findLastIndex((number) => number > 0) + 2);
    return [sides[first], sides[last]];
  });
  const low = Math.log(Math.min(...used)), high = Math.log(Math.max(...used));
  const width = Math.max(140, $("#tiers").clientWidth - (matchMedia("(max-width: 560px)").matches ? 0 : 220));
  const x = (seconds) => ((Math.log(seconds) - low) / (high - low)) * (width - 2) + 1;
  const times = ticks(Math.exp(low), Math.exp(high), width);
  const grid = () => times.map((time) => drawn("line", {class: "grid", x1: x(time), x2: x(time), y1: 0, y2: "100%"}));
  const idle = order.filter((tier) => !asked.includes(tier));
  show($("#tiers"),
    make("div", {"data-key": "\0tiers"}, asked.map((tier) => row(tier, ttft[tier], width, x, grid()))),
    make("div", {class: "spread axis", "data-key": "\0axis", "aria-hidden": "true"}, make("div"),
      drawn("svg", {height: 18, width}, times.map((time) => drawn("text", {x: Math.max(14, Math.min(width - 16, x(time))), y: 13, "text-anchor": "middle", text: round(time)}))), make("div")),
    make("p", {class: "key", "data-key": "\0key"},
      make("span", {}, drawn("svg", {class: "mark", width: 8, height: 12, "aria-hidden": "true"}, drawn("line", {class: "p50", x1: 4, x2: 4, y1: 0, y2: 12})), "p50"),
      make("span", {}, drawn("svg", {class: "mark", width: 8, height: 12, "aria-hidden": "true"}, drawn("line", {class: "p95", x1: 4, x2: 4, y1: 0, y2: 12})), "p95"),
      make("span", {text: "height: share of the tier's requests"}),
      idle.length > 0 && make("span", {text: `no request found ${idle.join(", ")}`})));
  settle($("#tiers"));
}

function row(tier, histogram, width, x, grid) {
  const {counts, p50, p95} = histogram, most = Math.max(...counts), sides = edges(histogram);
  const bars = counts.map((number, index) => {
    if (!number) return null;
    const left = x(sides[index]), right = x(sides[index + 1]), tall = Math.max(2, (number / most) * (HIGH - 6));
    return drawn("g", {"data-key": String(index), "data-mark": `${tier}/${index}`, tabindex: "-1", role: "img", "aria-label": `${range(histogram, index)}: ${plural(number, "request")}`},
      drawn("rect", {class: "reach", x: left, y: 0, width: Math.max(1, right - left), height: HIGH}),
      drawn("rect", {class: "bucket", x: left + 0.5, y: HIGH - tall, width: Math.max(1, right - left - 1), height: tall, rx: 1}));
  });
  const line = (name, seconds) => seconds !== null && seconds > 0
    && drawn("line", {class: name, "data-key": name, x1: Math.min(width - 1, Math.max(1, x(seconds))), x2: Math.min(width - 1, Math.max(1, x(seconds))), y1: 0, y2: HIGH});
  const number = (name, seconds) => make("div", {}, make("dt", {text: name}), make("dd", {text: seconds === null ? "—" : took(seconds)}));
  return make("div", {class: "spread", "data-key": tier, "data-row": true, role: "group", "aria-label": `found ${tier}; the arrow keys go from bucket to bucket`},
    make("div", {class: "who"}, make("div", {class: "tier"}, ladder(tier), tier), make("div", {class: "soft", text: plural(total(histogram), "request")})),
    drawn("svg", {class: `histogram ${tier}`, height: HIGH + 1, width}, grid, bars, drawn("line", {class: "base", x1: 0, x2: width, y1: HIGH + 0.5, y2: HIGH + 0.5}),
      line("p50", p50), line("p95", p95)),
    make("dl", {class: "numbers"}, number("p50", p50), number("p95", p95)));
}

/** 1, 2, 5 of each power of ten, as many as have room. */
function ticks(low, high, width) {
  const all = (digits) => {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) found.push(...digits.map((digit) => digit * 10 ** power));
    return found.filter((time) => time >= low && time <= high);
  };
  return [[1, 2, 5], [1, 3], [1]].map(all).find((found) => found.length * 54 <= width) ?? all([1]).filter((_, index) => index % 2 === 0);
}
