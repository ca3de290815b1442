"""What happens to a pass: its begin, what is done between two layers, its end."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoint import Ring
from ..kv.cache import SessionCache
from ..kv.lanes import Lanes
from . import sampling
from .batches import Batches
from .breakpoints import Breakpoint, Stop
from .model import Loaded
from .probe import batch_inputs, carried
from .session import Pause, Session, Turn
from .steering import Edit, apply
from .stepper import Forward

_log = logging.getLogger("gpuckpt_guest")
# So many stopped passes keep their prologue: the arguments of the layers, which may hold masks and tables.
_KEPT = 16


class LayerCountError(Exception):
    """A pass did not run each layer exactly once: a fault of the engine, never to be passed over."""


@dataclass(slots=True, eq=False)
class Flight:
    """One pass of some sessions on its way through the layers.

    One that goes on has the ``pauses`` of its rows, or the hidden state and layer of the batch that it was a part of.
    """

    rows: list[Session]
    tokens: int = 1
    pauses: list[Pause] = field(default_factory=list)
    split: tuple[int, Any] | None = None
    seconds: float = 0.0  # that it has computed
    cache: SessionCache | Lanes | None = None
    forward: Forward | None = None
    coming: bool = False  # its cache is still arriving
    again: bool = False  # it was run before, and its cache was dropped: all that it gives is keys and values
    fresh: bool = field(init=False)  # it begins with the first layer

    def __post_init__(self) -> None:
        self.fresh = not self.pauses and self.split is None


class Passes:
    """Begins, edits, stops and ends passes."""

    def __init__(self, loaded: Loaded, ring: Ring, batches: Batches, ended: Callable[[Session], None]) -> None:
        self._loaded = loaded
        self._stepper = loaded.stepper
        self._layout = loaded.verdict.layout
        self._ring = ring
        self._batches = batches
        self._ended = ended
        # On a GPU none: while it is stopped a pass holds no memory there but its keys and values.
        self._kept_most = _KEPT if loaded.device.type == "cpu" else 0
        self._kept: OrderedDict[Pause, Forward] = OrderedDict()
        self.tokens_sampled = 0

    # ------------------------------------------------------------------ begin

    def begin(self, flight: Flight) -> Forward:
        """The prologue, and where the pass goes on, the hidden state that it stopped with."""
        cache = flight.cache = self._batches.cache(flight.rows, flight.tokens)
        forward = self._prologue(flight, cache)
        if flight.split is not None:
            forward.layer, forward.hidden = flight.split
            forward.executed = forward.layer
        elif flight.pauses:
            self._take_up(flight, forward)
        else:
            for session in flight.rows:
                session.norms = []
        flight.forward = forward
        return forward

    def _prologue(self, flight: Flight, cache: SessionCache | Lanes) -> Forward:
        if len(flight.pauses) == 1:
            kept = self._kept.pop(flight.pauses[0], None)
            if kept is not None and kept.cache is cache:
                return kept
        ids = torch.tensor([session.ahead[: flight.tokens] for session in flight.rows], device=self._loaded.device)
        if isinstance(cache, Lanes):
            inputs = batch_inputs(self._stepper, ids, cache)
        else:
            inputs = self._stepper.inputs(ids, past=[cache.length])
        return self._stepper.begin(inputs, cache)

    def _take_up(self, flight: Flight, forward: Forward) -> None:
        states = []
        for session, pause in zip(flight.rows, flight.pauses, strict=True):
            state, restore_us = self._ring.restore(pause.checkpoint)
            for edit in pause.edits:
                state = apply(edit, state, self._layout, pause.position)
            if pause.edits or pause.replaced:
                session.reads = None
            states.append(state)
            if session.turn:
                session.turn.restore_us = restore_us
        first = flight.pauses[0]
        forward.layer, forward.executed = first.layer, first.executed
        forward.hidden = self._layout.join(states)
        for name, container in carried(forward):
            for key, values in first.carried.get(name, {}).items():
                container[key] = tuple(value.to(self._loaded.device) for value in values)
        self.let_go(flight)

    def let_go(self, flight: Flight) -> None:
        """The pauses that the flight went on from are over."""
        for pause in flight.pauses:
            self._release(pause)
        flight.pauses = []

    def drop_pause(self, session: Session) -> None:
        """Forget where the session has stopped, if it has."""
        if session.pause:
            self._release(session.pause)
            session.pause = None

    def drop_onward(self, session: Session) -> None:
        """Forget from where it was to go on, if it waits for that."""
        if session.onward:
            self._release(session.onward)
            session.onward = None

    def _release(self, pause: Pause) -> None:
        self._kept.pop(pause, None)
        self._ring.release(pause.checkpoint)

    # ------------------------------------------------------------------ between two layers

    def boundary(self, flight: Flight) -> Flight | None:
        """Edit, and stop who is to stop; returns the flight that goes on: itself, one of the others, or none."""
        if flight.again or not any(session.edits or session.breakpoints for session in flight.rows):
            return flight
        forward = flight.forward
        assert forward is not None
        look = _Lens(self._stepper, forward)
        stopped: dict[int, Breakpoint] = {}
        for row, session in enumerate(flight.rows):
            for edit in session.edits_at(forward.layer):
                self._edit(flight, row, edit, session.cache.length)
            turn = session.turn
            # One that is to end stops no more: it would have to be resumed to end.
            if not turn or turn.cancelled or not session.breakpoints:
                continue
            where = (forward.layer, turn.step, session.cache.length, flight.tokens)
            # Where none can be hit in this pass any more, nothing is looked at.
            if any(breakpoint.ahead(*where) for breakpoint in session.breakpoints.values()):
                found = self._stop(flight, row, session, turn, look)
                if found is not None:
                    stopped[row] = found
        return self._pause(flight, stopped) if stopped else flight

    def _edit(self, flight: Flight, row: int, edit: Edit, position: int) -> None:
        forward = flight.forward
        flight.rows[row].reads = None
        assert forward is not None
        if len(flight.rows) == 1:
            forward.hidden = apply(edit, forward.hidden, self._layout, position)
            return
        mine = forward.hidden.narrow(self._layout.rows, row, 1)
        changed = apply(edit, mine, self._layout, position)
        if changed is not mine:
            forward.hidden = forward.hidden.clone()
            forward.hidden.narrow(self._layout.rows, row, 1).copy_(changed)

    def _stop(self, flight: Flight, row: int, session: Session, turn: Turn, look: _Lens) -> Breakpoint | None:
        forward = flight.forward
        assert forward is not None
        # Its length is for later: most looks end in no stop, and a copy is cheaper than a norm.
        last = self._layout.token(forward.hidden, row)
        session.norms.append((forward.layer, last))
        at = Stop(
            layer=forward.layer,
            step=turn.step,
            position=session.cache.length,
            tokens=flight.tokens,
            last_token=session.unread[flight.tokens - 1],
            norm=lambda: float(last.float().norm()),
            entropy=lambda: sampling.entropy(look.logits()[row]),
        )
        for breakpoint in list(session.breakpoints.values()):
            if breakpoint.due(at):
                breakpoint.hits += 1
                if breakpoint.once:
                    del session.breakpoints[breakpoint.id]
                return breakpoint
        return None

    def _pause(self, flight: Flight, stopped: dict[int, Breakpoint]) -> Flight | None:
        forward = flight.forward
        assert forward is not None
        if isinstance(flight.cache, Lanes):
            self._batches.hand_back(flight.cache)
        for row, breakpoint in stopped.items():
            session = flight.rows[row]
            turn = session.turn
            assert turn is not None
            hidden = forward.hidden if len(flight.rows) == 1 else self._layout.select(forward.hidden, [row])
            session.norms = _measured(session.norms)
            session.pause = Pause(
                layer=forward.layer,
                step=turn.step,
                position=session.cache.length,
                tokens=flight.tokens,
                checkpoint=self._ring.save(hidden),
                breakpoint=breakpoint.id,
                executed=forward.executed,
                carried={name: _kept(container) for name, container in carried(forward)},
                norms=list(session.norms),
                wire=(session.wire_received, session.wire_sent),
            )
            if forward.cache is session.cache:
                self._keep(session.pause, forward)
            session.emit({"type": "paused", "layer": forward.layer, "step": turn.step, "breakpoint": breakpoint.id})
        others = [row for row in range(len(flight.rows)) if row not in stopped]
        if not others:
            return None
        rows = [flight.rows[row] for row in others]
        return Flight(rows, flight.tokens, split=(forward.layer, self._layout.select(forward.hidden, others)))

    def _keep(self, pause: Pause, forward: Forward) -> None:
        forward.hidden = None  # that is what the checkpoint is for
        self._kept[pause] = forward
        while len(self._kept) > self._kept_most:
            self._kept.popitem(last=False)

    # ------------------------------------------------------------------ end

    def land(self, flight: Flight) -> list[Session]:
        """Logits, and a token for each session; returns those that go on."""
        forward, cache = flight.forward, flight.cache
        assert forward is not None and cache is not None
        if forward.executed != len(self._stepper.layers):
            raise LayerCountError(f"{forward.executed} of {len(self._stepper.layers)} layers ran in a pass")
        if flight.again:
            (session,) = flight.rows
            cache.commit(session.replay.popleft())
            if not session.replay:
                session.came, session.worked = time.monotonic(), 0.0
            if session.turn and session.turn.cancelled:
                self.end(session, session.turn, "cancelled")
                return []
            return [session]
        logits = self._stepper.head(forward)[:, -1]
        # Asked for all rows at once: on a GPU each question waits for the device. A sum is finite where all is, and
        # on a CPU ten times cheaper than looking at each.
        finite = logits.sum(-1, dtype=torch.float32).isfinite().tolist()
        greedy = logits.argmax(-1).tolist()
        cache.commit(flight.tokens)
        on = []
        for row, session in enumerate(flight.rows):
            session.passes += 1
            if len(flight.rows) > 1:
                session.reads = None
            elif session.reads is not None:
                session.reads.append(flight.tokens)
            turn = session.turn
            assert turn is not None
            try:
                if not finite[row]:
                    self._undo(session, flight)
                    raise ValueError("the logits are not finite numbers; an edit of the activations may be too strong")
                if self._choose(session, turn, logits[row], greedy[row]):
                    on.append(session)
            except Exception as error:  # of this row's own settings: the others have their tokens
                if not isinstance(error, ValueError):
                    _log.exception("choosing a token failed")
                turn.error = str(error)
                self.end(session, turn, "error")
        return on

    def _undo(self, session: Session, flight: Flight) -> None:
        """Take back a pass whose numbers went wrong: its keys and values would spoil all that comes."""
        if self._loaded.blueprint.recurrent:
            session.failed = "a pass had numbers that are not finite, and its recurrent state cannot be put back"
            return
        self._batches.settle(session)
        session.cache.uncommit(flight.tokens)
        if session.reads:
            session.reads.pop()

    def _choose(self, session: Session, turn: Turn, logits: Any, greedy: int) -> bool:
        turn.step += 1
        if turn.cancelled:
            self.end(session, turn, "cancelled")
            return False
        if turn.keep_logits:
            turn.logits = logits.to("cpu", torch.float32)
        token = greedy if turn.sampling.temperature == 0 else sampling.draw(logits, turn.sampling, session.random)
        self.tokens_sampled += 1
        session.tokens.append(token)
        turn.generated.append(token)
        if turn.resumed_ns:
            turn.token_us, turn.resumed_ns = (time.perf_counter_ns() - turn.resumed_ns) / 1000, 0
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
            self.end(session, turn, reason)
        return not reason

    def end(self, session: Session, turn: Turn, reason: str) -> None:
        """The generation is over."""
        turn.reason = reason
        event = {"type": "done", "reason": reason, "tokens": len(turn.generated)}
        if turn.error:
            event["error"] = turn.error
        # A pause that was asked for and came too late is not for the next generation.
        for asked in turn.asked:
            # One that was hit is gone, and its name may be another's by now.
            if session.breakpoints.get(asked.id) is asked:
                del session.breakpoints[asked.id]
        if turn.chat:
            session.messages.append({"role": "assistant", "content": turn.text.text})
        session.emit(event)
        session.text, session.written = turn.text.text, len(turn.generated)
        session.turn = None
        session.turns += 1
        self._ended(session)


def _kept(container: Any) -> dict[Any, Any]:
    """What layers have handed on, in host memory: it may be a part of the cache, which can leave while a pass stops."""
    return {key: tuple(value.detach().to("cpu", copy=True) for value in values) for key, values in container.items()}


def _measured(norms: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """Lengths in the place of states: a session that has stopped holds no activations on the device."""
    states = [state for _, state in norms if state.dim()]
    if not states:
        return norms
    lengths = iter(torch.stack(states).float().norm(dim=-1).unbind())
    return [(layer, next(lengths) if state.dim() else state) for layer, state in norms]


class _Lens:
    """The logits that the model's head sees between two layers, computed once for all rows, if anybody asks."""

    def __init__(self, stepper: Any, forward: Forward) -> None:
        self._stepper = stepper
        self._forward = forward
        self._logits: Any = None

    def logits(self) -> Any:
        if self._logits is None:
            self._logits = self._stepper.head(self._forward)[:, -1]
        return self._logits
