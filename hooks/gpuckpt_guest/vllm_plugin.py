"""vLLM's side of a golden, loaded through its plugin entry point in every process of the server.

Requests without a seed draw from torch's global generator in the worker; so the sampler asks, before each step,
whether it wakes up as a new replica. Requests with a seed have a generator of their own and are left alone.
"""

from __future__ import annotations

import functools
from typing import Any

from gpuckpt_guest import lifecycle


def register() -> None:
    """Called by vLLM when it loads its plugins; may be called several times in a process."""
    from vllm.v1.sample.sampler import Sampler

    if getattr(Sampler.forward, "_gpuckpt", False):
        return
    forward = Sampler.forward

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        lifecycle.check()
        return forward(self, *args, **kwargs)

    checked._gpuckpt = True  # type: ignore[attr-defined]
    Sampler.forward = checked
