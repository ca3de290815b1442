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
import contextlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment, models, pool_states, soak_load
from benchmarks.harness import ROOT
from benchmarks.pool_process import PoolProcess
from benchmarks.pool_setup import Served, bigrams, config, guest, vllm
from benchmarks.soak_chaos import Chaos, criu_of
from benchmarks.soak_load import Client, Question
from benchmarks.workspace import Workspace, workspace
from gpuckpt import proc
from gpuckpt.errors import GpuckptError, VerificationError
from gpuckpt.service.view import ModelView

_MAKING = 900.0  # seconds that the goldens may take
_WINDOW = 8.0  # seconds after a kill of the daemon in which connections may be found cut
_PROMPTS = ("the", "Once upon a time", "def main(", "0 1 2", "import os", "a list of", "and so", "To be", "x =")
_QUESTIONS = 4  # of these for each model


@dataclass(frozen=True)
class Asked:
    """A model of the soak, how often it is asked (seconds between two requests of a burst), and for how many tokens."""

    served: Served
    mean_s: float
    tokens: int

    @property
    def name(self) -> str:
        return self.served.name


def asked_for(space: Workspace, prefix: Path, *, quick: bool) -> list[Asked]:
    """The models of one run; those that are missing are made."""
    texts = [ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")]
    small = [
        Asked(bigrams(space, f"words-{text.stem}", 0.05, text, concurrency=4), mean_s=1.0, tokens=12) for text in texts
    ]
    if quick:
        return small
    # One request at a time: beside others a batch's sums are made in another order, and a tie may fall otherwise.
    large = [
        Asked(vllm(space, "qwen", models.QWEN, prefix, 512, concurrency=1), mean_s=6.0, tokens=4),
        Asked(vllm(space, "gpt2", models.GPT2, prefix, 512, concurrency=1), mean_s=4.0, tokens=8),
        Asked(guest(space, "tiny", models.TINY, prefix, concurrency=2), mean_s=2.0, tokens=8),
    ]
    for shape in (models.QWEN, models.GPT2, models.TINY):
        models.make(prefix, shape, lambda: None)
    return [*large, *small]


# Idle times of seconds, and a budget that not everything fits into.
_RULES = {"max_replicas": 3, "idle_freeze": "2s", "idle_release": "4s", "idle_disk": "12s"}
_HEALTH = {"interval": "1s", "timeout": "3s", "failures": 3, "stalled": "60s", "canary": "20s", "retry": "0.5s"}
_FRONT = {"deadline": "4min", "keep_alive": "2s", "drain": "20s"}


def run(space: Workspace, *, minutes: float, seed: int, quick: bool, every_s: float, log: Path) -> dict[str, Any]:
    """One soak; the result."""
    served = asked_for(space, environment.prefix(), quick=quick)
    budget = {"memory": "200M" if quick else "1500M"}
    toml = config([one.served for one in served], _RULES, _FRONT, health=_HEALTH, budget=budget)
    pool = PoolProcess(space.folder, toml, space.env)
    try:
        say(f"goldens of {len(served)} models are made")
        pool.start()
        for one in served:
            pool.until(one.name, is_made, _MAKING)
        say("each question is asked undisturbed, and beside another")
        expected: dict[Question, str] = {}
        doubtful: dict[str, list[str]] = {}
        for one in served:
            expected |= firm_answers(pool, space, one, doubtful)
        questions = {one.name: [question for question in expected if question.model == one.name] for one in served}
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
            if chaos.failure is not None:
                raise chaos.failure
            events.read()
            tell(began, minutes, clients, chaos)
        say("")
        replies = [reply for client in clients for reply in client.replies]
        result: dict[str, Any] = {"minutes": minutes, "seed": seed, "models": [one.name for one in served]}
        result |= {"doubtful": doubtful}
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


def firm_answers(
    pool: PoolProcess, space: Workspace, one: Asked, doubtful: dict[str, list[str]]
) -> dict[Question, str]:
    """Questions and their answers, for whose words it does not matter what else the server computes just then.

    Beside another request, a canary for example, a batch's sums are made in another order, and where two words are as
    likely to the last bit, the other one may be said. ``doubtful`` gets the prompts for which that is so.
    """
    found: dict[Question, str] = {}
    for prompt in _PROMPTS:
        asked = [Question(one.name, prompt, one.tokens, stream) for stream in (True, False)]
        texts = [first_answer(pool, question) for question in asked]
        if not all(texts):
            continue  # a model of a text has no word for it
        if all(beside(pool, space, one, question) == text for question, text in zip(asked, texts, strict=True)):
            found |= dict(zip(asked, texts, strict=True))
        else:
            doubtful.setdefault(one.name, []).append(prompt)
        if len(found) == 2 * _QUESTIONS:
            return found
    raise VerificationError(f"{one.name} has too few questions whose answer is firm", cause=str(doubtful))


def beside(pool: PoolProcess, space: Workspace, one: Asked, question: Question) -> str:
    """The answer while the replica is at work for somebody else, of whom the pool does not know."""
    endpoint = pool_states.endpoints(space, one.served.golden)[0]
    served = json.loads(endpoint.request("GET", "/v1/models").body)["data"][0]["id"]
    other = {"model": served, "prompt": "Hello", "max_tokens": 300, "stream": True, "temperature": 0}
    with contextlib.closing(endpoint.stream("POST", "/v1/completions", other)) as stream:
        next(stream)
        return soak_load.ask(pool.port, question).text


def first_answer(pool: PoolProcess, question: Question) -> str:
    """The answer of the quiet minute; the same again must be the same."""
    texts = {soak_load.ask(pool.port, question).text for _ in range(2)}
    if len(texts) != 1:
        raise VerificationError(f"{question.model} does not repeat its answer undisturbed", cause=str(texts))
    return texts.pop()


def is_made(model: ModelView) -> bool:
    """Whether its golden is there; raises GpuckptError if it could not be made, for then it will not be later."""
    if model.trouble:
        raise GpuckptError(f"{model.name} has no golden", cause=model.trouble)
    return model.golden.tier in ("tmpfs", "disk")


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


def damage(space: Workspace, one: Asked) -> str:
    """Change a byte in the middle of the largest file of a golden, wherever it lies."""
    name = one.served.golden
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
