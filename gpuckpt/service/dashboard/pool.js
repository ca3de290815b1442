// What is known of the pool, and what follows from it.

const EVENTS = 1000; // kept, as many as the service keeps

export const TIERS = ["hot", "standby", "tmpfs", "disk", "cold"];

/** Kinds of phases: where a replica is on its way. */
const PHASES = {
  restoring: "coming", starting: "coming", waking: "coming", hot: "hot",
  freezing: "standby", standby: "standby", draining: "going", stopping: "going",
};
export const kindOf = (phase) => PHASES[phase] ?? "note";

/** Kinds of events: `up` makes a model faster to reach, `down` makes room. */
const EVENT_KINDS = {
  restored: "up", started: "up", woken: "up", adopted: "up", frozen: "down", stopped: "down", moved: "moved",
  failed: "bad", lost: "bad", quarantined: "bad",
};
export const sortOf = (event) => EVENT_KINDS[event.kind] ?? "note";

export class Pool {
  view = null;
  events = []; // as they come, more than one view holds
  fresh = [];  // those that the last view brought
  #ahead = 0;  // what the service's clock is ahead of this machine's
  #stopped = null;
  #colours = new Map();

  take(view) {
    const again = this.view && (this.view.pid !== view.pid || this.view.started !== view.started);
    if (again) this.events = [];
    const last = this.events.at(-1)?.seq ?? -1;
    this.fresh = view.events.filter((event) => event.seq > last);
    this.events = [...this.events, ...this.fresh].slice(-EVENTS);
    if (!this.view || again) this.fresh = [];
    this.view = view;
    this.#ahead = view.now - Date.now() / 1000;
    this.#stopped = null;
    this.#paint();
  }

  /** The service's time. It stands while the connection is lost: everything shown is of then. */
  get now() { return this.#stopped ?? Date.now() / 1000 + this.#ahead; }
  stand() { this.#stopped ??= this.now; }
  get standing() { return this.#stopped !== null; }
  /** Seconds since the last view came, by this machine's clock. */
  get unseen() { return Math.max(0, Date.now() / 1000 + this.#ahead - (this.view?.now ?? 0)); }

  /** The model's colour: 1 to 8, or 0 for the others. The largest get one, and keep it for as long as they are there. */
  colour(model) { return this.#colours.get(model) ?? 0; }
  #paint() {
    const models = this.view.models, names = new Set(models.map((model) => model.name));
    for (const name of this.#colours.keys()) if (!names.has(name)) this.#colours.delete(name);
    const taken = new Set(this.#colours.values());
    const free = [1, 2, 3, 4, 5, 6, 7, 8].filter((colour) => !taken.has(colour));
    const weigh = (model) => memoryOf(model) + model.golden.bytes;
    const bare = models.filter((model) => !this.#colours.has(model.name));
    if (free.length < bare.length) bare.sort((one, other) => weigh(other) - weigh(one));
    for (const model of bare.slice(0, free.length)) this.#colours.set(model.name, free.shift());
  }
}

const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);
export const memoryOf = (model) => sum(model.replicas.map((replica) => replica.memory));
export const gpuOf = (model, uuid) => sum(model.replicas.map((replica) => (uuid ? replica.gpus[uuid] ?? 0 : replica.gpu)));

/** Replicas by kind of phase: {hot: {restoring: 1, …}, …}. */
export function phases(view) {
  const found = {hot: {}, coming: {}, standby: {}, going: {}};
  for (const {phase} of view.models.flatMap((model) => model.replicas)) {
    const kind = (found[kindOf(phase)] ??= {});
    kind[phase] = (kind[phase] ?? 0) + 1;
  }
  return found;
}

/** What becomes of a replica, by the model's rules, if nobody asks for it: {what, at}, or null. */
export function fate(model, replica) {
  if (model.drained || model.scale != null) return null; // is kept, or goes as soon as it is idle
  const {idle_freeze: freeze, idle_release: release, min_standby: least, pin} = model.rules;
  if (model.waiting || replica.requests) return null;
  const oldest = (phase, spared) => {
    const those = model.replicas.filter((one) => one.phase === phase && !one.requests).sort((one, other) => one.since - other.since);
    return those.indexOf(replica) < spared;
  };
  const pinned = typeof pin === "string" && pin !== "no";
  if (replica.phase === "hot" && typeof freeze === "number") {
    const hot = model.replicas.filter((one) => one.phase === "hot").length;
    return oldest("hot", hot - (pin === "hot" ? 1 : 0)) ? {what: "freezes", at: replica.since + freeze} : null;
  }
  if (replica.phase === "standby" && typeof release === "number") {
    const floor = Math.max(Number(least) || 0, pinned || model.warm ? 1 : 0);
    const staying = model.replicas.filter((one) => kindOf(one.phase) !== "going").length;
    return oldest("standby", staying - floor) ? {what: "is removed", at: replica.since + release} : null;
  }
  return null;
}

/** When an unused golden goes to disk by its rules; null if it does not. */
export function sinks(model) {
  const {idle_disk: idle, min_standby: least, pin} = model.rules;
  const ruled = Number(least) > 0 || (typeof pin === "string" && pin !== "no") || model.warm;
  const kept = model.drained ? false : model.scale == null ? ruled : model.scale > 0;
  if (model.golden.tier !== "tmpfs" || typeof idle !== "number" || kept || model.asked === null) return null;
  return model.replicas.length || model.waiting ? null : model.asked + idle;
}
