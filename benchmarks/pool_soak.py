"""Ten minutes of the pool under random load and chaos: no wrong answer, no request lost, nothing left behind.

    python -m benchmarks.pool_soak                  six models, ten minutes
    python -m benchmarks.pool_soak --minutes 1 --quick   three small ones

Requests come at random times for six models (two of vLLM, one of the guest server, three of a small one); idle times
are so short that every tier is left and entered again; budgets are so small that models push each other out. Chaos
kills replicas, single processes of theirs, CRIU and the daemon, stops servers, and damages a golden, from one seed.
Every answer is compared with that of the quiet minute before. Writes soak.json; its status is 8 if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment, soak_load
from benchmarks.harness import ROOT
from benchmarks.pool_process import PoolProcess
from benchmarks.soak_chaos import Chaos, criu_of
from benchmarks.soak_load import Client, Question
from benchmarks.workspace import Workspace, workspace
from gpuckpt import proc
from gpuckpt.errors import GpuckptError, VerificationError

BIGRAMS = ROOT / "benchmarks" / "servers" / "bigrams.py"
_MAKING = 900.0  # seconds that the goldens may take
_WINDOW = 8.0  # seconds after a kill of the daemon in which connections may be found cut
_PROMPTS = ("the", "Once upon a time", "def main(", "0 1 2")


@dataclass(frozen=True)
class Served:
    """A model of the soak: its table's lines, and how often it is asked."""

    name: str
    create: Sequence[str]
    concurrency: int
    mean_s: float
    tokens: int


def bigrams(space: Workspace, name: str, text: Path) -> Served:
    """A small model of the words of a file."""
    canary = f'POST /v1/completions {{"model": "{name}", "prompt": "the", "max_tokens": 4}}'
    words = ["--volume", f"{BIGRAMS.parent}:{BIGRAMS.parent}", "--volume", f"{text.parent}:{text.parent}"]
    words += ["--canary", canary, "--warmup", "1", "--", "/usr/bin/python3", str(BIGRAMS), "{socket}"]
    return Served(name, [*words, "--name", name, "--text", str(text), "--pause", "0.05"], 4, 1.0, 12)


def models(space: Workspace, prefix: Path, *, quick: bool) -> list[Served]:
    """The models of one run."""
    small = [bigrams(space, f"words-{name}", ROOT / f"{name}.md") for name in ("README", "CHANGELOG", "CONTRIBUTING")]
    if quick:
        return small
    vllm = ["--env", "VLLM_CPU_KVCACHE_SPACE=1", "--env", "VLLM_CPU_NUM_OF_RESERVED_CPU=0", "--"]
    folders = {"qwen": "qwen2-0.5b-random", "gpt2": "gpt2-124m-random", "tiny": "tiny-random"}
    at = {name: prefix / "models" / folder for name, folder in folders.items()}
    if missing := ", ".join(str(folder) for folder in at.values() if not folder.is_dir()):
        raise GpuckptError(f"no model at {missing}", remedy="make demo-pool and make bench-sessions make them")

    def words(name: str, *more: str) -> list[str]:
        return ["--model", str(at[name]), "--served-model-name", name, *more]

    # One request at a time: beside others a batch's sums are made in another order, and a tie may fall otherwise.
    return [
        Served("qwen", [*vllm, *words("qwen", "--max-model-len", "512")], 1, 6.0, 4),
        Served("gpt2", [*vllm, *words("gpt2", "--max-model-len", "512")], 1, 4.0, 8),
        Served("tiny", ["--workload", "guest", "--", *words("tiny")], 2, 2.0, 8),
        *small,
    ]


def configuration(space: Workspace, served: Sequence[Served], *, quick: bool) -> str:
    """The pool's TOML: idle times of seconds, a budget that not everything fits into."""
    parts = [
        "[health]\ninterval = '1s'\ntimeout = '3s'\nfailures = 3\nstalled = '60s'\ncanary = '20s'\nretry = '0.5s'",
        "[front]\ndeadline = '4min'\nkeep_alive = '2s'\ndrain = '20s'",
        f"[budget]\nmemory = '{'200M' if quick else '1500M'}'",
    ]
    for one in served:
        lines = [f"golden = {json.dumps(f'{space.word}-{one.name}')}", f"create = {json.dumps(list(one.create))}"]
        lines += [f"concurrency = {one.concurrency}", "max_replicas = 3", "idle_freeze = '2s'", "idle_release = '4s'"]
        parts.append("\n".join([f"[models.{one.name}]", *lines, "idle_disk = '12s'"]))
    return "\n\n".join(parts) + "\n"


def run(space: Workspace, *, minutes: float, seed: int, quick: bool, every_s: float, log: Path) -> dict[str, Any]:
    """One soak; the result."""
    served = models(space, environment.prefix(), quick=quick)
    pool = PoolProcess(space.folder, configuration(space, served, quick=quick), space.env)
    try:
        say(f"goldens of {len(served)} models are made")
        pool.start()
        for one in served:
            pool.until(one.name, lambda model: model.golden.tier in ("tmpfs", "disk"), _MAKING)
        say("each question is asked once, undisturbed")
        questions = {
            one.name: [Question(one.name, p, one.tokens, s) for p in _PROMPTS for s in (True, False)] for one in served
        }
        expected: dict[Question, str] = {}
        for asked in questions.values():
            for question in asked:
                expected[question] = first_answer(pool, question)
        say(f"{minutes:g} minutes of load and chaos, seed {seed}")
        until = time.monotonic() + minutes * 60
        clients = [
            Client(
                pool.port,
                questions[one.name],
                expected,
                seed=f"{seed} {one.name}",
                until=until,
                mean_s=one.mean_s,
                pauses_s=(3, 5, 8, 15, 20),
            )
            for one in served
        ]
        chaos = Chaos(pool, seed=str(seed), until=until - 5, mean_s=every_s, damage=lambda: damage(space, served[-1]))
        began = time.monotonic()
        events = Events(pool)
        for thread in (*clients, chaos):
            thread.start()
        while any(client.is_alive() for client in clients) or chaos.is_alive():
            time.sleep(1.0)
            events.read()
            tell(began, minutes, clients, chaos)
        say("")
        if chaos.failure is not None:
            raise chaos.failure
        replies = [reply for client in clients for reply in client.replies]
        result: dict[str, Any] = {"minutes": minutes, "seed": seed, "models": [one.name for one in served]}
        result |= soak_load.counted(replies, chaos.killed, window_s=_WINDOW)
        result |= {"chaos": dict(Counter(one["deed"] for one in chaos.done)), "events": events.counted()}
        result["deeds"] = [one | {"at": round(one["at"] - began, 2)} for one in chaos.done]
        result["status"] = pool.stop()
        result["left"] = left(space)
        result["metrics_log_errors"] = [line for line in pool.log.read_text().splitlines() if " error " in line][:20]
        return result
    finally:
        try:
            pool.close()
        finally:
            log.write_text(pool.log.read_text())


def first_answer(pool: PoolProcess, question: Question) -> str:
    """The answer of the quiet minute; the same again must be the same."""
    texts = {soak_load.ask(pool.port, question).text for _ in range(2)}
    if len(texts) != 1 or texts == {""}:
        raise VerificationError(f"{question.model} does not repeat its answer undisturbed", cause=str(texts))
    return texts.pop()


class Events:
    """What happened in the pool, through all the daemons that there were."""

    def __init__(self, pool: PoolProcess) -> None:
        self._pool = pool
        self._seen: dict[tuple[int, int], tuple[str, str, str]] = {}

    def read(self) -> None:
        """Note what is new; nothing where no daemon answers just now."""
        try:
            view = self._pool.view()
            for event in self._pool.client.events():
                self._seen[view.pid, event.seq] = (event.kind, event.tier, event.reason)
        except GpuckptError:
            return

    def counted(self) -> dict[str, int]:
        """How often each kind of thing happened, wakes by the tier that they came from."""
        kinds = [f"{kind} from {tier}" if tier else kind for kind, tier, _ in self._seen.values()]
        return dict(Counter(kinds).most_common())


def damage(space: Workspace, one: Served) -> str:
    """Change a byte in the middle of the largest file of a golden, wherever it lies."""
    name = f"{space.word}-{one.name}"
    found = [path for path in (space.store / "goldens" / name, space.state / "goldens" / name) if path.is_dir()]
    for folder in found:
        target = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        with target.open("r+b") as file:
            file.seek(target.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0xFF]))
    return f"{name} in {len(found)} places"


def left(space: Workspace) -> list[str]:
    """What should not be there any more: containers, mounts, folders, processes."""
    listed = proc.run(["podman", "ps", "-a", "--format", "{{.Names}}"]).stdout
    found = [f"container {name}" for name in listed.split() if space.word in name]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount = line.split()[4]
        if mount.startswith(f"{space.folder}/") and mount != str(space.store):
            found.append(f"mount {mount}")
    for parent in (space.store / "staging", space.state / "goldens" / ".staging", space.state / "replicas"):
        found += [f"folder {path}" for path in parent.glob("*")]
    found += [f"CRIU {pid}" for pid in criu_of(space.folder)]
    return found


def say(text: str) -> None:
    """One line for who watches."""
    print(text, file=sys.stderr, flush=True)


def tell(began: float, minutes: float, clients: Sequence[Client], chaos: Chaos) -> None:
    """How it goes."""
    outcomes = Counter(reply.outcome for client in clients for reply in client.replies)
    text = ", ".join(f"{count} {word}" for word, count in sorted(outcomes.items()))
    line = f"  {time.monotonic() - began:4.0f} of {minutes * 60:.0f} s: {text}; {len(chaos.done)} deeds of chaos"
    print(f"\r{line}\033[K" if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr)


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong, one sentence each."""
    outcomes = result["outcomes"]
    checks = {
        "wrong answers": outcomes.get("wrong", 0),
        "requests lost": outcomes.get("lost", 0),
        "connections cut while no daemon was killed": result["cut_without_a_kill"],
        "things left behind": len(result["left"]),
        "daemon's exit status": result["status"],
    }
    return [f"{what}: {count}" for what, count in checks.items() if count]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=float, default=6.0, help="seconds between deeds of chaos, on average")
    parser.add_argument("--quick", action="store_true", help="three small models only")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with workspace() as space:
        result = run(
            space,
            minutes=options.minutes,
            seed=options.seed,
            quick=options.quick,
            every_s=options.every,
            log=options.output / "soak.log",
        )
    result["faults"] = faults(result)
    (options.output / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    say(json.dumps({name: value for name, value in result.items() if name not in ("deeds", "troubles")}, indent=2))
    for fault in result["faults"]:
        say(f"FAULT: {fault}")
    return VerificationError.exit_code if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
