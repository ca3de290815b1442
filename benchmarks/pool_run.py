"""A running pool with two models, as the parts of the pool's benchmark share it."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.journal import Sample
from benchmarks.pool_client import Reply, ask
from benchmarks.pool_process import PoolProcess
from benchmarks.pool_setup import PROMPT, Served, config
from benchmarks.suite import Run
from gpuckpt.timing import now_ns
from gpuckpt.workload.endpoint import Endpoint

MODEL = "qwen"  # of the tiers and of scaling out
OTHER = "gpt2"
# No head goes ahead of its answer, so that each says which replica it is from.
FRONT = {"keep_alive": "10min"}
# Nothing sinks by itself: the methods say when.
RULES: dict[str, object] = {"concurrency": 1, "idle_freeze": "1h", "idle_release": "1h"}


@dataclass
class Pool:
    """The running service, and what the methods need to know of it."""

    process: PoolProcess
    run: Run
    served: dict[str, Served]

    def golden(self, name: str = MODEL) -> str:
        return self.served[name].golden

    def configure(self, **rules: object) -> None:
        """Have it go by other rules for every model; None takes a rule away."""
        kept = {key: value for key, value in (RULES | rules).items() if value is not None}
        self.process.config.write_text(config(list(self.served.values()), kept, FRONT))
        self.process.client.reload()

    def ask(self, name: str = MODEL) -> Reply:
        return ask(self.process.port, name, PROMPT, 1, more={"temperature": 0})


def first_token(endpoint: Endpoint, model: str) -> float:
    """Seconds until a replica, asked directly, has sent the first token of the same request."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "stream": True}
    asked, first = now_ns(), 0
    for arrived, event in endpoint.stream("POST", "/v1/completions", body):
        first = first or (arrived if event.get("choices") else 0)
    return (first - asked) / 1e9


def sample_of(reply: Reply) -> Sample:
    """What is kept of an answer: our clock's time, and the service's."""
    told = {f"told_{name}_s": round(value, 6) for name, value in reply.told.items()}
    return {"ttft_s": round(reply.first_s, 6), **told}
