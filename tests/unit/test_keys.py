"""API keys: who may pass, and a file of them that closes what it is meant to close."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpuckpt.errors import NotFoundError, UsageError
from gpuckpt.service.keys import Keys

KEYS = Keys(frozenset((b"first", b"second key")))


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({b"authorization": b"Bearer first"}, True),
        ({b"authorization": b"bearer  first "}, True),
        ({b"authorization": b"Bearer second key"}, True),
        ({b"x-api-key": b"first"}, True),
        ({b"authorization": b"Basic Zm9vOmJhcg==", b"x-api-key": b"first"}, True),
        ({}, False),
        ({b"authorization": b"first"}, False),
        ({b"authorization": b"Bearer"}, False),
        ({b"authorization": b"Bearer "}, False),
        ({b"authorization": b"Bearer First"}, False),
        ({b"authorization": b"Bearer first second key"}, False),
        ({b"authorization": b"Bearer no", b"x-api-key": b"first"}, False),
        ({b"x-api-key": b""}, False),
    ],
)
def test_who_may_pass(headers: dict[bytes, bytes], allowed: bool) -> None:
    assert KEYS.allow(headers) is allowed


def test_without_keys_everybody_may() -> None:
    assert not Keys() and Keys().allow({})


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"# ours\r\n\n  first  \nsecond\xff\n#first\n")
    keys = Keys.read(file)
    assert keys.allow({b"x-api-key": b"first"}) and keys.allow({b"x-api-key": b"second\xff"})
    assert not keys.allow({b"x-api-key": b"#first"}) and not keys.allow({b"x-api-key": b"# ours"})
    assert b"first" not in repr(vars(keys)).encode()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# none\n"])
def test_a_file_without_keys_does_not_open(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "keys"
    file.write_bytes(content)
    with pytest.raises(UsageError):
        Keys.read(file)
    with pytest.raises(NotFoundError):
        Keys.read(tmp_path / "missing")


def test_what_is_no_small_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    for file in (tmp_path / "keys", Path("/dev/zero")):
        with pytest.raises(UsageError, match="not a regular file"):
            Keys.read(file)
    (tmp_path / "large").write_bytes(b"x" * (1 << 20) + b"y")
    with pytest.raises(UsageError, match="larger than 1024 KiB"):
        Keys.read(tmp_path / "large")
