"""The pool's configuration: what is read, what is refused and how, and that the example tells the truth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpuckpt.errors import NotFoundError, UsageError
from gpuckpt.pool import config
from gpuckpt.pool.config import Model, Pool, Window, keys_of, load, parse_window
from gpuckpt.pool.state import Pin, Rules

EXAMPLE = Path(config.__file__).with_name("example.toml")


def read(tmp_path: Path, text: str) -> Pool:
    file = tmp_path / "pool.toml"
    file.write_text(text)
    return load(file)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert read(tmp_path, "") == Pool()


def test_values_are_read(tmp_path: Path) -> None:
    pool = read(
        tmp_path,
        """
        [front]
        listen = ["127.0.0.1:8000", "unix:/run/x.sock"]
        deadline = "90s"
        [budget]
        memory = "8G"
        [models.a]
        aliases = ["gpt-4"]
        max_replicas = 3
        idle_freeze = "5min"
        pin = "standby"
        schedule = ["Mon-Fri 08:00-18:00"]
        prewarm = true
        priority = -1
        [models."org/b:7"]
        golden = "b"
        create = ["--workload", "http", "--", "/srv/b", "{socket}"]
        """,
    )
    assert pool.front.listen == ("127.0.0.1:8000", "unix:/run/x.sock") and pool.front.deadline == 90.0
    assert pool.budget.memory == 8 << 30 and pool.budget.store is None
    a, b = pool.models.values()
    assert a.rules() == Rules(max_replicas=3, idle_freeze=300.0, priority=-1, pin=Pin.STANDBY)
    assert a.schedule == (Window(frozenset(range(5)), 480, 1080),) and a.prewarm is True
    assert b.golden == "b" and b.create[-1] == "{socket}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[frnt]", "did you mean front"),
        ("front = 5", "must be a table"),
        ("[front]\nqueu = 5", "did you mean front.queue"),
        ("[front]\nqueue = -1", "pool.toml:2"),
        ("[front]\nqueue = true", "true or false"),
        ("[front]\nlisten = []", "HOST:PORT"),
        ('[front]\nlisten = ["localhost"]', "HOST:PORT"),
        ('[front]\nlisten = ["localhost:70000"]', "HOST:PORT"),
        ('[front]\nlisten = ["localhost:80", "localhost:80"]', "names localhost:80 twice"),
        ('[front]\nlisten = ["unix:/run/a\\u0000b"]', "without a NUL"),
        (f'[front]\nlisten = ["unix:/{"a" * 107}"]', "at most 107 bytes"),
        ('[front]\nkeys = "keys"', "absolute"),
        ('[models.a]\ncreate = ["\\u0000"]', "must not hold a NUL"),
        ('[models.a]\naliases = ["\\u001b[31m"]', "printable"),
        ('[models."a\\nb"]', "printable"),
        ('[models.""]', "printable"),
        ('[front]\ndeadline = "soon"', "duration"),
        ('[budget]\nmemory = "much"', "size"),
        ("[models]\na = 5", "must be a table"),
        ("[models.a]\nmax_replica = 2", "did you mean models.a.max_replicas"),
        ("[models.a]\nmax_replicas = 0", "greater than 0"),
        ("[models.a]\nconcurrency = 0", "greater than 0"),
        ('[models.a]\npin = "warm"', "'standby'"),
        ("[models.a]\nprewarm = 1", "true or false"),
        ('[models.a]\nschedule = ["always"]', "08:00"),
        ('[models.a]\naliases = ["b"]\n[models.b]', "names two models"),
        ('[models.a]\ngolden = "b"\n[models.b]', "a and b are of the same golden, b"),
        ('[models."org/a"]', "golden = "),
        ("[models.a", "TOML"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    told = " ".join(filter(None, (error.value.message, error.value.cause, error.value.remedy)))
    assert says in told and "pool.toml" in told


@pytest.mark.parametrize("second", ["[models.a]", '[models.c]\ngolden = "a"'])
def test_a_golden_is_one_models_alone(tmp_path: Path, second: str) -> None:
    with pytest.raises(UsageError, match="are of the same golden, a") as caught:
        read(tmp_path, f'[models.b]\ngolden = "a"\n{second}\n')
    assert caught.value.remedy is not None and "alias" in caught.value.remedy


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        load(tmp_path / "none.toml")


# ---------------------------------------------------------------------- the example


def test_the_example_has_every_key_and_is_allowed(tmp_path: Path) -> None:
    assert read(tmp_path, EXAMPLE.read_text()) == Pool(models={"example": Model()})
    uncommented = re.sub(r"(?m)^# (\w+ = )", r"\1", EXAMPLE.read_text())
    pool = read(tmp_path, uncommented)
    shown: dict[str, list[str]] = {}
    table = ""
    for line in uncommented.splitlines():
        if found := re.match(r"\[(\w+)", line):
            table = found[1]
            shown[table] = []
        elif found := re.match(r"(\w+) = .*# \S", line):
            shown[table].append(found[1])
    assert shown == {name: list(keys_of(kind)) for name, kind in (config.TABLES | {"models": Model}).items()}
    # What it gives as a default is one.
    for name, kind in config.TABLES.items():
        for key, about in keys_of(kind).items():
            assert about.default is None or getattr(getattr(pool, name), key) == about.default, f"{name}.{key}"
    for key, about in keys_of(Model).items():
        assert about.default in (None, ()) or getattr(pool.models["example"], key) == about.default, key


# ---------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("text", "holds", "not_now"),
    [
        ("Mon-Fri 08:00-18:00", [(0, 480), (4, 1079)], [(0, 479), (4, 1080), (5, 600)]),
        ("Sat,Sun 10:00-24:00", [(5, 1439), (6, 600)], [(0, 0), (4, 700)]),
        ("22:00-02:00", [(0, 1320), (0, 60), (6, 1439)], [(0, 120), (3, 800)]),
        ("Fri 22:00-02:00", [(4, 1400), (5, 60)], [(4, 60), (5, 1400), (6, 60)]),
        ("Sat-Mon 09:00-10:00", [(5, 540), (6, 540), (0, 540)], [(1, 540), (4, 540)]),
    ],
)
def test_windows(text: str, holds: list[tuple[int, int]], not_now: list[tuple[int, int]]) -> None:
    window = parse_window(text)
    assert all(window.holds(*at) for at in holds) and not any(window.holds(*at) for at in not_now)


@pytest.mark.parametrize(
    "text", ["", "Mon", "8-18", "Mon 08:00-08:00", "Mon 08:61-09:00", "Foo 08:00-09:00", "24:30-25:00"]
)
def test_what_is_no_window(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_window(text)
