"""What the engine answers where a request cannot be met."""

from __future__ import annotations


class EngineError(Exception):
    """A request that cannot be met. ``status`` is the HTTP status that says so, ``code`` a word for programs."""

    def __init__(self, message: str, *, status: int = 400, code: str = "bad_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


def missing(what: str, name: str) -> EngineError:
    """There is no such thing."""
    return EngineError(f"there is no {what} {name!r}", status=404, code="not_found")


def conflict(message: str, code: str = "conflict") -> EngineError:
    """It is there, but not in a state that allows this."""
    return EngineError(message, status=409, code=code)


def full(name: str) -> EngineError:
    """There is no room outside of the device."""
    return EngineError(
        f"there is no room for the cache of session {name} outside of the device: host memory for caches is used up;"
        " delete or resume sessions, or give the server more (--kv-host-mib, --kv-disk-mib)",
        status=507,
        code="host_memory_full",
    )
