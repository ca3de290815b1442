"""What the pool's dashboard shows, served the way the service does it, from views that the tests make."""

from __future__ import annotations

import random
import re
import time

import msgspec
import pytest
from msgspec import structs
from playwright.sync_api import expect

from gpuckpt.pool import policy
from gpuckpt.pool.state import Freeze, Golden, Model, Move, Phase, Pin, Replica, Rules, State, Stop
from gpuckpt.service.view import EventView, GpuView, ModelView, UseView
from tests.browser.dashboard import Open, changed, live, row, serving, tile
from tests.fake_dashboard import FakePool
from tests.pool_views import GIB, a_model, a_pool, a_replica


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


def test_of_several_gpus_each_has_its_bar(look: Open) -> None:
    now = time.time()
    replicas = [
        a_replica("m.1", "hot", now, gpu=30 * GIB, gpus={"GPU-a": 10 * GIB, "GPU-b": 20 * GIB}),
        a_replica("m.2", "standby", now),
    ]
    model = a_model("m", "hot", replicas=replicas)
    gpus = [
        GpuView(uuid="GPU-a", name="NVIDIA H100 80GB HBM3", used=10 * GIB, limit=80 * GIB),
        GpuView(uuid="GPU-b", name="NVIDIA H100 80GB HBM3", used=20 * GIB, limit=40 * GIB),
    ]
    both = UseView(used=30 * GIB, limit=120 * GIB)
    with serving(a_pool(now, [model], gpu=both, gpus=gpus)) as pool:
        page = live(look(pool))
        uses = page.locator("#uses .use")
        names = ["Replicas", "Goldens in tmpfs", "GPU 0", "GPU 1", "This machine"]
        expect(uses.locator(".name")).to_have_text(names)
        expect(uses.nth(2).locator(".about")).to_have_text("NVIDIA H100 80GB HBM3")
        expect(uses.nth(2).locator(".told")).to_have_text("10 GiB of 80 GiB 13 %")
        expect(uses.nth(3).locator(".legend li")).to_have_text(["m20 GiB"])
        pool.view = structs.replace(pool.view, gpu=structs.replace(both, limit=80 * GIB), gpus=gpus[:1])
        expect(uses.locator(".name")).to_have_text(["Replicas", "Goldens in tmpfs", "GPU", "This machine"])


def test_every_tier_and_phase_has_words(pool: FakePool, look: Open) -> None:
    page = live(look(pool))
    expect(page.locator("#models .tier")).to_have_text(["hot", "hot", "standby", "tmpfs", "disk", "cold", "cold"])
    goldens: list[str | re.Pattern[str]] = ["in tmpfs9.3 GiB", "in tmpfs5.1 GiB", "in tmpfs2.2 GiB"]
    goldens += [re.compile("in tmpfs11.8 GiBto disk in [5-8] min"), "on disk4.4 GiB", "none yet", "quarantined3.6 GiB"]
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
