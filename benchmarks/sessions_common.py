"""What the benchmarks of the session engine share: options, a model with its engine, a client, the form of results.

The `sessions_*` scripts run in the server's environment, where torch is; `benchmarks.sessions` starts them from the
host's environment and merges what they write. torch is imported inside functions, so that both can import this.

Everything that computes runs on the engine's thread, the plain model and the hand-written loops included: they have the
same pool of threads and the same inference mode, and never compute at the same time as the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import interrupts
from benchmarks.journal import Document, summary
from benchmarks.statistics import bootstrap_interval, median
from benchmarks.suite import Budget, Unavailable, say
from gpuckpt.errors import InterruptedByUser

ROOT = Path(__file__).resolve().parents[1]
DIGITS = 6
_LONGEST_ANSWER = 120.0  # seconds that a generation, or a server's start, may take


def quantity(values: Sequence[float]) -> Document:
    """p50, p95, n, interval and samples of measured values."""
    found = summary([{"value": value} for value in values], "value")
    if found is None:
        raise ValueError("nothing was measured")
    return found


def paired(above: Sequence[float], below: Sequence[float]) -> Document:
    """The median of the ratios of pairs that were measured one right after the other, and its 95 % interval.

    Raises ValueError for no pairs, or if one side has more than the other.
    """
    ratios = [over / under for over, under in zip(above, below, strict=True)]
    low, high = bootstrap_interval(ratios)
    return {
        "value": round(median(ratios), DIGITS),
        "interval": [round(low, DIGITS), round(high, DIGITS)],
        "n": len(ratios),
        "above": quantity(above),
        "below": quantity(below),
    }


def beyond(values: Sequence[float], floor: Sequence[float]) -> Document:
    """What pairs differ by: the :func:`quantity` of the differences."""
    return quantity([value - least for value, least in zip(values, floor, strict=True)])


class Watch:
    """A sink of the engine's events that notes when each came, by the performance counter, on the engine's thread."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[tuple[float, dict[str, Any]]] = queue.SimpleQueue()

    def __call__(self, event: dict[str, Any]) -> None:
        self._events.put((time.perf_counter(), event))

    def until(self, kind: str) -> tuple[float, dict[str, Any]]:
        """The next event of a kind, and when it came; others before it are passed over.

        Raises RuntimeError if the generation ends with an error first, queue.Empty if nothing comes.
        """
        while True:
            at, event = self._events.get(timeout=_LONGEST_ANSWER)
            if event["type"] == "done" and event["reason"] not in ("length", "stop"):
                raise RuntimeError(f"a generation ended: {event['reason']} {event.get('error', '')}")
            if event["type"] == kind:
                return at, event
            if event["type"] == "done":
                raise RuntimeError(f"a generation was done before it was {kind}")


class Child:
    """A process that answers each line of JSON with one: a client, or a peer that needs an environment of its own."""

    def __init__(self, argv: Sequence[str | Path], *, name: str) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(word) for word in argv],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
        )

    def ask(self, question: Document) -> Document:
        """Raises Unavailable with what it said, if it ends or says that it cannot."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Unavailable(f"{self.name} ended with status {self._process.wait()}")
        answer: Document = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it: it ends by itself at the end of its input."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def answer_lines(answer: Callable[[Document], Document]) -> None:
    """The other end of a :class:`Child`."""
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


class Rig:
    """A model with its engine, and what a benchmark asks of them. A context manager: the engine ends with it."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from hooks.gpuckpt_guest.engine.engine import Engine
        from hooks.gpuckpt_guest.engine.model import load

        # As the server sets it.
        sys.setswitchinterval(0.0005)
        self.options = options
        self.chance = random.Random(options.seed)
        self.torch = torch
        self.loaded = load(str(options.model), device=options.device, dtype=options.dtype)
        self.model = self.loaded.stepper.model
        self.device = self.loaded.device
        self.layers = self.loaded.verdict.layers
        self.engine = Engine(self.loaded)
        self.budget = Budget(options.budget)  # loading took none of it

    def __enter__(self) -> Rig:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()

    def cache(self, tokens: int) -> Any:
        """An empty cache for so many tokens, in an arena of its own."""
        from hooks.gpuckpt_guest.kv.arena import Arena

        plan = self.loaded.blueprint
        return plan.session(Arena.small(plan.forms, plan.windows, device=self.device, tables=1, limit=tokens))

    @property
    def quick(self) -> bool:
        return bool(self.options.quick)

    def rounds(self, count: int, what: str) -> Iterator[int]:
        """As many rounds as wanted, or as the budget allows; always two, of which the first often only warms up."""
        for index in range(count):
            if index > 1 and self.budget.spent:
                say(f"  {what}: the budget is spent after {index} of {count} rounds")
                return
            yield index
        say(f"  {what}: {count} rounds, {self.budget.elapsed:.0f} s")

    def shuffled(self, things: Sequence[Any]) -> list[Any]:
        """In an order of its own each time."""
        return self.chance.sample(list(things), len(things))

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have the engine's thread call it, and wait."""
        return self.engine.do(function, *args, **kwargs).result(_LONGEST_ANSWER)

    def sync(self) -> None:
        """Wait until the device has done what it was told."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize(self.device)

    def timed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
        """Seconds that a function takes on the engine's thread, with all that it has the device do; and its result."""

        def run() -> tuple[float, Any]:
            self.sync()
            began = time.perf_counter()
            made = function(*args, **kwargs)
            self.sync()
            return time.perf_counter() - began, made

        took, made = self.do(run)
        return float(took), made

    def prompt(self, tokens: int) -> list[int]:
        """Token ids, another prompt each time; of the same run of a benchmark the same ones."""
        return [self.chance.randrange(8, min(self.loaded.vocabulary, 8000)) for _ in range(tokens)]

    def session(self, **more: Any) -> Any:
        """A new session of the engine."""
        return self.do(self.engine.create, **more)

    def begin(
        self, session: Any, read: Sequence[int], tokens: int, *, keep_logits: bool = False
    ) -> tuple[float, Watch]:
        """Start a generation of exactly so many tokens, greedy; when it was asked for, and its events."""
        from hooks.gpuckpt_guest.engine.engine import Request

        watch = Watch()
        began = time.perf_counter()
        wanted = Request(read=read, max_tokens=tokens, ignore_stops=True, keep_logits=keep_logits)
        self.do(self.engine.generate, session, wanted, watch)
        return began, watch

    def generate(self, read: Sequence[int], tokens: int, **more: Any) -> tuple[float, list[int]]:
        """Seconds and tokens of one whole generation in a session that is deleted afterwards."""
        session = self.session(**more)
        began, watch = self.begin(session, read, tokens)
        ended, _ = watch.until("done")
        made = list(session.tokens[len(read) :])
        self.do(self.engine.delete, session)
        return ended - began, made

    def plainly(self, rows: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """The same by transformers' own `generate`, of prompts of one length as one batch."""
        from transformers import GenerationConfig

        wanted = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        ids = self.torch.tensor(rows, device=self.device)
        mask = self.torch.ones_like(ids)
        took, made = self.timed(
            lambda: self.model.generate(ids, attention_mask=mask, generation_config=wanted).tolist()
        )
        return took, [row[ids.shape[1] :] for row in made]

    def facts(self) -> Document:
        """What was measured on what."""
        import transformers

        cuda = self.device.type == "cuda"
        return {
            "model": Path(self.options.model).name,
            "architecture": self.loaded.verdict.architecture,
            "layers": self.layers,
            "features": self.loaded.features,
            "dtype": str(self.loaded.dtype).removeprefix("torch."),
            "device": self.torch.cuda.get_device_name(self.device) if cuda else "cpu",
            "threads": self.torch.get_num_threads(),
            "batching": self.loaded.verdict.batching,
            "torch": self.torch.__version__,
            "transformers": transformers.__version__,
        }


@contextlib.contextmanager
def served(rig: Rig) -> Iterator[Child]:
    """A client, in a process of its own, of the engine's HTTP interface on a Unix socket."""
    import uvicorn

    from hooks.gpuckpt_guest.api.app import application

    with tempfile.TemporaryDirectory(prefix="gpuckpt-sessions-") as folder:
        address = f"{folder}/server.sock"
        # The client rests longer than the five seconds after which the server would hang up.
        config = uvicorn.Config(
            application(rig.engine),
            uds=address,
            log_level="warning",
            access_log=False,
            loop="asyncio",
            timeout_keep_alive=600,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="http")
        thread.start()
        client = Child([sys.executable, "-m", "benchmarks.sessions_common", address], name="the client")
        try:
            until = time.monotonic() + _LONGEST_ANSWER
            while not server.started:
                if time.monotonic() > until or not thread.is_alive():
                    raise RuntimeError("the HTTP server did not start")
                time.sleep(0.01)
            client.ask({"method": "GET", "path": "/health"})
            yield client
        finally:
            client.close()
            server.should_exit = True
            thread.join()


def _client(address: str) -> None:
    """Read requests, send them over one connection, answer with the milliseconds from begin to last byte."""
    import http.client
    import socket

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(address)

    connection = Connection("localhost")

    def answer(question: Document) -> Document:
        body = json.dumps(question.get("json")).encode() if "json" in question else None
        began = time.perf_counter()
        connection.request(question["method"], question["path"], body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
        took = time.perf_counter() - began
        if response.status >= 400:
            return {"error": f"status {response.status}: {data[:300].decode(errors='replace')}"}
        return {"ms": took * 1000, "json": json.loads(data)}

    answer_lines(answer)
    connection.close()


def parser(name: str, about: str | None, *, n: int, budget: float) -> argparse.ArgumentParser:
    """The options that each part has."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--model", type=Path, required=True, help="folder of a checkpoint (scripts/make_model.py)")
    made.add_argument("--dtype", default="auto", help="auto (the checkpoint's own, the default), float32, bfloat16 …")
    made.add_argument("--device", default="auto", help="auto (the default), cpu, cuda")
    made.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default: %(default)s)")
    made.add_argument("-n", "--n", type=int, default=n, help="samples of each (default: %(default)s)")
    made.add_argument("--budget", type=float, default=budget, help="seconds after which to stop (default: %(default)g)")
    made.add_argument("--seed", type=int, default=1, help="of prompts and orders (default: %(default)s)")
    made.add_argument("--quick", action="store_true", help="few samples: does it work at all?")
    made.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    return made


def main(
    name: str,
    made: argparse.ArgumentParser,
    body: Callable[[Any], Document],
    argv: Sequence[str] | None = None,
    *,
    rig: type[Rig] = Rig,
) -> int:
    """Parse, load, measure, write; returns the exit status. Nothing is written if the measurement fails.

    The budget begins when the model is there. Whatever interrupts the run, what it started ends first.
    """
    options = made.parse_args(argv)
    options.n = min(options.n, 3) if options.quick else options.n
    load = os.getloadavg()
    try:
        with interrupts():
            document = _measured(name, options, body, load, rig)
    except InterruptedByUser as interrupted:
        print(interrupted.message, file=sys.stderr)
        return interrupted.exit_code
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def _measured(
    name: str, options: argparse.Namespace, body: Callable[[Any], Document], load: Sequence[float], kind: type[Rig]
) -> Document:
    with kind(options) as rig:
        say(f"{name}: {json.dumps(rig.facts())}")
        result = body(rig)
        return {
            "part": name,
            "setting": rig.facts() | {"prompt": options.prompt, "seed": options.seed, "quick": options.quick},
            "load_average": [round(value, 2) for value in load],
            "elapsed_s": round(rig.budget.elapsed, 1),
            **result,
        }


if __name__ == "__main__":
    _client(sys.argv[1])
