// The models, one row each: their tier, their replicas, who asks for them, and what is wrong.

import {$, icon, make, show} from "./dom.js";
import {TIERS, fate, kindOf, sinks} from "./pool.js";
import {ago, count, moment, plural, size, span} from "./words.js";

const COLUMNS = ["Model", "Tier", "Replicas", "Requests", "Last asked", "Golden"];
const NOTHING = "The pool has no models. Each one is a table [models.NAME] in the service's configuration, "
  + "and is listed here once the service has read that again.";

export function drawModels(pool) {
  const {view} = pool;
  $("#models").hidden = false;
  if (!view.models.length) { show($("#listing"), make("p", {class: "empty", text: NOTHING})); return; }
  // Roles, because a narrow window lays the table out as cards, which takes its meaning away.
  show($("#listing"), make("table", {role: "table", class: "models", "data-key": "\0table"},
    make("thead", {role: "rowgroup"}, make("tr", {role: "row"}, COLUMNS.map((name) => make("th", {role: "columnheader", scope: "col", text: name})))),
    view.models.map((model, index) => body(pool, model, index))));
}

function body(pool, model, index) {
  const bad = model.trouble || model.golden.tier === "quarantined";
  return make("tbody", {role: "rowgroup", "data-key": model.name, id: `m-${index}`, class: bad ? "bad" : "", tabindex: "-1"},
    make("tr", {role: "row", class: model.replicas.length ? "" : "bare"},
      cell("Model", names(pool, model)),
      cell("Tier", make("span", {class: "tier"}, ladder(model.tier), model.tier)),
      cell("Replicas", replicas(pool, model)),
      cell("Requests", requests(model)),
      cell("Last asked", model.asked === null ? make("span", {class: "soft", text: "never"})
        : make("time", {title: moment(model.asked), text: ago(pool.now, model.asked)})),
      cell("Golden", golden(pool, model))),
    model.trouble && make("tr", {role: "row", "data-key": "trouble", class: "wide"},
      make("td", {role: "cell", colspan: COLUMNS.length}, trouble(pool, model))));
}
const cell = (name, ...what) => make(name === "Model" ? "th" : "td",
  {role: name === "Model" ? "rowheader" : "cell", scope: name === "Model" ? "row" : null, "data-label": name, class: `of-${name.split(" ").at(-1).toLowerCase()}`}, what);

/** Five steps for hot down to one for cold. */
export function ladder(tier) {
  const steps = TIERS.length - TIERS.indexOf(tier), known = TIERS.includes(tier);
  return make("span", {class: `ladder ${known ? tier : ""}`, "aria-hidden": "true"},
    TIERS.map((_, index) => make("i", {class: known && index < steps ? "on" : ""})));
}

function names(pool, model) {
  const {pin} = model.rules, tags = [];
  if (typeof pin === "string" && pin !== "no") tags.push(`pinned ${pin}`);
  if (model.warm) tags.push("kept warm");
  if (model.scale != null) tags.push(`scaled to ${model.scale}`);
  if (model.drained) tags.push("drained: takes no requests");
  return [
    make("div", {class: "name"}, make("i", {class: `swatch c${pool.colour(model.name)}`}), make("span", {text: model.name})),
    model.aliases.length > 0 && make("div", {class: "aliases", "data-key": "\0aliases", text: `also ${model.aliases.join(", ")}`}),
    tags.length > 0 && make("div", {class: "tags", "data-key": "\0tags"}, tags.map((tag) => make("span", {class: "tag", text: tag}))),
    make("details", {"data-key": "\0rules"}, make("summary", {}, "Rules", make("span", {class: "off", text: ` of ${model.name}`})), rules(model)),
  ];
}

function rules(model) {
  const durations = /^idle_|_seconds$/;
  const told = (name, value) => {
    if (value === null) return "—";
    if (typeof value !== "number") return String(value);
    return durations.test(name) ? span(value) : count(value);
  };
  const row = (name, value, kind) => make("div", {"data-key": name}, make("dt", {class: kind, text: name}), make("dd", {text: value}));
  return make("dl", {class: "rules"},
    Object.entries(model.rules).map(([name, value]) => row(name, told(name, value), "code")),
    row("one more replica holds", model.expected_memory ? size(model.expected_memory) : "not known yet"),
    row("answered", count(model.answered)),
    row("failed", count(model.failed)));
}

function replicas(pool, model) {
  if (!model.replicas.length) return make("span", {class: "soft", text: "none"});
  return make("ul", {class: "chips"}, model.replicas.map((replica) => {
    const kind = kindOf(replica.phase), next = pool.standing ? null : fate(model, replica);
    const most = model.rules.concurrency, facts = [];
    if (kind === "coming" && replica.phase !== "waking") facts.push(`for ${span(pool.now - replica.since)}`);
    if (replica.memory) facts.push(size(replica.memory));
    if (replica.gpu) facts.push(`${size(replica.gpu)} GPU`);
    if (next) facts.push(next.at - pool.now > 0.5 ? `${next.what} in ${span(next.at - pool.now)}` : `${next.what} now`);
    return make("li", {"data-key": replica.name, class: `chip ${kind}`,
      title: `${replica.phase} since ${moment(replica.since)}${replica.pid === null ? "" : `, process ${replica.pid}`}`},
    make("div", {class: "what"}, icon(kind), make("b", {text: replica.phase}),
      replica.requests > 0 && make("span", {class: "busy", text: typeof most === "number" ? `${count(replica.requests)} of ${plural(most, "request")}` : plural(replica.requests, "request")})),
    make("div", {class: "which", text: replica.name}),
    facts.length > 0 && make("div", {class: "facts", text: facts.join(" · ")}));
  }));
}

function requests(model) {
  if (!model.requests && !model.waiting && !model.failed) return make("span", {class: "soft", text: "none"});
  return [
    make("div", {"data-key": "\0work", class: model.requests ? "" : "soft", text: model.requests ? `${count(model.requests)} at work` : "none at work"}),
    model.waiting > 0 && make("div", {class: "waiting", "data-key": "\0waiting", text: `${count(model.waiting)} waiting`}),
    model.failed > 0 && make("div", {class: "aliases", "data-key": "\0failed", text: `${count(model.failed)} failed`}),
  ];
}

function golden(pool, model) {
  const {tier, bytes, name} = model.golden, at = pool.standing ? null : sinks(model);
  const words = {none: "none yet", tmpfs: "in tmpfs", disk: "on disk"}[tier] ?? tier;
  return [
    make("div", {class: tier === "quarantined" ? "refused" : ""}, tier === "quarantined" && icon("warning"), words),
    bytes > 0 && make("div", {class: "number", "data-key": "\0size", text: size(bytes)}),
    name !== model.name && make("div", {class: "aliases", "data-key": "\0name", text: name}),
    at !== null && make("div", {class: "soft", "data-key": "\0sinks", text: at > pool.now ? `to disk in ${span(at - pool.now)}` : "to disk now"}),
  ];
}

function trouble(pool, model) {
  const left = model.retry_at === null ? 0 : model.retry_at - pool.now;
  const next = left > 0 ? `Next attempt in ${span(left)}.` : "Next attempt when it is needed.";
  return make("div", {class: "trouble"}, icon("warning"), make("p", {}, make("strong", {text: "Could not be started: "}), model.trouble, " ",
    make("span", {class: "next", title: left > 0 ? moment(model.retry_at) : null, text: next})));
}
