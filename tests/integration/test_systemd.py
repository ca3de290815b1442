"""The units under a real systemd: PID 1 of a privileged container whose root is this machine's, as an overlay.

``GPUCKPT_TEST_SYSTEMD_ROOT`` names another root (made by debootstrap, say) to test with another systemd.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.host import limits
from gpuckpt.service.activation import BACKLOG, NO_KEYS
from tests.integration.conftest import HERE, PATIENCE, PREFIX

ROOT = Path(os.environ.get("GPUCKPT_TEST_SYSTEMD_ROOT", "/"))
CHECKOUT = HERE.parents[1]
PYTHON = str(PREFIX / "venv" / "bin" / "python")
DAEMON = [PYTHON, "-m", "gpuckpt"]
SERVICE, SOCKET, MOUNT = "gpuckpt-pool.service", "gpuckpt-pool.socket", "run-gpuckpt-store.mount"
CREDENTIAL = f"/run/credentials/{SERVICE}/api-keys"
PORT = 8400
SERVED = "/v1/models"  # answered without a model
# What a container must not do to the kernel that it shares with this machine.
MASKED = ("systemd-sysctl.service", "systemd-modules-load.service", "systemd-binfmt.service",
          "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount", "sys-kernel-debug.mount",
          "sys-kernel-tracing.mount", "sys-fs-fuse-connections.mount")  # fmt: skip
INSTALL = """
from pathlib import Path
from gpuckpt.config import Settings, Store
from gpuckpt.service.install import install, uninstall
settings = Settings(store=Store(size=64 << 20))
def show(done):
    print(*(f"{one.what} {one.path}" for one in done.changes), *done.commands, *done.notes, sep="\\n")
"""
# systemd makes the root's mounts shared when it boots a machine, but not in a container; without that it delivers no
# credentials. A pool that is installed on this machine must not be in the way.
BOOT = (
    "rm -rf /etc/systemd/system/gpuckpt-* /etc/systemd/system/*.wants/gpuckpt-*; mount --make-rshared /; "
    "exec /lib/systemd/systemd --unit=basic.target SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"
)


class Machine:
    """The container, and commands in it."""

    def __init__(self) -> None:
        self.name = f"gpuckpt-test-systemd-{uuid.uuid4().hex[:8]}"
        self.began = 0.0

    def boot(self) -> None:
        ulimits = [one for one in limits.container_ulimits() if one["Name"] != "memlock"]
        folders = ["/tmp", "/run", "/run/lock", "/var/log/journal", "/etc/gpuckpt"]
        deep = ["/var/lib/containers", "/var/lib/gpuckpt"]  # overlays are mounted below: no tmpfs without exec
        seen = {CHECKOUT, PREFIX, Path(sys.base_prefix)}
        _podman(
            *("run", "--detach", "--name", self.name, "--privileged", "--network=none", "--cgroupns=private"),
            # podman's own --systemd would mount this machine's whole cgroup tree.
            *("--systemd=false", "--env=container=podman", "--stop-signal=SIGRTMIN+3"),
            *(f"--ulimit={one['Name']}={one['Soft']}:{one['Hard']}" for one in ulimits),
            *(f"--tmpfs={folder}:notmpcopyup" for folder in folders),
            *(f"--mount=type=tmpfs,destination={folder},notmpcopyup" for folder in deep),
            *(f"--volume={folder}:{folder}:ro" for folder in seen),
            *(f"--volume=/dev/null:/etc/systemd/system/{unit}" for unit in MASKED),
            *("--rootfs", f"{ROOT}:O", "sh", "-c", BOOT),
        )
        self.until(lambda: self.sh("systemctl is-system-running", check=False).strip() == "running", self.trouble)

    def sh(self, script: str, *, check: bool = True, env: dict[str, str] | None = None) -> str:
        words = [f"--env={name}={value}" for name, value in (env or {}).items()]
        return _podman("exec", *words, self.name, "sh", "-c", script, check=check)

    def python(self, code: str) -> str:
        words = ["--env", f"PYTHONPATH={CHECKOUT}"]
        return _podman("exec", *words, self.name, PYTHON, "-c", code)

    def install(self, **options: bool) -> str:
        given = "".join(f", {name}={value}" for name, value in options.items())
        return self.python(f"{INSTALL}show(install(settings, program={DAEMON!r}{given}))")

    def show(self, unit: str, name: str) -> str:
        return self.sh(f"systemctl show --value -p {name} {unit}").strip()

    @property
    def main(self) -> int:
        return int(self.show(SERVICE, "MainPID"))

    def state(self, unit: str = SERVICE) -> str:
        return self.sh(f"systemctl is-active {unit}", check=False).strip()

    def ask(self, key: str = "", *, port: int = PORT) -> int:
        """The status of the front's answer."""
        return int(
            self.python(
                "import http.client\n"
                f"c = http.client.HTTPConnection('127.0.0.1', {port}, timeout=150)\n"
                f"c.request('GET', {SERVED!r}, headers={{'Authorization': 'Bearer {key}'}})\n"
                "print(c.getresponse().status)"
            )
        )

    def told(self, count: int, *matches: str) -> list[dict[str, Any]]:
        """So many entries: the journal may take them up when it has time."""
        self.until(lambda: len(self.journal(*matches)) >= count)
        return self.journal(*matches)

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Entries since this test began."""
        self.sh("journalctl --sync")
        text = self.sh(f"journalctl --no-pager -o json {' '.join(matches)}")
        entries = [json.loads(line) for line in text.splitlines()]
        return [one for one in entries if int(one["__REALTIME_TIMESTAMP"]) >= self.began * 1e6]

    def drop_in(self, text: str) -> None:
        folder = f"/run/systemd/system/{SERVICE}.d"
        self.sh(f"mkdir -p {folder}; printf '%s' '{text}' > {folder}/test.conf; systemctl daemon-reload")

    def until(self, holds: Callable[[], bool], trouble: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, trouble()
            time.sleep(0.1)

    def trouble(self) -> str:
        return self.sh("systemctl --failed --no-pager; systemctl list-jobs --no-pager", check=False)


def _podman(*words: str, check: bool = True) -> str:
    done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert not check or done.returncode == 0, f"podman {' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def booted() -> Iterator[Machine]:
    made = Machine()
    try:
        made.boot()
        yield made
    finally:
        _podman("rm", "--force", "--time", "5", made.name, check=False)


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """With the pool installed, not running, its socket open, without keys."""
    booted.install()
    booted.sh(f"systemctl start {SOCKET}")
    booted.began = time.time()
    yield booted
    booted.sh(
        f"rm -rf /run/systemd/system/{SERVICE}.d /etc/gpuckpt/*; systemctl daemon-reload; "
        f"systemctl stop {SOCKET} {SERVICE}; systemctl reset-failed",
        check=False,
    )


def test_install_and_uninstall(booted: Machine) -> None:
    said = booted.install(enable=True, now=True)
    assert f"written /etc/systemd/system/{MOUNT}" in said and "systemctl daemon-reload" in said
    assert booted.state() == booted.state(SOCKET) == "active"
    assert booted.sh(f"systemctl is-enabled {SERVICE} {SOCKET}").split() == ["enabled"] * 2
    assert booted.sh("stat -c %a /run/gpuckpt /var/lib/gpuckpt").split() == ["700", "700"]
    before = booted.main
    assert "written" not in (again := booted.install(enable=True, now=True)) and "changed" not in again.split()
    assert booted.main == before, "what is the same is not restarted"
    booted.sh('echo \'front.listen = ["127.0.0.1:8401", "unix:/run/front.sock"]\' > /etc/gpuckpt/pool.toml')
    assert f"changed /etc/systemd/system/{SOCKET}" in booted.install(now=True)
    assert booted.ask(port=8401) == 200
    assert booted.sh("stat -c %a:%G /run/front.sock").strip() == "660:gpuckpt"
    said = booted.python(f"{INSTALL}show(uninstall(settings))")
    assert f"removed /etc/systemd/system/{SERVICE}" in said
    assert booted.state() == booted.state(SOCKET) == "inactive"
    assert booted.show(SERVICE, "LoadState") == "not-found"
    assert booted.state(MOUNT) == "active", "goldens are in there"
    booted.sh(f"umount /run/gpuckpt/store; rm -rf /etc/gpuckpt/*; systemctl reset-failed {SERVICE}", check=False)


def test_systemd_has_nothing_to_complain_of(machine: Machine) -> None:
    said = machine.sh(f"systemd-analyze verify --man=no {SERVICE} {SOCKET} {MOUNT} 2>&1", check=False)
    assert not [line for line in said.splitlines() if "gpuckpt" in line], said
    # What an older systemd does not know it says when it loads the unit.
    assert not [one["MESSAGE"] for one in machine.journal("_PID=1") if "Unknown" in one["MESSAGE"]]


def test_ready_is_when_the_daemon_says_so(machine: Machine) -> None:
    script = f"systemctl start {SERVICE} & while kill -0 $!; do systemctl is-active {SERVICE}; done"
    seen = machine.sh(f"{script}; systemctl is-active {SERVICE}", check=False).split()
    assert "activating" in seen and seen[-1] == "active", seen
    times = [int(machine.show(SERVICE, f"{name}TimestampMonotonic")) for name in ("ExecMainStart", "ActiveEnter")]
    assert times[1] - times[0] > 100_000, "a Python that has imported nothing yet was taken for a daemon that is ready"
    assert "model" in machine.show(SERVICE, "StatusText")
    assert "model" in machine.sh(f"systemctl status --no-pager {SERVICE}")
    machine.sh(f"systemctl stop {SERVICE}")
    assert machine.show(SERVICE, "Result") == "success"


def test_the_first_request_starts_it(machine: Machine) -> None:
    assert machine.state() == "inactive" and machine.state(SOCKET) == "active"
    assert machine.ask() == 200
    assert machine.state() == "active"
    init = _podman("inspect", "--format", "{{.State.Pid}}", machine.name).strip()
    words = ["nsenter", f"--net=/proc/{init}/ns/net", "ss", "-Hltn", f"sport = {PORT}"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert shown.split()[2] == str(BACKLOG)


def test_a_restart_refuses_nobody(machine: Machine) -> None:
    assert machine.ask() == 200
    before = machine.main
    machine.sh(f"systemctl restart --no-block {SERVICE}")
    assert [machine.ask() for _ in range(5)] == [200] * 5
    machine.until(lambda: machine.main not in (0, before))
    assert machine.ask() == 200


def test_a_reload_is_waited_for(machine: Machine) -> None:
    machine.sh(f"systemctl start {SERVICE}")
    before = machine.main
    assert machine.journal("GPUCKPT_EVENT=reloaded") == []
    for count in (1, 2):
        machine.sh(f"systemctl reload {SERVICE}")
        over = time.time()
        told = machine.told(count, "GPUCKPT_EVENT=reloaded")
        assert len(told) == count and int(told[-1]["_SOURCE_REALTIME_TIMESTAMP"]) < over * 1e6
        assert machine.state() == "active" and machine.main == before
    machine.sh(f"kill -HUP {before}")
    assert len(machine.told(3, "GPUCKPT_EVENT=reloaded")) == 3
    machine.until(lambda: machine.state() == "active")


def test_a_daemon_that_hangs_is_replaced(machine: Machine) -> None:
    machine.sh(f"systemctl start {SERVICE}")
    assert machine.show(SERVICE, "WatchdogUSec") == "30s"
    machine.drop_in("[Service]\nWatchdogSec=6\n")
    machine.sh(f"systemctl restart {SERVICE}")
    time.sleep(7)
    before = machine.main
    assert machine.show(SERVICE, "NRestarts") == "0", "it pings"
    machine.sh(f"kill -STOP {before}")
    machine.until(lambda: machine.show(SERVICE, "NRestarts") == "1" and machine.state() == "active")
    assert machine.main != before
    machine.until(lambda: any("Watchdog timeout" in one["MESSAGE"] for one in machine.journal(f"UNIT={SERVICE}")))

    def text() -> str:
        return "\n".join(str(one["MESSAGE"]) for one in machine.journal(f"_PID={before}"))

    machine.until(lambda: "Fatal Python error: Aborted" in text() and "most recent call first" in text(), text)


def test_the_journal_has_fields(machine: Machine) -> None:
    machine.sh(f"systemctl start {SERVICE}; systemctl reload {SERVICE}")
    (entry,) = machine.told(1, "GPUCKPT_EVENT=reloaded")
    assert entry["_SYSTEMD_UNIT"] == SERVICE and entry["_PID"] == str(machine.main)
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["_TRANSPORT"]) == ("6", "gpuckpt-pool", "journal")
    assert entry["CODE_FILE"].endswith(".py") and entry["CODE_LINE"] and entry["MESSAGE"]


def test_keys(machine: Machine) -> None:
    assert machine.ask() == 200, "without a file of keys nobody needs one"
    assert machine.sh(f"cat {CREDENTIAL}") == NO_KEYS
    machine.sh(f"umask 077; echo secret > /etc/gpuckpt/api-keys; systemctl restart {SERVICE}")
    assert machine.sh(f"cat {CREDENTIAL}") == "secret\n"
    assert machine.ask() == 401 and machine.ask("secret") == 200
    # An emptied file lets nobody in: the service says so, and does not start.
    machine.sh(f": > /etc/gpuckpt/api-keys; systemctl restart {SERVICE}", check=False)
    machine.until(lambda: machine.state() == "failed")
    machine.until(lambda: "holds no API key" in machine.sh(f"journalctl -u {SERVICE} -n 40"))
    machine.sh(f"rm /etc/gpuckpt/api-keys; systemctl reset-failed {SERVICE}; systemctl restart {SOCKET} {SERVICE}")
    assert machine.ask() == 200


def test_the_store_is_mounted_first(machine: Machine) -> None:
    if machine.state(MOUNT) == "active":
        machine.sh(f"systemctl stop {MOUNT}")
    machine.sh(f"systemctl start {SERVICE}")
    (line,) = [one.split() for one in machine.sh("cat /proc/mounts").splitlines() if " /run/gpuckpt/store " in one]
    options = line[3].split(",")
    assert line[:3] == ["gpuckpt-store", "/run/gpuckpt/store", "tmpfs"]
    assert {"rw", "nosuid", "nodev", "size=65536k", "mode=700"} <= set(options) and "noexec" not in options
    if Path("/sys/kernel/mm/transparent_hugepage").exists():
        assert "huge=within_size" in options
    assert machine.sh("stat -c %a:%u /run/gpuckpt /run/gpuckpt/store").split() == ["700:0", "700:0"]
    machine.sh(f"systemctl stop {SERVICE}")
    assert machine.state(MOUNT) == "active", "goldens outlive the service"


def test_the_store_grows_with_what_is_in_it(machine: Machine) -> None:
    machine.sh(f"systemctl start {SERVICE}; touch /run/gpuckpt/store/golden")
    before = machine.main
    larger = f"{INSTALL}settings = Settings(store=Store(size=96 << 20))\n"
    said = machine.python(f"{larger}show(install(settings, program={DAEMON!r}))")
    assert f"not in use yet: systemctl reload {MOUNT}" in said and "restart" not in said
    machine.sh(f"systemctl reload {MOUNT}; rm /run/gpuckpt/store/golden")
    assert "size=98304k" in machine.sh("grep gpuckpt-store /proc/mounts")
    assert f"systemctl reload {MOUNT}" in machine.install(now=True).splitlines()
    assert "size=65536k" in machine.sh("grep gpuckpt-store /proc/mounts")
    assert machine.main == before


def test_nothing_that_criu_cannot_bear_is_inherited(machine: Machine) -> None:
    machine.sh(f"systemctl start {SERVICE}")
    pid = machine.main
    status = dict(line.split(":\t", 1) for line in machine.sh(f"cat /proc/{pid}/status").splitlines() if ":\t" in line)
    assert (status["Seccomp"], status["NoNewPrivs"], status["Umask"]) == ("0", "0", "0077")
    assert int(status["CapBnd"], 16) & 1 << 25, "CAP_SYS_TIME: the clocks of time namespaces"
    assert not int(status["CapBnd"], 16) & 1 << 22, "CAP_SYS_BOOT"
    for kind in ("mnt", "pid", "ipc", "uts", "net"):
        own, first = machine.sh(f"readlink /proc/{pid}/ns/{kind} /proc/1/ns/{kind}").split()
        assert own == first, f"{kind}: mounts and containers must be the machine's"


def test_containers_survive_the_daemon_and_its_children_do_not(machine: Machine) -> None:
    """What a child of the daemon starts is in a scope of its own; the child is in the service's control group."""
    if machine.sh("command -v podman", check=False) == "":
        pytest.skip(f"the root {ROOT} has no podman")
    machine.sh(f"systemctl start {SERVICE}")
    group = f"/sys/fs/cgroup{{,/systemd,/unified}}/system.slice/{SERVICE}/cgroup.procs"
    join = f"for group in $(bash -c 'ls {group} 2>/dev/null'); do echo $$ > $group; done"
    environment = {"PYTHONPATH": str(CHECKOUT), "INVOCATION_ID": "0123456789abcdef0123456789abcdef"}
    name = "gpuckpt-test-inner"
    try:
        machine.sh(f"{join}; exec {PYTHON} {HERE}/programs/inner_container.py {name}", env=environment)
        inner = int(machine.sh(f"podman inspect --format '{{{{.State.Pid}}}}' {name}"))
        conmon = int(machine.sh("pgrep -x conmon"))
        assert "machine.slice/libpod-" in machine.sh(f"cat /proc/{conmon}/cgroup")
        services = machine.sh("cat /run/gpuckpt/podman-*/service.pid").split()
        assert services and all(SERVICE in machine.sh(f"cat /proc/{one}/cgroup") for one in services)
        before = machine.main
        machine.sh(f"kill -KILL {before}")
        machine.until(lambda: machine.main not in (0, before) and machine.state() == "active")
        for one in services:
            machine.until(lambda one=one: "gone" in machine.sh(f"kill -0 {one} || echo gone", check=False))  # type: ignore[misc]
        machine.sh(f"kill -0 {conmon} && kill -0 {inner}")
        machine.sh(f"systemctl stop {SERVICE}")
        machine.sh(f"kill -0 {conmon} && kill -0 {inner}")
        assert machine.sh(f"podman inspect --format '{{{{.State.Status}}}}' {name}").strip() == "running"
    finally:
        machine.sh(f"podman rm --force --time 0 {name}; umount -l /var/lib/gpuckpt/inner/rootfs", check=False)
