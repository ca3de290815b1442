"""Tensors as safetensors files and as numbers, and files that appear whole."""

from __future__ import annotations

import json
import math
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpuckpt import errors
from gpuckpt.sessions import Tensor, files, tensors
from tests.fake_guest import hidden


def test_safetensors_files_come_back() -> None:
    held = {
        "b": Tensor("BF16", (1, 3, 8), bytes(range(48))),
        "a": Tensor("F64", (2,), bytes(16)),
        "ünï": Tensor("U8", (), b"x"),
        "empty": Tensor("I32", (0, 5), b""),
        "eight": Tensor("F8_E4M3", (3,), b"abc"),
    }
    file = tensors.write(held, {"why": '{"a": 1}'})
    assert tensors.read(file) == (held, {"why": '{"a": 1}'})
    assert int.from_bytes(file[:8], "little") % 8 == 0
    assert tensors.read(tensors.write({})) == ({}, {})


def file_of(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "U8", shape: Any = (2,), offsets: Any = (0, 2), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


@pytest.mark.parametrize(
    ("file", "why"),
    [
        (b"", "within its header"),
        (b"\0" * 7, "within its header"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "within its header"),
        (file_of({})[:-1], "within its header"),
        (file_of(b"{"), "no JSON"),
        (file_of(b"\xff"), "no JSON"),
        (file_of(b"[" * 100_000), "no JSON"),
        (file_of([]), "no JSON object"),
        (file_of(b" {}"), "no JSON object"),
        (file_of(b'{"a": {}, "a": {}}'), "twice"),
        (file_of(b'{"a": NaN}'), "NaN"),
        (file_of({"__metadata__": {"a": 1}}), "not all texts"),
        (file_of({"__metadata__": []}), "not all texts"),
        (file_of({"a": 1}), "not described"),
        (file_of({"a": entry(more=1)}, b"xy"), "not described"),
        (file_of({"a": entry(dtype="F3")}, b"xy"), "unknown type"),
        (file_of({"a": entry(dtype=["U8"])}, b"xy"), "unknown type"),
        (file_of({"a": entry(shape=[-2])}, b"xy"), "the shape"),
        (file_of({"a": entry(shape=[2.0])}, b"xy"), "the shape"),
        (file_of({"a": entry(shape=[True])}, b"x"), "the shape"),
        (file_of({"a": entry(offsets=[0])}, b"xy"), "the offsets"),
        (file_of({"a": entry(offsets=[2, 0])}, b"xy"), "its shape"),
        (file_of({"a": entry(shape=[3])}, b"xy"), "its shape"),
        (file_of({"a": entry(offsets=[1, 3])}, b"xyz"), "ends at 0"),
        (file_of({"a": entry(), "b": entry()}, b"xy"), "ends at 2"),
        (file_of({"a": entry(), "b": entry(offsets=(3, 5))}, b"xyzab"), "ends at 2"),
        (file_of({"a": entry()}, b"x"), "the file at"),
        (file_of({"a": entry()}, b"xyz"), "the file at"),
    ],
)
def test_malformed_safetensors(file: bytes, why: str) -> None:
    with pytest.raises(errors.VerificationError, match="no safetensors file") as raised:
        tensors.read(file)
    assert why in str(raised.value.cause)


def test_tensors_have_as_many_bytes_as_their_shape_says() -> None:
    with pytest.raises(errors.UsageError, match="has 6 bytes"):
        Tensor("BF16", (3,), bytes(5))
    with pytest.raises(errors.UsageError, match="no numbers of the type"):
        Tensor("bfloat16", (3,), bytes(6))
    with pytest.raises(errors.UsageError, match="__metadata__"):
        tensors.write({"__metadata__": hidden()})


@pytest.mark.parametrize("dtype", ["BOOL", "U8", "I16", "F16", "I32", "F32", "I64", "F64", "BF16"])
def test_numbers_come_back_from_numpy(dtype: str) -> None:
    array = np.array([[0, 1, 1], [1, 0, 1]])
    made = Tensor.of(array.T, dtype)
    assert made.shape == (3, 2) and (made.numpy() == array.T).all()
    assert Tensor.of(np.array(1), dtype).shape == ()
    made.numpy()[0, 0] = 1  # it is a copy


def test_bfloat16_is_the_upper_half_of_a_float() -> None:
    values = [1.0, -2.5, 3.0e38, 1e-40, math.inf, -math.inf]
    made = Tensor.of(np.array(values, "f4"), "BF16")
    assert made.data[:4] == bytes.fromhex("803f20c0")
    assert np.allclose(made.numpy(), np.array(values, "f4"), rtol=2**-8, atol=1e-40)
    assert made.numpy().dtype == np.float32


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF], "<u4")
    with np.errstate(invalid="ignore"):
        halves = np.frombuffer(Tensor.of(bits.view("f4"), "BF16").data, "<u2")
    assert [f"{half:04x}" for half in halves] == ["3f80", "3f82", "3f81", "3f80", "7f80", "7fc0", "ffff"]


def test_what_numpy_does_not_know() -> None:
    with pytest.raises(errors.UsageError, match="F8_E5M2"):
        Tensor("F8_E5M2", (1,), b"x").numpy()
    for dtype in ("F8_E5M2", "float32"):
        with pytest.raises(errors.UsageError, match=dtype):
            Tensor.of(np.zeros(1), dtype)


def test_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(errors.PreflightError, match="numpy is not installed"):
        hidden().numpy()


def test_files_appear_whole(tmp_path: Path) -> None:
    content = tensors.write({"hidden": hidden()})
    target = tmp_path / "demo"
    assert files.write_whole(target, [content[:9], content[9:]]) == len(content)
    assert target.read_bytes() == content and stat.S_IMODE(target.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [target]


def fail_after(*pieces: bytes) -> Iterator[bytes]:
    yield from pieces
    raise errors.DaemonUnreachableError("gone")


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        (fail_after(tensors.write({"hidden": hidden()})), errors.DaemonUnreachableError),
        ([tensors.write({"hidden": hidden()})[:-1]], errors.VerificationError),
        ([b"{}"], errors.VerificationError),
        ([(1 << 62).to_bytes(8, "little")], errors.VerificationError),
    ],
)
def test_files_that_do_not_come_whole_leave_what_was_there(
    tmp_path: Path, pieces: Any, kind: type[errors.GpuckptError]
) -> None:
    target = tmp_path / "demo"
    target.write_text("before")
    with pytest.raises(kind):
        files.write_whole(target, pieces)
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]


def test_a_file_in_no_folder(tmp_path: Path) -> None:
    with pytest.raises(errors.NotFoundError, match="no folder"):
        files.write_whole(tmp_path / "no" / "demo", [])
