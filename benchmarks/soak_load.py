"""The soak's clients: requests that come at random times, each answer compared with the one it must be."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_TRIES = 8  # of a request whose connection was cut before an answer began, as OpenAI's own client sends it again
_PAUSE = 0.2  # seconds before it is sent again
_PATIENCE = 300.0  # seconds that a client waits for a byte


@dataclass(frozen=True)
class Question:
    """A request that has one right answer."""

    model: str
    prompt: str
    tokens: int
    stream: bool

    @property
    def body(self) -> bytes:
        asked = {"model": self.model, "prompt": self.prompt, "max_tokens": self.tokens, "stream": self.stream}
        return json.dumps(asked | {"temperature": 0}).encode()


@dataclass
class Reply:
    """What came of one request. ``outcome``: ok, wrong, lost (no answer), cut (its stream broke off)."""

    question: Question
    began: float
    outcome: str = "lost"
    tier: str = ""
    status: int = 0
    first_s: float | None = None
    total_s: float = 0.0
    text: str = ""
    resent: list[float] = field(default_factory=list)  # when its connection was cut, and it was sent again
    error: str = ""


def ask(port: int, question: Question) -> Reply:
    """Ask until there is an answer, or it is clear that there will be none."""
    reply = Reply(question, time.monotonic())
    for _ in range(_TRIES):
        if _ask_once(port, question, reply):
            break
        reply.resent.append(time.monotonic())
        time.sleep(_PAUSE)
    reply.total_s = time.monotonic() - reply.began
    return reply


def _ask_once(port: int, question: Question, reply: Reply) -> bool:
    """Whether that was it; False if the connection was cut before anything of an answer came."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    pieces: list[bytes] = []
    try:
        connection.request("POST", "/v1/completions", question.body, {"content-type": "application/json"})
        response = connection.getresponse()
        reply.status, reply.tier = response.status, response.getheader("x-gpuckpt-tier", "")
        while piece := response.read1(65536):
            pieces.append(piece)
            if (reply.first_s is None and b"data: " in piece) or not question.stream:
                reply.first_s = time.monotonic() - reply.began
    except (OSError, http.client.HTTPException) as error:
        reply.error = repr(error)
        if b"data: {" not in b"".join(pieces):
            return False
        reply.outcome = "cut"
        return True
    finally:
        connection.close()
    data = b"".join(pieces)
    try:
        reply.text = _text(data, stream=question.stream)
    except (ValueError, KeyError, IndexError) as error:
        reply.error = f"{reply.status}: {error!r} in {data[-300:]!r}"
        return True
    reply.outcome = "ok" if reply.status == 200 else "lost"
    return True


def _text(data: bytes, *, stream: bool) -> str:
    if not stream:
        return str(json.loads(data)["choices"][0]["text"])
    lines = data.decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    if "data: [DONE]" not in lines:
        raise ValueError("the stream has no end")
    return "".join(event["choices"][0]["text"] for event in events if event["choices"])


class Client(threading.Thread):
    """Asks for one model at random times: bursts of requests, and pauses in which it sinks through its tiers."""

    def __init__(
        self,
        port: int,
        questions: Sequence[Question],
        expected: dict[Question, str],
        *,
        seed: str,
        until: float,
        mean_s: float,
        pauses_s: Sequence[float],
    ) -> None:
        super().__init__(daemon=True)
        self._port, self._questions, self._expected = port, questions, expected
        self._random, self._until, self._mean, self._pauses = random.Random(seed), until, mean_s, pauses_s
        self.replies: list[Reply] = []
        self._running: list[threading.Thread] = []

    def run(self) -> None:
        """Ask until the end, then wait for the answers."""
        while time.monotonic() < self._until:
            for _ in range(self._random.randint(2, 6)):
                self._begin(self._random.choice(self._questions))
                self._sleep(self._random.expovariate(1 / self._mean))
            self._sleep(self._random.choice(self._pauses))
        for thread in self._running:
            thread.join()

    def _sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, min(seconds, self._until - time.monotonic())))

    def _begin(self, question: Question) -> None:
        def work() -> None:
            reply = ask(self._port, question)
            if reply.outcome == "ok" and reply.text != self._expected[question]:
                reply.outcome = "wrong"
                reply.error = f"{reply.text!r} instead of {self._expected[question]!r}"
            self.replies.append(reply)

        thread = threading.Thread(target=work, daemon=True)
        self._running.append(thread)
        thread.start()


def counted(replies: Sequence[Reply], killed: Sequence[float], *, window_s: float) -> dict[str, Any]:
    """How it went. ``killed``: when the daemon was; only within ``window_s`` of that may a connection be cut."""
    unexplained = [
        when for reply in replies for when in reply.resent if not any(0 <= when - kill <= window_s for kill in killed)
    ]
    return {
        "requests": len(replies),
        "outcomes": dict(Counter(reply.outcome for reply in replies)),
        "tiers": dict(Counter(reply.tier for reply in replies if reply.tier)),
        "sent_again": sum(bool(reply.resent) for reply in replies),
        "cut_without_a_kill": len(unexplained),
        "troubles": [
            {"model": one.question.model, "outcome": one.outcome, "tier": one.tier, "error": one.error[:500]}
            for one in replies
            if one.outcome != "ok"
        ],
    }
