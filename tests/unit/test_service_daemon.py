"""The pool's daemon before it serves: that it is alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuckpt.errors import BusyError
from gpuckpt.service.daemon import _alone
from gpuckpt.store.layout import Layout


def test_it_is_alone_in_a_run_folder_that_nobody_has_made_yet(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "store", tmp_path / "state", tmp_path / "run" / "gpuckpt")
    with _alone(layout), pytest.raises(BusyError, match="a pool runs already"), _alone(layout):
        pass
