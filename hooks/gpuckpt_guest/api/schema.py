"""What goes over the wire. The OpenAPI document is made from this; the session API refuses what is not in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

Finite = Annotated[float, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Count = Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]
# Limits that keep one request from taking the server's memory.
Tokens = Annotated[list[Count], Field(max_length=1 << 20)]
Text = Annotated[str, Field(max_length=1 << 24)]
StopText = Annotated[str, Field(max_length=1024)]
Stop = StopText | Annotated[list[StopText], Field(max_length=64)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), le=2**64 - 1)]


class Strict(BaseModel):
    """Refuses fields that it does not know."""

    model_config = ConfigDict(extra="forbid")


class EditSpec(Strict):
    """An edit of the hidden state after `layer` layers, of the tokens at positions `first` <= p < `last`."""

    kind: Literal["scale", "add", "set", "project"]
    layer: Count | None = Field(None, description="default: the layer after which the session has stopped")
    factor: Finite = 1.0
    vector: Annotated[list[Finite], Field(max_length=1 << 20)] | Name | None = Field(
        None, description="numbers, or the name of a stored vector"
    )
    first: Count = 0
    last: Count | None = None
    name: Name | None = None


class ConditionSpec(Strict):
    """All that is given must hold. Entropies in nats, of the next token by the model's head on the stopped state."""

    tokens: Tokens | None = Field(None, description="the last token that the pass reads is one of these")
    entropy_above: Finite | None = None
    entropy_below: Finite | None = None
    norm_above: Finite | None = None
    norm_below: Finite | None = None


class BreakpointSpec(Strict):
    """Stop after `layer` layers (0: behind the embeddings; none given: after any); a list makes one for each."""

    id: Name | None = None
    layer: Count | Annotated[list[Count], Field(min_length=1, max_length=1024)] | None = None
    phase: Literal["any", "prefill", "decode"] = "any"
    position: Count | None = Field(None, description="the pass reads the token at this position of the session")
    step: Count | None = Field(None, description="the generation's pass of this number; 0 reads the prompt")
    condition: ConditionSpec = Field(default_factory=ConditionSpec)
    once: StrictBool = False


class SessionSpec(Strict):
    """A new session."""

    id: Name | None = None
    seed: Seed | None = None
    steering: list[EditSpec] = Field(default_factory=list, max_length=1024)
    breakpoints: list[BreakpointSpec] = Field(default_factory=list, max_length=1024)


class SamplingSpec(Strict):
    """How tokens are chosen; temperature 0 is greedy."""

    temperature: Annotated[Finite, Field(ge=0, le=100)] = 0.0
    top_p: Annotated[Finite, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, Field(max_length=64)]
    content: Any = None


class GenerateSpec(SamplingSpec):
    """Read the prompt (text, token ids, or messages), then write."""

    prompt: Text | None = None
    token_ids: Tokens | None = None
    messages: Annotated[list[Message], Field(max_length=4096)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31 - 1)] = 16
    seed: Seed | None = None
    stop: Stop = Field(default_factory=list)
    stop_token_ids: Tokens = Field(default_factory=list)
    ignore_eos: StrictBool = False
    logprobs: Annotated[StrictInt, Field(ge=0, le=100)] | None = None
    logits: StrictBool = Field(False, description="return the last step's logits")
    breakpoints: list[BreakpointSpec] = Field(default_factory=list, max_length=1024)
    stream: StrictBool = False
    wait: StrictBool = Field(True, description="answer when the generation is done or has stopped")


class PauseSpec(Strict):
    """Stop a running generation after its next layer, or after `layer` layers."""

    layer: Count | None = None
    wait: StrictBool = True


class ResumeSpec(Strict):
    """Go on. `wait`: answer at once, when the interrupted pass has given its token, or at the end or next stop.

    `paused` only brings a suspended session's cache back to the device, and lets it stay where it has stopped.
    """

    wait: Literal["none", "paused", "token", "end"] = "end"


Seconds = Annotated[float, Field(ge=0, le=7 * 86400, allow_inf_nan=False, strict=True)]


class SuspendSpec(Strict):
    """Leave the device. `durable`: it is also kept in files, and found again when the server has been restarted."""

    durable: StrictBool = False
    wait: StrictBool = Field(True, description="answer when it has left")


class PrefetchSpec(Strict):
    """Come back to the device, ahead of being needed."""

    wait: StrictBool = Field(False, description="answer when it has arrived")


class PinSpec(Strict):
    """Stay on the device for so many `seconds`; 0: as long as nobody else needs the memory, as all do."""

    seconds: Seconds


class IdleSpec(Strict):
    """The client expects to go on in so many `seconds`: until then others may have the memory."""

    seconds: Seconds


class SteerSpec(Strict):
    """Edits at the stop, or standing rules for all passes to come."""

    edits: list[EditSpec] = Field(min_length=1, max_length=1024)
    standing: StrictBool = False


class VariantSpec(Strict):
    """One branch."""

    id: Name | None = None
    edits: list[EditSpec] = Field(default_factory=list, max_length=1024, description="at the stop")
    standing: list[EditSpec] = Field(default_factory=list, max_length=1024)
    sampling: SamplingSpec | None = None
    seed: Seed | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1, le=2**31 - 1)] | None = None


class BranchSpec(Strict):
    """Sessions that go on from here, each in its own way."""

    variants: list[VariantSpec] = Field(min_length=1, max_length=256)
    resume: StrictBool = True
    wait: StrictBool = True


class OpenAISpec(SamplingSpec):
    """What OpenAI's two ways to generate have in common; fields that are not listed are ignored."""

    model_config = ConfigDict(extra="ignore")
    model: str | None = None
    temperature: Annotated[Finite, Field(ge=0, le=100)] = 1.0
    n: Annotated[int, Field(ge=1, le=64)] = 1
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: Tokens = Field(default_factory=list)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    return_tokens_as_token_ids: bool = False


class CompletionSpec(OpenAISpec):
    """OpenAI's `/v1/completions`; fields that are not listed are ignored."""

    prompt: (
        Text | Tokens | Annotated[list[Text], Field(max_length=256)] | Annotated[list[Tokens], Field(max_length=256)]
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] = 16
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    echo: bool = False
    suffix: str | None = None


class ChatSpec(OpenAISpec):
    """OpenAI's `/v1/chat/completions`; fields that are not listed are ignored."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None


class CheckpointInfo(BaseModel):
    """The copy of the activation to host memory: bytes, and microseconds for each part of it."""

    bytes: int
    dispatch_us: float
    complete_us: float | None
    copy_us: float | None
    pinned: bool


class PauseInfo(BaseModel):
    """Where a session has stopped. `layer` layers of the pass have run, of `layers`."""

    layer: int
    layers: int
    step: int
    position: int
    tokens: int
    breakpoint: str
    shape: list[int]
    dtype: str
    checkpoint: CheckpointInfo
    edits: list[dict[str, Any]]
    replaced: bool
    norms: list[tuple[int, float | None]] = Field(description="of the last token behind each layer; null: not finite")
    seconds: float
    wire_bytes: dict[str, int] = Field(description="received and sent by requests for this session since the stop")


class MemoryInfo(BaseModel):
    """Where a session's cache is. `bytes` on the device, in host memory and on disk, in whole blocks.

    `device`: all of it is there; `arriving` and `leaving`: it is on its way; `away`: it comes back when it is needed;
    `dropped`: it is computed again then. `waiting`: a pass waits for room. `pinned`, `expected`: seconds from now.
    """

    state: Literal["device", "arriving", "leaving", "away", "dropped"]
    bytes: dict[str, int]
    waiting: bool
    pinned: float | None
    expected: float | None
    durable: bool


class SessionInfo(BaseModel):
    """A session. `length` tokens of its `tokens` have been read; their keys and values take `cache_bytes`."""

    id: str
    state: Literal["idle", "running", "paused", "suspended", "failed"]
    parent: str | None
    created: float
    tokens: int
    length: int
    cache_bytes: int
    memory: MemoryInfo
    turns: int
    passes: int
    steering: list[dict[str, Any]]
    breakpoints: list[dict[str, Any]]
    pause: PauseInfo | None
    generated: int = Field(description="tokens that the generation at work, or the last one, has written")
    text: str = Field(description="what they say")
    failed: str
    wire_bytes: dict[str, int]


class SessionList(BaseModel):
    """All sessions."""

    sessions: list[SessionInfo]


class Result(BaseModel):
    """How far a generation is. `state` says whether it is done, has stopped, or goes on."""

    session: str
    state: Literal["done", "paused", "running"]
    text: str
    tokens: list[int]
    finish_reason: str | None
    stop: str | int | None = None
    logprobs: list[dict[str, Any]] | None = None
    logits: list[float] | None = None
    pause: PauseInfo | None = None
    prompt_tokens: int
    resumed: dict[str, float | None] | None = Field(
        None, description="the last resume: the activation back to the device, and until the pass' token (µs)"
    )
    error: str | None = None


class BranchResult(BaseModel):
    """The branches, and what they have written if that was waited for."""

    sessions: list[str]
    results: list[Result] | None = None


class LensToken(BaseModel):
    """A token that the model's head sees in the hidden state."""

    id: int
    text: str
    probability: float


class Lens(BaseModel):
    """The most likely next tokens at the stop."""

    layer: int
    tokens: list[LensToken]


class EngineInfo(BaseModel):
    """The model, the probe's verdict, and counters."""

    model: str
    identity: str
    verdict: dict[str, Any]
    device: str
    dtype: str
    limit: int
    vocabulary: int
    features: int
    ring: dict[str, int]
    memory: dict[str, Any] = Field(description="budgets for caches, what is used of them, and what was copied")
    counters: dict[str, int]


class Created(BaseModel):
    """Ids of what was made."""

    ids: list[str]


class Done(BaseModel):
    """It is done."""

    ok: Literal[True] = True


class Vectors(BaseModel):
    """Names of the stored vectors, and how many numbers each has."""

    vectors: list[str]
    features: int


class Problem(BaseModel):
    """Why a request was not met."""

    error: dict[str, Any]
