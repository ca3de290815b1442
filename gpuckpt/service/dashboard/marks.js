// Marks of a chart that tell more when pointed at or reached with the keyboard.
// A chart is one stop of the Tab key; within it the arrows go from mark to mark. Every mark has data-mark, its name, and
// lies in an element with data-row.

import {$, show} from "./dom.js";

const tip = $("#tip");
const charts = new Map(); // element → what a mark of it tells: (name) => nodes, or null if it is gone
let shown = null;

/** Let marks in this element tell; `tell` makes what the tooltip of a mark holds. */
export function chart(element, tell) {
  charts.set(element, tell);
  const mark = (event) => event.target.closest?.("[data-mark]");
  element.addEventListener("pointerover", (event) => { if (mark(event)) open(mark(event)); });
  element.addEventListener("pointerout", (event) => {
    if (shown && mark(event) === shown && shown !== document.activeElement) close();
  });
  element.addEventListener("focusin", (event) => {
    if (!mark(event)) return;
    stop(element, mark(event));
    open(mark(event));
  });
  element.addEventListener("focusout", close);
  element.addEventListener("keydown", (event) => {
    const next = mark(event) && follow(element, mark(event), event.key);
    if (!next) return;
    event.preventDefault();
    next.focus();
    next.scrollIntoView({block: "nearest"});
  });
}
addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
addEventListener("scroll", place, {capture: true, passive: true});
addEventListener("resize", close);

/** After the chart was drawn anew: one mark can be reached with Tab (until the reader has chosen, the one of that name),
 * and the tooltip is where its mark is now. */
export function settle(element, name) {
  const marks = [...element.querySelectorAll("[data-mark]")];
  if (marks.length && !marks.some((mark) => mark.getAttribute("tabindex") === "0")) stop(element, marks.find((mark) => mark.dataset.mark === name) ?? marks[0]);
  if (shown && element.contains(shown)) open(shown);
  else if (shown && !shown.isConnected) close();
}

function stop(element, mark) {
  for (const other of element.querySelectorAll("[data-mark][tabindex='0']")) other.setAttribute("tabindex", "-1");
  mark.setAttribute("tabindex", "0");
}

const middle = (mark) => { const {left, width} = mark.getBoundingClientRect(); return left + width / 2; };

function follow(element, mark, pressed) {
  const rows = [...element.querySelectorAll("[data-row]")].filter((row) => row.querySelector("[data-mark]"));
  const row = mark.closest("[data-row]"), here = middle(mark);
  const marks = [...row.querySelectorAll("[data-mark]")].sort((one, other) => middle(one) - middle(other));
  const at = marks.indexOf(mark);
  switch (pressed) {
    case "ArrowLeft": return marks[at - 1];
    case "ArrowRight": return marks[at + 1];
    case "Home": return marks[0];
    case "End": return marks.at(-1);
    case "ArrowUp":
    case "ArrowDown": {
      const next = rows[rows.indexOf(row) + (pressed === "ArrowUp" ? -1 : 1)];
      const far = (one) => Math.abs(middle(one) - here);
      return next && [...next.querySelectorAll("[data-mark]")].reduce((best, one) => (far(one) < far(best) ? one : best));
    }
    default: return undefined;
  }
}

function open(mark) {
  const element = [...charts.keys()].find((one) => one.contains(mark));
  const told = charts.get(element)?.(mark.dataset.mark);
  if (!told) { close(); return; }
  if (shown !== mark) shown?.removeAttribute("aria-describedby");
  shown = mark;
  mark.setAttribute("aria-describedby", "tip");
  show(tip, told);
  tip.hidden = false;
  place();
}

function close() {
  shown?.removeAttribute("aria-describedby");
  shown = null;
  tip.hidden = true;
}

function place() {
  if (!shown) return;
  const at = shown.getBoundingClientRect(), own = tip.getBoundingClientRect(), gap = 8, edge = 8;
  const left = Math.max(edge, Math.min(at.left + at.width / 2 - own.width / 2, innerWidth - own.width - edge));
  const above = at.top - own.height - gap;
  tip.style.left = `${left}px`;
  tip.style.top = `${above >= edge ? above : at.bottom + gap}px`;
}
