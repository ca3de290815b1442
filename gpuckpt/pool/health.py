"""Find replicas that are dead, hang, or answer wrongly, and report them to the loop, which replaces them.

Four looks: the kernel says at once when a replica's first process ends; a hot replica is asked for its health every few
seconds, and of a frozen one the kernel is; one that has requests and sends nothing is asked for a token; an idle one
replays the canary now and then, and soon after its restore if no replica of its golden has done so since the service
began.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from gpuckpt.errors import GpuckptError
from gpuckpt.pool.book import Held
from gpuckpt.pool.state import Phase
from gpuckpt.pool.steady import again_and_again

if TYPE_CHECKING:
    from gpuckpt.pool.config import Health as Rules
    from gpuckpt.pool.hands import Hands
    from gpuckpt.pool.owner import Owner

_log = logging.getLogger("gpuckpt.pool")
_TICK = 0.25
_SETTLED = 1.0  # seconds of idleness before a replica's first canary


class Health:
    """Looks after the replicas of ``owner``. ``tell`` gets a model and its canary's outcome: ok, differs, failed."""

    def __init__(self, owner: Owner, hands: Hands, rules: Rules, tell: Callable[[str, str], None]) -> None:
        self._owner = owner
        self._hands = hands
        self.rules = rules
        self._tell = tell
        self._processes: dict[Held, int] = {}  # replica → pidfd
        self._next: dict[Held, float] = {}
        self._failures: dict[Held, int] = {}
        self._proved: set[str] = set()  # models whose golden's canary has held in this service's life
        self._suspected: dict[Held, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Look, until cancelled."""
        try:
            await again_and_again(self._look, _TICK)
        finally:
            for held in self._known():
                self._forget(held)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def forget(self, model: str) -> None:
        """The model has another golden: its next replica's canary is replayed soon."""
        self._proved.discard(model)

    def _look(self) -> None:
        alive = {held for model in self._owner.models.values() for held in model.replicas.values()}
        for held in self._known():
            if held not in alive or held.phase is Phase.STOPPING:
                self._forget(held)
        now = self._owner.clock()
        for held in alive:
            if held.pid is not None and held not in self._processes and held.phase is not Phase.STOPPING:
                self._watch(held, held.pid)
            if held.phase not in (Phase.HOT, Phase.STANDBY) or held.checks or now < self._next.setdefault(held, now):
                continue
            self._next[held] = now + self.rules.interval
            self._begin(held, self._check if held.phase is Phase.HOT else self._check_frozen)

    def _known(self) -> set[Held]:
        return self._processes.keys() | self._next.keys() | self._failures.keys()

    def _watch(self, held: Held, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._owner.lost(held, "dead")
            return
        except OSError as error:  # no descriptor is free: the next look may get one, and its health is asked anyway
            _log.debug("the end of %s cannot be watched for: %s", held.name, error)
            return
        self._processes[held] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._died, held)

    def _died(self, held: Held) -> None:
        self._forget(held)
        self._owner.lost(held, "dead")

    def _forget(self, held: Held) -> None:
        if (pidfd := self._processes.pop(held, None)) is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
        self._next.pop(held, None)
        self._failures.pop(held, None)

    def _begin(self, held: Held, look: Callable[[Held], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(look(held))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _check(self, held: Held) -> None:
        try:
            with _checking(held):
                if held.phase is Phase.HOT and await self._answers(held):
                    await self._look_closer(held)
        except Exception:  # a fault of ours: the next look may do better, and the log has it
            _log.exception("a look at the health of %s failed unexpectedly", held.name)
        # What could not be done while it was looked at.
        self._owner.settle()

    async def _look_closer(self, held: Held) -> None:
        with contextlib.suppress(GpuckptError):
            self._owner.note_memory(held, await self._hands.memory(held.model, held.name))
        if held.phase is not Phase.HOT:  # it has died meanwhile
            return
        if held.requests:
            await self._stalled(held)
        else:
            await self._canary(held)

    async def _check_frozen(self, held: Held) -> None:
        try:
            if await self._hands.doomed(held.model, held.name) and held.phase is Phase.STANDBY:
                self._owner.lost(held, "dead")
        except GpuckptError:
            return  # it is being removed
        except Exception:
            _log.exception("a look at the health of %s failed unexpectedly", held.name)

    async def _answers(self, held: Held, *, at_once: bool = False) -> bool:
        """Ask for its health. A replica that has failed too often in a row, or once with ``at_once``, is given up."""
        try:
            well = await self._hands.healthy(held.model, held.name, self.rules.timeout)
        except GpuckptError:
            well = False
        if held.phase is not Phase.HOT:
            return False
        failures = self._failures[held] = 0 if well else self._failures.get(held, 0) + 1
        if failures >= (1 if at_once else self.rules.failures):
            self._owner.lost(held, "unhealthy")
        return well

    async def suspect(self, held: Held) -> None:
        """A request to it has failed: look now. Returns when it is known to be well, or given up."""
        if held.phase is not Phase.HOT:
            return
        # All its requests fail at once; one look is enough, and goes on for the others if one of them goes.
        if (look := self._suspected.get(held)) is None:
            look = self._suspected[held] = self._begin(held, self._check_suspected)
        await asyncio.shield(look)

    async def _check_suspected(self, held: Held) -> None:
        try:
            with _checking(held):
                if held.phase is Phase.HOT:
                    await self._answers(held, at_once=True)
        except Exception:
            _log.exception("a look at the health of %s failed unexpectedly", held.name)
        finally:
            self._suspected.pop(held, None)

    async def _stalled(self, held: Held) -> None:
        """It is at work: does anything come of it?"""
        if self._owner.clock() - held.heard < self.rules.stalled:
            return
        before = held.heard
        try:
            # A short request beside the others: a server that still computes answers it. It gets as long again: one
            # that is only slow, on a machine with too much to do, would be replaced by another that is no faster.
            async with asyncio.timeout(self.rules.stalled):
                await self._hands.canary(held.model, held.name)
        except (TimeoutError, GpuckptError):
            if held.phase is Phase.HOT and held.heard == before:
                self._owner.lost(held, "stalled")
            return
        held.heard = self._owner.clock()

    async def _canary(self, held: Held) -> None:
        now = self._owner.clock()
        known = held.model in self._proved
        if now - held.since < _SETTLED or (known and now - (held.proved or held.since) < self.rules.canary):
            return
        served = held.served
        try:
            differences = await self._asked(held)
            if differences and held.phase is Phase.HOT and held.served == served:
                # Asked past the service, it may have had other requests beside the canary: once more is no accident.
                differences = await self._asked(held)
        except (TimeoutError, GpuckptError) as error:
            if held.phase is Phase.HOT:
                self._tell(held.model, "failed")
                self._owner.lost(held, f"canary: {error or 'timed out'}")
            return
        if held.phase is not Phase.HOT:
            return
        if held.served != served:
            return  # beside other requests its sums may be made in another order: that proves nothing
        if not differences:
            self._owner.proved(held)
            self._proved.add(held.model)
            self._tell(held.model, "ok")
            return
        self._tell(held.model, "differs")
        self._owner.lost(held, "canary")
        if held.model not in self._proved:
            # No replica of it was ever right here: it is the golden.
            self._owner.quarantine(held.model, f"the canary's answer differs: {differences[0]}")

    async def _asked(self, held: Held) -> tuple[str, ...]:
        async with asyncio.timeout(max(30.0, self.rules.stalled)):
            return await self._hands.canary(held.model, held.name)


@contextlib.contextmanager
def _checking(held: Held) -> Iterator[None]:
    held.checks += 1
    try:
        yield
    finally:
        held.checks -= 1
