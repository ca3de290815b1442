"""What a cache holds at one moment, for a thread beside the engine's to read wherever it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .arena import Block, Table
from .cache import SessionCache
from .pager import Pager
from .store import File


class Snapshot:
    """Keys and values of a session as they are; nothing is brought back for it.

    To be made and released by the engine's thread, and not while any of it is arriving: some of that lies here, some
    there.
    """

    def __init__(self, pager: Pager, cache: SessionCache) -> None:
        self._pager = pager
        self._planes = list(cache.planes())
        self._blocks = list(cache.blocks())
        assert not pager.arriving(cache)
        for block in self._blocks:
            block.moving += 1  # it keeps its place and its copies
            block.tables += 1  # and who goes on writes into another
        self._sources = {
            table: {number: self._source(block) for number, block in table.blocks.items()} for table in cache.tables
        }

    def _source(self, block: Block) -> Any:
        if block.home is None or block.dirty:
            return self._pager.arena.memory.block(block.place)
        return self._pager.host.bytes(block.home.slot) if block.home.slot >= 0 else block.home.file

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Copies by name, as of :meth:`SessionCache.tensors`; for any thread. Raises LostError."""
        files = self._pager.files

        def read(source: Any) -> Any:
            if not isinstance(source, File):
                return source
            assert files is not None
            made = files.bounce()
            files.read(source, made)
            return made

        # Each file is read once; what lies in memory is taken from there for each layer.
        contents = {
            table: {number: read(source) for number, source in sources.items()}
            for table, sources in self._sources.items()
        }

        def content(table: Table) -> Callable[[int], Any]:
            return lambda number: contents[table][number]

        for where, table, layer, name, low, high in self._planes:
            yield where, table.track.columns(layer, name, low, high, content(table))

    def release(self) -> None:
        """It has been read."""
        self._pager.unpin(self._blocks)
        self._blocks = []
