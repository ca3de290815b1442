"""Files of a golden, opened to be handed to somebody."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpuckpt.errors import NotFoundError


@contextlib.contextmanager
def opened(files: Sequence[Path], flags: int = os.O_RDONLY) -> Iterator[list[int]]:
    """Have the files open while the body runs. Raises NotFoundError."""
    with contextlib.ExitStack() as stack:
        handles = []
        for file in files:
            try:
                handles.append(os.open(file, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            except FileNotFoundError as error:
                raise NotFoundError(f"the weights {file} are missing", remedy="create the golden anew") from error
            stack.callback(os.close, handles[-1])
        yield handles
