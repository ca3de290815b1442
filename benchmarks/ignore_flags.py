"""What each --ignore flag of a restore costs or saves, on a server with a published port and a volume.

    python -m benchmarks.ignore_flags

The server is the synthetic one: the flags are about its container, not about its memory. Writes ignore_flags.json.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import suite
from benchmarks.driver import Gpuckpt, Server
from benchmarks.journal import Document
from benchmarks.ours import Goldens, Restore
from benchmarks.restore import summarise as by_method
from benchmarks.suite import Run
from benchmarks.workspace import PREFIX
from gpuckpt import proc

GOLDEN = "published"
MEGABYTES = 100
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "static_ip": ("--ignore-static-ip",),
    "static_mac": ("--ignore-static-mac",),
    "static_ip_and_mac": ("--ignore-static-ip", "--ignore-static-mac"),
    "volumes": ("--ignore-volumes",),
    "rootfs": ("--ignore-rootfs",),
    "all": ("--ignore-static-ip", "--ignore-static-mac", "--ignore-volumes", "--ignore-rootfs"),
}


@dataclass
class Published(Restore):
    """A restore whose volume is removed first: only then do the flags about it mean anything."""

    volume: str = ""

    def measure(self) -> dict[str, object]:
        proc.run(["podman", "volume", "rm", "-f", self.volume], check=False)
        return super().measure()


def body(run: Run) -> None:
    gpuckpt = Gpuckpt(run.space)
    volume = f"{PREFIX}-{free_port()}"
    server = Server.filler(MEGABYTES, where="{port}")
    options = ("--publish", str(free_port()), "--volume", f"{volume}:/bench")
    server = Server((*server.options, *options), server.words)
    goldens = Goldens(gpuckpt, run.journal, server)
    with contextlib.ExitStack() as stack:
        stack.callback(proc.run, ["podman", "volume", "rm", "-f", volume], check=False)
        methods: list[suite.Method] = [
            Published(name, goldens, server, GOLDEN, "mapped", options, volume=volume)
            for name, options in VARIANTS.items()
        ]
        run.rounds(run.prepare(methods, stack))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def summarise(document: Document) -> Document:
    found = by_method(document)
    return {
        name: entry | {"about": " ".join(VARIANTS[name]) or "no flag"}
        for name, entry in found.items()
        if name in VARIANTS
    }


def parser() -> argparse.ArgumentParser:
    return suite.parser("ignore_flags", __doc__, n=10, budget=900)


def main(argv: Sequence[str] | None = None) -> int:
    return suite.main("ignore_flags", parser(), body, argv=argv, summarise=summarise)


if __name__ == "__main__":
    sys.exit(main())
