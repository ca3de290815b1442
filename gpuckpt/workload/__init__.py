"""What is served: the launch line, health, warm-up, quiesce and canary of each kind of server."""

from gpuckpt.manifest import Workload
from gpuckpt.workload.base import Adapter
from gpuckpt.workload.http import Http
from gpuckpt.workload.session_guest import Guest
from gpuckpt.workload.vllm import Vllm

__all__ = ["Adapter", "Guest", "Http", "Vllm", "adapter"]


def adapter(record: Workload) -> Adapter:
    """The adapter for what a manifest records."""
    kinds: dict[str, type[Guest] | type[Http] | type[Vllm]] = {"guest": Guest, "http": Http, "vllm": Vllm}
    return kinds[record.kind](record)
