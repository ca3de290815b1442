"""The kernel's random numbers, as far as clones of one memory must not share them."""

from __future__ import annotations

import fcntl
import os

_RNDRESEEDCRNG = 0x5207  # linux/random.h


def renew() -> None:
    """Have the kernel reseed its generator, which makes every copy of the generator's state in user space stale.

    Since Linux 6.11 getrandom(3) may answer from such a state in the process' own memory (vDSO); clones share it. The
    kernel numbers its reseedings, and a state of an older number is thrown away. Raises OSError where it may not.
    """
    handle = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(handle, _RNDRESEEDCRNG)
    finally:
        os.close(handle)
