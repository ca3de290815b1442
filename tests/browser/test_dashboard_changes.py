"""The dashboard as its pool changes, is lost, comes back, or asks for a key."""

from __future__ import annotations

import re
import time

from msgspec import structs
from playwright.sync_api import expect

from gpuckpt.service.view import EventView
from tests.browser.dashboard import Open, changed, live, row, with_event
from tests.fake_dashboard import FakePool
from tests.pool_views import a_replica


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
    expect(lost).to_contain_text(re.compile(r"Connection lost, last seen \d+ s ago: .*next attempt in \d+ s"))
    expect(page.locator("#link")).to_have_text("not connected")
    expect(facts).not_to_contain_text("freezes in")  # nobody knows
    expect(row(page, "qwen3-8b")).to_be_visible()  # what was is still there
    expect(page).to_have_title("✕ gpuckpt pool")
    expect(lost).to_contain_text(re.compile(r"last seen ([3-9]|\d\d) s ago"))
    pool.view = changed(pool.view, "phi-4-mini", tier="tmpfs")
    expect(lost.get_by_role("button", name="Try now")).to_be_visible()
    pool.away = False
    # As it is, without waiting to find it: the page may try by itself in this moment, and the button is gone then.
    lost.locator("button", has_text="Try now").dispatch_event("click")
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
