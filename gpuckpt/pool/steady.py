"""Loops in the background, which one failure must not end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

_log = logging.getLogger("gpuckpt.pool")


async def again_and_again(work: Callable[[], object], pause: float) -> None:
    """Do it every ``pause`` seconds, until cancelled. What fails is a fault of ours: the log has it, and it goes on."""
    while True:
        try:
            work()
        except Exception:
            _log.exception("%s failed unexpectedly", getattr(work, "__qualname__", work))
        await asyncio.sleep(pause)
