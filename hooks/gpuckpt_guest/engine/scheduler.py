"""Which layer runs next.

The quantum is one layer. A *flight* is one pass of one or several sessions on its way through the layers; flights take
turns, and those that read one token take every second turn however many long prompts are on their way. All sessions
that are about to read one token fly together; one that becomes ready meanwhile joins when that flight has landed. Short
prompts of one length fly together too: to read the model's weights costs them more than to compute.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from ..checkpoint import Ring
from ..kv.cache import Lanes
from .batches import Batches
from .model import Loaded
from .passes import Flight, LayerCountError, Passes
from .session import Session

# Of prompts that are read together: from about so many tokens on, computing outweighs reading weights, and a layer,
# which is what others wait for, would only take longer.
_TOGETHER = 512

_log = logging.getLogger("gpuckpt_guest")


class Scheduler:
    """Runs the passes of the sessions that have a turn."""

    def __init__(self, loaded: Loaded, ring: Ring, *, max_batch: int, ended: Callable[[Session], None]) -> None:
        self._loaded = loaded
        self._stepper = loaded.stepper
        self._max_batch = max_batch if loaded.verdict.batching else 1
        self.batches = Batches(possible=loaded.verdict.batching)
        self.passes = Passes(loaded, ring, self.batches, ended)
        self._ready: list[Session] = []
        self._short: deque[Flight] = deque()
        self._long: deque[Flight] = deque()
        self._last_long = False
        self.layers_run = 0
        self.largest_batch = 0

    @property
    def busy(self) -> bool:
        """Whether there is something to run."""
        return bool(self._ready or self._short or self._long)

    def ready(self, session: Session) -> None:
        """The session has tokens to read."""
        assert session not in self._ready
        self._ready.append(session)

    def resume(self, sessions: Sequence[Session]) -> None:
        """Let sessions that are stopped at the same place of the same pass go on, in as few batches as may be."""
        for rows in _groups(sessions, self._max_batch):
            pauses = [session.pause for session in rows if session.pause]
            assert len(pauses) == len(rows)
            for session in rows:
                session.pause = None
            self._launch(Flight(rows, pauses[0].tokens, pauses=pauses))

    def drop(self, session: Session) -> bool:
        """Take the session out if that can be done between layers; False: its pass must land first."""
        if session in self._ready:
            self._ready.remove(session)
            return True
        for flights in (self._short, self._long):
            for flight in flights:
                if session in flight.rows:
                    begun = flight.forward is not None or not flight.fresh
                    if len(flight.rows) > 1 or (begun and self._loaded.blueprint.recurrent):
                        return False
                    flights.remove(flight)
                    self._abandon(flight)
                    return True
        return True

    def rest(self) -> None:
        """There is nothing to do: hand back what batches hold."""
        self.batches.keep((), ())

    def run(self) -> None:
        """One quantum: a layer, with the prologue if it is the first, or the head and the choice of tokens."""
        self._admit()
        flights = self._next()
        if flights is None:
            return
        flight = flights.popleft()
        try:
            on = self._advance(flight)
        except LayerCountError:
            raise
        except Exception as error:  # out of memory, say: this pass is lost, the others are not
            _log.exception("a pass failed")
            self._fail(flight, error)
            return
        if on is flight:
            flights.append(flight)
        elif on is not None:
            self._launch(on)

    # ------------------------------------------------------------------ what flies

    def _next(self) -> deque[Flight] | None:
        if self._short and self._long:
            self._last_long = not self._last_long
            return self._long if self._last_long else self._short
        return self._short or self._long or None

    def _admit(self) -> None:
        if not self._ready:
            return
        # A recurrent layer that has no state yet cannot share a batch with those that have one.
        unready = self._loaded.blueprint.recurrent
        prompts: dict[tuple[int, int], list[Session]] = {}
        for session in list(self._ready):
            tokens = len(session.unread)
            if tokens > 1 or (unready and not session.cache.length):
                self._ready.remove(session)
                prompts.setdefault((tokens, session.cache.length), []).append(session)
        for (tokens, _), alike in prompts.items():
            for rows in _groups(alike, 1 if unready else min(self._max_batch, _TOGETHER // tokens)):
                self._launch(Flight(rows, tokens))
        if not self._ready or self._short:
            return
        waiting = sorted(self._ready, key=lambda session: session.number)
        self._ready.clear()
        groups = _groups(waiting, self._max_batch)
        self.batches.keep(groups, [flight.cache for flight in self._long])
        for rows in groups:
            self._launch(Flight(rows))

    def _launch(self, flight: Flight) -> None:
        self.largest_batch = max(self.largest_batch, len(flight.rows))
        (self._short if flight.tokens == 1 else self._long).append(flight)

    # ------------------------------------------------------------------ one quantum

    def _advance(self, flight: Flight) -> Flight | None:
        """Returns the flight that goes on, if one does."""
        self._ground(flight)
        if not flight.rows:
            return None
        forward = flight.forward
        if forward is None:
            fresh = flight.fresh
            forward = self.passes.begin(flight)
            if fresh and (on := self.passes.boundary(flight)) is not flight:
                return on
        if forward.layer < len(self._stepper.layers):
            self._stepper.step(forward)
            self.layers_run += 1
            return self.passes.boundary(flight)
        self._ready += self.passes.land(flight)
        return None

    def _ground(self, flight: Flight) -> None:
        """Before it begins, leave out those who have failed since they were admitted."""
        if flight.forward is None and any(session.failed for session in flight.rows):
            failed = [session for session in flight.rows if session.failed]
            if not flight.fresh:
                raise RuntimeError(failed[0].failed)
            flight.rows = [session for session in flight.rows if not session.failed]
            for session in failed:
                if session.turn:
                    session.turn.error = session.failed
                    self.passes.end(session, session.turn, "error")

    # ------------------------------------------------------------------ failure

    def _abandon(self, flight: Flight) -> None:
        self.passes.let_go(flight)
        if isinstance(flight.cache, Lanes):
            self.batches.hand_back(flight.cache)
        for session in flight.rows:
            session.cache.abandon()

    def _fail(self, flight: Flight, error: Exception) -> None:
        # A layer writes its state in place: once one has run, or has begun to, there is no going back.
        begun = flight.forward is not None or not flight.fresh
        self._abandon(flight)
        for session in flight.rows:
            if session.pause:  # it had stopped, before what failed
                continue
            if begun and self._loaded.blueprint.recurrent:
                session.failed = "a pass failed half-way and its recurrent state cannot be put back"
            if session in self._ready:
                self._ready.remove(session)
            if session.turn:
                session.turn.error = f"the pass failed: {error}"
                self.passes.end(session, session.turn, "error")


def _groups(sessions: Sequence[Session], size: int) -> list[list[Session]]:
    size = max(1, size)
    return [list(sessions[first : first + size]) for first in range(0, len(sessions), size)]
