"""Between the forms of the API and what the engine takes and gives."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .. import transfer
from ..engine.breakpoints import Condition
from ..engine.engine import Engine
from ..engine.errors import EngineError, missing
from ..engine.session import Session, State, Turn, norms
from ..engine.steering import Edit
from . import schema


def edits_from(engine: Engine, specs: Sequence[schema.EditSpec], layer: int | None) -> list[Edit]:
    """Edits; ``layer`` is where those are made that name none. Raises EngineError: no such vector, no layer."""
    made = []
    for spec in specs:
        at = spec.layer if spec.layer is not None else layer
        if at is None:
            raise EngineError("the edit needs a layer: the session has not stopped at one")
        vector: Any = None
        if isinstance(spec.vector, str):
            if (vector := engine.vectors.get(spec.vector)) is None:
                raise missing("vector", spec.vector)
        elif spec.vector is not None:
            vector = torch.tensor(spec.vector, dtype=torch.float32)
        made.append(Edit(spec.kind, at, spec.factor, vector, spec.first, spec.last, spec.name or ""))
    return made


def stop_at(engine: Engine, session: Session, specs: Sequence[schema.BreakpointSpec]) -> list[str]:
    """Add breakpoints, all or none; returns their ids."""
    made: list[str] = []
    try:
        for spec in specs:
            layers = spec.layer if isinstance(spec.layer, list) else [spec.layer]
            if spec.id and len(layers) > 1:
                raise EngineError("a breakpoint with several layers makes several: they cannot share an id")
            condition = spec.condition.model_dump()
            if condition["tokens"] is not None:
                condition["tokens"] = frozenset(condition["tokens"])
            stop = partial(
                engine.stop_at,
                session,
                name=spec.id,
                phase=spec.phase,
                position=spec.position,
                step=spec.step,
                condition=Condition(**condition),
                once=spec.once,
            )
            for layer in layers:
                made.append(stop(layer=layer))  # each by itself: those before one that is refused are taken back
    except EngineError:
        for name in made:
            session.breakpoints.pop(name, None)
        raise
    return made


def edit_info(edit: Edit) -> dict[str, Any]:
    """An edit as it is shown: of a vector, its length."""
    made = {name: getattr(edit, name) for name in ("name", "kind", "layer", "factor", "first", "last")}
    return made | {"vector": None if edit.vector is None else float(edit.vector.float().norm())}


def info(engine: Engine, session: Session) -> dict[str, Any]:
    """A session in the form of :class:`schema.SessionInfo`."""
    turn = session.turn
    return {
        "id": session.id,
        "state": session.state,
        "parent": session.parent,
        "created": session.created,
        "tokens": len(session.tokens),
        "length": session.length,
        "cache_bytes": session.cache.bytes() if session.state is not State.RUNNING else 0,
        "memory": engine.memory.where(session),
        "turns": session.turns,
        "passes": session.passes,
        "steering": [edit_info(edit) for edit in session.edits.values()],
        "breakpoints": [transfer.breakpoint_facts(breakpoint) for breakpoint in session.breakpoints.values()],
        "pause": pause_info(engine, session),
        "generated": len(turn.generated) if turn else session.written,
        "text": turn.text.text if turn else session.text,
        "failed": session.failed,
        "wire_bytes": {"received": session.wire_received, "sent": session.wire_sent},
    }


def pause_info(engine: Engine, session: Session) -> dict[str, Any] | None:
    """Where a session has stopped, in the form of :class:`schema.PauseInfo`."""
    pause = session.pause
    if pause is None:
        return None
    held = pause.checkpoint
    return {
        **{name: getattr(pause, name) for name in ("layer", "step", "position", "tokens", "breakpoint", "replaced")},
        "layers": engine.loaded.verdict.layers,
        "shape": list(held.shape),
        "dtype": str(held.dtype).removeprefix("torch."),
        "checkpoint": {
            "bytes": held.bytes,
            "dispatch_us": held.dispatch_us,
            "complete_us": held.complete_us if held.done else None,
            "copy_us": held.copy_us if held.done else None,
            "pinned": held.pinned,
        },
        "edits": [edit_info(edit) for edit in pause.edits],
        "norms": [(layer, norm if math.isfinite(norm) else None) for layer, norm in norms(pause)],
        "seconds": (time.monotonic_ns() - pause.began_ns) / 1e9,
        "wire_bytes": {
            "received": session.wire_received - pause.wire[0],
            "sent": session.wire_sent - pause.wire[1],
        },
    }


def result(engine: Engine, session: Session, turn: Turn) -> dict[str, Any]:
    """A generation in the form of :class:`schema.Result`."""
    state = "done" if turn.reason else "paused" if session.turn is turn and session.pause else "running"
    logs = None
    if turn.top_scores is not None:
        logs = [
            {"token": token, "logprob": scores.chosen, "top": [list(pair) for pair in scores.top]}
            for token, scores in zip(turn.generated, list(turn.scores), strict=False)
        ]
    return {
        "session": session.id,
        "state": state,
        "text": turn.text.text,
        "tokens": list(turn.generated),
        "finish_reason": turn.reason or None,
        "stop": turn.stop,
        "logprobs": logs,
        "logits": turn.logits.tolist() if turn.logits is not None else None,
        "pause": pause_info(engine, session) if state == "paused" else None,
        "prompt_tokens": turn.prompt_tokens,
        "resumed": {"restore_us": turn.restore_us, "token_us": turn.token_us} if turn.restore_us is not None else None,
        "error": turn.error or None,
    }
