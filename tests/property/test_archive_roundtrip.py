"""Any tree survives an archive, and no damaged archive becomes a golden that differs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpuckpt.errors import GpuckptError
from gpuckpt.golden.archive import export_golden
from gpuckpt.store.digests import digest_file
from gpuckpt.store.layout import Layout
from tests.archives import Store, describe
from tests.fakes import publish, settings_for

# Names that a file system takes: no slash, no zero, neither . nor .., at most 255 bytes, which need not be text.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60)
BYTES = st.binary(min_size=1, max_size=60).filter(lambda name: not set(name) & {0, ord("/")}).map(os.fsdecode)
NAMES = (TEXTS | BYTES | st.text("\\xfe\udcff", min_size=1, max_size=8)).filter(lambda name: name not in (".", ".."))
CONTENTS = st.binary(max_size=2000) | st.integers(0, 3).map(lambda pages: bytes(4096 * pages))


@st.composite
def trees(draw: st.DrawFn) -> dict[str, bytes | str | None]:
    """Relative path → content of a file, target of a link (text), or None for a folder."""
    found: dict[str, bytes | str | None] = {"images": None, "rootfs": None}
    folders = ["images", "rootfs"]
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(folders))
        path = f"{parent}/{draw(NAMES)}"
        if path in found:
            continue
        kinds = ["file", "folder"] if parent.startswith("images") else ["file", "folder", "link"]
        kind = draw(st.sampled_from(kinds))
        if kind == "folder":
            folders.append(path)
            found[path] = None
        elif kind == "link":
            found[path] = draw(NAMES)
        else:
            found[path] = draw(CONTENTS)
    return found


def lay_out(folder: Path, tree: dict[str, bytes | str | None]) -> None:
    for relative, content in tree.items():
        path = folder / relative
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)


@settings(max_examples=60)
@given(tree=trees(), zstd=st.booleans())
def test_random_trees_come_back_equal(tree: dict[str, bytes | str | None], zstd: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Store(Path(folder, "ours")), Store(Path(folder, "theirs"))
        lay_out(ours.layout.goldens / "gold", tree)
        made = publish(ours.layout, contents={})
        archive = ours.export(Path(folder, "gold.tar"), zstd=zstd)
        theirs.take(archive.path, digest=archive.digest)
        assert describe(theirs.layout.golden("gold")) == describe(made)


def archive_of(zstd: bool) -> tuple[bytes, dict[str, tuple[object, ...]]]:
    """One archive, and what it holds."""
    with tempfile.TemporaryDirectory() as folder:
        settings_here = settings_for(Path(folder))
        layout = Layout.of(settings_here)
        layout.prepare()
        layout.prepare_store()
        tree: dict[str, bytes | str | None] = {
            "images": None,
            "images/pages-1.img": os.urandom(3000),
            "rootfs": None,
            "rootfs/deep": None,
            "rootfs/deep/file": b"content",
            "rootfs/link": "deep/file",
        }
        lay_out(layout.goldens / "gold", tree)
        made = publish(layout, contents={})
        archive = export_golden(settings_here, "gold", Path(folder, "archive"), zstd=zstd)
        return archive.path.read_bytes(), describe(made)


ARCHIVES = {zstd: archive_of(zstd) for zstd in (False, True)}


def contents(description: dict[str, tuple[object, ...]]) -> dict[str, object]:
    """What the manifest answers for: the bytes of files and the targets of links."""
    return {name: entry[4] for name, entry in description.items() if entry[4] is not None}


@settings(max_examples=300)
@given(zstd=st.booleans(), where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_corrupted_byte_never_publishes_a_golden_that_differs(zstd: bool, where: float, mask: int) -> None:
    data, original = ARCHIVES[zstd]
    damaged = bytearray(data)
    damaged[int(where * len(data))] ^= mask
    assume(bytes(damaged) != data)
    with tempfile.TemporaryDirectory() as folder:
        theirs = Store(Path(folder))
        path = Path(folder, "damaged")
        path.write_bytes(damaged)
        try:
            taken = theirs.take(path, digest=digest_file(path))
        except GpuckptError:
            assert theirs.empty
        else:
            # Padding and the header's unused fields carry nothing; the names and bytes must be those exported.
            assert contents(describe(theirs.layout.golden(taken.name))) == contents(original)


@settings(max_examples=60)
@given(zstd=st.booleans(), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_archive_never_publishes_a_golden_that_differs(zstd: bool, share: float) -> None:
    data, original = ARCHIVES[zstd]
    with tempfile.TemporaryDirectory() as folder:
        theirs = Store(Path(folder))
        path = Path(folder, "truncated")
        path.write_bytes(data[: int(share * len(data))])
        try:
            theirs.take(path, digest=digest_file(path))
        except GpuckptError:
            assert theirs.empty
        else:
            assert contents(describe(theirs.layout.golden("gold"))) == contents(original)
