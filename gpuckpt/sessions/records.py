"""What goes to the guest and what comes back, field for field as in its OpenAPI document.

Requests leave out what has its default: the guest's defaults hold. Answers take no notice of fields that they do not
know, so that a newer guest is understood.
"""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

Kind = Literal["scale", "add", "set", "project"]
Phase = Literal["any", "prefill", "decode"]
State = Literal["idle", "running", "paused", "suspended", "failed"]


class Edit(Struct, frozen=True, omit_defaults=True):
    """An edit of the hidden state after ``layer`` layers, of the tokens at positions ``first`` <= p < ``last``.

    ``scale`` h·factor; ``add`` h + factor·v; ``set`` factor·v; ``project`` takes factor times h's part along v out.
    ``layer`` None: where the session has stopped. ``vector``: numbers, or the name of a stored one.
    """

    kind: Kind
    layer: int | None = None
    factor: float = 1.0
    vector: tuple[float, ...] | str | None = None
    first: int = 0
    last: int | None = None
    name: str | None = None


class Condition(Struct, frozen=True, omit_defaults=True):
    """What must hold at a stop, all of it: the last token read, the next one's entropy in nats, the norm of h."""

    tokens: tuple[int, ...] | None = None
    entropy_above: float | None = None
    entropy_below: float | None = None
    norm_above: float | None = None
    norm_below: float | None = None


class Breakpoint(Struct, frozen=True, omit_defaults=True):
    """Stop after ``layer`` layers: 0 is behind the embeddings, None after any, several make a breakpoint for each.

    ``step`` counts the passes of one generation (0 reads the prompt), ``position`` the tokens of the session.
    ``once``: it goes when it was hit.
    """

    id: str | None = None
    layer: int | tuple[int, ...] | None = None
    phase: Phase = "any"
    position: int | None = None
    step: int | None = None
    condition: Condition = Condition()
    once: bool = False


class Sampling(Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


class Variant(Struct, frozen=True, omit_defaults=True):
    """One branch: edits at the stop, standing rules, sampling; what is not given is as in the parent."""

    id: str | None = None
    edits: tuple[Edit, ...] = ()
    standing: tuple[Edit, ...] = ()
    sampling: Sampling | None = None
    seed: int | None = None
    max_tokens: int | None = None


class EditInfo(Struct, frozen=True):
    """An edit as the guest holds it; ``vector`` is the length of its vector."""

    name: str
    kind: str
    layer: int
    factor: float
    first: int
    last: int | None
    vector: float | None


class ConditionInfo(Condition, frozen=True, omit_defaults=False):
    """A condition as the guest holds it."""


class BreakpointInfo(Struct, frozen=True):
    """A breakpoint as the guest holds it; ``hits`` counts how often it has stopped the session."""

    id: str
    layer: int | None
    phase: str
    position: int | None
    step: int | None
    condition: ConditionInfo
    once: bool
    hits: int


class Wire(Struct, frozen=True):
    """Bytes of HTTP bodies that requests for a session brought and took."""

    received: int
    sent: int


class Checkpoint(Struct, frozen=True):
    """The copy of the activation to host memory: what the engine waited, and when the bytes had landed, in µs.

    ``complete_us`` is None while the copy flies; ``pinned``: it lies in the ring of host memory made at the start.
    """

    bytes: int
    dispatch_us: float
    complete_us: float | None
    pinned: bool


class Pause(Struct, frozen=True):
    """Where a session has stopped: ``layer`` of ``layers`` layers of the pass have run.

    The pass reads ``tokens`` tokens from ``position`` on. ``norms`` are (layer, norm of the last token's hidden state),
    None where it is no finite number. ``seconds`` since the stop. ``replaced``: the activation was uploaded.
    """

    layer: int
    layers: int
    step: int
    position: int
    tokens: int
    breakpoint: str
    shape: tuple[int, ...]
    dtype: str
    checkpoint: Checkpoint
    edits: tuple[EditInfo, ...]
    replaced: bool
    norms: tuple[tuple[int, float | None], ...]
    seconds: float
    wire_bytes: Wire


class Memory(Struct, frozen=True):
    """Where a session's cache is; ``bytes`` on the ``device``, in ``host`` memory and on ``disk``, in whole blocks.

    ``away``: it comes back when it is needed; ``dropped``: it is computed again then. ``waiting``: a pass waits for
    room. ``pinned`` and ``expected`` are seconds from now. ``durable``: it outlives the server, as it is now.
    """

    state: Literal["device", "arriving", "leaving", "away", "dropped"]
    bytes: dict[str, int]
    waiting: bool
    pinned: float | None
    expected: float | None
    durable: bool


class Session(Struct, frozen=True):
    """A session. ``length`` of its ``tokens`` tokens have been read; their keys and values take ``cache_bytes``."""

    id: str
    state: State
    parent: str | None
    created: float
    tokens: int
    length: int
    cache_bytes: int
    turns: int
    passes: int
    steering: tuple[EditInfo, ...]
    breakpoints: tuple[BreakpointInfo, ...]
    pause: Pause | None
    generated: int
    text: str
    failed: str
    wire_bytes: Wire
    memory: Memory | None = None  # guests in goldens of earlier versions do not say


class Sessions(Struct, frozen=True):
    """All sessions."""

    sessions: tuple[Session, ...]


class TokenScore(Struct, frozen=True):
    """A token's log-probability (natural, before temperature), and the most likely ones' as (token, logprob)."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Result(Struct, frozen=True):
    """How far a generation is: done, stopped (``pause`` says where), or going on.

    ``finish_reason`` is stop, length, cancelled or error; ``error`` says why in the last case.
    """

    session: str
    state: Literal["done", "paused", "running"]
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    prompt_tokens: int
    stop: str | int | None = None
    logprobs: tuple[TokenScore, ...] | None = None
    logits: tuple[float, ...] | None = None
    pause: Pause | None = None
    error: str | None = None


class Branches(Struct, frozen=True):
    """Names of the branches; what they have written, if that was waited for."""

    sessions: tuple[str, ...]
    results: tuple[Result, ...] | None = None


class LensToken(Struct, frozen=True):
    """A token that the model's head sees in the hidden state."""

    id: int
    text: str
    probability: float


class Lens(Struct, frozen=True):
    """The most likely next tokens by the model's own head on the hidden state at the stop."""

    layer: int
    tokens: tuple[LensToken, ...]


class Engine(Struct, frozen=True):
    """The model, what the probe at its load found (``verdict``), memory for caches and its traffic, and counters."""

    model: str
    identity: str
    verdict: dict[str, Any]
    device: str
    dtype: str
    limit: int
    vocabulary: int
    features: int
    ring: dict[str, int]
    counters: dict[str, int]
    memory: dict[str, Any] | None = None  # guests in goldens of earlier versions do not say


class Created(Struct, frozen=True):
    """Names of what was made."""

    ids: tuple[str, ...]


class Vectors(Struct, frozen=True):
    """Names of the stored vectors, and how many numbers each has."""

    vectors: tuple[str, ...]
    features: int


class Event(Struct, frozen=True):
    """Something that happened to a session. Which fields mean something depends on ``type``:

    ``token``    token, text (what is certain by now), step; logprob and top_logprobs if they were asked for
    ``paused``   layer, step, breakpoint
    ``done``     reason, tokens (how many were written), error
    ``state``    state; the first event of :meth:`Client.events`
    ``resumed``, ``suspended``, ``woken``, ``deleted``
    """

    type: str
    session: str = ""
    token: int | None = None
    text: str = ""
    step: int | None = None
    layer: int | None = None
    breakpoint: str | None = None
    reason: str | None = None
    tokens: int | None = None
    error: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] | None = None
    state: Session | None = None
