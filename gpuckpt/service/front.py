"""The address that clients use: OpenAI-compatible requests, each relayed to a replica of the model that it names.

A plain ASGI application: what comes from a replica goes to the client as it came, piece by piece. A request that no
replica has begun to answer can be given to another one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from gpuckpt.pool.book import Held, RefusedError
from gpuckpt.pool.owner import Lease
from gpuckpt.pool.state import Phase
from gpuckpt.service.exchange import (
    HOP_BY_HOP,
    AnswerError,
    Bodies,
    BrokenOffError,
    ClientGone,
    Exchange,
    Headers,
    Limits,
    Receive,
    Record,
    Scope,
    Send,
)
from gpuckpt.service.keys import Keys
from gpuckpt.service.routing import Route, RoutingError
from gpuckpt.service.upstream import Connection, Upstream, UpstreamError

__all__ = ["Front", "Limits", "Pool", "Record"]

_log = logging.getLogger("gpuckpt.pool")
_ATTEMPTS = 4  # replicas that a request is given to, one after the other, before it is given up
_NOT_PASSED_ON = HOP_BY_HOP | {b"content-length", b"expect", b"x-gpuckpt-model"}  # the length is counted anew
_WITH_KEYS = _NOT_PASSED_ON | {b"authorization", b"x-api-key"}


class Pool(Protocol):
    """What the front asks of the pool."""

    def tier_of(self, name: str) -> str: ...
    async def acquire(self, name: str, deadline: float) -> Lease: ...
    def release(self, held: Held) -> None: ...
    async def suspect(self, held: Held) -> None: ...


class Front:
    """The application. ``route`` says where a request goes, ``done`` is told how each went."""

    def __init__(
        self,
        pool: Pool,
        upstream: Upstream,
        route: Callable[[str, bytes, bytes, Mapping[bytes, bytes], bytes], Route],
        *,
        keys: Keys,
        limits: Limits,
        done: Callable[[Record], None] = lambda record: None,
    ) -> None:
        self._pool = pool
        self._upstream = upstream
        self._route = route
        self.keys = keys
        self.limits = limits
        self._done = done
        self._bodies = Bodies()
        self._looks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        exchange = Exchange(scope, receive, send, self._bodies)
        record = exchange.record
        try:
            await self._answer(exchange)
        except (AnswerError, RefusedError, RoutingError) as error:
            record.outcome = "refused"
            await exchange.refuse(_as_answer(error))
        except ClientGone:
            record.outcome = "gone"
        except (BrokenOffError, asyncio.CancelledError):  # the service may wait no longer
            record.outcome = "broken"
            raise
        except Exception:  # a fault of ours: the client is told, the log has it
            _log.exception("a request could not be answered")
            record.outcome = "failed"
            if exchange.begun:
                raise BrokenOffError("a fault of ours") from None
            await exchange.refuse(AnswerError(500, "the service has failed on this request", "internal_error"))
        finally:
            exchange.forget_body()
            record.total = time.monotonic() - exchange.began
            self._done(record)

    async def _answer(self, exchange: Exchange) -> None:
        if not self.keys.allow(exchange.headers):
            raise AnswerError(401, "no valid API key: send it as “Authorization: Bearer KEY”", "invalid_api_key")
        body = await exchange.body(self.limits)
        route = self._routed(exchange, body)
        del body  # where the route has another one, this one is not needed any more
        exchange.record.model, exchange.record.tier = route.model, self._pool.tier_of(route.model)
        exchange.waits_for_events = route.stream
        # The keys are ours, and nobody else's to know.
        headers = exchange.passed_headers(_WITH_KEYS if self.keys else _NOT_PASSED_ON)
        async with exchange.attended(self.limits.keep_alive):
            await self._relay(exchange, route, headers)

    def _routed(self, exchange: Exchange, body: bytes) -> Route:
        scope = exchange.scope
        return self._route(scope["path"], scope["query_string"], scope["raw_path"], exchange.headers, body)

    async def _relay(self, exchange: Exchange, route: Route, headers: Headers) -> None:
        record = exchange.record
        for _ in range(_ATTEMPTS):
            lease = await self._pool.acquire(route.model, max(0.1, self.limits.deadline - record.waited))
            held = lease.replica
            record.tier = record.tier if record.retries else lease.tier
            record.replica, record.waited = held.name, record.waited + lease.waited
            try:
                if route.unsettled and lease.waited:  # the model's first golden was made meanwhile
                    route = self._routed(exchange, route.body)
                await self._attempt(exchange, route, headers, held)
                return
            except UpstreamError as error:
                record.retries.append(str(error))
                await self._pool.suspect(held)
            finally:
                self._pool.release(held)
        failed = f"{_ATTEMPTS} replicas of {route.model} have failed on it: {record.retries[-1]}"
        raise AnswerError(502, failed, "replica_failed")

    async def _attempt(self, exchange: Exchange, route: Route, headers: Headers, held: Held) -> None:
        """Relay an answer of this replica; raises UpstreamError as long as another one may be asked instead."""
        connection = await self._upstream.send(
            held.name, held.endpoint, exchange.method, route.target, headers, route.body
        )
        try:
            first = await connection.read()
            if connection.status >= 500 and await self._is_down(held):
                raise UpstreamError(f"it answered {connection.status}, and is down")
            exchange.record.first = time.monotonic() - exchange.began
            try:
                await self._pass_on(exchange, connection, held, first)
            except UpstreamError as error:
                self._later(self._pool.suspect(held))  # the client is to know at once
                await exchange.break_off(f"the replica has failed: {error}")
        finally:
            self._upstream.done(held.name, connection)

    async def _is_down(self, held: Held) -> bool:
        await self._pool.suspect(held)
        return held.phase is not Phase.HOT

    async def _pass_on(self, exchange: Exchange, connection: Connection, held: Held, first: bytes) -> None:
        clock, write = time.monotonic, exchange.write

        def pour(data: bytes) -> bool:
            held.heard = clock()
            return write(data)

        last = connection.ended
        await exchange.head(connection.status, connection.headers, first, last=last)
        connection.pour(pour)
        while not last:
            piece = await connection.read()
            held.heard = clock()
            last = connection.ended
            await exchange.piece(piece, last=last)
        exchange.record.outcome = "ok" if connection.status < 400 else "error"

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._looks.add(task)
        task.add_done_callback(self._looks.discard)


def _as_answer(error: AnswerError | RefusedError | RoutingError) -> AnswerError:
    if isinstance(error, RoutingError):
        return AnswerError(error.status, str(error), error.code or "invalid_request")
    if isinstance(error, RefusedError):
        return AnswerError(error.status, str(error), "not_available", error.retry_after)
    return error
