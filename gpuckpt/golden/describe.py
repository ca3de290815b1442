"""What is in a dump, put together as the manifest."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from msgspec import structs

from gpuckpt import __version__
from gpuckpt.criu import images as criu_images
from gpuckpt.golden import identity
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import Address, Canary, DeviceState, Launch, Manifest, Memory, PhaseRecord, Sizes, Workload
from gpuckpt.store.digests import Contents, walk
from gpuckpt.timing import PhaseTable


def describe(
    tools: Tools,
    staging: Path,
    *,
    name: str,
    workload: Workload,
    launch: Launch,
    address: Address | None,
    canary: Canary | None,
    phases: PhaseTable,
    cold_ttft_s: float,
    contents: Contents,
    memory: Memory,
    affinity: dict[str, tuple[int, ...]],
    gpu: DeviceState | None,
    weights: tuple[str, ...],
    caches: bool,
) -> Manifest:
    """The manifest of the golden in ``staging``, whose ``contents`` were digested; the phases up to now go with it."""
    images = staging / "images"
    if launch.image:
        base = identity.base_of_image(tools.containers.image_digest(launch.image))
    else:
        held = criu_images.regular_files(images)
        base = identity.base_of_folder(Path(launch.rootfs or "/"), held, launch, staging / "rootfs")
    return Manifest(
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        gpuckpt=__version__,
        workload=workload,
        launch=structs.replace(launch, capabilities=criu_images.capabilities(images)),
        address=address,
        identity=identity.record(tools.criu, tools.runtime, base, gpu=gpu is not None),
        canary=canary,
        sizes=sizes(staging, weights),
        memory=memory,
        processes=criu_images.processes(images),
        affinity=affinity,
        gpu=gpu,
        weights=weights,
        caches=caches,
        sockets=criu_images.sockets(images),
        files=contents.files,
        links=contents.links,
        attributes_blake3=contents.attributes,
        phases=tuple(PhaseRecord(name=row.name, seconds=row.seconds) for row in phases.rows()),
        cold_ttft_s=cold_ttft_s,
    )


def sizes(staging: Path, weights: tuple[str, ...] = ()) -> Sizes:
    """Bytes of the golden in ``staging`` by kind; ``weights`` names those of the files in ``memory``."""
    images = staging / "images"
    pages = sum(path.stat().st_size for path in images.glob("pages-*.img"))
    shared_pages, shared_files = criu_images.shared_memory_bytes(images)
    outside = sum((staging / "memory" / name).stat().st_size for name in set(weights))
    gpu = sum(path.stat().st_size for pattern in ("gpu-*", "amdgpu-*") for path in images.glob(pattern))
    everything = sum(path.stat().st_size for path in images.iterdir())
    mapped = sum(path.stat().st_size for path in (staging / "memory").iterdir())
    layer = sum(status.st_size for relative, status in walk(staging) if relative.startswith(("rootfs/", "volumes/")))
    return Sizes(
        cpu_pages=pages - shared_pages,
        mapped_pages=mapped - outside,
        weights=outside,
        gpu=gpu,
        shared_memory=shared_pages + shared_files,
        rootfs=layer,
        metadata=everything - pages - shared_files - gpu,
    )
