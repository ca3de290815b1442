"""scripts/offline-bundle: which wheels and libraries it takes, its pieces, and how they come together again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from scripts import bundle, bundle_programs, bundle_self_test, bundle_unpack

LISTING = """\
\tlinux-vdso.so.1 (0x00007ffc3a5f1000)
\tlibseccomp.so.2 => /lib/x86_64-linux-gnu/libseccomp.so.2 (0x00007f1e2e1c0000)
\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1e2dfdf000)
\t/lib64/ld-linux-x86-64.so.2 (0x00007f1e2e201000)
"""


def test_libraries_are_what_the_loader_lists() -> None:
    assert bundle_programs.libraries(LISTING) == {
        "libseccomp.so.2": Path("/lib/x86_64-linux-gnu/libseccomp.so.2"),
        "libc.so.6": Path("/lib/x86_64-linux-gnu/libc.so.6"),
    }


def test_a_library_that_lacks_is_named() -> None:
    with pytest.raises(ValueError, match=r"libgone\.so\.1"):
        bundle_programs.libraries("\tlibgone.so.1 => not found\n")


def test_the_wrapper_of_setup_says_how_criu_is_started() -> None:
    script = '#!/bin/sh\nexec /p/ld.so --argv0 criu --library-path /p/a:/p/b /p/criu "$@"\n'
    assert bundle_programs.starter(script) == (Path("/p/ld.so"), "/p/a:/p/b", Path("/p/criu"))
    with pytest.raises(ValueError, match="setup"):
        bundle_programs.starter("#!/bin/sh\nexec criu-elsewhere\n")


def wheel(folder: Path, name: str, *requirements: str) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", *(f"Requires-Dist: {one}" for one in requirements)]
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(lines) + "\n")


def test_what_only_the_other_python_requires_is_missing(tmp_path: Path) -> None:
    wheel(tmp_path, "anyio", 'typing_extensions>=4; python_version < "3.12"', "idna>=3", 'trio; extra == "trio"')
    wheel(tmp_path, "idna")
    assert bundle.missing(tmp_path, "3.12") == []
    assert bundle.missing(tmp_path, "3.11") == ["typing_extensions>=4"]
    wheel(tmp_path, "typing_extensions")
    assert bundle.missing(tmp_path, "3.11") == []


def test_what_is_required_of_hosts_without_gpus() -> None:
    project = bundle.ROOT / "pyproject.toml"
    every, few = bundle.requirements(project), bundle.requirements(project, cuda=False)
    assert {one.partition(">")[0] for one in set(every) - set(few)} == {"cuda-bindings", "nvidia-ml-py"}


def stage(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "tool").write_bytes(b"\x7fELF" + os.urandom(30_000))
    (folder / "bin" / "tool").chmod(0o700)
    (folder / "lib.so").symlink_to("bin/tool")
    (folder / "bundle.json").write_text(json.dumps({"version": "1.2", "pythons": ["3.11"], "loaders": {}}))
    return folder


def test_pieces_are_small_enough_and_come_together_again(tmp_path: Path) -> None:
    source, out = stage(tmp_path / "stage"), tmp_path / "out"
    files = bundle.pack(source, out, 7000)
    pieces = bundle_unpack.verified(str(out))
    assert pieces == [str(file) for file in files if ".tar.xz." in file.name]
    sizes = [os.stat(piece).st_size for piece in pieces]
    assert len(sizes) == 5 and set(sizes[:-1]) == {7000} and sizes[-1] <= 7000
    target = tmp_path / "target"
    target.mkdir()
    bundle_unpack.extract(pieces, str(target))
    assert (target / "bin" / "tool").read_bytes() == (source / "bin" / "tool").read_bytes()
    assert os.access(target / "bin" / "tool", os.X_OK) and os.readlink(target / "lib.so") == "bin/tool"


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    source = stage(tmp_path / "stage")
    bundle.pack(source, tmp_path / "one", 7000)
    os.utime(source / "bin" / "tool")
    bundle.pack(source, tmp_path / "two", 7000)
    assert (tmp_path / "one" / "SHA256SUMS").read_text() == (tmp_path / "two" / "SHA256SUMS").read_text()


def test_a_smaller_bundle_leaves_no_pieces_of_a_larger_one(tmp_path: Path) -> None:
    source, out = stage(tmp_path / "stage"), tmp_path / "out"
    bundle.pack(source, out, 2000)
    files = bundle.pack(source, out, 50_000)
    assert sorted(path.name for path in out.iterdir()) == sorted([*(file.name for file in files), "SHA256SUMS"])


def test_pieces_that_lack_or_are_damaged_are_named(tmp_path: Path) -> None:
    files = bundle.pack(stage(tmp_path / "stage"), tmp_path / "out", 7000)
    files[0].unlink()
    with files[2].open("ab") as file:
        file.write(b"x")
    with pytest.raises(bundle_unpack.Trouble) as caught:
        bundle_unpack.verified(str(tmp_path / "out"))
    assert f"{files[0].name}: missing" in str(caught.value) and f"{files[2].name}: damaged" in str(caught.value)
    assert files[1].name not in str(caught.value)
    (tmp_path / "out" / "SHA256SUMS").unlink()
    with pytest.raises(bundle_unpack.Trouble, match="not complete"):
        bundle_unpack.verified(str(tmp_path / "out"))


def test_the_two_scripts_mean_the_same_marks() -> None:
    assert bundle_programs.LOADER_MARK.encode() == bundle_unpack.LOADER_MARK
    assert bundle_programs.LIBRARIES_MARK.encode() == bundle_unpack.LIBRARIES_MARK


def test_a_program_gets_the_paths_of_its_loader_and_libraries(tmp_path: Path) -> None:
    marks = bundle_unpack.LOADER_MARK + b"\0 and " + bundle_unpack.LIBRARIES_MARK + b"\0."
    program = tmp_path / "tool"
    program.write_bytes(marks)
    bundle_unpack.set_loaders(str(tmp_path), "/opt/place", {"tool": "lib/system/ld.so"})
    words = [word for word in program.read_bytes().split(b"\0") if word]
    assert words == [b"/opt/place/lib/system/ld.so", b" and /opt/place/lib/system", b"."]
    assert len(program.read_bytes()) == len(marks)
    with pytest.raises(bundle_unpack.Trouble, match="tool"):
        bundle_unpack.set_loaders(str(tmp_path), "/opt/place", {"tool": "lib/system/ld.so"})


@pytest.mark.parametrize("exchange", [True, False])
def test_a_prefix_is_replaced_as_a_whole_and_what_is_not_the_bundles_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(bundle_unpack, "exchange", lambda new, old: False)
    prefix, new = tmp_path / "prefix", tmp_path / ".prefix.unpacking"
    for folder, text in ((prefix, "old"), (new, "new")):
        (folder / "bin").mkdir(parents=True)
        (folder / "bin" / "tool").write_text(text)
    (prefix / "models").mkdir()
    bundle_unpack.put_in_place(str(new), str(prefix))
    assert (prefix / "bin" / "tool").read_text() == "new" and (prefix / "models").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prefix"]


def test_what_was_interrupted_between_two_renames_is_put_right(tmp_path: Path) -> None:
    prefix, replaced = tmp_path / "prefix", tmp_path / "prefix.replaced"
    (replaced / "models").mkdir(parents=True)
    bundle_unpack.clear(str(replaced), str(prefix))
    assert (prefix / "models").is_dir() and not replaced.exists()
    (replaced / "server").mkdir(parents=True)
    bundle_unpack.clear(str(replaced), str(prefix))
    assert sorted(path.name for path in prefix.iterdir()) == ["models", "server"] and not replaced.exists()


def test_a_prefix_that_is_no_bundles_is_left_alone(tmp_path: Path) -> None:
    bundle_unpack.refuse(str(tmp_path / "new"))
    bundle_unpack.refuse(str(tmp_path))
    (tmp_path / "setup.log").touch()
    with pytest.raises(bundle_unpack.Trouble, match="--prefix"):
        bundle_unpack.refuse(str(tmp_path))
    (tmp_path / "bundle.json").touch()
    bundle_unpack.refuse(str(tmp_path))
    with pytest.raises(bundle_unpack.Trouble, match="not a folder"):
        bundle_unpack.refuse(str(tmp_path / "setup.log"))
    with pytest.raises(bundle_unpack.Trouble, match="letters"):
        bundle_unpack.refuse("/opt/my place")


def test_a_python_without_wheels_is_refused_with_what_was_found() -> None:
    here = "{}.{}".format(*sys.version_info[:2])
    assert bundle_unpack.choose_python(sys.executable, [here]) == (sys.executable, here)
    with pytest.raises(bundle_unpack.Trouble, match=f"needs Python 3.99 here.*(?s:.)*Python {here}"):
        bundle_unpack.choose_python(sys.executable, ["3.99"])


def test_podman_is_kept_apart_from_the_machines_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_unpack, "storage_driver", lambda storage: "vfs")
    bundle_unpack.configure(str(tmp_path), "/opt/place", "/var/lib/own", "/run/own")
    containers = tmp_path / "etc" / "containers"
    engine = (containers / "containers.conf").read_text()
    assert 'conmon_path = ["/opt/place/bin/conmon"]' in engine and 'lock_type = "file"' in engine
    storage = (containers / "storage.conf").read_text()
    assert 'driver = "vfs"' in storage and 'graphroot = "/var/lib/own"' in storage and '"/run/own/storage"' in storage


def test_the_self_test_goes_on_behind_what_does_not_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(prefix: Path) -> str:
        raise bundle_self_test.Fault("why\nand more")

    def strange(prefix: Path) -> str:
        raise KeyError("x")

    monkeypatch.setattr(sys, "argv", ["self-test", "/opt/place"])
    checks = (("first", breaks, True), ("second", strange, False), ("third", str, True))
    monkeypatch.setattr(bundle_self_test, "CHECKS", checks)
    assert bundle_self_test.main() == 1
    out = capsys.readouterr().out
    assert "FAIL  first" in out and "and more" in out and "no    second" in out and "ok    third" in out
    assert "not usable here: first" in out
    monkeypatch.setattr(bundle_self_test, "CHECKS", checks[1:])
    assert bundle_self_test.main() == 0
    assert "usable: next" in capsys.readouterr().out


def test_digests_are_those_that_sha256sum_knows(tmp_path: Path) -> None:
    files = bundle.pack(stage(tmp_path / "stage"), tmp_path / "out", 7000)
    lines = (tmp_path / "out" / "SHA256SUMS").read_text().splitlines()
    assert lines == [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in files]


def test_a_python_for_servers_is_looked_at_before_anything_is_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    version = "{}.{}".format(*sys.version_info[:2])
    monkeypatch.setattr(bundle_unpack, "_SERVER_PROBE", f"print({version!r}); print('/packages')")
    found = bundle_unpack.choose_server(sys.executable, [version])
    assert found is not None and found[:2] == (sys.executable, version) and "/packages" in found[2]
    with pytest.raises(bundle_unpack.Trouble, match=rf"is Python {version}; this bundle has wheels for 3\.9"):
        bundle_unpack.choose_server(sys.executable, ["3.9"])
    with pytest.raises(bundle_unpack.Trouble, match="there is no program /none"):
        bundle_unpack.choose_server("/none", [version])
    monkeypatch.setattr(bundle_unpack, "_SERVER_PROBE", "raise ImportError")
    with pytest.raises(bundle_unpack.Trouble, match="has no torch and transformers"):
        bundle_unpack.choose_server(sys.executable, [version])
    assert bundle_unpack.choose_server(None, []) is None
