"""vLLM's OpenAI-compatible server.

The launch line makes the settings that a golden needs unnecessary to know: a Unix socket instead of a port, eager
mode (no captured CUDA graphs, no compile cache), safetensors, select-style event loops, no usage reports. Anything
given by the user comes last and wins. A plugin (hooks/gpuckpt_guest) has every replica answer requests without a seed
in its own way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpuckpt.manifest import Mount
from gpuckpt.workload.base import PROCESSORS, SOCKET_INSIDE, Accelerator, LaunchLine
from gpuckpt.workload.guest import GUEST_ENVIRONMENT, guest_mount
from gpuckpt.workload.openai import OpenAI, option, without

_ENVIRONMENT = {
    # One address that exists in every network namespace: the engine's own sockets bind to it.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # fork after threads have started deadlocks now and then, and doubles the mappings of a dump.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    # Eager means eager: without this the first request for logprobs compiles a helper with the C++ compiler (31 s of
    # two cores), and its worker processes stay in the dump.
    "TORCHDYNAMO_DISABLE": "1",
    # libuv would open an io_uring where the seccomp profile lets it; asyncio has no such backend of its own.
    "UV_USE_IO_URING": "0",
    "PYTHON_ASYNCIO_NO_IO_URING": "1",
    "ASYNCIO_DEFAULT_BACKEND": "select",
    "PYTHONUNBUFFERED": "1",
}


class Vllm(OpenAI):
    """Adapter for vLLM (0.20 and later)."""

    kind = "vllm"
    running = r"vllm:num_requests_(?:running|waiting)"

    def launch(
        self, arguments: Sequence[str], *, port: int | None, python: Path | None, on: Accelerator = PROCESSORS
    ) -> LaunchLine:
        mounts: tuple[Mount, ...] = (guest_mount(),)
        env = _ENVIRONMENT | GUEST_ENVIRONMENT
        model = self.record.model or ""
        if folder := self.folder():
            model = folder.destination
            mounts = (*mounts, folder)
            env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        argv = [str(python) if python else "python3", "-m", "vllm.entrypoints.openai.api_server"]
        argv += ["--host", "0.0.0.0", "--port", str(port)] if port else ["--uds", SOCKET_INSIDE]
        argv += ["--model", model, "--enforce-eager", "--load-format", "safetensors", "--disable-uvicorn-access-log"]
        if not option(arguments, "--served-model-name"):
            argv += ["--served-model-name", self.record.served_name or model]
        return LaunchLine((*argv, *without(arguments, "--model")), env, mounts)
