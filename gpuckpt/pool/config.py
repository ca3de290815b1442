"""The pool's configuration: one TOML file; what can be set, and what is allowed.

``[front]``, ``[budget]``, ``[health]``, and a table ``[models.NAME]`` for each model. Sizes may be written ``8G``,
durations ``30s`` or ``5min``. ``example.toml``, beside this module, has every key with its default.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from msgspec import Struct

from gpuckpt import config, config_load
from gpuckpt.errors import UsageError
from gpuckpt.paths import LONGEST_SOCKET
from gpuckpt.pool.state import Pin, Rules

MEMORY_SHARE = 0.6  # of the machine's memory: what replicas may hold where nothing else is said
DEFAULT_FILE = Path("/etc/gpuckpt/pool.toml")
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _address(value: object) -> str:
    if isinstance(value, str):
        if value.startswith("unix:/"):
            path = value.removeprefix("unix:")
            if "\0" in path or len(path.encode(errors="surrogateescape")) > LONGEST_SOCKET:
                raise ValueError(f"must be a path of at most {LONGEST_SOCKET} bytes, without a NUL")
            return value
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+):(\d{1,5})", value)
        if match and 1 <= int(match[2]) <= 65535:
            return value
    raise ValueError("must be HOST:PORT or unix:/PATH")


def _addresses(value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
        raise ValueError("must be a list of HOST:PORT or unix:/PATH")
    found = tuple(map(_address, value))
    if twice := next((one for one in found if found.count(one) > 1), None):
        raise ValueError(f"names {twice} twice")
    return found


def _words(value: object) -> tuple[str, ...]:
    words = config.parse_texts(value)
    if any("\0" in word for word in words):
        raise ValueError("must not hold a NUL byte, which ends a word for the kernel")
    return words


def _names(value: object) -> tuple[str, ...]:
    return tuple(map(_name, config.parse_texts(value)))


def _name(text: str) -> str:
    # It goes to terminals and logs.
    if not text or not text.isprintable():
        raise ValueError("must have names of printable characters")
    return text


def _one_or_more(value: object) -> int:
    number = config.parse_count(value)
    if number < 1:
        raise ValueError("must be greater than 0")
    return number


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("must be a whole number")
    return value


def _pin(value: object) -> Pin:
    try:
        return Pin(str(value))
    except ValueError:
        raise ValueError(f"must be one of {', '.join(map(repr, map(str, Pin)))}") from None


class Window(Struct, frozen=True):
    """A part of the week, in local time: ``days`` (0 is Monday) from minute ``first`` to minute ``last`` of the day."""

    days: frozenset[int]
    first: int
    last: int

    def holds(self, day: int, minute: int) -> bool:
        """Whether it is now; a window that ends before it begins goes on after midnight."""
        if self.first <= self.last:
            return day in self.days and self.first <= minute < self.last
        return (day in self.days and minute >= self.first) or ((day - 1) % 7 in self.days and minute < self.last)


def parse_window(text: str) -> Window:
    """``"Mon-Fri 08:00-18:00"``, ``"Sat,Sun 10:00-12:00"``, ``"22:00-02:00"`` (every day); raises ValueError."""
    match = re.fullmatch(r"(?:([A-Za-z,-]+) +)?(\d\d?):(\d\d)-(\d\d?):(\d\d)", text.strip())
    if match is None or int(match[2]) > 24 or int(match[4]) > 24 or int(match[3]) > 59 or int(match[5]) > 59:
        raise ValueError("must be times such as “Mon-Fri 08:00-18:00”")
    first, last = (int(match[at]) * 60 + int(match[at + 1]) for at in (2, 4))
    if first > 1440 or last > 1440 or first == last:
        raise ValueError("must begin and end within a day, at different times")
    days: set[int] = set()
    for part in (match[1] or "Mon-Sun").split(","):
        names = [name.capitalize()[:3] for name in part.split("-")]
        if not 1 <= len(names) <= 2 or any(name not in DAYS for name in names):
            raise ValueError(f"must name days by {', '.join(DAYS)}")
        low, high = DAYS.index(names[0]), DAYS.index(names[-1])
        days.update(day % 7 for day in range(low, high + 1 if high >= low else high + 8))
    return Window(frozenset(days), first, last)


def _windows(value: object) -> tuple[Window, ...]:
    return tuple(map(parse_window, config.parse_texts(value)))


class Front(Struct, frozen=True, kw_only=True):
    """The address that clients use."""

    listen: Annotated[tuple[str, ...], _addresses, "HOST:PORT or unix:/PATH; not used under socket activation"] = (
        "127.0.0.1:8400",
    )
    keys: Annotated[
        Path | None,
        config.parse_path,
        "file of API keys, one a line; default: systemd's credential api-keys, else none",
    ] = None
    body_limit: Annotated[int, config.parse_bytes, "largest request body, in bytes"] = 64 << 20
    bodies: Annotated[int, config.parse_bytes, "all request bodies that are held at once, in bytes"] = 1 << 30
    queue: Annotated[int, config.parse_count, "requests that may wait for one model"] = 256
    deadline: Annotated[float, config.parse_duration, "longest wait for a replica, in seconds"] = 600.0
    keep_alive: Annotated[float, config.parse_duration, "between comments to a stream that waits, in seconds"] = 5.0
    header_timeout: Annotated[float, config.parse_duration, "longest wait for a request to be sent, in seconds"] = 20.0
    drain: Annotated[float, config.parse_duration, "longest wait for requests at work when it stops, in seconds"] = 30.0
    connections: Annotated[int, _one_or_more, "connections at once"] = 20000


class Limits(Struct, frozen=True, kw_only=True):
    """What everything may hold together."""

    memory: Annotated[int | None, config.parse_bytes, "host memory of all replicas; default: 60 % of the memory"] = None
    gpu: Annotated[int | None, config.parse_bytes, "memory of each GPU that replicas may hold; default: all"] = None
    store: Annotated[int | None, config.parse_bytes, "goldens in the tmpfs; default: what it has room for"] = None


class Health(Struct, frozen=True, kw_only=True):
    """How a replica that is dead or hangs is found."""

    interval: Annotated[float, config.parse_duration, "between health checks of a hot replica, in seconds"] = 5.0
    timeout: Annotated[float, config.parse_duration, "longest wait for a health check's answer, in seconds"] = 5.0
    failures: Annotated[int, _one_or_more, "failed checks in a row after which a replica is replaced"] = 3
    stalled: Annotated[
        float,
        config.parse_duration,
        "a replica is replaced that has requests and sends nothing for so long, in seconds",
    ] = 120.0
    canary: Annotated[float, config.parse_duration, "between canaries of an idle hot replica, in seconds"] = 300.0
    retry: Annotated[
        float,
        config.parse_duration,
        "pause after a failed start; doubles up to 32 times that, and further while nobody asks",
    ] = 2.0


class Model(Struct, frozen=True, kw_only=True):
    """One model: where it comes from, and how many replicas of it there are."""

    golden: Annotated[str | None, config.parse_name, "name of its golden; default: the model's"] = None
    create: Annotated[
        tuple[str, ...], _words, "makes the golden where there is none: what follows `gpuckpt create NAME`"
    ] = ()
    aliases: Annotated[tuple[str, ...], _names, "other names that requests may use"] = ()
    min_standby: Annotated[int, config.parse_count, "replicas that are always ready, hot or standby"] = 0
    max_replicas: Annotated[int, _one_or_more, "most hot replicas at once"] = 1
    concurrency: Annotated[int, _one_or_more, "requests that one replica answers at once"] = 8
    idle_freeze: Annotated[float, config.parse_duration, "idle for so long, a hot replica becomes a standby"] = 60.0
    idle_release: Annotated[float, config.parse_duration, "and a standby, after so long again, is removed"] = 600.0
    idle_disk: Annotated[
        float | None,
        config.parse_duration,
        "not asked for in so long, its golden goes to disk; default: when room is short",
    ] = None
    priority: Annotated[int, _integer, "who is served first, and gives way last"] = 0
    pin: Annotated[Pin, _pin, "no; standby or hot: it is never taken below that"] = Pin.NO
    prewarm: Annotated[bool, _switch, "restore a standby when the service starts"] = False
    schedule: Annotated[tuple[Window, ...], _windows, "when a standby is kept ready: “Mon-Fri 08:00-18:00”"] = ()
    prepare: Annotated[
        int | None, config.parse_count, "containers that are made ahead of their restores; default: max_replicas"
    ] = None
    memory: Annotated[
        int | None, config.parse_bytes, "host memory that a replica will hold; default: what the last one held"
    ] = None

    def rules(self) -> Rules:
        """What the policy goes by."""
        return Rules(**{field.name: getattr(self, field.name) for field in fields(Rules)})


class Pool(Struct, frozen=True, kw_only=True):
    """The whole file."""

    front: Front = Front()
    budget: Limits = Limits()
    health: Health = Health()
    models: dict[str, Model] = {}


class Key(NamedTuple):
    """One key of a table."""

    type: Any
    parse: Any
    description: str
    default: Any


def keys_of(kind: type[Struct]) -> dict[str, Key]:
    """The keys of a table, in the order of the documentation."""
    made = {}
    for (name, hint), default in zip(
        get_type_hints(kind, include_extras=True).items(), kind.__struct_defaults__, strict=True
    ):
        type_, parse, description = get_args(hint)
        made[name] = Key(type_, parse, description, default)
    return made


TABLES: dict[str, type[Struct]] = {"front": Front, "budget": Limits, "health": Health}


def load(file: Path) -> Pool:
    """Read and check the file.

    Raises NotFoundError if it is missing, UsageError for what is not allowed: the key, its line, the reason.
    """
    text = config_load.read_toml(file, must_exist=True)
    data = config_load.parse_toml(file, text)
    known = [*TABLES, "models"]
    tables: dict[str, Any] = {}
    for name, content in data.items():
        if name not in known:
            raise config_load.unknown(file, text, name, known, f"the tables are {', '.join(known)}")
        if not isinstance(content, dict):
            raise UsageError(f"{name} must be a table ({config_load.at(file, text, name)})")
        if name == "models":
            tables[name] = {one: _model(file, text, one, held) for one, held in content.items()}
        else:
            tables[name] = _table(file, text, name, TABLES[name], content)
    made = Pool(**tables)
    _check_names(file, text, made)
    return made


def _model(file: Path, text: str, name: str, content: object) -> Model:
    if not isinstance(content, dict):
        raise UsageError(f"models.{name} must be a table ({config_load.at(file, text, f'models.{name}')})")
    try:
        _name(name)
    except ValueError as error:
        raise UsageError(f"{config_load.shown(name)} cannot name a model ({file})", cause=f"it {error}") from error
    found: Model = _table(file, text, f"models.{name}", Model, content)
    return found


def _table(file: Path, text: str, name: str, kind: type[Struct], content: dict[str, Any]) -> Any:
    keys = keys_of(kind)
    values = {}
    for key, value in content.items():
        where = f"{name}.{key}"
        if key not in keys:
            raise config_load.unknown(file, text, where, [f"{name}.{one}" for one in keys], f"see {DEFAULT_FILE.name}")
        try:
            # To Python true is 1: only a switch takes it.
            if isinstance(value, bool) and keys[key].parse is not _switch:
                raise ValueError("must not be true or false")
            values[key] = keys[key].parse(value)
        except ValueError as error:
            shown = config_load.shown(value)
            raise UsageError(
                f"{where} cannot be {shown} ({config_load.at(file, text, where)})",
                cause=f"it {error}",
                remedy=f"correct it there; {where} is: {keys[key].description}",
            ) from error
    return kind(**values)


def _check_names(file: Path, text: str, pool: Pool) -> None:
    """Each name that a request can use is one model's, and so is each golden: replicas are called after it."""
    seen: dict[str, str] = {}
    goldens: dict[str, str] = {}
    for name, model in pool.models.items():
        where = config_load.at(file, text, f"models.{name}")
        for alias in (name, *model.aliases):
            if (other := seen.setdefault(alias, name)) != name:
                raise UsageError(f"“{alias}” names two models, {other} and {name} ({where})")
        golden = model.golden or name
        if (other := goldens.setdefault(golden, name)) != name:
            raise UsageError(
                f"{other} and {name} are of the same golden, {golden} ({where})",
                remedy=f"make {name} an alias of {other}, or give it a golden of its own",
            )
        if model.golden is None:
            try:
                config.parse_name(name)
            except ValueError as error:
                raise UsageError(
                    f"models.{name} needs a golden ({where})",
                    cause=f"its own name cannot name one: it {error}",
                    remedy=f'add golden = "NAME" to [models."{name}"]',
                ) from error
