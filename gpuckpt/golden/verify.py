"""Read a golden back: every byte against its digest, every image through CRIU's decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gpuckpt import manifest as manifests
from gpuckpt.criu import images as criu_images
from gpuckpt.errors import VerificationError
from gpuckpt.manifest import Manifest
from gpuckpt.store import digests, seal


def verify(folder: Path, progress: Callable[[int], None] = lambda done: None) -> Manifest:
    """Verify the golden in ``folder`` and seal it anew; returns its manifest.

    Raises VerificationError naming everything that is missing, changed or not decodable; a restore then finds it, too,
    whatever the files' times say. ``progress`` gets the bytes
    read so far.
    """
    manifest = manifests.read(folder)
    if manifest.name != folder.name:
        raise VerificationError(
            f"the golden in {folder} says that its name is {manifest.name}", remedy="it was moved by hand; move it back"
        )
    found = [] if seal.fits(folder) else ["manifest.json has changed since the golden was sealed"]
    found += digests.differences(
        folder,
        manifest.files,
        manifest.links,
        contents=True,
        attributes_blake3=manifest.attributes_blake3,
        progress=progress,
    )
    found += criu_images.undecodable(folder / "images")
    if found:
        with suppress(OSError):
            seal.distrust(folder)
        raise VerificationError(
            f"golden {manifest.name} is damaged: {len(found)} {'fault' if len(found) == 1 else 'faults'}",
            cause=found[0],
            remedy=f"remove it (gpuckpt rm {manifest.name}) and create it anew, or import it again",
            log=tuple(found),
        )
    seal.write(folder)
    return manifest
