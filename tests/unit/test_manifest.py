"""The manifest: what is written is what is read, and anything else is said plainly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gpuckpt import manifest as manifests
from gpuckpt.errors import GpuckptError, IncompatibleError, VerificationError
from gpuckpt.manifest import (
    Address,
    Canary,
    FileRecord,
    Manifest,
    Mount,
    Port,
    Request,
    Volume,
    Workload,
)
from gpuckpt.store import digests
from tests.fakes import sample_manifest


def full() -> Manifest:
    """A manifest with every optional part."""
    launch = replace(
        sample_manifest().launch,
        mounts=(Mount(source="/models", destination="/m"),),
        volumes=(Volume(name="data", destination="/data"),),
        port=Port(host_ip="127.0.0.1", host_port=8000, container_port=80),
    )
    return sample_manifest(
        launch=launch,
        address=Address(ip="10.88.0.7", mac="02:00:00:00:00:07"),
        workload=Workload(kind="vllm", model="/m", served_name="m"),
        canary=Canary(
            request=Request(method="POST", path="/v1/completions", body="{}"),
            status=200,
            tokens=(" jumps", " ☃"),
            logprobs=(-0.1, -1e-17, -3.1415927410125732, -float(2**-1074)),
        ),
        files={
            "images/pages-1.img": FileRecord(size=2**40, blake3="a" * 64),
            "rootfs/größe": FileRecord(size=0, blake3="b"),
        },
        links={"rootfs/link": "../../target"},
        attributes_blake3="c" * 64,
    )


@pytest.mark.parametrize("make", [sample_manifest, full])
def test_what_is_written_is_read(tmp_path: Path, make: Callable[[], Manifest]) -> None:
    make().write(tmp_path)
    assert manifests.read(tmp_path) == make()
    assert (tmp_path / "manifest.json").stat().st_mode & 0o777 == 0o600


def test_log_probabilities_keep_every_bit(tmp_path: Path) -> None:
    full().write(tmp_path)
    read, written = manifests.read(tmp_path).canary, full().canary
    assert read is not None and written is not None
    assert [value.hex() for value in read.logprobs] == [value.hex() for value in written.logprobs]


def test_sizes_add_up() -> None:
    assert sample_manifest().sizes.total == 8192 + 13 + 20


def test_a_manifest_does_not_change() -> None:
    with pytest.raises(AttributeError, match="immutable"):
        sample_manifest().name = "other"  # type: ignore[misc]


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(manifests.dump(full()))
    change(document)
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "truncated"),
        (b"{", "truncated"),
        (b"[]", "object"),
        (b"\xff\xfe", "invalid JSON"),
        (manifests.dump(full())[:500], "truncated"),
        (changed(lambda document: document.pop("launch")), "missing required field `launch`"),
        (changed(lambda document: document.update(extra=1)), "unknown field `extra`"),
        (changed(lambda document: document["sizes"].update(gpu="12")), "sizes.gpu: Expected `int`, got `str`"),
        (changed(lambda document: document["sizes"].update(gpu=1.5)), "sizes.gpu"),
        (changed(lambda document: document["launch"].update(argv="rm -rf /")), "launch.argv"),
        (changed(lambda document: document["workload"].update(kind="other")), "workload.kind"),
        (
            changed(lambda document: document["files"].update({"a": {"size": 1}})),
            "files[...]: Object missing required field `blake3`",
        ),
    ],
)
def test_a_damaged_manifest_is_said_to_be_so(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(VerificationError) as caught:
        manifests.read(tmp_path)
    assert says in str(caught.value.cause)
    assert tmp_path.name in caught.value.message


@pytest.mark.parametrize("number", [0, 2, 99])
def test_a_manifest_of_another_format(number: int) -> None:
    with pytest.raises(IncompatibleError) as caught:
        manifests.parse(changed(lambda document: document.update(format=number)), "gold")
    assert caught.value.exit_code == 5
    assert f"format {number}" in caught.value.message


def test_a_newer_format_is_told_even_if_nothing_else_fits() -> None:
    """What a newer gpuckpt writes will differ in more than its number."""

    def newer(document: dict[str, Any]) -> None:
        document.pop("canary")
        document.update(format=2, layers=[])

    with pytest.raises(IncompatibleError):
        manifests.parse(changed(newer), "gold")


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="no readable manifest"):
        manifests.read(tmp_path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """A server may call its files what it likes; the kernel knows bytes only."""
    name = digests.key(os.fsdecode(b"rootfs/\xff"))
    manifest = sample_manifest(files={name: FileRecord(size=0, blake3="a")}, links={name: name})
    manifest.write(tmp_path)
    assert manifests.read(tmp_path) == manifest


def test_errors_carry_their_exit_codes_into_json() -> None:
    error = VerificationError("what", cause="why", remedy="do", log=("line",), log_path="/log")
    assert error.as_dict() == {
        "kind": "VerificationError",
        "exit_code": 8,
        "message": "what",
        "cause": "why",
        "remedy": "do",
        "log": ["line"],
        "log_path": "/log",
    }
    codes = [kind.exit_code for kind in GpuckptError.__subclasses__() if kind.__module__ == "gpuckpt.errors"]
    assert sorted(codes) == list(range(2, 14)), "one exit code for each failure"
