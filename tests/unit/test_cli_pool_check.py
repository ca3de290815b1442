"""``gpuckpt pool check``: what a configuration comes to, without a daemon."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gpuckpt.store.layout import Layout
from tests.command_line import ROOT
from tests.fake_pool import FakePool
from tests.fakes import publish
from tests.pool_commands import do

CONFIG = """
[front]
listen = ["127.0.0.1:9000"]
[budget]
memory = "8G"
[models.gold]
aliases = ["gpt-4o-mini"]
max_replicas = 3
schedule = ["Mon-Fri 08:00-18:00", "22:00-02:00", "Sat,Sun 10:00-12:00"]
[models."org/b:7"]
golden = "b"
pin = "hot"
idle_freeze = "90s"
[models.c]
create = ["--", "serve", "{socket}"]
"""


@pytest.fixture
def config(machine: Layout, tmp_path: Path) -> Path:
    publish(machine)
    file = tmp_path / "pool.toml"
    file.write_text(CONFIG)
    return file


def test_check(config: Path, machine: Layout) -> None:
    done = do("check", str(config))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [re.split("  +", line.strip()) for line in lines]
    assert lines[0] == f"{config}: 3 models, listens on 127.0.0.1:9000"
    assert ["memory", "8.0 GiB", "the file says so"] in rows
    assert ["MODEL", "GOLDEN", "KEPT", "MOST", "EACH", "FREEZE", "RELEASE", "PIN"] in rows
    assert ["gold", "tmpfs", "0", "3", "8", "1 min", "10 min", "no"] in rows and ["gpt-4o-mini"] in rows
    assert ["org/b:7", "b: missing", "0", "1", "8", "1 min 30 s", "10 min", "hot"] in rows
    assert ["c", "to be made", "0", "1", "8", "1 min", "10 min", "no"] in rows
    assert lines[-1] == "gold: kept ready Mon-Fri 08:00-18:00, 22:00-02:00, Sat,Sun 10:00-12:00"
    assert done.stderr == "org/b:7: there is no golden b; gpuckpt create b …, or create = […]\n"


def test_check_as_json(config: Path) -> None:
    done = do("check", str(config), "--format", "json")
    document = json.loads(done.stdout)
    assert document["version"] == 1 and document["file"] == str(config)
    assert document["budget"]["memory"] == 8 << 30 and document["budget"]["store"] > 0
    gold, b, c = (document["models"][name] for name in ("gold", "org/b:7", "c"))
    assert gold["tiers"] == ["tmpfs"] and gold["schedule"][0] == "Mon-Fri 08:00-18:00" and gold["max_replicas"] == 3
    assert b["golden"] == "b" and b["tiers"] == [] and b["pin"] == "hot" and c["create"] == ["--", "serve", "{socket}"]
    assert document["front"]["listen"] == ["127.0.0.1:9000"] and document["health"]["failures"] == 3


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("[modls.x]", 2, "pool.toml:1"),
        ("[models.x]\nidle_frez = 3", 2, "did you mean models.x.idle_freeze?"),
        ("\n[models.x]\npin = 3", 2, "pool.toml:3"),
        ("[models.x\n", 2, "line 1"),
        (None, 6, "example.toml"),
    ],
)
def test_a_wrong_configuration(machine: Layout, tmp_path: Path, text: str | None, code: int, says: str) -> None:
    file = tmp_path / "pool.toml"
    if text is not None:
        file.write_text(text)
    done = do("check", str(file))
    assert done.returncode == code and says in done.stderr and done.stdout == "" and "--config" not in done.stderr


def test_check_needs_no_daemon_and_tells_none(config: Path, pool: FakePool) -> None:
    assert do("check", str(config)).returncode == 0 and pool.asked == []


def test_check_reads_the_example_and_an_empty_file(machine: Layout, tmp_path: Path) -> None:
    example = ROOT / "gpuckpt/pool/example.toml"
    assert do("check", str(example)).returncode == 0
    (tmp_path / "pool.toml").touch()
    assert "0 models" in do("check", str(tmp_path / "pool.toml")).stdout


def test_check_by_who_may_not_look_into_the_store(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Layout, name: str) -> dict[str, Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Layout, "tiers", refuse)
    done = do("check", str(config))
    assert done.returncode == 0 and re.search(r"gold +\? ", done.stdout) and done.stderr == ""


def test_what_would_keep_a_golden_from_being_made(machine: Layout, tmp_path: Path) -> None:
    file = tmp_path / "pool.toml"
    keys = tmp_path / "keys"
    file.write_text(
        f'[front]\nkeys = "{keys}"\n'
        '[models.a]\ncreate = ["--", "serve"]\n'
        '[models.b]\ncreate = ["--publish", "80", "--", "serve"]\n'
        '[models.c]\ncreate = ["--", "--model", "/nowhere"]\n'
        '[models.d]\ncreate = ["--", "serve", "{socket}"]\n'
    )
    done = do("check", str(file))
    assert done.returncode == 0
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == [
        f"the API keys in {keys} cannot be read",
        *"abc",
    ]
    assert "GPUCKPT_SOCKET" in done.stderr and "$PORT" in done.stderr and "no model at /nowhere" in done.stderr


@pytest.mark.parametrize("words", ['["--evn", "A=1", "--", "serve"]', '["--canary", "GET", "--", "serve"]'])
def test_words_that_create_does_not_take(machine: Layout, tmp_path: Path, words: str) -> None:
    file = tmp_path / "pool.toml"
    file.write_text(f"[models.a]\ncreate = {words}\n")
    done = do("check", str(file))
    assert done.returncode == 2 and "models.a.create cannot be used" in done.stderr
