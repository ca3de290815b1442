"""What is tried with each architecture: that stopping between its layers changes nothing.

The reference is always transformers' plain forward, of a copy of the model that the engine has not touched. "Equal" is
to the last bit unless a text says otherwise. A *cut* is one stop of one pass between two layers, from 0 (behind the
embeddings) to the number of layers (before the last norm): there the pass is given up but for what a paused session
keeps, another request's layers run, and the pass goes on from the checkpoint.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from hooks.gpuckpt_guest.engine.engine import Engine, Request
from hooks.gpuckpt_guest.kv.cache import SessionCache
from hooks.gpuckpt_guest.kv.lanes import Lanes

from .catalogue import Architecture
from .reference import LONG, SHORT, WRITTEN, Answer, cache_difference, difference, held, tensors, text
from .subject import Subject

_OTHER = 9  # tokens of another request's prompt


@dataclass
class Outcome:
    """What a trial found. ``cuts`` counts stops; a trial that stops after its first failure counts those before."""

    cuts: int = 0
    failures: list[str] = field(default_factory=list)

    def note(self, where: str, why: str) -> bool:
        """Returns whether all is well."""
        if why:
            self.failures.append(f"{where}: {why}")
        return not why


class Traffic:
    """Another request, whose layers run whenever the one under test is stopped; its answers are checked, too."""

    def __init__(self, subject: Subject, outcome: Outcome) -> None:
        self._subject, self._outcome = subject, outcome
        self._prompt = text(_OTHER, seed=99)
        self._wanted = subject.plain.answer(self._prompt)
        self._course = self._forever()

    def __call__(self) -> None:
        for _ in range(2):
            next(self._course)

    def _forever(self) -> Iterator[None]:
        while True:
            cache, made = self._subject.cache(), Answer()
            while (read := made.next(self._prompt)) is not None:
                forward = self._subject.begin(cache, torch.tensor([read]))
                for layer in range(self._subject.layers):
                    self._subject.run(forward, layer + 1)
                    yield
                made.take(read, self._subject.land(forward, cache))
                wanted = self._wanted.logits[len(made.logits) - 1]
                self._outcome.note("another request meanwhile, logits", difference(made.logits[-1], wanted))


def cuts(subject: Subject, length: int, *, steered: bool) -> Outcome:
    """Stop each pass of the plan at each cut: reading a prompt of ``length`` tokens, writing, reading on."""
    outcome = Outcome()
    prompt = text(length, seed=length)
    traffic = Traffic(subject, outcome)
    wanted = subject.plain.answer(prompt)
    for cut in range(subject.layers + 1):
        edit = subject.edit(cut) if steered else None
        if edit is not None:
            wanted = subject.plain.answer(prompt, edit, subject.layout)
        cache, made = subject.cache(), Answer()
        while (read := made.next(prompt)) is not None:
            step = len(made.logits)
            where = f"cut {cut}, pass {step} of {len(read)} tokens"
            ids = torch.tensor([read])
            subject.ran.clear()
            stopped = subject.stop(subject.run(subject.begin(cache, ids), cut))
            before = dict(subject.ran)
            traffic()
            subject.ran.clear()
            subject.ran.update(before)
            forward = subject.go_on(stopped, cache, ids, edit)
            subject.ring.drop(stopped.checkpoint)
            made.take(read, subject.land(forward, cache))
            outcome.cuts += 1
            counts = [subject.ran[index] for index in range(subject.layers)]
            good = outcome.note(where, "" if counts == [1] * subject.layers else f"layers ran {counts} times")
            good &= outcome.note(
                f"{where}, tokens", "" if read == wanted.read[step] else f"{read}, {wanted.read[step]}"
            )
            good &= outcome.note(f"{where}, logits", difference(made.logits[step], wanted.logits[step]))
            if not good:
                break
        else:
            outcome.note(f"cut {cut}", cache_difference(cache, wanted.cache))
    return outcome


def padded(subject: Subject) -> Outcome:
    """A batch of prompts padded on the left, in lanes of several rows, stopped at every cut of four passes."""
    outcome = Outcome()
    if not subject.loaded.verdict.batching:
        return outcome
    texts = [text(length, seed=length) for length in (5, 12, 9)]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    members = [subject.cache() for _ in texts]
    ours, theirs = Lanes(members, longest), DynamicCache(config=subject.plain.model.config)
    traffic = Traffic(subject, outcome)
    for step in range(4):
        inputs: dict[str, Any] = {"attention_mask": mask}
        if "position_ids" in subject.stepper.takes:
            places = (mask.cumsum(-1) - 1).clamp(min=0)
            inputs["position_ids"] = places[:, -ids.shape[1] :]
        wanted = subject.plain.forward(ids, theirs, **inputs)
        forward = subject.stepper.begin({"input_ids": ids, **inputs}, ours)
        for layer in range(subject.layers + 1):
            subject.run(forward, layer)
            checkpoint = subject.ring.save(forward.hidden)
            traffic()
            forward.hidden, _ = subject.ring.restore(checkpoint)
            subject.ring.drop(checkpoint)
            outcome.cuts += 1
        got = subject.stepper.head(forward)
        ours.commit(forward.tokens)
        if not outcome.note(f"padded batch, pass {step}, logits", difference(got, wanted)):
            return outcome
        ids = wanted[:, -1].argmax(-1)[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    ours.release()
    _compare_rows(outcome, "padded batch", members, theirs)
    return outcome


def _compare_rows(outcome: Outcome, where: str, caches: Sequence[SessionCache], theirs: Any) -> None:
    """What each of the sessions holds, and its row of transformers' own cache, without the padding there."""
    for row, cache in enumerate(caches):
        for index, layer in enumerate(theirs.layers):
            for name, tensor in tensors(layer):
                kept = tensor[row : row + 1]
                if name in ("keys", "values"):  # as far as the window still holds it
                    kept = kept[..., -cache.length :, :]
                outcome.note(
                    f"{where}, row {row}, layer {index}, {name}", difference(held(cache.layers[index], name), kept)
                )


def _joined(subject: Subject, caches: Sequence[SessionCache]) -> Any:
    """transformers' own cache with what the sessions have read, padded on the left with zeros."""
    made = DynamicCache(config=subject.plain.model.config)
    longest = max(cache.length for cache in caches)
    for index, layer in enumerate(made.layers):
        members = [cache.layers[index] for cache in caches]
        if getattr(members[0], "span", None) is not None and members[0].keys is not None:
            layer.update(
                *(_left_padded([getattr(member, name) for member in members], longest) for name in ("keys", "values"))
            )
        for number in range(getattr(members[0], "number_of_states", 0)):
            if members[0].conv_states[number] is not None:
                layer.update_conv_state(torch.cat([member.conv_states[number] for member in members]), number)
            if members[0].recurrent_states[number] is not None:
                layer.update_recurrent_state(torch.cat([member.recurrent_states[number] for member in members]), number)
            layer.has_previous_state[number] = members[0].has_previous_state[number]
    return made


def _left_padded(rows: Sequence[Any], width: int) -> Any:
    return torch.cat([torch.nn.functional.pad(row, (0, 0, width - row.shape[-2], 0)) for row in rows])


_LANES = (5, 12, 9)


def lanes(subject: Subject) -> Outcome:
    """Three sessions of unequal length as one batch, each pass stopped at another cut, where the batch is taken apart.

    The reference is the plain forward on a cache that holds the same, padded on the left.
    """
    outcome = Outcome()
    if not subject.loaded.verdict.batching:
        return outcome
    caches, tokens = _read(subject, _LANES)
    theirs = _joined(subject, caches)
    pads = [max(_LANES) - length for length in _LANES]
    for cut in range(subject.layers + 1):
        ids = torch.tensor(tokens)[:, None]
        width = max(cache.length for cache in caches) + 1
        inputs: dict[str, Any] = {
            "attention_mask": torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads]),
        }
        if "position_ids" in subject.stepper.takes:
            inputs["position_ids"] = torch.tensor([[cache.length] for cache in caches])
        wanted = subject.plain.forward(ids, theirs, **inputs)
        batch = Lanes(caches)
        stopped = subject.stop(subject.run(subject.begin(batch, ids), cut))
        batch.release()
        batch = Lanes(caches)
        got = subject.land(subject.go_on(stopped, batch, ids), batch)
        subject.ring.drop(stopped.checkpoint)
        outcome.cuts += 1
        if not outcome.note(f"lanes, cut {cut}, logits", difference(got, wanted)):
            return outcome
        batch.release()
        tokens = [int(row.argmax()) for row in got[:, -1]]
    _compare_rows(outcome, "lanes", caches, theirs)
    return outcome


def _read(subject: Subject, lengths: Sequence[int]) -> tuple[list[SessionCache], list[int]]:
    """Sessions that have read texts of these lengths, and the token that each is about to read."""
    caches, tokens = [], []
    for length in lengths:
        cache = subject.cache()
        logits = subject.whole(cache, torch.tensor([text(length, seed=length)]))
        caches.append(cache)
        tokens.append(int(logits[0, -1].argmax()))
    return caches, tokens


def together(subject: Subject) -> Outcome:
    """Three sessions in a batch, then two of them, then each alone: they write what each would write alone.

    The tokens are equal; a batch changes the order of sums, so the logits are so to within rounding.
    """
    outcome = Outcome()
    if not subject.loaded.verdict.batching:
        return outcome
    alone, tokens = _read(subject, _LANES)
    wanted: list[list[Any]] = []
    for cache, token in zip(alone, tokens, strict=True):
        wanted.append([])
        for _ in range(9):
            wanted[-1].append(subject.whole(cache, torch.tensor([[token]]))[0, -1])
            token = int(wanted[-1][-1].argmax())
    caches, tokens = _read(subject, _LANES)
    done = [0] * len(caches)
    for rows, steps in (((0, 1, 2), 3), ((0, 2), 3), ((0,), 1), ((1,), 2), ((2,), 1), ((0, 1, 2), 2)):
        batch = Lanes([caches[row] for row in rows])
        for _ in range(steps):
            ids = torch.tensor([[tokens[row]] for row in rows])
            logits = subject.land(subject.begin(batch, ids), batch)
            for row, got in zip(rows, logits[:, -1], strict=True):
                expected = wanted[row][done[row]]
                tokens[row] = int(got.argmax())
                where = f"together, rows {rows}, row {row}, step {done[row]}"
                close = torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
                outcome.note(f"{where}, logits", "" if close else difference(got, expected))
                same = tokens[row] == int(expected.argmax())
                outcome.note(f"{where}, token", "" if same else f"{tokens[row]}, not {int(expected.argmax())}")
                done[row] += 1
            if outcome.failures:
                return outcome
        batch.release()
    return outcome


def forks(subject: Subject) -> Outcome:
    """Branch at every second cut of the prompt's pass and again of a later one: all answer as if alone."""
    outcome = Outcome()
    prompt = text(SHORT, seed=SHORT)
    wanted = subject.plain.answer(prompt)
    for cut in range(0, subject.layers + 1, 2):
        root = subject.cache()
        ids = torch.tensor([prompt])
        stopped = subject.stop(subject.run(subject.begin(root, ids), cut))
        child = root.fork()
        # Both write on, in turn: neither may see the other's.
        family = [child, root]
        for cache in family:
            logits = subject.land(subject.go_on(stopped, cache, ids), cache)
            outcome.note(f"fork at cut {cut} of the prompt, logits", difference(logits, wanted.logits[0]))
        outcome.cuts += 1
        for step in range(1, len(wanted.read)):
            ids = torch.tensor([wanted.read[step]])
            if step == 3:
                late = subject.stop(subject.run(subject.begin(child, ids), cut))
                grandchild = child.fork()
                logits = subject.land(subject.go_on(late, grandchild, ids), grandchild)
                outcome.note(f"fork of a fork, cut {cut}, logits", difference(logits, wanted.logits[step]))
                logits = subject.land(subject.go_on(late, child, ids), child)
                outcome.note(f"forked twice, cut {cut}, logits", difference(logits, wanted.logits[step]))
                logits = subject.whole(root, ids)
                family = [grandchild, root, child]
                outcome.cuts += 1
                continue
            for number, cache in enumerate(family):
                # A disturbance that is not ours: a branch that reads something else.
                if step == 2 and number == 0:
                    other = cache.fork()
                    subject.whole(other, torch.tensor([text(2, seed=5)]))
                logits = subject.whole(cache, ids)
                where = f"forked at cut {cut}, pass {step}, branch {number}, logits"
                outcome.note(where, difference(logits, wanted.logits[step]))
        for number, cache in enumerate(family):
            outcome.note(f"forked at cut {cut}, branch {number}", cache_difference(cache, wanted.cache))
        if outcome.failures:
            break
    return outcome


def engine(subject: Subject) -> Outcome:
    """The engine itself: one session stopped between any two layers of each pass, one that is not, one by one.

    The ring is too small for the checkpoints, so that they are moved out of it.
    """
    outcome = Outcome()
    made = Engine(subject.loaded, ring_bytes=2048, max_batch=1)
    prompts = [text(SHORT, seed=SHORT), text(LONG, seed=LONG)]
    sessions = [made.create(seed=0) for _ in prompts]
    turns = []
    for session, prompt in zip(sessions, prompts, strict=True):
        turns.append(
            made.generate(session, Request(read=prompt, max_tokens=WRITTEN, ignore_stops=True, keep_logits=True))
        )
    made.stop_at(sessions[0], layer=None)
    last: list[tuple[int, int]] = []
    while made.scheduler.busy or sessions[0].pause:
        if made.scheduler.busy:
            made.scheduler.run()
        if (pause := sessions[0].pause) is not None:
            made.resume(sessions[0])
            outcome.cuts += 1
            last.append((pause.step, pause.layer))
    stops = [(step, layer) for step in range(WRITTEN) for layer in range(subject.layers + 1)]
    outcome.note("engine, stops", "" if last == stops else f"{last}, not {stops}")
    for session, turn, prompt in zip(sessions, turns, prompts, strict=True):
        wanted = subject.plain.answer(prompt)
        tokens = [int(logits[0, -1].argmax()) for logits in wanted.logits[:WRITTEN]]
        where = f"engine, session of {len(prompt)} tokens"
        outcome.note(where, session.failed or turn.error)
        if outcome.note(f"{where}, tokens", "" if turn.generated == tokens else f"{turn.generated}, not {tokens}"):
            outcome.note(f"{where}, logits", difference(turn.logits, wanted.logits[WRITTEN - 1][0, -1].float()))
    return outcome


def trials(architecture: Architecture) -> Iterator[tuple[str, Outcome]]:
    """Everything that is tried with one architecture that the engine accepts, by name.

    Raises UnsupportedModelError if the engine refuses it.
    """
    with torch.inference_mode():
        single = Subject(architecture, "float32")
        yield "cuts, float32", _tried(cuts, single, LONG, steered=False)
        yield "cuts, float32, steered", _tried(cuts, single, SHORT, steered=True)
        yield "padded, float32", _tried(padded, single)
        yield "lanes, float32", _tried(lanes, single)
        yield "together", _tried(together, single)
        yield "forks", _tried(forks, single)
        yield "engine", _tried(engine, single)
        half = Subject(architecture, "bfloat16")
        yield "cuts, bfloat16", _tried(cuts, half, SHORT, steered=False)
        yield "cuts, bfloat16, steered", _tried(cuts, half, LONG, steered=True)
        yield "padded, bfloat16", _tried(padded, half)
        yield "lanes, bfloat16", _tried(lanes, half)


def _tried(trial: Callable[..., Outcome], *args: Any, **kwargs: Any) -> Outcome:
    """A trial that raises has failed; the others of this architecture are made all the same."""
    try:
        return trial(*args, **kwargs)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return Outcome(0, [f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"])
