"""Which servers cannot live under the seccomp profile that mapped memory needs, and how that shows.

Under it nobody can drop pages of memory or move it (see docs/mapped.md). Most programs take the refusal for what it is;
some take it for the end of the world.
"""

from __future__ import annotations

import re
import signal

# V8 ends the process when madvise(MADV_DONTNEED) fails, whatever the error (CHECK_EQ in OS::SetPermissions and in the
# sweeper's DiscardUnusedMemory), at its start or at a garbage collection much later.
_V8 = re.compile(r"/(node|nodejs|deno|electron|chrome|chromium)$|/lib(node|v8|mini_racer)[^/]*\.so[.0-9]*$")
# How programs end that check an invariant: a trap, abort(), an illegal instruction, or an access gone wrong.
_FATAL = (signal.SIGTRAP, signal.SIGABRT, signal.SIGILL, signal.SIGSEGV, signal.SIGBUS)


def unfit(programs: set[str]) -> str | None:
    """Why a server that runs these programs and libraries (paths) must be copied, or None."""
    for path in sorted(programs):
        if _V8.search(path):
            return f"{path} is V8, which ends its process when it may not drop memory"
    return None


def died_of_it(exit_code: int) -> str | None:
    """Why a server's end with ``exit_code`` may be the profile's doing, or None: 128 and the signal, or an error."""
    if exit_code - 128 in _FATAL:
        name = signal.Signals(exit_code - 128).name
        return f"the server died of {name}, which can come of not being able to drop memory"
    return None
