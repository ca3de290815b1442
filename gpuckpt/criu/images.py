"""Read CRIU's images without restoring them: processes, memory, sockets, files.

The formats are CRIU's protobuf descriptions (images/*.proto), decoded by its own pycriu.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpuckpt.errors import IncompatibleError, PreflightError, VerificationError
from gpuckpt.manifest import Process

PAGE = 4096
FRESH = ".new"  # written beside the old images; a glob for *.img does not see them

# Images whose content is not protobuf, or follows its own header only.
_RAW = ("pages-", "tmpfs-", "gpu-", "ghost-file-", "iptables-", "ip6tables-", "nftables-", "ifaddr-", "route", "rule-")


class UndecodableError(VerificationError):
    """An image that is damaged, or of a format that is not known here: nobody can tell which."""


def load(path: Path, *, payload: bool = False) -> dict[str, Any]:
    """Decode one image: ``{"magic": …, "entries": […]}``.

    Raises UndecodableError if it cannot be decoded, PreflightError if pycriu is not installed.
    """
    try:
        import pycriu
    except ImportError as error:
        raise PreflightError("pycriu is not installed", cause=str(error), remedy="make setup") from error
    try:
        with path.open("rb") as file:
            image: dict[str, Any] = pycriu.images.load(file, no_payload=not payload)
            return image
    except FileNotFoundError:
        raise
    except Exception as error:  # pycriu raises many kinds on a damaged file
        raise UndecodableError(f"{path.name} cannot be decoded", cause=f"{type(error).__name__}: {error}") from error


def load_exactly(path: Path) -> dict[str, Any]:
    """Decode one image that is to be changed and encoded again; one of those whose entries have no payload.

    pycriu leaves out fields that it does not know. Raises IncompatibleError if encoding the image again does not give
    the same bytes, or if its kind is not known: a newer CRIU wrote it; UndecodableError if it cannot be decoded.
    """
    import pycriu

    data = path.read_bytes()
    try:
        image = load(path, payload=True)
        same = pycriu.images.dumps(image) == data
    except VerificationError as error:
        if isinstance(error.__cause__, pycriu.images.MagicException):
            raise IncompatibleError(
                f"{path.name} is of a kind that gpuckpt does not know", remedy="use a gpuckpt that knows this CRIU"
            ) from error
        raise
    if not same:
        raise IncompatibleError(
            f"{path.name} holds what gpuckpt does not know and would lose",
            cause="encoded again, the image is not the same: a newer CRIU wrote it",
            remedy="use a gpuckpt that knows this CRIU, or create with --mode copy",
        )
    return image


def save(path: Path, image: dict[str, Any]) -> None:
    """Encode one image, as :func:`load` gives it with its payload, readable by root alone."""
    import pycriu

    path.touch(mode=0o600)
    path.write_bytes(pycriu.images.dumps(image))


def save_beside(path: Path, image: dict[str, Any]) -> Path:
    """Encode an image beside the one at ``path``, whose place it is to take; returns where."""
    fresh = path.with_suffix(FRESH)
    save(fresh, image)
    return fresh


@contextmanager
def replacing(images: Path) -> Iterator[list[Path]]:
    """Gives the list for what the body writes beside the old images; at its end they take the names of those, in order.

    If the body raises, what it has written is removed, listed or not, and the images are as they were. Raises
    VerificationError if only some took their names.
    """
    fresh: list[Path] = []
    try:
        yield fresh
    except BaseException:
        for path in images.glob(f"*{FRESH}"):
            path.unlink()
        raise
    try:
        for path in fresh:
            path.rename(path.with_suffix(".img"))
    except OSError as error:
        # Some images are new, some old: together they are no dump any more, not even one to be copied.
        raise VerificationError(
            "the rewritten images could not take the places of the old ones",
            cause=str(error),
            remedy="create the golden again",
        ) from error


def undecodable(images: Path) -> list[str]:
    """Names of the images that do not decode, each with its reason; pages are checked against their page maps."""
    problems: list[str] = []
    for path in sorted(images.glob("*.img")):
        if path.name.startswith(_RAW):
            continue
        try:
            load(path)
        except VerificationError as error:
            problems.append(f"{error.message}: {error.cause}")
    try:
        problems.extend(_short_pages(images))
    except VerificationError as error:
        problems.append(f"{error.message}: {error.cause}")
    for needed in ("inventory.img", "pstree.img"):
        if not (images / needed).is_file():
            problems.append(f"{needed} is missing")
    return problems


def _short_pages(images: Path) -> Iterable[str]:
    expected: dict[int, int] = {}
    for path in images.glob("pagemap-*.img"):
        entries = load(path)["entries"]
        if entries:
            pages_id = entries[0]["pages_id"]
            expected[pages_id] = expected.get(pages_id, 0) + sum(stored_pages(entry) for entry in entries[1:])
    for pages_id, pages in expected.items():
        path = images / f"pages-{pages_id}.img"
        size = path.stat().st_size if path.exists() else 0
        if size != pages * PAGE:
            yield f"{path.name} has {size} bytes, its page map describes {pages * PAGE}"


def stored_pages(entry: dict[str, Any]) -> int:
    """Pages of a page map's entry whose bytes are in the pages image."""
    # Pages in a parent image or left to lazy restore carry no bytes of their own; PE_PRESENT is bit 2 (pagemap.proto).
    if entry.get("in_parent"):
        return 0
    flags = entry.get("flags", 4)
    present = flags & 4 if isinstance(flags, int) else "PE_PRESENT" in str(flags)
    return int(entry["nr_pages"]) if present else 0


def processes(images: Path) -> tuple[Process, ...]:
    """The process tree: ids, names, threads and stored memory of each process."""
    found = []
    for entry in load(images / "pstree.img")["entries"]:
        pid = int(entry["pid"])
        core = load(images / f"core-{pid}.img")["entries"][0]
        comm = core["tc"]["comm"] if core.get("tc") else "?"
        pagemap = images / f"pagemap-{pid}.img"
        pages = sum(stored_pages(row) for row in load(pagemap)["entries"][1:]) if pagemap.exists() else 0
        found.append(
            Process(
                pid=pid,
                parent=int(entry["ppid"]),
                name=comm.decode() if isinstance(comm, bytes) else str(comm),
                threads=len(entry["threads"]),
                pages_bytes=pages * PAGE,
            )
        )
    return tuple(found)


def shared_memory_bytes(images: Path) -> tuple[int, int]:
    """Bytes of shared memory: in pages images (anonymous shared mappings), and in archives of the container's tmpfs."""
    mapped = sum(
        sum(stored_pages(row) for row in load(path)["entries"][1:]) for path in images.glob("pagemap-shmem-*.img")
    )
    return mapped * PAGE, sum(path.stat().st_size for path in images.glob("tmpfs-*"))


def capabilities(images: Path) -> tuple[str, ...]:
    """Capabilities that any process of the dump holds (permitted or inheritable), as names (``CAP_CHOWN``), sorted."""
    bits = 0
    for path in images.glob("core-*.img"):
        creds = load(path)["entries"][0]["thread_core"]["creds"]
        for kind in ("cap_prm", "cap_eff", "cap_inh"):
            bits |= sum(int(word) << (32 * index) for index, word in enumerate(creds[kind]))
    return tuple(sorted(_CAPABILITIES.get(bit, f"CAP_{bit}") for bit in range(64) if bits >> bit & 1))


def regular_files(images: Path) -> set[str]:
    """Paths, inside the container, of the regular files that the processes have open or mapped."""
    found: set[str] = set()
    for entry in load(images / "files.img")["entries"]:
        regular = entry.get("reg")
        if regular and not regular.get("ext") and str(regular["name"]).startswith("/"):
            found.add(str(regular["name"]))
    return found


# linux/capability.h
_CAPABILITIES = {
    bit: f"CAP_{name}"
    for bit, name in enumerate(
        [
            "CHOWN",
            "DAC_OVERRIDE",
            "DAC_READ_SEARCH",
            "FOWNER",
            "FSETID",
            "KILL",
            "SETGID",
            "SETUID",
            "SETPCAP",
            "LINUX_IMMUTABLE",
            "NET_BIND_SERVICE",
            "NET_BROADCAST",
            "NET_ADMIN",
            "NET_RAW",
            "IPC_LOCK",
            "IPC_OWNER",
            "SYS_MODULE",
            "SYS_RAWIO",
            "SYS_CHROOT",
            "SYS_PTRACE",
            "SYS_PACCT",
            "SYS_ADMIN",
            "SYS_BOOT",
            "SYS_NICE",
            "SYS_RESOURCE",
            "SYS_TIME",
            "SYS_TTY_CONFIG",
            "MKNOD",
            "LEASE",
            "AUDIT_WRITE",
            "AUDIT_CONTROL",
            "SETFCAP",
            "MAC_OVERRIDE",
            "MAC_ADMIN",
            "SYSLOG",
            "WAKE_ALARM",
            "BLOCK_SUSPEND",
            "AUDIT_READ",
            "PERFMON",
            "BPF",
            "CHECKPOINT_RESTORE",
        ]
    )
}

_TCP_STATES = {1: "established", 10: "listening", 7: "closed"}
_UNIX_STATES = {1: "established", 10: "listening", 7: "unconnected"}


def sockets(images: Path) -> tuple[str, ...]:
    """Internet and named Unix sockets of the processes, one line each, sorted."""
    lines: set[str] = set()
    for entry in load(images / "files.img")["entries"]:
        inet, unix = entry.get("isk"), entry.get("usk")
        if inet:
            protocol = {6: "tcp", 17: "udp"}.get(_number(inet["proto"]), str(inet["proto"]))
            state = _TCP_STATES.get(_number(inet["state"]), "other")
            lines.add(f"{protocol} {_address(inet, 'src')} {state}")
        elif unix and (name := _unix_name(unix.get("name", b""))):
            lines.add(f"unix {name} {_UNIX_STATES.get(_number(unix['state']), 'other')}")
    return tuple(sorted(lines))


def _number(value: Any) -> int:
    # pycriu decodes enumerations to their names only when asked for pretty output.
    return int(value) if isinstance(value, int) else {"TCP": 6, "UDP": 17}.get(str(value), 0)


def _address(inet: dict[str, Any], side: str) -> str:
    words = [int(word) for word in inet[f"{side}_addr"]]
    if _number(inet["family"]) == 2 or len(words) == 1:
        host = ".".join(str(byte) for byte in struct.pack("<I", words[0]))
    else:
        import ipaddress

        host = f"[{ipaddress.IPv6Address(struct.pack('<4I', *words))}]"
    return f"{host}:{inet[f'{side}_port']}"


def _unix_name(name: Any) -> str:
    # pycriu gives text; an abstract address (first byte zero) is written with "@", as ss(8) does.
    text = name if isinstance(name, str) else bytes(name).decode(errors="replace")
    return text.replace("\0", "@", 1).rstrip("\0") if text.startswith("\0") else text.rstrip("\0").removesuffix("=00")
