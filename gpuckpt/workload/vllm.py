"""vLLM's OpenAI-compatible server.

The launch line makes the settings that a golden needs unnecessary to know: a Unix socket instead of a port, eager
mode (no captured CUDA graphs, no compile cache), safetensors, select-style event loops, no usage reports. Anything
given by the user comes last and wins. A plugin (hooks/gpuckpt_guest) has every replica answer requests without a seed
in its own way, and takes orders to give weights back (control.py there).

What concerns GPUs is from vLLM 0.32's source and NVIDIA's documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gpuckpt.errors import UsageError
from gpuckpt.manifest import Mount
from gpuckpt.workload.base import PROCESSORS, SOCKET_INSIDE, Accelerator, LaunchLine
from gpuckpt.workload.guest import GUEST_ENVIRONMENT, guest_mount
from gpuckpt.workload.openai import OPENMP, OpenAI, option, without

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
_GPU_ENVIRONMENT = {
    # Compilers that stay: a pool of processes that waits for the next compilation.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    # The processors have little to do; every thread is one more to freeze, and to bring back.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # To ask the driver whether there is a GPU makes a CUDA process of the API server, to be frozen as one; to ask the
    # management library does not.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # Descriptors of InfiniBand devices cannot be dumped, and one machine needs none.
    "NCCL_IB_DISABLE": "1",
    # The thread that ends a process whose collectives seem stuck: one that was frozen for minutes looks like that.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
}
# Graphs without the compiler: of the modes without piecewise graphs, which need it, the one that every attention
# backend with graphs has. What reads a prompt is eager then.
_GRAPHS = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'
_EXTENSION = "gpuckpt_guest.vllm_weights.WeightsExtension"


class Vllm(OpenAI):
    """Adapter for vLLM (0.20 and later)."""

    kind = "vllm"
    running = r"vllm:num_requests_(?:running|waiting)"

    def launch(
        self, arguments: Sequence[str], *, port: int | None, python: Path | None, on: Accelerator = PROCESSORS
    ) -> LaunchLine:
        mounts: tuple[Mount, ...] = (guest_mount(),)
        env = _ENVIRONMENT | OPENMP | (_GPU_ENVIRONMENT if on.gpu else {}) | GUEST_ENVIRONMENT
        if on.outside and not on.gpu:
            raise UsageError(
                "vLLM on processors cannot keep its weights outside of its image",
                cause="its build for CPUs has no sleep mode",
                remedy="leave them inside: on processors, memory that is mapped is not copied",
            )
        model = self.record.model or ""
        if folder := self.folder():
            model = folder.destination
            mounts = (*mounts, folder)
            env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        argv = [str(python) if python else "python3", "-m", "vllm.entrypoints.openai.api_server"]
        argv += ["--host", "0.0.0.0", "--port", str(port)] if port else ["--uds", SOCKET_INSIDE]
        argv += [
            "--model",
            model,
            *(("--compilation-config", _GRAPHS) if on.gpu and on.graphs else ("--enforce-eager",)),
        ]
        argv += ["--load-format", "safetensors", "--disable-uvicorn-access-log"]
        if on.gpu:  # also where weights stay in the image: the KV cache, most of a GPU, does not
            argv += ["--enable-sleep-mode", "--worker-extension-cls", _EXTENSION]
        if not option(arguments, "--served-model-name"):
            argv += ["--served-model-name", self.record.served_name or model]
        return LaunchLine((*argv, *without(arguments, "--model")), env, mounts)
