"""The orders of the control socket (control.py) for vLLM: served in its API server, obeyed by its engine's sleep mode.

Only a server that was started with ``--enable-sleep-mode`` and
``--worker-extension-cls gpuckpt_guest.vllm_weights.WeightsExtension`` can obey; any other one says why it cannot. vLLM
on CPUs has no sleep mode. Its HTTP endpoints for sleeping are not used: they would be open to everybody who can reach
its port.

It sleeps at level 2: weights and KV cache are dropped, where level 1 would copy the weights to host memory, and into
the dump. Before that the requests that run end, those that come wait, and the prefix cache is emptied. Communicators
that have device memory of their own are told, where vLLM has words for it (``checkpoint_prepare``).

Where the weights stay and caches alone go, it sleeps at level 0, which has requests wait and gives nothing back. The
caches of prefixes and of inputs are emptied then, and the workers give the KV cache back by themselves
(vllm_caches.py). Its other pause, ``pause_generation``, refuses requests that come meanwhile (since 0.33).

vLLM may come to know all this itself: its pull requests 54942, 54943 and 54946 (RFC 54940; their descriptions were read
in November 2026, when they were open and in no release) add ``--snapshot-config``, and ``suspend``, ``device_unlock``
and ``resume`` from the engine's client down to the workers, with device memory left to plugins of the device. Where a
server was started with it these are called instead, ``device_unlock`` in the server that was frozen and ``resume`` in
its clones, and no weights pass through files: there are no ranks. What arguments they will take is not settled; one
that cannot do without is named and not called.

Written from the source of vLLM 0.20 to 0.33; the CPU build has been asked, nothing of it has run on a GPU yet.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from . import handing, lifecycle, nvml
from .carried import unusable
from .control import Control, ControlError, Handler, caches_only, files_for, files_to_wake, same_sleep, wanted, where

_log = logging.getLogger("gpuckpt_guest")
_NOTHING = {"map": 0.0, "stream": 0.0, "kv": 0.0}
_EXTENSION = "gpuckpt_guest.vllm_weights.WeightsExtension"
# This process' socket, or that it has none, once that has been found out.
_serving: list[Control | None] = []


def serve(state: Any) -> None:
    """Serve the orders on the running event loop, once, if this is an API server whose engine is there.

    ``state``: what the application keeps. Where several API servers share a socket, the first one obeys.
    """
    if _serving or (client := getattr(state, "engine_client", None)) is None:
        return
    if not wanted() or getattr(client.vllm_config.parallel_config, "_api_process_rank", 0) > 0:
        _serving.append(None)
        return
    try:
        _serving.append(Control(Orders(client).handlers(), loop=asyncio.get_running_loop()))
    except OSError as error:
        # It serves all the same; who wants to give an order finds nobody, and says so.
        _log.error("no orders can be taken at %s: %s", where(), error)
        _serving.append(None)


class Orders:
    """What the engine is told. For use by the event loop, one order at a time."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._config = client.vllm_config
        self._asleep = False
        self._caches_only = False  # asleep with its weights
        self._prepared = False  # the communicators
        # An engine that knows snapshots itself, and was told to.
        self._own = getattr(self._config, "snapshot_config", None) is not None and hasattr(client, "suspend")
        self._slept_as: lifecycle.Identity | None = None

    def handlers(self) -> Mapping[str, Handler]:
        """As :class:`~gpuckpt_guest.control.Control` takes them."""
        return {
            "ranks": self._ranks,
            "save": self._save,
            "sleep": self._sleep,
            "wake": self._wake,
            "state": self._state,
        }

    @property
    def _count(self) -> int:
        return 0 if self._own else int(self._config.parallel_config.world_size)

    async def _ranks(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        return {"ranks": self._count}

    async def _state(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        return {"asleep": self._asleep}

    async def _save(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        self._check("the weights cannot be saved")
        if self._asleep:
            raise ControlError("the weights cannot be saved", "the server is asleep")
        files_for(files, self._count)
        if self._own:
            return {"bytes": []}
        saved = await self._all("the weights cannot be saved", "gpuckpt_save", os.getpid(), list(files))
        return {"bytes": [one["bytes"] for one in saved]}

    async def _sleep(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        what = "the server cannot sleep"
        caches = caches_only(request, files)
        self._check(what)
        if self._asleep:
            same_sleep(what, self._caches_only, caches)
            return {"released": 0}
        if self._own:
            await self._call_own(what, "suspend")
            self._asleep, self._caches_only, self._slept_as = True, caches, lifecycle.identity()
            return {"released": 0}
        released = await (self._release_caches(what) if caches else self._drop(what))
        await self._prepare()
        nvml.let_go()
        if self._count == 1:  # NCCL, which is used between several, opens the library once and never again
            await self._all(what, "gpuckpt_quiet")
        return {"released": released}

    async def _drop(self, what: str) -> int:
        held = sum(one["bytes"] for one in await self._all(what, "gpuckpt_held"))
        await self._client.sleep(level=2, mode="wait")
        self._asleep, self._caches_only = True, False
        return held

    async def _release_caches(self, what: str) -> int:
        self._asleep = self._caches_only = True  # and if it cannot be had back where this fails
        try:
            await self._client.sleep(level=0, mode="wait")
            await self._client.reset_mm_cache()
            await self._client.reset_encoder_cache()
            # What is kept outside goes too; versions up to 0.22 fail where nothing is.
            outside = getattr(self._config, "kv_transfer_config", None) is not None
            if await self._client.reset_prefix_cache(reset_connector=outside) is False:
                raise ControlError(what, "the prefix cache could not be emptied")
            return sum(one["bytes"] for one in await self._all(what, "gpuckpt_release_caches"))
        except Exception:
            await self._all(what, "gpuckpt_take_caches")
            await self._resume()
            raise

    async def _resume(self) -> None:
        """Let requests run again that waited for caches."""
        await self._client.wake_up(tags=["scheduling"])
        self._asleep = False

    async def _wake(self, request: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        what = "the server cannot wake up"
        caches = caches_only(request, files)
        self._check(what)
        if not self._asleep:
            return {"bytes": 0, "phases": _NOTHING}
        same_sleep(what, self._caches_only, caches)
        if caches and not self._own:
            return {"bytes": 0, "phases": _NOTHING | {"kv": await self._take_caches(what)}}
        files, carried = ([], None) if caches else files_to_wake(request, files, self._count)
        if self._own:
            await self._call_own(what, "device_unlock" if lifecycle.identity() == self._slept_as else "resume")
            self._asleep = False
            return {"bytes": 0, "phases": _NOTHING}
        given = os.getpid(), list(files)
        await self._all(what, "gpuckpt_check", *given)
        await self._restore()
        try:
            awake = await self._awaken(what, given, carried)
        except ControlError:
            await self._all(what, "gpuckpt_back")
            await self._prepare()
            raise
        await self._client.wake_up()  # from here on requests run
        self._asleep = False
        phases = {name: max(one["phases"][name] for one in awake) for name in awake[0]["phases"]}
        told = "; ".join(one["told"] for one in awake if one["told"])
        return {"bytes": sum(one["bytes"] for one in awake), "phases": phases} | ({"told": told} if told else {})

    async def _take_caches(self, what: str) -> float:
        """Have the KV cache again, and requests run; returns the seconds that the workers needed."""
        await self._restore()
        try:
            taken = await self._all(what, "gpuckpt_take_caches")
        except ControlError:
            await self._all(what, "gpuckpt_release_caches")  # of those that could
            await self._prepare()
            raise
        await self._resume()
        return max(float(one["seconds"]) for one in taken)

    async def _awaken(self, what: str, given: tuple[int, list[int]], carried: int | None) -> list[dict[str, Any]]:
        """Have the workers take memory and weights; the one that holds them asks for the handle, if there is one."""
        if carried is None:
            return await self._all(what, "gpuckpt_wake", *given)
        with ExitStack() as stack:
            try:
                offer = stack.enter_context(handing.offered(carried, os.path.dirname(where())))
            except OSError as error:
                awake = await self._all(what, "gpuckpt_wake", *given)
                return [one | {"told": unusable(error)} for one in awake]
            return await self._all(what, "gpuckpt_wake", *given, offer)

    async def _call_own(self, what: str, name: str) -> None:
        method = getattr(self._client, name)
        asked = [each.name for each in inspect.signature(method).parameters.values() if each.default is each.empty]
        if asked:
            raise ControlError(what, f"this vLLM's {name} asks for what gpuckpt does not know: {', '.join(asked)}")
        await method()

    async def _prepare(self) -> None:
        if hasattr(self._client, "checkpoint_prepare"):
            await self._client.checkpoint_prepare()
            self._prepared = True

    async def _restore(self) -> None:
        if self._prepared:
            await self._client.checkpoint_restore()
            self._prepared = False

    def _check(self, what: str) -> None:
        """Raise ControlError if this server was not started for it."""
        if self._own:
            return
        parallel = self._config.parallel_config
        if not getattr(self._config.model_config, "enable_sleep_mode", False):
            raise ControlError(what, "vLLM was started without --enable-sleep-mode, which its CPU build does not have")
        if not getattr(parallel, "worker_extension_cls", ""):
            raise ControlError(what, f"vLLM was started without --worker-extension-cls {_EXTENSION}")
        if parallel.data_parallel_size > 1:
            raise ControlError(what, "its engines are several (--data-parallel-size), of which only one would obey")

    async def _all(self, what: str, method: str, *args: Any) -> list[dict[str, Any]]:
        """Have every worker do it. Raises ControlError if one of them could not."""
        answers: list[dict[str, Any]] = await self._client.collective_rpc(method, args=args)
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise ControlError(what, f"rank {rank}: {answer['error']}")
        return answers
