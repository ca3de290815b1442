"""What a checkpoint of an activation costs: its dispatch, until its bytes have landed, and back.

Three numbers, each measured apart, by size: `dispatch_us` is what the engine's thread waits, beside `launch_us`, the
least that handing work to someone else costs here (a copy of one number on a stream, or an entry in another thread's
queue). `complete_us` is held against 1.5 × bytes / bandwidth + 20 µs, with the bandwidth of a large copy in the same
run. `landed_us` is the same by the caller's clock, its waking up included; `plain_us` a copy that one waits for.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.sessions_common import Rig, beyond, quantity

SIZES = {"0.8 MB": 800_000, "2.5 MB": 2_500_000, "8 MB": 8_000_000}
_LARGE = 64 << 20  # bytes of the copy that the bandwidth is taken from
_SLACK, _CONSTANT_US = 1.5, 20.0
_QUANTITIES = ("dispatch_us", "launch_us", "complete_us", "landed_us", "plain_us", "restore_us")


def bound_us(size: int, bandwidth: float) -> float:
    """The most microseconds that a checkpoint of ``size`` bytes should take at ``bandwidth`` bytes per second."""
    return _SLACK * size / bandwidth * 1e6 + _CONSTANT_US


def body(rig: Rig) -> Document:
    torch, ring, device = rig.torch, rig.engine.ring, rig.device
    cuda = device.type == "cuda"
    sources = {name: torch.empty(size // 4, device=device) for name, size in SIZES.items()}
    targets = {name: torch.empty(size // 4, pin_memory=cuda) for name, size in SIZES.items()}
    large = torch.ones(_LARGE // 4, device=device)
    landing = torch.zeros(_LARGE // 4, pin_memory=cuda)
    found: dict[str, dict[str, list[float]]] = {name: {key: [] for key in _QUANTITIES} for name in SIZES}
    speeds: list[float] = []

    def one(name: str, launch: Callable[[], None]) -> None:
        source, kept = sources[name], found[name]
        source.normal_()  # just written, as a layer's output is
        rig.sync()
        began = time.perf_counter()
        made = ring.save(source)
        dispatched = time.perf_counter()
        made.wait()
        landed = time.perf_counter()
        kept["dispatch_us"].append((dispatched - began) * 1e6)
        assert made.complete_us is not None  # it has landed
        kept["complete_us"].append(made.complete_us)
        kept["landed_us"].append((landed - began) * 1e6)
        back, _ = ring.restore(made)
        kept["restore_us"].append((time.perf_counter() - landed) * 1e6)
        if not torch.equal(back, source):
            raise RuntimeError(f"a checkpoint of {name} came back with other bytes")
        ring.drop(made)
        began = time.perf_counter()
        launch()
        kept["launch_us"].append((time.perf_counter() - began) * 1e6)
        source.normal_()
        rig.sync()
        began = time.perf_counter()
        targets[name].copy_(source, non_blocking=True)
        rig.sync()
        kept["plain_us"].append((time.perf_counter() - began) * 1e6)

    def bandwidth() -> None:
        rig.sync()
        began = time.perf_counter()
        landing.copy_(large, non_blocking=True)
        rig.sync()
        speeds.append(_LARGE / (time.perf_counter() - began))

    with bare_launch(rig) as launch:
        for _ in range(3):  # the first of everything is slow
            rig.do(bandwidth)
            for name in SIZES:
                rig.do(one, name, launch)
        speeds.clear()
        found = {name: {key: [] for key in _QUANTITIES} for name in SIZES}
        for _ in rig.rounds(rig.options.n, "checkpoints"):
            for name in rig.shuffled(list(SIZES)):
                rig.do(one, name, launch)
            rig.do(bandwidth)
    speed = quantity(speeds)
    by_size = {}
    for name, kept in found.items():
        size = SIZES[name]
        most = bound_us(size, speed["p50"])
        by_size[name] = {
            "bytes": size,
            **{key: quantity(values) for key, values in kept.items()},
            "beyond_launch_us": beyond(kept["dispatch_us"], kept["launch_us"]),
            "bound_us": round(most, 1),
            "complete_over_bound": quantity([value / most for value in kept["complete_us"]]),
            "restore_over_bound": quantity([value / most for value in kept["restore_us"]]),
        }
    return {"bandwidth_bytes_per_s": speed, "pinned": cuda, "by_size": by_size}


@contextmanager
def bare_launch(rig: Rig) -> Iterator[Callable[[], None]]:
    """The cheapest way to have something copied while one goes on."""
    torch = rig.torch
    if rig.device.type == "cuda":
        stream = torch.cuda.Stream(rig.device)
        here, there = torch.ones(1, device=rig.device), torch.ones(1, pin_memory=True)

        def launch() -> None:
            with torch.cuda.stream(stream):
                there.copy_(here, non_blocking=True)

        yield launch
        stream.synchronize()
        return
    work: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def drain() -> None:
        while work.get() is not None:
            pass

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield lambda: work.put(0)
    finally:
        work.put(None)
        thread.join()


if __name__ == "__main__":
    raise SystemExit(
        sessions_common.main(
            "sessions_checkpoint",
            sessions_common.parser("sessions_checkpoint", __doc__, n=200, budget=60),
            body,
        )
    )
