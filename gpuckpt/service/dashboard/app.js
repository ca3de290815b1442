// The dashboard: what the service tells goes in here, and every part draws itself from it.

import {$} from "./dom.js";
import {drawEvents, prepareEvents, sayFailures} from "./events.js";
import {drawFirst, prepareFirst} from "./first.js";
import {Link} from "./link.js";
import {drawMemory} from "./memory.js";
import {drawModels} from "./models.js";
import {drawAttention, drawLink, drawService, drawTotals} from "./overview.js";
import {Pool} from "./pool.js";
import {drawWakes, prepareWakes} from "./wakes.js";

const SCHEMA = 1;

const pool = new Pool();
let lost = null; // {why, next} while there is no connection
let due = false;
let spent = 0; // ms, by the last drawing

function draw() {
  const began = performance.now();
  due = false;
  drawLink(pool, lost, $("#ask").open);
  const bad = pool.view?.models.filter((model) => model.trouble).length;
  document.title = `${lost ? "✕ " : bad ? `(${bad}) ` : ""}gpuckpt pool`;
  if (!pool.view || document.hidden) return;
  drawService(pool);
  drawAttention(pool);
  drawTotals(pool);
  drawMemory(pool);
  drawModels(pool);
  drawWakes();
  drawFirst();
  drawEvents();
  spent = performance.now() - began;
}
function soon() {
  if (due) return;
  due = true;
  // Together with what else comes now, and never for more than a fifth of the time. Animation frames would not do: they
  // do not come to a hidden page.
  setTimeout(draw, Math.max(30, 4 * spent));
}

const link = new Link({
  view(view) {
    if (view.schema !== SCHEMA) throw new Error(`the service tells its state in form ${view.schema}, this page knows ${SCHEMA}: load the page anew`);
    lost = null;
    pool.take(view);
    $("#forget").hidden = !link.keyed;
    sayFailures();
    soon();
  },
  lost(why, next) {
    lost = {why, next};
    pool.stand();
    soon();
  },
  asked(refused) {
    lost = null;
    pool.stand();
    $("#forget").hidden = true;
    $("#refused").hidden = !refused;
    if (!$("#ask").open) $("#ask").showModal();
    $("#ask form").key.select();
    soon();
  },
});

$("#ask form").addEventListener("submit", (event) => {
  event.preventDefault();
  const field = event.target.elements.key;
  $("#ask").close();
  link.use(field.value.trim());
  field.value = "";
});
$("#ask").addEventListener("cancel", (event) => event.preventDefault()); // there is nothing behind it
$("#forget").addEventListener("click", () => { link.forget(); location.reload(); }); // what was shown goes too
$("#again").addEventListener("click", () => link.again());

prepareWakes(pool, soon);
prepareFirst(pool, soon);
prepareEvents(pool, soon);
document.addEventListener("visibilitychange", soon);
setInterval(soon, 1000);
link.again();
