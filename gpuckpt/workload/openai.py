"""Servers that speak OpenAI's HTTP API: what their adapters have in common."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from gpuckpt.errors import DeadlineError, GpuckptError, NotFoundError, UsageError, VerificationError
from gpuckpt.manifest import Canary, Mount, Request, Workload
from gpuckpt.timing import now_ns
from gpuckpt.workload.base import Replay
from gpuckpt.workload.endpoint import Endpoint

# A thread of OpenMP (libgomp, as torch brings it) that waits for the next piece of work looks for it for milliseconds
# before it sleeps: a time slice, which other replicas on the same cores would use. This many looks, a fraction of a
# millisecond, bridge the gaps within a step, and no more.
OPENMP = {"GOMP_SPINCOUNT": "20000"}
_COMPLETIONS = "/v1/completions"
# One token in most vocabularies: what a restore is judged by should be the restore, not the reading of a prompt.
_CANARY_PROMPT = "The"
_CANARY_TOKENS = 8


class OpenAI:
    """Adapter for such a server; how it is launched is for the subclass to say."""

    # Which adapter it is, in the manifest.
    kind: ClassVar[Literal["vllm", "guest"]]
    # The start of the name of the metric that counts requests at work, a regular expression.
    running: ClassVar[str]

    def __init__(self, record: Workload) -> None:
        self.record = record

    @classmethod
    def from_arguments(
        cls, arguments: Sequence[str], *, model: str | None, name: str, warmup_requests: tuple[Request, ...] = ()
    ) -> Self:
        """Read the model and its served name out of the server's own arguments; ``model`` is the configured default."""
        chosen = option(arguments, "--model") or positional(arguments) or model
        if not chosen:
            raise UsageError(
                "no model to serve",
                cause="neither `-- --model PATH` nor create.model (MODEL_ID) is given",
                remedy=f"gpuckpt create {name} -- --model /path/to/model",
            )
        served = option(arguments, "--served-model-name") or name
        return cls(Workload(kind=cls.kind, model=chosen, served_name=served, warmup_requests=warmup_requests))

    def folder(self) -> Mount | None:
        """The mount that shows the model to the container, at the same path; None for a name that is no path.

        The same path inside, so that error messages and the served configuration read alike.
        """
        model = self.record.model or ""
        folder = Path(model)
        if not folder.is_absolute() and not model.startswith("."):
            return None
        if not (folder / "config.json").is_file():
            raise NotFoundError(
                f"no model at {model}",
                cause="the folder holds no config.json" if folder.is_dir() else "there is no such folder",
                remedy="give the folder of a checkpoint: -- --model /path/to/model",
            )
        resolved = str(folder.resolve())
        return Mount(source=resolved, destination=resolved)

    def healthy(self, endpoint: Endpoint, *, timeout: float = 2) -> bool:
        with contextlib.suppress(GpuckptError):
            return endpoint.request("GET", "/health", timeout=timeout).status == 200
        return False

    def first_token(self, endpoint: Endpoint) -> int:
        body = {"model": self.record.served_name, "prompt": _CANARY_PROMPT, "max_tokens": 1, "stream": True}
        for arrived, event in endpoint.stream("POST", _COMPLETIONS, body | {"temperature": 0}):
            if event.get("choices"):
                return arrived
        raise VerificationError("the server answered a streamed request without a token")

    def warm_up(self, endpoint: Endpoint, count: int, prompts: Sequence[str]) -> None:
        """Alternate streamed and whole completions, greedy and sampled, and chat where the model has a template."""
        chat = self._has_chat(endpoint) if count else False
        for index in range(count):
            prompt = prompts[index % len(prompts)] if prompts else _CANARY_PROMPT
            common: dict[str, Any] = {"model": self.record.served_name, "max_tokens": 8}
            common |= {"temperature": 0.8, "top_p": 0.95, "seed": index} if index % 2 else {"temperature": 0}
            if index % 3 == 2 and chat:
                route, body = "/v1/chat/completions", common | {"messages": [{"role": "user", "content": prompt}]}
            else:
                route, body = _COMPLETIONS, common | {"prompt": prompt, "logprobs": 1}
            for _ in endpoint.stream("POST", route, body | {"stream": True}):
                pass

    def _has_chat(self, endpoint: Endpoint) -> bool:
        body = {
            "model": self.record.served_name,
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
        }
        return endpoint.request("POST", "/v1/chat/completions", json.dumps(body)).status == 200

    def record_canary(self, endpoint: Endpoint) -> Canary:
        body = {
            "model": self.record.served_name,
            "prompt": _CANARY_PROMPT,
            "max_tokens": _CANARY_TOKENS,
            "temperature": 0,
            "seed": 0,
            "logprobs": 1,
            "ignore_eos": True,
            "stream": True,
            # As numbers: two tokens that a tokenizer cannot write out would read alike.
            "return_tokens_as_token_ids": True,
        }
        request = Request(method="POST", path=_COMPLETIONS, body=json.dumps(body))
        # The first answers may still fill caches; what repeats is what a restored server must repeat.
        earlier: Canary | None = None
        for _ in range(4):
            _, tokens, logprobs = _generate(endpoint, request)
            canary = Canary(request=request, status=200, tokens=tokens, logprobs=logprobs)
            if canary == earlier:
                return canary
            earlier = canary
        raise VerificationError(
            "the canary's answers differ from one another on the server itself",
            cause="four greedy requests gave no two equal answers in a row",
            remedy="make decoding deterministic, or create with --no-canary",
        )

    def replay(self, endpoint: Endpoint, canary: Canary) -> Replay:
        first, tokens, logprobs = _generate(endpoint, canary.request)
        differences: list[str] = []
        for index, (got, expected) in enumerate(zip(tokens, canary.tokens, strict=False)):
            if got != expected:
                differences.append(f"token {index} is {got!r}, {expected!r} was recorded")
                break
        for index, (value, recorded) in enumerate(zip(logprobs, canary.logprobs, strict=False)):
            if value != recorded:
                differences.append(f"logprob {index} is {value!r}, {recorded!r} was recorded")
                break
        if len(tokens) != len(canary.tokens):
            differences.append(f"{len(tokens)} tokens came, {len(canary.tokens)} were recorded")
        return Replay(first, tuple(differences))

    def quiesce(self, endpoint: Endpoint, *, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while True:
            text = endpoint.request("GET", "/metrics", timeout=5).body.decode(errors="replace")
            pattern = rf"^{self.running}(?:\{{[^}}]*\}})? ([0-9.e+]+)$"
            counts = [float(value) for value in re.findall(pattern, text, re.MULTILINE)]
            if not any(counts):
                return
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"the server still works on {sum(counts):g} requests after {timeout:g} s",
                    remedy="keep other clients away while a golden is made",
                )
            time.sleep(0.05)


def _generate(endpoint: Endpoint, request: Request) -> tuple[int, tuple[str, ...], tuple[float, ...]]:
    first = 0
    tokens: list[str] = []
    logprobs: list[float] = []
    for arrived, event in endpoint.stream(request.method, request.path, json.loads(request.body)):
        if "error" in event:
            raise VerificationError("the server failed on the canary", cause=str(event["error"])[:500])
        for choice in event.get("choices", []):
            if piece := choice.get("logprobs"):
                first = first or arrived
                tokens += piece["tokens"]
                logprobs += piece["token_logprobs"]
    return first or now_ns(), tuple(tokens), tuple(logprobs)


def option(arguments: Sequence[str], name: str) -> str | None:
    """The value of the option ``name`` in a command line, written as two words or with an equals sign."""
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def positional(arguments: Sequence[str]) -> str | None:
    """The first word, if it is no option."""
    # `vllm serve MODEL`: only the first word can be told from an option's value.
    return arguments[0] if arguments and not arguments[0].startswith("-") else None


def without(arguments: Sequence[str], name: str) -> tuple[str, ...]:
    """The arguments less a first word that is no option, and less the option ``name``."""
    words = list(arguments[1:] if positional(arguments) else arguments)
    for index, word in enumerate(words):
        if word == name:
            return tuple(words[:index] + words[index + 2 :])
        if word.startswith(f"{name}="):
            return tuple(words[:index] + words[index + 1 :])
    return tuple(words)
