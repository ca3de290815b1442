"""How the dashboard looks and is handled: contrast, windows of any width, the keyboard, tooltips."""

from __future__ import annotations

import re
import time

import pytest
from msgspec import structs
from playwright.sync_api import expect

from tests import pool_views
from tests.browser.dashboard import Open, fits, live, row, serving, with_event
from tests.fake_dashboard import FakePool
from tests.pool_views import COLD, GIB, RESTORE, a_model, a_replica

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
        expect(page.locator("#tip")).to_be_visible()
        box = page.locator("#tip").bounding_box()
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 360
    page.mouse.move(5, 5)
    expect(page.locator("#tip")).to_be_hidden()


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
        page.wait_for_timeout(300)  # for a moment all may fit that will not when the charts are drawn anew
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
