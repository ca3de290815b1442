"""safetensors files, made and read by hand: a library would not make the wrong ones."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file, made by hand: name → (data type, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return with_header(header, data)


def with_header(header: Any, data: bytes) -> bytes:
    """A safetensors file of this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def sealed(header: Any, data: bytes) -> bytes:
    """The same with the digest of what it says now: damage that its maker did, not one that happened on the way."""
    facts = json.loads(header["__metadata__"]["gpuckpt_session"])
    facts.pop("digest", None)
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(set(header) - {"__metadata__"}):
        first, end = header[name]["data_offsets"]
        digest.update(f"\0{name}\0{header[name]['shape']}\0".encode() + data[first:end])
    told = {"gpuckpt_session": json.dumps(facts | {"digest": digest.hexdigest()})}
    return with_header(header | {"__metadata__": told}, data)


def opened(file: bytes) -> tuple[Any, bytes]:
    """Header and data of a safetensors file."""
    (size,) = struct.unpack_from("<Q", file)
    return json.loads(file[8 : 8 + size]), file[8 + size :]


def floats(file: bytes) -> list[float]:
    """The numbers of the one tensor of a file."""
    header, data = opened(file)
    (name,) = [key for key in header if key != "__metadata__"]
    assert header[name]["dtype"] == "F32"
    return list(struct.unpack(f"<{len(data) // 4}f", data))


def hidden(values: list[float], shape: list[int]) -> bytes:
    """The file of an activation."""
    return safetensors({"hidden": ("F32", shape, struct.pack(f"<{len(values)}f", *values))})
