"""The dashboard of a pool that the test makes, and where to find things on it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import structs
from playwright.sync_api import Locator, Page, expect

from gpuckpt.service.view import EventView, PoolView
from tests.fake_dashboard import FakePool

HOSTILE = "<img src=x onerror=\"document.title='taken'\"></table><b>&amp;"
Open = Callable[..., Page]


@contextmanager
def serving(view: PoolView) -> Iterator[FakePool]:
    with FakePool(view).running() as pool:
        yield pool


def live(page: Page) -> Page:
    expect(page.locator("#link")).to_have_text("live")
    return page


def row(page: Page, name: str) -> Locator:
    return page.locator("#models tbody").filter(has=page.locator(".name", has_text=name))


def tile(page: Page, name: str) -> Locator:
    return page.locator("#totals dl > div").filter(has=page.locator("dt", has_text=re.compile(f"^{name}$")))


def fits(page: Page) -> None:
    """Nothing reaches beyond the window's side, and no part of a card beyond the card, once all is drawn."""
    ends = time.monotonic() + 30
    while beyond := _beyond(page):
        assert time.monotonic() < ends, beyond
        page.wait_for_timeout(50)


def _beyond(page: Page) -> list[str]:
    wide, inner = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    if wide > inner:
        return [f"the page is {wide} wide, its window {inner}"]
    found: list[str] = page.evaluate(
        """() => [...document.querySelectorAll(".card")].flatMap((card) => {
          const edge = card.getBoundingClientRect().right;
          return [...card.querySelectorAll("*")]
            .filter((one) => !one.closest(".off, svg *, option") && one.getBoundingClientRect().right > edge + 0.5)
            .map((one) => `${one.tagName} ${one.className} ${one.textContent.slice(0, 40)}`);
        })"""
    )
    return found


def changed(view: PoolView, name: str, **other: Any) -> PoolView:
    """The view with one model changed."""
    models = [structs.replace(model, **other) if model.name == name else model for model in view.models]
    return structs.replace(view, models=models)


def with_event(view: PoolView, **event: Any) -> PoolView:
    told = EventView(seq=max((one.seq for one in view.events), default=0) + 1, time=time.time(), **event)
    return structs.replace(view, events=[*view.events, told])
