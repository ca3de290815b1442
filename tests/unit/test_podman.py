"""podman's API: what is asked for, and what its answers mean."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from msgspec.structs import replace

from gpuckpt import proc
from gpuckpt.containers.api import Api, PodmanError
from gpuckpt.containers.podman import LABEL, OWNER, ContainerSpec, Podman, container_name
from gpuckpt.errors import (
    BusyError,
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    NotFoundError,
    PreflightError,
    UsageError,
)
from gpuckpt.manifest import Port, Ulimit, Volume
from tests.fakes import Asked, UnixServer, response, sample_manifest

Answer = Callable[[Asked], bytes | None]


@contextmanager
def served(tmp_path: Path, answer: bytes | Answer | None, timeout: float = 60) -> Iterator[tuple[Podman, UnixServer]]:
    """A podman service that gives the same answer to everything, or what a function says."""
    function: Answer = answer if callable(answer) else lambda asked: answer
    with UnixServer(tmp_path / "podman.sock", function) as server:
        yield Podman(Api(server.path, timeout)), server


def spec(**changes: Any) -> ContainerSpec:
    launch = replace(sample_manifest().launch, **changes.pop("launch", {}))
    given: dict[str, Any] = {
        "name": "gpuckpt-gold",
        "replica": "gold",
        "golden": "gold",
        "rootfs": Path("/mnt/root"),
        "launch": launch,
        "binds": (("/models", "/m", True), ("/sockets", "/run/gpuckpt", False)),
        "criu_config": Path("/state/criu.conf"),
        "seccomp": Path("/seccomp.json"),
        "hostname": "gold",
    }
    return ContainerSpec(**given | changes)


def created(tmp_path: Path, what: ContainerSpec) -> dict[str, Any]:
    """The specification that podman would get."""
    with served(tmp_path, response(201, {"Id": "abc"})) as (podman, server):
        assert podman.create(what) == "abc"
    (asked,) = server.asked
    assert (asked.method, asked.path) == ("POST", "/v4.0.0/libpod/containers/create")
    assert asked.headers["content-type"] == "application/json"
    body: dict[str, Any] = asked.json
    return body


# --- the specification ----------------------------------------------------------------------------------------


def test_what_every_container_is_made_of(tmp_path: Path) -> None:
    body = created(tmp_path, spec(labels={"more": "1"}))
    assert body["name"] == "gpuckpt-gold" and body["rootfs"] == "/mnt/root"
    assert body["command"] == ["serve"] and body["env"] == {"HOME": "/root"} and body["work_dir"] == "/"
    assert body["seccomp_profile_path"] == "/seccomp.json"
    assert body["annotations"] == {"org.criu.config": "/state/criu.conf"}
    assert body["labels"] == {LABEL: "gold", "gpuckpt.golden": "gold", "more": "1"}
    assert body["r_limits"] == [{"type": "nofile", "soft": 1024, "hard": 1024}]
    assert not body.get("privileged") and "cap_add" not in body


def test_unlimited_is_a_number_that_podman_takes(tmp_path: Path) -> None:
    body = created(tmp_path, spec(launch={"ulimits": (Ulimit(name="memlock", soft=2**64 - 1, hard=2**64 - 1),)}))
    assert body["r_limits"] == [{"type": "memlock", "soft": 18446744073709551615, "hard": 18446744073709551615}]


def test_shared_memory_is_the_container_s_own(tmp_path: Path) -> None:
    body = created(tmp_path, spec(launch={"shm_size": 12345}))
    assert body["ipcns"] == {"nsmode": "none"}
    (shm,) = [mount for mount in body["mounts"] if mount["destination"] == "/dev/shm"]
    assert shm["type"] == "tmpfs" and "size=12345" in shm["options"] and "mode=1777" in shm["options"]


def test_mounts_are_read_only_unless_they_must_not_be(tmp_path: Path) -> None:
    body = created(tmp_path, spec(launch={"volumes": (Volume(name="data", destination="/data"),)}))
    binds = {mount["destination"]: mount for mount in body["mounts"] if mount["type"] == "bind"}
    assert binds["/m"]["source"] == "/models" and "ro" in binds["/m"]["options"]
    assert "rw" in binds["/run/gpuckpt"]["options"]
    assert body["volumes"] == [{"Name": "data", "Dest": "/data"}]


def test_without_a_port_there_is_no_network(tmp_path: Path) -> None:
    body = created(tmp_path, spec(ip="10.88.0.7"))
    assert body["netns"] == {"nsmode": "none"}
    assert "portmappings" not in body and "Networks" not in body


@pytest.mark.parametrize(
    ("ip", "mac", "network"),
    [
        (None, None, None),
        ("10.88.0.7", None, {"static_ips": ["10.88.0.7"]}),
        (None, "02:00:00:00:00:07", {"static_mac": "02:00:00:00:00:07"}),
        ("10.88.0.7", "02:00:00:00:00:07", {"static_ips": ["10.88.0.7"], "static_mac": "02:00:00:00:00:07"}),
        ("", "", None),  # ignored on request
    ],
)
def test_a_published_port_and_the_address_to_take(
    tmp_path: Path, ip: str | None, mac: str | None, network: dict[str, Any] | None
) -> None:
    port = Port(host_ip="127.0.0.1", host_port=8000, container_port=80)
    body = created(tmp_path, spec(launch={"port": port}, ip=ip, mac=mac))
    assert body["netns"] == {"nsmode": "bridge"}
    assert body["portmappings"] == [
        {"host_ip": "127.0.0.1", "host_port": 8000, "container_port": 80, "protocol": "tcp"}
    ]
    assert body.get("Networks") == ({"podman": network} if network else None)


# --- operations -----------------------------------------------------------------------------------------------


OURS = Path("/var/lib/gpuckpt")


def life(asked: Asked) -> dict[str, Any]:
    if "point" in asked.path:
        return {"criu_statistics": {"frozen_time": 5}}
    return INSPECTED if asked.method == "GET" else {}


def test_the_life_of_a_container(tmp_path: Path) -> None:
    with served(tmp_path, lambda asked: response(200, life(asked))) as (podman, server):
        podman.start("gpuckpt-gold")
        assert podman.checkpoint("c", leave_running=True, tcp_established=False) == {"frozen_time": 5}
        podman.prepare("c")
        assert podman.restore("c", OURS, tcp_established=True) == {}
        podman.remove("c", OURS)
    lines = [f"{asked.method} {asked.path.removeprefix('/v4.0.0/libpod/containers')}" for asked in server.asked]
    assert lines == [
        "POST /gpuckpt-gold/start",
        "POST /c/checkpoint?keep=true&printStats=true&leaveRunning=true&tcpEstablished=false",
        "POST /c/init",
        "POST /c/stop?timeout=0",
        "POST /c/restore?keep=true&printStats=true&tcpEstablished=true",
        "GET /c/json",
        "DELETE /c?force=true&timeout=0&v=false",
    ]


INSPECTED: dict[str, Any] = {
    "Id": "abc",
    "Name": "gpuckpt-gold",
    "StaticDir": "/bundle",
    "State": {"Status": "running", "Pid": 42, "ExitCode": 0},
    "NetworkSettings": {"Networks": {"podman": {"IPAddress": "10.88.0.7", "MacAddress": "02:00"}}},
    "Config": {"Labels": {LABEL: "gold", OWNER: "/var/lib/gpuckpt"}},
}


@pytest.mark.parametrize("labels", [None, {}, {LABEL: "gold"}, {LABEL: "gold", OWNER: "/var/lib/another"}])
def test_somebody_else_s_container_is_not_removed(tmp_path: Path, labels: dict[str, str] | None) -> None:
    with served(tmp_path, response(200, INSPECTED | {"Config": {"Labels": labels}})) as (podman, server):
        podman.remove("gpuckpt-gold", OURS)
    assert [asked.method for asked in server.asked] == ["GET"]


def test_a_container_that_goes_between_two_looks(tmp_path: Path) -> None:
    def answer(asked: Asked) -> bytes:
        return response(200, INSPECTED) if asked.method == "GET" else response(404, {"message": "no such container"})

    with served(tmp_path, answer) as (podman, server):
        podman.remove("gpuckpt-gold", OURS)
    assert [asked.method for asked in server.asked] == ["GET", "DELETE"]


def test_a_container_that_ends_while_podman_kills_it(tmp_path: Path) -> None:
    refusals = ["container state improper: stopped"]

    def answer(asked: Asked) -> bytes:
        if asked.method == "GET":
            return response(200, INSPECTED)
        return response(500, {"cause": refusals.pop(), "message": "no"}) if refusals else response(204, "")

    with served(tmp_path, answer) as (podman, server):
        podman.remove("gpuckpt-gold", OURS)
        assert [asked.method for asked in server.asked] == ["GET", "DELETE", "DELETE"]
        refusals += ["another", "it broke"]
        with pytest.raises(PodmanError, match="DELETE"):
            podman.remove("gpuckpt-gold", OURS)
    assert refusals == ["another"]


def test_a_restore_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(
        "gpuckpt.containers.leftovers.end_restore",
        lambda name, owner: ended.set() if (name, owner) == ("c", OURS) else None,
    )

    def answer(asked: Asked) -> bytes:
        assert ended.wait(30)
        return response(500, {"cause": "runc was killed", "message": "no"})

    with served(tmp_path, answer) as (podman, _), pytest.raises(DeadlineError, match="the restore hung") as caught:
        podman.restore("c", OURS, tcp_established=False, limit=0.05)
    assert caught.value.cause is not None and "runc was killed" in caught.value.cause


def test_control_groups_that_criu_left_in_the_bundle_are_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, steps = tmp_path / "bundle", list[str]()
    for name in (".criu.cgyard.abc", ".criu.cgyard.not-mounted", "attach"):
        (bundle / name).mkdir(parents=True)
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path).name == ".criu.cgyard.abc")
    monkeypatch.setattr("gpuckpt.proc.run", lambda argv, **_: steps.append(" ".join(map(str, argv))))

    def answer(asked: Asked) -> bytes:
        steps.append(asked.method)
        return response(200, INSPECTED | {"StaticDir": str(bundle)})

    with served(tmp_path, answer) as (podman, _):
        podman.remove("gpuckpt-gold", OURS)
    # podman would remove what is below: the files of everybody's control groups.
    assert steps == ["GET", f"umount --lazy {bundle}/.criu.cgyard.abc", "DELETE"]


@pytest.mark.parametrize("runtime", [True, False])
def test_what_the_runtime_keeps_of_a_container_goes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runtime: bool
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr("gpuckpt.containers.leftovers._RUN", tmp_path)
    monkeypatch.setattr("gpuckpt.proc.run", lambda argv, **_: ran.append(list(argv)))
    if runtime:
        (tmp_path / "runc" / "abc").mkdir(parents=True)
    with served(tmp_path, lambda asked: response(200, INSPECTED)) as (podman, _):
        podman.remove("gpuckpt-gold", OURS)
    assert ran == ([["runc", "delete", "--force", "abc"]] if runtime else [])


def test_inspect(tmp_path: Path) -> None:
    with served(tmp_path, response(200, INSPECTED)) as (podman, _):
        found = podman.inspect("gpuckpt-gold")
    assert (found.status, found.pid, found.bundle, found.alive) == ("running", 42, Path("/bundle"), True)
    assert (found.ip, found.mac, found.labels) == ("10.88.0.7", "02:00", INSPECTED["Config"]["Labels"])


def test_inspect_of_a_dead_container_without_network(tmp_path: Path) -> None:
    dead = INSPECTED | {"State": {"Status": "exited", "ExitCode": 137}, "NetworkSettings": {}, "Config": {}}
    with served(tmp_path, response(200, dead)) as (podman, _):
        found = podman.inspect("x")
    assert (found.alive, found.pid, found.exit_code, found.ip, found.labels) == (False, 0, 137, None, {})


def test_only_our_own_containers_are_listed(tmp_path: Path) -> None:
    entry = {"Id": "abc", "Names": ["gpuckpt-gold"], "State": "running", "Labels": {LABEL: "gold"}, "Pid": 42}
    with served(tmp_path, response(200, [entry])) as (podman, server):
        (found,) = podman.list(Path("/var/lib/gpuckpt"))
    assert found == {
        "id": "abc",
        "name": "gpuckpt-gold",
        "state": "running",
        "labels": {LABEL: "gold"},
        "pid": 42,
    }
    query = parse_qs(urlsplit(server.asked[0].path).query)
    assert query["all"] == ["true"] and "/var/lib/gpuckpt" in json.loads(query["filters"][0])["label"][0]


def test_no_containers_are_an_empty_list(tmp_path: Path) -> None:
    with served(tmp_path, response(200, "null")) as (podman, _):
        assert podman.list(Path("/x")) == []


def test_images_are_asked_for_by_their_whole_name(tmp_path: Path) -> None:
    with served(tmp_path, response(200, {"Id": "sha256:aa", "Config": {"User": "app"}})) as (podman, server):
        assert podman.image_digest("registry/x/y:1") == "sha256:aa"
        assert podman.image_config("registry/x/y:1") == {"User": "app"}
    assert {asked.path for asked in server.asked} == {"/v4.0.0/libpod/images/registry%2Fx%2Fy%3A1/json"}
    assert "registry/x/y:1" in unquote(server.asked[0].path)


def test_a_missing_image_names_the_remedy(tmp_path: Path) -> None:
    with served(tmp_path, response(404, {"message": "no such image"})) as (podman, _):
        with pytest.raises(NotFoundError) as caught:
            podman.image_digest("site")
        assert caught.value.remedy == "podman pull site"


def test_an_image_s_layers(tmp_path: Path) -> None:
    data = {"UpperDir": "/s/top/diff", "LowerDir": "/s/mid/diff:/s/base/diff", "WorkDir": "/s/top/work"}
    with served(tmp_path, response(200, {"GraphDriver": {"Name": "overlay", "Data": data}})) as (podman, _):
        assert podman.image_layers("site") == (Path("/s/top/diff"), Path("/s/mid/diff"), Path("/s/base/diff"))


def test_an_image_of_one_layer(tmp_path: Path) -> None:
    with served(tmp_path, response(200, {"GraphDriver": {"Data": {"UpperDir": "/s/top/diff"}}})) as (podman, _):
        assert podman.image_layers("site") == (Path("/s/top/diff"),)


@pytest.mark.parametrize("image", [{}, {"GraphDriver": {"Name": "vfs", "Data": None}}])
def test_images_of_another_storage_driver(tmp_path: Path, image: dict[str, Any]) -> None:
    with served(tmp_path, response(200, image)) as (podman, _), pytest.raises(PreflightError) as caught:
        podman.image_layers("site")
    assert "storage driver" in str(caught.value.cause)


def test_volumes(tmp_path: Path) -> None:
    with served(tmp_path, response(200, {"Mountpoint": "/v/data"})) as (podman, server):
        assert podman.volume("data") == podman.create_volume("data") == Path("/v/data")
    assert server.asked[1].json == {"Name": "data"}


def test_a_volume_that_is_not_there(tmp_path: Path) -> None:
    with served(tmp_path, response(404, {"message": "no such volume"})) as (podman, _):
        assert podman.volume("data") is None


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    with served(tmp_path, response(404, {"message": "no such container"})) as (podman, _):
        podman.remove("x", OURS)
        podman.remove_volume("x")


# --- logs -----------------------------------------------------------------------------------------------------


def entry(tag: str, text: bytes, stream: str = "stdout") -> bytes:
    return f"2026-11-21T13:28:10.264849638+00:00 {stream} {tag} ".encode() + text + b"\n"


WORDS = entry("F", b"listening") + entry("P", b"last ", "stderr") + entry("F", b"words", "stderr")


@pytest.mark.parametrize(
    ("content", "most", "text"),
    [
        (b"", None, ""),
        (None, None, ""),
        (entry("F", b"out") + entry("F", b"err", "stderr"), None, "out\nerr\n"),
        (entry("F", b"") + entry("F", b" two  blanks "), None, "\n two  blanks \n"),
        (WORDS, None, "listening\nlast words\n"),
        (WORDS, 10**6, "listening\nlast words\n"),
        (WORDS, len(WORDS) - 1, "last words\n"),
        (WORDS, 0, ""),
        (entry("P", b"no end"), None, "no end"),
        (entry("P", "größe".encode()[:3]) + entry("F", "größe".encode()[3:]), None, "größe\n"),
        (entry("F", b"\xff"), None, "�\n"),
        (entry("F", b"whole") + entry("F", b"half")[:-2], None, "whole\nhal"),
        (entry("F", b"whole") + entry("F", b"")[:20], None, "whole\n"),
    ],
)
def test_logs_are_put_together(tmp_path: Path, content: bytes | None, most: int | None, text: str) -> None:
    file = tmp_path / "ctr.log"
    if content is not None:
        file.write_bytes(content)
    with served(tmp_path, response(200, {"HostConfig": {"LogConfig": {"Path": str(file)}}})) as (podman, server):
        assert podman.logs("c", most=most) == text
    assert server.asked[0].path.endswith("/containers/c/json")


@pytest.mark.parametrize("content", ["", "not a number", None])
def test_a_log_without_a_writer_is_whole(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "conmon.pid"
    if content is not None:
        file.write_text(content)
    with served(tmp_path, response(200, {"Id": "abc", "ConmonPidFile": str(file)})) as (podman, _):
        podman.wait_for_log("c", 60)


def test_a_log_is_whole_when_its_writer_has_ended(tmp_path: Path) -> None:
    file, log = tmp_path / "conmon.pid", tmp_path / "log"
    program = ["sh", "-c", "echo $$; sleep 0.1; echo last words > log", "conmon", "-c", "abc"]
    with subprocess.Popen(program, cwd=tmp_path, stdout=subprocess.PIPE) as writer:
        assert writer.stdout
        file.write_bytes(writer.stdout.readline())
        with served(tmp_path, response(200, {"Id": "abc", "ConmonPidFile": str(file)})) as (podman, _):
            podman.wait_for_log("c", 60)
            assert log.read_text() == "last words\n"


# --- errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "cause"),
    [
        (404, {"cause": "gone", "message": "no container: gone"}, NotFoundError, "no container: gone"),
        (409, {"cause": "state", "message": "conflict"}, BusyError, "conflict: state"),
        (500, {"message": "it broke"}, PodmanError, "it broke"),
        (500, {}, PodmanError, ""),
        (500, b"garbage \xff", PodmanError, "garbage �"),
        (500, b"", PodmanError, ""),
        (500, [1, 2], PodmanError, "[1, 2]"),
        (404, "null", NotFoundError, "null"),
    ],
)
def test_error_answers(tmp_path: Path, status: int, body: Any, kind: type[GpuckptError], cause: str) -> None:
    with served(tmp_path, response(status, body)) as (podman, _):
        with pytest.raises(kind) as caught:
            podman.start("c")
        assert type(caught.value) is kind
        assert caught.value.cause == cause
        assert "POST /containers/c/start" in caught.value.message


@pytest.mark.parametrize(
    "data", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", b"\xff" * 100]
)
def test_what_is_no_answer(tmp_path: Path, data: bytes) -> None:
    with served(tmp_path, data) as (podman, _):
        with pytest.raises(DaemonUnreachableError) as caught:
            podman.start("c")
        assert caught.value.exit_code == 12


def test_a_service_that_says_nothing(tmp_path: Path) -> None:
    with served(tmp_path, None, timeout=0.05) as (podman, _), pytest.raises(DeadlineError, match=r"within 0\.05 s"):
        podman.start("c")


def test_no_service(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnreachableError):
        Podman(Api(tmp_path / "absent")).start("c")


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    body = {"cause": "container name is already in use", "message": "creating container: already in use"}
    with served(tmp_path, response(500, body)) as (podman, _):
        with pytest.raises(BusyError) as caught:
            podman.create(spec())
        assert "podman rm -f gpuckpt-gold" in str(caught.value.remedy)


def test_a_create_that_misses_something_is_a_wrong_request(tmp_path: Path) -> None:
    with served(tmp_path, response(404, {"message": "no such network"})) as (podman, _):
        with pytest.raises(UsageError) as caught:
            podman.create(spec())
        assert caught.value.cause == "no such network"


# --- processes ------------------------------------------------------------------------------------------------


def test_container_names() -> None:
    assert container_name("gold") == "gpuckpt-gold"


def test_memory_and_children_by_proc() -> None:
    assert os.getpid() in proc.processes_below(os.getppid())
    assert proc.processes_below(os.getpid())[0] == os.getpid()
    assert proc.memory_of([os.getpid()]) > 1 << 20
    assert proc.memory_of([2**22 + 1]) == 0, "a process that ended meanwhile counts nothing"
