"""vLLM's OpenAI-compatible server.

The launch line makes the settings that a golden needs unnecessary to know: a Unix socket instead of a port, eager
mode (no captured CUDA graphs, no compile cache), safetensors, select-style event loops, no usage reports. Anything
given by the user comes last and wins. A plugin (hooks/gpuckpt_guest) has every replica answer requests without a seed
in its own way.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpuckpt.errors import DeadlineError, GpuckptError, NotFoundError, UsageError, VerificationError
from gpuckpt.manifest import Canary, Mount, Request, Workload
from gpuckpt.timing import now_ns
from gpuckpt.workload.base import SOCKET_INSIDE, LaunchLine, Replay
from gpuckpt.workload.endpoint import Endpoint
from gpuckpt.workload.guest import GUEST_ENVIRONMENT, guest_mount

_COMPLETIONS = "/v1/completions"
# One token in most vocabularies: what a restore is judged by should be the restore, not the reading of a prompt.
_CANARY_PROMPT = "The"
_CANARY_TOKENS = 8

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


class Vllm:
    """Adapter for vLLM (0.20 and later)."""

    def __init__(self, record: Workload) -> None:
        self.record = record

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], *, model: str | None, name: str) -> Vllm:
        """Read the model and its served name out of vLLM's own arguments; ``model`` is the configured default."""
        chosen = _option(arguments, "--model") or _positional(arguments) or model
        if not chosen:
            raise UsageError(
                "no model to serve",
                cause="neither `-- --model PATH` nor create.model (MODEL_ID) is given",
                remedy=f"gpuckpt create {name} -- --model /path/to/model",
            )
        served = _option(arguments, "--served-model-name") or name
        return cls(Workload(kind="vllm", model=chosen, served_name=served))

    def launch(self, arguments: Sequence[str], *, port: int | None, python: Path | None) -> LaunchLine:
        model = self.record.model or ""
        folder = Path(model)
        mounts: tuple[Mount, ...] = (guest_mount(),)
        env = _ENVIRONMENT | GUEST_ENVIRONMENT
        if folder.is_absolute() or model.startswith("."):
            if not (folder / "config.json").is_file():
                raise NotFoundError(
                    f"no model at {model}",
                    cause="the folder holds no config.json" if folder.is_dir() else "there is no such folder",
                    remedy="give the folder of a checkpoint: -- --model /path/to/model",
                )
            # The same path inside, so that error messages and the served configuration read alike.
            model = str(folder.resolve())
            mounts = (*mounts, Mount(source=model, destination=model))
            env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        argv = [str(python) if python else "python3", "-m", "vllm.entrypoints.openai.api_server"]
        argv += ["--host", "0.0.0.0", "--port", str(port)] if port else ["--uds", SOCKET_INSIDE]
        argv += ["--model", model, "--enforce-eager", "--load-format", "safetensors", "--disable-uvicorn-access-log"]
        if not _option(arguments, "--served-model-name"):
            argv += ["--served-model-name", self.record.served_name or model]
        return LaunchLine((*argv, *_without(arguments, "--model")), env, mounts)

    def healthy(self, endpoint: Endpoint) -> bool:
        with contextlib.suppress(GpuckptError):
            return endpoint.request("GET", "/health", timeout=2).status == 200
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
            pattern = r"^vllm:num_requests_(?:running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$"
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


def _option(arguments: Sequence[str], name: str) -> str | None:
    for index, word in enumerate(arguments):
        if word == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def _positional(arguments: Sequence[str]) -> str | None:
    # `vllm serve MODEL`: only the first word can be told from an option's value.
    return arguments[0] if arguments and not arguments[0].startswith("-") else None


def _without(arguments: Sequence[str], name: str) -> tuple[str, ...]:
    words = list(arguments[1:] if _positional(arguments) else arguments)
    for index, word in enumerate(words):
        if word == name:
            return tuple(words[:index] + words[index + 2 :])
        if word.startswith(f"{name}="):
            return tuple(words[:index] + words[index + 1 :])
    return tuple(words)
