"""What a workload adapter does. An adapter knows one kind of server; the transactions know none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from msgspec import Struct, field

from gpuckpt.manifest import Canary, Mount, Workload
from gpuckpt.workload.endpoint import Endpoint
from gpuckpt.workload.guest import environment

# Where the folder with the replica's socket is seen inside every container.
SOCKET_FOLDER = "/run/gpuckpt"
# Where the golden's memory files are seen; a mount must be there from the start for a dump to be rewritten.
MEMORY_FOLDER = "/run/gpuckpt-memory"
SOCKET_NAME = "server.sock"
SOCKET_INSIDE = f"{SOCKET_FOLDER}/{SOCKET_NAME}"
# Beside it, where a server can be told to give its device memory back: see hooks/gpuckpt_guest/control.py.
CONTROL_NAME = "control.sock"


class Accelerator(Struct, frozen=True):
    """What a server runs on beside processors.

    ``gpu``: it is given GPUs; ``graphs``: it captures CUDA graphs, else it is eager; ``outside``: its weights are kept
    outside its image, so it must be able to give them back and take them again.
    """

    gpu: bool = False
    graphs: bool = False
    outside: bool = False


PROCESSORS = Accelerator()


class LaunchLine(Struct, frozen=True):
    """The program to run in the container, the environment it needs, host paths it must see.

    ``own``: folders, as the server names them, that only one server at a time can have; it holds FOLDER/*/lock by
    flock(2) then.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    mounts: tuple[Mount, ...] = ()
    own: tuple[str, ...] = ()

    def environment(self, image: Mapping[str, str], user: Mapping[str, str]) -> dict[str, str]:
        """The server's whole environment: the image's, this line's over it, the user's over both; lists are joined."""
        return environment(image, self.env, user)


class Replay(Struct, frozen=True):
    """A canary's outcome: when its first byte of content came (ns), and how it differs, one sentence each."""

    first_token_ns: int
    differences: tuple[str, ...]


class Adapter(Protocol):
    """One kind of server. ``record`` is what the manifest keeps, enough to make the adapter again."""

    @property
    def record(self) -> Workload: ...

    def launch(
        self, arguments: Sequence[str], *, port: int | None, python: Path | None, on: Accelerator = PROCESSORS
    ) -> LaunchLine:
        """The launch line for the user's ``arguments``; ``port``: listen on TCP, else on SOCKET_INSIDE.

        ``python`` is the interpreter of the server environment, when the host's root file system is used.
        Raises UsageError if the arguments cannot work.
        """
        ...

    def healthy(self, endpoint: Endpoint, *, timeout: float = 2) -> bool:
        """Whether the server answers its health check within ``timeout`` seconds; never raises."""
        ...

    def first_token(self, endpoint: Endpoint) -> int:
        """Make one small real request and return when its first content came (ns, monotonic)."""
        ...

    def warm_up(self, endpoint: Endpoint, count: int, prompts: Sequence[str]) -> None:
        """Make ``count`` real requests that cover the request path."""
        ...

    def record_canary(self, endpoint: Endpoint) -> Canary:
        """Make the deterministic request until its answer repeats, and return it; VerificationError if it does not."""
        ...

    def replay(self, endpoint: Endpoint, canary: Canary) -> Replay:
        """Make the canary's request again and compare."""
        ...

    def quiesce(self, endpoint: Endpoint, *, timeout: float) -> None:
        """Wait until the server works on nothing; DeadlineError after ``timeout`` seconds."""
        ...
