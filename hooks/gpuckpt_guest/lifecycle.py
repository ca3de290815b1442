"""Know which replica this process is, and become a different one than the others.

All replicas of a golden begin with the same memory, the state of their random generators included: asked the same
question without a seed, they would give the same "random" answer. So gpuckpt writes a file into the folder that only
one replica sees before that replica's processes run again: its name, its golden's, and a seed of its own. While a
golden is made the file is not there. The environment cannot say so: a restored process has the golden's.

In a server, before random numbers are drawn (at the begin of each request, say)::

    from gpuckpt_guest import lifecycle

    lifecycle.check()

which costs one stat(2), about a microsecond, and reseeds once per replica what every program shares: ``random``,
NumPy's global state and torch's default generators on all devices. A generator of the program's own is its own to
reseed::

    lifecycle.on_restore(lambda identity: rng.seed(identity.derive("my rng")))

``lifecycle.identity()`` says which replica this is. What the operating system gives (``os.urandom``, ``secrets``,
``uuid.uuid4``) differs between replicas without any of this.

A server that is not written in Python, or has no gpuckpt_guest on its path, can do the same by itself: the file is
JSON, ``{"replica": NAME, "golden": NAME, "seed": 64 HEX DIGITS}``, replaced by a rename, so that its inode and
modification time tell a new one. Its path is in the environment variable GPUCKPT_IDENTITY, or /run/gpuckpt/identity.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

PATH = "/run/gpuckpt/identity"

_log = logging.getLogger("gpuckpt_guest")


@dataclass(frozen=True)
class Identity:
    """Which replica of which golden this process runs in; ``seed`` is the replica's own 256 bits, a secret."""

    replica: str
    golden: str
    seed: bytes = field(repr=False)

    def derive(self, label: str, size: int = 32) -> bytes:
        """``size`` bytes (1 to 64) of the replica's own: the same for the same label, unrelated for any other.

        Put ``os.getpid()`` into the label if each process is to have others.
        """
        return hashlib.blake2b(label.encode(), key=self.seed, digest_size=size, person=b"gpuckpt guest").digest()


Listener = TypeVar("Listener", bound=Callable[[Identity], object])


class Watcher:
    """Notices that the process woke up as another replica. Safe to use from any thread."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path or os.environ.get("GPUCKPT_IDENTITY") or PATH
        self._lock = threading.RLock()
        # What the process has seen is part of the memory that a dump carries: another file means another replica.
        self._seen: tuple[int, int] | None = None
        self._at_work = False
        self._identity: Identity | None = None
        self._group: str | None = None
        self._listeners: list[Callable[[Identity], object]] = []

    def check(self) -> bool:
        """Reseed if the identity has changed since the last call; True if this call did.

        When it returns, in whatever thread, generators and listeners are done. A file that is no identity is left
        alone with one warning.
        """
        try:
            status = os.stat(self._path)
        except OSError:  # not there (no replica), or not for us to see
            return False
        found = (status.st_ino, status.st_mtime_ns)
        if found == self._seen and not self._at_work:
            return False
        with self._lock:
            if found == self._seen or self._at_work:  # another thread did it; or a listener asks, in the midst of it
                return False
            self._at_work = True
            try:
                self._seen, self._identity = _read(self._path) or (found, None)
                if self._identity is None:
                    return False
                self._wake(self._identity)
                return True
            finally:
                self._at_work = False

    def identity(self) -> Identity | None:
        """Which replica this is, reseeding first if that is news; None while no replica was restored."""
        self.check()
        return self._identity

    def on_restore(self, listener: Listener) -> Listener:
        """Have ``listener(identity)`` called once per replica, after reseeding, by the thread that notices it.

        An exception of a listener is logged, and the next one is called. Also a decorator.
        """
        self._listeners.append(listener)
        return listener

    def forget(self, listener: Callable[[Identity], object]) -> None:
        """Call the listener no more."""
        self._listeners = [one for one in self._listeners if one is not listener]

    def share(self, group: str) -> None:
        """Draw the same numbers as every other process of the replica that names this ``group``.

        Without it each process draws others. Processes that compute one thing together (the ranks of a
        tensor-parallel model sample each by itself and must agree) need it before their first check.
        """
        with self._lock:
            if group != self._group:
                self._group = group
                self._seen = None

    def _wake(self, identity: Identity) -> None:
        reseed(identity, self._group or f"process {os.getpid()}")
        _log.debug("this is replica %s of golden %s now", identity.replica, identity.golden)
        for listener in tuple(self._listeners):
            try:
                listener(identity)
            except Exception:
                _log.exception("a listener to restores failed")


def reseed(identity: Identity, group: str) -> None:
    """Seed the global generators of Python, OpenSSL, NumPy and torch, as far as they are loaded, for ``group``."""
    random.seed(identity.derive(f"random, {group}", 64))
    # Not imported yet: NumPy will seed itself from the operating system.
    numpy = sys.modules.get("numpy.random")
    if numpy and hasattr(numpy, "seed"):
        numpy.seed(struct.unpack("<8I", identity.derive(f"numpy, {group}")))
    # OpenSSL's generator is memory of the process, and notices a fork by the process id, which a clone keeps.
    ssl = sys.modules.get("ssl")
    if ssl:
        ssl.RAND_add(identity.derive(f"ssl, {group}"), 32.0)
    # The processor's generator and those of all devices; where CUDA is not up yet, torch keeps the seed until it is.
    torch = sys.modules.get("torch")
    if torch and hasattr(torch, "manual_seed"):
        torch.manual_seed(int.from_bytes(identity.derive(f"torch, {group}", 8), "little") >> 1)


def _read(path: str) -> tuple[tuple[int, int], Identity] | None:
    try:
        with open(path, encoding="utf-8") as file:
            status = os.fstat(file.fileno())
            found = json.load(file)
        seed = bytes.fromhex(found["seed"])
        if len(seed) != 32:
            raise ValueError(f"the seed has {len(seed)} bytes, not 32")
        identity = Identity(str(found["replica"]), str(found["golden"]), seed)
        return (status.st_ino, status.st_mtime_ns), identity
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s is no identity (%r): this replica draws the same random numbers as its golden", path, error)
        return None


_process = Watcher()
check = _process.check
identity = _process.identity
on_restore = _process.on_restore
forget = _process.forget
share = _process.share
