"""Activations as plain bytes, and the safetensors format, read and written without torch or numpy.

A file is 8 bytes, the header's size as a little-endian number; the header, JSON; the tensors' bytes, one behind the
other (https://huggingface.co/docs/safetensors). Reading is strict: what is not exactly so is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from gpuckpt.errors import PreflightError, UsageError, VerificationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of a number, and numpy's name for its kind; none where numpy has no such kind.
_KINDS: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "<u1"),
    "I8": (1, "<i1"),
    "F8_E4M3": (1, ""),
    "F8_E5M2": (1, ""),
    "U16": (2, "<u2"),
    "I16": (2, "<i2"),
    "F16": (2, "<f2"),
    "BF16": (2, ""),
    "U32": (4, "<u4"),
    "I32": (4, "<i4"),
    "F32": (4, "<f4"),
    "U64": (8, "<u8"),
    "I64": (8, "<i8"),
    "F64": (8, "<f8"),
}
_LONGEST_HEADER = 100_000_000  # bytes; the reference implementation's limit
_METADATA = "__metadata__"


class Tensor(Struct, frozen=True):
    """Numbers in row-major order. ``dtype`` is safetensors' word for them: F32, F16, BF16, I64 …"""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        if (wanted := _size(self.dtype, self.shape)) != len(self.data):
            raise UsageError(
                f"a tensor of the shape {list(self.shape)} and the type {self.dtype} has {wanted} bytes",
                cause=f"{len(self.data)} were given",
            )

    def numpy(self) -> NDArray[Any]:
        """The numbers as an array that can be written to; bfloat16, which numpy does not know, as float32.

        Raises PreflightError without numpy, UsageError for 8-bit floats.
        """
        np = _numpy()
        if self.dtype == "BF16":  # the upper half of a 32-bit float
            halves = np.frombuffer(self.data, "<u2").astype("<u4")
            made: NDArray[Any] = (halves << 16).view("<f4").reshape(self.shape)
            return made
        if not (kind := _KINDS[self.dtype][1]):
            raise UsageError(f"numpy has no numbers of the type {self.dtype}", remedy="read .data")
        made = np.frombuffer(self.data, kind).reshape(self.shape).copy()
        return made

    @classmethod
    def of(cls, array: NDArray[Any], dtype: str) -> Tensor:
        """An array as a tensor of the type ``dtype`` (that of what it is to replace); BF16 is rounded to nearest even.

        Raises PreflightError without numpy, UsageError for 8-bit floats and unknown types.
        """
        np = _numpy()
        array = np.ascontiguousarray(array).reshape(np.shape(array))
        if dtype == "BF16":
            bits = array.astype("<f4").view("<u4")
            rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
            # Rounding would carry a NaN's bits away into a number; its quiet bit keeps it one.
            halves = np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype("<u2")
            return cls(dtype, tuple(array.shape), halves.tobytes())
        kind = _KINDS.get(dtype, (0, ""))[1]
        if not kind:
            raise UsageError(f"an array cannot become a tensor of the type {dtype}")
        return cls(dtype, tuple(array.shape), array.astype(kind).tobytes())


def read(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises VerificationError if it is none."""
    header, start = head(data)
    metadata = header.pop(_METADATA, {})
    if start + extent(header) != len(data):
        raise _malformed(f"its tensors end at byte {start + extent(header)}, the file at {len(data)}")
    made = {}
    for name, facts in header.items():
        begin, end = facts["data_offsets"]
        made[name] = Tensor(facts["dtype"], tuple(facts["shape"]), data[start + begin : start + end])
    return made, metadata


def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file with these tensors; read() gives them back. Raises UsageError for the name __metadata__."""
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    end = 0
    # The widest numbers first: then all lie at multiples of their size, as the reference implementation has them.
    order = sorted(tensors, key=lambda name: (-_KINDS[tensors[name].dtype][0], name))
    for name in order:
        if name == _METADATA:
            raise UsageError(f"a tensor cannot be called {_METADATA}")
        tensor = tensors[name]
        begin, end = end, end + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(tensors[name].data for name in order)])


def head(data: bytes) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file that begins with ``data``, checked, and the byte at which its tensors begin.

    Raises VerificationError.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > _LONGEST_HEADER or len(data) < 8 + size:
        raise _malformed("it ends within its header")
    try:
        header = json.loads(data[8 : 8 + size].decode(), object_pairs_hook=_no_twins, parse_constant=_no_constants)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"its header is no JSON: {error}") from None
    if data[8:9] != b"{" or not isinstance(header, dict):
        raise _malformed("its header is no JSON object")
    metadata = header.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _malformed("its metadata are not all texts")
    extent({name: facts for name, facts in header.items() if name != _METADATA})
    return header, 8 + size


def extent(header: Mapping[str, Any]) -> int:
    """How many bytes the tensors of a header take; raises VerificationError unless they fill them without gaps."""
    spans = sorted(_span(name, facts) for name, facts in header.items() if name != _METADATA)
    reached = 0
    for begin, end, name in spans:
        if begin != reached:
            raise _malformed(f"{name!r} begins at byte {begin}, what is before it ends at {reached}")
        reached = end
    return reached


def _span(name: str, facts: Any) -> tuple[int, int, str]:
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise _malformed(f"{name!r} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _KINDS:
        raise _malformed(f"{name!r} has numbers of the unknown type {dtype!r}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise _malformed(f"{name!r} has the shape {shape!r} and the offsets {offsets!r}")
    begin, end = offsets
    if end - begin != _size(dtype, tuple(shape)):
        raise _malformed(f"{name!r} has {end - begin} bytes, which is not what its shape {shape} takes")
    return begin, end, name


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    if dtype not in _KINDS:
        raise UsageError(f"there are no numbers of the type {dtype!r}", cause=f"known are {', '.join(_KINDS)}")
    return math.prod(shape) * _KINDS[dtype][0]


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("it has the same name twice")
    return made


def _no_constants(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _malformed(why: str) -> VerificationError:
    return VerificationError("this is no safetensors file", cause=why)


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise PreflightError(
            "numpy is not installed", cause=str(error), remedy="pip install numpy, or use the tensor's .data"
        ) from None
    return numpy
