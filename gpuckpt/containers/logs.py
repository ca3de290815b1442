"""What a container printed, out of the file that conmon writes for podman (log driver k8s-file).

Not by podman's own answer: asked for the last lines only, podman 4.3 joins pieces of lines with lines that they are no
part of, and loses those of the first.
"""

from __future__ import annotations

from pathlib import Path


def read(file: Path, most: int | None = None) -> str:
    """All that was printed (both outputs), or what is in the last ``most`` bytes of the file; "" if there is none."""
    try:
        with file.open("rb") as stream:
            begin = max(0, file.stat().st_size - most) if most is not None else 0
            stream.seek(begin)
            if begin:
                stream.readline()  # the rest of a line
            return b"".join(map(_printed, stream)).decode(errors="replace")
    except FileNotFoundError:
        return ""


def _printed(line: bytes) -> bytes:
    """The bytes of one entry, ``TIME STREAM TAG TEXT``; tag P says that what was printed goes on in the next one."""
    words = line.split(b" ", 3)
    if len(words) < 4:  # conmon is still writing it
        return b""
    return words[3].removesuffix(b"\n") if words[2] == b"P" else words[3]
