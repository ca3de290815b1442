"""Where settings come from: files, environment, flags; and which of them won.

Weakest first: the defaults; ``/etc/gpuckpt/gpuckpt.toml`` or the file given; four keys of a project's ``.env``;
environment variables ``GPUCKPT_<TABLE>__<KEY>`` (and ``GPUCKPT_PREFIX``); the flags of the command. An empty variable
counts as not set.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from msgspec import Struct

from gpuckpt.config import FIELDS, TABLES, Settings
from gpuckpt.errors import NotFoundError, UsageError
from gpuckpt.paths import read_regular

DEFAULT_FILE = Path("/etc/gpuckpt/gpuckpt.toml")
# Keys of a project's .env and what they mean here; every other key of that file belongs to other tools.
DOTENV_KEYS = {
    "MODEL_ID": "create.model",
    "CONT_NAME": "create.name",
    "API_PORT": "create.publish",
    "CHECKPOINT_DIR": "store.path",
}
_LARGEST = 1 << 20  # bytes of a configuration file
_ASSIGNMENT = r"""(?mx)^[ \t]*(?:export[ \t]+)?([A-Za-z_]\w*)[ \t]*=
    (?:[ \t]*(?:'([^']*)'|"((?:\\.|[^"\\])*)")[ \t]*(?:\#.*)?|(.*))$"""
# The short form first, so that GPUCKPT_PATHS__PREFIX wins over it where both are set.
_VARIABLES = {"GPUCKPT_PREFIX": "paths.prefix"} | {f"GPUCKPT_{k.upper().replace('.', '__')}": k for k in FIELDS}


class Loaded(Struct, frozen=True):
    """The settings, and for each dotted key a short text that says where its value came from."""

    settings: Settings
    origins: dict[str, str]


def load(
    config_file: Path | None,
    *,
    environ: Mapping[str, str],
    env_file: Path | None,
    flags: Mapping[str, Any],
    flag_names: Mapping[str, str] | None = None,
) -> Loaded:
    """Read every source, let the stronger win, and check the result.

    ``config_file`` and ``env_file`` replace the default files and must exist when given (:class:`NotFoundError`).
    ``flags`` maps dotted keys to values, None for a flag that was not given; ``flag_names`` says what a flag is called
    where that is not ``--table-key``. Raises :class:`UsageError` for a file that cannot be read or parsed, for unknown
    keys and variables, and for bad values; it names the key, the value, where it stands, and what is allowed.
    """
    names = flag_names or {}
    values: dict[str, Any] = {}
    origins = dict.fromkeys(FIELDS, "default")
    file = (config_file or DEFAULT_FILE).absolute()
    toml = read_toml(file, must_exist=config_file is not None)
    for key, value in _toml_values(file, toml):
        values[key], origins[key] = value, str(file)
    for key, value, origin in _dotenv_values(env_file, environ):
        values[key], origins[key] = value, origin
    for variable, key in _check_variables(environ):
        values[key], origins[key] = _decoded(key, variable, environ[variable]), f"environment {variable}"
    for key, value in flags.items():
        kind = FIELDS[key].type
        if value is None or value == ():  # click's () is a repeatable option that was not given
            continue
        # Only a flag may be relative: here the current directory is the one the user has in mind.
        values[key] = Path(value).absolute() if Path in (kind, *get_args(kind)) else value
        origins[key] = f"flag {names.get(key) or '--' + re.sub(r'[._]', '-', key)}"
    tables: dict[str, dict[str, Any]] = {table: {} for table in TABLES}
    wrong: list[tuple[str, str]] = []
    for key in filter(values.__contains__, FIELDS):
        table, _, name = key.partition(".")
        try:
            tables[table][name] = FIELDS[key].checked(values[key])
        except ValueError as error:
            wrong.append((key, str(error)))
    if wrong:
        origins |= {key: at(file, toml, key) for key, _ in wrong if origins[key] == str(file)}
        raise _refusal(wrong, values, origins)
    return Loaded(Settings(**{table: TABLES[table](**given) for table, given in tables.items()}), origins)


def _refusal(wrong: list[tuple[str, str]], values: Mapping[str, Any], origins: Mapping[str, str]) -> UsageError:
    told = [(f"{key} cannot be {shown(values[key])} ({origins[key]})", f"it {why}") for key, why in wrong]
    (message, cause), *others = told
    key = wrong[0][0]
    return UsageError(
        message,
        cause=cause,
        remedy=f"correct it there; {key} is: {FIELDS[key].description}",
        log=tuple(f"also: {what}: {why}" for what, why in others),
    )


def shown(value: object) -> str:
    """A value as a file would say it."""
    # Quoted, with control characters escaped; bytes that are no UTF-8 arrive as surrogates, which cannot be printed.
    return json.dumps(value, default=str, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def _did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    import difflib

    # By the last word too: a key that is right but stands in the wrong table is the commonest slip.
    candidates = list(known)
    tail = re.split(r"\.|__", word)[-1]
    close = difflib.get_close_matches(word, candidates, n=1, cutoff=0.75)
    close = close or [name for name in candidates if re.split(r"\.|__", name)[-1] == tail]
    close = close or difflib.get_close_matches(word, candidates, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def read_toml(file: Path, *, must_exist: bool) -> str:
    """The text of a configuration file; "" if it need not exist and does not.

    Raises NotFoundError, or UsageError if it is no file of text of a sensible size.
    """
    try:
        data = read_regular(file, _LARGEST, remedy="give --config a TOML file of settings")
        return data.decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError as error:
        if must_exist:
            raise NotFoundError(f"no configuration file {file}", remedy="give --config a file that exists") from error
        return ""
    except (OSError, ValueError) as error:  # no UTF-8, a NUL in the name
        raise UsageError(f"cannot read {shown(str(file))}", cause=str(error)) from error


def _toml_values(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    if not text:
        return  # most often there is no such file, and the parser's import takes a few milliseconds
    tables = list(TABLES)
    for table, content in parse_toml(file, text).items():
        if table not in tables:
            raise unknown(file, text, table, [*tables, *FIELDS], f"the tables are {', '.join(tables)}")
        if not isinstance(content, dict):
            raise UsageError(f"{table} must be a table ({at(file, text, table)})", remedy=f"begin it with [{table}]")
        for name, value in content.items():
            if (key := f"{table}.{name}") not in FIELDS:
                raise unknown(file, text, key, FIELDS, "`gpuckpt config show` lists every key")
            yield key, value


def parse_toml(file: Path, text: str) -> dict[str, Any]:
    """What the text of ``file`` says. Raises UsageError if it is no TOML."""
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} is not valid TOML", cause=str(error)) from error
    except RecursionError as error:
        raise UsageError(f"{file} is no configuration", cause="its brackets are nested too deeply") from error


def unknown(file: Path, text: str, key: str, known: Iterable[str], otherwise: str) -> UsageError:
    """The error that there is no such key, with the one that was meant; ``otherwise`` if none is near."""
    hint = _did_you_mean(key, known, otherwise)
    return UsageError(f"unknown setting {key} ({at(file, text, key)})", remedy=hint)


def at(file: Path, text: str, key: str) -> str:
    """``file:line`` of ``key``: the line that completes the first beginning of the file which parses and has it.

    tomllib tells no positions, and a search for the key's name would be fooled by strings and inline tables.
    """
    import tomllib

    lines = text.splitlines()
    for count in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:count]))
        except (tomllib.TOMLDecodeError, RecursionError):
            continue
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return f"{file}:{count}"
    return str(file)


def as_environment(settings: Settings) -> dict[str, str]:
    """The variables that give a child process these settings, wherever ours came from."""
    made = {}
    for key in FIELDS:
        table, _, name = key.partition(".")
        value = getattr(getattr(settings, table), name)
        if value is not None:
            made[f"GPUCKPT_{key.upper().replace('.', '__')}"] = _encoded(value)
    return made


def _encoded(value: object) -> str:
    """What :func:`_decoded` and the setting's own parser make this value of again."""
    if isinstance(value, tuple):
        return json.dumps(value)
    if isinstance(value, float) and "e" in repr(value):
        from decimal import Decimal

        return f"{Decimal(repr(value)):f}"  # durations are written without an exponent
    return str(value)


def _check_variables(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    for variable in environ:
        if variable.startswith("GPUCKPT_") and "__" in variable and variable not in _VARIABLES:
            hint = _did_you_mean(variable.upper(), _VARIABLES, "`gpuckpt config show` lists every key")
            raise UsageError(f"unknown setting {variable} in the environment", remedy=hint)
    return [(variable, key) for variable, key in _VARIABLES.items() if environ.get(variable)]


def _decoded(key: str, variable: str, text: str) -> Any:
    if get_origin(FIELDS[key].type) is not tuple:
        return text
    if not text.lstrip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        remedy = f'write {variable}=\'["one", "two"]\' or {variable}=one,two'
        raise UsageError(
            f"{key} cannot be {shown(text)} (environment {variable})", cause=str(error), remedy=remedy
        ) from error


def _dotenv_values(env_file: Path | None, environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    file = env_file or Path(".env")
    try:
        # O_NONBLOCK: a FIFO called .env must not hang us. Whether to trust it is asked of the file that was opened.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | (0 if env_file else os.O_NONBLOCK))
        with open(descriptor, "rb") as stream:
            status = os.fstat(descriptor)
            if env_file is None and not stat.S_ISREG(status.st_mode):
                return  # often a folder: a virtual environment
            text = stream.read().decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n")
    except FileNotFoundError as error:
        if env_file is None:
            return
        raise NotFoundError(f"no file {file}", remedy="give --env-file a file that exists") from error
    except IsADirectoryError as error:
        if env_file is None:
            return
        raise UsageError(f"{file} is a folder", remedy="give --env-file a file") from error
    except OSError as error:
        remedy = "run gpuckpt in another folder, or give --env-file another file"
        raise UsageError(f"cannot read {file.absolute()}", cause=str(error), remedy=remedy) from error
    file = file.absolute()
    entries = [match for match in re.finditer(_ASSIGNMENT, text) if match[1] in DOTENV_KEYS]
    if entries and env_file is None:
        _check_trust(file, status, environ, sorted({match[1] for match in entries}))
    for match in entries:
        origin = f"{file}:{text.count(chr(10), 0, match.start(1)) + 1} ({match[1]})"
        if value := _unquoted(match, origin):
            yield DOTENV_KEYS[match[1]], value, origin


def _check_trust(file: Path, status: os.stat_result, environ: Mapping[str, str], keys: list[str]) -> None:
    # The file was found, not named, and it steers a program of root: it must be by somebody who may do that anyway.
    caller = os.geteuid()
    trusted = {0, caller}
    if caller == 0 and (sudo := environ.get("SUDO_UID", "")).isdecimal():
        trusted.add(int(sudo))
    owners = {status.st_uid, file.lstat().st_uid}  # of a symlink too
    if owners <= trusted and not status.st_mode & stat.S_IWOTH:
        return
    cause = "everybody may write it" if owners <= trusted else f"it belongs to user {max(owners - trusted)}, not to you"
    raise UsageError(
        f"{file} sets {', '.join(keys)}, but it is not safe to trust",
        cause=cause,
        remedy=f"if you trust it, say so with --env-file {file}; else run gpuckpt in another folder",
    )


def _unquoted(match: re.Match[str], origin: str) -> str:
    single, double, bare = match[2], match[3], match[4]
    if single is not None:
        return single
    value = re.sub(r"\\(.)", r"\1", double, flags=re.DOTALL) if double is not None else ""
    if bare is not None:
        value = re.sub(r"\s#.*", "", bare).strip()  # a # inside a word is part of it
        if value[:1] in ("'", '"'):
            raise UsageError(
                f"cannot understand {shown(value)} ({origin})", cause="its quotes are not closed at the end"
            )
    if re.search(r"\$[\w{(]|`", double if double is not None else value):
        remedy = "write the value out; or put it in single quotes if it is meant as it is"
        raise UsageError(
            f"cannot understand {shown(value)} ({origin})", cause="variables are not expanded", remedy=remedy
        )
    return value
