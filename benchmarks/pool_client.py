"""Requests to the warm pool as a client sends them, each timed by our own clock beside what the service tells of it."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gpuckpt.errors import DaemonUnreachableError, GpuckptError
from gpuckpt.timing import now_ns
from gpuckpt.workload.endpoint import RequestFailed

TIMEOUT = 900.0  # seconds that an answer may be silent; a cold start sends comments meanwhile


@dataclass
class Reply:
    """One answer. ``first_s`` and ``whole_s`` are our clock's, from before the connection was made.

    ``tier``, ``replica`` and ``told`` (seconds by name: wait, model, total) are the service's own words: from the
    headers, or, of a stream whose head went ahead while it waited, from the comment before its first bytes.
    """

    asked_ns: int
    first_ns: int = 0
    ended_ns: int = 0
    tier: str = ""
    replica: str = ""
    told: dict[str, float] = field(default_factory=dict)
    retries: int = 0
    text: str = ""
    tokens: int = 0
    comments: int = 0  # that were sent while it waited

    @property
    def first_s(self) -> float:
        """Seconds until the first token, or, of an answer that is no stream, until all of it."""
        return (self.first_ns - self.asked_ns) / 1e9

    @property
    def whole_s(self) -> float:
        return (self.ended_ns - self.asked_ns) / 1e9

    def timing(self, header: str) -> None:
        """Take over what a ``Server-Timing`` says."""
        tier, told, retries = parse_timing(header)
        self.tier, self.told, self.retries = tier or self.tier, self.told | told, retries or self.retries


def parse_timing(header: str) -> tuple[str, dict[str, float], int]:
    """The tier, the durations in seconds by name, and the number of retries in a ``Server-Timing``."""
    durations = {name: float(value) / 1e3 for name, value in re.findall(r"(\w+);dur=([0-9.]+)", header)}
    said = dict(re.findall(r'(\w+);desc="([^"]*)"', header))
    return said.get("tier", ""), durations, int(said.get("retries", 0))


@contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for requests, which are not waited for when the body is left.

    Whatever interrupts it: a request may hang until the service has ended, and it is behind us that this is seen to.
    """
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def ask(
    port: int,
    model: str,
    prompt: str,
    tokens: int,
    *,
    stream: bool = True,
    first: Callable[[Reply], bool] = lambda reply: True,
    more: dict[str, Any] | None = None,
) -> Reply:
    """Have ``model`` go on with ``prompt`` for ``tokens`` tokens, over a connection of its own.

    ``first`` is called when the first token has come; if it returns False, the rest is not waited for. Raises
    RequestFailed on an error, DaemonUnreachableError if the answer is cut short.
    """
    body = json.dumps({"model": model, "prompt": prompt, "max_tokens": tokens, "stream": stream, **(more or {})})
    asked = now_ns()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    reply = Reply(asked)
    try:
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            cause = response.read(2000).decode(errors="replace")
            raise RequestFailed(f"{model} answered {response.status}", status=response.status, cause=cause)
        reply.tier = response.headers.get("x-gpuckpt-tier", "")
        reply.replica = response.headers.get("x-gpuckpt-replica", "")
        reply.timing(response.headers.get("server-timing", ""))
        if stream:
            _read_stream(response, reply, first)
        else:
            content = json.loads(response.read())
            reply.first_ns = now_ns()
            reply.text = content["choices"][0]["text"]
            reply.tokens = int((content.get("usage") or {}).get("completion_tokens") or tokens)
        reply.ended_ns = now_ns()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DaemonUnreachableError(
            f"the answer of {model} was cut short", cause=f"{type(error).__name__}: {error}"
        ) from error
    finally:
        connection.close()
    return reply


def _read_stream(response: http.client.HTTPResponse, reply: Reply, first: Callable[[Reply], bool]) -> None:
    while line := response.readline():
        arrived = now_ns()
        kind, _, rest = line.strip().partition(b": ")
        if line.startswith(b":"):
            words = line[1:].strip().decode(errors="replace")
            if "dur=" in words:
                reply.timing(words)
            else:
                reply.comments += 1
        elif kind == b"data" and rest == b"[DONE]":
            return
        elif kind == b"data":
            event = json.loads(rest)
            if error := event.get("error"):
                raise GpuckptError("the stream was broken off", cause=str(error.get("message")))
            if not event.get("choices"):
                continue
            reply.tokens += 1
            reply.text += event["choices"][0].get("text") or ""
            if not reply.first_ns:
                reply.first_ns = arrived
                if not first(reply):
                    return
    raise http.client.HTTPException("the stream ended before its last event")
