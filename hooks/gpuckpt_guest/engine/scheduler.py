"""Which layer runs next.

The quantum is one layer. A *flight* is one pass of one or several sessions on its way through the layers; flights take
turns, and those that read one token take every second turn however many long prompts are on their way. All sessions
that are about to read one token fly together; one that becomes ready meanwhile joins when that flight has landed.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Ring
from ..kv.cache import Lanes, SessionCache
from . import sampling
from .breakpoints import Breakpoint, Stop
from .model import Loaded
from .probe import batch_inputs, carried
from .session import Pause, Session, Turn
from .steering import apply
from .stepper import Forward

_log = logging.getLogger("gpuckpt_guest")


class LayerCountError(Exception):
    """A pass did not run each layer exactly once: a fault of the engine, never to be passed over."""


@dataclass(slots=True, eq=False)
class Flight:
    """One pass of some sessions. ``start`` is where it begins: at a layer with a hidden state, if it was stopped."""

    rows: list[Session]
    cache: SessionCache | Lanes
    start: tuple[int, Any, int, dict[str, dict[Any, Any]]] | None = None
    forward: Forward | None = None
    tokens: int = 1


class Scheduler:
    """Runs the passes of the sessions that have a turn."""

    def __init__(self, loaded: Loaded, ring: Ring, *, max_batch: int, ended: Callable[[Session], None]) -> None:
        self._loaded = loaded
        self._stepper = loaded.stepper
        self._layout = loaded.verdict.layout
        self._ring = ring
        self._max_batch = max_batch if loaded.verdict.batching else 1
        self._ended = ended
        self._ready: list[Session] = []
        self._short: deque[Flight] = deque()
        self._long: deque[Flight] = deque()
        self._last_long = False
        self._lanes: list[Lanes] = []
        self.layers_run = 0
        self.tokens_sampled = 0
        self.largest_batch = 0

    @property
    def busy(self) -> bool:
        """Whether there is something to run."""
        return bool(self._ready or self._short or self._long)

    def ready(self, session: Session) -> None:
        """The session has tokens to read."""
        self._ready.append(session)

    def resume(self, sessions: Sequence[Session]) -> None:
        """Let sessions that are stopped at the same place of the same pass go on, as one batch."""
        groups = [list(sessions)] if self._max_batch >= len(sessions) else [[session] for session in sessions]
        for rows in groups:
            pauses = [session.pause for session in rows]
            states = []
            for session, pause in zip(rows, pauses, strict=True):
                assert pause is not None
                state, _ = self._ring.restore(pause.checkpoint)
                for edit in pause.edits:
                    state = apply(edit, state, self._layout, pause.position)
                states.append(state)
                session.pause = None
                release(self._ring, pause)
            first = pauses[0]
            assert first is not None
            start = (first.layer, self._layout.join(states), first.executed, first.carried)
            self._launch(Flight(rows, self._cache(rows), start, tokens=first.tokens))

    def drop(self, session: Session) -> bool:
        """Take the session out if that can be done between layers; False: its pass must land first."""
        if session in self._ready:
            self._ready.remove(session)
            return True
        for flights in (self._short, self._long):
            for flight in flights:
                if session in flight.rows:
                    if len(flight.rows) > 1 or self._loaded.blueprint.recurrent:
                        return False
                    flights.remove(flight)
                    self._abandon(flight)
                    return True
        return True

    def settle(self, session: Session) -> None:
        """See to it that the session's own cache holds everything that it has read."""
        for lanes in [lanes for lanes in self._lanes if session.cache in lanes.members]:
            lanes.release()
            self._lanes.remove(lanes)

    def run(self) -> None:
        """One quantum: a layer, with the prologue if it is the first, or the head and the choice of tokens."""
        self._admit()
        flights = self._next()
        if flights is None:
            return
        flight = flights[0]
        flights.rotate(-1)
        try:
            landed = self._advance(flight)
        except LayerCountError:
            raise
        except Exception as error:  # out of memory, say: this pass is lost, the others are not
            _log.exception("a pass failed")
            flights.remove(flight)
            self._fail(flight, error)
            return
        if landed:
            flights.remove(flight)

    # ------------------------------------------------------------------ what flies

    def _next(self) -> deque[Flight] | None:
        if self._short and self._long:
            self._last_long = not self._last_long
            return self._long if self._last_long else self._short
        return self._short or self._long or None

    def _admit(self) -> None:
        if not self._ready:
            if not self._short and not self._long and self._lanes:
                self._keep([])
            return
        singles = [session for session in self._ready if len(session.unread) > 1]
        for session in singles:
            self._ready.remove(session)
            self.settle(session)
            self._launch(Flight([session], self._cache([session]), tokens=len(session.unread)))
        if not self._ready or self._short:
            return
        waiting = sorted(self._ready, key=lambda session: session.number)
        self._ready.clear()
        groups = [waiting[index : index + self._max_batch] for index in range(0, len(waiting), self._max_batch)]
        self._keep(groups)
        for rows in groups:
            self._launch(Flight(rows, self._cache(rows)))

    def _keep(self, groups: Iterable[list[Session]]) -> None:
        """Hand back the lanes of batches that are not made up like this any more."""
        wanted = {tuple(session.cache for session in rows) for rows in groups}
        flying = [flight.cache for flight in (*self._short, *self._long)]
        for lanes in [lanes for lanes in self._lanes if lanes.members not in wanted and lanes not in flying]:
            lanes.release()
            self._lanes.remove(lanes)

    def _cache(self, rows: list[Session]) -> SessionCache | Lanes:
        caches = tuple(session.cache for session in rows)
        if len(caches) == 1 and (caches[0].whole or not self._loaded.verdict.batching):
            return caches[0]
        for lanes in self._lanes:
            if lanes.members == caches:
                return lanes
        for session in rows:
            self.settle(session)
        made = Lanes(caches)
        self._lanes.append(made)
        return made

    def _launch(self, flight: Flight) -> None:
        self.largest_batch = max(self.largest_batch, len(flight.rows))
        (self._short if flight.tokens == 1 else self._long).append(flight)

    # ------------------------------------------------------------------ one quantum

    def _advance(self, flight: Flight) -> bool:
        """Returns whether the flight is over."""
        forward = flight.forward
        if forward is None:
            forward = self._begin(flight)
            if flight.start is None and self._boundary(flight):
                return True
        if forward.layer < len(self._stepper.layers):
            self._stepper.step(forward)
            self.layers_run += 1
            return self._boundary(flight)
        self._land(flight)
        return True

    def _begin(self, flight: Flight) -> Forward:
        ids = [session.unread[: flight.tokens] for session in flight.rows]
        tensor = torch.tensor(ids, device=self._loaded.device)
        if isinstance(flight.cache, Lanes):
            inputs = batch_inputs(self._stepper, tensor, flight.cache)
        else:
            inputs = self._stepper.inputs(tensor, past=[flight.cache.length])
        forward = self._stepper.begin(inputs, flight.cache)
        if flight.start is not None:
            forward.layer, forward.hidden, forward.executed, given = flight.start
            for name, container in carried(forward):
                container.update(given.get(name, {}))
        else:
            for session in flight.rows:
                session.norms = []
        flight.forward = forward
        return forward

    def _boundary(self, flight: Flight) -> bool:
        """Between two layers: edit, look whether someone wants to stop. Returns whether nobody goes on."""
        if not any(session.edits or session.breakpoints for session in flight.rows):
            return False
        forward = flight.forward
        assert forward is not None
        stopped: list[tuple[int, Breakpoint]] = []
        for row, session in enumerate(flight.rows):
            for edit in session.edits_at(forward.layer):
                self._edit(flight, row, edit, session.cache.length)
            if session.breakpoints and (found := self._stop(flight, row, session)):
                stopped.append((row, found))
        if stopped:
            return self._pause(flight, stopped)
        return False

    def _edit(self, flight: Flight, row: int, edit: Any, position: int) -> None:
        forward = flight.forward
        assert forward is not None
        if len(flight.rows) == 1:
            forward.hidden = apply(edit, forward.hidden, self._layout, position)
            return
        mine = forward.hidden.narrow(self._layout.rows, row, 1)
        changed = apply(edit, mine, self._layout, position)
        if changed is not mine:
            forward.hidden = forward.hidden.clone()
            forward.hidden.narrow(self._layout.rows, row, 1).copy_(changed)

    def _stop(self, flight: Flight, row: int, session: Session) -> Breakpoint | None:
        forward, turn = flight.forward, session.turn
        assert forward is not None and turn is not None
        mine = forward.hidden.narrow(self._layout.rows, row, 1)
        last = self._layout.last(mine)
        session.norms.append((forward.layer, last.float().norm()))
        at = Stop(
            layer=forward.layer,
            step=turn.step,
            position=session.cache.length,
            tokens=flight.tokens,
            last_token=session.unread[flight.tokens - 1],
            norm=lambda: float(session.norms[-1][1]),
            entropy=lambda: sampling.entropy(self._lens(flight, row)),
        )
        for breakpoint in list(session.breakpoints.values()):
            if breakpoint.due(at):
                breakpoint.hits += 1
                if breakpoint.once:
                    del session.breakpoints[breakpoint.id]
                return breakpoint
        return None

    def _lens(self, flight: Flight, row: int) -> Any:
        assert flight.forward is not None
        return self._stepper.head(flight.forward)[row, -1]

    def _pause(self, flight: Flight, stopped: Sequence[tuple[int, Breakpoint]]) -> bool:
        forward = flight.forward
        assert forward is not None
        gone = {row for row, _ in stopped}
        if isinstance(flight.cache, Lanes):
            flight.cache.release()
            self._lanes.remove(flight.cache)
        for row, breakpoint in stopped:
            session = flight.rows[row]
            turn = session.turn
            assert turn is not None
            hidden = forward.hidden
            if len(flight.rows) > 1:
                hidden = self._layout.select(hidden, [row])
            session.pause = Pause(
                layer=forward.layer,
                step=turn.step,
                position=session.cache.length,
                tokens=flight.tokens,
                checkpoint=self._ring.save(hidden),
                breakpoint=breakpoint.id,
                executed=forward.executed,
                carried={name: dict(container) for name, container in carried(forward)},
                norms=[(layer, float(norm)) for layer, norm in session.norms],
                wire=(session.wire_received, session.wire_sent),
            )
            session.emit({"type": "paused", "layer": forward.layer, "step": turn.step, "breakpoint": breakpoint.id})
        rest = [row for row in range(len(flight.rows)) if row not in gone]
        if rest:
            rows = [flight.rows[row] for row in rest]
            hidden = self._layout.select(forward.hidden, rest)
            self._launch(
                Flight(rows, self._cache(rows), (forward.layer, hidden, forward.executed, {}), tokens=flight.tokens)
            )
        return True

    # ------------------------------------------------------------------ the end of a pass

    def _land(self, flight: Flight) -> None:
        forward = flight.forward
        assert forward is not None
        if forward.executed != len(self._stepper.layers):
            raise LayerCountError(f"{forward.executed} of {len(self._stepper.layers)} layers ran in a pass")
        logits = self._stepper.head(forward)
        flight.cache.commit(flight.tokens)
        for row, session in enumerate(flight.rows):
            session.passes += 1
            self._choose(session, logits[row, -1])

    def _choose(self, session: Session, logits: Any) -> None:
        turn = session.turn
        assert turn is not None
        turn.step += 1
        if turn.cancelled:
            self._end(session, turn, "cancelled")
            return
        if not bool(logits.isfinite().all()):
            turn.error = "the logits are not finite numbers; an edit of the activations may be too strong"
            self._end(session, turn, "error")
            return
        if turn.keep_logits:
            turn.logits = logits.to("cpu", torch.float32)
        token = sampling.draw(logits, turn.sampling, session.random)
        self.tokens_sampled += 1
        session.tokens.append(token)
        turn.generated.append(token)
        event: dict[str, Any] = {"type": "token", "token": token, "step": turn.step - 1}
        if turn.top_scores is not None:
            turn.scores.append(sampling.scores(logits, token, turn.top_scores))
            event["scores"] = turn.scores[-1]
        ends = token in turn.stop_tokens and not turn.ignore_stops
        event["text"] = "" if ends else turn.text.add(token)
        reason = ""
        if ends:
            reason, turn.stop = "stop", token
        elif turn.text.stopped is not None:
            reason, turn.stop = "stop", turn.text.stopped
        elif len(turn.generated) >= turn.max_tokens or len(session.tokens) >= self._loaded.limit:
            reason = "length"
        if reason:
            event["text"] += turn.text.finish()
        session.emit(event)
        if reason:
            self._end(session, turn, reason)
        else:
            self._ready.append(session)

    def _end(self, session: Session, turn: Turn, reason: str) -> None:
        turn.reason = reason
        event = {"type": "done", "reason": reason, "tokens": len(turn.generated)}
        if turn.error:
            event["error"] = turn.error
        session.emit(event)
        session.turn = None
        session.turns += 1
        self._ended(session)

    def _abandon(self, flight: Flight) -> None:
        if isinstance(flight.cache, Lanes):
            flight.cache.release()
            if flight.cache in self._lanes:
                self._lanes.remove(flight.cache)
        for session in flight.rows:
            session.cache.abandon()

    def _fail(self, flight: Flight, error: Exception) -> None:
        begun = flight.forward is not None and flight.forward.executed > 0
        self._abandon(flight)
        for session in flight.rows:
            if begun and self._loaded.blueprint.recurrent:
                session.failed = "a pass failed half-way and its recurrent state cannot be put back"
            if session.turn:
                session.turn.error = f"the pass failed: {error}"
                self._end(session, session.turn, "error")


def release(ring: Ring, pause: Pause) -> None:
    """The pause is over: its checkpoint goes, unless a branch still holds it."""
    pause.checkpoint.users -= 1
    if pause.checkpoint.users == 0:
        ring.drop(pause.checkpoint)
