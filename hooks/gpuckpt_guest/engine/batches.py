"""The lanes in which batches of sessions run, kept from pass to pass while a batch is made up the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..kv.arena import Arena
from ..kv.cache import SessionCache
from ..kv.lanes import Lanes
from .session import Session

_log = logging.getLogger("gpuckpt_guest")


@dataclass(frozen=True, slots=True)
class _Held:
    lanes: Lanes
    rows: tuple[Session, ...]
    bytes: int


class Batches:
    """Which sessions share lanes, and handing back to them what they read there. Lanes count in the arena's budget."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._held: list[_Held] = []

    def __len__(self) -> int:
        return len(self._held)

    def affordable(self, rows: Sequence[Session], tokens: int) -> bool:
        """Whether there is memory for lanes of these sessions, or they have some."""
        if any(held.rows == tuple(rows) and held.lanes.length + tokens <= held.lanes.end for held in self._held):
            return True
        mine = sum(held.bytes for held in self._held if any(session in held.rows for session in rows))
        cost = Lanes.cost([session.cache for session in rows], tokens)
        return cost - mine <= self._arena.free * self._arena.memory.size

    def cache(self, rows: Sequence[Session], tokens: int) -> SessionCache | Lanes:
        """What a pass of these sessions runs on: a single one's own cache, else lanes."""
        if len(rows) == 1:
            self.settle(rows[0])
            return rows[0].cache
        for held in self._held:
            if held.rows == tuple(rows) and held.lanes.length + tokens <= held.lanes.end:
                return held.lanes
        for session in rows:
            self.settle(session)
        members = [session.cache for session in rows]
        made = _Held(Lanes(members, tokens), tuple(rows), Lanes.cost(members, tokens))
        self._arena.charge(made.bytes)
        self._held.append(made)
        return made.lanes

    def settle(self, session: Session) -> None:
        """See to it that the session's own cache holds everything that it has read."""
        for held in list(self._held):
            if session in held.rows:
                self.hand_back(held.lanes)

    def keep(self, wanted: Iterable[Sequence[Session]], flying: Iterable[object]) -> None:
        """Hand back the lanes of batches that are not made up like this any more and are not under way."""
        groups = {tuple(rows) for rows in wanted}
        under_way = {id(cache) for cache in flying}
        for held in list(self._held):
            if held.rows not in groups and id(held.lanes) not in under_way:
                self.hand_back(held.lanes)

    def hand_back(self, lanes: Lanes) -> None:
        """Give the sessions what they read in ``lanes``, which are done with. Those who cannot have it have failed."""
        held = next((held for held in self._held if held.lanes is lanes), None)
        if held is None:
            return
        self._held.remove(held)
        self._arena.charge(-held.bytes)
        try:
            lanes.release()
        except Exception as error:  # out of memory, say
            _log.exception("lanes could not be handed back")
            for session in held.rows:
                session.failed = f"what it read in a batch could not be handed back: {error}"
                session.emit({"type": "failed", "error": session.failed})
