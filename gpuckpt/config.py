"""The configuration: what can be set, and what is allowed. Where values come from is ``gpuckpt.config_load``.

Sizes may be written ``8G`` or ``12GiB``, durations ``30s`` or ``5min``; paths are absolute.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic.fields import FieldInfo

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(iB|B)?|B)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|seconds|second|sec|s|minutes|minute|min|m|hours|hour|h|d)?\s*")
_SECONDS_IN = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: object) -> object:
    """Turn ``"12GiB"``, ``"8G"`` (both powers of 1024) or ``"8GB"`` (a power of 1000) into bytes.

    What is not text is returned as it is. Raises :class:`ValueError` for text that is no size.
    """
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
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
    parts = list(_DURATION.finditer(text))
    # A number without a unit stands alone: in "5min 30" nobody knows what 30 is.
    if not parts or "".join(p.group() for p in parts) != text or (len(parts) > 1 and not all(p[2] for p in parts)):
        raise ValueError("must be a number of seconds or a duration such as 30s, 5min or 1h 30min")
    units = (part[2] or "s" for part in parts)
    keys = (unit if unit == "ms" else unit[0] for unit in units)
    return sum(float(part[1]) * _SECONDS_IN[key] for part, key in zip(parts, keys, strict=True))


def _absolute(path: Path | None) -> Path | None:
    # The daemon and the hooks run with another current directory than the user who wrote the value.
    if path is not None and not path.is_absolute():
        raise ValueError("must be an absolute path (~ and variables are not expanded)")
    if path is not None and "\0" in str(path):
        raise ValueError("must not hold a NUL byte, which ends a path for the kernel")
    return path


def _quotable(path: Path) -> Path:
    if re.search(r"[\s#]", str(path)):
        raise ValueError("must not hold blanks or #: CRIU's configuration files name paths below it and know no quotes")
    return path


def _published(value: object) -> object:
    if value is None:
        return None
    text = str(value) if isinstance(value, int) else value
    if not isinstance(text, str):
        raise ValueError("must be [HOST_IP:]HOST_PORT[:PORT]")
    match = re.fullmatch(r"(?:(\[[0-9a-fA-F:.]+\]|[0-9]+(?:\.[0-9]+){3}):)?([0-9]{1,5})(?::([0-9]{1,5}))?", text)
    if match is None:
        raise ValueError("must be [HOST_IP:]HOST_PORT[:PORT], for example 8000 or 127.0.0.1:8080:8000")
    try:
        ipaddress.ip_address((match[1] or "::").strip("[]"))
    except ValueError as error:
        raise ValueError(f"must name an address of this host, and {error}") from error
    if not all(1 <= int(port) <= 65535 for port in match.groups()[1:] if port):
        raise ValueError("must have ports from 1 to 65535")
    return text


_YEAR = 365 * 86400.0
AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
CriuPath = Annotated[Path, AfterValidator(_absolute), AfterValidator(_quotable)]
Bytes = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]
# More than a year is a slip, and more than some centuries overflows the system's own time-outs.
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0, le=_YEAR, allow_inf_nan=False)]
NAME = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,38}[A-Za-z0-9])?"
"""What can name a golden or a replica: it becomes a file name, a container's name and part of a socket's path."""
Name = Annotated[str, Field(pattern=rf"^(?:{NAME})\z")]
Text = Annotated[str, Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean(cls, value: object) -> object:
        # No setting is a switch yet, and pydantic would read `warmup = true` as 1.
        if isinstance(value, bool):
            raise ValueError("must not be true or false")
        return value


class Paths(_Table):
    """Where things are kept on the host."""

    prefix: AbsolutePath = Field(
        default=Path("/opt/gpuckpt"), description="what `make setup` installs: CRIU, environments"
    )
    state: CriuPath = Field(
        default=Path("/var/lib/gpuckpt"), description="replicas' writable layers, logs of operations"
    )
    run: CriuPath = Field(default=Path("/run/gpuckpt"), description="locks, sockets; gone after a reboot")
    hooks: AbsolutePath = Field(
        default=Path("/etc/gpuckpt/hooks.d"), description="your executables, run at CRIU's stages"
    )


class Store(_Table):
    """Where goldens lie."""

    path: AbsolutePath = Field(
        default=Path("/run/gpuckpt/store"), description="a tmpfs, mounted here when it is not one yet"
    )
    # Not 0: to tmpfs that means no limit at all.
    size: Bytes | None = Field(
        default=None, gt=0, description="limit of that tmpfs in bytes; default: 80 % of the memory"
    )
    huge: Literal["never", "always", "within_size", "advise"] = Field(
        default="within_size", description="huge pages of that tmpfs (tmpfs(5))"
    )
    disk: Annotated[Path | None, AfterValidator(_absolute)] = Field(
        default=None, description="where goldens survive a reboot; default: `goldens` in paths.state"
    )


class Criu(_Table):
    """How CRIU is run."""

    path: Annotated[Path | None, AfterValidator(_absolute)] = Field(
        default=None, description="the criu program; default: the one `make setup` chose, else PATH"
    )
    hook_timeout: Seconds = Field(default=60.0, description="longest run of one of your hooks, in seconds")
    ghost_limit: Bytes = Field(
        default=1 << 30, description="largest deleted file that is carried in the images, in bytes"
    )


class Podman(_Table):
    """How containers are run."""

    runtime: Literal["auto", "runc", "crun"] = Field(
        default="auto", description="the OCI runtime; auto: one that can checkpoint"
    )
    timeout: Seconds = Field(default=600.0, description="longest single podman operation, in seconds")


class Create(_Table):
    """Defaults of `gpuckpt create`."""

    name: Name | None = Field(default=None, description="the golden's name when none is given (CONT_NAME)")
    model: Text | None = Field(default=None, description="the model served: a folder or a hub id (MODEL_ID)")
    image: Text | None = Field(default=None, description="container image; default: the host's own root file system")
    publish: Annotated[str | None, BeforeValidator(_published)] = Field(
        default=None, description="[HOST_IP:]HOST_PORT[:PORT] to publish on a bridge network (API_PORT)"
    )
    start_timeout: Seconds = Field(default=600.0, description="longest wait for the server's health, in seconds")
    warmup: int = Field(default=3, ge=0, description="number of warm-up requests")
    prompts: tuple[Text, ...] = Field(
        default=("The capital of France is", "Once upon a time, in a land far away,"),
        description="prompts of the warm-up",
    )


class Settings(_Table):
    """Every setting; immutable once loaded."""

    paths: Paths = Paths()
    store: Store = Store()
    criu: Criu = Criu()
    podman: Podman = Podman()
    create: Create = Create()


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for table, holder in Settings.model_fields.items():
        assert isinstance(holder.annotation, type) and issubclass(holder.annotation, _Table)
        for key, info in holder.annotation.model_fields.items():
            yield f"{table}.{key}", info


FIELDS: dict[str, FieldInfo] = dict(_fields())
"""Every setting by its dotted key, in the order of the documentation."""
