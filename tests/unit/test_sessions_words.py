"""What a command line says of edits, variants and conditions, in words."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from gpuckpt import errors
from gpuckpt.sessions import Condition, Edit, Pause, Sampling, Variant, words
from tests.fake_guest import PAUSE


@pytest.mark.parametrize(
    ("word", "edit"),
    [
        ("scale:6:0.9", Edit("scale", 6, 0.9)),
        ("scale::-2", Edit("scale", None, -2.0)),
        ("add:0:1e1:calm.v-1", Edit("add", 0, 10.0, "calm.v-1")),
        ("project:6::v", Edit("project", 6, 1.0, "v")),
    ],
)
def test_edits(word: str, edit: Edit) -> None:
    assert words.edit(word) == edit


@pytest.mark.parametrize(
    "word",
    ["", "scale", "twist:1:1", "scale:x:1", "scale:-1:1", "scale:1:nan", "scale:1:1e999", "scale:1:1_0", "scale:٣:1"],
)
def test_what_is_no_edit(word: str) -> None:
    with pytest.raises(errors.UsageError, match="is no"):
        words.edit(word)


def test_variants() -> None:
    assert words.variant("") == Variant()
    made = words.variant("scale::2,temperature=0.8,top_k=5,seed=1,id=warm,max_tokens=3,standing=add:1:2:v")
    assert made == Variant(
        "warm", (Edit("scale", None, 2.0),), (Edit("add", 1, 2.0, "v"),), Sampling(0.8, top_k=5), 1, 3
    )
    for word in ("heat=1", "seed=1,seed=2", "seed=1.5", "temperature=", "cold", "temperature=hot"):
        with pytest.raises(errors.UsageError):
            words.variant(word)


def test_conditions() -> None:
    made = words.condition(["entropy>2.5", "entropy<3", "norm>1", "norm<9", "token=3", "token=4"])
    assert made == Condition((3, 4), 2.5, 3.0, 1.0, 9.0)
    assert words.condition([]) == Condition()
    for word in ("entropy=1", "heat>1", "norm>", "token=x", "norm>nan"):
        with pytest.raises(errors.UsageError):
            words.condition([word])
    with pytest.raises(errors.UsageError, match="second"):
        words.condition(["norm>1", "norm>2"])


def test_the_strip_of_layers() -> None:
    def drawn(norms: list[list[Any]], layer: int = 2) -> str:
        return words.strip(msgspec.convert(PAUSE | {"norms": norms, "layer": layer}, Pause))

    assert drawn([[0, 1.0], [1, 4.0], [2, None]]) == "0 ▃█!│·· 4   norms 1 to 4"
    assert drawn([[2, 3.0]]) == "0 □□█│·· 4   norms 3 to 3"
    assert drawn([], layer=4) == "0 □□□□□│ 4"
    assert drawn([[0, 0.0]], layer=0) == "0 ▁│···· 4   norms 0 to 0"
