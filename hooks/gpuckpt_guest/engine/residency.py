"""Which sessions' caches lie on the device: admission of passes, and what leaves to make room for them.

A pass begins when all that it reads lies in the arena, or is on its way, and it has the blocks that it writes into:
then it cannot run out of memory. Who finds no room waits, in the order of coming, and room is made: caches that nobody
uses leave (kv/policy.py says which), and after a while those of sessions that generate, too, between two passes. So if
there are more sessions than memory they take turns, and none of them fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..kv import policy
from ..kv.arena import Arena, Block
from ..kv.pager import Pager
from ..kv.policy import Candidate, Costs
from .batches import Batches
from .session import Session

_log = logging.getLogger("gpuckpt_guest")
# Until something was measured: bytes per second of a slow bus, seconds of a small model.
_BANDWIDTH, _PASS_S, _TOKEN_S = 4e9, 0.02, 0.001
PINNED_SHARE = 0.75  # of the device's blocks may be pinned
_BLEND = 0.1  # how much a new measurement counts


@dataclass
class Counters:
    """What has happened so far."""

    evicted: int = 0  # because others needed the memory
    dropped: int = 0  # without being copied: to be computed again
    preempted: int = 0  # between two passes of a generation
    waited_s: list[float] = field(default_factory=list)  # of the last passes that had to wait


class Residency:
    """Decides who is in the arena. For use by the engine's thread."""

    def __init__(
        self,
        arena: Arena,
        pager: Pager,
        batches: Batches,
        device: object,
        sessions: Callable[[], Iterable[Session]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.arena = arena
        self.pager = pager
        self.counters = Counters()
        self._batches = batches
        self._device = device
        self._sessions = sessions
        self._clock = clock
        self.flying: Callable[[], Sequence[object]] = lambda: ()  # the caches of passes on their way
        self.wanted: dict[Session, None] = {}  # to be brought back, although they have nothing to compute
        self.freed = False  # there is room that was not there when those who wait were last looked at
        self._granted: set[Session] = set()  # have a pass on its way
        self._warned: set[Session] = set()  # of those who wait: it has been said that nobody can make room
        self._waiting: dict[Session, float] = {}  # for memory, since when
        self._pass_s, self._token_s = _PASS_S, _TOKEN_S

    # ------------------------------------------------------------------ what is known

    @property
    def costs(self) -> Costs:
        """What copying and computing cost, as measured so far."""
        out, into = self.pager.out, self.pager.into
        return Costs(
            out.bytes / out.seconds if out.seconds else _BANDWIDTH,
            into.bytes / into.seconds if into.seconds else _BANDWIDTH,
            self._pass_s,
            self._token_s,
        )

    def measured(self, tokens: int, seconds: float) -> None:
        """A pass of one session that read so many tokens has taken so long."""
        if tokens == 1:
            self._pass_s += _BLEND * (seconds - self._pass_s)
        elif seconds > self._pass_s:
            self._token_s += _BLEND * ((seconds - self._pass_s) / (tokens - 1) - self._token_s)

    @property
    def waiting(self) -> int:
        """How many sessions wait for memory."""
        return len(self._waiting)

    def waits(self, session: Session) -> bool:
        """Whether this one does."""
        return session in self._waiting

    def next_time(self) -> float | None:
        """Seconds until there is something to be done although nobody has asked: a pin ends, or one is expected."""
        now, found = self._clock(), []
        for session in self._sessions():
            if self._waiting and session.pinned > now:
                found.append(session.pinned - now)
            if session.expected is not None and not (session.cache.shown or session.suspended or self._waiting):
                found.append(max(0.0, session.expected - now - self._early(session)))
        return min(found, default=None)

    # ------------------------------------------------------------------ admission

    def admit(self, session: Session, tokens: int, *, whole: bool = False) -> bool:
        """Whether a pass of ``tokens`` may begin. If so it keeps its memory until :meth:`release`.

        ``whole``: only once all of its cache has arrived; else the first layers may run while others are on their way.
        If not: what is needed is begun, and whoever waits is to ask again when anything has changed.
        """
        cache = session.cache
        if not self._fits(session, tokens):
            self._wait(session)
            self.make_room()
            if not self._fits(session, tokens):  # what needed no copy has left at once
                return False
        try:
            if not cache.shown:
                self._bring(session)
        except OSError as error:
            self._no_mappings(session, error)
            return False
        if whole and self.pager.arriving(cache):
            return False
        if any(block.arrival is not None for block in self._shared(session, tokens)):
            return False  # it is copied before it is written to
        try:
            cache.room(tokens)
        except OSError as error:
            self._no_mappings(session, error)
            return False
        self._served(session)
        self._granted.add(session)
        session.expected = None
        return True

    def release(self, session: Session) -> None:
        """Its pass is over, or has stopped."""
        self._granted.discard(session)
        session.used = self._clock()

    def granted(self, session: Session) -> bool:
        """Whether it has a pass on its way."""
        return session in self._granted

    def forget(self, session: Session) -> None:
        """It does not want anything any more."""
        self._waiting.pop(session, None)
        self._warned.discard(session)
        self.wanted.pop(session, None)
        self._granted.discard(session)

    def _fits(self, session: Session, tokens: int) -> bool:
        if not (need := self._need(session, tokens)) and session.cache.shown:
            return True  # as for nearly every token: there is room in the last block
        if self._pieces(session, need) > self.arena.pieces:
            return False
        reserve = 0 if session.cache.shown and self._in_tenure(session) else self._before(session)
        return need <= max(0, self.arena.free - reserve)

    def _pieces(self, session: Session, blocks: int) -> int:
        """What it takes of what the memory can show at once: mappings, on a CPU."""
        hidden = 0 if session.cache.shown else session.cache.pieces
        return hidden + blocks * max((track.streams for track in self.arena.tracks), default=0)

    def _need(self, session: Session, tokens: int) -> int:
        cache = session.cache
        need = cache.lacking(tokens) if tokens else 0
        if not cache.shown:
            need += self.pager.absent(cache) - (-cache.held_outside() // self.arena.memory.size)
        return need

    def _shared(self, session: Session, tokens: int) -> Iterable[Block]:
        first = session.cache.length
        return (block for table in session.cache.tables for block in table.copied(first, first + tokens))

    def _bring(self, session: Session) -> None:
        self.pager.bring(session.cache, self._device, session.halfway.layer if session.halfway else 0)
        session.came, session.worked = self._clock(), 0.0

    def _no_mappings(self, session: Session, error: OSError) -> None:
        """The memory cannot show as much as was thought: who comes waits until others have left."""
        _log.error("session %s waits: its cache cannot be mapped: %s", session.id, error)
        self._wait(session)

    def _wait(self, session: Session) -> None:
        self._waiting.setdefault(session, self._clock())

    def _served(self, session: Session) -> None:
        since = self._waiting.pop(session, None)
        self._warned.discard(session)
        if since is not None:
            self.counters.waited_s.append(self._clock() - since)
            del self.counters.waited_s[:-1000]

    def _before(self, session: Session) -> int:
        """Blocks that are kept for who has waited longest."""
        first = self._first()
        return 0 if first is None or first is session else self._need(first, self._wanted(first))

    def _first(self) -> Session | None:
        """Who has waited longest, of those for whom there is room once others have left."""
        if not self._waiting:
            return None
        stay = {id(block): one for one in self._staying() if one.cache.shown for block in one.cache.blocks()}
        for session in self._waiting:
            mine = sum(one is session for one in stay.values())
            if self._need(session, self._wanted(session)) <= self.arena.memory.places - len(stay) + mine:
                return session
        return None

    def pinned(self) -> list[Session]:
        """Sessions that are to stay on the device, for now."""
        now = self._clock()
        return [session for session in self._sessions() if session.pinned > now]

    def _staying(self) -> list[Session]:
        """Those of them that do: none, if they have grown beyond what may be pinned."""
        found = self.pinned()
        held = {id(block) for one in found for block in one.cache.blocks()}
        return found if len(held) <= self.arena.memory.places * PINNED_SHARE else []

    @staticmethod
    def _wanted(session: Session) -> int:
        """Tokens that its next pass reads."""
        if session.halfway:
            return session.halfway.tokens
        return session.next_tokens if session.turn else 0

    def _in_tenure(self, session: Session) -> bool:
        if session.replay:
            return True  # what it reads again would have been for nothing
        held = sum(block.place >= 0 for block in session.cache.blocks()) * self.arena.memory.size
        again = 0.0
        if session.reads is not None and held > self.pager.space * self.arena.memory.size:  # it would be dropped
            again = self.costs.replay(len(session.reads), sum(session.reads) - len(session.reads))
        return session.worked < policy.tenure(held, self.costs, again)

    def _can_go_on(self, session: Session) -> bool:
        """Whether its next pass finds room as it is."""
        return session.cache.shown and self._need(session, self._wanted(session)) <= self.arena.free

    # ------------------------------------------------------------------ making room

    def make_room(self) -> None:
        """See to it that who has waited longest will find room."""
        first = self._first()
        if first is None or self._lacking(first) <= 0:
            return
        self._batches.keep((), self.flying())  # lanes are copies
        wanted = self._lacking(first)
        movable = self._movable(first)
        idle = [one for one in movable if one.turn is None or one.pause]
        turns = [one for one in movable if one.turn is not None and not one.pause]
        wanted -= self._evict(idle, wanted)
        tenured = {one for one in turns if self._in_tenure(one)}
        wanted -= self._evict([one for one in turns if one not in tenured], wanted)
        if wanted <= 0 or self._granted or self.pager.leaving or any(self._can_go_on(one) for one in tenured):
            return
        # Nobody can go on, so nobody would ever leave: one who has only just come has to.
        wanted -= self._evict(tenured, wanted)
        if wanted > 0 and not self.pager.leaving and first not in self._warned:
            self._warned.add(first)
            _log.warning(
                "session %s waits for memory that nobody can leave: what is there is in use, pinned or has nowhere to"
                " go; delete or resume others, or give the server more (--kv-mib, --kv-host-mib, --kv-dir)",
                first.id,
            )

    def _lacking(self, session: Session) -> int:
        """Blocks that must still leave for it to find room."""
        need = self._need(session, self._wanted(session))
        least = min((track.streams for track in self.arena.tracks), default=1)
        unshown = -(-(self._pieces(session, need) - self.arena.pieces) // least)
        return max(need - self.arena.free - self.pager.leaving, unshown)

    def _movable(self, but: Session) -> list[Session]:
        staying = set(self._staying())
        return [
            session
            for session in self._sessions()
            if session is not but
            and session.cache.shown
            and session not in self._granted
            and session not in staying
            and not session.failed
            and not self.pager.arriving(session.cache)
        ]

    def _evict(self, sessions: Iterable[Session], blocks: int) -> int:
        """Have some of them leave; returns how many blocks that will free."""
        if blocks <= 0:
            return 0
        known = dict(enumerate(sessions))
        candidates = [self._candidate(number, session) for number, session in known.items()]
        candidates = [candidate for candidate in candidates if candidate.bytes]
        size = self.arena.memory.size
        chosen = policy.leaving(candidates, blocks * size, self.costs, self.pager.space * size)
        free, before = self.arena.free, self.arena.free + self.pager.leaving
        for choice in chosen:
            session = known[choice.key]
            self.counters.evicted += 1
            self.counters.preempted += session.turn is not None and session.pause is None
            if choice.drop:
                self.counters.dropped += 1
                session.forget_cache()
            else:
                self.leave(session)
        # Nobody will tell of what has left without a copy.
        self.freed = self.freed or self.arena.free > free
        return self.arena.free + self.pager.leaving - before

    def _candidate(self, key: int, session: Session) -> Candidate:
        size, now = self.arena.memory.size, self._clock()
        freed = copied = 0.0
        for block in session.cache.blocks():
            if block.place >= 0 and block.seen:
                freed += size / block.seen
                copied += size / block.seen * (block.dirty or block.home is None)
        reads = session.reads if session.halfway is None else None
        return Candidate(
            key,
            int(freed) + session.cache.outside,
            int(copied),
            now - max(session.used, session.came),
            None if session.expected is None else session.expected - now,
            None if reads is None else self.costs.replay(len(reads), sum(reads) - len(reads)),
        )

    def leave(self, session: Session) -> None:
        """Begin to take the session's cache out of the arena."""
        self._batches.settle(session)
        self.pager.leave(session.cache)

    # ------------------------------------------------------------------ bringing back for its own sake

    def fetch(self, session: Session) -> None:
        """Bring the session back, although it has nothing to compute: at once, or as soon as there is room."""
        self.wanted[session] = None
        self.fetch_wanted()

    def fetch_wanted(self) -> None:
        """Begin to bring back those who are to be, as far as there is room for them."""
        for session in list(self.wanted):
            if not session.cache.shown:
                if not self._fits(session, 0):
                    self._wait(session)
                    self.make_room()
                    if not self._fits(session, 0):
                        continue
                try:
                    self._bring(session)
                except OSError as error:
                    self._no_mappings(session, error)
                    continue
            self._served(session)
            del self.wanted[session]

    def fetch_expected(self) -> None:
        """Bring back those who are expected soon, if there is room that nobody waits for."""
        if self._waiting:
            return
        now = self._clock()
        for session in self._sessions():
            if session.expected is None or session.suspended or session.cache.shown:
                continue
            if session.expected - now <= self._early(session):
                session.expected = None  # else it comes when it is asked for
                if self._fits(session, 0):
                    self.fetch(session)

    def _early(self, session: Session) -> float:
        return policy.early(self.pager.absent(session.cache) * self.arena.memory.size, self.costs)

    def renew(self) -> None:
        """The clock may have jumped: the process has been restored elsewhere. What was said of times is forgotten."""
        now = self._clock()
        for session in self._sessions():
            session.used, session.came, session.worked = now, now, 0.0
            session.pinned, session.expected = 0.0, None
