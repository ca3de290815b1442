"""A session leaves the device, comes back, and writes a token: ours, and what one would do else, turn about.

`gpuckpt`     suspend, resume, a token: what was written since goes out, all of it comes back
`swap`        transformers' cache, copied whole to memory that is kept for it, and back whole (pinned on a GPU)
`recompute`   the cache is dropped, and all tokens are read again in one pass: no copies, and other bits
`offloaded`   transformers' own offloaded cache: every layer comes and goes in every pass
`keep`        nobody leaves: how many sessions of this length the memory of the oversubscription's second factor holds
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks import kv_common
from benchmarks.journal import Document
from benchmarks.kv_common import KvRig
from benchmarks.kv_oversubscribe import SESSIONS
from benchmarks.kv_paging import moved
from benchmarks.sessions_common import quantity
from benchmarks.suite import say

LENGTHS = (256, 1024)


def body(rig: KvRig) -> Document:
    made: Document = {"cycles": {}, "unavailable": {}, "keep": keep(rig)}
    if rig.device.type != "cuda":
        made["unavailable"]["offloaded"] = "transformers' offloaded cache needs a GPU"
    for length in LENGTHS[:1] if rig.quick else LENGTHS:
        made["cycles"][str(length)] = cycles(rig, length, made["unavailable"])
    return made


def cycles(rig: KvRig, length: int, unavailable: Document) -> Document:
    """Seconds of a cycle in each way."""
    prompt = rig.prompt(length)
    found: dict[str, list[float]] = {}
    with rig.serving(*(2 * [(length + 512) * rig.token_bytes * 3])) as engine:
        session = rig.do(engine.create)
        _, watch = rig.begin(session, prompt, 1)
        watch.until("done")
        plain = Plain(rig, prompt)

        def ours() -> None:
            moved(rig, engine, session, "suspend")
            moved(rig, engine, session, "wake")
            _, watch = rig.begin(session, [], 1)  # it reads the token that it wrote last
            watch.until("done")

        ways: dict[str, Callable[[], None]] = {
            "gpuckpt": ours,
            "swap": lambda: rig.do(plain.swap),
            "recompute": lambda: rig.do(plain.recompute),
            "offloaded": lambda: rig.do(plain.offloaded),
        }
        for index in rig.rounds(rig.options.n + 1, f"cycles of {length} tokens"):
            for who in rig.shuffled([name for name in ways if name not in unavailable]):
                began = time.perf_counter()
                try:
                    ways[who]()
                except Exception as error:  # a peer that cannot be had is no failure of ours
                    if who == "gpuckpt":
                        raise
                    unavailable[who] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                    say(f"  {who}: {unavailable[who]}")
                    continue
                if index:
                    found.setdefault(who, []).append((time.perf_counter() - began) * 1000)
    return {who: quantity(times) for who, times in found.items()} | {"unit": "ms"}


class Plain:
    """The same model with transformers' own caches. On the engine's thread."""

    def __init__(self, rig: KvRig, prompt: list[int]) -> None:
        self._rig = rig
        self._ids = rig.torch.tensor([prompt], device=rig.device)
        self._token = rig.torch.tensor([[5]], device=rig.device)
        self._cache: Any = None
        self._homes: list[tuple[Any, Any]] = []
        self._offloaded: Any = None

    def _read(self, ids: Any, cache: Any) -> None:
        self._rig.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def _new(self, **options: Any) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self._rig.model.config, **options)

    def swap(self) -> None:
        """Out and in as a whole, then a token."""
        torch, cuda = self._rig.torch, self._rig.device.type == "cuda"
        if self._cache is None:
            self._cache = self._new()
            self._read(self._ids, self._cache)
        room = self._ids.shape[1] + 256
        if not self._homes:
            self._homes = [
                tuple(
                    torch.empty(it.shape[0], it.shape[1], room, it.shape[3], dtype=it.dtype, pin_memory=cuda).zero_()
                    for it in (layer.keys, layer.values)
                )
                for layer in self._cache.layers
            ]
        length = self._cache.get_seq_length()
        for layer, homes in zip(self._cache.layers, self._homes, strict=True):
            for name, home in zip(("keys", "values"), homes, strict=True):
                home[..., :length, :].copy_(getattr(layer, name), non_blocking=True)
                setattr(layer, name, None)
        self._rig.sync()
        for layer, homes in zip(self._cache.layers, self._homes, strict=True):
            for name, home in zip(("keys", "values"), homes, strict=True):
                setattr(layer, name, home[..., :length, :].to(self._rig.device, copy=True, non_blocking=True))
        self._read(self._token, self._cache)
        self._rig.sync()

    def recompute(self) -> None:
        """All tokens again, in one pass, the last of which gives the token."""
        self._read(self._ids, self._new())
        self._rig.sync()

    def offloaded(self) -> None:
        """A token on transformers' offloaded cache, which lies in host memory between passes."""
        if self._offloaded is None:
            made = self._new(offloading=True)
            self._read(self._ids, made)
            self._offloaded = made
        self._read(self._token, self._offloaded)
        self._rig.sync()


def keep(rig: KvRig) -> Document:
    """Sessions are begun until one finds no room, with nowhere to go for the others."""
    length = 64 if rig.quick else rig.options.prompt
    sessions = 8 if rig.quick else SESSIONS
    with rig.serving(sessions * length * rig.token_bytes // 2, max_batch=1) as engine:
        for count in range(sessions):
            session = rig.do(engine.create)
            session.reads = None  # so that none is dropped, to be computed again
            _, watch = rig.begin(session, rig.prompt(length), 1)
            until = time.monotonic() + 60
            while session.turn is not None:
                if rig.do(lambda session=session: engine.memory.residency.waits(session)):
                    return {"wanted": sessions, "fit": count, "tokens": length}
                if time.monotonic() > until:
                    raise RuntimeError("a prompt of the baseline was not read within a minute")
                time.sleep(0.002)
            del watch
    return {"wanted": sessions, "fit": sessions, "tokens": length}


if __name__ == "__main__":
    raise SystemExit(kv_common.run("kv_baselines", __doc__, body, n=10, budget=180))
