"""Any HTTP server: health is a path that answers 2xx, the canary a request whose answer repeats."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from gpuckpt.errors import GpuckptError, UsageError, VerificationError
from gpuckpt.manifest import Canary, Request, Workload
from gpuckpt.timing import now_ns
from gpuckpt.workload.base import PROCESSORS, SOCKET_INSIDE, Accelerator, LaunchLine, Replay
from gpuckpt.workload.endpoint import Answer, Endpoint, RequestFailed
from gpuckpt.workload.guest import GUEST_ENVIRONMENT, guest_mount


class Http:
    """Adapter for any HTTP server that listens where it is told to.

    ``{socket}`` and ``{port}`` in its arguments become the socket's path or the port inside the container; the
    environment variables GPUCKPT_SOCKET and PORT say the same. A server in Python may import ``gpuckpt_guest``, to draw
    other random numbers than the golden's other replicas do (``gpuckpt_guest.lifecycle``). Any server can keep its
    weights outside of its image: it listens at /run/gpuckpt/control.sock too, and does what ``gpuckpt_guest.control``
    says, which a server in Python can import for that.
    """

    def __init__(self, record: Workload) -> None:
        self.record = record

    def launch(
        self, arguments: Sequence[str], *, port: int | None, python: Path | None, on: Accelerator = PROCESSORS
    ) -> LaunchLine:
        if not arguments:
            raise UsageError(
                "no command to run", remedy="give it after --: gpuckpt create NAME -- python3 server.py {socket}"
            )
        if port is None and any("{port}" in word for word in arguments):
            raise UsageError("{port} needs a published port", remedy="add --publish PORT, or use {socket}")
        words = tuple(word.replace("{socket}", SOCKET_INSIDE).replace("{port}", str(port)) for word in arguments)
        env = {"PORT": str(port)} if port else {"GPUCKPT_SOCKET": SOCKET_INSIDE}
        return LaunchLine(words, env | {"PYTHONUNBUFFERED": "1"} | GUEST_ENVIRONMENT, (guest_mount(),))

    def healthy(self, endpoint: Endpoint, *, timeout: float = 2) -> bool:
        with contextlib.suppress(GpuckptError):
            return 200 <= endpoint.request("GET", self.record.health_path, timeout=timeout).status < 300
        return False

    @property
    def _canary(self) -> Request:
        return self.record.canary_request or Request(method="GET", path=self.record.health_path)

    def first_token(self, endpoint: Endpoint) -> int:
        send(endpoint, self._canary)
        return now_ns()

    def warm_up(self, endpoint: Endpoint, count: int, prompts: Sequence[str]) -> None:
        requests = self.record.warmup_requests or (self._canary,)
        for index in range(count):
            send(endpoint, requests[index % len(requests)])

    def record_canary(self, endpoint: Endpoint) -> Canary:
        answers = [send(endpoint, self._canary) for _ in range(2)]
        if answers[0] != answers[1]:
            raise VerificationError(
                "the canary's answers differ from one another on the server itself",
                cause=f"two times {self._canary.method} {self._canary.path} gave two answers",
                remedy="choose a request whose answer repeats (--canary), or create with --no-canary",
            )
        return Canary(request=self._canary, status=answers[0].status, body_blake3=_digest(answers[0].body))

    def replay(self, endpoint: Endpoint, canary: Canary) -> Replay:
        answer = endpoint.request(canary.request.method, canary.request.path, canary.request.body)
        arrived = now_ns()
        differences: list[str] = []
        if answer.status != canary.status:
            differences.append(f"the status is {answer.status}, {canary.status} was recorded")
        if _digest(answer.body) != canary.body_blake3:
            differences.append(f"the body differs from the recorded one; it begins {answer.body[:80]!r}")
        return Replay(arrived, tuple(differences))

    def quiesce(self, endpoint: Endpoint, *, timeout: float) -> None:
        # Nothing tells from outside what an unknown server is doing; every request of ours has been answered, so a
        # moment for it to close its side of the connections is all that is due.
        time.sleep(min(0.1, timeout))


def send(endpoint: Endpoint, request: Request) -> Answer:
    """Make a request whose answer must be 2xx; RequestFailed otherwise."""
    answer = endpoint.request(request.method, request.path, request.body)
    if not 200 <= answer.status < 300:
        raise RequestFailed(
            f"{request.method} {request.path} answered {answer.status}",
            status=answer.status,
            cause=answer.body[:500].decode(errors="replace"),
        )
    return answer


def _digest(body: bytes) -> str:
    from blake3 import blake3

    return blake3(body).hexdigest()
