"""An engine with a tiny model in this process, and ways to drive it from a test."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from gpuckpt_guest.engine.engine import Engine, Request
from gpuckpt_guest.engine.errors import EngineError
from gpuckpt_guest.engine.model import Loaded, prepare
from gpuckpt_guest.engine.session import Event, Session, Turn
from gpuckpt_guest.kv.arena import Arena
from gpuckpt_guest.kv.cache import SessionCache
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 199
LAYERS = 4
WAIT = 60.0  # seconds: bounds what hangs, and nothing else
At = tuple[int, Callable[[], Any]]  # how many tokens, and what to do then


class Letters:
    """A tokenizer whose tokens are letters, so that texts can be foreseen."""

    eos_token_id = None
    chat_template = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(0x4E00 + token) for token in ids)


def model(kind: str = "llama", **more: Any) -> Any:
    """A lively tiny model: what it writes depends on all that it read."""
    torch.manual_seed(3)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(config | more))).eval()


def loaded(kind: str = "llama", **more: Any) -> Loaded:
    """The same, probed."""
    return prepare(model(kind, **more), Letters(), name="tiny", identity="tiny")


def cache(of: Loaded) -> SessionCache:
    """An empty cache, in an arena of its own."""
    plan = of.blueprint
    return plan.session(Arena.small(plan.forms, plan.windows, device="cpu", tables=1, limit=64))


class Driver:
    """An engine that runs, and what its sessions report."""

    def __init__(self, of: Loaded, **options: Any) -> None:
        self.loaded = of
        self.engine = Engine(of, ring_bytes=1 << 20, **options)
        self.engine.start()
        self.events: list[Event] = []

    def close(self) -> None:
        self.engine.stop()
        self.loaded.stepper.close()

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.engine.do(function, *args, **kwargs).result(WAIT)

    def new(self, name: str | None = None, **options: Any) -> Session:
        session: Session = self.do(self.engine.create, name, **options)
        return session

    def begin(
        self, session: Session, read: list[int], max_tokens: int = 12, *, at: At | None = None, **options: Any
    ) -> Running:
        running: Running = self.do(self.launch, session, read, max_tokens, at=at, **options)
        return running

    def launch(
        self, session: Session, read: list[int], max_tokens: int = 12, *, at: At | None = None, **options: Any
    ) -> Running:
        """The same for the engine's thread: what it launches without coming back begins together.

        ``at``: once so many tokens have come, in the midst of the next pass, the engine's thread calls the function. A
        test that waited for the token and asked then would often be late on a loaded machine.
        """
        running = Running(self, at)
        request = Request(read=read, max_tokens=max_tokens, ignore_stops=True, **options)
        running.turn = self.engine.generate(session, request, running)
        return running

    def resume(self, session: Session) -> Running:
        running = Running(self)
        running.turn = session.turn
        self.do(self.engine.resume, session, running)
        return running

    def midway(self, function: Callable[[], Any]) -> Future[Any]:
        """Have the engine's thread call it behind the first layer that runs next."""
        called: Future[Any] = Future()
        stepper: Any = self.loaded.stepper
        real = stepper.step

        def ask() -> None:
            try:
                called.set_result(function())
            except Exception as error:
                called.set_exception(error)

        def step(*given: Any) -> None:
            stepper.step = real
            real(*given)
            self.engine.do(ask)

        stepper.step = step
        return called

    def write(self, read: list[int], max_tokens: int = 12, **options: Any) -> list[int]:
        """What a session of its own writes, undisturbed."""
        session = self.new()
        turn = self.begin(session, read, max_tokens, **options).wait("done")
        self.do(self.engine.delete, session)
        return turn.generated

    def plain(self, read: list[int], max_tokens: int = 12) -> list[int]:
        """What the model's own generate writes; not while the engine is at work, for they share the model."""
        assert not self.do(lambda: self.engine.scheduler.busy)
        with torch.inference_mode():
            out = self.loaded.stepper.model.generate(
                torch.tensor([read]), max_new_tokens=max_tokens, min_new_tokens=max_tokens, do_sample=False
            )
        return [int(token) for token in out[0, len(read) :]]


class Running:
    """A generation at work: the sink of its events."""

    turn: Turn

    def __init__(self, driver: Driver, at: At | None = None) -> None:
        self._changed = threading.Condition()
        self.events: list[Event] = []
        self._driver = driver
        self._at = at
        self._called: Future[Any] | None = None

    def __call__(self, event: Event) -> None:
        if self._at and event["type"] == "token" and event["step"] + 1 == self._at[0]:
            self._called = self._driver.midway(self._at[1])
        with self._changed:
            self.events.append(event)
            self._driver.events.append(event)
            self._changed.notify_all()

    def wait(self, kind: str, count: int = 1) -> Turn:
        """Until so many events of that kind have come, and what they tell of is so."""
        with self._changed:
            came = self._changed.wait_for(lambda: sum(e["type"] == kind for e in self.events) >= count, WAIT)
        assert came, f"no {kind!r}; {self.events[-3:]}"
        # The event is told in the midst of a quantum: a session that tells it is done is not idle yet.
        with contextlib.suppress(EngineError):  # it has stopped
            self._driver.do(lambda: None)
        if self._called is not None and kind == "done":
            self._called.result(WAIT)
        return self.turn


def until(driver: Driver, reached: Callable[[], bool]) -> None:
    """Until the engine's thread finds it so."""
    ends = time.monotonic() + WAIT
    while not driver.do(reached):
        assert time.monotonic() < ends, "it does not come"
        time.sleep(0.005)
