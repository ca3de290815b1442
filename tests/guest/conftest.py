"""What the tests of the guest server share. They run in the server's environment, not in the project's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers


def pytest_configure(config: pytest.Config) -> None:
    """Some models of transformers compile a function when they are imported, in a way that torch is giving up."""
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def inference() -> Iterator[None]:
    """Without gradients, as the engine's thread works."""
    with torch.inference_mode():
        yield
