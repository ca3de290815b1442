"""The warm pool: the first token by the tier that a request finds, scaling out, many replicas at once, cold starts.

    python -m benchmarks.pool                     everything; about 20 minutes on 2 cores
    python -m benchmarks.pool --parts tiers,scale -n 3

One service, two vLLM servers of different sizes behind its address; requests are streamed and ask for one token. Writes
pool.json: every sample with its phases, the summaries, the targets. What the front alone adds is measured with scripted
servers (see benchmarks.front).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import environment, front, models, pool_states, suite
from benchmarks.driver import Gpuckpt
from benchmarks.journal import Sample
from benchmarks.pool_client import ask
from benchmarks.pool_memory import ColdWatch
from benchmarks.pool_process import running
from benchmarks.pool_results import summarise
from benchmarks.pool_run import FRONT, MODEL, OTHER, RULES, Pool, first_token, sample_of
from benchmarks.pool_scale import Burst, Many, ScaleOut
from benchmarks.pool_setup import PROMPT, Served, config, vllm
from benchmarks.stock import evict
from benchmarks.suite import Method, Run
from gpuckpt.errors import GpuckptError, NotFoundError

BUDGET = 3600.0
COLD = 3
PARTS = ("front", "cold", "tiers", "scale", "many")
CLONES = 8
_QUIET = 0.3  # seconds before a request, in which what the last one has caused comes to an end


@dataclass
class Tier:
    """The first token of a request that finds the model in one tier."""

    name: str
    pool: Pool
    n: int | None = None

    def prepare(self) -> None:
        pass

    def measure(self) -> Sample:
        process = self.pool.process
        self._into()
        time.sleep(_QUIET)
        before = process.client.events()[-1].seq
        reply = self.pool.ask()
        if (found := "disk" if self.name == "disk_evicted" else self.name) != reply.tier:
            raise GpuckptError(f"the request found the tier {reply.tier}, not {found}")
        came = pool_states.brought_up(process.client.events(after=before, model=MODEL))
        return sample_of(reply) | {"phases": pool_states.phases_of(reply, came[0] if came else None)}

    def _into(self) -> None:
        pool, process = self.pool, self.pool.process
        # One that was asked for on disk moves into memory, which would be in another's numbers.
        pool_states.make_hot(process, MODEL)
        pool_states.until_in(process, MODEL, "tmpfs")
        if self.name in ("hot", "standby"):
            pool.ask()  # what a replica does only at its first request is in the other tiers' numbers
            pool_states.until_hot(process, MODEL)
        if self.name == "standby":
            pool_states.make_standby(process, MODEL)
        if self.name in ("tmpfs", "disk", "disk_evicted"):
            pool_states.release(process, MODEL)
        if self.name.startswith("disk"):
            pool.configure(max_replicas=CLONES, prepare=1, idle_disk="0.1s")
            pool_states.until_in(process, MODEL, "disk")
            pool.configure(max_replicas=CLONES, prepare=1)
        if self.name in ("tmpfs", "disk", "disk_evicted"):
            space = pool.run.space
            tier = "tmpfs" if self.name == "tmpfs" else "disk"
            pool_states.until_prepared(space, pool.golden(), 1, tier)
            if self.name == "disk_evicted":
                folder = space.state / "goldens" / pool.golden()
                for part in ("images", "memory"):
                    if (folder / part).is_dir():
                        evict(folder / part)

    def close(self) -> None:
        pass


@dataclass
class Direct:
    """The same request sent to the hot replica itself, beside the service: what the front adds is the difference."""

    pool: Pool
    name: str = "direct"
    n: int | None = None

    def prepare(self) -> None:
        pass

    def measure(self) -> Sample:
        process = self.pool.process
        pool_states.make_hot(process, MODEL)
        pool_states.until_in(process, MODEL, "tmpfs")
        self.pool.ask()
        pool_states.until_hot(process, MODEL)
        time.sleep(_QUIET)
        endpoint = pool_states.endpoints(self.pool.run.space, self.pool.golden())[0]
        return {"ttft_s": round(first_token(endpoint, MODEL), 6)}

    def close(self) -> None:
        pass


def cold_start(run: Run, served: Served, *, keep: bool) -> None:
    """A service that has no golden of the model is asked for it. Without ``keep`` the golden goes again."""
    run.say(f"cold start of {served.name}")
    with running(
        run.space.folder, config([served], RULES | {"max_replicas": CLONES, "prepare": 0}, FRONT), run.space.env
    ) as process:
        with ColdWatch(served.golden) as watch:
            reply = ask(process.port, served.name, PROMPT, 1, more={"temperature": 0})
        came = pool_states.brought_up(process.client.events(model=served.name))[0]
        image = process.model(served.name).golden.bytes
    series = "cold" if served.name == MODEL else f"cold_{served.name}"
    run.journal.add(
        series,
        sample_of(reply)
        | {"model": served.name, "phases": pool_states.phases_of(reply, came), "golden_bytes": image}
        | (watch.result or {}),
    )  # fmt: skip
    run.say(f"  {reply.first_s:.1f} s")
    if not keep:
        Gpuckpt(run.space).rm(served.name)


def body(run: Run) -> None:
    parts = run.options.parts.split(",")
    if "front" in parts:
        front.body(run)
    if not {*parts} & {"cold", "tiers", "scale", "many"}:
        return
    served = make_models(run, environment.prefix())
    goldens = min(COLD, run.n)
    if "cold" in parts:
        for number in range(run.journal.count("cold"), goldens):
            if run.out_of_time():
                return
            cold_start(run, served[MODEL], keep=number == goldens - 1)
        if not run.journal.count(f"cold_{OTHER}"):
            cold_start(run, served[OTHER], keep=True)
    toml = config(list(served.values()), RULES | {"max_replicas": CLONES, "prepare": 1}, FRONT)
    with running(run.space.folder, toml, run.space.env) as process:
        pool = Pool(process, run, served)
        for name in served:  # made now, where an earlier run has measured the cold starts
            pool.ask(name)
        with contextlib.ExitStack() as stack:
            if "tiers" in parts:
                names = ("hot", "standby", "tmpfs", "disk", "disk_evicted")
                methods: list[Method] = [Tier(name, pool) for name in names]
                run.rounds(run.prepare([*methods, Direct(pool)], stack))
            pool.configure(max_replicas=CLONES)
            if "scale" in parts:
                run.rounds(run.prepare([ScaleOut(pool, CLONES), Burst(pool, CLONES)], stack))
            if "many" in parts:
                run.rounds(run.prepare([Many(pool, (MODEL, OTHER))], stack))


def make_models(run: Run, prefix: Path) -> dict[str, Served]:
    """The two models, made where they are missing."""
    if not (prefix / "server" / "bin" / "python").exists():
        raise NotFoundError(f"there is no server environment in {prefix}", remedy="make setup-server")
    for shape in (models.QWEN, models.GPT2):
        models.make(prefix, shape, lambda: None)
    found = (
        vllm(run.space, MODEL, models.QWEN, prefix, 2048),
        vllm(run.space, OTHER, models.GPT2, prefix, 1024),
    )
    return {one.name: one for one in found}


def parser() -> argparse.ArgumentParser:
    made = suite.parser("pool", __doc__, n=10, budget=BUDGET)
    made.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("pool", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
