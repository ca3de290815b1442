"""Know that one is a replica now, and become a different one than the others.

All replicas of a golden begin with the same memory, the state of their random generators included: asked the same
question without a seed, they would give the same "random" answer. Before a replica runs, gpuckpt writes a file into
the folder that only this replica sees, with a seed of its own. A server calls :func:`check` before it draws random
numbers; that costs one stat(2), about a microsecond.

Without this module a server can do the same by itself: the path is in the environment variable GPUCKPT_IDENTITY, the
file is JSON, ``{"replica": NAME, "seed": HEX}``, and it does not exist before the dump.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable

IDENTITY = os.environ.get("GPUCKPT_IDENTITY", "/run/gpuckpt/identity")

_seen: tuple[int, int] | None = None
_listeners: list[Callable[[str, int], None]] = []


def on_new_identity(listener: Callable[[str, int], None]) -> None:
    """Have ``listener(replica, seed)`` called by :func:`check` in a replica, once; the seed has 256 bits."""
    _listeners.append(listener)


def check() -> bool:
    """Reseed every known generator if this process woke up as another replica since the last call; True if so."""
    global _seen  # noqa: PLW0603 - what the process has seen is the state that a dump carries
    try:
        status = os.stat(IDENTITY)
    except FileNotFoundError:
        return False
    found = (status.st_ino, status.st_mtime_ns)
    if found == _seen:
        return False
    with open(IDENTITY, encoding="utf-8") as file:
        identity = json.load(file)
    _seen = found
    reseed(int(identity["seed"], 16))
    for listener in _listeners:
        listener(str(identity["replica"]), int(identity["seed"], 16))
    return True


def reseed(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, as far as they are loaded.

    Each process of a server gets other numbers from the same seed: its pid is mixed in.
    """
    own = random.Random(seed ^ os.getpid())
    random.seed(own.getrandbits(256))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(own.getrandbits(32))
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(own.getrandbits(63))
