"""What is served: the launch line, health, warm-up, quiesce and canary of each kind of server."""

from gpuckpt.manifest import Workload
from gpuckpt.workload.base import Adapter
from gpuckpt.workload.http import Http
from gpuckpt.workload.vllm import Vllm

__all__ = ["Adapter", "Http", "Vllm", "adapter"]


def adapter(record: Workload) -> Adapter:
    """The adapter for what a manifest records."""
    return Vllm(record) if record.kind == "vllm" else Http(record)
