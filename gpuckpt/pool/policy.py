"""What to do next, as a function of what is known: no clock, no input or output, no memory of its own.

The tiers of a model, the fastest first: hot, standby (frozen; no GPU memory), golden in tmpfs, golden on disk, cold.
Requests that wait pull a model up; idle time, and what others need, let it sink. :func:`decide` is called after every
change; what it orders is in the next state, so it orders nothing twice.

Room comes before need: a replica begins when what it needs is free *now*. What has been told to go is waited for, and
only what is lacking beyond that is taken from others: from models of lower or the same priority, first from those who
hold more than their minimum, first the one that has been idle the longest. Pinned ones and those at work are spared;
so the minimum of a more important model can keep a less important one waiting.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gpuckpt.pool.state import (
    COMING,
    GOING,
    Action,
    Freeze,
    Golden,
    Model,
    Move,
    Phase,
    Pin,
    Prepare,
    Replica,
    Restore,
    Start,
    State,
    Stop,
    Wake,
)


def decide(state: State) -> tuple[Action, ...]:
    """What to begin now, in this order."""
    if state.draining:
        return ()
    plan = _Plan(state)
    plan.relieve()
    for model in sorted(state.models, key=_urgency):
        if not model.drained:
            plan.serve(model)
    for model in state.models:
        plan.sink(model)
    for model in sorted(state.models, key=lambda model: -model.rules.priority):
        if not model.drained:
            plan.prepare(model)
    plan.goldens()
    plan.containers()
    return tuple(plan.actions)


def floor_of(model: Model) -> int:
    """How many replicas a model keeps at least, hot or standby."""
    if model.drained:
        return 0
    if model.scale is not None:
        return _scale(model)
    return max(model.rules.min_standby, int(model.rules.pin is not Pin.NO or model.warm))


def wanted_hot(model: Model) -> int:
    """How many hot replicas the requests at work and in the queue ask for, and its rules."""
    if model.drained:
        return 0
    demand = model.waiting + sum(replica.requests for replica in model.replicas)
    least = _kept_hot(model)
    return min(model.rules.max_replicas, max(least, -(-demand // model.rules.concurrency)))


def never_fits(state: State, model: Model) -> bool:
    """Whether a replica of it has no room even when all that would go for it has gone."""
    need = _Room(model.memory, model.gpu) if model.golden in (Golden.TMPFS, Golden.DISK) else _cold(model)
    return _Plan(state).room_for(model).short_of(need)


def _scale(model: Model) -> int:
    # A reload may have brought the rules below what somebody had ordered.
    return min(model.scale or 0, model.rules.max_replicas)


def _kept_hot(model: Model) -> int:
    if model.scale is not None:
        return _scale(model)
    return int(model.rules.pin is Pin.HOT)


def _urgency(model: Model) -> tuple[int, int, float]:
    # Who has nothing that answers comes before who wants more of it.
    served = any(replica.phase is Phase.HOT for replica in model.replicas)
    return -model.rules.priority, int(served), model.asked


@dataclass(frozen=True, slots=True)
class _Room:
    memory: int = 0
    gpu: int = 0

    def __add__(self, other: _Room) -> _Room:
        return _Room(self.memory + other.memory, self.gpu + other.gpu)

    def __sub__(self, other: _Room) -> _Room:
        return _Room(self.memory - other.memory, self.gpu - other.gpu)

    def short_of(self, need: _Room) -> bool:
        return self.memory < need.memory or self.gpu < need.gpu


def _held(model: Model, replica: Replica) -> _Room:
    """What a replica holds, or will hold when it has come."""
    if replica.phase is Phase.STARTING:
        return _cold(model)
    if replica.phase in COMING:
        return _Room(max(replica.memory, model.memory), max(replica.gpu, model.gpu))
    return _Room(replica.memory, replica.gpu)


def _cold(model: Model) -> _Room:
    """What its server holds while the golden is made."""
    return _Room(max(model.memory, model.cold), model.gpu)


class _Plan:
    """The orders so far, and what they leave free."""

    def __init__(self, state: State) -> None:
        self.actions: list[Action] = []
        self._state = state
        self._taken: set[str] = set()  # replicas that have their order
        budget = state.budget
        everything = [(model, replica) for model in state.models for replica in model.replicas]
        self._limits = _Room(_limit(budget.memory), _limit(budget.gpu))
        self._free = self._limits - _sum(_held(*one) for one in everything)
        self._coming_free = _sum(_held(*one) for one in everything if one[1].phase in GOING)

    def _order(self, action: Action) -> None:
        self.actions.append(action)
        if isinstance(action, Wake | Freeze | Stop):
            self._taken.add(action.replica)

    def _of(self, model: Model, *phases: Phase) -> list[Replica]:
        return [one for one in model.replicas if one.phase in phases and one.name not in self._taken]

    def relieve(self) -> None:
        """Remove what is idle until the budget holds again: replicas grow while they work."""
        over = _Room() - (self._free + self._coming_free)
        for victim, replica in self._victims(None):
            if over.memory <= 0 and over.gpu <= 0:
                return
            if (over.memory > 0 and replica.memory) or (over.gpu > 0 and replica.gpu):
                over -= _Room(replica.memory, replica.gpu)
                self._coming_free += _Room(replica.memory, replica.gpu)
                self._order(Stop(victim.name, replica.name, "room"))

    # ------------------------------------------------------------------ up

    def serve(self, model: Model) -> None:
        """Begin what its requests need."""
        # One that freezes is woken in a moment, which is sooner than another could come.
        have = sum(one.phase in (Phase.HOT, Phase.FREEZING) or one.phase in COMING for one in model.replicas)
        for _ in range(wanted_hot(model) - have):
            if not self._one_more(model):
                return

    def _one_more(self, model: Model) -> bool:
        if standbys := self._of(model, Phase.STANDBY):
            # The one that was used last: its memory is the likeliest to be in caches.
            best = max(standbys, key=lambda one: (one.since, one.name))
            return self._with_room(model, _Room(0, model.gpu), Wake(model.name, best.name))
        if self._state.now < model.retry_at:
            return False
        need = _Room(model.memory, model.gpu)
        if model.golden in (Golden.TMPFS, Golden.DISK):
            return self._with_room(model, need, Restore(model.name))
        # Cold, one at a time: the next ones are restored from the golden that is made of it.
        return self._may_start(model) and self._with_room(model, _cold(model), Start(model.name))

    def _may_start(self, model: Model) -> bool:
        alive = any(one.phase not in GOING for one in model.replicas)
        begun = alive or any(_is_for(one, model, Start) for one in self.actions)
        if not _cold(model).memory:
            # Nobody knows what it will hold: several at once could be more than there is.
            starting = any(one.phase is Phase.STARTING for each in self._state.models for one in each.replicas)
            begun |= starting or any(isinstance(one, Start) for one in self.actions)
        return model.golden in (Golden.NONE, Golden.QUARANTINED) and not begun and self._state.now >= model.retry_at

    def _with_room(self, model: Model, need: _Room, action: Action) -> bool:
        """Order it if there is room; else see to it that there will be, and keep it. Whether it was ordered."""
        if not self._free.short_of(need):
            self._free -= need
            self._order(action)
            return True
        if self.room_for(model).short_of(need):
            return False  # it will never fit: nobody is to go for it
        for victim, replica in self._victims(model):
            short = (self._free + self._coming_free) - need
            if short.memory >= 0 and short.gpu >= 0:
                break
            frees_memory = short.memory < 0 and replica.memory > 0
            frees_gpu = short.gpu < 0 and replica.gpu > 0
            if frees_memory or (frees_gpu and replica.phase is Phase.STANDBY):
                self._coming_free += _Room(replica.memory, replica.gpu)
                self._order(Stop(victim.name, replica.name, "room"))
            elif frees_gpu:
                # Frozen it holds no GPU memory, but what it does not give up is then the host's.
                self._coming_free += _Room(-replica.carried, replica.gpu)
                self._order(Freeze(victim.name, replica.name))
        # Who comes later must not take what becomes free bit by bit: a large model would wait for ever.
        self._free -= need
        return False

    def room_for(self, needy: Model) -> _Room:
        """All that this model can get: not what pinned replicas hold, nor the minimum of more important models."""
        held = _Room()
        for model in self._state.models:
            above = model.rules.pin is not Pin.NO or model.rules.priority > needy.rules.priority
            if model.name != needy.name and above:
                staying = [one for one in model.replicas if one.phase not in GOING]
                held += _sum(_held(model, one) for one in staying[: floor_of(model)])
        return self._limits - held

    def _victims(self, needy: Model | None) -> list[tuple[Model, Replica]]:
        """Who would go for it, the first one first; for None, if the budget is exceeded."""
        found: list[tuple[tuple[bool, int, float, str], Model, Replica]] = []
        for model in self._state.models:
            if model.waiting or (
                needy is not None and (model.name == needy.name or model.rules.priority > needy.rules.priority)
            ):
                continue
            idle = [one for one in self._of(model, Phase.HOT, Phase.STANDBY) if one.idle]
            idle.sort(key=lambda one: (one.since, one.name))
            staying = sum(one.phase not in GOING for one in model.replicas)
            for index, one in enumerate(idle):
                within = staying - index <= floor_of(model)
                if within and model.rules.pin is not Pin.NO:
                    break
                found.append(((within, model.rules.priority, one.since, one.name), model, one))
        return [(model, one) for _, model, one in sorted(found, key=lambda entry: entry[0])]

    # ------------------------------------------------------------------ down

    def sink(self, model: Model) -> None:
        """Freeze and remove what has been idle for as long as its rules say."""
        if model.waiting:
            return
        if model.drained or model.scale is not None:
            self._down_to(model, 0 if model.drained else _scale(model))
            return
        now, rules = self._state.now, model.rules
        hot = self._of(model, Phase.HOT)
        spare = len(hot) - _kept_hot(model)
        for one in sorted(hot, key=lambda one: one.since):
            if spare > 0 and one.idle and now - one.since >= rules.idle_freeze:
                self._order(Freeze(model.name, one.name))
                spare -= 1
        standbys = [one for one in self._of(model, Phase.STANDBY) if one.idle]
        staying = sum(one.phase not in GOING for one in model.replicas)
        for one in sorted(standbys, key=lambda one: one.since):
            if staying > floor_of(model) and now - one.since >= rules.idle_release:
                self._order(Stop(model.name, one.name, "idle"))
                staying -= 1

    def _down_to(self, model: Model, kept: int) -> None:
        staying = [one for one in model.replicas if one.phase not in GOING]
        idle = [one for one in self._of(model, Phase.STANDBY, Phase.HOT) if one.idle]
        idle.sort(key=lambda one: (one.phase is Phase.HOT, one.since, one.name))
        for one in idle[: max(0, len(staying) - kept)]:
            self._order(Stop(model.name, one.name, "drained" if model.drained else "scale"))

    # ------------------------------------------------------------------ ahead

    def prepare(self, model: Model) -> None:
        """Restore what its minimum lacks, if nobody has to give way to it."""
        if model.golden not in (Golden.TMPFS, Golden.DISK) or self._state.now < model.retry_at:
            return
        staying = sum(one.phase not in GOING for one in model.replicas)
        staying += sum(_is_for(one, model, Restore) for one in self.actions)
        staying -= sum(_is_for(one, model, Stop) for one in self.actions)
        # On its way it is hot for a moment.
        need = _Room(model.memory, model.gpu)
        for _ in range(floor_of(model) - staying):
            if self._free.short_of(need):
                return
            self._free -= need
            self._order(Restore(model.name, standby=True))

    def goldens(self) -> None:
        """Keep those in the tmpfs that are used, and make the one that is missing."""
        models, now = self._state.models, self._state.now
        store = _limit(self._state.budget.store) - sum(
            model.golden_bytes for model in models if model.golden in (Golden.TMPFS, Golden.MOVING)
        )
        used = {model.name for model in models if model.replicas or model.waiting}
        used |= {one.model for one in self.actions if isinstance(one, Restore | Start)}
        needy = sorted(
            (model for model in models if model.golden is Golden.DISK and model.name in used and now >= model.move_at),
            key=lambda model: (-model.rules.priority, -model.asked),
        )
        # Who may have to make room: the least important, the longest unused first. It is there when they are gone, so
        # nobody else goes as long as one is on its way.
        settled = not any(model.golden is Golden.MOVING for model in models)
        movable = [
            model
            for model in sorted(models, key=lambda model: (model.rules.priority, model.asked))
            if model.golden is Golden.TMPFS and not (model.name in used or model.preparing or now < model.move_at)
        ]
        lacking = self._lacking(needy, movable, store)
        self._give_way(movable)
        freed = 0
        for model in movable:
            idle = model.rules.idle_disk is not None and now - model.asked >= model.rules.idle_disk
            asked_for = sum(size for priority, size in lacking if priority >= model.rules.priority)
            room = settled and (asked_for > freed or store + freed < 0)
            if room or (idle and floor_of(model) == 0):
                self._order(Move(model.name, Golden.DISK, "room" if room else "idle"))
                freed += model.golden_bytes
        for model in needy:
            if model.golden_bytes <= store:
                self._order(Move(model.name, Golden.TMPFS, "asked"))
                store -= model.golden_bytes
        # In the background, so one at a time: it takes all cores, and others serve.
        if any(one.phase is Phase.STARTING for model in models for one in model.replicas):
            return
        if any(isinstance(one, Start) for one in self.actions):
            return
        for model in sorted(models, key=lambda model: (-model.rules.priority, -model.asked, model.name)):
            due = not model.drained and self._state.now >= model.make_at
            if due and self._may_start(model) and not self._free.short_of(_cold(model)):
                self._order(Start(model.name))
                return

    def _lacking(self, needy: list[Model], movable: list[Model], store: int) -> list[tuple[int, int]]:
        """(priority, bytes) of those whose goldens find no room, but would if others went: nobody goes in vain."""
        lacks = []
        for model in needy:
            short = max(0, model.golden_bytes - max(0, store))
            store -= model.golden_bytes - short
            lacks.append((model.rules.priority, short))
        lacks += [(model.rules.priority, model.cramped) for model in self._state.models]
        found: list[tuple[int, int]] = []
        for priority, short in lacks:
            going = sum(model.golden_bytes for model in movable if model.rules.priority <= priority)
            if 0 < short <= going - sum(size for _, size in found):
                found.append((priority, short))
        return found

    def _give_way(self, movable: list[Model]) -> None:
        """Have idle replicas go whose goldens must leave the tmpfs for one that is asked for and cannot be made."""
        models = sorted(self._state.models, key=lambda model: (model.rules.priority, model.asked))
        for needy in models:
            if not (needy.cramped and needy.waiting):
                continue
            above = needy.rules.priority
            short = needy.cramped - sum(model.golden_bytes for model in movable if model.rules.priority <= above)
            resting = [
                model
                for model in models
                if model.golden is Golden.TMPFS
                and model.replicas
                and not (model.waiting or floor_of(model))
                and model.rules.priority <= above
                and all(one.idle and one.phase in (Phase.HOT, Phase.STANDBY) for one in model.replicas)
            ]
            if sum(model.golden_bytes for model in resting) < short:
                continue
            for model in resting:
                if short <= 0:
                    break
                short -= model.golden_bytes
                for one in model.replicas:
                    self._order(Stop(model.name, one.name, "room"))

    def containers(self) -> None:
        """Prepare containers for all replicas that may come: one at a time, and only while no replica is coming."""
        models = self._state.models
        busy = any(model.preparing for model in models)
        coming = any(one.phase in COMING for model in models for one in model.replicas)
        if busy or coming or any(isinstance(one, Restore | Start | Wake) for one in self.actions):
            return
        for model in sorted(models, key=lambda model: (model.prepared, -model.rules.priority, -model.asked)):
            moving = any(_is_for(one, model, Move) for one in self.actions)
            restorable = model.golden in (Golden.TMPFS, Golden.DISK) and not (model.drained or moving)
            lacking = model.prepared + len(model.replicas) < model.rules.ahead
            if restorable and lacking and self._state.now >= model.prepare_at:
                self._order(Prepare(model.name))
                return


def _is_for(action: Action, model: Model, kind: type[Action]) -> bool:
    return isinstance(action, kind) and action.model == model.name


def _sum(rooms: Iterable[_Room]) -> _Room:
    total = _Room()
    for room in rooms:
        total += room
    return total


def _limit(budget: int | None) -> int:
    return budget if budget is not None else 1 << 62
