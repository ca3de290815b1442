"""How hooks/gpuckpt_guest gets into a container: a read-only mount, and a place on Python's path.

A replica's processes have the environment of their golden, so the path inside is the same for ever; where this
installation keeps the files on the host may change between a golden's creation and a restore.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gpuckpt.errors import PreflightError
from gpuckpt.manifest import Mount

# Where every container sees the folder with gpuckpt_guest in it.
GUEST_FOLDER = "/opt/gpuckpt-guest"
# The name of the entry point by which vLLM finds its plugin there.
VLLM_PLUGIN = "gpuckpt"

# What an adapter adds to its launch line's environment.
GUEST_ENVIRONMENT = {"PYTHONPATH": GUEST_FOLDER}


def guest_hooks() -> Path:
    """The folder that holds gpuckpt_guest: in a checkout beside the package, in an installed one inside it."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package.parent / "hooks", package / "data" / "hooks"):
        if (candidate / "gpuckpt_guest").is_dir():
            return candidate
    raise PreflightError("the guest's Python package is missing", remedy="reinstall gpuckpt: make setup")


def guest_mount() -> Mount:
    """The mount that shows gpuckpt_guest to a container."""
    return Mount(source=str(guest_hooks()), destination=GUEST_FOLDER)


def present(mount: Mount) -> Mount:
    """A golden's recorded ``mount`` as it is to be made now: gpuckpt's own files are where this installation is."""
    return guest_mount() if mount.destination == GUEST_FOLDER else mount


def environment(image: Mapping[str, str], ours: Mapping[str, str], user: Mapping[str, str]) -> dict[str, str]:
    """The image's variables, ours over them, the user's over both.

    Two are lists, to which ours is added instead: PYTHONPATH, and VLLM_PLUGINS where it is set (unset means all).
    """
    found = {**image, **ours, **user}
    if "PYTHONPATH" in ours:
        theirs = user.get("PYTHONPATH", image.get("PYTHONPATH", ""))
        found["PYTHONPATH"] = _joined([ours["PYTHONPATH"], *_split(theirs, ":")], ":")
    if "VLLM_PLUGINS" in found:
        found["VLLM_PLUGINS"] = _joined([*_split(found["VLLM_PLUGINS"], ","), VLLM_PLUGIN], ",")
    return found


def _split(text: str, separator: str) -> list[str]:
    return text.split(separator) if text else []


def _joined(parts: list[str], separator: str) -> str:
    return separator.join(dict.fromkeys(parts))
