"""The engine: one thread that owns the model, the sessions and all that changes them.

Other threads hand it functions (:meth:`Engine.do`) and get futures; between two layers it calls what has come. So there
are no locks, and a function that it calls sees sessions that nothing else is changing.
"""

from __future__ import annotations

import copy
import logging
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from .. import lifecycle
from ..checkpoint import Ring
from ..control import ControlError
from ..flat import FlatError
from . import sampling
from .breakpoints import Breakpoint, Condition
from .errors import EngineError, conflict, full, missing
from .memory import Budgets, SessionMemory
from .model import Loaded
from .sampling import Sampling
from .scheduler import Scheduler
from .session import Pause, Session, Sink, State, Turn
from .sleep import Asleep, Sleep
from .steering import Edit, apply
from .text import TextStream

_log = logging.getLogger("gpuckpt_guest")
_Result = TypeVar("_Result")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST = 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
NAME_RULE = "letters, digits, '.', '_' and '-', at most 64, the first a letter or digit"


@dataclass(frozen=True, slots=True)
class Request:
    """What a generation is to do. ``read`` are the tokens to read first; the unread ones of the session come before."""

    read: Sequence[int] = ()
    max_tokens: int = 16
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_stops: bool = False
    top_scores: int | None = None
    keep_logits: bool = False
    chat: bool = False  # what is written is an answer to the session's messages


@dataclass(frozen=True, slots=True)
class Variant:
    """How a branch differs from its parent: edits at the breakpoint, standing edits, sampling."""

    id: str | None = None
    edits: tuple[Edit, ...] = ()
    standing: tuple[Edit, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)  # what differs of the parent's
    seed: int | None = None
    max_tokens: int | None = None


class Engine:
    """Sessions of one model. Call :meth:`start`, then :meth:`do` from any thread."""

    def __init__(
        self,
        loaded: Loaded,
        *,
        budgets: Budgets | None = None,
        ring_bytes: int = 64 << 20,
        max_batch: int = 64,
        max_sessions: int = 4096,
    ) -> None:
        """Raises ValueError or OSError if the memory that ``budgets`` asks for cannot be had."""
        self.ring = Ring(ring_bytes, loaded.device)
        self.max_sessions = max_sessions
        self.sessions: dict[str, Session] = {}
        self.vectors: dict[str, Any] = {}
        self.fault = ""
        self._commands: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gpuckpt-engine", daemon=True)
        self._numbers = 0
        self._leaving: set[Session] = set()
        self._listeners: list[Callable[[lifecycle.Identity], object]] = []
        self.memory = SessionMemory(
            loaded, budgets or Budgets(), self.sessions.values, lambda: self._commands.put((self._poll, Future()))
        )
        # What memory cannot hold is as much too long as what the model cannot read.
        self.loaded = loaded = replace(loaded, limit=self.memory.arena.limit)
        self.scheduler = Scheduler(
            loaded, self.ring, self.memory.batches, self.memory.residency, max_batch=max_batch, ended=self._ended
        )
        self.sleep = Sleep(self)
        self.on_restore(self.memory.residency.renew)

    def on_restore(self, work: Callable[[], object]) -> None:
        """Have the engine's thread call ``work`` when the process finds that it has been restored."""
        self._listeners.append(lifecycle.on_restore(lambda _: self.do(work)))

    # ------------------------------------------------------------------ the thread

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """End between two layers; what is running is lost."""
        for listener in self._listeners:
            lifecycle.forget(listener)
        self._commands.put(None)
        self._thread.join()
        self.memory.close()
        self.fault = self.fault or "the engine has been stopped"
        self._refuse()

    def do(self, function: Callable[..., _Result], *args: Any, **kwargs: Any) -> Future[_Result]:
        """Have the engine's thread call ``function``, between two layers."""
        future: Future[_Result] = Future()
        if self.fault:
            future.set_exception(EngineError(self.fault, status=503, code="engine_stopped"))
        else:
            self._commands.put((lambda: function(*args, **kwargs), future))
            if self.fault:  # it stopped in this moment: nobody else would answer
                self._refuse()
        return future

    def _run(self) -> None:
        with torch.inference_mode():
            try:
                if self.loaded.device.type == "cuda":
                    torch.cuda.set_device(self.loaded.device)  # a thread begins on the first one
                while self._obey():
                    if self._busy:
                        self.memory.worked()
                        self.scheduler.run()
                    if self.scheduler.done:
                        self.scheduler.rest()
            except BaseException as error:
                # A fault of the engine itself: better no answer than a wrong one.
                self.fault = f"the engine has stopped: {error}"
                _log.exception("the engine has stopped")
                self._refuse()
                raise

    @property
    def _busy(self) -> bool:
        return self.scheduler.busy and not self.sleep.asleep

    def _obey(self) -> bool:
        """Call what has come; waits if there is nothing else to do. False: stop."""
        while True:
            try:
                busy = self._busy
                # Asleep, nothing is due: what would be done by itself may need a pass.
                due = None if busy or self.sleep.asleep else self.memory.next_time()
                command = self._commands.get(not busy, due)
            except queue.Empty:
                if not busy:
                    self._poll()
                    if self.scheduler.done:
                        self.memory.rest()
                return True
            if command is None:
                return False
            function, future = command
            if future.set_running_or_notify_cancel():
                self.call(function, future)

    def call(self, function: Callable[[], Any], future: Future[Any]) -> None:
        """Call a function on the engine's thread, and tell what came of it; one that needs weights may be held."""
        try:
            future.set_result(function())
        except Asleep:
            self.sleep.held.append((function, future))
        except (EngineError, ControlError, FlatError) as error:
            future.set_exception(error)
        except Exception as error:
            _log.exception("a request failed")
            future.set_exception(error)
        self.scheduler.look()

    def _poll(self) -> None:
        """Caches have come or gone, or it is time that one does."""
        for session, error in self.memory.poll():
            if self.scheduler.recompute(session):
                self.memory.again()  # it is there, as far as who waits for it is concerned
            else:
                self.memory.fail(session, error)
                self.scheduler.refuse(session)
        self.scheduler.look()

    def _refuse(self) -> None:
        for session in list(self.sessions.values()):
            if session.turn and not session.turn.reason:
                session.turn.reason, session.turn.error = "error", self.fault
                session.emit({"type": "done", "reason": "error", "error": self.fault, "tokens": 0})
        stopped = EngineError(self.fault, status=503, code="engine_stopped")
        while self.sleep.held:
            self.sleep.held.pop()[1].set_exception(stopped)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command and command[1].set_running_or_notify_cancel():
                command[1].set_exception(stopped)

    # ------------------------------------------------------------------ sessions

    def session(self, name: str) -> Session:
        """The session of that name."""
        found = self.sessions.get(name)
        if found is None or found in self._leaving:
            raise missing("session", name)
        return found

    def create(
        self, name: str | None = None, *, edits: Sequence[Edit] = (), seed: int | None = None, ephemeral: bool = False
    ) -> Session:
        """A new session that has read nothing."""
        lifecycle.check()
        name = self._free(name)
        self._numbers += 1
        made = Session(
            id=name,
            cache=self.loaded.blueprint.session(self.memory.arena),
            random=sampling.generator(seed),
            number=self._numbers,
            ephemeral=ephemeral,
        )
        for edit in edits:
            self._rule(made, edit)
        self.sessions[name] = made
        return made

    def _free(self, name: str | None) -> str:
        if len(self.sessions) >= self.max_sessions:
            raise EngineError(
                f"there are {len(self.sessions)} sessions already, the most that are allowed; delete some",
                status=429,
                code="too_many_sessions",
            )
        if name is None:
            return f"s-{uuid.uuid4().hex[:12]}"
        if not _NAME.fullmatch(name):
            raise EngineError(f"{name!r} is no name: {NAME_RULE}")
        if name in self.sessions:
            raise EngineError(f"there is a session {name!r} already", status=409, code="name_taken")
        return name

    def delete(self, session: Session) -> None:
        """Remove a session in whatever state; what it was generating ends as cancelled."""
        if not self.scheduler.drop(session) and session.turn:
            session.turn.cancelled = True  # its pass lands first
            self._leaving.add(session)
            return
        self._remove(session)

    def _remove(self, session: Session) -> None:
        self.scheduler.batches.settle(session)
        self.scheduler.passes.drop_pause(session)
        if session.turn:
            session.turn.reason = "cancelled"
            session.emit({"type": "done", "reason": "cancelled", "tokens": len(session.turn.generated)})
            session.turn = None
        self.memory.forget(session)
        session.emit({"type": "deleted"})
        self.sessions.pop(session.id, None)
        self._leaving.discard(session)

    def _ended(self, session: Session) -> None:
        if session in self._leaving or session.ephemeral:
            self._remove(session)

    # ------------------------------------------------------------------ generating

    def generate(self, session: Session, request: Request, sink: Sink | None = None) -> Turn:
        """Begin a generation; its events go to ``sink``."""
        self._can_work(session)
        if session.turn:
            raise conflict(f"session {session.id} is {session.state} in a generation; resume or delete it first")
        lifecycle.check()
        tokens = [*session.unread, *request.read]
        if not tokens:
            raise EngineError("there is nothing to read: give a prompt")
        bad = next((token for token in request.read if not 0 <= token < self.loaded.vocabulary), None)
        if bad is not None:
            raise EngineError(f"there is no token {bad}: the vocabulary has {self.loaded.vocabulary}")
        total = session.length + len(tokens)
        if total >= self.loaded.limit:
            raise EngineError(
                f"{total} tokens leave no room in the {self.loaded.limit} that a session can have", code="too_long"
            )
        if request.max_tokens < 1:
            raise EngineError("max_tokens must be at least 1")
        if request.seed is not None:
            session.random = sampling.generator(request.seed)
        session.tokens.extend(request.read)
        session.turn = Turn(
            sampling=request.sampling,
            max_tokens=request.max_tokens,
            text=TextStream(self.loaded.tokenizer, request.stops),
            top_scores=request.top_scores,
            ignore_stops=request.ignore_stops,
            stop_tokens=self.loaded.stops | request.stop_tokens,
            keep_logits=request.keep_logits,
            chat=request.chat,
            prompt_tokens=len(tokens),
            sinks=[sink] if sink else [],
        )
        self.scheduler.ready(session)
        return session.turn

    def cancel(self, session: Session) -> None:
        """End the generation; what was read and written stays. Of a paused one, the pass is given up or finished."""
        turn = session.turn
        if turn is None:
            return
        if session.halfway and self.loaded.blueprint.recurrent:
            turn.cancelled = True  # its state is half-way: the pass must land
            if session.pause:
                self.wake(session)
                self.scheduler.resume([session])
        elif self.scheduler.drop(session):
            self.scheduler.passes.drop_pause(session)
            session.cache.abandon()
            self.scheduler.passes.end(session, turn, "cancelled")
        else:
            turn.cancelled = True

    def pause(self, session: Session, layer: int | None = None) -> str:
        """Have a running generation stop after its next layer, or after ``layer``; returns the breakpoint's id."""
        self._can_work(session)
        if session.turn is None:
            raise conflict(f"session {session.id} is {session.state}: there is nothing to pause")
        name = self.stop_at(session, layer=layer, once=True)
        session.turn.asked.append(session.breakpoints[name])
        return name

    def stop_at(self, session: Session, *, name: str | None = None, **what: Any) -> str:
        """Add a breakpoint; the arguments are :class:`Breakpoint`'s."""
        layers = self.loaded.verdict.layers
        layer = what.get("layer")
        if layer is not None and not 0 <= layer <= layers:
            raise EngineError(f"there is no layer {layer}: 0 is behind the embeddings, {layers} the last")
        _bounded(session.breakpoints, "breakpoints")
        name = name or f"b{next(n for n in range(1, 10**9) if f'b{n}' not in session.breakpoints)}"
        if name in session.breakpoints:
            raise conflict(f"session {session.id} has a breakpoint {name!r} already")
        session.breakpoints[name] = Breakpoint(id=name, **{"condition": Condition(), **what})
        return name

    def wake(self, session: Session) -> bool:
        """Have a session's cache brought back to the device, if it is not there, and let it be suspended no more.

        It is told "woken" when it has arrived. False: it is there.
        """
        if session.failed:
            raise conflict(f"session {session.id} has failed ({session.failed}); delete it")
        return self.memory.wake(session)

    def resume(self, session: Session, sink: Sink | None = None) -> None:
        """Let a paused session go on, waking it first; a suspended one that is idle is only woken."""
        if session.suspended:
            self.wake(session)
            if not session.pause:
                return
        if not session.pause or not session.turn:
            raise conflict(f"session {session.id} is {session.state}, not paused")
        if sink:
            session.turn.sinks.append(sink)
        session.turn.resumed_ns = time.perf_counter_ns()
        self.scheduler.resume([session])
        session.emit({"type": "resumed"})

    def suspend(self, session: Session, *, durable: bool = False) -> bool:
        """Have an idle or paused session's cache leave the device; it is told "suspended" when it has left.

        ``durable``: when it would outlive the server, too. False: it has left already.
        """
        if session.state is State.RUNNING:
            raise conflict(f"session {session.id} is running; pause it first")
        if session.failed:
            raise conflict(f"session {session.id} has failed: {session.failed}")
        self.scheduler.batches.settle(session)
        if durable and self.memory.keep is None:
            raise EngineError(
                "there is no folder to keep sessions in: start the server with --kv-dir", code="nowhere_to_keep"
            )
        if not self.memory.fits(session, durable=durable):
            raise full(session.id)
        return self.memory.suspend(session, durable=durable)

    def pin(self, session: Session, seconds: float) -> None:
        """Keep a session's cache on the device for so long, and bring it there if it is not; 0: no longer."""
        if session.suspended and seconds:
            raise conflict(f"session {session.id} is suspended; resume it first", "suspended")
        if not self.memory.pin(session, seconds):
            others = ", ".join(sorted(one.id for one in self.memory.residency.pinned() if one is not session))
            what = "pinned sessions would hold more than three quarters of the device's memory for caches"
            raise conflict(f"{what}; pinned are {others or 'no others'}", "too_many_pinned")

    def expect(self, session: Session, seconds: float) -> None:
        """The session's client expects to go on in so many seconds."""
        self.memory.expect(session, seconds)

    def _can_work(self, session: Session) -> None:
        if session.failed:
            raise conflict(f"session {session.id} has failed ({session.failed}); delete it")
        if session.suspended:
            raise conflict(f"session {session.id} is suspended; resume it first", "suspended")

    # ------------------------------------------------------------------ looking and changing

    def activation(self, session: Session) -> Any:
        """The hidden state at the stop, with the edits made there so far, in host memory."""
        pause = self._paused(session)
        state = pause.checkpoint.wait()
        for edit in pause.edits:
            state = apply(edit, state, self.loaded.verdict.layout, pause.position)
        return state

    def set_activation(self, session: Session, tensor: Any) -> None:
        """Put a tensor in the place of the hidden state; it must have its shape and type, and be finite."""
        pause = self._paused(session)
        held = pause.checkpoint
        if tuple(tensor.shape) != held.shape:
            raise EngineError(f"the activation has the shape {list(held.shape)}, not {list(tensor.shape)}")
        if tensor.dtype != held.dtype:
            raise EngineError(f"the activation is {_dtype(held.dtype)}, not {_dtype(tensor.dtype)}")
        if not bool(tensor.isfinite().all()):
            raise EngineError("the activation has values that are not finite numbers")
        self.ring.release(held)
        pause.checkpoint = self.ring.adopt(tensor)
        pause.edits.clear()
        pause.replaced = True

    def steer(self, session: Session, edits: Sequence[Edit], *, standing: bool) -> list[str]:
        """Edit the activation at the stop once, or add standing rules; returns the rules' ids."""
        if session.failed:
            raise conflict(f"session {session.id} has failed ({session.failed})")
        for edit in edits:
            self._check(edit)
        if standing:
            return [self._rule(session, edit) for edit in edits]
        pause = self._paused(session)
        for edit in edits:
            if edit.layer != pause.layer:
                raise conflict(
                    f"session {session.id} has stopped after layer {pause.layer}, not {edit.layer};"
                    " make the edit a standing one to have it made there"
                )
        pause.edits.extend(edits)
        return []

    def _rule(self, session: Session, edit: Edit) -> str:
        self._check(edit)
        _bounded(session.edits, "standing rules")
        name = edit.name or f"r{next(n for n in range(1, 10**9) if f'r{n}' not in session.edits)}"
        session.edits[name] = replace(edit, name=name)
        return name

    def _check(self, edit: Edit) -> None:
        layers = self.loaded.verdict.layers
        if not 0 <= edit.layer <= layers:
            raise EngineError(f"there is no layer {edit.layer}: 0 is behind the embeddings, {layers} the last")
        if edit.vector is not None and edit.vector.shape != (self.loaded.features,):
            raise EngineError(f"a vector has {self.loaded.features} numbers, not {list(edit.vector.shape)}")
        if edit.kind != "scale" and edit.vector is None:
            raise EngineError(f"an edit of the kind {edit.kind} needs a vector")
        if edit.kind == "project" and not float(edit.vector.float().norm()) > 0:
            raise EngineError("a vector of length 0 has no direction to project out")

    def lens(self, session: Session, top: int) -> list[tuple[int, float]]:
        """The most likely next tokens by the model's own head on the hidden state at the stop: (id, probability)."""
        pause = self._paused(session)
        if session.suspended:
            raise conflict(f"session {session.id} is suspended; resume it first", "suspended")
        self.sleep.awake()
        state = self.activation(session).to(self.loaded.device)
        stepper = self.loaded.stepper
        ids = torch.tensor([session.unread[: pause.tokens]], device=self.loaded.device)
        forward = stepper.begin(stepper.inputs(ids, past=[session.cache.length]), session.cache)
        shares = stepper.head(forward, state)[0, -1].float().softmax(-1)
        if not bool(shares.isfinite().all()):
            raise conflict("the logits are not finite numbers: the activation has been edited too strongly")
        values, tokens = shares.topk(min(top, shares.numel()))
        return list(zip(tokens.tolist(), values.tolist(), strict=True))

    def _paused(self, session: Session) -> Pause:
        if session.pause is None:
            raise conflict(f"session {session.id} is {session.state}, not paused")
        return session.pause

    def store_vector(self, name: str, vector: Any) -> None:
        """Keep a vector for edits to name."""
        if not _NAME.fullmatch(name):
            raise EngineError(f"{name!r} is no name: {NAME_RULE}")
        if tuple(vector.shape) != (self.loaded.features,):
            raise EngineError(f"a vector has {self.loaded.features} numbers, not {list(vector.shape)}")
        # Floats of eight bits have no arithmetic of their own, not even a test for finiteness.
        if vector.dtype not in FLOATS or not bool(vector.isfinite().all()):
            raise EngineError("a vector is made of finite floating-point numbers of 16, 32 or 64 bits")
        self.vectors[name] = vector.clone()

    # ------------------------------------------------------------------ branching

    def branch(
        self, parent: Session, variants: Sequence[Variant], *, resume: bool, sinks: Sequence[Sink | None] = ()
    ) -> list[Session]:
        """Make a session for each variant from where ``parent`` has stopped, or from its end if it is idle.

        They share what it has read, in memory too, and go their own ways, without its breakpoints. With ``resume`` the
        rest of the pass is run for all of them as one batch; else they are paused where the parent is.
        """
        self._can_work(parent)
        if parent.state is State.RUNNING:
            raise conflict(f"session {parent.id} is running; pause it first")
        if len(self.sessions) + len(variants) > self.max_sessions:
            raise EngineError("that would be too many sessions", status=429, code="too_many_sessions")
        names = [variant.id for variant in variants if variant.id is not None]
        if len(set(names)) != len(names):
            raise EngineError("two variants have the same id")
        for name in names:
            self._free(name)
        for variant in variants:
            for edit in (*variant.edits, *variant.standing):
                self._check(edit)
            if parent.turn is None and (variant.sampling or variant.max_tokens):
                raise conflict(
                    f"session {parent.id} is idle: sampling and max_tokens are given when a branch generates"
                )
            if variant.edits and (parent.pause is None or any(e.layer != parent.pause.layer for e in variant.edits)):
                raise conflict("edits of a variant are for the layer after which the parent has stopped")
        self.scheduler.batches.settle(parent)
        made = [self._child(parent, variant) for variant in variants]
        for child, sink in zip(made, sinks, strict=False):
            if sink and child.turn:
                child.turn.sinks.append(sink)
        if resume and parent.pause:
            self.scheduler.resume(made)
        return made

    def _child(self, parent: Session, variant: Variant) -> Session:
        self._numbers += 1
        child = Session(
            id=self._free(variant.id),
            cache=parent.cache.fork(),
            random=sampling.generator(variant.seed if variant.seed is not None else 0),
            number=self._numbers,
            tokens=list(parent.tokens),
            edits=dict(parent.edits),
            parent=parent.id,
            messages=copy.deepcopy(parent.messages),
        )
        if variant.seed is None:
            child.random.set_state(parent.random.get_state())
        if parent.turn:
            child.turn = copy.copy(parent.turn)
            child.turn.text = parent.turn.text.copy()
            child.turn.generated, child.turn.scores = list(parent.turn.generated), list(parent.turn.scores)
            child.turn.sinks = []
            child.turn.asked = []
            child.turn.sampling = replace(parent.turn.sampling, **variant.sampling)
            child.turn.max_tokens = variant.max_tokens or parent.turn.max_tokens
        if parent.pause:
            child.pause = copy.copy(parent.pause)
            child.pause.wire, child.pause.began_ns = (0, 0), time.monotonic_ns()
            child.pause.checkpoint.users += 1
            child.pause.edits = [*parent.pause.edits, *variant.edits]
            child.pause.carried = {name: dict(held) for name, held in parent.pause.carried.items()}
        child.reads = None if parent.reads is None else list(parent.reads)
        child.replay = copy.copy(parent.replay)
        for edit in variant.standing:
            self._rule(child, edit)
        self.sessions[child.id] = child
        return child


def _bounded(held: Mapping[str, object], what: str) -> None:
    # Each costs a look at every boundary between layers.
    if len(held) >= _MOST:
        raise EngineError(f"a session can have {_MOST} {what}")


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
