"""How the commands of ``gpuckpt pool`` reach the daemon."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from gpuckpt.service.client import Client

_F = TypeVar("_F", bound=Callable[..., Any])


def on_pool(function: _F) -> _F:
    """Add ``--socket``; the command receives a client first."""

    @click.option(
        "--socket",
        type=click.Path(path_type=Path, readable=False),
        envvar="GPUCKPT_POOL_SOCKET",
        help="Where the service listens, if not on /run/gpuckpt/pool.sock.  [env: GPUCKPT_POOL_SOCKET]",
    )
    @functools.wraps(function)
    def wrapper(*args: Any, socket: Path | None, **kwargs: Any) -> Any:
        return function(client_for(socket), *args, **kwargs)

    return wrapper  # type: ignore[return-value]


def client_for(socket: Path | None, **options: Any) -> Client:
    """A client of the daemon behind ``socket``, or where it listens by default."""
    from gpuckpt.service.client import DEFAULT_SOCKET, Client

    return Client(socket or DEFAULT_SOCKET, **options)
