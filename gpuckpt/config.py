"""The configuration: what can be set, and what is allowed. Where values come from is ``gpuckpt.config_load``.

Sizes may be written ``8G`` or ``12GiB``, durations ``30s`` or ``5min``; paths are absolute.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from msgspec import Struct

_SIZE = r"(?i)(\d+(?:\.\d+)?)\s*(?:([KMGT])(iB|B)?|B)?"
_DURATION = r"(\d+(?:\.\d+)?)\s*(ms|seconds|second|sec|s|minutes|minute|min|m|hours|hour|h|d)?\s*"
_SECONDS_IN = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_YEAR = 365 * 86400
NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,38}[A-Za-z0-9])?"
"""What can name a golden or a replica: it becomes a file name, a container's name and part of a socket's path."""


def parse_size(value: object) -> object:
    """Turn ``"12GiB"``, ``"8G"`` (both powers of 1024) or ``"8GB"`` (a power of 1000) into bytes.

    What is not text is returned as it is. Raises :class:`ValueError` for text that is no size.
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(_SIZE, value.strip())
    if match is None:
        raise ValueError("must be a number of bytes or a size such as 512M, 8G or 12GiB")
    number, unit, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    factor = base ** ("KMGT".index(unit.upper()) + 1) if unit else 1
    # Not through float where it can be helped: it has no room for every byte count.
    try:
        return int(number) * factor if number.isdigit() else int(float(number) * factor)
    except OverflowError as error:
        raise ValueError("must be a size that a machine can have") from error


def parse_seconds(value: object) -> object:
    """Turn ``"30s"``, ``"5min"``, ``"1h 30min"``, ``"500ms"`` or ``"45"`` into seconds.

    What is not text is returned as it is. Raises :class:`ValueError` for text that is no duration.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    parts = list(re.finditer(_DURATION, text))
    # A number without a unit stands alone: in "5min 30" nobody knows what 30 is.
    if not parts or "".join(p.group() for p in parts) != text or (len(parts) > 1 and not all(p[2] for p in parts)):
        raise ValueError("must be a number of seconds or a duration such as 30s, 5min or 1h 30min")
    units = (part[2] or "s" for part in parts)
    keys = (unit if unit == "ms" else unit[0] for unit in units)
    return sum(float(part[1]) * _SECONDS_IN[key] for part, key in zip(parts, keys, strict=True))


def parse_path(value: object) -> Path:
    """An absolute path; raises :class:`ValueError` for anything else."""
    if not isinstance(value, str | Path):
        raise ValueError("must be a path")
    path = Path(value)
    # The daemon and the hooks run with another current directory than the user who wrote the value.
    if not path.is_absolute():
        raise ValueError("must be an absolute path (~ and variables are not expanded)")
    if "\0" in str(path):
        raise ValueError("must not hold a NUL byte, which ends a path for the kernel")
    return path


def _criu_path(value: object) -> Path:
    path = parse_path(value)
    if re.search(r"[\s#]", str(path)):
        raise ValueError("must not hold blanks or #: CRIU's configuration files name paths below it and know no quotes")
    return path


def _number(value: object, *, least: int) -> int:
    try:
        number = int(value) if isinstance(value, int | float | str) else None
    except (ValueError, OverflowError):
        number = None
    if number is None or (isinstance(value, float) and number != value):
        raise ValueError("must be a whole number")
    if number < least:
        raise ValueError(f"must be greater than {f'or equal to {least}' if least == 0 else least - 1}")
    return number


def parse_count(value: object) -> int:
    """A whole number from 0 on; raises :class:`ValueError` otherwise."""
    return _number(value, least=0)


def parse_bytes(value: object) -> int:
    """A number of bytes from 0 on, also one such as ``"8G"``; raises :class:`ValueError` otherwise."""
    return _number(parse_size(value), least=0)


def _some_bytes(value: object) -> int:
    return _number(parse_size(value), least=1)


def parse_duration(value: object) -> float:
    """Seconds, more than 0 and at most a year, also as ``"5min"``; raises :class:`ValueError` otherwise."""
    number = parse_seconds(value)
    if not isinstance(number, int | float) or number != number:  # NaN
        raise ValueError("must be a number of seconds or a duration such as 30s, 5min or 1h 30min")
    if number <= 0:
        raise ValueError("must be greater than 0")
    # More than a year is a slip, and more than some centuries overflows the system's own time-outs.
    if number > _YEAR:
        raise ValueError(f"must be less than or equal to {_YEAR}")
    return float(number)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    if not value:
        raise ValueError("must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError("must be UTF-8") from error
    return value


def parse_texts(value: object) -> tuple[str, ...]:
    """A list of texts that are not empty; raises :class:`ValueError` otherwise."""
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list")
    return tuple(map(_text, value))


def parse_name(value: object) -> str:
    """``value`` if it can name a golden; raises :class:`ValueError` otherwise."""
    if not isinstance(value, str) or not re.fullmatch(NAME, value):
        raise ValueError("must begin with a letter or digit and hold only those and . _ - (40 at most)")
    return value


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in words:
            raise ValueError(f"must be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}")
        return str(value)

    return parse


def _published(value: object) -> str:
    text = str(value) if isinstance(value, int) else value
    if not isinstance(text, str):
        raise ValueError("must be [HOST_IP:]HOST_PORT[:PORT]")
    match = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[0-9]+(?:\.[0-9]+){3}):)?([0-9]{1,5})(?::([0-9]{1,5}))?", text)
    if match is None:
        raise ValueError("must be [HOST_IP:]HOST_PORT[:PORT], for example 8000 or 127.0.0.1:8080:8000")
    import ipaddress

    try:
        ipaddress.ip_address((match[1] or "::").strip("[]"))
    except ValueError as error:
        raise ValueError(f"must name an address of this host, and {error}") from error
    if not all(1 <= int(port) <= 65535 for port in match.groups()[1:] if port):
        raise ValueError("must have ports from 1 to 65535")
    return text


class Paths(Struct, frozen=True, kw_only=True):
    """Where things are kept on the host."""

    prefix: Annotated[Path, parse_path, "what `make setup` installs: CRIU, environments"] = Path("/opt/gpuckpt")
    state: Annotated[Path, _criu_path, "replicas' writable layers, logs of operations"] = Path("/var/lib/gpuckpt")
    run: Annotated[Path, _criu_path, "locks, sockets; gone after a reboot"] = Path("/run/gpuckpt")
    hooks: Annotated[Path, parse_path, "your executables, run at CRIU's stages"] = Path("/etc/gpuckpt/hooks.d")


class Store(Struct, frozen=True, kw_only=True):
    """Where goldens lie."""

    path: Annotated[Path, parse_path, "a tmpfs, mounted here when it is not one yet"] = Path("/run/gpuckpt/store")
    # Not 0: to tmpfs that means no limit at all.
    size: Annotated[int | None, _some_bytes, "limit of that tmpfs in bytes; default: 80 % of the memory"] = None
    huge: Annotated[
        Literal["never", "always", "within_size", "advise"],
        _one_of("never", "always", "within_size", "advise"),
        "huge pages of that tmpfs (tmpfs(5))",
    ] = "within_size"
    disk: Annotated[Path | None, parse_path, "where goldens survive a reboot; default: `goldens` in paths.state"] = None


class Criu(Struct, frozen=True, kw_only=True):
    """How CRIU is run."""

    path: Annotated[Path | None, parse_path, "the criu program; default: the one `make setup` chose, else PATH"] = None
    hook_timeout: Annotated[float, parse_duration, "longest run of one of your hooks, in seconds"] = 60.0
    ghost_limit: Annotated[int, parse_bytes, "largest deleted file that is carried in the images, in bytes"] = 1 << 30


class Podman(Struct, frozen=True, kw_only=True):
    """How containers are run."""

    runtime: Annotated[
        Literal["auto", "runc", "crun"],
        _one_of("auto", "runc", "crun"),
        "the OCI runtime; auto: one that can checkpoint",
    ] = "auto"
    timeout: Annotated[float, parse_duration, "longest single podman operation, in seconds"] = 600.0


class Create(Struct, frozen=True, kw_only=True):
    """Defaults of `gpuckpt create`."""

    name: Annotated[str | None, parse_name, "the golden's name when none is given (CONT_NAME)"] = None
    model: Annotated[str | None, _text, "the model served: a folder or a hub id (MODEL_ID)"] = None
    image: Annotated[str | None, _text, "container image; default: the host's own root file system"] = None
    publish: Annotated[
        str | None, _published, "[HOST_IP:]HOST_PORT[:PORT] to publish on a bridge network (API_PORT)"
    ] = None
    start_timeout: Annotated[float, parse_duration, "longest wait for the server's health, in seconds"] = 600.0
    warmup: Annotated[int, parse_count, "number of warm-up requests"] = 3
    prompts: Annotated[tuple[str, ...], parse_texts, "prompts of the warm-up"] = (
        "The capital of France is",
        "Once upon a time, in a land far away,",
    )


class Settings(Struct, frozen=True, kw_only=True):
    """Every setting; immutable once loaded."""

    paths: Paths = Paths()
    store: Store = Store()
    criu: Criu = Criu()
    podman: Podman = Podman()
    create: Create = Create()


TABLES: dict[str, Any] = get_type_hints(Settings)
"""The classes of the tables by their names in a file."""


class Setting(NamedTuple):
    """One setting: its type, what turns a raw value into one of it or raises :class:`ValueError`, what it is."""

    type: Any
    parse: Callable[[object], Any]
    description: str

    def checked(self, value: object) -> Any:
        """``value``, as a file, a variable or a flag gives it, in the setting's own type; raises ValueError."""
        if isinstance(value, bool):  # no setting is a switch yet, and to Python True is 1
            raise ValueError("must not be true or false")
        return self.parse(value)


FIELDS: dict[str, Setting] = {
    f"{table}.{key}": Setting(*get_args(hint))
    for table, kind in TABLES.items()
    for key, hint in get_type_hints(kind, include_extras=True).items()
}
"""Every setting by its dotted key, in the order of the documentation."""
