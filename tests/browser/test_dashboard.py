"""The pool's dashboard in a real browser, served the way the service does it, from views that the tests make."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from msgspec import structs
from playwright.sync_api import Browser, Locator, Page, expect

from gpuckpt.pool import policy
from gpuckpt.pool.state import Freeze, Golden, Model, Move, Phase, Pin, Replica, Rules, State, Stop
from gpuckpt.service.view import EventView, ModelView, PoolView
from tests import pool_views
from tests.fake_dashboard import FakePool
from tests.pool_views import COLD, GIB, RESTORE, a_model, a_pool, a_replica

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></table><b>&amp;"
LONG = "an-organisation-with-a-name/" + "a-model-whose-name-does-not-end-" * 4
# Text whose contrast with what lies behind it is less than 4.5, with what is behind it composed of all layers.
FAINT = """() => {
  const dot = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const over = (under, colour) => {
    dot.clearRect(0, 0, 1, 1);
    dot.fillStyle = under; dot.fillRect(0, 0, 1, 1);
    dot.fillStyle = colour; dot.fillRect(0, 0, 1, 1);
    return `rgb(${[...dot.getImageData(0, 0, 1, 1).data].slice(0, 3).join(" ")})`;
  };
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9]+/g).map((part) => part / 255)
      .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const under = element.parentElement ? ground(element.parentElement) : "rgb(255 255 255)";
    return over(under, getComputedStyle(element).backgroundColor);
  };
  const found = [];
  let seen = 0;
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.nodeValue.trim());
    if (!own || !element.checkVisibility({visibilityProperty: true})) continue;
    if (element.closest(".off, option, title")) continue;
    const style = getComputedStyle(element), under = ground(element);
    const [one, other] = [light(over(under, element instanceof SVGElement ? style.fill : style.color)), light(under)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    seen += 1;
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} ${element.className} ${element.textContent.slice(0, 40)}`);
  }
  return [seen, found];
}"""

Open = Callable[..., Page]


@contextmanager
def serving(view: PoolView) -> Iterator[FakePool]:
    with FakePool(view).running() as pool:
        yield pool


@pytest.fixture
def pool() -> Iterator[FakePool]:
    """A lively one."""
    with serving(pool_views.lively(time.time())) as made:
        yield made


@pytest.fixture
def look(browser: Browser) -> Iterator[Open]:
    """Opens the dashboard of a pool: no script may fail, nothing may be refused by the page's own policy, nothing asked
    of another address. ``troubled``: the test lets answers fail, and the browser may write that to its console."""
    contexts, failures = [], []

    def opened(pool: FakePool, *, width: int = 1280, troubled: bool = False, **options: Any) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.on("console", lambda said: failures.append(said.text) if fails(said.type, said.text) else None)
        page.on("request", lambda asked: None if asked.url.startswith(pool.address) else failures.append(asked.url))

        def fails(kind: str, text: str) -> bool:
            return kind in ("error", "warning") and not (troubled and text.startswith("Failed to load resource"))

        page.goto(f"{pool.address}/dashboard")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert failures == []


def live(page: Page) -> Page:
    expect(page.locator("#link")).to_have_text("live")
    return page


def row(page: Page, name: str) -> Locator:
    return page.locator("#models tbody").filter(has=page.locator(".name", has_text=name))


def tile(page: Page, name: str) -> Locator:
    return page.locator("#totals dl > div").filter(has=page.locator("dt", has_text=re.compile(f"^{name}$")))


def fits(page: Page) -> None:
    """Nothing reaches beyond the window's side, and no part of a card beyond the card."""
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= page.evaluate("innerWidth")
    beyond = page.evaluate(
        """() => [...document.querySelectorAll(".card")].flatMap((card) => {
          const edge = card.getBoundingClientRect().right;
          return [...card.querySelectorAll("*")]
            .filter((one) => !one.closest(".off, svg *, option") && one.getBoundingClientRect().right > edge + 0.5)
            .map((one) => `${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`);
        })"""
    )
    assert beyond == []


def changed(view: PoolView, name: str, **other: Any) -> PoolView:
    """The view with one model changed."""
    models = [structs.replace(model, **other) if model.name == name else model for model in view.models]
    return structs.replace(view, models=models)


def with_event(view: PoolView, **event: Any) -> PoolView:
    told = EventView(seq=max((one.seq for one in view.events), default=0) + 1, time=time.time(), **event)
    return structs.replace(view, events=[*view.events, told])


# ---------------------------------------------------------------------- what is shown


def test_the_service_and_its_totals(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    expect(page.locator("#state")).to_have_text("ready")
    for fact in ("up3 h 12 min", "version0.1.0", "pid4211", "listens on127.0.0.1:8400, unix:/run/gpuckpt/front.sock"):
        expect(page.locator("#facts")).to_contain_text(fact)
    for name, number in {
        "hot": "3",
        "coming up": "1",
        "standby": "2",
        "going": "0",
        "at work": "13",
        "waiting": "3",
        "answered": "85,055",
        "failed": "6",
    }.items():
        expect(tile(page, name).locator("dd").first).to_have_text(number)
    expect(tile(page, "coming up")).to_contain_text("1 restoring")
    expect(page).to_have_title("(1) gpuckpt pool")


def test_memory_is_told_by_model(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    uses = page.locator("#uses .use")
    expect(uses.locator(".name")).to_have_text(["Replicas", "Goldens in tmpfs", "GPU", "This machine"])
    expect(uses.nth(0).locator(".told")).to_have_text("11.8 GiB of 24 GiB 49 %")
    expect(uses.nth(0).locator("li")).to_have_text(["qwen3-8b3.9 GiB", "llama-3.2-3b-instruct7.3 GiB", "bge-m3640 MiB"])
    expect(uses.nth(3).locator("li")).to_have_text(["replicas11.8 GiB", "goldens28.4 GiB", "everything else7.1 GiB"])
    meter = page.get_by_role("meter", name="Goldens in tmpfs")
    expect(meter).to_have_attribute("aria-valuetext", "28.4 GiB of 36 GiB")
    widths = meter.evaluate(
        "(bar) => [...bar.children].map((part) => part.getBoundingClientRect().width / bar.clientWidth)"
    )
    assert sum(widths) == pytest.approx(28.4 / 36, abs=0.01)
    pool.view = structs.replace(pool.view, store=structs.replace(pool.view.store, limit=30 * GIB))
    expect(uses.nth(1).locator(".told")).to_contain_text("95 %, nearly full")


def test_there_is_no_gpu_without_one(look: Open) -> None:
    with serving(a_pool(time.time(), [a_model("m")])) as pool:
        expect(live(look(pool)).locator("#uses .use .name")).to_have_text(
            ["Replicas", "Goldens in tmpfs", "This machine"]
        )


def test_every_tier_and_phase_has_words(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    expect(page.locator("#models .tier")).to_have_text(["hot", "hot", "standby", "tmpfs", "disk", "cold", "cold"])
    goldens: list[str | re.Pattern[str]] = ["in tmpfs9.3 GiB", "in tmpfs5.1 GiB", "in tmpfs2.2 GiB"]
    goldens += [re.compile("in tmpfs11.8 GiBto disk in 8 min"), "on disk4.4 GiB", "none yet", "quarantined3.6 GiB"]
    expect(page.locator("#models .of-golden")).to_have_text(goldens)
    chips = row(page, "qwen3-8b").locator(".chip")
    expect(chips.nth(0)).to_have_text("hot8 of 8 requestsqwen3-8b.12.1 GiB · 17.6 GiB GPU")
    expect(chips.nth(2)).to_have_text(re.compile(r"^restoringqwen3-8b\.3for \d+ s$"))
    expect(row(page, "qwen3-8b")).to_contain_text("2 waiting")
    expect(row(page, "bge-m3")).to_contain_text("kept warm")
    phases = ["restoring", "starting", "waking", "hot", "freezing", "standby", "draining", "stopping"]
    replicas = [a_replica(f"qwen3-8b.{phase}", phase, time.time() - 3) for phase in phases]
    pool.view = changed(pool.view, "qwen3-8b", replicas=replicas)
    expect(chips.locator("b")).to_have_text(phases)
    for name, number in {"hot": 2, "coming up": 3, "standby": 4, "going": 2}.items():  # with those of other models
        expect(tile(page, name).locator("dd").first).to_have_text(str(number))


def test_trouble_is_prominent(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    expect(page.locator("#attention")).to_contain_text("2 models in trouble")
    trouble = row(page, "deepseek").locator(".trouble")
    expect(trouble).to_contain_text("the server did not answer within 120 s")
    expect(trouble).to_contain_text(re.compile(r"Next attempt in \d+ s"))
    page.locator("#attention a", has_text="deepseek").click()
    expect(row(page, "deepseek")).to_be_in_viewport()
    mended = changed(pool.view, "deepseek-r1-distill-7b", trouble="", retry_at=None)
    pool.view = changed(mended, "gemma-3-4b", golden=structs.replace(pool.view.models[-1].golden, tier="tmpfs"))
    expect(page.locator("#attention")).to_be_hidden()
    expect(page.locator(".trouble")).to_have_count(0)
    expect(page).to_have_title("gpuckpt pool")


def test_rules_on_demand(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    details = row(page, "qwen3-8b").locator("details")
    expect(details.locator("dl")).to_be_hidden()
    details.locator("summary").click()
    for rule in ("max_replicas4", "idle_freeze1 min", "idle_disk—", "pinhot", "one more replica holds420 MiB"):
        expect(details).to_contain_text(rule)


def test_a_countdown_to_what_the_rules_will_do(look: Open) -> None:
    now = time.time()
    replicas = [a_replica("m.1", "hot", now - 18), a_replica("m.2", "standby", now - 500)]
    with serving(a_pool(now, [a_model("m", "hot", replicas=replicas)])) as pool:
        facts = live(look(pool)).locator(".chip .facts")
        expect(facts.nth(0)).to_have_text(re.compile(r"380 MiB · freezes in (4[012]|[123]\d) s"))
        expect(facts.nth(1)).to_have_text(re.compile(r"is removed in 1 min \d+ s"))
        before = facts.nth(0).text_content()
        expect(facts.nth(0)).not_to_have_text(before or "")  # it counts without the service


def test_the_countdown_agrees_with_the_policy(pool: FakePool, look: Open) -> None:
    """What the page expects of replicas and goldens is what the pool would order at that time."""
    chance = random.Random(11)
    models, views = [], []
    for number in range(1600):
        rules = Rules(
            min_standby=chance.randrange(3),
            idle_freeze=float(chance.randrange(10, 60)),
            idle_release=float(chance.randrange(10, 60)),
            idle_disk=chance.choice([None, float(chance.randrange(10, 90))]),
            pin=chance.choice(list(Pin)),
            prepare=0,
        )
        phases = chance.choices(list(Phase), k=chance.randrange(5))
        replicas = tuple(
            Replica(
                f"m{number}.{at}",
                phase,
                1000.0 - chance.randrange(60),
                chance.choice([0, 0, 1]) if phase is Phase.HOT else 0,
            )
            for at, phase in enumerate(phases)
        )
        one = Model(
            f"m{number}",
            rules,
            chance.choice(list(Golden)),
            golden_bytes=1,
            replicas=replicas,
            asked=1000.0 - chance.randrange(60),
            retry_at=9999.0,
            warm=chance.random() < 0.2,
            scale=chance.choice([None, None, None, 1, 2]),
        )
        # Where there is something to do at once it is not for long that way.
        if not policy.decide(State(940.0, (one,))):
            models.append(one)
            views.append(as_view(one))
    due = live(look(pool)).evaluate(
        """async ([models, now]) => {
          const {fate, sinks} = await import("/dashboard/pool.js");
          const due = [];
          for (const model of models) {
            for (const replica of model.replicas) {
              const next = fate(model, replica);
              if (next && next.at <= now) due.push(`${next.what} ${replica.name}`);
            }
            const sinking = sinks(model);
            if (sinking !== null && sinking <= now) due.push(`sinks ${model.name}`);
          }
          return due.sort();
        }""",
        [msgspec.to_builtins(views), 1010.0],
    )
    ordered = []
    # Each for itself: what one does can be what another one is in the way of.
    for one in models:
        for action in policy.decide(State(1010.0, (one,))):
            match action:
                case Freeze(_, name):
                    ordered.append(f"freezes {name}")
                case Stop(_, name, "idle"):
                    ordered.append(f"is removed {name}")
                case Move(name, Golden.DISK, "idle"):
                    ordered.append(f"sinks {name}")
    assert len(ordered) > 100 and len(due) == len(set(due))
    assert sorted(set(due) ^ set(ordered)) == []


def as_view(model: Model) -> ModelView:
    """What the service would tell of it."""
    replicas = [a_replica(one.name, one.phase, one.since, requests=one.requests) for one in model.replicas]
    rules = {name: getattr(model.rules, name) for name in ("min_standby", "idle_freeze", "idle_release", "idle_disk")}
    return a_model(
        model.name,
        golden=str(model.golden),
        replicas=replicas,
        rules={**rules, "pin": str(model.rules.pin)},
        asked=model.asked,
        warm=model.warm,
        scale=model.scale,
    )


def test_first_tokens_by_tier(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    rows = page.locator("#tiers [data-row]")
    expect(rows.locator(".tier")).to_have_text(["hot", "standby", "tmpfs", "disk", "cold"])
    expect(rows.nth(0).locator(".numbers")).to_have_text("p5034 msp95142 ms")
    expect(rows.nth(4).locator(".numbers")).to_have_text("p5036.2 sp95112 s")
    expect(rows.nth(0).locator("[data-mark]")).to_have_count(7)
    left = [rows.nth(at).locator(".p50").evaluate("(line) => line.getBoundingClientRect().left") for at in range(5)]
    assert left == sorted(left)  # on one scale
    rows.nth(4).locator("[data-mark]").last.hover()
    expect(page.locator("#tip")).to_have_text("coldlonger than 100 s1 request of 9")
    del pool.view.ttft["disk"]
    pool.view.ttft["disk"] = structs.replace(pool.view.ttft["cold"], counts=[0] * 15, p50=None, p95=None)
    pool.view = structs.replace(pool.view)
    expect(page.locator("#tiers .key")).to_contain_text("no request found disk")


def test_events_are_listed_and_filtered(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    events = page.locator("#happened li")
    expect(events).to_have_count(30)
    page.get_by_role("button", name="Show 30 older events").click()
    expect(events).to_have_count(60)
    expect(events.first).to_contain_text("woken")
    page.get_by_label("failures only").check()
    expect(events).to_have_count(6)
    expect(events.locator(".kind")).to_have_text(["failed", "failed", "failed", "quarantined", "failed", "lost"])
    page.get_by_label("Of model").select_option("gemma-3-4b")
    expect(events).to_have_count(2)
    page.get_by_label("Of model").select_option("phi-4-mini")
    expect(page.locator("#happened")).to_have_text("No event is like that.")
    page.get_by_label("failures only").uncheck()
    expect(events.locator(".kind")).to_have_text(["moved", "stopped", "started"])
    page.get_by_label("Of model").select_option("the service")
    expect(events).to_have_count(1)
    expect(events).to_contain_text("reloaded")
    expect(events.locator("time")).to_have_attribute(
        "title", re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC[+−]\d\d:\d\d$")
    )


def test_the_time_line_is_to_scale(look: Open) -> None:
    now = time.time()
    events = [
        EventView(seq=1, time=now - 20, kind="restored", model="m", replica="m.1", seconds=10.0),
        EventView(seq=2, time=now - 5, kind="woken", model="m", replica="m.1", seconds=0.02),
        EventView(seq=3, time=now - 4, kind="failed", model="other", reason="why"),
        EventView(seq=4, time=now - 300, kind="frozen", model="m", replica="m.1", seconds=0.1),
    ]
    with serving(a_pool(now, [a_model("m"), a_model("other")], events=sorted(events, key=lambda one: one.seq))) as pool:
        page = live(look(pool))
        page.get_by_role("button", name="1 min", exact=True).click()
        lanes = page.locator(".lanes .lane")
        expect(lanes).to_have_count(2)
        expect(page.locator("[data-mark='4']")).to_have_count(0)  # now it is drawn
        box = lanes.first.locator("svg").bounding_box()
        wide = lanes.first.locator("[data-mark='1'] > rect:not(.reach)").bounding_box()
        short = lanes.first.locator("[data-mark='2'] > rect:not(.reach)").bounding_box()
        assert box and wide and short
        assert wide["width"] == pytest.approx(box["width"] * 10 / 60, rel=0.03)
        assert short["width"] == pytest.approx(5, abs=0.5)  # too short to be seen: as wide as it must be
        page.get_by_role("button", name="all").click()
        expect(page.locator("[data-mark='4']")).to_have_count(1)
        expect(lanes.first).to_contain_text("woken in 20 ms")
        expect(lanes.nth(1)).to_contain_text("1 failed")


# ---------------------------------------------------------------------- the keyboard


def test_the_tooltips_are_reached_with_the_keyboard(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    page.locator("#spans button").last.focus()
    page.keyboard.press("Tab")
    tip = page.locator("#tip")
    while "lanes" in (page.evaluate("document.activeElement.className") or ""):  # a list that scrolls is a stop itself
        page.keyboard.press("Tab")
    focused = page.locator(":focus")
    expect(focused).to_have_attribute("aria-describedby", "tip")
    expect(focused).to_have_attribute("aria-label", re.compile("^qwen3-8b, qwen3-8b.2, woken, in"))  # the newest
    for pressed in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(pressed)
    expect(focused).to_have_attribute("aria-label", re.compile("^phi-4-mini, phi-4-mini.1, started, in 3"))
    expect(tip.locator("dt")).to_have_text([*COLD, *RESTORE])
    before = focused.get_attribute("data-mark")
    pool.view = with_event(pool.view, kind="woken", model="bge-m3", replica="bge-m3.1", seconds=0.01)
    expect(page.locator("#happened li").first).to_contain_text("bge-m3.1")
    expect(focused).to_have_attribute("data-mark", before or "")  # what comes does not take the keyboard away
    expect(tip).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(focused).to_have_attribute("aria-label", re.compile("stopped"))
    page.keyboard.press("End")
    expect(focused).to_have_attribute("aria-label", re.compile("moved"))
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    page.keyboard.press("Tab")
    expect(tip).to_contain_text("requests of 20,502")
    page.keyboard.press("ArrowDown")
    expect(tip).to_contain_text("standby")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Of model")).to_be_focused()


def test_a_tooltip_follows_the_pointer_and_stays_in_the_window(pool: FakePool, look: Open) -> None:
    page = live(look(pool, width=360))
    for at in (0, -1):
        mark = page.locator("#lanes [data-mark]").nth(at)
        mark.hover()
        box = page.locator("#tip").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
    page.mouse.move(5, 5)
    expect(page.locator("#tip")).to_be_hidden()


# ---------------------------------------------------------------------- as it changes


def test_what_changes_is_seen_and_nothing_else_moves(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    details = row(page, "phi-4-mini").locator("details")
    details.locator("summary").click()
    page.evaluate("window.kept = document.activeElement")
    replicas = [a_replica("phi-4-mini.1", "hot", time.time(), requests=1)]
    pool.view = with_event(
        changed(pool.view, "phi-4-mini", tier="hot", replicas=replicas, requests=1, asked=time.time()),
        kind="restored", model="phi-4-mini", replica="phi-4-mini.1", seconds=1.2, phases={"restore": 1.2},
    )  # fmt: skip
    expect(row(page, "phi-4-mini").locator(".tier")).to_have_text("hot")
    expect(row(page, "phi-4-mini").locator(".chip")).to_contain_text("1 of 8 requests")
    expect(page.locator("#happened li").first).to_contain_text("restoredphi-4-mini.11.20 s")
    expect(page.locator("#lanes [data-key='phi-4-mini'] .last")).to_contain_text("restored in 1.20 s")
    expect(details).to_have_attribute("open", "")
    assert page.evaluate("document.activeElement === window.kept && window.kept.isConnected")
    pool.view = structs.replace(pool.view, models=[one for one in pool.view.models if one.name != "qwen3-8b"])
    expect(page.locator("#models tbody")).to_have_count(6)
    assert page.evaluate("document.activeElement === window.kept && window.kept.isConnected")
    expect(page.locator("#happened li").first).to_contain_text("phi-4-mini.1")


def test_failures_are_said(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    expect(page.locator("#spoken")).to_be_empty()  # what was before is not news
    pool.view = with_event(pool.view, kind="lost", model="bge-m3", replica="bge-m3.1", reason="it is dead")
    expect(page.locator("#spoken")).to_have_text("bge-m3.1 lost: it is dead")


def test_a_lost_connection_is_seen_and_comes_back(pool: FakePool, look: Open) -> None:
    page = live(look(pool, troubled=True))
    facts = row(page, "llama").locator(".facts").first
    expect(facts).to_contain_text("freezes in")
    pool.away = True
    lost = page.locator("#lost")
    expect(lost).to_contain_text(re.compile(r"Connection lost, last seen \d+ s ago: .*next attempt in \d s"))
    expect(page.locator("#link")).to_have_text("not connected")
    expect(facts).not_to_contain_text("freezes in")  # nobody knows
    expect(row(page, "qwen3-8b")).to_be_visible()  # what was is still there
    expect(page).to_have_title("✕ gpuckpt pool")
    expect(lost).to_contain_text(re.compile(r"last seen [3-9] s ago"))
    pool.view = changed(pool.view, "phi-4-mini", tier="tmpfs")
    pool.away = False
    lost.get_by_role("button", name="Try now").click()
    expect(lost).to_be_hidden()
    live(page)
    expect(row(page, "phi-4-mini").locator(".tier")).to_have_text("tmpfs")
    expect(facts).to_contain_text("freezes in")
    # And without anybody's help.
    pool.away = True
    expect(lost).to_be_visible()
    pool.away = False
    expect(lost).to_be_hidden()


def test_a_service_that_is_silent_is_lost(pool: FakePool, look: Open) -> None:
    page = look(pool)
    live(page)
    page.clock.install()
    page.reload()
    live(page)
    pool.silent = True
    page.wait_for_timeout(300)
    page.clock.fast_forward(13_000)
    expect(page.locator("#lost")).to_contain_text("the service has gone silent")
    pool.silent = False
    page.clock.fast_forward(2_000)
    expect(page.locator("#lost")).to_be_hidden()


def test_a_service_that_answers_with_an_error(pool: FakePool, look: Open) -> None:
    pool.status = 503
    page = look(pool, troubled=True)
    expect(page.locator("#lost")).to_contain_text("No connection: the service answers 503")
    pool.status = 200
    live(page)


def test_a_restarted_service_begins_anew(pool: FakePool, look: Open) -> None:
    page = live(look(pool, troubled=True))
    expect(page.locator("#happened li")).to_have_count(30)
    told = [EventView(seq=1, time=time.time(), kind="adopted", model="bge-m3", replica="bge-m3.1")]
    pool.view = structs.replace(pool.view, pid=5000, started=time.time(), events=told)
    expect(page.locator("#happened li")).to_have_count(1)
    expect(page.locator("#lanes [data-mark]")).to_have_count(1)


def test_events_are_kept_longer_than_a_view_holds_them(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    pool.view = with_event(structs.replace(pool.view, events=pool.view.events[-1:]), kind="woken", model="bge-m3")
    expect(page.get_by_role("button", name="Show 31 older events")).to_be_visible()


# ---------------------------------------------------------------------- keys


def test_a_key_is_asked_for(pool: FakePool, look: Open) -> None:
    pool.key = "right"
    page = look(pool, troubled=True)
    ask = page.get_by_role("dialog")
    expect(ask).to_be_visible()
    expect(page.locator("#models")).to_be_hidden()
    expect(ask.locator(".refused")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(ask).to_be_visible()
    ask.get_by_label("API key").fill("wrong")
    ask.get_by_role("button", name="Connect").click()
    expect(ask.locator(".refused")).to_be_visible()
    ask.get_by_label("API key").fill(" right ")
    page.keyboard.press("Enter")
    live(page)
    expect(ask).to_be_hidden()
    assert page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]") == [
        ["right"],
        [],
        "",
    ]
    assert not any("right" in path for path in pool.asked)
    page.reload()
    live(page)
    pool.key = "another"  # while it streams: asked again at the next connection
    pool.away = True
    expect(page.locator("#lost")).to_be_visible()
    pool.away = False
    expect(ask).to_be_visible()
    expect(page.locator("#link")).to_have_text("needs a key")
    ask.get_by_label("API key").fill("another")
    page.keyboard.press("Enter")
    live(page)
    page.get_by_role("button", name="Forget the key").click()
    expect(ask).to_be_visible()
    expect(page.locator("#models tbody")).to_have_count(0)
    assert page.evaluate("sessionStorage.length") == 0


# ---------------------------------------------------------------------- how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(pool: FakePool, look: Open, scheme: str) -> None:
    page = live(look(pool, color_scheme=scheme, troubled=True))
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    bright = sum(map(int, re.findall(r"\d+", ground))) / 3
    assert bright > 200 if scheme == "light" else bright < 50
    row(page, "qwen3-8b").locator("summary").click()
    page.locator("#lanes [data-mark]").first.focus()
    expect(page.locator("#tip")).to_be_visible()
    seen, faint = page.evaluate(FAINT)
    assert seen > 300 and faint == []
    pool.away = True
    expect(page.locator("#lost")).to_be_visible()
    assert page.evaluate(FAINT)[1] == []
    pool.key, pool.away = "key", False
    expect(page.get_by_role("dialog")).to_be_visible()
    assert page.evaluate(FAINT)[1] == []


@pytest.mark.parametrize("width", [360, 560, 761, 980, 1280, 1920])
def test_it_fits_into_any_window(look: Open, width: int) -> None:
    now = time.time()
    lively = pool_views.lively(now)
    long = a_model(
        LONG, "hot", aliases=[LONG + "-alias"], trouble="x" * 300, asked=now - 4000,
        replicas=[a_replica(f"{LONG}.1", "hot", now, requests=120, gpu=3 * GIB)], rules={"idle_freeze": 600},
    )  # fmt: skip
    view = structs.replace(lively, models=[*lively.models, long], listen=[f"unix:/run/{LONG}/front.sock"])
    view = with_event(view, kind="failed", model=LONG, replica=f"{LONG}.1", reason="y" * 300)
    with serving(view) as pool:
        page = live(look(pool, width=width))
        expect(page.locator("#models tbody")).to_have_count(8)
        for summary in page.locator("#models summary").all():
            summary.click()
        fits(page)
        page.set_viewport_size({"width": 1000 if width < 900 else 400, "height": 800})
        page.wait_for_timeout(300)  # the charts are drawn anew
        fits(page)


def test_a_narrow_window_is_still_a_table(pool: FakePool, look: Open) -> None:
    page = live(look(pool, width=360))
    table = page.get_by_role("table")
    expect(table.get_by_role("rowheader")).to_have_count(7)
    expect(table.get_by_role("row").filter(has_text="bge-m3").get_by_role("cell").first).to_contain_text("standby")


def test_nothing_moves_for_those_who_do_not_want_it(pool: FakePool, look: Open) -> None:
    animation = "(one) => getComputedStyle(one).animationName"
    assert live(look(pool)).locator(".chip.coming .icon").evaluate(animation) == "breathe"
    assert live(look(pool, reduced_motion="reduce")).locator(".chip.coming .icon").evaluate(animation) == "none"


# ---------------------------------------------------------------------- the ends of the scale


def test_an_empty_pool_explains_itself(look: Open) -> None:
    with serving(pool_views.empty(time.time())) as pool:
        page = live(look(pool))
        expect(page.locator("#listing")).to_contain_text("The pool has no models.")
        expect(page.locator("#lanes")).to_contain_text("Nothing has happened yet.")
        expect(page.locator("#tiers")).to_contain_text("No request has been answered")
        expect(page.locator("#happened")).to_have_text("Nothing has happened yet.")
        expect(page.locator("#uses .use").first).to_contain_text("0 B, no limit")
        pool.view = pool_views.lively(time.time())  # and fills up
        expect(page.locator("#models tbody")).to_have_count(7)
        pool.view = structs.replace(pool_views.empty(time.time()), state="draining")
        expect(page.locator("#listing")).to_contain_text("The pool has no models.")
        expect(page.locator("#state")).to_have_text("draining: takes no more requests")


def test_forty_models(look: Open) -> None:
    with serving(pool_views.large(time.time())) as pool:
        page = live(look(pool))
        expect(page.locator("#models tbody")).to_have_count(40)
        expect(page.locator("#uses .use").first.locator("li")).to_have_count(9)  # eight have a colour
        expect(page.locator("#uses .use").first).to_contain_text("8 other models")
        colours = page.locator("#models .swatch").evaluate_all(
            "(all) => all.map((one) => getComputedStyle(one).backgroundColor)"
        )
        assert len(set(colours)) == 9
        fits(page)
        changes = page.evaluate(
            """async () => {
              const {drawModels} = await import("/dashboard/models.js"), {Pool} = await import("/dashboard/pool.js");
              const pool = new Pool();
              pool.take(await (await fetch("/dashboard/state")).json());
              pool.stand();
              drawModels(pool);
              const seen = new MutationObserver(() => {});
              seen.observe(document.body, {subtree: true, childList: true, attributes: true, characterData: true});
              drawModels(pool);
              return seen.takeRecords().length;
            }"""
        )
        assert changes == 0  # what has not changed is not touched: twice a second, for 40 models


def test_names_and_texts_are_never_markup(look: Open) -> None:
    now = time.time()
    bad = [HOSTILE, "__proto__", "constructor", "\0others", "javascript:alert(1)", "a\nb", "  ", "&lt;b&gt;"]
    models = [
        a_model(
            name, "hot", aliases=[HOSTILE], trouble=HOSTILE, answered=1,
            rules={HOSTILE: HOSTILE}, replicas=[a_replica(f"{name}.{HOSTILE}", "hot", now)],
        )
        for name in bad
    ]  # fmt: skip
    events = [
        EventView(
            seq=at,
            time=now - at,
            kind=kind,
            model=name,
            replica=f"{name}.1",
            reason=HOSTILE,
            seconds=1,
            phases={HOSTILE: 1},
        )
        for at, (name, kind) in enumerate(
            [*((name, "restored") for name in bad), (HOSTILE, HOSTILE), ("", HOSTILE)], start=1
        )
    ]
    view = a_pool(
        now,
        models,
        events=events,
        version=HOSTILE,
        listen=[HOSTILE],
        state=HOSTILE,
        gpu=structs.replace(a_pool(now).gpu, limit=GIB),
    )
    view.ttft[HOSTILE] = pool_views.a_histogram({0.1: 3}, 0.1, 0.1)
    with serving(view) as pool:
        page = live(look(pool))
        expect(page.locator("#models tbody")).to_have_count(len(bad))
        expect(page.locator("#models .name > span").first).to_have_text(HOSTILE)
        expect(page.locator("#happened li").last).to_contain_text(HOSTILE)
        for mark in page.locator("#lanes [data-mark]").all():
            mark.focus()
            expect(page.locator("#tip")).to_contain_text(HOSTILE)
        page.get_by_label("Of model").select_option(HOSTILE)
        expect(page.locator("#happened li")).to_have_count(2)
        pool.view = with_event(pool.view, kind="failed", model=HOSTILE, reason=HOSTILE)
        expect(page.locator("#spoken")).to_contain_text(HOSTILE)
        assert page.locator("img, script:not([src]), main b b").count() == 0
        assert page.locator("a").evaluate_all("(all) => all.every((one) => one.getAttribute('href').startsWith('#'))")
        assert "taken" not in page.title()


def test_a_form_of_the_state_that_the_page_does_not_know(pool: FakePool, look: Open) -> None:
    pool.view = structs.replace(pool.view, schema=2)
    expect(look(pool).locator("#lost")).to_contain_text("the service tells its state in form 2, this page knows 1")
