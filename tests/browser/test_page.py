"""The page at `/` of the guest: what one does with it, in a real browser."""

from __future__ import annotations

import json
import re
import urllib.request
import uuid
from typing import Any

import pytest
from playwright.sync_api import Page, expect

PROMPT = "def read(self, size=-1):"
LAYERS = 4


def ask(server: str, method: str, path: str, body: Any = None) -> Any:
    """One request to the server, past the page."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def undisturbed(server: str, prompt: str, count: int) -> str:
    """What the model writes when nobody stops it."""
    body = {"prompt": prompt, "max_tokens": count, "temperature": 0}
    return str(ask(server, "POST", "/v1/completions", body)["choices"][0]["text"])


def start(page: Page, *, prompt: str = PROMPT, layers: str = "2", tokens: int = 12, once: bool = True) -> str:
    """Start a session in the page; returns its name once it is shown."""
    name = f"b-{uuid.uuid4().hex[:8]}"
    page.get_by_role("button", name="New session").click()
    form = page.locator("#generate")
    form.get_by_label("Prompt").fill(prompt)
    form.get_by_label("Name").fill(name)
    form.get_by_label("Max. tokens").fill(str(tokens))
    form.get_by_label("Stop after layers").fill(layers)
    form.get_by_label("stop once").set_checked(once)
    form.get_by_role("button", name="Start").click()
    expect(page.locator("#title h2")).to_have_text(name)
    return name


def stopped(page: Page, layer: int) -> None:
    expect(page.locator("#state")).to_have_text("paused")
    wanted = (
        f"Stopped after layer {layer} of {LAYERS}"
        if layer
        else f"Stopped behind the embeddings, before {LAYERS} layers"
    )
    expect(page.locator("#stop .head b")).to_have_text(wanted)
    expect(page.locator("#strip .cell.layer")).to_have_count(LAYERS)
    expect(page.locator("#strip .cell.layer.ran")).to_have_count(layer)
    expect(page.locator("#strip .cell.at")).to_have_attribute("data-layer", str(layer))


def done(page: Page) -> str:
    """Wait for the end of the generation; what it wrote."""
    expect(page.locator("#text .end").last).to_contain_text("—")
    expect(page.locator("#state")).to_have_text("idle")
    return page.locator("#text .answer").last.text_content() or ""


def test_a_session_stops_is_looked_at_and_goes_on(page: Page, server: str) -> None:
    name = start(page)
    stopped(page, 2)
    expect(page.locator("#list button[aria-current]")).to_contain_text("after layer 2 of 4")
    expect(page.locator("#chart circle")).to_have_count(3)  # behind the embeddings, after layers 1 and 2
    expect(page.locator("#lens .token")).to_have_count(10)
    shares = [float((text or "").split()[0]) for text in page.locator("#lens .share").all_text_contents()]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0
    pause = ask(server, "GET", f"/v1/sessions/{name}")["pause"]
    expect(page.locator("#checkpoint")).to_contain_text(f"{pause['checkpoint']['bytes']:,}")
    page.locator("#strip .cell").nth(1).hover()
    expect(page.locator("#readout")).to_contain_text("After layer 1 of 4: ‖h‖ of the last token")
    expect(page.locator("#text .prompt")).to_have_text(PROMPT)
    page.get_by_role("button", name="Resume").click()
    assert done(page) == undisturbed(server, PROMPT, 12)
    expect(page.locator("#stop")).to_be_hidden()


def test_steering_by_the_slider_changes_what_is_written(page: Page, server: str) -> None:
    name = start(page)
    stopped(page, 2)
    expect(page.locator("#lens .token")).to_have_count(10)
    before = page.locator("#lens .share").all_text_contents()
    slider = page.get_by_label("Factor, slider")
    slider.focus()
    for _ in range(44):  # from 1 to −1.2 in steps of 0.05
        slider.press("ArrowLeft")
    expect(page.get_by_label("Factor", exact=True)).to_have_value("-1.2")
    page.locator("#steer").get_by_role("button", name="Apply").click()
    expect(page.locator("#edits li")).to_contain_text("at this stop: scale × -1.20")
    expect(page.locator("#lens-note")).to_contain_text("before the last edit")
    assert page.locator("#lens .share").all_text_contents() != before
    (edit,) = ask(server, "GET", f"/v1/sessions/{name}")["pause"]["edits"]
    assert edit["factor"] == -1.2
    page.get_by_role("button", name="Resume").click()
    written = done(page)
    assert written and written != undisturbed(server, PROMPT, 12)


def test_steering_can_be_taken_back(page: Page, server: str) -> None:
    start(page)
    stopped(page, 2)
    page.get_by_label("Factor", exact=True).fill("-1")
    page.locator("#steer").get_by_role("button", name="Apply").click()
    expect(page.locator("#edits li")).to_have_count(1)
    page.get_by_role("button", name="Remove all edits and rules").click()
    expect(page.locator("#edits li")).to_have_count(0)
    page.get_by_role("button", name="Resume").click()
    assert done(page) == undisturbed(server, PROMPT, 12)


def test_a_kept_vector_and_a_standing_rule(page: Page, server: str) -> None:
    name = start(page)
    stopped(page, 2)
    vector = f"v-{uuid.uuid4().hex[:6]}"
    page.get_by_label("Keep the last token's state as a vector").fill(vector)
    page.get_by_role("button", name="Keep").click()
    expect(page.locator("#steer [name=vector]")).to_contain_text(vector)
    page.get_by_label("Edit").select_option("project")
    page.locator("#steer [name=vector]").select_option(vector)
    page.get_by_label("In all passes to come").check()
    page.get_by_label("After layer").first.fill("3")
    page.locator("#steer").get_by_role("button", name="Apply").click()
    expect(page.locator("#edits li")).to_contain_text("always project")
    (rule,) = ask(server, "GET", f"/v1/sessions/{name}")["steering"]
    assert (rule["kind"], rule["layer"]) == ("project", 3)
    page.get_by_role("button", name="Resume").click()
    assert done(page) != undisturbed(server, PROMPT, 12)
    page.get_by_role("button", name=f"Remove rule {rule['name']}").click()
    expect(page.locator("#edits li")).to_have_count(0)
    ask(server, "DELETE", f"/v1/vectors/{vector}")


def test_layer_by_layer_to_a_layer_and_token_by_token(page: Page, server: str) -> None:
    name = start(page, layers="0")
    stopped(page, 0)
    page.get_by_role("button", name="One layer").click()
    stopped(page, 1)
    cell = page.locator("#strip .cell").nth(3)
    cell.click()
    stopped(page, 3)
    page.get_by_role("button", name="One token").click()
    expect(page.locator("#stop .head span")).to_contain_text("in pass 1")
    stopped(page, 3)
    # By the keyboard: the next layer ahead has the strip's one place in the order of tabs.
    page.locator("#strip .cell[tabindex='0']").focus()
    page.keyboard.press("Enter")
    stopped(page, 4)
    page.get_by_role("button", name="Resume").click()
    assert done(page) == undisturbed(server, PROMPT, 12)
    assert ask(server, "GET", f"/v1/sessions/{name}")["breakpoints"] == []


def test_branches_side_by_side(page: Page, server: str) -> None:
    name = start(page)
    stopped(page, 2)
    page.get_by_role("button", name="Add a variant").click()
    expect(page.locator("#variants .variant")).to_have_count(4)
    page.get_by_role("button", name="Remove variant D").click()
    page.locator("#variants [name=scale]").nth(1).fill("-1")
    page.locator("#variants [name=seed]").nth(2).fill("7")
    page.get_by_role("button", name="Run the branches").click()
    results = page.locator("#results article")
    expect(results).to_have_count(3)
    texts = [text or "" for text in page.locator("#results .written").all_text_contents()]
    assert texts[0] == undisturbed(server, PROMPT, 12)
    assert len(set(texts)) == 3
    expect(page.locator("#results mark").first).to_be_visible()
    stopped(page, 2)  # the parent is where it was
    page.get_by_role("button", name="Open branch B").click()
    expect(page.locator("#origin")).to_have_text(f"branch of {name}")
    expect(page.locator("#text .answer")).to_have_text(texts[1], use_inner_text=False)


@pytest.mark.parametrize(
    "hostile",
    [
        "<img src=x onerror=\"document.title='taken'\">",
        "</textarea><script>document.title='taken'</script>",
        "<b>bold</b> &amp;",
    ],
)
def test_hostile_text_is_shown_as_text(page: Page, server: str, hostile: str) -> None:
    name = start(page, prompt=hostile)
    stopped(page, 2)
    expect(page.locator("#text .prompt")).to_have_text(hostile)
    assert page.locator("main img, main b b, #text b, main script").count() == 0
    # As the model's own words, by way of a stop string's name, an error, and the lens: what the server echoes.
    page.evaluate("(text) => complain(new Problem(text))", hostile)
    expect(page.locator("#problem span")).to_have_text(hostile)
    page.evaluate("([id, text]) => { write(id, text); drawText(); }", [name, hostile])
    expect(page.locator("#text .answer")).to_have_text(hostile)
    assert page.locator("main img, #text *:not(span), #problem b").count() == 0
    assert page.title() != "taken"
    page.get_by_role("button", name="Delete").click()


def test_two_sessions(page: Page, server: str) -> None:
    one = start(page, tokens=10)
    stopped(page, 2)
    other = start(page, prompt="import os", layers="1, 3", once=False, tokens=10)
    stopped(page, 1)
    assert page.url.endswith(f"#{other}")
    for name in (one, other):
        expect(page.locator(f"#list button[data-id='{name}']")).to_have_attribute("data-state", "paused")
    page.locator(f"#list button[data-id='{one}']").click()
    stopped(page, 2)
    page.get_by_role("button", name="Resume").click()
    assert done(page) == undisturbed(server, PROMPT, 10)
    page.locator(f"#list button[data-id='{other}']").click()
    stopped(page, 1)
    page.get_by_role("button", name="Resume").click()
    stopped(page, 3)
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(f"#list button[data-id='{other}']")).to_have_count(0)
    expect(page.locator(f"#list button[data-id='{one}']")).to_have_count(1)
    expect(page.get_by_role("button", name="Start")).to_be_visible()


def test_what_another_client_does_is_seen(page: Page, server: str) -> None:
    name = f"x-{uuid.uuid4().hex[:8]}"
    ask(server, "POST", "/v1/sessions", {"id": name})
    body = {"prompt": PROMPT, "max_tokens": 5, "breakpoints": [{"layer": 3, "once": True}]}
    ask(server, "POST", f"/v1/sessions/{name}/generate", body)
    row = page.locator(f"#list button[data-id='{name}']")
    expect(row).to_contain_text("after layer 3 of 4")
    row.click()
    stopped(page, 3)
    ask(server, "POST", f"/v1/sessions/{name}/resume", {})
    assert done(page) == undisturbed(server, PROMPT, 5)
    ask(server, "DELETE", f"/v1/sessions/{name}")
    expect(row).to_have_count(0)


def test_errors_are_said_in_words(page: Page) -> None:
    page.get_by_label("Prompt").fill("x")
    page.get_by_label("Stop after layers").fill("99")
    page.get_by_role("button", name="Start").click()
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text("There is no layer 99")
    page.get_by_role("button", name="Dismiss").click()
    expect(problem).to_be_hidden()
    expect(page.get_by_label("Prompt")).to_have_value("x")  # nothing typed is lost


@pytest.mark.parametrize("width", [900, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page: Page, width: int, scheme: Any) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    start(page)
    stopped(page, 2)
    expect(page.locator("#lens .token")).to_have_count(10)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The contrast of text to its ground, as WCAG counts it.
    for selector in ("#title h2", "#lens .share", "dt", "#resume", ".hint", "#state"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector


def test_everything_can_be_reached_by_the_keyboard(page: Page) -> None:
    start(page)
    stopped(page, 2)
    expect(page.locator("#lens .token")).to_have_count(10)
    page.locator("#new").focus()
    reached: set[str] = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        here = page.evaluate(
            "document.activeElement.id || document.activeElement.name || document.activeElement.className"
        )
        reached.update(re.split(r"\s+", here))
    wanted = {
        "resume",
        "token",
        "layer",
        "cell",
        "slider",
        "factor",
        "branch",
        "scale",
        "temperature",
        "delete",
        "export",
    }
    assert wanted <= reached


CONTRAST = """(selector) => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number)
      .map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const element = [...document.querySelectorAll(selector)].find((one) => one.offsetParent);
  let ground = element;
  const behind = (one) => getComputedStyle(one).backgroundColor;
  while (ground.parentElement && /rgba\\(.*, 0\\)|transparent/.test(behind(ground))) ground = ground.parentElement;
  const a = light(getComputedStyle(element).color), b = light(behind(ground));
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""


def test_a_narrow_window_shows_all_of_it_without_scrolling_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    start(page)
    stopped(page, 2)
    expect(page.locator("#lens .token")).to_have_count(10)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 400
    # Values stand beside or below their names with room to be read, the strip keeps all its layers.
    for box in page.locator("dd").all():
        if box.is_visible() and (place := box.bounding_box()):
            assert place["width"] > 150
    assert page.evaluate("document.documentElement.scrollHeight") < 4000
    page.get_by_role("button", name="Resume").click()
    done(page)


def test_where_caches_lie_is_shown(page: Page, server: str) -> None:
    name = start(page, layers="")
    done(page)
    memory = page.locator("#memory")
    expect(memory).to_contain_text("Memory for caches")
    expect(memory).to_contain_text("device")
    expect(memory).to_contain_text("host")
    facts = page.locator("#facts")
    expect(facts).to_contain_text("on the device")
    page.get_by_role("button", name="Suspend").click()
    expect(page.locator("#state")).to_have_text("suspended")
    expect(facts).to_contain_text("off the device")
    expect(memory).to_contain_text("moved in and out")
    where = ask(server, "GET", f"/v1/sessions/{name}")["memory"]
    assert where["state"] == "away" and where["bytes"]["device"] == 0
    # However many sessions there are, and in a small window, all of the meter can be seen.
    page.set_viewport_size({"width": 1200, "height": 600})
    for _ in range(40):
        ask(server, "POST", "/v1/sessions", {})
    expect(page.locator("#list li")).to_have_count(len(ask(server, "GET", "/v1/sessions")["sessions"]))
    box = memory.bounding_box()
    assert box is not None and box["y"] + box["height"] <= 600
