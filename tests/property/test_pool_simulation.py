"""Whatever is asked and ordered, in a pool that does what is decided: nobody is forgotten, and it comes to rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from gpuckpt.cuda.driver import Gpu
from gpuckpt.cuda.room import CONTEXT, moved, place
from gpuckpt.manifest import Held
from gpuckpt.pool.policy import decide, floor_of, wanted_hot
from gpuckpt.pool.state import (
    COMING,
    GOING,
    Action,
    Budget,
    Freeze,
    Golden,
    Model,
    Phase,
    Pin,
    Prepare,
    Replica,
    Restore,
    Rules,
    Start,
    State,
    Stop,
    Wake,
)

RULES = st.builds(
    Rules,
    min_standby=st.integers(0, 2),
    max_replicas=st.integers(1, 4),
    concurrency=st.integers(1, 3),
    idle_freeze=st.sampled_from([1.0, 5.0]),
    idle_release=st.sampled_from([2.0, 9.0]),
    idle_disk=st.sampled_from([None, 20.0]),
    priority=st.integers(0, 1),
    pin=st.sampled_from(list(Pin)),
)
Order = tuple[str, int | None]
"""What somebody may order of a model: ``scale`` to a number or None, ``drain``, ``wake``, ``warm`` (1 or 0)."""
ORDERS: st.SearchStrategy[Order] = st.one_of(
    st.tuples(st.just("scale"), st.none() | st.integers(0, 4)),
    st.tuples(st.sampled_from(["drain", "wake"]), st.none()),
    st.tuples(st.just("warm"), st.integers(0, 1)),
)


GB = 1 << 30


def held_by(index: int, gpus: int) -> tuple[Held, ...]:
    """What a replica of a model holds on so many GPUs: all of one, some of one or of each, or nothing."""
    if not gpus or index == 3:
        return ()
    on = range(gpus) if index == 1 else [min(index, gpus - 1)]
    return tuple(Held(f"GPU-{one}", "H100", (3 if index == 0 else 1) * GB) for one in on)


class World:
    """Does what is decided; each thing takes a second. Requests take three.

    ``gpus``: their sizes, each a GB more than that for contexts; what models hold there says :func:`held_by`.
    """

    def __init__(self, rules: list[Rules], memory: int, store: int, gpus: tuple[int, ...] = ()) -> None:
        self.now = 0.0
        self.gpus = tuple(Gpu(f"GPU-{n}", "H100", (one + 1) * GB, (one + 1) * GB) for n, one in enumerate(gpus))
        self.budget = Budget(memory=memory, store=store, gpus=self.gpus or None)
        self.others: dict[str, int] = {}
        self.calm = False
        self.models = {
            f"m{index}": Model(
                f"m{index}", one, golden_bytes=2, memory=1 + index % 2, gpus=held_by(index, len(gpus)), fixed=index == 2
            )
            for index, one in enumerate(rules)
        }
        self.ends: dict[str, list[float]] = {}  # of the requests at work, by replica
        self.doing: list[tuple[float, Action, str]] = []
        self.served = self.refused = self.begun = 0
        self.standbys: set[str] = set()  # that are being restored
        self._count = 0

    def change(self, name: str, **what: Any) -> None:
        self.models[name] = replace(self.models[name], **what)

    def set(self, name: str, which: str, **what: Any) -> None:
        held = self.models[name].replicas
        self.change(name, replicas=tuple(replace(r, **what) if r.name == which else r for r in held))

    def phase(self, name: str, which: str) -> Phase:
        return next(one.phase for one in self.models[name].replicas if one.name == which)

    def ask(self, name: str) -> None:
        self.change(name, waiting=self.models[name].waiting + 1, asked=self.now)

    def order(self, name: str, order: Order) -> None:
        """As the loop does it: those who wait for a model that is drained are told, and go."""
        what, value = order
        if what == "scale":
            self.change(name, scale=value)
        elif what == "warm":
            self.change(name, warm=bool(value))
        else:
            self.refused += self.models[name].waiting if what == "drain" else 0
            self.change(name, drained=what == "drain", waiting=0 if what == "drain" else self.models[name].waiting)

    def tick(self) -> None:
        self.now += 1
        self._others()
        done, self.doing = [one for one in self.doing if one[0] <= self.now], [x for x in self.doing if x[0] > self.now]
        for _, action, which in done:
            self._finish(action, which)
        for name, one in self.models.items():
            for held in one.replicas:
                left = [end for end in self.ends.get(held.name, []) if end > self.now]
                if len(left) < held.requests:
                    self.served += held.requests - len(left)
                    self.set(name, held.name, requests=len(left), since=self.now)
                self.ends[held.name] = left
        self._dispatch()
        for action in decide(State(self.now, tuple(self.models.values()), self.budget)):
            self._begin(action)
        self.check()

    def _dispatch(self) -> None:
        for name in self.models:
            for held in self.models[name].replicas:
                free = self.models[name].rules.concurrency - held.requests if held.phase is Phase.HOT else 0
                taken = min(free, self.models[name].waiting)
                if taken > 0:
                    self.ends[held.name] += [self.now + 3] * taken
                    self.change(name, waiting=self.models[name].waiting - taken)
                    self.set(name, held.name, requests=held.requests + taken)

    def _others(self) -> None:
        """Somebody else comes to a GPU, or leaves one: now and then, and never where nothing is free."""
        if not self.gpus or self.now % 5:
            return
        gpu = self.gpus[int(self.now) // 5 % len(self.gpus)].uuid
        if self.others.pop(gpu, 0) or self.calm:
            self.others = {} if self.calm else self.others
        elif self.free()[gpu] >= GB:
            self.others[gpu] = GB
        self.budget = replace(
            self.budget,
            gpus=tuple(structs.replace(one, free=one.memory - self.others.get(one.uuid, 0)) for one in self.gpus),
        )

    def free(self) -> dict[str, int]:
        """Bytes that are free on each GPU; of what is coming all is reserved."""
        left = {gpu.uuid: gpu.memory - self.others.get(gpu.uuid, 0) for gpu in self.gpus}
        for model in self.models.values():
            for one in model.replicas:
                for share in one.gpus if one.phase is not Phase.STANDBY else ():
                    left[share.uuid] -= share.bytes + (CONTEXT if one.phase in COMING else 0)
        return left

    def take(self, name: str, gpus: tuple[Held, ...]) -> None:
        """As a restore does it: there is room for all that it holds, and it goes where it was ordered to."""
        free, own = self.free(), {one.uuid for one in self.models[name].gpus}
        there = [
            structs.replace(gpu, free=free[gpu.uuid])
            for gpu in self.gpus
            if gpu.uuid in own or not self.models[name].fixed
        ]
        assert [one.bytes for one in gpus] == [one.bytes for one in self.models[name].gpus]
        chosen = place(gpus, there, {})
        assert chosen is not None, "it is ordered where there is no room on the GPUs"
        assert moved(gpus, chosen) == gpus

    def _begin(self, action: Action) -> None:
        self.begun += 1
        name, one = action.model, self.models[action.model]
        which = ""
        if isinstance(action, Restore | Start):
            if isinstance(action, Restore):
                assert one.golden in (Golden.TMPFS, Golden.DISK)
            self._count += 1
            self.change(name, prepared=max(0, one.prepared - 1))
            one = self.models[name]
            which = f"{name}-{self._count}"
            if isinstance(action, Restore) and action.standby:
                self.standbys.add(which)
            phase = Phase.RESTORING if isinstance(action, Restore) else Phase.STARTING
            self.take(name, action.gpus)
            self.change(name, replicas=(*one.replicas, Replica(which, phase, self.now, gpus=action.gpus)))
        elif isinstance(action, Wake | Freeze | Stop):
            which = action.replica
            before = self.phase(name, which)
            held = next(r for r in one.replicas if r.name == which)
            assert not held.requests, "one at work is disturbed"
            assert (
                before in {Wake: {Phase.STANDBY}, Freeze: {Phase.HOT}, Stop: {Phase.HOT, Phase.STANDBY}}[type(action)]
            )
            pinned = one.rules.pin is not Pin.NO and not one.drained and one.scale != 0
            if pinned and isinstance(action, Stop):
                assert sum(r.phase not in GOING for r in one.replicas) > 1, "the last of a pinned model is stopped"
            if isinstance(action, Stop) and before is Phase.STANDBY:  # as the loop does it
                self.set(name, which, gpus=())
            phase = {Wake: Phase.WAKING, Freeze: Phase.FREEZING, Stop: Phase.STOPPING}[type(action)]
            if isinstance(action, Wake):
                self.take(name, action.gpus)
                self.set(name, which, gpus=action.gpus)
            self.set(name, which, phase=phase)
        elif isinstance(action, Prepare):
            assert not any(one.preparing for one in self.models.values()), "two are prepared at once"
            assert not one.drained, "a container is made for a model that takes no requests"
            self.change(name, preparing=True)
        else:
            assert not (action.to is Golden.DISK and one.replicas), "a golden goes while replicas map it"
            self.change(name, golden=Golden.MOVING)
        self.doing.append((self.now + 1, action, which))

    def _finish(self, action: Action, which: str) -> None:
        name, one = action.model, self.models[action.model]
        if isinstance(action, Restore):
            self.standbys.discard(which)
            hot = sum(r.phase is Phase.HOT for r in one.replicas) + 1
            freezes = action.standby and hot > wanted_hot(one)  # as the loop does it
            self.set(name, which, phase=Phase.STANDBY if freezes else Phase.HOT, since=self.now, memory=one.memory)
        elif isinstance(action, Start | Wake):
            self.set(name, which, phase=Phase.HOT, since=self.now, memory=one.memory)
            if isinstance(action, Start):
                self.change(name, golden=Golden.TMPFS)
        elif isinstance(action, Freeze):
            self.set(name, which, phase=Phase.STANDBY, since=self.now)
        elif isinstance(action, Stop):
            self.change(name, replicas=tuple(r for r in one.replicas if r.name != which))
        elif isinstance(action, Prepare):
            self.change(name, preparing=False, prepared=one.prepared + 1)
        else:
            self.change(name, golden=action.to)

    def check(self) -> None:
        held = sum(
            max(one.memory, model.memory if one.phase in COMING else 0)
            for model in self.models.values()
            for one in model.replicas
        )
        assert self.budget.memory is None or held <= self.budget.memory, "the budget is exceeded"
        assert all(left >= 0 for left in self.free().values()), "a GPU is full"
        for one in self.models.values():
            to_be = [r for r in one.replicas if r.phase in COMING and r.name not in self.standbys]
            hot = len(to_be) + sum(r.phase is Phase.HOT for r in one.replicas)
            assert hot <= max(one.rules.max_replicas, floor_of(one)), "more replicas than allowed"


@settings(max_examples=150, deadline=None)
@given(
    rules=st.lists(RULES, min_size=1, max_size=4),
    memory=st.integers(2, 9),
    store=st.integers(2, 9),
    asked=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=30),
    made=st.booleans(),
    gpus=st.lists(st.integers(3, 6), max_size=3).map(tuple),
)
def test_budgets_hold_nobody_is_disturbed_and_everybody_is_served(
    rules: list[Rules], memory: int, store: int, asked: list[tuple[int, int]], made: bool, gpus: tuple[int, ...]
) -> None:
    # These never give way to everybody: what they leave must be enough for anybody.
    kept = sum(
        (1 + index % 2) * max(one.min_standby, 1)
        for index, one in enumerate(rules)
        if one.pin is not Pin.NO or one.priority
    )
    # The same on each GPU, wherever they are. Somebody must be left to give way.
    most = sum(3 * max(one.min_standby, 1) for one in rules if one.pin is not Pin.NO or one.priority)
    world = World(rules, memory + kept, store, tuple(one + most for one in gpus))
    if made:  # several may be restored at once
        for name in world.models:
            world.change(name, golden=Golden.DISK)
    wanted = 0
    for which, pause in asked:
        world.ask(f"m{which % len(rules)}")
        wanted += 1
        for _ in range(pause):
            world.tick()
    for _ in range(60 + 12 * len(asked)):
        world.tick()
    assert world.served == wanted
    # At rest: what is idle has sunk to its floor, and nothing is changed without a reason.
    for one in world.models.values():
        assert len(one.replicas) <= floor_of(one)
        restorable = one.golden in (Golden.TMPFS, Golden.DISK)
        assert one.prepared + len(one.replicas) >= one.rules.ahead or not restorable
    assert not world.doing


@settings(max_examples=150, deadline=None)
@given(
    rules=st.lists(RULES, min_size=1, max_size=3),
    memory=st.integers(2, 9),
    store=st.integers(2, 9),
    asked=st.lists(st.tuples(st.integers(0, 2), st.none() | ORDERS, st.integers(1, 4)), max_size=30),
    end=st.lists(st.tuples(st.none() | st.integers(0, 4), st.booleans(), st.booleans()), min_size=3, max_size=3),
)
def test_orders_in_between_are_followed_and_it_comes_to_rest(
    rules: list[Rules],
    memory: int,
    store: int,
    asked: list[tuple[int, Order | None, int]],
    end: list[tuple[int | None, bool, bool]],
) -> None:
    kept = sum((1 + index % 2) * max(one.min_standby, one.max_replicas) for index, one in enumerate(rules))
    world = World(rules, memory + kept, store)
    wanted = 0
    for which, order, pause in asked:
        name = f"m{which % len(rules)}"
        if order is not None:
            world.order(name, order)
        elif not world.models[name].drained:
            world.ask(name)
            wanted += 1
        for _ in range(pause):
            world.tick()
    for name, (scale, warm, drained) in zip(world.models, end, strict=False):
        for order in (("scale", scale), ("warm", int(warm)), ("drain" if drained else "wake", None)):
            world.order(name, order)
    for _ in range(60 + 12 * len(asked)):
        world.tick()
    # Nobody is forgotten, and nothing goes to and fro.
    assert world.served + world.refused == wanted
    begun = world.begun
    for _ in range(30):
        world.tick()
    assert world.begun == begun and not world.doing
    for one in world.models.values():
        hot = sum(replica.phase is Phase.HOT for replica in one.replicas)
        assert len(one.replicas) == floor_of(one), "it is not what it should be at rest"
        assert hot == wanted_hot(one)
        assert not (one.drained and one.replicas)
