"""The dashboard at the ends of the scale: nothing, forty models, names that are markup, a form of another time."""

from __future__ import annotations

import time

from msgspec import structs
from playwright.sync_api import expect

from gpuckpt.service.view import EventView
from tests import pool_views
from tests.browser.dashboard import HOSTILE, Open, fits, live, serving, with_event
from tests.fake_dashboard import FakePool
from tests.pool_views import GIB, a_model, a_pool, a_replica


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
