"""What the command line takes and shows in place of records: ``scale:6:0.9``, ``entropy>2.5``, a strip of layers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, get_args

from gpuckpt.errors import UsageError
from gpuckpt.sessions.records import Condition, Edit, Kind, Pause, Sampling, Variant

_KINDS: tuple[Kind, ...] = get_args(Kind)
_BARS = "▁▂▃▄▅▆▇█"
_SETTINGS = {"temperature": float, "top_p": float, "top_k": int, "seed": int, "max_tokens": int}


def edit(word: str) -> Edit:
    """``KIND:LAYER:FACTOR[:VECTOR]``; without a LAYER it is for where the session has stopped, FACTOR is 1 if empty."""
    kind, layer, factor, vector = [*word.split(":", 3), "", "", ""][:4]
    found = next((one for one in _KINDS if one == kind), None)
    if found is None or ":" not in word:
        raise UsageError(
            f"“{word}” is no edit",
            cause=f"an edit is KIND:LAYER:FACTOR[:VECTOR], where KIND is one of {', '.join(_KINDS)}",
            remedy="for example scale:6:0.9, or add:6:4:VECTOR with the name of a stored vector",
        )
    return Edit(
        found,
        _whole(layer, word) if layer else None,
        _number(factor, word) if factor else 1.0,
        vector or None,
    )


def variant(word: str) -> Variant:
    """Edits at the stop and ``temperature= top_p= top_k= seed= max_tokens= id= standing=EDIT``, between commas.

    An empty word is a branch like its parent.
    """
    edits: list[Edit] = []
    standing: list[Edit] = []
    settings: dict[str, Any] = {}
    for part in filter(None, word.split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            edits.append(edit(part))
        elif name == "standing":
            standing.append(edit(value))
        elif name in settings:
            raise UsageError(f"“{word}” gives {name} twice")
        elif name == "id":
            settings[name] = value
        elif name in _SETTINGS:
            settings[name] = _whole(value, part) if _SETTINGS[name] is int else _number(value, part)
        else:
            raise UsageError(
                f"“{part}” is nothing that a variant can differ in",
                cause=f"that is: id, standing, {', '.join(_SETTINGS)}",
            )
    chosen = {name: settings.pop(name) for name in ("temperature", "top_p", "top_k") if name in settings}
    return Variant(
        edits=tuple(edits), standing=tuple(standing), sampling=Sampling(**chosen) if chosen else None, **settings
    )


def condition(words: Sequence[str]) -> Condition:
    """``entropy>2.5``, ``entropy<1``, ``norm>30``, ``norm<5``, ``token=17``; all must hold, of tokens one."""
    found: dict[str, Any] = {}
    for word in words:
        match = re.fullmatch(r"(entropy|norm)([<>])(.+)|token=(.+)", word)
        if match is None:
            raise UsageError(f"“{word}” is no condition", remedy="entropy>2.5, entropy<1, norm>30, norm<5 or token=17")
        if match[4]:
            found["tokens"] = (*found.get("tokens", ()), _whole(match[4], word))
            continue
        name = f"{match[1]}_{'above' if match[2] == '>' else 'below'}"
        if name in found:
            raise UsageError(f"“{word}” is the second of its kind")
        found[name] = _number(match[3], word)
    return Condition(**found)


def strip(pause: Pause) -> str:
    """The layers as a line: a bar for the norm behind each that was watched, ``│`` where it stopped.

    ``□`` is one that ran unwatched, ``!`` a norm that is no finite number, ``·`` one that is still to run.
    """
    norms = dict(pause.norms)
    finite = [norm for norm in norms.values() if norm is not None and math.isfinite(norm)]
    most = max(finite, default=0.0)
    marks = []
    for layer in range(pause.layer + 1):
        if layer not in norms:
            marks.append("□")
            continue
        norm = norms[layer]
        if norm is None or not math.isfinite(norm):
            marks.append("!")
        else:
            marks.append(_BARS[min(int(norm / most * len(_BARS)), len(_BARS) - 1)] if most else _BARS[0])
    drawn = f"0 {''.join(marks)}│{'·' * (pause.layers - pause.layer)} {pause.layers}"
    return f"{drawn}   norms {min(finite):.4g} to {most:.4g}" if finite else drawn


def _whole(text: str, word: str) -> int:
    if not re.fullmatch(r"[0-9]{1,19}", text):
        raise UsageError(f"“{text}” in “{word}” is no whole number")
    return int(text)


def _number(text: str, word: str) -> float:
    if not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text) or math.isinf(float(text)):
        raise UsageError(f"“{text}” in “{word}” is no number")
    return float(text)
