"""Which layer runs next.

The quantum is one layer. A *flight* is one pass of one or several sessions on its way through the layers; flights take
turns, and those that read one token take every second turn however many long prompts are on their way. All sessions
that are about to read one token fly together; one that becomes ready meanwhile joins when that flight has landed. Short
prompts of one length fly together too: to read the model's weights costs them more than to compute.

A flight is launched when its sessions have their memory (residency.py). One whose cache is still arriving flies alone,
layer by layer as they come, and others take its turns while it waits.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

from ..checkpoint import Ring
from ..kv.lanes import Lanes
from ..weights import PagedWeights
from .batches import Batches
from .model import Loaded
from .passes import Flight, LayerCountError, Passes
from .residency import Residency
from .session import Session

# Of prompts that are read together: from about so many tokens on, computing outweighs reading weights, and a layer,
# which is what others wait for, would only take longer.
_TOGETHER = 512

_log = logging.getLogger("gpuckpt_guest")


class Scheduler:
    """Runs the passes of the sessions that have a turn."""

    def __init__(
        self,
        loaded: Loaded,
        ring: Ring,
        batches: Batches,
        residency: Residency,
        *,
        max_batch: int,
        ended: Callable[[Session], None],
    ) -> None:
        self._loaded = loaded
        self._stepper = loaded.stepper
        self._max_batch = max_batch if loaded.verdict.batching else 1
        self.batches = batches
        self.residency = residency
        self.passes = Passes(loaded, ring, self.batches, ended)
        self._ready: list[Session] = []
        self._resuming: list[list[Session]] = []  # those of one list have stopped at the same place of the same pass
        self._short: deque[Flight] = deque()
        self._long: deque[Flight] = deque()
        self._last_long = False
        self._news = False  # something has changed since it was last looked who can be admitted
        self._stuck = False  # all flights wait for bytes
        residency.flying = self._flying
        self.layers_run = 0
        self.largest_batch = 0

    @property
    def busy(self) -> bool:
        """Whether there is something to run, or to look at; else it takes :meth:`look` for anything to change."""
        if self._news and (self._ready or self._resuming or self.residency.wanted):
            return True
        return bool(self._short or self._long) and not self._stuck

    @property
    def done(self) -> bool:
        """Whether nobody has anything to run."""
        return not (self._ready or self._resuming or self._short or self._long or self.residency.wanted)

    def look(self) -> None:
        """Something may have changed: there is more memory, say, or bytes have arrived."""
        self._news, self._stuck = True, False

    def ready(self, session: Session) -> None:
        """The session has tokens to read."""
        assert session not in self._ready
        self._ready.append(session)
        self.look()

    def resume(self, sessions: Sequence[Session]) -> None:
        """Let sessions that are stopped at the same place of the same pass go on, in as few batches as may be."""
        for session in sessions:
            session.onward, session.pause = session.pause, None
        self._resuming.append(list(sessions))
        self.look()

    def drop(self, session: Session) -> bool:
        """Take the session out if that can be done between layers; False: its pass must land first."""
        self.look()
        for flights in (self._short, self._long):
            for flight in list(flights):
                if session in flight.rows:
                    begun = flight.forward is not None or not flight.fresh
                    if len(flight.rows) > 1 or (begun and self._loaded.blueprint.recurrent):
                        return False
                    flights.remove(flight)
                    self._abandon(flight)
        if session in self._ready:
            self._ready.remove(session)
        for rows in self._resuming:
            if session in rows:
                rows.remove(session)
        self.passes.drop_onward(session)
        self.residency.forget(session)
        return True

    def rest(self) -> None:
        """There is nothing to do: hand back what batches hold."""
        self.batches.keep((), ())

    def run(self) -> None:
        """One quantum: a layer, with the prologue if it is the first, or the head and the choice of tokens."""
        if self._news:
            self._news = False
            self._admit()
            if self.residency.freed:
                self.residency.freed, self._news = False, True
        flight = self._next()
        if flight is None:
            self._stuck = True
            return
        began = time.perf_counter()
        try:
            on = self._advance(flight)
        except LayerCountError:
            raise
        except Exception as error:  # out of memory, say: this pass is lost, the others are not
            _log.exception("a pass failed")
            self._fail(flight, error)
            return
        flight.seconds += time.perf_counter() - began
        if on is flight:
            (self._short if flight.tokens == 1 else self._long).append(flight)
        elif on is not None:
            self._launch(on)
        elif len(flight.rows) == 1 and flight.fresh and not flight.rows[0].pause:
            self.residency.measured(flight.tokens, flight.seconds)

    # ------------------------------------------------------------------ what flies

    def _next(self) -> Flight | None:
        """The flight whose turn it is, of those whose next layer has its bytes."""
        order = (self._short, self._long) if self._last_long else (self._long, self._short)
        if self._stepper.weights is not None:
            return self._nearest(self._stepper.weights, order)
        for flights in order:
            for _ in range(len(flights)):
                flight = flights.popleft()
                if self._has_bytes(flight):
                    self._last_long = flights is self._long
                    return flight
                flights.append(flight)
        return None

    def _nearest(self, weights: PagedWeights, order: Sequence[deque[Flight]]) -> Flight | None:
        """Where weights come in turns all go through the layers together: so each comes once for all of them."""
        able = [(flights, flight) for flights in order for flight in flights if self._has_bytes(flight)]
        if not able:
            return None
        flights, flight = min(able, key=lambda one: weights.ahead(_layer(one[1])))
        flights.remove(flight)
        self._last_long = flights is self._long
        return flight

    def _has_bytes(self, flight: Flight) -> bool:
        layer = _layer(flight)
        pager = self.residency.pager
        return all(
            not session.cache.arrivals or bool(session.failed) or pager.ready(session.cache, layer)
            for session in flight.rows
        )

    def _flying(self) -> Sequence[object]:
        return [flight.cache for flights in (self._short, self._long) for flight in flights]

    def _admit(self) -> None:
        self.residency.fetch_wanted()
        self._admit_stopped()
        if not self._ready:
            return
        # A recurrent layer that has no state yet cannot share a batch with those that have one.
        unready = self._loaded.blueprint.recurrent
        prompts: dict[tuple[int, int], list[Session]] = {}
        for session in list(self._ready):
            tokens = session.next_tokens
            coming = not session.cache.shown or bool(session.cache.arrivals)
            if tokens > 1 or session.replay or coming or (unready and not session.cache.length):
                if not self.residency.admit(session, tokens):
                    continue
                self._ready.remove(session)
                if session.replay or coming or tokens == 1:
                    self._launch(Flight([session], tokens, again=bool(session.replay), coming=coming))
                else:
                    prompts.setdefault((tokens, session.cache.length), []).append(session)
        for (tokens, _), alike in prompts.items():
            for rows in _groups(alike, 1 if unready else min(self._max_batch, _TOGETHER // tokens)):
                self._together(rows, tokens)
        if not self._ready or any(not flight.coming for flight in self._short):
            return
        waiting = sorted((one for one in self._ready if one.next_tokens == 1), key=lambda session: session.number)
        waiting = [session for session in waiting if self.residency.admit(session, 1)]
        for session in waiting:
            self._ready.remove(session)
        groups = _groups(waiting, self._max_batch)
        self.batches.keep(groups, self._flying())
        for rows in groups:
            self._together(rows, 1)

    def _admit_stopped(self) -> None:
        for rows in self._resuming:
            whole = len(rows) > 1
            admitted = [
                session
                for session in rows
                if session.onward and self.residency.admit(session, session.onward.tokens, whole=whole)
            ]
            rows[:] = [session for session in rows if session not in admitted]
            for group in _groups(admitted, self._max_batch):
                tokens = next(session.onward.tokens for session in group if session.onward)
                for some in self._split(group, tokens):
                    pauses = [session.onward for session in some if session.onward]
                    for session in some:
                        session.onward = None
                    self._launch(Flight(some, tokens, pauses=pauses))
        self._resuming = [rows for rows in self._resuming if rows]

    def _split(self, rows: list[Session], tokens: int) -> list[list[Session]]:
        """The sessions together if there is memory for lanes; else each alone."""
        if len(rows) == 1 or self.batches.affordable(rows, tokens):
            return [rows]
        return [[session] for session in rows]

    def _together(self, rows: list[Session], tokens: int) -> None:
        for some in self._split(rows, tokens):
            self._launch(Flight(some, tokens))

    def _launch(self, flight: Flight) -> None:
        self.largest_batch = max(self.largest_batch, len(flight.rows))
        flight.cache = self.batches.cache(flight.rows, flight.tokens)
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
            if fresh and (on := self._boundary(flight)) is not flight:
                return on
        if forward.layer < len(self._stepper.layers):
            self._stepper.step(forward)
            self.layers_run += 1
            return self._boundary(flight)
        rows = list(flight.rows)
        for session in rows:
            session.worked += flight.seconds / len(rows)
        on_their_way = self.passes.land(flight)
        for session in rows:
            self.residency.release(session)
        self._ready += on_their_way
        self.look()
        return None

    def _boundary(self, flight: Flight) -> Flight | None:
        rows = flight.rows
        on = self.passes.boundary(flight)
        if on is not flight:
            for session in rows:
                if session.pause:
                    self.residency.release(session)
            self.look()
        return on

    def _ground(self, flight: Flight) -> None:
        """Before it begins, leave out those who have failed since they were admitted."""
        lost = next((session.failed for session in flight.rows if session.failed), "")
        if lost and (flight.forward is not None or not flight.fresh):
            raise RuntimeError(lost)
        if lost:
            failed = [session for session in flight.rows if session.failed]
            flight.rows = [session for session in flight.rows if not session.failed]
            for session in failed:
                self.residency.forget(session)
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
            self.residency.release(session)
        self.look()

    def _fail(self, flight: Flight, error: Exception) -> None:
        # A layer writes its state in place: once one has run, or has begun to, there is no going back.
        begun = flight.forward is not None or not flight.fresh
        self._abandon(flight)
        for session in flight.rows:
            if session.pause:  # it had stopped, before what failed
                continue
            if begun and self._loaded.blueprint.recurrent:
                session.failed = session.failed or "a pass failed half-way and its recurrent state cannot be put back"
            if session in self._ready:
                self._ready.remove(session)
            if session.turn:
                session.turn.error = f"the pass failed: {error}"
                self.passes.end(session, session.turn, "error")

    def recompute(self, session: Session) -> bool:
        """Have all that it has read computed again, with the same bits; False: that cannot be done."""
        if session.reads is None or session.halfway:
            return False
        if self.residency.granted(session):
            flights = next((held for held in (self._short, self._long) for one in held if session in one.rows), None)
            flight = next((one for one in flights or () if session in one.rows), None)
            if flights is None or flight is None or not flight.fresh or len(flight.rows) > 1:
                return False
            flights.remove(flight)
            self._abandon(flight)
            self._ready.append(session)
        session.forget_cache()
        self.look()
        return True

    def refuse(self, session: Session) -> None:
        """What it has read was lost while it waited to go on: its generation ends."""
        if self.drop(session) and session.turn:
            self.passes.drop_pause(session)
            session.turn.error = session.failed
            self.passes.end(session, session.turn, "error")


def _layer(flight: Flight) -> int:
    """The layer that it runs next; behind the last one, its head."""
    if flight.forward is not None:
        return int(flight.forward.layer)
    if flight.split is not None:
        return flight.split[0]
    return flight.pauses[0].layer if flight.pauses else 0


def _groups(sessions: Sequence[Session], size: int) -> list[list[Session]]:
    size = max(1, size)
    return [list(sessions[first : first + size]) for first in range(0, len(sessions), size)]
