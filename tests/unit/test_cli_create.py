"""How the options of create become a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gpuckpt.cli.creation import request_from
from gpuckpt.config import Create, Settings
from gpuckpt.errors import GpuckptError, NotFoundError, UsageError
from gpuckpt.golden.launch import CreateRequest
from gpuckpt.manifest import Mount, Port, Request, Volume
from gpuckpt.store.layout import Layout
from tests.command_line import run


def test_an_empty_prompt_is_named(machine: Layout) -> None:
    done = run("create", "gold", "--prompt", "", "--", "--model", "/x")
    assert done.returncode == 2 and "flag --prompt" in done.stderr


OPTIONS: dict[str, Any] = {
    "workload": "auto",
    "rootfs": None,
    "env": (),
    "volume": (),
    "workdir": None,
    "shm_size": "1GiB",
    "health_path": "/health",
    "warmup_request": (),
    "canary": None,
    "no_canary": False,
    "leave_running": False,
    "tcp_established": False,
    "replace": False,
    "mode": "copy",
    "gpus": (),
    "cuda_graphs": False,
    "weights": "auto",
}


def parsed(
    *arguments: str, name: str | None = "gold", create: dict[str, Any] | None = None, **options: Any
) -> CreateRequest:
    settings = Settings(create=Create(**(create or {})))
    return request_from(settings, name, arguments or ("serve",), OPTIONS | options)


def refused(*arguments: str, **options: Any) -> GpuckptError:
    with pytest.raises((UsageError, NotFoundError)) as caught:
        parsed(*arguments, **options)
    assert caught.value.remedy
    return caught.value


def test_a_plain_request() -> None:
    request = parsed("serve", "--fast")
    assert (request.name, request.arguments, request.rootfs) == ("gold", ("serve", "--fast"), Path("/"))
    assert request.canary and not request.replace and request.shm_size == 1 << 30


def test_the_name_may_come_from_the_settings() -> None:
    assert parsed(name=None, create={"name": "site"}).name == "site"
    assert "no name" in refused(name=None).message


@pytest.mark.parametrize(
    ("arguments", "workload", "kind"),
    [
        (("serve",), "auto", "http"),
        (("--model", "a/b"), "auto", "vllm"),
        (("a/b",), "vllm", "vllm"),
        (("--odd",), "http", "http"),
    ],
)
def test_the_kind_of_server(arguments: tuple[str, ...], workload: str, kind: str) -> None:
    assert parsed(*arguments, workload=workload).adapter.record.kind == kind


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("8000", Port(host_ip="127.0.0.1", host_port=8000, container_port=8000)),
        ("8080:80", Port(host_ip="127.0.0.1", host_port=8080, container_port=80)),
        ("0.0.0.0:8080", Port(host_ip="0.0.0.0", host_port=8080, container_port=8080)),
        ("10.0.0.1:8080:80", Port(host_ip="10.0.0.1", host_port=8080, container_port=80)),
        ("[::1]:8080:80", Port(host_ip="::1", host_port=8080, container_port=80)),
        ("[::1]:8080", Port(host_ip="::1", host_port=8080, container_port=8080)),
    ],
)
def test_ports(text: str, port: Port) -> None:
    assert parsed(create={"publish": text}).publish == port


def test_environment() -> None:
    assert parsed(env=("A=1", "B=", "C=x=y")).env == {"A": "1", "B": "", "C": "x=y"}
    for wrong in ("A", "=1", "", "A=\udcff", "A\udcff=1", "A=\0"):
        refused(env=(wrong,)).message.encode()


def test_arguments_that_no_program_can_take() -> None:
    for wrong in ("a\0b", "\udcff"):
        refused("serve", wrong).message.encode()


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    request = parsed(volume=(f"{tmp_path}:/a", ".:/b:rw", "data:/c", f"{tmp_path}:/d:ro"))
    folder = str(tmp_path)
    assert request.mounts == (
        Mount(source=folder, destination="/a", read_only=True),
        Mount(source=folder, destination="/b", read_only=False),
        Mount(source=folder, destination="/d", read_only=True),
    )
    assert request.volumes == (Volume(name="data", destination="/c"),)
    for wrong in ("/tmp", "/tmp:", "/tmp:relative", f"{tmp_path}:/a:rx", "a b:/c", "/nonexistent:/a", ":/a"):
        refused(volume=(wrong,))


def test_requests_of_the_canary_and_the_warm_up() -> None:
    request = parsed(canary='post /ask {"a b": 1}', warmup_request=("GET /x",))
    record = request.adapter.record
    assert record.canary_request == Request(method="POST", path="/ask", body='{"a b": 1}')
    assert record.warmup_requests == (Request(method="GET", path="/x"),)
    for wrong in ("GET", "GET x", "", "/x"):
        refused(canary=wrong or " ")
    for wrong in ("GET /ü", "G\x01T /", "GET /\x7f", "POST / \udcff", "GÉT /"):
        refused(canary=wrong).message.encode()
        refused(warmup_request=(wrong,))
    assert "--health-path" in refused(health_path="/hälth").message
    assert parsed(canary="POST / ü").adapter.record.canary_request == Request(method="POST", path="/", body="ü")


def test_the_size_of_shared_memory() -> None:
    assert parsed(shm_size="64M").shm_size == 64 << 20
    for wrong in ("lots", "0", "9999T"):
        assert "--shm-size" in refused(shm_size=wrong).message


def test_the_root_file_system(tmp_path: Path) -> None:
    assert parsed(rootfs=str(tmp_path)).rootfs == tmp_path
    refused(rootfs=str(tmp_path / "absent"))
    refused(rootfs="/", create={"image": "site"})
