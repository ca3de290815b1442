"""OpenAI's endpoints: each request is a session of its own that goes when it is answered."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..engine.engine import Engine, Request
from ..engine.errors import EngineError, missing
from ..engine.sampling import Sampling, Scores
from ..engine.session import Session, Turn
from .bridge import EVENTS, Bridge, Mailbox, bridge_of, sse, unless_gone
from .schema import ChatSpec, CompletionSpec
from .text import encode, encode_chat, stops, token_text

router = APIRouter(tags=["openai"])
# Of a chat without max_tokens, of a model that knows no longest text.
_LONGEST_ANSWER = 32768


@router.get("/v1/models")
async def models(request: HttpRequest) -> dict[str, Any]:
    """The one model that is served."""
    loaded = bridge_of(request).engine.loaded
    card = {"id": loaded.name, "object": "model", "created": request.app.state.created, "owned_by": "gpuckpt"}
    return {"object": "list", "data": [card | {"max_model_len": loaded.limit}]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: HttpRequest) -> dict[str, Any]:
    """The model of that name."""
    _check_model(bridge_of(request).engine, name)
    card: dict[str, Any] = (await models(request))["data"][0]
    return card


@router.post("/v1/completions", response_model=None, responses=EVENTS)
async def completions(spec: CompletionSpec, request: HttpRequest) -> Response:
    """Go on with a text, or several."""
    engine = bridge_of(request).engine
    _check_model(engine, spec.model)
    if spec.echo or spec.suffix:
        raise EngineError("echo and suffix are not supported")
    prompts: list[Any]
    if isinstance(spec.prompt, str) or (spec.prompt and isinstance(spec.prompt[0], int)):
        prompts = [spec.prompt]
    else:
        prompts = list(spec.prompt)
    if not prompts:
        raise EngineError("the prompt is empty")
    tokenizer = engine.loaded.tokenizer
    reads = [
        await asyncio.to_thread(encode, tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts
    ]
    work = Request(
        max_tokens=spec.max_tokens,
        sampling=Sampling(spec.temperature, spec.top_p, spec.top_k),
        stops=stops(spec.stop),
        stop_tokens=frozenset(spec.stop_token_ids),
        ignore_stops=spec.ignore_eos,
        top_scores=spec.logprobs,
    )
    style = _Completion(
        engine, spec.return_tokens_as_token_ids, usage=bool((spec.stream_options or {}).get("include_usage"))
    )
    return await _answer(request, [read for read in reads for _ in range(spec.n)], work, spec.seed, style, spec.stream)


@router.post("/v1/chat/completions", response_model=None, responses=EVENTS)
async def chat(spec: ChatSpec, request: HttpRequest) -> Response:
    """Answer a conversation."""
    engine = bridge_of(request).engine
    _check_model(engine, spec.model)
    messages = [message.model_dump() for message in spec.messages]
    read = await asyncio.to_thread(encode_chat, engine.loaded.tokenizer, messages)
    room = max(1, min(engine.loaded.limit - len(read), _LONGEST_ANSWER))
    wanted = spec.max_completion_tokens or spec.max_tokens or room
    work = Request(
        max_tokens=wanted,
        sampling=Sampling(spec.temperature, spec.top_p, spec.top_k),
        stops=stops(spec.stop),
        stop_tokens=frozenset(spec.stop_token_ids),
        ignore_stops=spec.ignore_eos,
        top_scores=(spec.top_logprobs or 0) if spec.logprobs else None,
    )
    style = _Chat(engine, spec.return_tokens_as_token_ids, usage=bool((spec.stream_options or {}).get("include_usage")))
    return await _answer(request, [read] * spec.n, work, spec.seed, style, spec.stream)


def _check_model(engine: Engine, name: str | None) -> None:
    if name is not None and name != engine.loaded.name:
        raise missing("model", name)


class _Completion:
    """How `/v1/completions` writes."""

    prefix = "cmpl"
    kind = "text_completion"
    chunk = "text_completion"

    def __init__(self, engine: Engine, ids: bool, *, usage: bool) -> None:
        self.engine = engine
        self.ids = ids
        self.usage = usage
        self._written: dict[int, int] = {}  # of a stream's choices: characters of the tokens so far

    def text(self, token: int) -> str:
        return f"token_id:{token}" if self.ids else token_text(self.engine.loaded.tokenizer, token)

    def first(self, index: int) -> dict[str, Any] | None:
        return None

    def piece(self, index: int, text: str, token: int, scores: Scores | None) -> dict[str, Any]:
        logs = None
        if scores:
            at = self._written.get(index, 0)
            self._written[index] = at + len(token_text(self.engine.loaded.tokenizer, token))
            logs = self.logprobs([token], [scores], [at])
        return {"index": index, "text": text, "logprobs": logs, "finish_reason": None}

    def last(self, index: int, turn: Turn) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None} | _finish(turn)

    def whole(self, index: int, turn: Turn) -> dict[str, Any]:
        logs = None
        if turn.top_scores is not None:
            offsets, at = [], 0
            for token in turn.generated:
                offsets.append(at)
                at += len(token_text(self.engine.loaded.tokenizer, token))
            logs = self.logprobs(turn.generated, turn.scores, offsets)
        return {"index": index, "text": turn.text.text, "logprobs": logs} | _finish(turn)

    def logprobs(self, tokens: list[int], scores: list[Any], offsets: list[int]) -> dict[str, Any]:
        return {
            "tokens": [self.text(token) for token in tokens],
            "token_logprobs": [score.chosen for score in scores],
            "top_logprobs": [{self.text(token): value for token, value in score.top} for score in scores],
            "text_offset": offsets,
        }


class _Chat(_Completion):
    """How `/v1/chat/completions` writes."""

    prefix = "chatcmpl"
    kind = "chat.completion"
    chunk = "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any] | None:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def piece(self, index: int, text: str, token: int, scores: Scores | None) -> dict[str, Any]:
        logs = {"content": [self._score(token, scores)]} if scores else None
        return {"index": index, "delta": {"content": text}, "logprobs": logs, "finish_reason": None}

    def last(self, index: int, turn: Turn) -> dict[str, Any]:
        return {"index": index, "delta": {}, "logprobs": None} | _finish(turn)

    def whole(self, index: int, turn: Turn) -> dict[str, Any]:
        logs = None
        if turn.top_scores is not None:
            pairs = zip(turn.generated, turn.scores, strict=True)
            logs = {"content": [self._score(token, scores) for token, scores in pairs]}
        message = {"role": "assistant", "content": turn.text.text}
        return {"index": index, "message": message, "logprobs": logs} | _finish(turn)

    def _score(self, token: int, scores: Scores) -> dict[str, Any]:
        def one(token: int, value: float) -> dict[str, Any]:
            text = self.text(token)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return one(token, scores.chosen) | {"top_logprobs": [one(*pair) for pair in scores.top]}


def _finish(turn: Turn) -> dict[str, Any]:
    return {"finish_reason": turn.reason, "stop_reason": turn.stop if isinstance(turn.stop, str) else None}


async def _answer(
    request: HttpRequest, reads: list[list[int]], work: Request, seed: int | None, style: _Completion, stream: bool
) -> Response:
    bridge = bridge_of(request)
    head = {
        "id": f"{style.prefix}-{uuid.uuid4().hex}",
        "object": style.chunk if stream else style.kind,
        "created": int(time.time()),
        "model": bridge.engine.loaded.name,
    }
    boxes = [Mailbox() for _ in reads]
    begun = await bridge.do(_begin, bridge.engine, reads, work, seed, boxes)
    if stream:
        return StreamingResponse(_streamed(bridge, begun, boxes, head, style), media_type="text/event-stream")
    try:
        await unless_gone(request, _all_done(boxes))
    finally:
        await bridge.do(_drop, bridge.engine, begun)
    turns = [turn for _, turn in begun]
    for turn in turns:
        if turn.error:
            raise EngineError(turn.error, status=500, code="generation_failed")
    choices = [style.whole(index, turn) for index, turn in enumerate(turns)]
    return JSONResponse(head | {"choices": choices, "usage": _usage(turns)})


def _begin(
    engine: Engine, reads: list[list[int]], work: Request, seed: int | None, boxes: list[Mailbox]
) -> list[tuple[Session, Turn]]:
    made: list[tuple[Session, Turn]] = []
    try:
        for index, (read, box) in enumerate(zip(reads, boxes, strict=True)):
            session = engine.create(seed=None if seed is None else seed + index, ephemeral=True)
            made.append((session, None))  # type: ignore[arg-type]
            asked = Request(**{name: getattr(work, name) for name in work.__slots__} | {"read": read})
            made[-1] = (session, engine.generate(session, asked, box))
    except EngineError:
        _drop(engine, made)
        raise
    return made


def _drop(engine: Engine, begun: list[tuple[Session, Turn]]) -> None:
    for session, _ in begun:
        if engine.sessions.get(session.id) is session:
            engine.delete(session)


async def _all_done(boxes: list[Mailbox]) -> None:
    async def done(box: Mailbox) -> None:
        async for _ in box.until("done"):
            pass

    await asyncio.gather(*(done(box) for box in boxes))


async def _streamed(
    bridge: Bridge,
    begun: list[tuple[Session, Turn]],
    boxes: list[Mailbox],
    head: dict[str, Any],
    style: _Completion,
) -> AsyncIterator[str]:
    merged: asyncio.Queue[tuple[int, dict[str, Any]]] = asyncio.Queue()

    async def forward(index: int, box: Mailbox) -> None:
        async for event in box.until("done"):
            merged.put_nowait((index, event))

    tasks = [asyncio.ensure_future(forward(index, box)) for index, box in enumerate(boxes)]
    extra = {"usage": None} if style.usage else {}
    try:
        for index in range(len(begun)):
            if (first := style.first(index)) is not None:
                yield sse(head | {"choices": [first]} | extra)
        left = len(begun)
        while left:
            index, event = await merged.get()
            turn = begun[index][1]
            if event["type"] == "token":
                piece = style.piece(index, event["text"], event["token"], event.get("scores"))
                yield sse(head | {"choices": [piece]} | extra)
            elif event["type"] in ("done", "deleted", "lost"):
                left -= 1
                if turn.error or event["type"] != "done":
                    problem = {"message": turn.error or "the generation was lost", "type": "generation_failed"}
                    yield sse({"error": problem})
                else:
                    yield sse(head | {"choices": [style.last(index, turn)]} | extra)
        if style.usage:
            yield sse(head | {"choices": [], "usage": _usage([turn for _, turn in begun])})
        yield sse("[DONE]")
    finally:
        for task in tasks:
            task.cancel()
        # Also when the client has hung up: nobody reads what these would write.
        bridge.engine.do(_drop, bridge.engine, begun)


def _usage(turns: list[Turn]) -> dict[str, int]:
    read, written = sum(turn.prompt_tokens for turn in turns), sum(len(turn.generated) for turn in turns)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
