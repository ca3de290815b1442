"""A replica's own view of a golden's images: links to them, and the few that differ from replica to replica.

CRIU reads its images by name from one folder. Making that folder for each replica costs a link per image, is done
before the restore begins, and lets what distinguishes a replica be in the images themselves, where it costs nothing.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from gpuckpt.errors import VerificationError


def make(view: Path, images: Path, *, hostname: str) -> None:
    """Fill the new folder ``view`` with links to ``images``; the host name of the processes becomes ``hostname``.

    Raises VerificationError if the image of the host name is not what it should be.
    """
    view.mkdir(mode=0o700)
    # Relative links: CRIU opens some images from inside the container, where an absolute path would begin at its root;
    # a relative one begins at the folder, which CRIU holds open.
    relative = Path(os.path.relpath(images.resolve(), view.resolve()))
    for image in images.iterdir():
        target = view / image.name
        if image.name.startswith("utsns-"):
            target.write_bytes(_renamed(image, hostname))
        else:
            target.symlink_to(relative / image.name)


def _renamed(image: Path, hostname: str) -> bytes:
    """The image ``utsns-N.img`` with another host name.

    Two magic numbers and a length, 32 bits each, then the message: field 1 the host name, field 2 the NIS domain
    (CRIU's images/utsns.proto; strings shorter than 128 bytes). By hand, because importing pycriu takes 0.15 s.
    """
    data = image.read_bytes()
    length = int.from_bytes(data[8:12], "little")
    message, domain, at = data[12 : 12 + length], b"", 0
    while at + 2 <= len(message):
        tag, size = message[at], message[at + 1]
        if tag not in (0x0A, 0x12) or size > 127 or at + 2 + size > len(message):
            break
        if tag == 0x12:
            domain = message[at : at + 2 + size]
        at += 2 + size
    if at != length or 12 + length != len(data):
        raise VerificationError(f"{image.name} is not an image of a host name", remedy="gpuckpt verify")
    name = hostname.encode()
    message = bytes([0x0A, len(name)]) + name + domain
    return data[:8] + struct.pack("<I", len(message)) + message
