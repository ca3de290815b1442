"""What a session is: plain data, owned by the engine's thread."""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..kv.cache import SessionCache
from .breakpoints import Breakpoint
from .sampling import Sampling, Scores
from .steering import Edit
from .text import TextStream

# What the engine reports: {"type": "token" | "paused" | "resumed" | "done" | …}. Called by the engine's thread.
Event = dict[str, Any]
Sink = Callable[[Event], None]


class State(enum.StrEnum):
    """What a session is doing."""

    IDLE = "idle"
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Turn:
    """One generation of a session: it reads what the session has not read yet, then writes."""

    sampling: Sampling
    max_tokens: int
    text: TextStream
    top_scores: int | None = None  # None: no log-probabilities
    ignore_stops: bool = False
    stop_tokens: frozenset[int] = frozenset()
    keep_logits: bool = False
    chat: bool = False  # the text is an answer to the session's messages
    step: int = 0  # completed passes: 0 while the prompt is read
    prompt_tokens: int = 0
    generated: list[int] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    logits: Any = None  # of the last step, on the host, if they were asked for
    reason: str = ""  # why it ended: stop, length, cancelled, error
    stop: str | int | None = None
    error: str = ""
    cancelled: bool = False
    asked: list[Breakpoint] = field(default_factory=list)  # set to pause it: they end with it
    resumed_ns: int = 0  # when it was last asked to go on, until the token of that pass
    restore_us: float | None = None  # the activation from host memory back to the device
    token_us: float | None = None  # from being asked to go on until the interrupted pass had its token
    sinks: list[Sink] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Pause:
    """A pass that has stopped after ``layer`` layers: what it takes to go on."""

    layer: int
    step: int
    position: int  # of the pass' first token
    tokens: int  # that the pass reads
    checkpoint: Checkpoint
    breakpoint: str
    executed: int
    carried: dict[str, dict[Any, Any]] = field(default_factory=dict)  # what layers handed on, in host memory
    norms: list[tuple[int, Any]] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)  # made when it goes on
    replaced: bool = False  # the activation was uploaded
    began_ns: int = field(default_factory=time.monotonic_ns)
    wire: tuple[int, int] = (0, 0)  # bytes received and sent by this session's requests up to here


def norms(pause: Pause) -> list[tuple[int, float]]:
    """The norm of the last token's hidden state behind each layer that was watched.

    They are read from the device when somebody asks, all at once.
    """
    if pause.norms and isinstance(pause.norms[0][1], torch.Tensor):
        values = torch.stack([value for _, value in pause.norms]).tolist()
        pause.norms = [(layer, value) for (layer, _), value in zip(pause.norms, values, strict=True)]
    return pause.norms


@dataclass(slots=True, eq=False)
class Session:
    """One conversation: its tokens, its cache, and what is to be done to its activations."""

    id: str
    cache: SessionCache
    random: Any
    number: int
    tokens: list[int] = field(default_factory=list)
    edits: dict[str, Edit] = field(default_factory=dict)  # standing rules
    breakpoints: dict[str, Breakpoint] = field(default_factory=dict)
    turn: Turn | None = None
    text: str = ""  # what the generation that ended last has written, in so many tokens
    written: int = 0
    pause: Pause | None = None
    onward: Pause | None = None  # from where it is to go on, as soon as there is room
    parent: str | None = None
    ephemeral: bool = False
    suspended: bool = False
    failed: str = ""
    created: float = field(default_factory=time.time)
    turns: int = 0
    passes: int = 0
    listeners: list[Sink] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    wire_received: int = 0
    wire_sent: int = 0
    # How many tokens each of its passes has read, if each ran alone and nothing was edited: read again like that, they
    # give the same bits. None: they would not.
    reads: list[int] | None = field(default_factory=list)
    replay: deque[int] = field(default_factory=deque)  # passes that are to be run again, the cache having been dropped
    # Seconds of the monotonic clock: when it was last at work, when its cache came to the device, until when it is to
    # stay there, when its client expects to go on.
    used: float = field(default_factory=time.monotonic)
    came: float = field(default_factory=time.monotonic)
    worked: float = 0.0  # seconds that it has computed since then
    pinned: float = 0.0
    expected: float | None = None
    durable: bool = False
    wakes: int = 0  # how often it has been suspended and woken
    # Of the pass at work, if it is watched: by layers, lengths, or states whose lengths nobody has asked for yet.
    norms: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def state(self) -> State:
        """What it is doing."""
        if self.failed:
            return State.FAILED
        if self.suspended:
            return State.SUSPENDED
        if self.pause:
            return State.PAUSED
        return State.RUNNING if self.turn else State.IDLE

    @property
    def halfway(self) -> Pause | None:
        """Where its pass is between two layers, whether it has been asked to go on or not."""
        return self.pause or self.onward

    @property
    def length(self) -> int:
        """How many tokens it has read, those included that are to be read again."""
        return self.cache.length + sum(self.replay)

    @property
    def unread(self) -> list[int]:
        """Tokens that no completed pass has read."""
        return self.tokens[self.length :]

    @property
    def ahead(self) -> list[int]:
        """Tokens that the next passes read: those first whose passes are run again."""
        return self.tokens[self.cache.length :]

    @property
    def next_tokens(self) -> int:
        """How many of them the next pass reads."""
        return self.replay[0] if self.replay else len(self.tokens) - self.cache.length

    def forget_cache(self) -> None:
        """Drop the cache: its passes are run again before the session goes on."""
        assert self.reads is not None
        self.replay = deque(self.reads)
        emptied = self.cache.empty()
        self.cache.close()
        self.cache = emptied

    def edits_at(self, layer: int) -> list[Edit]:
        """Standing rules for the hidden state after ``layer`` layers."""
        return [edit for edit in self.edits.values() if edit.layer == layer]

    def emit(self, event: Event) -> None:
        """Tell those who listen."""
        event["session"] = self.id
        for sink in [*(self.turn.sinks if self.turn else ()), *self.listeners]:
            sink(event)
