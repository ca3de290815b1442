"""vLLM's side of a golden, loaded through its plugin entry point in every process of the server.

What vLLM draws for requests without a seed comes from global generators: in the workers torch's (the samplers, and
speculative decoding's rejection sampler) or NumPy's (the newer GPU model runner draws each such request a seed when it
arrives), in the API server Python's (tool call ids of some parsers). They are seeded from ``--seed``, 0 by default, so
that clones go on alike. A request with a seed has a generator of its own, which nothing here touches.

So each kind of process asks, in the one place that all its work comes through, whether it woke up as a new replica;
that costs a stat(2) per step or request. The workers of one engine must agree on every token, since each rank samples
by itself: they reseed as one group.

On processors, processes that wait for each other leave the cores to those that compute, their own and other replicas'.

The API server also takes the host's orders to sleep and to wake up (vllm_control.py), from the moment on that its
application is called first, which is when it starts up.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import lifecycle, nvml, vllm_control

_log = logging.getLogger("gpuckpt_guest")
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
_LOOKING = 0.003  # seconds: between two steps the next order comes sooner, and to be woken up takes longer
_NAP = 10  # milliseconds


def register() -> None:
    """Called by vLLM when it loads its plugins; may be called several times in a process.

    What this vLLM does not have is named in a warning, and left alone.
    """
    if any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        return
    lifecycle.on_restore(_forget_names)
    later = {}
    for name, attributes in _WRAPPED.items():
        if name in sys.modules:
            _wrap(sys.modules[name], attributes)
        else:
            later[name] = attributes
            if name.startswith("vllm.") and not _in_vllm(name):
                _warn(name)
    sys.meta_path.insert(0, _WhenImported(later))


class _WhenImported(MetaPathFinder):
    """Wraps attributes of modules when these are imported.

    To import them all at once would load the workers' code, and what it does to the platform, into processes that
    have no use for it.
    """

    def __init__(self, wraps: dict[str, dict[str, Wrapper]]) -> None:
        self._wraps = wraps

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._wraps:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_wrap(module: ModuleType) -> None:
            execute(module)
            _wrap(module, self._wraps[name])

        spec.loader.exec_module = execute_and_wrap  # type: ignore[method-assign]
        return spec


def _in_vllm(module: str) -> bool:
    # Looked up as files: find_spec imports the packages on the way.
    below = os.path.join(*module.split(".")[1:]) + ".py"
    return any(os.path.exists(os.path.join(folder, below)) for folder in sys.modules["vllm"].__path__)


def _wrap(module: ModuleType, attributes: dict[str, Wrapper]) -> None:
    for attribute, wrapped in attributes.items():
        owner, _, method = attribute.partition(".")
        holder = getattr(module, owner, None)
        original = getattr(holder, method, None)
        if original is None:
            _warn(f"{module.__name__}.{attribute}")
        else:
            setattr(holder, method, wrapped(original))


def _warn(name: str) -> None:
    _log.warning(
        "this vLLM has no %s: its clones may answer alike without a seed or crowd the processors, "
        "or it may be hard to freeze",
        name,
    )


def _checking(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        lifecycle.check()
        return original(*args, **kwargs)

    return checked


def _checking_asgi(original: Callable[..., Any]) -> Callable[..., Any]:
    # As it was written: uvicorn asks whether it is a coroutine function, and calls it without arguments to see a
    # TypeError, which says that it is no factory of applications.
    @functools.wraps(original)
    async def checked(self: Any, scope: Any, receive: Any, send: Any) -> Any:
        lifecycle.check()
        vllm_control.serve(getattr(self, "state", None))
        return await original(self, scope, receive, send)

    return checked


def _letting_go(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def slept(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        nvml.let_go()
        return result

    return slept


def _napping(original: Callable[..., None]) -> Callable[..., None]:
    """The reader of a queue between two processes of an engine looks for a second after each message whether the next
    one is there, and yields its core for each look only. On processors the model's threads want that core, and those
    of other replicas. After a moment it sleeps there until the writer says that there is one, as vLLM's readers do once
    they have been idle; but not for long, as who has just begun to listen may have missed it.
    """

    @functools.wraps(original)
    def waited(self: Any, timeout_ms: int | None = None) -> None:
        if not _on_processors():
            original(self, timeout_ms)
            return
        now = time.monotonic()
        since = self.__dict__.get("gpuckpt_since")
        if since is None or since[0] != self.last_read:  # it begins to wait for the next
            self.gpuckpt_since = since = self.last_read, now
        if now < since[1] + _LOOKING or now > self.last_read + self.busy_loop_s:
            original(self, timeout_ms)
            return
        busy, self.busy_loop_s = self.busy_loop_s, -1.0
        try:
            original(self, _NAP if timeout_ms is None else min(timeout_ms, _NAP))
        finally:
            self.busy_loop_s = busy

    return waited


@functools.cache
def _on_processors() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _grouping(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def grouped(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        parallel = self.vllm_config.parallel_config
        # Engines that serve requests side by side draw different numbers; the ranks within one draw the same.
        engine = getattr(parallel, "data_parallel_index", None)
        lifecycle.share(f"vllm engine {parallel.data_parallel_rank if engine is None else engine}")

    return grouped


def _forget_names(identity: lifecycle.Identity) -> None:
    """Temporary files of the tier that offloads KV to a file system: a folder that replicas may share."""
    module = sys.modules.get("vllm.v1.kv_offload.tiering.fs.io")
    if module and hasattr(module, "_thread_local"):
        # Each thread drew its suffix once; a fresh one is drawn from the reseeded generator.
        module._thread_local = threading.local()  # type: ignore[attr-defined]


# vLLM 0.20 to 0.33: what is wrapped, by module, and why there. Modules that a process never imports cost it nothing.
_WRAPPED: dict[str, dict[str, Wrapper]] = {
    "vllm.v1.worker.worker_base": {
        # A worker, whatever its device and model runner: once per step, before requests are added and tokens sampled.
        "WorkerWrapperBase.execute_model": _checking,
        "WorkerBase.__init__": _grouping,
    },
    # The two places that draw, for executors that call the model runner past the wrapper (Ray's), and for a dump that
    # fell between a step and its sampling.
    "vllm.v1.sample.sampler": {"Sampler.forward": _checking},
    "vllm.v1.worker.gpu.sample.states": {"SamplingStates.add_request": _checking},
    "vllm.distributed.device_communicators.shm_broadcast": {"SpinCondition.wait": _napping},
    # The engine's scheduling process; it sleeps to be frozen.
    "vllm.v1.engine.core": {"EngineCore.add_request": _checking, "EngineCore.sleep": _letting_go},
    # The API server, before anything of a request is read.
    "fastapi.applications": {"FastAPI.__call__": _checking_asgi},
}
