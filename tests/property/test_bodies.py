"""Any body that is passed on keeps its values, but for the name of its model."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_routing import route

KEPT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values) | st.dictionaries(st.text(), values),
    max_leaves=10,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(), KEPT))
def test_every_body_keeps_its_values(values: dict[str, Any]) -> None:
    got = route(json.dumps(values | {"model": "alias", "stream": False}).encode())
    assert json.loads(got.body) == values | {"model": "served-m", "stream": False}
    assert got.model == "m" and not got.stream
