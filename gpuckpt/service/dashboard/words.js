// Numbers, sizes and times as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const NUMBER = new Intl.NumberFormat("en");

export const count = (number) => NUMBER.format(number);

/** "1 request", "1,204 requests". */
export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;

export function size(bytes) {
  let unit = 0, left = Math.max(0, bytes);
  // 1,000 and not 1,024, so that no number has four digits before the point.
  while (left >= 1000 && unit < UNITS.length - 1) { left /= 1024; unit += 1; }
  return `${left >= 100 || unit === 0 ? Math.round(left) : +left.toFixed(1)} ${UNITS[unit]}`;
}

/** How long something took: three digits. */
export function took(seconds) {
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(seconds < 0.00995 ? 1 : 0)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 600) return `${Math.round(seconds)} s`;
  return span(seconds);
}

/** A round time on an axis. */
export const round = (seconds) => (seconds < 0.9995 ? `${+(seconds * 1000).toPrecision(3)} ms` : `${+seconds.toPrecision(3)} s`);

/** How long something lasts, as it is counted: whole seconds, the two largest units. */
export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const at = parts.findIndex(([length]) => whole >= length);
  if (at < 0) return "0 s";
  const [length, unit] = parts[at], next = parts[at + 1];
  const rest = next ? Math.floor((whole % length) / next[0]) : 0;
  return `${Math.floor(whole / length)} ${unit}${rest ? ` ${rest} ${next[1]}` : ""}`;
}

export function ago(now, then) {
  const past = now - then;
  if (past < 1) return "just now";
  return past >= 60 && past < 3600 ? `${Math.floor(past / 60)} min ago` : `${span(past)} ago`;
}

const two = (number) => String(number).padStart(2, "0");

/** Of the day, local. */
export function clock(time, seconds = true) {
  const at = new Date(time * 1000);
  return `${two(at.getHours())}:${two(at.getMinutes())}${seconds ? `:${two(at.getSeconds())}` : ""}`;
}

/** Date and time, local, with where from UTC that is. */
export function moment(time) {
  const at = new Date(time * 1000), minutes = -at.getTimezoneOffset(), far = Math.abs(minutes);
  const zone = `${minutes < 0 ? "−" : "+"}${two(Math.floor(far / 60))}:${two(far % 60)}`;
  return `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${clock(time)} UTC${zone}`;
}
