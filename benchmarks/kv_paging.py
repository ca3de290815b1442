"""What it costs to take a session off the device and to bring it back, beside the bare copies of the same bytes.

`gbps`: leave and come back against one thread that copies the same blocks between the same places, turn about.
`wake`: from the order until all is back; and until the last layer may run, if a pass has stopped in front of it.
`append`: bytes that are moved to append a token, at several lengths, against transformers' own cache; and what leaves
when one token has been written since.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from typing import Any

from benchmarks import kv_common
from benchmarks.journal import Document
from benchmarks.kv_common import KvRig, fill
from benchmarks.sessions_common import Watch, paired, quantity

# Tokens of the session that moves: on the model that this is for, 25 MB and 200 MB.
SMALL, LARGE = 512, 4096
LENGTHS = (256, 1024, 4096)
TOKENS = 16  # appended at each length
BUDGET = 1 << 30  # bytes on the device, and off it


def body(rig: KvRig) -> Document:
    return {
        "copies": copies(rig, LARGE),
        "small_copies": copies(rig, SMALL),
        "wakes": wakes(rig),
        "append": append(rig),
    }


# ---------------------------------------------------------------------- speed


def copies(rig: KvRig, tokens: int) -> Document:
    """Both directions: seconds of the pager's, seconds of bare copies, their ratio."""
    found: dict[str, dict[str, list[float]]] = {way: {"pager": [], "bare": []} for way in ("out", "in")}
    with rig.serving(BUDGET, BUDGET) as engine:
        session = rig.do(engine.create)
        rig.do(fill, engine, session, tokens)
        size = rig.do(bytes_of, engine, session)
        for index in rig.rounds(rig.options.n + 2, f"copies of {tokens} tokens"):
            rig.do(dirty, session)
            for who in rig.shuffled(("pager", "bare")):
                if who == "bare":
                    out, into = rig.do(bare, engine, session)
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
            "unit": "s; above: bare copies, below: the pager, from the order until it was done",
        }
        for way, seconds in found.items()
    }


def bytes_of(engine: Any, session: Any) -> int:
    """Of the session's blocks."""
    return sum(1 for _ in session.cache.blocks()) * int(engine.memory.arena.memory.size)


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
    """Seconds of copying the session's blocks out and in, one after the other, with all cores."""
    memory, pool = engine.memory.arena.memory, engine.memory.pager.host
    places = [block.place for block in session.cache.blocks()]
    spare = [slot for slot in range(pool.slots) if slot not in engine.memory.pager._held][: len(places)]
    pairs = [(memory.block(place), pool.bytes(slot)) for place, slot in zip(places, spare, strict=True)]
    ready = memory.written()
    began = time.perf_counter()
    memory.read(pairs, ready)
    halfway = time.perf_counter()
    memory.write([(there, here) for here, there in pairs], ready)
    return halfway - began, time.perf_counter() - halfway


# ---------------------------------------------------------------------- waking


def wakes(rig: KvRig) -> Document:
    """Milliseconds until a session is back, and until its last layer may run if that is needed first; by its size."""
    made: Document = {}
    with rig.serving(BUDGET, BUDGET) as engine:
        for tokens in (64, SMALL, LARGE):
            session = rig.do(engine.create)
            rig.do(fill, engine, session, tokens)
            whole: list[float] = []
            first: list[float] = []
            for index in rig.rounds(10 * rig.options.n + 1, f"wakes of {tokens} tokens"):
                moved(rig, engine, session, "suspend")
                took = moved(rig, engine, session, "wake")
                moved(rig, engine, session, "suspend")
                early = needed(rig, engine, session, rig.layers - 1)
                if index:
                    whole.append(took * 1000)
                    first.append(early * 1000)
            made[str(tokens)] = {
                "all_ms": quantity(whole),
                "first_needed_ms": quantity(first),
                "bytes": rig.do(bytes_of, engine, session),
            }
            rig.do(engine.delete, session)
    return made


def needed(rig: KvRig, engine: Any, session: Any, layer: int) -> float:
    """Seconds from the order until a layer may run that is needed first; the others follow."""
    pager, poll, arrived = engine.memory.pager, engine.memory.poll, queue.SimpleQueue[float]()

    def looked() -> Any:
        # As the scheduler does before each quantum; the pager tells of what somebody has looked for.
        found = poll()
        if pager.ready(session.cache, layer):
            arrived.put(time.perf_counter())
        return found

    def order() -> float:
        engine.memory.poll = looked
        session.suspended = False
        began = time.perf_counter()
        pager.bring(session.cache, engine.loaded.device, layer)
        pager.ready(session.cache, layer)
        return began

    began = rig.do(order)
    took = arrived.get(timeout=60) - began
    while rig.do(pager.arriving, session.cache):
        time.sleep(0.001)
    engine.memory.poll = poll
    return float(took)


# ---------------------------------------------------------------------- appending


def append(rig: KvRig) -> Document:
    """Bytes that are written to append one token, counted where tensors are made and copied."""
    made: Document = {"ours": {}, "dynamic": {}, "left_after_one_token": {}}
    with rig.serving(BUDGET, BUDGET) as engine:
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
            with mode:
                cache.room(1)
        for layer in rig.loaded.blueprint.forms:
            columns = list(_columns(rig, layer, 1))
            with mode:
                cache.update(*columns, layer)
        commit()
    return float(mode.bytes / TOKENS)


if __name__ == "__main__":
    raise SystemExit(kv_common.run("kv_paging", __doc__, body, n=10, budget=120))
