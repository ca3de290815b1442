"""Ask servers, and compare what they answer: the one client that all methods of a benchmark are measured with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import harness
from gpuckpt.errors import DaemonUnreachableError, DeadlineError, GpuckptError
from gpuckpt.timing import now_ns
from gpuckpt.workload.endpoint import Endpoint

RETRY = 0.005  # seconds between two attempts to connect


@dataclass(frozen=True)
class Answered:
    """When the first token (or, of a plain server, the answer) came, and the first difference from the recorded one."""

    first_token_ns: int
    difference: str | None


def ask(endpoint: Endpoint, canary: dict[str, Any]) -> Answered:
    """Ask a golden's canary once. Raises DaemonUnreachableError where nobody listens (yet)."""
    request = canary["request"]
    if not canary["tokens"]:
        answer = endpoint.request(request["method"], request["path"], request["body"])
        arrived = now_ns()
        from blake3 import blake3

        equal = answer.status == canary["status"] and blake3(answer.body).hexdigest() == canary["body_blake3"]
        return Answered(arrived, None if equal else f"status {answer.status}, other bytes than recorded")
    first = 0
    got: list[tuple[str, float]] = []
    for arrived, event in endpoint.stream(request["method"], request["path"], json.loads(request["body"])):
        for choice in event.get("choices", []):
            first = first or arrived
            pieces = choice.get("logprobs") or {"tokens": [], "token_logprobs": []}
            got += zip(pieces["tokens"], pieces["token_logprobs"], strict=True)
    return Answered(first, harness.first_difference(got, canary))


def until_answered(
    endpoint: Endpoint, canary: dict[str, Any], *, timeout: float, alive: Callable[[], str | None] = lambda: None
) -> Answered:
    """Ask, and where nobody listens ask again every 5 ms, until there is an answer.

    ``alive`` is asked once a second: a reason why there never will be one ends the waiting.
    """
    deadline, next_look = time.monotonic() + timeout, time.monotonic() + 1
    while True:
        try:
            return ask(endpoint, canary)
        except DaemonUnreachableError as error:
            now = time.monotonic()
            if now >= next_look:
                next_look = now + 1
                if dead := alive():
                    raise GpuckptError("the server is dead", cause=dead) from error
            if now > deadline:
                raise DeadlineError(f"no answer within {timeout:g} s", cause=error.cause) from error
            time.sleep(RETRY)


@dataclass(frozen=True)
class Decoded:
    """One streamed completion: seconds to its first token and to its last, number of tokens."""

    first_s: float
    whole_s: float
    tokens: int

    @property
    def tokens_per_s(self) -> float:
        """Rate of decoding, the prompt's own time left out."""
        return (self.tokens - 1) / max(self.whole_s - self.first_s, 1e-9)


def complete(endpoint: Endpoint, model: str, prompt: list[int], tokens: int) -> Decoded:
    """Have ``tokens`` tokens decoded greedily after ``prompt`` (token ids)."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begun = now_ns()
    first = last = 0
    counted = 0
    for arrived, event in endpoint.stream("POST", "/v1/completions", body):
        if event.get("choices"):
            first, last = first or arrived, arrived
        if event.get("usage"):
            counted = int(event["usage"]["completion_tokens"])
    if not first or counted != tokens:
        raise GpuckptError(f"{tokens} tokens were asked for, {counted} came")
    return Decoded((first - begun) / 1e9, (last - begun) / 1e9, counted)
