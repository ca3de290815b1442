"""The warm pool with three models behind one address: cold, hot, killed, idle to zero and back, a burst, drained.

Makes two models with random weights where there are none, writes the configuration that a user would write, and runs
the service with it: two vLLM servers of different sizes and a small HTTP server that is none. Everything is asked at
the one address that clients use. Writes demo_pool.json and demo_pool.png. Whatever ends it, the service, its replicas
and its goldens are removed.

    make demo-pool                        or, when everything is set up:
    python -m benchmarks.demo_pool
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import environment, harness, models, pool_states
from benchmarks.demo_pool_words import memory_table, result_table, times
from benchmarks.pool_client import Reply, ask, threads
from benchmarks.pool_memory import ColdWatch, machine, noted, of_replicas
from benchmarks.pool_process import PoolProcess, running
from benchmarks.pool_setup import PROMPT, Served, bigrams, config, vllm
from benchmarks.statistics import Summary
from benchmarks.terminal import Terminal
from benchmarks.workspace import Workspace, workspace
from gpuckpt.errors import PreflightError, VerificationError

_Result = TypeVar("_Result")
JSON_VERSION = 1
SAMPLES = 5
TIERS = ("cold", "tmpfs", "standby", "hot")
REPLICAS = 4  # of the model that meets a burst
STREAMS = 8
WORDS = 32  # of each answer in the burst
LONG = 48  # of the answer in the middle of which a replica is killed
SHORT_IDLE = {"idle_freeze": "2s", "idle_release": "3s"}
_COLUMNS = "118"


class Demo:
    """One run in ``space``; the results go to ``output``."""

    def __init__(self, space: Workspace, *, output: Path, terminal: Terminal) -> None:
        self.space = space
        self.output = output
        self.terminal = terminal
        self.say, self.title = terminal.say, terminal.title
        self.prefix = environment.prefix()
        self.served = [
            vllm(space, "qwen", models.QWEN, self.prefix, 2048),
            vllm(space, "gpt2", models.GPT2, self.prefix, 1024, max_replicas=REPLICAS, concurrency=STREAMS // REPLICAS),
            bigrams(space),
        ]
        self.ttft: dict[str, dict[str, list[float]]] = {one.name: {tier: [] for tier in TIERS} for one in self.served}
        self.cold_memory: dict[str, dict[str, int] | None] = {}
        self.result: dict[str, Any] = {
            "version": JSON_VERSION,
            "clock": "from before the client connects to the first streamed token, CLOCK_MONOTONIC",
            "models": {one.name: one.about for one in self.served},
            "load_average": environment.load(),
        }

    def run(self) -> dict[str, Any]:
        """Everything, in order; the result as it was written to demo_pool.json. Leaves nothing running."""
        self._require_setup()
        self.output.mkdir(parents=True, exist_ok=True)
        self.say(
            self.terminal.bold("gpuckpt demo: three models behind one address, each kept as warm as its use is worth")
        )
        self.title("1  The models")
        self._make_models()
        self.title("2  The configuration: all that a user writes")
        toml = config(self.served)
        self.say("\n".join(f"  {line}" for line in toml.splitlines()))
        before = machine()
        with running(self.space.folder, toml, self.space.env) as pool:
            self.say("\n  $ gpuckpt pool run --config pool.toml")
            self.title("3  The first requests: there is no golden yet, so each model starts cold, once")
            self._cold(pool)
            self.title("4  Three models, one address")
            self._hot(pool)
            self.title("5  Memory")
            self._memory(pool, before)
            self.title("6  A replica is killed with -9 while it answers")
            self._kill(pool)
            self.title("7  Idle to zero, and back")
            self._idle(pool)
            self._samples(pool)
            self.title(f"8  A burst: {STREAMS} streams at once for a model that has one replica")
            self._burst(pool)
            self.title("9  What the service says")
            self._status(pool)
            self.title("10  Drain")
            self._drain(pool)
        self.title("11  The result")
        return self._conclude()

    def _require_setup(self) -> None:
        if os.geteuid() != 0:
            raise PreflightError("must run as root", remedy="sudo make demo-pool")
        if not (self.prefix / "server" / "bin" / "python").exists():
            raise PreflightError(
                f"there is no server environment in {self.prefix}",
                remedy="make setup-server (or make demo-pool, which does it)",
            )

    def _make_models(self) -> None:
        for shape in (models.QWEN, models.GPT2):
            with self.terminal.waiting(partial(models.progress, self.prefix, shape)) as tick:
                folder = models.make(self.prefix, shape, tick)
            self.say(f"  {shape.about}: {folder}")
        self.say("  No download: seeded random weights. They load and compute like the published models, and repeat")
        self.say(
            "  themselves exactly; what they say makes no sense. The third server is a bigram model in plain Python."
        )

    # ------------------------------------------------------------------ the steps

    def _ask(self, pool: PoolProcess, name: str, tokens: int = 1, prompt: str = PROMPT) -> Reply:
        reply = ask(pool.port, name, prompt, tokens, more={"temperature": 0, "ignore_eos": True})
        self.ttft[name].setdefault(reply.tier, []).append(round(reply.first_s, 6))
        return reply

    def _cold(self, pool: PoolProcess) -> None:
        self.say("  A request for a model that is not there waits, its stream held open by comments, and is answered.")
        self.say("  Meanwhile: the server's start, its warm-up, the golden, and a first restore from that.")
        for one in reversed(self.served):
            with ColdWatch(one.golden) as watch:
                reply = self._meanwhile(f"{one.name} starts cold", self._ask, pool, one.name, 8)
            self.cold_memory[one.name] = watch.result
            self.say(f"  {times(one.name, reply, self.terminal)}   held open by {reply.comments} comments")
        self.say("  From now on each start is a restore.")

    def _meanwhile(self, what: str, work: Callable[..., _Result], *args: Any) -> _Result:
        """Do ``work`` in a thread, and meanwhile show what goes on."""
        with threads(1) as worker, self.terminal.waiting(lambda: what) as tick:
            doing = worker.submit(work, *args)
            while not doing.done():
                tick()
                time.sleep(0.2)
            return doing.result()

    def _hot(self, pool: PoolProcess) -> None:
        self.say(f"  $ curl {pool.url}/v1/completions -H 'Content-Type: application/json' \\")
        self.say(f'      -d \'{{"model": …, "prompt": "{PROMPT}", "stream": true}}\'')
        for one in self.served:
            pool_states.make_hot(pool, one.name)
            self._ask(pool, one.name)  # what a replica does only at its first request
            self.ttft[one.name]["hot"].pop()
            reply = self._ask(pool, one.name, 8)
            self.say(f"  {times(one.name, reply, self.terminal)}   {reply.text[:44]!r}")
        self.say("  The tier and both times are in the answer's headers, x-gpuckpt-tier and server-timing; “our clock”")
        self.say("  is this client's, from before it connects to the first token.")

    def _memory(self, pool: PoolProcess, before: int) -> None:
        with self.terminal.waiting(lambda: "until the books are read again"):
            noted(pool)
        rows = {}
        for one in self.served:
            pool_states.make_hot(pool, one.name)
            model = pool.model(one.name)
            held = of_replicas(model)[0]
            rows[one.name] = {
                "golden_bytes": model.golden.bytes,
                "own_bytes": held["own_bytes"],
                "pss_bytes": held["pss_bytes"],
                "cold": self.cold_memory[one.name],
            }
        self.result["memory"] = {"models": rows, "available_before": before, "available_with_all": machine()}
        for line in memory_table(self.result["memory"]):
            self.say(line)

    def _kill(self, pool: PoolProcess) -> None:
        pool_states.make_hot(pool, "qwen")
        undisturbed = self._whole(pool)
        with threads(1) as worker:
            asked = worker.submit(self._whole, pool)
            victim = pool.until("qwen", lambda model: model.requests > 0).replicas[0]
            time.sleep(min(1.0, undisturbed.whole_s / 3))
            assert victim.pid is not None
            self.say(f"  {LONG} tokens are asked for, not streamed: nothing of the answer has been sent when")
            self.say(f"  $ kill -9 {victim.pid}        # {victim.name}")
            os.kill(victim.pid, signal.SIGKILL)
            with self.terminal.waiting(lambda: "the request is given to another replica"):
                reply = asked.result()
        lost = [event for event in pool.client.events(model="qwen") if event.kind == "lost"]
        equal = reply.text == undisturbed.text
        self.say(
            f"  answered all the same, by {reply.replica}, after {self.terminal.bold(f'{reply.whole_s:.2f} s')} "
            f"(undisturbed: {undisturbed.whole_s:.2f} s); retries: {reply.retries}"
        )
        self.say("  " + (self.terminal.green("the same words") if equal else self.terminal.red("other words")))
        self.result["killed"] = {
            "undisturbed_s": round(undisturbed.whole_s, 6),
            "answered_s": round(reply.whole_s, 6),
            "retries": reply.retries,
            "same_text": equal,
            "lost": [event.reason for event in lost],
        }

    def _whole(self, pool: PoolProcess) -> Reply:
        return ask(pool.port, "qwen", PROMPT, LONG, stream=False, more={"temperature": 0, "ignore_eos": True})

    def _idle(self, pool: PoolProcess) -> None:
        pool.config.write_text(config(self.served, SHORT_IDLE))
        pool.client.reload()
        idle = ", ".join(f'{key} = "{value}"' for key, value in SHORT_IDLE.items())
        self.say(f"  $ gpuckpt pool reload       # with {idle}: short, so that it can be watched")
        for one in self.served:
            pool_states.make_hot(pool, one.name)
        for one in self.served:
            self._meanwhile("nobody asks", pool.until, one.name, pool_states.standby)
            self.say(f"  {one.name} is frozen; asked: {times('', self._ask(pool, one.name), self.terminal)}")
        for one in self.served:
            self._meanwhile("nobody asks for longer", pool.until, one.name, pool_states.golden_only)
            reply = self._prepared_and_asked(pool, one)
            self.say(f"  {one.name} is gone, its golden is in memory; asked: {times('', reply, self.terminal)}")
        pool.config.write_text(config(self.served))
        pool.client.reload()

    def _prepared_and_asked(self, pool: PoolProcess, one: Served) -> Reply:
        pool_states.until_prepared(self.space, one.golden, 1)
        return self._ask(pool, one.name)

    def _samples(self, pool: PoolProcess) -> None:
        self.say(
            f"  The same again by order (gpuckpt pool wake, sleep, sleep --release), until there are {SAMPLES} of each:"
        )
        self._meanwhile("asking", self._until_enough, pool)
        for one in self.served:
            medians = {tier: Summary(tuple(self.ttft[one.name][tier])).p50 for tier in TIERS}
            self.say(f"  {one.name:<8} " + "   ".join(f"{tier} {value:7.3f} s" for tier, value in medians.items()))

    def _until_enough(self, pool: PoolProcess) -> None:
        """In rounds, so that whatever else the machine does then meets all tiers alike."""
        ways = {"hot": pool_states.make_hot, "standby": pool_states.make_standby, "tmpfs": pool_states.release}
        for count in range(1, SAMPLES + 1):
            for one in self.served:
                for tier, go in ways.items():
                    if len(self.ttft[one.name][tier]) < count:
                        go(pool, one.name)
                        self._prepared_and_asked(pool, one) if tier == "tmpfs" else self._ask(pool, one.name)

    def _burst(self, pool: PoolProcess) -> None:
        pool_states.make_hot(pool, "gpt2")
        golden = next(one.golden for one in self.served if one.name == "gpt2")
        pool_states.until_prepared(self.space, golden, REPLICAS - 1)
        self.say(f"  max_replicas = {REPLICAS}, concurrency = {STREAMS // REPLICAS}; each stream has {WORDS} tokens")
        before, began = pool.client.events()[-1].seq, time.time()
        with threads(STREAMS) as workers, self.terminal.waiting(lambda: "they answer"):
            more = {"temperature": 0, "ignore_eos": True}
            replies = list(workers.map(lambda _: ask(pool.port, "gpt2", PROMPT, WORDS, more=more), range(STREAMS)))
        came = pool_states.brought_up(pool.client.events(after=before, model="gpt2"))
        first, last = (max(getattr(reply, key) for reply in replies) for key in ("first_s", "whole_s"))
        equal = len({reply.text for reply in replies}) == 1
        for event in came:
            self.say(f"  {event.time - began:6.2f} s  {event.replica} {event.kind}")
        self.say(
            f"  every stream has its first token after {self.terminal.bold(f'{first:.2f} s')}, and all {WORDS} after "
            f"{last:.2f} s; from {1 + len(came)} replicas"
        )
        self.say("  " + (self.terminal.green("all say the same words") if equal else self.terminal.red("they differ")))
        self.result["burst"] = {
            "streams": STREAMS,
            "first_s": [round(reply.first_s, 6) for reply in replies],
            "whole_s": [round(reply.whole_s, 6) for reply in replies],
            "replicas": 1 + len(came),
            "came_s": [round(event.time - began, 6) for event in came],
            "own_bytes": [held["own_bytes"] for held in of_replicas(pool.model("gpt2"))],
            "same_text": equal,
        }

    def _status(self, pool: PoolProcess) -> None:
        env = self.space.env | {"GPUCKPT_POOL_SOCKET": str(pool.admin), "COLUMNS": _COLUMNS}
        for words in (["pool", "status"], ["pool", "ps"]):
            self.say(f"  $ gpuckpt {' '.join(words)}")
            shown = harness.run(words, cwd=self.output, env=env).stdout
            self.say("\n".join(f"  {line}".rstrip() for line in shown.splitlines()))
            self.say()

    def _drain(self, pool: PoolProcess) -> None:
        self.say("  $ gpuckpt pool drain --yes")
        began = time.monotonic()
        env = self.space.env | {"GPUCKPT_POOL_SOCKET": str(pool.admin)}
        harness.run(["pool", "drain", "--yes"], cwd=self.output, env=env)
        assert pool.process is not None
        code = pool.process.wait(120)
        left = [one.name for served in self.served for one in pool_states.replicas(self.space.state, served.golden)]
        taken = time.monotonic() - began
        self.say(f"  what was at work is done, the replicas are gone; it has ended with {code} after {taken:.1f} s")
        self.result["drain"] = {"exit_code": code, "seconds": round(taken, 3), "replicas_left": left}

    # ------------------------------------------------------------------ the result

    def _conclude(self) -> dict[str, Any]:
        summaries = {
            name: {tier: Summary(tuple(values)).as_dict() for tier, values in tiers.items() if values}
            for name, tiers in self.ttft.items()
        }
        self.result |= {"ttft_s": summaries, "machine": environment.machine(self.prefix)}
        (self.output / "demo_pool.json").write_text(json.dumps(self.result, indent=2) + "\n")
        for line in result_table(self.result):
            self.say(line)
        with self.terminal.waiting(lambda: "drawing"):
            from benchmarks import pool_figures  # matplotlib takes a second to import

            pool_figures.demo(self.result, self.output / "demo_pool.png")
        for file, what in (("demo_pool.json", "every number"), ("demo_pool.png", "the figure")):
            self.say(f"  {_relative(self.output / file)}   {what}")
        if not (self.result["killed"]["same_text"] and self.result["burst"]["same_text"]):
            raise VerificationError("a restored replica said other words than the one before it")
        return self.result


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.demo_pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--output", type=Path, default=harness.ROOT / "build" / "demo", help="folder of the results")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or that of what failed."""
    options = parser().parse_args(argv)
    terminal = Terminal()

    def work() -> None:
        with workspace() as space:
            Demo(space, output=options.output.absolute(), terminal=terminal).run()
        terminal.say("\nThe service, its replicas and its goldens are removed again.")

    return harness.status_of(work)


if __name__ == "__main__":
    sys.exit(main())
