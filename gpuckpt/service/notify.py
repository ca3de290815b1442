"""What the daemon tells systemd of itself: sd_notify(3), one datagram a message.

Without ``NOTIFY_SOCKET`` in the environment (the daemon runs in a terminal) nothing is sent and nothing fails.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping

from msgspec import Struct

from gpuckpt.errors import UsageError

# systemd reads the socket from its main loop, which a reload of all units can keep busy for a while.
_PATIENCE = 5.0


class Notifier(Struct, frozen=True):
    """Messages to the manager that started us. ``watchdog``: seconds within which it expects a ping, None for never.

    A message that cannot be delivered raises OSError: a manager that never hears of ``ready`` would kill us later for
    a reason that nobody could guess. Pings and status texts are not worth that; the next one follows.
    """

    address: str | None = None
    watchdog: float | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        """Of the variables that systemd has set; raises UsageError for a socket's address that cannot be one."""
        address = environ.get("NOTIFY_SOCKET") or None
        if address is not None and not address.startswith(("/", "@")):
            raise UsageError(
                f"NOTIFY_SOCKET cannot be {address!r}",
                cause="it is neither an absolute path nor an abstract socket (@…)",
                remedy="start the pool by systemd, or unset the variable",
            )
        return cls(address, _watchdog(environ))

    @property
    def ping_every(self) -> float | None:
        """Seconds between pings: half of what systemd waits for, as sd_watchdog_enabled(3) advises."""
        return self.watchdog / 2 if self.watchdog else None

    def ready(self, status: str = "") -> None:
        """The start, or the reload, is done: the front answers."""
        self._send({"READY": "1"} | ({"STATUS": status} if status else {}))

    def reloading(self) -> None:
        """The configuration is being read; ``ready`` must follow.

        The time is how systemd tells this reload from an earlier one (Type=notify-reload): it must not lie before the
        moment at which it sent SIGHUP.
        """
        self._send({"RELOADING": "1", "MONOTONIC_USEC": str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)})

    def stopping(self, status: str = "") -> None:
        """The end has begun, whoever asked for it: systemd's time to stop counts from now."""
        self._send({"STOPPING": "1"} | ({"STATUS": status} if status else {}))

    def extend(self, seconds: float) -> None:
        """The start, reload or stop that is under way may take that long from now on.

        Without a further message it then fails by its timeout; repeat it while there is progress.
        """
        self._send({"EXTEND_TIMEOUT_USEC": str(int(seconds * 1_000_000))})

    def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        self._try({"STATUS": text})

    def ping(self) -> None:
        """The loop is alive."""
        self._try({"WATCHDOG": "1"})

    def _try(self, message: Mapping[str, str]) -> None:
        # From the daemon's loop, which must not wait for systemd; a full queue takes the next one.
        with contextlib.suppress(OSError):
            self._send(message, wait=False)

    def _send(self, message: Mapping[str, str], *, wait: bool = True) -> None:
        if self.address is None:
            return
        # A line is an assignment: a text with a line break would begin another.
        lines = (f"{name}={' '.join(value.split())}" for name, value in message.items())
        # An abstract socket's name begins with a zero byte, for which @ stands.
        to = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.settimeout(_PATIENCE if wait else 0)
            channel.sendto("\n".join(lines).encode(errors="replace"), to)


def _watchdog(environ: Mapping[str, str]) -> float | None:
    # WATCHDOG_PID: the variables are inherited, and a child of the one that is watched must not ping.
    meant = environ.get("WATCHDOG_PID")
    if meant is not None and meant != str(os.getpid()):
        return None
    try:
        period = int(environ.get("WATCHDOG_USEC") or 0)
    except ValueError:
        return None
    return period / 1_000_000 if period > 0 else None
