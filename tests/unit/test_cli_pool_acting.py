"""``gpuckpt pool wake``, ``sleep``, ``scale``, ``drain`` and ``reload``: what is asked of the daemon."""

from __future__ import annotations

import io
import sys

import pytest

from tests.fake_guest import answer
from tests.fake_pool import FakePool, model, refusal, replica, view
from tests.pool_commands import as_json, do


def test_wake(pool: FakePool) -> None:
    done = do("wake", "phi", "qwen", "phi")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "phi: gold.1 is hot, from its golden in the tmpfs in 21.3 ms\nqwen: qwen.1 was hot already\n"
    assert as_json("wake", "broken", "--deadline", "9") == {
        "woken": [{"replica": "x.1", "tier": "cold", "seconds": 0.0213, "model": "broken"}]
    }
    assert pool.bodies("POST /v1/models/broken/wake") == [{"deadline": 9.0}]


def test_an_alias_is_known(pool: FakePool) -> None:
    assert do("wake", "gpt-4o-mini", "phi").returncode == 0


def test_sleep(pool: FakePool) -> None:
    pool.view = view(
        model("a", replicas=[replica("a.1"), replica("a.2")]), model("b", replicas=[replica("b.1", "standby")])
    )
    assert do("sleep", "a", "b").stdout == "a: freezing a.1, a.2\nb: nothing to do\n"
    assert as_json("sleep", "a") == {"slept": [{"model": "a", "frozen": ["a.1", "a.2"]}]}
    nothing = do("sleep", "b")
    assert nothing.returncode == 3 and nothing.stdout == "" and "no replica of b is hot and without" in nothing.stderr
    assert as_json("sleep", "b", "--release") == {"slept": [{"model": "b", "stopped": ["b.1"]}]}
    assert do("sleep", "a", "--release").stdout == "a: removing a.1, a.2\n"
    assert do("sleep", "a", "--release").returncode == 3


def test_scale(pool: FakePool) -> None:
    assert do("scale", "qwen", "2").stdout == "qwen: keeps 2 hot replicas\n"
    assert do("scale", "qwen", "auto").stdout == "qwen: keeps as many hot replicas as its rules say\n"
    assert as_json("scale", "qwen", "0") == {"model": "qwen", "replicas": 0}
    assert pool.bodies("POST /v1/models/qwen/scale") == [{"replicas": 2}, {"replicas": None}, {"replicas": 0}]


def test_drain_of_models(pool: FakePool) -> None:
    assert as_json("drain", "qwen") == {"drained": [{"model": "qwen", "stopped": ["qwen.1"]}]}
    llama = "Llama/Llama-3.2-1B-Instruct"
    assert do("drain", "phi", llama).stdout == (
        f"phi: takes no more requests\n{llama}: takes no more requests; removing llama.1 behind the requests at work\n"
    )
    assert pool.view.state == "ready" and do("status").stdout.count(" drained ") == 3


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "typed", "code"), [([], "y\n", 0), ([], "n\n", 3), ([], "\n", 3), ([], "", 130), (["--yes"], "", 0)]
)
def test_drain_of_everything_asks_on_a_terminal(
    pool: FakePool, monkeypatch: pytest.MonkeyPatch, words: list[str], typed: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal(typed))
    done = do("drain", *words)
    assert done.returncode == code
    assert ("with 5 models and 12 requests?" in done.stderr) == (not words)
    assert (pool.view.state == "draining") == (code == 0)


def test_drain_of_everything_asks_no_script(pool: FakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert as_json("drain") == {} and pool.view.state == "draining"


def test_reload(pool: FakePool) -> None:
    done = do("reload")
    assert (done.stdout, done.stderr) == ("added: new\nchanged: qwen, phi\n", "note: listen: restart\n")
    assert as_json("reload") == {
        "added": ["new"],
        "removed": [],
        "changed": ["qwen", "phi"],
        "notes": ["listen: restart"],
    }
    pool.on("POST /v1/reload", answer({"added": [], "removed": [], "changed": [], "notes": []}))
    assert "no model has changed" in do("reload").stderr
    pool.on("POST /v1/reload", refusal(400, "models.x.pin cannot be 3 (/etc/gpuckpt/pool.toml:7)"))
    assert do("reload").returncode == 2
