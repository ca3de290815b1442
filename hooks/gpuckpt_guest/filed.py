"""The form of a session in a file: what an import checks before anything is believed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, StrictBool

from .api.schema import ConditionSpec, Count, Finite, Message, Name, SamplingSpec, Strict, Tokens

Short = Annotated[str, Field(max_length=1024)]


class FiledEdit(Strict):
    """An edit; ``vector`` is the number of a tensor."""

    kind: Literal["scale", "add", "set", "project"]
    layer: Count
    factor: Finite
    first: Count
    last: Count | None
    name: Name | Literal[""]
    vector: Count | None = None


class FiledBreakpoint(Strict):
    """A breakpoint, and how often it was hit."""

    id: Name
    layer: Count | None
    phase: Literal["any", "prefill", "decode"]
    position: Count | None
    step: Count | None
    condition: ConditionSpec
    once: StrictBool
    hits: Count


class Layer(BaseModel):
    """A layer of the cache: where its columns begin, and how many belong to the stopped pass; recurrent states."""

    first: Count | None = None
    pending: Count = 0
    previous: list[StrictBool] = Field(default_factory=list, max_length=64)
    kernel: list[Count | None] = Field(default_factory=list, max_length=64)
    states: list[tuple[Literal["conv_states", "recurrent_states"], Count]] = Field(default_factory=list, max_length=128)


class Turn(Strict):
    """The generation at work."""

    max_tokens: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
    top_scores: Annotated[int, Field(strict=True, ge=0, le=100)] | None
    ignore_stops: StrictBool
    keep_logits: StrictBool
    chat: StrictBool
    step: Count
    prompt_tokens: Count
    generated: Tokens
    sampling: SamplingSpec
    stops: list[Short] = Field(max_length=64)
    stop_tokens: Tokens
    scores: list[tuple[float, list[tuple[Count, float]]]]


class Pause(Strict):
    """Where the pass has stopped."""

    layer: Count
    step: Count
    position: Count
    tokens: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
    breakpoint: Short
    executed: Count
    replaced: StrictBool
    norms: list[tuple[Count, float | None]] = Field(max_length=4096)
    edits: list[FiledEdit] = Field(max_length=1024)
    carried: list[tuple[Short, Count | Short, Count]] = Field(max_length=4096)


class Block(Strict):
    """A block of keys and values in a file of its own: which of which track, and the digest of its bytes."""

    track: Count
    number: Count
    file: Annotated[str, Field(pattern=r"^[0-9a-f]{32}\.block$")]
    digest: Short


class Session(Strict):
    """All of it."""

    version: Literal[1]
    digest: Short
    model: Short
    id: Name
    tokens: Tokens
    length: Count
    reads: list[Annotated[int, Field(strict=True, ge=1)]] | None = None
    replay: list[Annotated[int, Field(strict=True, ge=1)]] = Field(default_factory=list)
    cache: list[Layer] = Field(max_length=65536)
    edits: list[FiledEdit] = Field(max_length=1024)
    breakpoints: list[FiledBreakpoint] = Field(max_length=1024)
    messages: list[Message] = Field(max_length=4096)
    turns: Count
    passes: Count
    turn: Turn | None
    pause: Pause | None
    blocks: list[Block] | None = None
