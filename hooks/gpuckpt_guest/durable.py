"""Sessions that outlive the server: blocks in files, and for each session a file that says which are its.

The folder belongs to one model and one server at a time::

    layout.json                 where what lies in a block
    sessions/NAME.safetensors   a session as it is exported, but with names and digests of the blocks of its keys
    HEX.block                   one block each; those that no session names are removed at the start

A session is kept once its file has been renamed into place, when all of its blocks are on the disk. Until then, and if
the server is killed at any moment, what was kept before is there as it was: blocks are never written to again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import filed, transfer
from .engine.engine import Engine
from .engine.errors import EngineError
from .engine.session import Session
from .kv.arena import Block
from .kv.store import File, Home, publish, sync

_log = logging.getLogger("gpuckpt_guest")
_SUFFIX = ".safetensors"


class Durable:
    """Keeps sessions of an engine that has a folder, and finds them again."""

    def __init__(self, engine: Engine) -> None:
        """Raises OSError."""
        files = engine.memory.files
        assert files is not None
        self._engine = engine
        self._files = files
        self._folder = files.folder / "sessions"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._kept: dict[Session, list[File]] = {}
        self._publishing: dict[Session, int] = {}
        self._left: set[Path] = set()  # blocks of sessions that this server has no room for
        engine.memory.keep = self._keep
        engine.memory.dropped = self._drop
        engine.on_restore(self.renew)

    # ------------------------------------------------------------------ keeping

    def _keep(self, session: Session) -> None:
        """Begin to keep a session that has left the device; it is told "suspended", or "not_kept", at the end."""
        pager = self._engine.memory.pager
        blocks = list(session.cache.blocks())
        missing = [block for block in blocks if block.home.file is None]
        left, wakes = len(missing), session.wakes
        failed = False

        def written(_: Block, error: Exception | None) -> None:
            nonlocal left, failed
            left -= 1
            if error is not None and not failed:
                failed = True
                self._failed(session, error)
            elif not left and not failed:
                self._publish(session, blocks, wakes)

        if not missing:
            self._publish(session, blocks, wakes)
        for block in missing:
            pager.persist(block, written)

    def _is(self, session: Session, wakes: int) -> bool:
        """Whether the session is there, and still what it was when it was suspended for the ``wakes``-th time."""
        here = self._engine.sessions.get(session.id) is session
        return here and session.suspended and session.wakes == wakes

    def _publish(self, session: Session, blocks: Sequence[Block], wakes: int) -> None:
        if not self._is(session, wakes):
            return  # it has been resumed, or deleted, meanwhile
        files = [block.home.file for block in blocks]
        tensors, metadata, snapshot = transfer.export(self._engine, session)
        snapshot.release()
        facts = transfer.with_blocks(metadata, self._named(session))
        for file in files:
            file.users += 1
        target = self._path(session)
        self._publishing[session] = self._publishing.get(session, 0) + 1

        def work() -> None:
            sync(self._files.folder)
            publish(target, transfer.pack(tensors, facts))

        def then(_: Any, error: Exception | None) -> None:
            self._publishing[session] -= 1
            if not self._publishing[session]:
                del self._publishing[session]
            if error is not None or self._engine.sessions.get(session.id) is not session:
                self._release(files)
                if error is not None:
                    self._failed(session, error)
                return
            before, self._kept[session] = self._kept.get(session, []), files
            self._release(before)
            if self._is(session, wakes):
                session.durable = True
                session.emit({"type": "suspended", "durable": True})

        self._engine.memory.pager.do(work, then)

    def _path(self, session: Session) -> Path:
        return self._folder / f"{session.id}{_SUFFIX}"

    def _named(self, session: Session) -> list[dict[str, Any]]:
        return [
            {"track": track, "number": number, "file": block.home.file.path.name, "digest": block.home.file.digest}
            for track, table in enumerate(session.cache.tables)
            for number, block in table.blocks.items()
        ]

    def _failed(self, session: Session, error: Exception) -> None:
        _log.error("session %s could not be kept: %s", session.id, error)
        session.emit({"type": "not_kept", "error": str(error)})

    def _drop(self, session: Session) -> None:
        """The session has ended."""
        if session in self._kept or session in self._publishing:
            # Behind what is being written, and before what another of its name will write.
            target = self._path(session)
            self._engine.memory.pager.do(lambda: target.unlink(missing_ok=True), lambda *_: None)
            self._release(self._kept.pop(session, []))

    def _release(self, files: Sequence[File]) -> None:
        for file in files:
            self._engine.memory.pager.drop_file(file)

    # ------------------------------------------------------------------ finding again

    def find(self) -> tuple[int, int]:
        """Take up what was kept, before the engine is started; returns how many sessions, and how many cannot be had.

        Those that are damaged are put aside: ``NAME.damaged``. Files that belong to none are removed.
        """
        found = damaged = 0
        self._left = set()
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path.name.removesuffix(_SUFFIX) in self._engine.sessions:
                continue
            try:
                self._take_up(path)
                found += 1
            except (EngineError, OSError) as error:
                damaged += 1
                if isinstance(error, EngineError) and error.code not in ("malformed", "conflict"):
                    # It is well, but this server has no room for it: it stays, with its blocks, for one that has.
                    _log.error("%s stays where it is: %s", path, error)
                    self._left |= set(self._blocks_of(path))
                    continue
                _log.error("%s cannot be taken up: %s", path, error)
                path.rename(path.with_suffix(".damaged"))
        for path in self._folder.glob("*.tmp"):
            path.unlink(missing_ok=True)
        self._tidy()
        return found, damaged

    def _blocks_of(self, path: Path) -> list[Path]:
        """The blocks of a session that is whole."""
        _, metadata = transfer.unpack(path.read_bytes())
        return [self._files.folder / str(item["file"]) for item in metadata["gpuckpt_session"].get("blocks") or []]

    def _tidy(self) -> None:
        """Remove files of blocks that belong to no session, and count the others."""
        known = set(self._known()) | self._files.pending | self._left
        self._files.written = len(known)
        for path in self._files.found():
            if path not in known:
                with suppress(OSError):
                    path.unlink()

    def _known(self) -> dict[Path, File]:
        """The files of blocks that belong to sessions."""
        known = {file.path: file for files in self._kept.values() for file in files}
        for session in self._engine.sessions.values():
            found = (block.home.file for block in session.cache.blocks() if block.home is not None)
            known |= {file.path: file for file in found if file is not None}
        return known

    def renew(self) -> None:
        """The process has been restored: the folder may have been another's meanwhile, and says what is kept.

        Sessions that were suspended durably are as the folder has them now: others, if they have gone on; none, if
        they were deleted. A session that was not kept, or was resumed, is as it was when the process was frozen.
        """
        if not self._folder.is_dir():
            return
        for session, files in list(self._kept.items()):
            if session.suspended and session.durable:
                for file in files:
                    file.users += 1  # it stays: the folder may still have the session
                del self._kept[session]
                self._engine.delete(session)
            elif not self._path(session).is_file():
                self._release(self._kept.pop(session))
        self.find()

    def _take_up(self, path: Path) -> None:
        tensors, metadata = transfer.unpack(path.read_bytes())
        mine: list[File] = []
        known = self._known()  # branches share blocks
        broken: list[str] = []

        def attach(session: Session, named: Sequence[filed.Block]) -> None:
            cache = session.cache
            for track, table in enumerate(cache.tables):
                blocks: dict[int, Block] = {}
                for item in sorted((item for item in named if item.track == track), key=lambda item: item.number):
                    where = self._files.folder / item.file
                    file = known.setdefault(where, File(where, item.digest, users=0))
                    if not file.path.is_file() or file.path.stat().st_size != self._files.size:
                        broken.append(item.file)
                    file.users += 2  # the block, and what is kept
                    mine.append(file)
                    blocks[item.number] = Block(-1, Home(self._engine.memory.pager.host, file=file))
                wanted = cache.numbers(table)
                if list(blocks) != list(wanted):
                    raise ValueError("its blocks are not those of what it has read")
                table.adopt(blocks)
            cache.move("cpu")
            cache.leave()

        session = transfer.load(self._engine, (tensors, metadata), None, attach)
        if broken and (session.reads is None or session.pause):
            self._engine.delete(session)
            raise EngineError(f"its block {broken[0]} is missing, or was cut short", code="malformed")
        if broken:
            _log.warning("%s: block %s is missing, or was cut short; its passes will run again", path, broken[0])
            session.forget_cache()
        self._kept[session] = mine
        session.suspended = session.durable = True
