"""The bundled guest server (``python -m gpuckpt_guest serve``): generations that stop between two layers.

Anything given by the user comes last and wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpuckpt.errors import UsageError
from gpuckpt.workload.base import PROCESSORS, SOCKET_INSIDE, Accelerator, LaunchLine
from gpuckpt.workload.endpoint import Endpoint
from gpuckpt.workload.guest import GUEST_ENVIRONMENT, guest_mount
from gpuckpt.workload.http import send
from gpuckpt.workload.openai import OPENMP, OpenAI, option, without

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Nothing here compiles; without this, importing transformers' caches loads the compiler (seconds, and mappings).
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHON_ASYNCIO_NO_IO_URING": "1",
    "PYTHONUNBUFFERED": "1",
}


class Guest(OpenAI):
    """Adapter for the guest server. Sessions that are stopped at a breakpoint are part of the golden."""

    kind = "guest"
    running = "gpuckpt_guest_requests_running"

    def launch(
        self, arguments: Sequence[str], *, port: int | None, python: Path | None, on: Accelerator = PROCESSORS
    ) -> LaunchLine:
        folder = self.folder()
        if folder is None:
            raise UsageError(
                f"{self.record.model} is no folder",
                cause="the guest server downloads nothing",
                remedy="give the folder of a checkpoint: -- --model /path/to/model",
            )
        argv = [str(python) if python else "python3", "-m", "gpuckpt_guest", "serve", "--model", folder.destination]
        argv += ["--host", "0.0.0.0", "--port", str(port)] if port else ["--uds", SOCKET_INSIDE]
        if on.gpu and not option(arguments, "--device"):
            argv += ["--device", "cuda"]  # or it would serve from the processors, where there is no GPU after all
        if on.outside:
            argv.append("--weights-outside")
        if not option(arguments, "--served-model-name"):
            argv += ["--served-model-name", self.record.served_name or folder.destination]
        words = (*argv, *without(arguments, "--model"))
        # A server writes and removes the files of its sessions: two would take them away from one another.
        kept = option(arguments, "--kv-dir")
        own = () if kept is None else (kept,)
        return LaunchLine(words, _ENVIRONMENT | OPENMP | GUEST_ENVIRONMENT, (guest_mount(), folder), own)

    def warm_up(self, endpoint: Endpoint, count: int, prompts: Sequence[str]) -> None:
        """What every OpenAI-compatible server gets, then the user's own requests: to make sessions, and stop them."""
        super().warm_up(endpoint, count, prompts)
        for request in self.record.warmup_requests:
            send(endpoint, request)
