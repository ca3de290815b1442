"""The memory of sessions: how much there is of which kind, and who asks for it to be used how.

Paging by itself is transparent: a session whose cache has left the device is idle or stopped as before, and what it is
asked to do waits until the cache is back. To suspend is to order that it leave, and stay away until it is resumed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..kv.arena import Arena, OutOfBlocksError
from ..kv.cache import Blueprint
from ..kv.layout import LAYOUT, least
from ..kv.memory import grain
from ..kv.pager import Pager
from ..kv.store import BlockFiles, HostMemoryPool, publish
from .batches import Batches
from .errors import full
from .model import Loaded
from .residency import PINNED_SHARE, Residency
from .session import Session

_SHARE = 0.85  # of a GPU's memory that is free once the model is loaded
_PINNED = 8 << 30  # bytes: more takes long to pin, and is to be asked for
_LEAST_SLOTS = 2
_REST = 1.0  # seconds without work after which free blocks give their pages back


@dataclass(frozen=True)
class Budgets:
    """Bytes for caches: on the device, in host memory, in files in ``folder``; None: a part of what the machine has."""

    device: int | None = None
    host: int | None = None
    disk: int = 0
    folder: Path | None = None

    def settled(self, device: Any) -> tuple[int, int]:
        """Bytes on the device and in host memory."""
        if torch.device(device).type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            mine, host = int(free * _SHARE), min(_PINNED, machine_memory() // 4)
        else:
            mine = host = machine_memory() // 4
        return self.device if self.device is not None else mine, self.host if self.host is not None else host

    def check(self, device: Any) -> None:
        """Raise ValueError if this machine can never have so much."""
        mine, host = self.settled(device)
        cuda = torch.device(device).type == "cuda"
        asked = host if cuda else mine + host
        if asked > machine_memory():
            which = "--kv-host-mib asks" if cuda else "--kv-mib and --kv-host-mib ask"
            raise ValueError(f"{which} for {asked >> 20} MiB; this machine has {machine_memory() >> 20}")
        if cuda and mine > (whole := torch.cuda.mem_get_info(device)[1]):
            raise ValueError(f"--kv-mib asks for {mine >> 20} MiB; the device has {whole >> 20}")


def machine_memory() -> int:
    """Bytes that this process may use: the machine's, or its control group's if that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # not this kind of control group; or "max"
            continue
    return min(found)


def layout_in(folder: Path, piece: int, plan: Blueprint) -> int:
    """The smallest piece of the blocks that lie in the folder, whatever the budget is now; of a new one ``piece``.

    Raises ValueError if they are laid out in a way of another version.
    """
    path = folder / "layout.json"
    kind = hashlib.blake2b(repr((LAYOUT, plan.forms, plan.windows)).encode(), digest_size=16).hexdigest()
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        what = f"it is damaged ({error}); move the folder away, or put the file back"
        raise OSError(errno.EINVAL, what, str(path)) from error
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        publish(path, json.dumps({"piece": piece, "kind": kind}).encode())
        return piece
    if not isinstance(found, dict) or found.get("kind") != kind or type(found.get("piece")) is not int:
        raise ValueError(f"the sessions in {folder} were kept by another version; move them away")
    return int(found["piece"])


class SessionMemory:
    """Where the caches of an engine's sessions lie. For use by the engine's thread."""

    def __init__(
        self,
        loaded: Loaded,
        budgets: Budgets,
        sessions: Callable[[], Iterable[Session]],
        wake: Callable[[], object],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``wake`` is called by other threads when :meth:`poll` is to be called. Raises ValueError, OSError."""
        device, host = budgets.settled(loaded.device)
        plan = loaded.blueprint
        folder = budgets.folder / loaded.identity[:16] if budgets.folder else None
        piece = least(plan.forms, plan.windows, device, grain(loaded.device).pieces)
        if folder:
            piece = layout_in(folder, piece, plan)
        self.arena = Arena.build(
            plan.forms, plan.windows, device=loaded.device, budget=device, limit=loaded.limit, piece=piece
        )
        size = self.arena.memory.size
        self.files = BlockFiles(folder, budgets.disk, size) if folder else None
        if folder:
            host = max(host, _LEAST_SLOTS * size)  # what goes into files comes by there
        pool = HostMemoryPool(host, size, pinned=loaded.device.type == "cuda")
        self.pager = Pager(self.arena, pool, self.files, wake)
        self.batches = Batches(self.arena)
        self.residency = Residency(self.arena, self.pager, self.batches, loaded.device, sessions, clock=clock)
        self._sessions = sessions
        self._wake = wake
        self._clock = clock
        self.keep: Callable[[Session], None] | None = None  # writes a session that has left into files
        self.dropped: Callable[[Session], None] = lambda session: None  # told of sessions that have ended
        self._leaving: dict[Session, bool] = {}  # suspended, but not all of it has left; to be kept then
        self._coming: dict[Session, None] = {}  # to be brought back
        self._used = False  # blocks since they last gave their pages back

    def close(self) -> None:
        """Nothing is moved any more."""
        self.pager.close()

    # ------------------------------------------------------------------ orders

    def suspend(self, session: Session, *, durable: bool) -> bool:
        """Begin to take a session off the device; it is told "suspended" when that is done. False: it is already."""
        gone = session.suspended and session not in self._leaving and (session.durable or not durable)
        session.suspended = True
        session.pinned, session.expected = 0.0, None
        self._coming.pop(session, None)
        self.residency.forget(session)
        if session.cache.shown:
            self.residency.leave(session)
        if gone:
            return False
        self._leaving[session] = durable
        self._wake()
        return True

    def fits(self, session: Session, *, durable: bool) -> bool:
        """Whether there is room outside of the device for what would have to be copied."""
        blocks = list(session.cache.blocks())
        unfiled = sum(block.home is None or block.dirty or block.home.file is None for block in blocks)
        if durable and self.files is not None and unfiled > self.files.free:
            return False
        return sum(block.dirty and block.place >= 0 for block in blocks) <= self.pager.space

    def wake(self, session: Session) -> bool:
        """Begin to bring a session back; it is told "woken" when that is done. False: it is there."""
        if session.suspended:
            session.suspended, session.expected = False, None
            session.wakes += 1
        elif session.cache.shown and not self.pager.arriving(session.cache):
            return False
        self._leaving.pop(session, None)
        session.durable = False  # what is kept is what it was
        self._coming[session] = None
        self.residency.fetch(session)
        self._wake()
        return True

    def pin(self, session: Session, seconds: float) -> bool:
        """Have it stay for so long; False: there would be too little left for others."""
        now = self._clock()
        held = {session.cache} if seconds else set()
        held |= {one.cache for one in self.residency.pinned() if one is not session}
        blocks = {id(block) for cache in held for block in cache.blocks()}
        if len(blocks) > self.arena.memory.places * PINNED_SHARE:
            return False
        session.pinned = now + seconds if seconds else 0.0
        if seconds and not session.cache.shown:
            self.wake(session)
        return True

    def expect(self, session: Session, seconds: float) -> None:
        """It is not needed for so long; 0: nothing is known."""
        session.expected = self._clock() + seconds if seconds else None

    def adopt(self, session: Session, columns: Any) -> None:
        """Take over the columns that a cache was loaded with, in host memory. Raises EngineError if that is full."""
        try:
            self.pager.adopt(session.cache, columns)
        except OutOfBlocksError as error:
            raise full(session.id) from error

    def forget(self, session: Session) -> None:
        """The session has ended."""
        self._leaving.pop(session, None)
        self._coming.pop(session, None)
        self.residency.forget(session)
        self.dropped(session)
        session.cache.close()

    # ------------------------------------------------------------------ what happens by itself

    def poll(self) -> list[tuple[Session, str]]:
        """Take note of what was copied, and see to what follows; returns sessions whose bytes were lost, and why."""
        self.pager.poll()
        for session, durable in list(self._leaving.items()):
            if not self.pager.left(session.cache):
                continue
            if durable and (mine := [block for block in session.cache.blocks() if not self.pager.copied(block)]):
                for block in mine:  # others see it
                    self.pager.copy(block)
            else:
                del self._leaving[session]
                if durable and self.keep is not None:
                    self.keep(session)
                else:
                    session.emit({"type": "suspended"})
        for session in list(self._coming):
            if session.cache.shown and not self.pager.arriving(session.cache):
                del self._coming[session]
                session.emit({"type": "woken"})
        self.residency.fetch_expected()
        return self._lost()

    def _lost(self) -> list[tuple[Session, str]]:
        found = []
        for session in self._sessions():
            error = next((arrival.error for arrival in session.cache.arrivals if arrival.error), "")
            if error and not session.failed:
                session.cache.arrivals = []
                found.append((session, error))
        return found

    def again(self) -> None:
        """Have :meth:`poll` called once more."""
        self._wake()

    def fail(self, session: Session, error: str) -> None:
        """What it has read is lost, and cannot be computed again."""
        session.failed = error
        session.emit({"type": "failed", "error": error})
        self._coming.pop(session, None)

    def next_time(self) -> float | None:
        """Seconds until there is something to do without being asked."""
        times = [self.residency.next_time(), self.pager.next_time(), _REST if self._used else None]
        return min((one for one in times if one is not None), default=None)

    def worked(self) -> None:
        """There was work: blocks may have been used."""
        self._used = True

    def rest(self) -> None:
        """There was none for a while: pages of free blocks go back to the machine, and out of what is frozen."""
        if self._used:
            self.arena.trim()
            self._used = False

    # ------------------------------------------------------------------ reports

    def where(self, session: Session) -> dict[str, Any]:
        """Where the session's cache is, as JSON."""
        size, seen = self.arena.memory.size, {"device": 0, "host": 0, "disk": 0}
        for block in session.cache.blocks():
            if block.place >= 0:
                seen["device"] += size
            elif block.home is not None:
                seen["host" if block.home.slot >= 0 else "disk"] += size
        seen["device"] += session.cache.outside
        state = "device"
        if session.replay:
            state = "dropped"
        elif not session.cache.shown:
            state = "away" if self.pager.left(session.cache) else "leaving"
        elif self.pager.arriving(session.cache):
            state = "arriving"
        now = self._clock()
        return {
            "state": state,
            "bytes": seen,
            "waiting": self.residency.waits(session),
            "pinned": session.pinned - now if session.pinned > now else None,
            "expected": None if session.expected is None else max(0.0, session.expected - now),
            "durable": session.durable,
        }

    def report(self) -> dict[str, Any]:
        """Budgets, what is used of them, and traffic, as JSON."""
        size, pager, counters = self.arena.memory.size, self.pager, self.residency.counters
        places = self.arena.memory.places
        return {
            "block_bytes": size,
            "device": {"budget": places * size, "free": self.arena.free * size, "outside_blocks": self.arena.charged},
            "host": {"budget": pager.host.slots * size, "free": pager.host.free * size},
            "disk": {
                "budget": self.files.budget if self.files else 0,
                "used": self.files.written * size if self.files else 0,
                "error": self.files.error if self.files else "",
            },
            "longest": self.arena.limit,
            "waiting": self.residency.waiting,
            "evicted": counters.evicted,
            "preempted": counters.preempted,
            "dropped": counters.dropped,
            **{
                name: {
                    "bytes": traffic.bytes,
                    "seconds": traffic.seconds,
                    "blocks": traffic.blocks,
                    "spared": traffic.spared,
                }
                for name, traffic in (("out", pager.out), ("in", pager.into), ("to_disk", pager.spilled))
            },
        }
