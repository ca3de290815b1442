"""What the benchmarks of KV paging share: engines with a memory of a chosen size, on one model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import sessions_common
from benchmarks.journal import Document
from benchmarks.sessions_common import Rig


class KvRig(Rig):
    """A model, and engines one after the other."""

    @contextlib.contextmanager
    def serving(
        self, device: int, host: int = 0, *, folder: Path | None = None, disk: int = 0, **options: Any
    ) -> Iterator[Any]:
        """An engine with so many bytes for caches on the device, off it, and on the disk."""
        from hooks.gpuckpt_guest.engine.engine import Engine
        from hooks.gpuckpt_guest.engine.memory import Budgets

        budgets = Budgets(device, host, disk, folder)
        before, self.engine = self.engine, Engine(self.loaded, budgets=budgets, **options)
        self.engine.start()
        try:
            yield self.engine
        finally:
            self.measured = self.engine.memory.residency.costs
            self.engine.stop()
            self.engine = before

    def facts(self) -> Document:
        """Also what a token takes, and what its passes cost when they were last measured."""
        found = super().facts() | {"token_bytes": self.token_bytes}
        if self.measured is not None:
            found |= {"pass_s": self.measured.pass_s, "token_s": self.measured.token_s}
        return found

    # What the last engine that served has measured of the passes of single sessions.
    measured: Any = None

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token."""
        forms = self.loaded.blueprint.forms.values()
        return sum(heads * size * dtype.itemsize for form in forms for heads, size, dtype in form.values())


def fill(engine: Any, session: Any, tokens: int) -> None:
    """Have a session hold so many tokens that nobody has computed: numbers, as any others. On the engine's thread."""
    import torch

    session.cache.room(tokens)
    for layer, form in engine.loaded.blueprint.forms.items():
        columns = [
            torch.randn(1, heads, tokens, size, dtype=dtype, device=engine.loaded.device)
            for heads, size, dtype in (form["keys"], form["values"])
        ]
        session.cache.update(*columns, layer)
    session.cache.commit(tokens)
    session.tokens.extend(range(1, tokens + 1))
    session.reads = None


def written(torch: Any) -> Any:
    """A mode that counts the bytes which operations write: of new tensors that share no memory, and of copies."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):  # type: ignore[misc]
        bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            name = function.overloadpacket.__name__
            if name.endswith("_") and args:  # in place: copy_ and its like
                self.bytes += args[0].nbytes
            elif isinstance(made, torch.Tensor) and not any(
                isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() == made.untyped_storage().data_ptr()
                for one in args
            ):
                self.bytes += made.nbytes
            return made

    return Counting()


def run(name: str, about: str | None, body: Callable[[KvRig], Document], *, n: int, budget: float) -> int:
    """The main of a part."""
    return sessions_common.main(name, sessions_common.parser(name, about, n=n, budget=budget), body, rig=KvRig)
