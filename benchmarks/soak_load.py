"""The soak's clients: requests that come at random times, each answer compared with the one it must be."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import pool_client
from gpuckpt.errors import DaemonUnreachableError, GpuckptError
from gpuckpt.workload.endpoint import RequestFailed

_TRIES = 8  # of a request whose connection was cut before an answer began, as OpenAI's own client sends it again
_PAUSE = 0.2  # seconds before it is sent again


@dataclass(frozen=True)
class Question:
    """A request that has one right answer."""

    model: str
    prompt: str
    tokens: int
    stream: bool


@dataclass
class Reply:
    """What came of one request. ``outcome``: ok, wrong, lost (no answer), cut (its stream broke off)."""

    question: Question
    outcome: str = "lost"
    tier: str = ""
    text: str = ""
    resent: list[float] = field(default_factory=list)  # when its connection was cut, and it was sent again
    error: str = ""


def ask(port: int, question: Question) -> Reply:
    """Ask until there is an answer, or it is clear that there will be none."""
    reply = Reply(question)
    for _ in range(_TRIES):
        if _ask_once(port, question, reply):
            break
        reply.resent.append(time.monotonic())
        time.sleep(_PAUSE)
    return reply


def _ask_once(port: int, question: Question, reply: Reply) -> bool:
    """Whether that was it; False if the connection was cut before anything of an answer came."""
    begun = False

    def first(_: pool_client.Reply) -> bool:
        nonlocal begun
        begun = True
        return True

    try:
        got = pool_client.ask(
            port,
            question.model,
            question.prompt,
            question.tokens,
            stream=question.stream,
            first=first,
            more={"temperature": 0},
        )
    except RequestFailed as error:  # an answer, but not what was asked for
        reply.error = f"{error.status}: {error.cause}"
        return True
    except GpuckptError as error:
        reply.error = f"{error.message}: {error.cause}"
        reply.outcome = "cut" if begun else "lost"
        # A stream that says why has been given up by the service; one that is only cut may be sent again.
        return begun or not isinstance(error, DaemonUnreachableError)
    reply.outcome, reply.tier, reply.text = "ok", got.tier, got.text
    return True


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
