"""``gpuckpt doctor``: what each check says about machines that are not like this one, and how it is shown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from gpuckpt import proc
from gpuckpt.checks import Check
from gpuckpt.cli import cli
from gpuckpt.cli.doctor import table
from gpuckpt.config import Paths, Podman, Settings, Store
from gpuckpt.containers import checks as containers
from gpuckpt.containers.service import choose_runtime
from gpuckpt.criu import binary
from gpuckpt.criu import checks as criu
from gpuckpt.cuda import checks as cuda
from gpuckpt.errors import GpuckptError, NotFoundError, PreflightError
from gpuckpt.golden import doctor
from gpuckpt.host import checks as host
from gpuckpt.host import seccomp

ALL = (1 << 41) - 1
SETTINGS = Settings()


def machine(root: Path, files: Mapping[str, str], *, uid: int = 0, release: str = "6.18.1") -> host.Machine:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return host.Machine(proc=root, uid=uid, release=release)


def programs(monkeypatch: pytest.MonkeyPatch, outputs: Mapping[str, str | GpuckptError]) -> None:
    """Make the machine have exactly these programs: command line (by file name) → what it prints or raises."""

    def run(argv: Any, **_: object) -> proc.Result:
        words = [Path(str(argv[0])).name, *map(str, argv[1:])]
        answer = outputs[" ".join(words)]
        if isinstance(answer, GpuckptError):
            raise answer
        return proc.Result(tuple(words), 0, answer, "")

    names = {line.split(" ")[0] for line in outputs}
    monkeypatch.setattr(proc, "run", run)
    monkeypatch.setattr("shutil.which", lambda name, path=None: f"/usr/bin/{name}" if name in names else None)


# --- host -----------------------------------------------------------------------------------------------------


def test_a_user_is_told_to_use_sudo_and_spared_the_rest(tmp_path: Path) -> None:
    user = machine(tmp_path, {}, uid=1000)
    assert host.root(user).verdict == "fail"
    assert host.root(user).mend == "sudo gpuckpt doctor"
    assert {host.capabilities(user).verdict, host.sys_resource(user).verdict, host.features(user).verdict} == {"skip"}


def test_root_of_a_user_namespace_is_not_root(tmp_path: Path) -> None:
    assert host.root(machine(tmp_path, {"self/uid_map": "  0  1000  1\n"})).verdict == "fail"
    assert host.root(machine(tmp_path, {"self/uid_map": "         0          0 4294967295\n"})).verdict == "ok"


def test_missing_capabilities_are_named(tmp_path: Path) -> None:
    some = machine(tmp_path, {"self/status": f"Name:\tx\nCapEff:\t{ALL & ~(1 << 19) & ~(1 << 24):016x}\n"})
    check = host.capabilities(some)
    assert (check.verdict, check.found) == ("fail", "missing: CAP_SYS_PTRACE")
    assert "sys_ptrace: CRIU stops and reads processes" in check.why
    assert host.sys_resource(some).verdict == "warn"
    assert "explicit ulimits" in host.sys_resource(some).why
    every = machine(tmp_path, {"self/status": f"CapEff:\t{ALL:016x}\n"})
    assert {host.capabilities(every).verdict, host.sys_resource(every).verdict} == {"ok"}


@pytest.mark.parametrize(
    ("release", "verdict"), [("6.18.44-x", "ok"), ("5.4.0-1", "warn"), ("3.10.0-1160.el7", "fail")]
)
def test_old_kernels(tmp_path: Path, release: str, verdict: str) -> None:
    assert host.kernel(machine(tmp_path, {}, release=release)).verdict == verdict


def test_missing_kernel_features_are_named(tmp_path: Path) -> None:
    check = host.features(machine(tmp_path, {"self/pagemap": "12345678", "sys/kernel/ns_last_pid": "1"}))
    assert check.verdict == "fail"
    assert "map_files (CONFIG_CHECKPOINT_RESTORE)" in check.found and "pagemap" not in check.found


CGROUP_LINES = {
    "v2": ["/sys/fs/cgroup rw - cgroup2 cgroup2 rw"],
    "v1": ["/sys/fs/cgroup rw - tmpfs tmpfs rw", "/sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer"],
    "hybrid (v1 with a v2 tree)": [
        "/sys/fs/cgroup rw - tmpfs tmpfs rw",
        "/sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer",
        "/sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
    ],
}


@pytest.mark.parametrize("mode", CGROUP_LINES)
def test_cgroup_modes(tmp_path: Path, mode: str) -> None:
    lines = "".join(f"31 23 0:28 / {line}\n" for line in CGROUP_LINES[mode])
    check = host.cgroups(machine(tmp_path, {"self/mountinfo": lines}))
    assert (check.verdict, check.found) == ("ok", mode)


def test_a_missing_freezer_or_cgroup_fails(tmp_path: Path) -> None:
    bare = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    assert host.cgroups(machine(tmp_path, {"self/mountinfo": bare})).verdict == "fail"
    cpu = bare + "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
    assert "without the freezer" in host.cgroups(machine(tmp_path, {"self/mountinfo": cpu})).found


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "none"),
        ({"fs/selinux/enforce": "1"}, "SELinux, enforcing"),
        ({"fs/selinux/enforce": "0"}, "SELinux, permissive"),
        ({"module/apparmor/parameters/enabled": "Y\n"}, "AppArmor"),
        ({"module/apparmor/parameters/enabled": "N\n"}, "none"),
    ],
)
def test_what_confines_containers(tmp_path: Path, files: dict[str, str], found: str) -> None:
    machine(tmp_path, files)
    check = host.confinement(host.Machine(proc=tmp_path, sys=tmp_path))
    assert (check.verdict, check.found) == ("ok", found)


def test_overlay_swap_io_uring_and_memory(tmp_path: Path) -> None:
    here = machine(
        tmp_path,
        {
            "filesystems": "nodev\tproc\nnodev\toverlayfs2\n",
            "swaps": "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 5\n/dev/sda 2 partition 1 0 -2\n",
            "sys/kernel/io_uring_disabled": "2\n",
            "meminfo": "MemTotal: 8000000 kB\nMemAvailable: 1000000 kB\n",
        },
        release="0-none",
    )
    assert host.overlay(here).verdict == "fail"
    assert host.swap(here).mend == "swapoff /dev/sda"
    assert host.io_uring(here).found == "host: off; containers: off"
    assert host.memory(here).verdict == "warn"
    (tmp_path / "filesystems").write_text("nodev\tproc\nnodev\toverlay\n")
    (tmp_path / "swaps").write_text("Filename Type Size Used Priority\n")
    assert host.overlay(here).verdict == "ok"
    assert host.swap(here).found == "off"


def test_a_disk_tier_in_memory_is_warned_of(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    row = f"22 1 {os.major(device)}:{os.minor(device)} / /somewhere rw,relatime shared:1 - {{}} source rw\n"
    settings = Settings(store=Store(disk=tmp_path / "not" / "yet"))
    on_disk = host.disk(settings, machine(tmp_path / "a", {"self/mountinfo": row.format("ext4")}))
    assert on_disk.found.startswith(f"{tmp_path}/not/yet: ") and on_disk.found.endswith(" free, ext4")
    in_memory = host.disk(settings, machine(tmp_path / "b", {"self/mountinfo": row.format("tmpfs")}))
    assert (in_memory.verdict, "after a reboot" in in_memory.why) == ("warn", True)


# --- seccomp --------------------------------------------------------------------------------------------------


def package(root: Path, profile: dict[str, Any] | None, *, wheel: bool = False) -> Path:
    folder = root / "gpuckpt"
    for name in ("gpuckpt.json", "gpuckpt-mapped.json"):
        file = seccomp.candidates(folder, name=name)[1 if wheel else 0]
        file.parent.mkdir(parents=True, exist_ok=True)
        if profile is not None:
            file.write_text(json.dumps(profile))
    return folder


REFUSE = {"names": list(seccomp.IO_URING), "action": "SCMP_ACT_ERRNO", "errnoRet": 38}


@pytest.mark.parametrize("wheel", [False, True])
def test_the_profile_is_found_in_a_checkout_and_in_a_wheel(tmp_path: Path, wheel: bool) -> None:
    where = package(tmp_path, {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [REFUSE]}, wheel=wheel)
    actions = tmp_path / "actions"
    actions.write_text("kill_process errno allow")
    assert seccomp.profile_path(where).parts[-2:] == ("seccomp", "gpuckpt.json")
    assert seccomp.check(where, actions=actions).verdict == "ok"
    assert seccomp.check(where, actions=tmp_path / "absent").verdict == "fail"
    seccomp.profile_path(where, mapped=True).unlink()
    assert "gpuckpt-mapped.json" in seccomp.check(where, actions=actions).found


@pytest.mark.parametrize(
    ("profile", "answer"),
    [
        ({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": []}, "EPERM"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": []}, "ENOSYS"),
        ({"defaultAction": "SCMP_ACT_ALLOW"}, "allowed"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [REFUSE]}, "ENOSYS"),
        (
            {
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [REFUSE, {"names": ["io_uring_setup"], "action": "SCMP_ACT_ALLOW"}],
            },
            "allowed",
        ),
        ({"defaultAction": "SCMP_ACT_KILL_PROCESS", "syscalls": []}, "kill_process"),
    ],
)
def test_what_a_profile_answers(profile: dict[str, Any], answer: str) -> None:
    assert seccomp.answer(profile, "io_uring_setup") == answer


@pytest.mark.parametrize("profile", [None, {"defaultAction": "SCMP_ACT_ALLOW"}, {"syscalls": 5}])
def test_a_missing_or_wrong_profile_fails(tmp_path: Path, profile: dict[str, Any] | None) -> None:
    check = seccomp.check(package(tmp_path, profile))
    assert check.verdict == "fail" and check.mend
    if profile is None:
        with pytest.raises(NotFoundError):
            seccomp.profile_path(tmp_path / "gpuckpt")


# --- criu, containers, cuda -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "release", "verdict"),
    [("4.2.1", "6.18.44", "ok"), ("3.17.1", "6.1.0", "ok"), ("3.17.1", "6.18.44", "fail"), ("3.11", "5.10.0", "fail")],
)
def test_criu_must_fit_the_kernel(monkeypatch: pytest.MonkeyPatch, version: str, release: str, verdict: str) -> None:
    monkeypatch.setattr(binary, "find", lambda settings, cache: binary.Criu(Path("/usr/sbin/criu"), version))
    check, found = criu.program(SETTINGS, release=release)
    assert check.verdict == verdict and found is not None
    assert check.mend == (None if verdict == "ok" else "make setup")


def test_no_criu(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(paths=Paths(prefix=Path("/nonexistent")))
    programs(monkeypatch, {})
    check, found = criu.program(settings)
    assert (check.verdict, check.mend, found) == ("fail", "install one that works here: make setup", None)
    assert criu.self_check(None).verdict == "skip"


def test_a_failing_criu_check_shows_its_complaints(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Warn  (criu/x.c:1): no such thing\nnoise\nError (criu/y.c:2): and so not that one\n"
    monkeypatch.setattr(proc, "run", lambda argv, **_: proc.Result(tuple(map(str, argv)), 1, "", said))
    check = criu.self_check(binary.Criu(Path("/c"), "4.2"))
    assert check.verdict == "fail" and "no such thing" in check.found and "noise" not in check.found


RUNC = "runc version 1.1.5+ds1\nspec: 1.0.2-dev\n"
CAPABLE = '{"annotations": {"org.opencontainers.runc.checkpoint.enabled": "true"}}'
READS_CONFIG = '{"potentiallyUnsafeConfigAnnotations": ["run.oci.", "org.criu.config"]}'
CRUN = "crun version 1.8.1\n+SYSTEMD +SELINUX +CAP +SECCOMP +EBPF +YAJL\n"


def test_debians_crun_is_passed_over_for_runc(monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, {"runc --version": RUNC, "runc features": CAPABLE, "crun --version": CRUN})
    check = containers.runtime(SETTINGS)
    assert (check.verdict, check.found) == ("ok", "runc 1.1.5+ds1, crun 1.8.1: built without CRIU")
    assert containers.runtime(Settings(podman=Podman(runtime="crun"))).verdict == "fail"


@pytest.mark.parametrize(
    ("outputs", "found"),
    [
        ({}, "no runc or crun"),
        ({"crun --version": CRUN}, "crun 1.8.1: built without CRIU"),
        ({"runc --version": "runc version 1.0.3\n"}, "runc 1.0.3: older than 1.1"),
        (
            {"runc --version": RUNC, "runc features": CAPABLE.replace("true", "false")},
            "runc 1.1.5+ds1: built without checkpoints",
        ),
        ({"runc --version": proc.CommandError("broken")}, "runc ?: does not run: broken"),
    ],
)
def test_runtimes_that_cannot(monkeypatch: pytest.MonkeyPatch, outputs: dict[str, str], found: str) -> None:
    programs(monkeypatch, outputs)
    check = containers.runtime(SETTINGS)
    assert (check.verdict, check.found) == ("fail", found)
    assert check.mend == "apt-get install -y runc"


def test_a_crun_with_criu_will_do_unless_cgroups_are_hybrid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    programs(monkeypatch, {"crun --version": CRUN + "+CRIU\n", "crun features": READS_CONFIG})
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    monkeypatch.setattr(containers, "_HYBRID", tmp_path / "absent")
    assert containers.runtime(SETTINGS).verdict == "ok"
    monkeypatch.setattr(containers, "_HYBRID", tmp_path)
    assert "refuses hybrid cgroups" in containers.runtime(SETTINGS).found


@pytest.mark.parametrize(
    ("features", "library", "trouble"),
    [
        (READS_CONFIG, True, None),
        (READS_CONFIG.replace("config", ""), True, None),  # a value that ends with a dot is a prefix
        ("{}", True, "does not read the annotation org.criu.config"),
        (READS_CONFIG.replace("org.criu.config", "org.other"), True, "does not read the annotation org.criu.config"),
        (READS_CONFIG, False, "finds no libcriu"),
    ],
)
def test_a_crun_must_read_our_options_and_find_libcriu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, features: str, library: bool, trouble: str | None
) -> None:
    def load(name: str) -> None:
        if not library:
            raise OSError(name)

    programs(monkeypatch, {"crun --version": CRUN + "+CRIU\n", "crun features": features})
    monkeypatch.setattr("ctypes.CDLL", load)
    monkeypatch.setattr(containers, "_HYBRID", tmp_path / "absent")
    found = containers.inspect_runtime("crun")
    assert found is not None
    assert found.trouble is None if trouble is None else trouble in str(found.trouble)


def test_the_runtime_that_is_used_is_the_one_without_trouble(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    monkeypatch.setattr(containers, "_HYBRID", tmp_path / "absent")
    runc = {"runc --version": RUNC, "runc features": CAPABLE}
    crun = {"crun --version": CRUN + "+CRIU\n", "crun features": READS_CONFIG}
    programs(monkeypatch, runc | crun)
    assert [choose_runtime(wanted) for wanted in ("auto", "runc", "crun")] == ["runc", "runc", "crun"]
    programs(monkeypatch, crun | {"runc --version": "runc version 1.0.3\n"})
    assert choose_runtime("auto") == "crun"
    with pytest.raises(PreflightError, match="the OCI runtime runc cannot") as caught:
        choose_runtime("runc")
    assert caught.value.cause == "runc 1.0.3: older than 1.1"
    programs(monkeypatch, {"crun --version": CRUN})
    with pytest.raises(PreflightError, match="no OCI runtime") as caught:
        choose_runtime("auto")
    assert caught.value.cause == "runc is not installed; crun 1.8.1: built without CRIU"


def test_podman_old_missing_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    programs(monkeypatch, {"podman --version": "podman version 3.4.4\n", "podman info --format json": "not json"})
    assert containers.podman(SETTINGS).verdict == "fail"
    assert containers.info(SETTINGS).verdict == "fail"
    programs(monkeypatch, {"podman --version": "podman version 4.3.1\n", "podman info --format json": "{}"})
    assert {check.verdict for check in (containers.podman(SETTINGS), containers.info(SETTINGS))} == {"ok"}
    programs(monkeypatch, {"dnf": ""})
    assert containers.podman(SETTINGS).mend == "dnf install -y podman"
    assert containers.info(SETTINGS).verdict == "skip"
    assert [check.verdict for check in containers.fast_checks(SETTINGS)] == ["fail", "fail"]


PROPRIETARY = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version: 12\n"
)
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)  Tue\n"


def test_without_a_gpu_everything_is_skipped(tmp_path: Path) -> None:
    assert {check.verdict for check in cuda.all_checks(SETTINGS, driver_file=tmp_path / "absent")} == {"skip"}


@pytest.mark.parametrize(
    ("text", "version", "packages", "verdicts"),
    [
        (PROPRIETARY, "550.54.15", True, ["warn", "warn", "warn", "warn"]),
        (PROPRIETARY.replace("550.54.15", "565.57.01"), "565.57.01", True, ["ok", "warn", "warn", "warn"]),
        (OPEN, "580.95.05", True, ["ok", "ok", "ok", "ok"]),
        (OPEN, "580.95.05", False, ["ok", "warn", "ok", "warn"]),
        ("something else", "unknown", True, ["warn", "warn", "warn", "warn"]),
    ],
)
def test_drivers_never_fail_but_warn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, version: str, packages: bool, verdicts: list[str]
) -> None:
    programs(monkeypatch, {})
    monkeypatch.setattr(cuda, "bindings_installed", lambda: packages)
    file = tmp_path / "version"
    file.write_text(text)
    (tmp_path / "nvidia.yaml").write_text("kind: nvidia.com/gpu\n" if "warn" not in verdicts else "kind: x/y\n")
    assert cuda.driver_version(file) == version
    found = cuda.all_checks(SETTINGS, driver_file=file, cdi_folders=(tmp_path / "absent", tmp_path))
    assert [check.verdict for check in found] == verdicts


# --- together -------------------------------------------------------------------------------------------------


def test_a_check_that_breaks_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[Check]:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(cuda, "all_checks", broken)
    last = doctor.diagnose(SETTINGS)[-1]
    assert (last.id, last.verdict) == ("cuda.error", "fail")
    assert "ZeroDivisionError: oh" in last.found


def test_ids_are_unique_and_every_trouble_has_a_reason() -> None:
    checks = doctor.diagnose(SETTINGS)
    assert len({check.id for check in checks}) == len(checks)
    assert all(check.why and check.found for check in checks)
    json.dumps([check.as_dict() for check in checks])


def test_require_names_everything_that_failed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = [
        Check("a", "first", "fail", "found a", "why a", "mend a"),
        Check("b", "second", "warn", "found b", "why b", "mend b"),
        Check("c", "third", "fail", "found c", "why c", "mend a"),
    ]
    monkeypatch.setattr(host, "root", lambda machine: Check("host.root", "root", "ok", "", ""))
    monkeypatch.setattr(doctor, "_relevant", lambda *_: failing)
    with pytest.raises(PreflightError) as raised:
        doctor.require(SETTINGS, "create")
    error = raised.value
    assert (error.exit_code, error.cause, error.remedy) == (4, "first; third", "mend a")
    assert error.log == ("first: found a: why a", "third: found c: why c")


def test_require_says_only_that_root_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    user = host.Machine(uid=1000)
    monkeypatch.setattr(host, "Machine", lambda: user)
    with pytest.raises(PreflightError, match="gpuckpt restore must run as root"):
        doctor.require(SETTINGS, "restore")


def test_require_executes_nothing_but_criu(monkeypatch: pytest.MonkeyPatch) -> None:
    executed: list[str] = []

    def run(argv: Any, **_: object) -> proc.Result:
        executed.append(" ".join([Path(str(argv[0])).name, *argv[1:]]))
        return proc.Result(("criu",), 0, "Version: 4.2.1\n", "")

    monkeypatch.setattr(proc, "run", run)
    monkeypatch.setattr(host, "root", lambda machine: Check("host.root", "root", "ok", "", ""))
    monkeypatch.setattr(host, "capabilities", lambda machine: Check("x", "x", "fail", "x", "x"))
    with pytest.raises(PreflightError):
        doctor.require(SETTINGS, "create")
    assert set(executed) <= {"criu --version"}


# --- the command ----------------------------------------------------------------------------------------------

LONG = "mount -t tmpfs -o size=20221210624,mode=0700,uid=0,gid=0,nosuid,nodev,huge=within_size gpuckpt-store /run/x"
CHECKS = [
    Check("a.good", "good", "ok", "all right", "never shown"),
    Check("a.worse", "worse one", "warn", "found " * 20, "because " * 20, LONG),
    Check("a.bad", "bad", "fail", "broken", "it matters"),
    Check("a.none", "none", "skip", "not here", "never shown"),
]


@pytest.mark.parametrize("width", [30, 59, 80, 200])
def test_the_table_fits_and_never_breaks_a_command(width: int) -> None:
    import click

    lines = [click.unstyle(line) for line in table(CHECKS, width)]
    assert sum(line.strip() == f"mend: {LONG}" for line in lines) == 1
    assert all(len(line) <= width for line in lines if "mend:" not in line)
    assert "never shown" not in "".join(lines)
    assert [line[:4] for line in lines if line[:4].strip()] == ["ok  ", "warn", "FAIL", "skip"]


@pytest.fixture
def fake_checks(monkeypatch: pytest.MonkeyPatch) -> list[list[Check]]:
    """The answers of diagnose, one list per call; the last one stays."""
    answers: list[list[Check]] = []
    monkeypatch.setattr(doctor, "diagnose", lambda settings: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return answers


def test_exit_codes_and_json(fake_checks: list[list[Check]]) -> None:
    fake_checks.append(CHECKS)
    result = CliRunner().invoke(cli, ["doctor", "--format", "json"])
    assert result.exit_code == 4
    document = json.loads(result.stdout)
    assert (document["version"], document["ok"], "fixed" in document) == (1, False, False)
    assert document["checks"][1]["mend"] == LONG and document["checks"][1]["safe_to_fix"] is False
    fake_checks[:] = [CHECKS[:2]]
    result = CliRunner().invoke(cli, ["doctor"])
    assert result.exit_code == 0
    assert "ready: 1 ok, 1 warn" in result.stderr


def test_fix_applies_what_is_safe_and_looks_again(fake_checks: list[list[Check]]) -> None:
    done: list[str] = []

    def refuse() -> None:
        raise PreflightError("no, thank you")

    broken = [
        Check("x.safe", "safe", "warn", "off", "why", "turn it on", lambda: done.append("safe")),
        Check("x.refused", "refused", "warn", "off", "why", "try", refuse),
        Check("x.unsafe", "unsafe", "warn", "yours", "why", "think first"),
        Check("x.fine", "fine", "ok", "on", "why", None, lambda: done.append("fine")),
    ]
    fake_checks[:] = [broken, [Check("x.safe", "safe", "ok", "on", "why"), *broken[1:]]]
    result = CliRunner().invoke(cli, ["doctor", "--fix", "--format", "json"])
    assert result.exit_code == 0
    assert done == ["safe"]
    assert json.loads(result.stdout)["fixed"] == ["x.safe"]
    assert "no, thank you" in result.stderr


def test_fix_is_for_root(fake_checks: list[list[Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    fake_checks.append(CHECKS)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    result = CliRunner().invoke(cli, ["doctor", "--fix"])
    assert isinstance(result.exception, PreflightError)


def test_the_store_of_the_configuration_is_the_one_looked_at(tmp_path: Path) -> None:
    settings = Settings(store=Store(path=tmp_path / "here"))
    found = next(check for check in doctor.diagnose(settings) if check.id == "host.store")
    assert str(tmp_path / "here") in found.found


def test_the_runtime_that_was_asked_for_is_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Settings(podman=Podman(runtime="crun"))
    programs(monkeypatch, {"runc --version": RUNC, "runc features": CAPABLE})
    for check in (containers.fast_checks(wanted)[1], containers.runtime(wanted)):
        assert (check.found, check.mend) == ("no crun", "apt-get install -y crun")
