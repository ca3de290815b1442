// Who holds how much of what there is.

import {$, make, show} from "./dom.js";
import {gpuOf, memoryOf} from "./pool.js";
import {plural, size} from "./words.js";

export function drawMemory(pool) {
  const {view} = pool;
  $("#memory").hidden = false;
  const stored = (model) => (["tmpfs", "moving"].includes(model.golden.tier) ? model.golden.bytes : 0);
  const machine = view.host_memory, rest = machine.used - view.memory.used - view.store.used;
  show($("#uses"),
    use("Replicas", "host memory of their own", view.memory, byModel(pool, memoryOf, view.memory.used)),
    use("Goldens in tmpfs", "shared by all replicas of a model", view.store, byModel(pool, stored, view.store.used)),
    ...gpus(pool),
    use("This machine", "everything that runs on it", machine, [
      {name: "replicas", bytes: view.memory.used, colour: "replicas"},
      {name: "goldens", bytes: view.store.used, colour: "goldens"},
      {name: "everything else", bytes: rest, colour: "rest"},
    ].filter((part) => part.bytes > 0)));
}

/** A bar for each GPU: memory of one is none of another's. */
function gpus(pool) {
  const {gpu, gpus: each = []} = pool.view;
  if (each.length < 2) {
    const any = gpu.limit !== null || gpu.used > 0;
    return any ? [use("GPU", each.length ? each[0].name : "memory of hot replicas", gpu, byModel(pool, gpuOf, gpu.used))] : [];
  }
  return each.map((one, index) => use(`GPU ${index}`, one.name, one, byModel(pool, (model) => gpuOf(model, one.uuid), one.used)));
}

/** Parts of a bar: the models with a colour, then what the others hold, and what is accounted to none. */
function byModel(pool, measure, used) {
  const parts = pool.view.models.map((model) => ({name: model.name, bytes: measure(model), colour: pool.colour(model.name)})).filter((part) => part.bytes > 0);
  const named = parts.filter((part) => part.colour), others = parts.filter((part) => !part.colour);
  named.sort((one, other) => one.colour - other.colour);
  const total = (some) => some.reduce((bytes, part) => bytes + part.bytes, 0);
  if (others.length) named.push({name: plural(others.length, "other model"), bytes: total(others), colour: 0, key: "\0others"});
  const rest = used - total(parts);
  // Rounding of what the kernel tells, and what changes between two looks, is no part of its own.
  if (rest > Math.max(16 << 20, used / 50)) named.push({name: "not of a model", bytes: rest, colour: "rest", key: "\0rest"});
  return named;
}

function use(title, about, {used, limit}, parts) {
  const whole = Math.max(limit ?? 0, used, 1);
  const told = limit === null ? `${size(used)}, no limit` : `${size(used)} of ${size(limit)}`;
  const share = limit ? used / limit : 0, full = share >= 0.9;
  return make("figure", {"data-key": title, class: full ? "use full" : "use"},
    make("figcaption", {}, make("span", {class: "name", text: title}), make("span", {class: "about", text: about}),
      make("span", {class: "told"}, make("b", {text: told}), limit ? ` ${Math.round(100 * share)} %${full ? ", nearly full" : ""}` : "")),
    make("div", {class: limit === null ? "bar open" : "bar", role: "meter", "aria-label": title, "aria-valuemin": 0, "aria-valuemax": limit ?? used,
      "aria-valuenow": used, "aria-valuetext": told},
    parts.map((part) => make("i", {"data-key": part.key ?? part.name, class: `c${part.colour}`, title: `${part.name}: ${size(part.bytes)}`,
      style: {width: `${(100 * part.bytes) / whole}%`}}))),
    parts.length
      ? make("ul", {class: "legend"}, parts.map((part) => make("li", {"data-key": part.key ?? part.name},
        make("i", {class: `swatch c${part.colour}`}), make("span", {class: "who", text: part.name}), make("span", {class: "number", text: size(part.bytes)}))))
      : make("p", {class: "hint", text: "nothing is held"}));
}
