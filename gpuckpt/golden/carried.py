"""Weights on their way to a device while the server that will have them is brought back: read by a thread of ours."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gpuckpt.errors import GpuckptError, GpuFullError
from gpuckpt.golden.tools import Tools
from gpuckpt.manifest import Held
from gpuckpt.store.reading import opened


class Carried:
    """Weights that are read into device memory while the server is not there yet, by a thread."""

    def __init__(self, tools: Tools, file: Path, uuid: str) -> None:
        self._tools = tools
        self._file = file
        self._uuid = uuid
        self._handle: int | None = None
        self._error: GpuckptError | OSError | None = None
        self._thread = threading.Thread(target=self._run, name="gpuckpt-carried", daemon=True)
        self._abandoned = False
        self._ending = threading.Lock()
        self._thread.start()

    def _run(self) -> None:
        handle: int | None = None
        try:
            with opened([self._file]) as files:
                handle = self._tools.devices.carry(files[0], self._uuid)
        except (GpuckptError, OSError) as error:
            self._error = error
        with self._ending:
            if self._abandoned and handle is not None:
                os.close(handle)
            else:
                self._handle = handle

    def handle(self) -> int | None:
        """The memory, as an open file, once all is there; None, and the user is told, if that has failed."""
        self._thread.join()
        if self._error is not None:
            self._tools.report.note(f"the weights were not carried ahead, and are read later: {self._error}")
        return self._handle

    def close(self) -> None:
        """Let go of the memory, now or when it is there: nobody waits for it."""
        with self._ending:
            self._abandoned = True
            if self._handle is not None:
                os.close(self._handle)
                self._handle = None


@contextlib.contextmanager
def carried(
    tools: Tools, held: Sequence[Held], files: Sequence[Path], chosen: Mapping[str, str]
) -> Iterator[Carried | None]:
    """Have the weights on their way to the device that ``chosen`` names, while the body brings the server back.

    None where there is nothing to carry, or no room for it: for a moment they are on the device twice. Servers of
    several processes read theirs with as many threads already.
    """
    if len(files) != 1 or len(held) != 1 or not tools.devices.can_carry():
        yield None
        return
    (device,) = held
    uuid = chosen[device.uuid]
    twice = Held(uuid, device.name, files[0].stat().st_size)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(tools.devices.reserve([twice], (uuid,)))
        except GpuFullError:
            yield None
            return
        except (GpuckptError, OSError) as error:
            tools.report.note(f"the weights were not carried ahead, and are read later: {error}")
            yield None
            return
        found = Carried(tools, files[0], uuid)
        stack.callback(found.close)
        yield found
