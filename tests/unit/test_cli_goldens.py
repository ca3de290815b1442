"""Commands on goldens: ls, inspect, df, move, rm, verify, export."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpuckpt import manifest as manifests
from gpuckpt.store import seal
from gpuckpt.store.layout import Layout
from tests.command_line import replica_of, run
from tests.fakes import publish, sample_manifest


def test_ls(machine: Layout) -> None:
    empty = run("ls")
    assert empty.returncode == 0 and empty.stdout == "" and "no goldens yet" in empty.stderr
    publish(machine)
    (machine.goldens / "broken").mkdir()
    shown = run("ls").stdout
    assert "gold" in shown and "broken" in shown and "damaged" in shown
    goldens = {one["name"]: one for one in json.loads(run("ls", "--format", "json").stdout)["goldens"]}
    assert goldens["gold"]["image_bytes"] == sample_manifest().sizes.total and goldens["gold"]["trouble"] is None
    assert goldens["broken"]["trouble"] and goldens["broken"]["image_bytes"] is None


def test_ls_shows_replicas_whose_golden_is_gone(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    replica_of(machine, "orphan", "lost")
    monkeypatch.setattr("gpuckpt.golden.tools.tools", lambda settings, **_: None)
    monkeypatch.setattr("gpuckpt.golden.catalogue.states", lambda tools: {"orphan": "running"})
    done = run("ls")
    assert done.returncode == 0 and "orphan (running)" in done.stdout and "lost" in done.stdout
    document = json.loads(run("ls", "--format", "json").stdout)
    assert document["goldens"] == []
    assert document["replicas_without_golden"] == [{"name": "orphan", "golden": "lost", "state": "running"}]


def test_inspect(machine: Layout) -> None:
    folder = publish(machine)
    assert "serve" in run("inspect", "gold").stdout
    document = json.loads(run("inspect", "gold", "--format", "json").stdout)
    assert document["version"] == 1 and document["name"] == "gold" and document["folder"] == str(folder)
    assert document["processes"] == [{"pid": 1, "parent": 0, "name": "serve", "threads": 1, "pages_bytes": 8192}]
    assert "files" not in document


def test_a_damaged_manifest(machine: Layout) -> None:
    (publish(machine) / "manifest.json").write_text("{")
    assert run("inspect", "gold").returncode == 8


def test_df(machine: Layout) -> None:
    publish(machine)
    document = json.loads(run("df", "--format", "json").stdout)
    (golden,) = document["goldens"]
    assert golden["name"] == "gold" and golden["apparent"] >= 8192
    assert document["store"]["mounted"] is False
    assert run("df").returncode == 0


@pytest.fixture
def without_podman(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Commands that ask podman about replicas find none; the store's tmpfs is a plain folder."""
    monkeypatch.setattr(
        "gpuckpt.golden.tools.tools", lambda settings, report=None, **_: SimpleNamespace(layout=machine, report=report)
    )
    monkeypatch.setattr("gpuckpt.host.tmpfs.ensure", lambda store: False)
    monkeypatch.setattr("gpuckpt.criu.images.undecodable", lambda images: [])
    machine.prepare_store()
    return machine


def test_tiers_as_a_user_sees_them(without_podman: Layout) -> None:
    publish(without_podman)

    def tiers() -> list[list[str]]:
        return [one["tiers"] for one in json.loads(run("ls", "--format", "json").stdout)["goldens"]]

    saved = run("move", "gold", "--to", "disk", "--keep")
    assert saved.returncode == 0 and "gold: on disk (8.0 KiB" in saved.stdout, saved.stderr
    assert tiers() == [["tmpfs", "disk"]] and "tmpfs+disk" in run("ls").stdout
    again = run("move", "gold", "--to", "disk", "--keep")
    assert again.returncode == 3 and "already" in again.stderr
    assert run("verify", "gold").stdout.count("whole") == 2
    assert "tmpfs+disk" in run("inspect", "gold").stdout
    document = json.loads(run("df", "--format", "json").stdout)
    assert [one["tier"] for one in document["goldens"]] == ["tmpfs", "disk"] and document["disk"]["free"] > 0
    shown = run("df").stdout
    assert f"disk {without_podman.disk}: " in shown
    assert "removed gold from the tmpfs" in run("rm", "gold", "--tier", "tmpfs").stdout
    assert tiers() == [["disk"]] and run("rm", "gold", "--tier", "tmpfs").returncode == 6
    loaded = json.loads(run("move", "gold", "--to", "tmpfs", "--format", "json").stdout)["moved"]
    assert [(one["name"], one["to"], one["kept"], one["shared"]) for one in loaded] == [("gold", "tmpfs", False, 0)]
    assert tiers() == [["tmpfs"]]
    run("move", "gold", "--to", "disk", "--keep")
    assert "on disk alone" in run("move", "gold", "--to", "disk").stdout
    run("rm", "gold")
    assert tiers() == []


def test_verify_names_what_is_damaged(machine: Layout) -> None:
    folder = publish(machine)
    (folder / "images" / "pages-1.img").write_bytes(b"x" + bytes(8191))
    done = run("verify", "gold")
    assert done.returncode == 8 and "pages-1.img has changed" in done.stderr


def test_what_verify_found_is_found_by_a_restore(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault that moved no time, as of memory gone bad, is behind the seal's back until somebody has read it."""
    folder = publish(machine)
    golden = manifests.read(folder)
    image = folder / "images" / "pages-1.img"
    image.write_bytes(b"x" + bytes(image.stat().st_size - 1))
    seal.write(folder)
    assert seal.broken(folder, golden) == []
    assert run("verify", "gold").returncode == 8
    assert seal.broken(folder, golden) != [] and seal.fits(folder)


def test_export_writes_a_file_and_says_its_digest(machine: Layout, tmp_path: Path) -> None:
    publish(machine)
    document = json.loads(run("export", "gold", "gold.tar", "--format", "json").stdout)
    assert document["bytes"] == (tmp_path / "gold.tar").stat().st_size and len(document["blake3"]) == 64
    assert run("export", "gold", "gold.tar").returncode == 7


def test_a_golden_named_twice_is_removed_once(machine: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(machine)
    removed: list[str] = []
    monkeypatch.setattr("gpuckpt.golden.sweep.sweep", lambda *_: [])
    monkeypatch.setattr("gpuckpt.golden.tools.tools", lambda settings, **_: SimpleNamespace(layout=machine))
    monkeypatch.setattr("gpuckpt.golden.catalogue.remove", lambda work, name, force, tier: removed.append(name))
    assert run("rm", "gold", "gold").returncode == 0 and removed == ["gold"]


@pytest.mark.parametrize("file", ["-", "store/gold.tar"])
def test_export_where_no_archive_belongs(machine: Layout, file: str) -> None:
    publish(machine)
    done = run("export", "gold", file)
    assert done.returncode == 2 and "remedy" in done.stderr
