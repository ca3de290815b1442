"""What it costs to take a session off the device and to bring it back, beside the bare copies of the same bytes.

`gbps`: leave and come back against one thread that copies the same blocks between the same places, turn about.
`wake`: from the order until all is back; and until the last layer may run, if a pass has stopped in front of it.
`append`: bytes that are moved to append a token, at several lengths, against transformers' own cache; and what leaves
when one token has been written since.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks import kv_common
from benchmarks.journal import Document
from benchmarks.kv_common import KvRig, fill
from benchmarks.sessions_common import Watch, paired, quantity

BLOCKS = 24  # of the session that moves
LENGTHS = (256, 1024, 4096)
TOKENS = 16  # appended at each length


def body(rig: KvRig) -> Document:
    return {"copies": copies(rig), "wakes": wakes(rig), "append": append(rig)}


# ---------------------------------------------------------------------- speed


def copies(rig: KvRig) -> Document:
    """Both directions: seconds of the pager's, seconds of bare copies, their ratio."""
    found: dict[str, dict[str, list[float]]] = {way: {"pager": [], "bare": []} for way in ("out", "in")}
    with rig.serving(places=2 * BLOCKS + 8, slots=2 * BLOCKS + 8) as engine:
        session = rig.do(engine.create)
        rig.do(fill, engine, session, tokens_of(engine, BLOCKS))
        size = rig.do(lambda: sum(1 for _ in session.cache.blocks())) * engine.memory.arena.memory.size
        for index in rig.rounds(rig.options.n + 2, "copies"):
            rig.do(dirty, session)
            for who in rig.shuffled(("pager", "bare")):
                if who == "bare":
                    out, into = bare(engine, session)
                else:
                    out, into = moved(rig, engine, session, "suspend"), moved(rig, engine, session, "wake")
                if index > 1:
                    found["out"][who].append(out)
                    found["in"][who].append(into)
        rig.do(engine.delete, session)
    return {
        way: {
            # Speed over speed: the bare copy's seconds over ours.
            **paired(seconds["bare"], seconds["pager"]),
            "gbps": quantity([size / one / 1e9 for one in seconds["pager"]]),
            "bare_gbps": quantity([size / one / 1e9 for one in seconds["bare"]]),
            "bytes": size,
            "unit": "s; above: one thread's bare copies, below: the pager, from the order until it was done",
        }
        for way, seconds in found.items()
    }


def tokens_of(engine: Any, blocks: int) -> int:
    """So many tokens fill about so many blocks."""
    (track, *_) = engine.memory.arena.tracks
    return int(min(engine.loaded.limit - 1, blocks * track.slab // track.record))


def dirty(session: Any) -> None:
    """As if every block had been written to."""
    for block in session.cache.blocks():
        block.dirty = True


def moved(rig: KvRig, engine: Any, session: Any, how: str) -> float:
    """Seconds from the order to the word that it is done."""
    watch = Watch()
    session.listeners[:] = [watch]
    began = time.perf_counter()
    rig.do(getattr(engine, how), session)
    ended, _ = watch.until("suspended" if how == "suspend" else "woken")
    return ended - began


def bare(engine: Any, session: Any) -> tuple[float, float]:
    """Seconds of copying the session's blocks out and in, one after the other, by the calling thread."""
    memory, pool = engine.memory.arena.memory, engine.memory.pager.host
    places = [block.place for block in session.cache.blocks()]
    spare = [slot for slot in range(pool.slots) if slot not in engine.memory.pager._held][: len(places)]
    pairs = [(memory.block(place), pool.bytes(slot)) for place, slot in zip(places, spare, strict=True)]
    ready = memory.written()
    began = time.perf_counter()
    memory.read(pairs, ready)
    halfway = time.perf_counter()
    memory.write([(there, here) for here, there in pairs])
    return halfway - began, time.perf_counter() - halfway


# ---------------------------------------------------------------------- waking


def wakes(rig: KvRig) -> Document:
    """Milliseconds until a session is back, and until its layers behind a stop may run; by its size."""
    made: Document = {}
    with rig.serving(places=2 * BLOCKS + 8, slots=4 * BLOCKS) as engine:
        for blocks in (2, 8, BLOCKS):
            session = rig.do(engine.create)
            rig.do(fill, engine, session, tokens_of(engine, blocks))
            ordered: list[float] = []
            first: list[float] = []
            for index in rig.rounds(3 * rig.options.n + 1, f"wakes of {blocks} blocks"):
                moved(rig, engine, session, "suspend")
                took = moved(rig, engine, session, "wake")
                moved(rig, engine, session, "suspend")
                early = rig.do(arrival, engine, session, rig.layers - 1)
                if index:
                    ordered.append(took * 1000)
                    first.append(early * 1000)
            made[str(blocks)] = {
                "all_ms": quantity(ordered),
                "first_needed_ms": quantity(first),
                "bytes": rig.do(lambda cache=session.cache: sum(1 for _ in cache.blocks())) * rig.block,
            }
            rig.do(engine.delete, session)
    return made


def arrival(engine: Any, session: Any, layer: int) -> float:
    """Seconds until a layer that is needed first may run; the others follow. By the engine's thread."""
    pager = engine.memory.pager
    session.suspended = False
    began = time.perf_counter()
    pager.bring(session.cache, engine.loaded.device, layer)
    while not pager.ready(session.cache, layer):
        pager.poll()
    took = time.perf_counter() - began
    while pager.arriving(session.cache):
        pager.poll()
    return took


# ---------------------------------------------------------------------- appending


def append(rig: KvRig) -> Document:
    """Bytes that are written to append one token, counted where tensors are made and copied."""
    made: Document = {"ours": {}, "dynamic": {}, "left_after_one_token": {}}
    with rig.serving(places=400, slots=400) as engine:
        for length in LENGTHS:
            session = rig.do(engine.create)
            rig.do(fill, engine, session, length)
            made["ours"][str(length)] = rig.do(counted, rig, session.cache, lambda cache=session.cache: cache.commit(1))
            moved(rig, engine, session, "suspend")
            moved(rig, engine, session, "wake")
            rig.do(one_more, rig, session.cache)
            before = engine.memory.pager.out.bytes
            moved(rig, engine, session, "suspend")
            made["left_after_one_token"][str(length)] = engine.memory.pager.out.bytes - before
            rig.do(engine.delete, session)
            plain = rig.do(dynamic, rig, length)
            made["dynamic"][str(length)] = rig.do(counted, rig, plain, lambda: None)
    for who in ("ours", "dynamic", "left_after_one_token"):
        made[f"{who}_flat"] = round(made[who][str(LENGTHS[-1])] / made[who][str(LENGTHS[0])], 6)
    return made


def _columns(rig: KvRig, layer: int, tokens: int) -> Any:
    form = rig.loaded.blueprint.forms[layer]
    return (
        rig.torch.randn(1, heads, tokens, size, dtype=dtype, device=rig.device)
        for heads, size, dtype in (form["keys"], form["values"])
    )


def dynamic(rig: KvRig, length: int) -> Any:
    """transformers' own cache with so many tokens."""
    from transformers import DynamicCache

    made = DynamicCache(config=rig.model.config)
    for layer in rig.loaded.blueprint.forms:
        made.update(*_columns(rig, layer, length), layer)
    return made


def one_more(rig: KvRig, cache: Any) -> None:
    """Append a token."""
    cache.room(1)
    for layer in rig.loaded.blueprint.forms:
        cache.update(*_columns(rig, layer, 1), layer)
    cache.commit(1)


def counted(rig: KvRig, cache: Any, commit: Callable[[], None]) -> float:
    """Bytes written by what a cache does to take in a token, on average."""
    mode = kv_common.written(rig.torch)
    for _ in range(TOKENS):
        if hasattr(cache, "room"):
            cache.room(1)
        for layer in rig.loaded.blueprint.forms:
            columns = list(_columns(rig, layer, 1))
            with mode:
                cache.update(*columns, layer)
        commit()
    return float(mode.bytes / TOKENS)


if __name__ == "__main__":
    raise SystemExit(kv_common.run("kv_paging", __doc__, body, n=10, budget=120))
