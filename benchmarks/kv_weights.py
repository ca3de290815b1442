"""A model whose layers' weights do not all fit: what a token and a prompt take, by how many layers the device holds.

Each number of layers is loaded anew and answers the same prompts; the tokens are compared with the whole model's.
`no prefetch` brings a layer when it is needed and not before; `four at once`: sessions that do not share a batch go
through the layers together, so that a layer comes once for all of them.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks import kv_common
from benchmarks.journal import Document
from benchmarks.kv_common import KvRig
from benchmarks.sessions_common import quantity
from benchmarks.suite import say

BUDGET = 1 << 30  # bytes for caches
PROMPTS = 5
SHARES = (0.75, 0.5, 0.0)  # of the layers; the last: two of them, the least


def body(rig: KvRig) -> Document:
    prompt = rig.prompt(rig.options.prompt)
    made: Document = {"layers": rig.layers, "fit": {}}
    fits = {max(2, round(share * rig.layers)) for share in SHARES}
    written: dict[str, list[list[int]]] = {}
    # In an order that is drawn: a machine that gets slower is not to be taken for a way that is.
    for fit, prefetch in rig.shuffled([(rig.layers, True), *((fit, ahead) for fit in fits for ahead in (True, False))]):
        name = str(fit) if prefetch else f"{fit}, no prefetch"
        if fit == rig.layers:
            with rig.serving(BUDGET, max_batch=1):
                written[name], found = measured(rig, prompt)
        else:
            with paged(rig, fit, prefetch=prefetch) as weights:
                written[name], found = measured(rig, prompt, weights)
            found |= {"prefetch": prefetch, "device_bytes": fit * weights.largest, "in_turns": len(weights.turns)}
        say(f"  {name} of {rig.layers} layers: {found['token_ms']['p50']:.1f} ms a token")
        made["fit"][name] = found
    whole = written[str(rig.layers)]
    for name, found in made["fit"].items():
        found["tokens_equal"] = written[name] == whole
    made["fit"] = dict(sorted(made["fit"].items(), key=lambda item: (-int(item[0].split(",")[0]), item[0])))
    made["token_mismatches"] = sum(not found["tokens_equal"] for found in made["fit"].values())
    return made


@contextlib.contextmanager
def paged(rig: KvRig, fit: int, *, prefetch: bool) -> Iterator[Any]:
    """An engine with so many of the layers on the device."""
    from hooks.gpuckpt_guest.engine.engine import Engine
    from hooks.gpuckpt_guest.engine.model import load

    options = rig.options
    largest = largest_layer(rig)
    loaded = load(str(options.model), device=options.device, dtype=options.dtype, weights=fit * largest)
    weights = loaded.stepper.weights
    assert weights is not None
    if not prefetch:
        weights._next = lambda layer: [layer] if layer in weights.turns else []  # type: ignore[method-assign]
    before = rig.engine, rig.loaded
    rig.engine, rig.loaded = Engine(loaded, max_batch=1), loaded
    rig.engine.start()
    try:
        yield weights
    finally:
        rig.engine.stop()
        weights.close()
        loaded.stepper.close()
        rig.engine, rig.loaded = before
        gc.collect()


def largest_layer(rig: KvRig) -> int:
    """Bytes of the largest layer, as it lies in a slot."""
    from hooks.gpuckpt_guest.weights import ALIGN

    layers = rig.loaded.stepper.layers
    return max(sum(-(-int(it.nbytes) // ALIGN) * ALIGN for it in one.parameters()) for one in layers)


def measured(rig: KvRig, prompt: list[int], weights: Any = None) -> tuple[list[list[int]], Document]:
    """The tokens of all that was asked, and milliseconds of a prompt, of a token, and of a token with four at once."""
    count = rig.options.n
    prompts: list[float] = []
    passes: list[float] = []
    written = []
    loads = weights.loaded if weights else 0
    for _ in range(PROMPTS):
        session = rig.session()
        began, watch = rig.begin(session, prompt, count)
        times = [began]
        times += [watch.until("token")[0] for _ in range(count)]
        watch.until("done")
        prompts.append((times[1] - began) * 1000)
        passes += [(later - sooner) * 1000 for sooner, later in itertools.pairwise(times[1:])]
        written.append(list(session.tokens))
        rig.do(rig.engine.delete, session)
    made: Document = {"prompt_ms": quantity(prompts), "token_ms": quantity(passes)}
    if weights:
        made["loads_per_pass"] = round((weights.loaded - loads) / (PROMPTS * count), 3)
    sessions = [rig.session() for _ in range(4)]
    for session in sessions:  # each has read its prompt before the clock starts
        rig.begin(session, prompt, 1)[1].until("done")
    loads = weights.loaded if weights else 0
    watches = [rig.begin(session, [], count) for session in sessions]
    began = min(began for began, _ in watches)
    ended = max(watch.until("done")[0] for _, watch in watches)
    if weights:
        made["four_loads_per_pass"] = round((weights.loaded - loads) / (4 * count), 3)
    made["four_token_ms"] = round((ended - began) * 1000 / (4 * count), 3)
    written += [list(session.tokens) for session in sessions]
    for session in sessions:
        rig.do(rig.engine.delete, session)
    return written, made


if __name__ == "__main__":
    raise SystemExit(kv_common.run("kv_weights", __doc__, body, n=20, budget=240))
