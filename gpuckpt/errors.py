"""Every failure gpuckpt reports, as one tree; each class knows its exit code.

    GpuckptError                 1   unexpected, or no better class
    ├── UsageError               2   the request itself is wrong
    ├── NothingToDo              3   nothing matched, nothing was changed
    ├── PreflightError           4   this machine cannot do it; checked before anything was touched
    ├── IncompatibleError        5   the golden does not fit this machine
    ├── NotFoundError            6   no such golden, replica, image, path
    ├── BusyError                7   somebody else is at it, or it is already running
    ├── VerificationError        8   bytes or answers differ from what was recorded
    ├── CheckpointError          9   the server could not be started, warmed up or dumped
    ├── RestoreError            10   the replica could not be brought back
    ├── OutOfSpaceError         11   not enough memory, tmpfs or disk
    │   └── GpuFullError        11   not enough memory on the GPUs
    ├── DaemonUnreachableError  12   the service (podman's, the pool's) does not answer
    └── DeadlineError           13   it took too long
    InterruptedByUser          130   Ctrl-C or SIGTERM; no GpuckptError, so that nothing that handles failures stops it

An error says what happened (the message), why (``cause``), what to do (``remedy``), and may carry lines of a log.
"""

from __future__ import annotations

from typing import Any, ClassVar


class _Report(BaseException):
    """What can end a command, and how it is reported."""

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        cause: str | None = None,
        remedy: str | None = None,
        log: tuple[str, ...] = (),
        log_path: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.remedy = remedy
        self.log = log
        self.log_path = log_path

    def as_dict(self) -> dict[str, Any]:
        """The error as a JSON object (the ``error`` member of a failed command's output)."""
        return {
            "kind": type(self).__name__,
            "exit_code": self.exit_code,
            "message": self.message,
            "cause": self.cause,
            "remedy": self.remedy,
            "log": list(self.log),
            "log_path": self.log_path,
        }


class GpuckptError(_Report, Exception):
    """Base of all failures; see the module's docstring for the tree."""


class UsageError(GpuckptError):
    exit_code = 2


class NothingToDo(GpuckptError):
    exit_code = 3


class PreflightError(GpuckptError):
    exit_code = 4


class IncompatibleError(GpuckptError):
    exit_code = 5


class NotFoundError(GpuckptError):
    exit_code = 6


class BusyError(GpuckptError):
    exit_code = 7


class VerificationError(GpuckptError):
    exit_code = 8


class CheckpointError(GpuckptError):
    exit_code = 9


class RestoreError(GpuckptError):
    exit_code = 10


class OutOfSpaceError(GpuckptError):
    """``lacking``: so many bytes more and it would have done, as far as that is known; else 0."""

    exit_code = 11

    def __init__(self, message: str, *, lacking: int = 0, **more: Any) -> None:
        super().__init__(message, **more)
        self.lacking = lacking

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"lacking": self.lacking}


class GpuFullError(OutOfSpaceError):
    """Goldens that leave the store would not help."""


class DaemonUnreachableError(GpuckptError):
    exit_code = 12


class DeadlineError(GpuckptError):
    exit_code = 13


class InterruptedByUser(_Report):
    exit_code = 130
