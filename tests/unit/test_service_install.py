"""Units: what is written, what is left alone, what is taken away; below a folder that stands for the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from gpuckpt import config
from gpuckpt.config import Settings
from gpuckpt.errors import BusyError, NothingToDo, PreflightError, UsageError
from gpuckpt.pool import config as pool_config
from gpuckpt.service import install as installing
from gpuckpt.service import units
from gpuckpt.service.activation import BACKLOG
from gpuckpt.service.install import Outcome, install, uninstall

SETTINGS = Settings()
PROGRAM = ["/opt/gpuckpt/venv/bin/gpuckpt"]
UNITS = Path("etc/systemd/system")
MOUNT = "run-gpuckpt-store.mount"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with systemd 252."""
    folder = tmp_path / "usr/lib/x86_64-linux-gnu/systemd"
    folder.mkdir(parents=True)
    (folder / "libsystemd-shared-252.so").touch()
    return tmp_path


def set_version(root: Path, name: str) -> None:
    (old,) = root.glob("usr/lib/*/systemd/*.so")
    old.rename(old.with_name(f"libsystemd-shared-{name}.so"))


def what(outcome: Outcome, root: Path) -> dict[str, str]:
    return {str(one.path.relative_to(root)): one.what for one in outcome.changes}


def write_pool(root: Path, text: str) -> None:
    (root / "etc/gpuckpt").mkdir(parents=True, exist_ok=True)
    (root / "etc/gpuckpt/pool.toml").write_text(text)


def test_what_is_written(root: Path) -> None:
    outcome = install(SETTINGS, root=root, program=PROGRAM)
    assert set(what(outcome, root)) == {
        "etc/gpuckpt/pool.toml",
        "etc/gpuckpt/pool.env",
        "etc/systemd/system/gpuckpt-pool.service",
        "etc/systemd/system/gpuckpt-pool.socket",
        f"etc/systemd/system/{MOUNT}",
        "etc/tmpfiles.d/gpuckpt.conf",
    }
    assert set(what(outcome, root).values()) == {"written"} and outcome.commands == ()
    service = (root / UNITS / units.SERVICE).read_text()
    assert "\nExecStart=/opt/gpuckpt/venv/bin/gpuckpt pool run --config /etc/gpuckpt/pool.toml\n" in service
    assert "\nRequiresMountsFor=/run/gpuckpt/store\n" in service
    socket = (root / UNITS / units.SOCKET).read_text()
    assert "\nListenStream=127.0.0.1:8400\n" in socket and f"\nBacklog={BACKLOG}\n" in socket
    mount = (root / UNITS / MOUNT).read_text()
    assert "\nWhere=/run/gpuckpt/store\n" in mount
    assert "\nOptions=size=80%%,mode=0700,uid=0,gid=0,nosuid,nodev,huge=within_size\n" in mount
    for path in (root / "etc").rglob("*.*"):
        if path.is_file() and path.name != "pool.toml":
            assert "@" not in path.read_text().replace("“", ""), f"{path} has a word that was not filled in"
    assert (root / "etc/gpuckpt/pool.env").stat().st_mode & 0o777 == 0o600
    assert (root / UNITS / units.SERVICE).stat().st_mode & 0o777 == 0o644


def test_the_first_configuration_is_valid_and_names_no_model(root: Path) -> None:
    install(SETTINGS, root=root)
    path = root / "etc/gpuckpt/pool.toml"
    assert pool_config.load(path).models == {}
    example = Path(pool_config.__file__).with_name("example.toml")
    assert len(path.read_text().splitlines()) == len(example.read_text().splitlines())


def test_again_changes_nothing(root: Path) -> None:
    install(SETTINGS, root=root, program=PROGRAM)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert set(what(install(SETTINGS, root=root, program=PROGRAM), root).values()) == {"unchanged"}
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_the_configuration_decides(root: Path) -> None:
    install(SETTINGS, root=root, program=PROGRAM)
    text = '[front]\nlisten = ["0.0.0.0:80", "[::1]:81", "localhost:82", "unix:/run/front.sock"]\n'
    write_pool(root, text)
    settings = Settings(store=config.Store(path=Path("/run/a b/€-store"), size=1 << 30, huge="never"))
    outcome = what(install(settings, root=root, program=PROGRAM), root)
    assert outcome["etc/systemd/system/gpuckpt-pool.socket"] == "changed"
    assert outcome["etc/sysusers.d/gpuckpt.conf"] == "written"
    assert "etc/gpuckpt/pool.toml" not in outcome
    assert (root / "etc/gpuckpt/pool.toml").read_text() == text
    socket = (root / UNITS / units.SOCKET).read_text()
    for address in ("0.0.0.0:80", "[::1]:81", "127.0.0.1:82", "/run/front.sock"):
        assert f"\nListenStream={address}\n" in socket
    assert "SocketGroup=gpuckpt\nSocketMode=0660" in socket
    assert '\nRequiresMountsFor="/run/a b/€-store"\n' in (root / UNITS / units.SERVICE).read_text()
    mount = (root / UNITS / r"run-a\x20b-\xe2\x82\xac\x2dstore.mount").read_text()
    assert "\nWhere=/run/a b/€-store\n" in mount and f"size={1 << 30}," in mount and "huge=never" in mount


def test_a_wrong_configuration_writes_nothing(root: Path) -> None:
    for text in ("[front]\nlisten = 5\n", '[front]\nlisten = ["gpu.example.org:80"]\n'):
        write_pool(root, text)
        with pytest.raises(UsageError):
            install(SETTINGS, root=root)
    assert not (root / UNITS).exists()


def test_an_edited_unit_is_not_overwritten(root: Path) -> None:
    install(SETTINGS, root=root, program=PROGRAM)
    path = root / UNITS / units.SERVICE
    path.write_text(edited := path.read_text().replace("WatchdogSec=30", "WatchdogSec=60"))
    with pytest.raises(BusyError, match=r"gpuckpt-pool\.service"):
        install(SETTINGS, root=root, program=["/elsewhere/gpuckpt"])
    assert path.read_text() == edited
    assert "/elsewhere" not in (root / UNITS / units.SERVICE).read_text(), "nothing is written, nor anything else"
    outcome = install(SETTINGS, root=root, program=["/elsewhere/gpuckpt"], force=True)
    (change,) = [one for one in outcome.changes if one.path == path]
    assert change.what == "changed" and change.saved is not None and change.saved.read_text() == edited
    assert "/elsewhere/gpuckpt pool run" in path.read_text()


def test_a_unit_of_somebody_else_is_not_overwritten(root: Path) -> None:
    (root / UNITS).mkdir(parents=True)
    (root / UNITS / units.SERVICE).write_text("[Service]\nExecStart=/bin/true\n")
    with pytest.raises(BusyError):
        install(SETTINGS, root=root)


def test_how_readiness_is_said_depends_on_systemd(root: Path) -> None:
    def written() -> str:
        install(SETTINGS, root=root, program=PROGRAM)
        return (root / UNITS / units.SERVICE).read_text()

    text = written()
    assert "\nType=notify\nExecReload=/opt/gpuckpt/venv/bin/gpuckpt pool reload\n" in text
    set_version(root, "257.13-1~deb13u1")
    text = written()
    assert "\nType=notify-reload\n" in text and "ExecReload" not in text
    (root / "usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-257.13-1~deb13u1.so").unlink()
    assert units.version(root) == 0 and "\nType=notify\n" in written()


def test_uninstall(root: Path) -> None:
    with pytest.raises(NothingToDo):
        uninstall(SETTINGS, root=root)
    write_pool(root, '[front]\nlisten = ["unix:/run/front.sock"]\n')
    install(SETTINGS, root=root, program=PROGRAM)
    mount = root / UNITS / MOUNT
    mount.write_text(mount.read_text() + "# mine\n")
    outcome = what(_uninstall(root), root)
    assert outcome.pop(f"etc/systemd/system/{MOUNT}") == "kept"
    assert set(outcome.values()) == {"removed"} and len(outcome) == 4
    left = {str(path.relative_to(root)) for path in (root / "etc").rglob("*") if path.is_file()}
    assert left == {f"etc/systemd/system/{MOUNT}", "etc/gpuckpt/pool.toml", "etc/gpuckpt/pool.env"}
    _uninstall(root, force=True)
    assert not mount.exists()


def _uninstall(root: Path, *, force: bool = False) -> Outcome:
    if shutil.which("systemctl") is None:
        pytest.skip("systemctl is not installed: it disables units below a folder")
    return uninstall(SETTINGS, root=root, force=force)


def test_enable_below_a_folder(root: Path) -> None:
    if shutil.which("systemctl") is None:
        pytest.skip("systemctl is not installed: it enables units below a folder")
    outcome = install(SETTINGS, root=root, program=PROGRAM, enable=True)
    assert outcome.commands == (f"systemctl --root={root} enable gpuckpt-pool.socket gpuckpt-pool.service",)
    assert (root / UNITS / "multi-user.target.wants" / units.SERVICE).is_symlink()
    assert (root / UNITS / "sockets.target.wants" / units.SOCKET).is_symlink()
    _uninstall(root)
    assert not [path for path in (root / UNITS).rglob("*") if path.is_symlink()]


def test_it_cannot_be_started_below_a_folder(root: Path) -> None:
    with pytest.raises(PreflightError, match="cannot be started now"):
        install(SETTINGS, root=root, now=True)
    assert not (root / "etc").exists()


def test_where_settings_came_from_is_kept(root: Path) -> None:
    awkward = 'a "b" $c `d` \\e %f'
    install(SETTINGS, root=root, environment={"GPUCKPT_PATHS__STATE": "/srv", "GPUCKPT_CREATE__MODEL": awkward})
    text = (root / "etc/gpuckpt/pool.env").read_text()
    # The shell's rules for double quotes are systemd's for environment files.
    done = subprocess.run(
        ["sh", "-c", '. "$0"; printf %s "$GPUCKPT_CREATE__MODEL"', str(root / "etc/gpuckpt/pool.env")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == awkward and 'GPUCKPT_PATHS__STATE="/srv"' in text
    install(SETTINGS, root=root, environment={"GPUCKPT_PATHS__STATE": "/other"})
    assert (root / "etc/gpuckpt/pool.env").read_text() == text


def test_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert installing.own_program() == [str(tmp_path / "python"), "-m", "gpuckpt"]
    (tmp_path / "gpuckpt").touch(mode=0o755)
    assert installing.own_program() == [str(tmp_path / "gpuckpt")]
    checkout = Path(installing.__file__).resolve().parents[2]
    monkeypatch.setenv("PYTHONPATH", f"/elsewhere:{checkout}")
    assert installing.own_environment() == {"PYTHONPATH": str(checkout)}
    monkeypatch.delenv("PYTHONPATH")
    assert installing.own_environment() == {}


def test_words_of_a_unit() -> None:
    assert units.quoted("/a/b") == "/a/b"
    assert units.quoted('a "b"\\%') == '"a \\"b\\"\\\\%%"'
    assert units.command_line(["/a b", "$HOME"]) == '"/a b" $$HOME'


@pytest.mark.parametrize("path", ["/", "/run/gpuckpt/store", "/.hidden/a-b", "/a b/€", "/a//b/", "/x:y_z.w"])
def test_names_of_mount_units(path: str) -> None:
    if shutil.which("systemd-escape") is None:
        pytest.skip("systemd-escape is not installed")
    done = subprocess.run(
        ["systemd-escape", "--path", path], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert units.escaped(Path(path)) == done.stdout.strip()


def test_templates_are_packaged() -> None:
    """hatchling packs every file below the package that Git knows."""
    pyproject = tomllib.loads((Path(units.__file__).resolve().parents[2] / "pyproject.toml").read_text())
    assert pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["gpuckpt"]
    assert {path.name for path in units.TEMPLATES.iterdir()} == {
        "gpuckpt-pool.service",
        "gpuckpt-pool.socket",
        "store.mount",
        "sysusers.conf",
        "tmpfiles.conf",
    }
