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

from dataclasses import replace

from gpuckpt.pool.space import Demand, Space, total
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
    """Whether none of it has room even when all has gone that would go for it, and what others hold on the GPUs."""
    plan = _Plan(state)
    standbys = [_woken(model, one) for one in model.replicas if one.phase is Phase.STANDBY]
    fresh = _restored(model) if model.golden in (Golden.TMPFS, Golden.DISK) else plan.cold(model)
    return not any(plan.may_ever_fit(model, demand) for demand in (*standbys, fresh))


def _scale(model: Model) -> int:
    # A reload may have brought the rules below what somebody had ordered.
    return min(model.scale or 0, model.rules.max_replicas)


def _kept_hot(model: Model) -> int:
    if model.scale is not None:
        return _scale(model)
    return int(model.rules.pin is Pin.HOT)


def _urgency(model: Model) -> tuple[int, bool, bool, float]:
    # Requests come before what is only to be kept, and who has nothing that answers before who wants more of it.
    served = any(replica.phase is Phase.HOT for replica in model.replicas)
    return -model.rules.priority, not model.waiting, served, model.asked


def _restored(model: Model) -> Demand:
    """What another replica takes that comes from the golden."""
    return Demand(model.memory, model.gpus, model.fixed)


def _woken(model: Model, replica: Replica) -> Demand:
    """What a standby takes that is woken."""
    return Demand(0, replica.gpus or model.gpus, model.fixed)


def _cold_memory(model: Model) -> int:
    """Bytes of host memory that its server takes while the golden is made; 0 if nobody knows."""
    return max(model.memory, model.cold)


def _held(model: Model, replica: Replica) -> Space:
    """What a replica holds, or will hold when it has come."""
    if replica.phase in COMING:
        memory = _cold_memory(model) if replica.phase is Phase.STARTING else max(replica.memory, model.memory)
        return Demand(memory, replica.gpus or model.gpus).space
    if replica.phase is Phase.STANDBY:
        return Space(replica.memory)
    return Space(replica.memory, {one.uuid: one.bytes for one in replica.gpus})


class _Plan:
    """The orders so far, and what they leave free."""

    def __init__(self, state: State) -> None:
        self.actions: list[Action] = []
        self._state = state
        self._taken: set[str] = set()  # replicas that have their order
        budget = state.budget
        self._gpus = budget.gpus or ()
        self._limits = Space(_limit(budget.memory), {gpu.uuid: gpu.memory for gpu in self._gpus})
        # What they may hold now: others are on the GPUs, too.
        self._whole = Space(self._limits.memory, {gpu.uuid: gpu.free for gpu in self._gpus})
        self._free = self._whole
        self._held: dict[str, Space] = {}  # by replica: what it holds, or will hold when it has come
        everything = [(model, replica) for model in state.models for replica in model.replicas]
        for model, replica in everything:
            held = self._held[replica.name] = self._known(_held(model, replica))
            self._free -= held
        self._coming_free = total(self._leaves(replica) for _, replica in everything)

    def _known(self, space: Space) -> Space:
        """Without GPUs of which there is no budget."""
        return Space(space.memory, {uuid: count for uuid, count in space.gpus.items() if uuid in self._limits.gpus})

    def _leaves(self, replica: Replica) -> Space:
        """What will be free of it when it is what it is about to be."""
        held = self._held[replica.name]
        if replica.phase in GOING:
            return held
        # What it does not give up of its GPUs' memory is then the host's.
        return Space(-replica.carried, held.gpus) if replica.phase is Phase.FREEZING else Space()

    def _order(self, action: Action) -> None:
        self.actions.append(action)
        if isinstance(action, Wake | Freeze | Stop):
            self._taken.add(action.replica)

    def _of(self, model: Model, *phases: Phase) -> list[Replica]:
        return [one for one in model.replicas if one.phase in phases and one.name not in self._taken]

    def relieve(self) -> None:
        """Have idle ones go until the limits hold again: replicas grow while they work, and limits change.

        What others hold on a GPU is left out: nobody has to leave for memory that is taken already.
        """
        within, others = Space(0, dict.fromkeys(self._limits.gpus, 0)), self._limits - self._whole
        for victim, replica in self._victims(None):
            if not (over := (self._free + others + self._coming_free).lacks(within)):
                return
            self._make_go(victim, replica, over)

    def _make_go(self, model: Model, replica: Replica, lacking: Space) -> None:
        """Have it give up what it holds of what is lacking, if anything."""
        held = self._held[replica.name]
        if lacking.memory > 0 and held.memory > 0:
            self._order(Stop(model.name, replica.name, "room"))
            self._coming_free += held
        elif held.is_on(lacking.gpus):  # frozen it holds no GPU memory, and is woken in a moment
            self._order(Freeze(model.name, replica.name))
            self._coming_free += Space(-replica.carried, held.gpus)

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
            demand = _woken(model, best)
            if self.may_fit(model, demand) or not self._may_restore(model):
                return self._with_room(model, demand, Wake(model.name, best.name))
            # It had grown beyond what there is; a fresh one has room.
            self._order(Stop(model.name, best.name, "room"))
            self._coming_free += self._held[best.name]
        if self._state.now < model.retry_at:
            return False
        if model.golden in (Golden.TMPFS, Golden.DISK):
            return self._with_room(model, _restored(model), Restore(model.name))
        # Cold, one at a time: the next ones are restored from the golden that is made of it.
        return self._may_start(model) and self._with_room(model, self.cold(model), Start(model.name))

    def _may_restore(self, model: Model) -> bool:
        return model.golden in (Golden.TMPFS, Golden.DISK) and self.may_fit(model, _restored(model))

    def cold(self, model: Model) -> Demand:
        """What its server takes while the golden is made: it does not know of others, and is where it always was."""
        here = any(one.uuid in self._limits.gpus for one in model.gpus)
        return Demand(_cold_memory(model), model.gpus, fixed=here)

    def _may_start(self, model: Model) -> bool:
        alive = any(one.phase not in GOING for one in model.replicas)
        begun = alive or any(_is_for(one, model, Start) for one in self.actions)
        if not _cold_memory(model):
            # Nobody knows what it will hold: several at once could be more than there is.
            starting = any(one.phase is Phase.STARTING for each in self._state.models for one in each.replicas)
            begun |= starting or any(isinstance(one, Start) for one in self.actions)
        return model.golden in (Golden.NONE, Golden.QUARANTINED) and not begun and self._state.now >= model.retry_at

    def _with_room(self, model: Model, demand: Demand, action: Restore | Start | Wake) -> bool:
        """Order it if there is room; else see to it that there will be, and keep it. Whether it was ordered."""
        if (coming := demand.placed(self._gpus, self._free)) is not None:
            self._free -= coming.space
            self._order(replace(action, gpus=coming.held))
            return True
        if self.may_fit(model, demand):  # else nobody is to go for it
            # Who comes later must not take what becomes free bit by bit: a large model would wait for ever.
            self._free -= self._make_way(model, demand)
        return False

    def _make_way(self, model: Model, demand: Demand) -> Space:
        """Have others go for it, as few as can be, by their order; what it will take then.

        If not even all of them are enough, nobody goes: others are at work, and it has to wait for these anyway.
        """
        victims = self._victims(model)
        soon = self._free + self._coming_free
        coming = demand.placed(self._gpus, soon)
        for _, replica in victims:
            if coming is not None:
                break
            soon += self._held[replica.name]
            coming = demand.placed(self._gpus, soon)
        if coming is None:
            kept = demand.placed(self._gpus, self._space_for(model, self._whole))
            return kept.space if kept else Space()
        for victim, replica in victims:
            if not (lacking := (self._free + self._coming_free).lacks(coming.space)):
                break
            self._make_go(victim, replica, lacking)
        return coming.space

    def may_fit(self, model: Model, demand: Demand) -> bool:
        """Whether it has room when all has gone that would go for it."""
        return demand.placed(self._gpus, self._space_for(model, self._whole)) is not None

    def may_ever_fit(self, model: Model, demand: Demand) -> bool:
        """Whether it has room then, and when nobody else is on the GPUs."""
        return demand.placed(self._gpus, self._space_for(model, self._limits)) is not None

    def _space_for(self, needy: Model, whole: Space) -> Space:
        """All of ``whole`` that the model can get beside its own replicas, pinned ones and more important minimums.

        What is kept as a standby may be frozen: of the GPUs it keeps nothing.
        """
        kept = Space()
        for model in self._state.models:
            staying = [one for one in model.replicas if one.phase not in GOING]
            if model.name == needy.name:
                kept += total(self._held[one.name] - self._leaves(one) for one in staying)
            elif model.rules.pin is not Pin.NO or model.rules.priority > needy.rules.priority:
                hot = _kept_hot(model)
                kept += total(self._held[one.name] for one in staying[:hot])
                kept += total(Space(self._held[one.name].memory) for one in staying[hot : floor_of(model)])
        return whole - kept

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
                if needy is not None and not needy.waiting and staying - index <= _kept_hot(model):
                    break  # both are only to be kept: to and fro would serve nobody
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
        for _ in range(floor_of(model) - staying):
            # On its way it is hot for a moment; then what it does not give up is the host's.
            demand = replace(_restored(model), memory=model.memory + model.carried)
            if (coming := demand.placed(self._gpus, self._free)) is None:
                return
            self._free -= coming.space
            self._order(Restore(model.name, standby=True, gpus=coming.held))

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
            coming = self.cold(model).placed(self._gpus, self._free) if due and self._may_start(model) else None
            if coming is not None:
                self._order(Start(model.name, gpus=coming.held))
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


def _limit(budget: int | None) -> int:
    return budget if budget is not None else 1 << 62
