"""Space: what a replica holds or needs of the host's memory and of each GPU's, and on which GPUs it can come.

Memory of one GPU is none of another's: a server comes back onto as many GPUs as it was on, each of the type that it was
on, and on each there must be room for what it held there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from msgspec import structs

from gpuckpt.cuda.driver import Gpu
from gpuckpt.cuda.room import CONTEXT, moved, place
from gpuckpt.errors import IncompatibleError
from gpuckpt.manifest import Held


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes of the host's memory, and of GPUs' by UUID; nothing of those that are not named."""

    memory: int = 0
    gpus: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Space) -> Space:
        if not other.gpus:  # most hosts have none
            return Space(self.memory + other.memory, self.gpus)
        every = self.gpus.keys() | other.gpus.keys()
        sums = {uuid: self.gpus.get(uuid, 0) + other.gpus.get(uuid, 0) for uuid in every}
        return Space(self.memory + other.memory, sums)

    def __sub__(self, other: Space) -> Space:
        return self + Space(-other.memory, {uuid: -count for uuid, count in other.gpus.items()})

    def lacks(self, need: Space) -> Space:
        """What it lacks for that; nothing that it has enough of is in it."""
        short = {uuid: count - self.gpus.get(uuid, 0) for uuid, count in need.gpus.items()}
        return Space(max(0, need.memory - self.memory), {uuid: count for uuid, count in short.items() if count > 0})

    def is_on(self, gpus: Iterable[str]) -> bool:
        """Whether any of it is on these GPUs."""
        return any(self.gpus.get(uuid, 0) > 0 for uuid in gpus)

    def __bool__(self) -> bool:
        return self.memory > 0 or any(count > 0 for count in self.gpus.values())


def total(spaces: Iterable[Space]) -> Space:
    """All together."""
    found = Space()
    for space in spaces:
        found += space
    return found


def limited(gpus: Sequence[Gpu], most: int | None) -> tuple[Gpu, ...]:
    """The GPUs with what replicas may hold of each: ``most`` bytes, and what a restore wants free beside them."""
    if most is None:
        return tuple(gpus)
    limits = [min(most + CONTEXT, gpu.memory) for gpu in gpus]
    return tuple(
        structs.replace(gpu, memory=limit, free=min(gpu.free, limit)) for gpu, limit in zip(gpus, limits, strict=True)
    )


def left_by_others(
    seen: Sequence[Gpu], least: Mapping[str, int], most: Mapping[str, int], known: Mapping[str, int]
) -> tuple[Gpu, ...]:
    """The GPUs with, as ``free``, what replicas may hold on each now: what is free there, and what they hold already.

    They hold at least ``least`` and at most ``most``, by UUID: nobody can tell what those have that come or go right
    now. ``known`` is what was said before, which is changed as little as that leaves it.
    """

    def left(gpu: Gpu) -> int:
        low, high = gpu.free + least.get(gpu.uuid, 0), gpu.free + most.get(gpu.uuid, 0)
        return min(gpu.memory, max(low, min(high, known.get(gpu.uuid, gpu.memory))))

    return tuple(structs.replace(gpu, free=left(gpu)) for gpu in seen)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a replica takes that comes: host memory, and on GPUs what ``held`` tells, there or elsewhere.

    ``fixed``: it comes to those GPUs, and to no others.
    """

    memory: int
    held: tuple[Held, ...] = ()
    fixed: bool = False

    def placed(self, gpus: Sequence[Gpu], free: Space) -> Demand | None:
        """The same where it comes if so much is free, by the rule of restores; None if it has no room.

        ``gpus``: all that there are. Of types that are not among them nothing is taken: the restore itself says best
        why that cannot be.
        """
        if free.memory < self.memory:
            return None
        own = {one.uuid for one in self.held}
        there = [
            structs.replace(gpu, free=free.gpus.get(gpu.uuid, 0)) for gpu in gpus if gpu.uuid in own or not self.fixed
        ]
        types = {gpu.name for gpu in there}
        known = [one for one in self.held if one.name in types]
        try:
            chosen = place(known, there, {})
        except IncompatibleError:  # none is as large, or they are not as many
            return None
        return None if chosen is None else replace(self, held=moved(known, chosen))

    @property
    def space(self) -> Space:
        """What it takes where it is to come."""
        return Space(self.memory, {one.uuid: one.bytes + CONTEXT for one in self.held})
