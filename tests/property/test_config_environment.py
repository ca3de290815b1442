"""Settings given to a child by its environment: what arrives is what was meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuckpt import config_load
from gpuckpt.config import Create, Criu, Paths, Podman, Settings, Store
from gpuckpt.config_load import as_environment, load

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
PATHS = st.builds(lambda words: Path("/", *words), st.lists(TEXTS, max_size=3))
BARE_PATHS = st.builds(
    lambda words: Path("/", *words), st.lists(st.from_regex(r"[A-Za-z0-9_.é-]{1,9}", fullmatch=True))
)
SECONDS = st.floats(min_value=0, exclude_min=True, max_value=365 * 86400)
BYTES = st.integers(1, 1 << 62)
SETTINGS = st.builds(
    Settings,
    paths=st.builds(Paths, prefix=PATHS, state=BARE_PATHS, run=BARE_PATHS, hooks=PATHS),
    store=st.builds(
        Store,
        path=PATHS,
        size=st.none() | BYTES,
        huge=st.sampled_from(["never", "always", "within_size", "advise"]),
        disk=st.none() | PATHS,
    ),
    criu=st.builds(Criu, path=st.none() | PATHS, hook_timeout=SECONDS, ghost_limit=BYTES),
    podman=st.builds(Podman, runtime=st.sampled_from(["auto", "runc", "crun"]), timeout=SECONDS),
    create=st.builds(
        Create,
        name=st.none() | st.from_regex(r"[a-z0-9]([a-z0-9_.-]{0,9}[a-z0-9])?", fullmatch=True),
        model=st.none() | TEXTS,
        image=st.none() | TEXTS,
        publish=st.none() | st.sampled_from(["8000", "127.0.0.1:80:8000", "[::1]:80"]),
        start_timeout=SECONDS,
        warmup=st.integers(0, 99),
        prompts=st.lists(TEXTS, max_size=3).map(tuple),
    ),
)


@pytest.fixture(autouse=True)
def _nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_load, "DEFAULT_FILE", tmp_path / "none.toml")


def loaded(environ: dict[str, Any]) -> Settings:
    return load(None, environ=environ, env_file=None, flags={}).settings


@given(SETTINGS)
def test_what_a_child_is_given_is_what_we_have(settings: Settings) -> None:
    environ = as_environment(settings)
    assert all(value for value in environ.values())  # an empty one counts as not set
    assert loaded(environ) == settings
    assert {os.fsdecode(os.fsencode(value)) for value in environ.values()} == set(environ.values())


def test_the_defaults_are_given_too() -> None:
    assert loaded(as_environment(Settings())) == Settings()


@pytest.mark.parametrize("seconds", [1e-05, 1.5e-07, 0.1 + 0.2, 31536000.0, 5e-324])
def test_a_duration_arrives_to_the_last_bit(seconds: float) -> None:
    settings = Settings(criu=Criu(hook_timeout=seconds))
    assert loaded(as_environment(settings)) == settings
