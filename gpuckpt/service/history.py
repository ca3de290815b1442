"""The last things that happened, and those who follow them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator

from gpuckpt.pool.book import Event
from gpuckpt.service.view import EventView

_KEPT = 1000
_BEHIND = 2000  # events that a follower may be behind, before it is cut off


class History:
    """Events, numbered from 1."""

    def __init__(self) -> None:
        self._events: deque[EventView] = deque(maxlen=_KEPT)
        self._followers: set[asyncio.Queue[EventView | None]] = set()
        self._seq = 0
        self._closed = False

    def add(self, event: Event) -> EventView:
        """Note an event; returns it as it is shown."""
        self._seq += 1
        view = EventView(
            seq=self._seq,
            time=event.time,
            kind=event.kind,
            model=event.model,
            replica=event.replica,
            reason=event.reason,
            tier=event.tier,
            seconds=event.seconds,
            phases=event.phases,
        )
        self._events.append(view)
        for follower in list(self._followers):
            try:
                follower.put_nowait(view)
            except asyncio.QueueFull:
                self._followers.discard(follower)
        return view

    def last(self, limit: int = _KEPT, *, after: int = 0, model: str | None = None) -> list[EventView]:
        """The last ``limit`` of those behind number ``after``, the oldest first."""
        found = [one for one in self._events if one.seq > after and model in (None, one.model)]
        return found[-limit:] if limit else []

    async def follow(
        self, heartbeat: float, *, after: int | None = None, limit: int = _KEPT, model: str | None = None
    ) -> AsyncGenerator[EventView | None, None]:
        """None, as soon as nothing can be missed any more; with ``after`` what :meth:`last` gives then; and what
        happens from then on. None again when nothing has for ``heartbeat`` seconds.

        Ends for one who is far behind, and when the history is closed.
        """
        if self._closed:
            return
        queue: asyncio.Queue[EventView | None] = asyncio.Queue(_BEHIND)
        self._followers.add(queue)
        past = [] if after is None else self.last(limit, after=after, model=model)
        try:
            yield None
            for one in past:
                yield one
            while queue in self._followers or not queue.empty():
                try:
                    async with asyncio.timeout(heartbeat):
                        found = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if found is None:
                    return
                if model in (None, found.model):
                    yield found
        finally:
            self._followers.discard(queue)

    def close(self) -> None:
        """Nothing more will happen: those who follow have all of it."""
        self._closed = True
        for follower in list(self._followers):
            self._followers.discard(follower)
            with contextlib.suppress(asyncio.QueueFull):
                follower.put_nowait(None)
