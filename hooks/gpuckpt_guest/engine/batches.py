"""The lanes in which batches of sessions run, kept from pass to pass while a batch is made up the same."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from ..kv.cache import Lanes, SessionCache
from .session import Session

_log = logging.getLogger("gpuckpt_guest")


class Batches:
    """Which sessions share lanes, and handing back to them what they read there."""

    def __init__(self, *, possible: bool) -> None:
        self._possible = possible
        self._lanes: list[tuple[Lanes, tuple[Session, ...]]] = []

    def __len__(self) -> int:
        return len(self._lanes)

    def cache(self, rows: Sequence[Session]) -> SessionCache | Lanes:
        """What a pass of these sessions runs on: a single one's own cache if it lies in one piece, else lanes."""
        if len(rows) == 1 and (rows[0].cache.whole or not self._possible):
            self.settle(rows[0])
            return rows[0].cache
        for lanes, held in self._lanes:
            if held == tuple(rows):
                return lanes
        for session in rows:
            self.settle(session)
        made = Lanes([session.cache for session in rows])
        self._lanes.append((made, tuple(rows)))
        return made

    def settle(self, session: Session) -> None:
        """See to it that the session's own cache holds everything that it has read."""
        for lanes, held in list(self._lanes):
            if session in held:
                self.hand_back(lanes)

    def keep(self, wanted: Iterable[Sequence[Session]], flying: Iterable[object]) -> None:
        """Hand back the lanes of batches that are not made up like this any more and are not under way."""
        groups = {tuple(rows) for rows in wanted}
        under_way = {id(cache) for cache in flying}
        for lanes, held in list(self._lanes):
            if held not in groups and id(lanes) not in under_way:
                self.hand_back(lanes)

    def hand_back(self, lanes: Lanes) -> None:
        """Give the sessions what they read in ``lanes``, which are done with. Those who cannot have it have failed."""
        rows = next((held for known, held in self._lanes if known is lanes), ())
        self._lanes = [(known, held) for known, held in self._lanes if known is not lanes]
        try:
            lanes.release()
        except Exception as error:  # out of memory, say
            _log.exception("lanes could not be handed back")
            for session in rows:
                session.failed = f"what it read in a batch could not be handed back: {error}"
