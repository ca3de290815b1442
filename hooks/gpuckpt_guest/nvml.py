"""The NVIDIA management library, let go of before a process is frozen.

torch asks it how many GPUs there are and leaves it open; so a process that never computes on a GPU, like vLLM's API
server, holds descriptors of /dev/nvidiactl and /dev/nvidia0 that no driver call closes and CRIU cannot dump. The
library counts who has opened it, and everybody who uses it opens it first.

Written from NVML's documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import os

_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0
_MOST = 1 << 12


def let_go(library: str = _LIBRARY) -> int:
    """Close it as often as it has been opened in this process; returns how often that was."""
    try:
        found = ctypes.CDLL(library, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:  # nobody here has loaded it
        return 0
    for count in range(_MOST):
        if found.nvmlShutdown() != _SUCCESS:  # it is not open
            return count
    return _MOST
