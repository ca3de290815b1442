"""The derivation of the seccomp profile: io_uring answers ENOSYS, and nothing else changes."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from seccomp import derive

Profile = dict[str, Any]
Rule = dict[str, Any]


def profile(*rules: Rule, **more: Any) -> Profile:
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.EPERM, **more, "syscalls": list(rules)}


def rule(*names: str, action: str = "SCMP_ACT_ALLOW", **more: Any) -> Rule:
    return {"names": list(names), "action": action, "args": [], "includes": {}, "excludes": {}, **more}


def assert_io_uring_answers_enosys(derived: Profile) -> None:
    """Exactly one rule names the three calls, names nothing else, and holds without conditions."""
    about = [entry for entry in derived["syscalls"] if set(entry.get("names", ())) & set(derive.IO_URING)]
    assert len(about) == 1
    assert sorted(about[0]["names"]) == sorted(derive.IO_URING)
    assert about[0]["action"] == "SCMP_ACT_ERRNO"
    assert about[0]["errnoRet"] == errno.ENOSYS
    assert not any(about[0][condition] for condition in ("args", "includes", "excludes"))


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        pytest.param([rule("read", "io_uring_setup", "write")], [rule("read", "write")], id="in an allow list"),
        pytest.param([rule("read")], [rule("read")], id="absent"),
        pytest.param([rule(*derive.IO_URING)], [], id="a rule of their own disappears"),
        pytest.param(
            [rule("io_uring_setup", args=[{"index": 1, "value": 0, "valueTwo": 0, "op": "SCMP_CMP_EQ"}]), rule("read")],
            [rule("read")],
            id="on an argument",
        ),
        pytest.param(
            [
                rule("bpf", "io_uring_enter", includes={"caps": ["CAP_SYS_ADMIN"]}),
                rule(
                    "bpf", "io_uring_enter", action="SCMP_ACT_ERRNO", errnoRet=1, excludes={"caps": ["CAP_SYS_ADMIN"]}
                ),
            ],
            [
                rule("bpf", includes={"caps": ["CAP_SYS_ADMIN"]}),
                rule("bpf", action="SCMP_ACT_ERRNO", errnoRet=1, excludes={"caps": ["CAP_SYS_ADMIN"]}),
            ],
            id="on a capability",
        ),
        pytest.param(
            [rule("io_uring_register", "s390_runtime_instr", includes={"arches": ["s390x"]})],
            [rule("s390_runtime_instr", includes={"arches": ["s390x"]})],
            id="on an architecture",
        ),
        pytest.param(
            [{"name": "io_uring_setup", "action": "SCMP_ACT_ALLOW"}, {"name": "read", "action": "SCMP_ACT_ALLOW"}],
            [{"name": "read", "action": "SCMP_ACT_ALLOW"}],
            id="the older format",
        ),
    ],
)
def test_only_io_uring_is_taken_out(rules: list[Rule], left: list[Rule]) -> None:
    derived = derive.derive(profile(*rules))
    assert derived["syscalls"][:-1] == left
    assert_io_uring_answers_enosys(derived)


def test_the_committed_profile_is_a_derivation() -> None:
    text = derive.DERIVED_PROFILE.read_text(encoding="utf-8")
    committed = json.loads(text)
    assert derive.render(derive.derive(committed)) == text
    assert_io_uring_answers_enosys(committed)


def test_the_committed_profile_for_mapped_memory_is_a_derivation() -> None:
    text = derive.MAPPED_PROFILE.read_text(encoding="utf-8")
    committed = json.loads(text)
    assert derive.render(derive.derive_mapped(committed)) == text
    ordinary = json.loads(derive.DERIVED_PROFILE.read_text(encoding="utf-8"))
    assert derive.differing_syscalls(ordinary, committed) == ["madvise", "mremap", "process_madvise"]
    assert [(entry["action"], entry["errno"], entry["args"]) for entry in rules_about("mremap", committed)] == [
        ("SCMP_ACT_ERRNO", "ENOMEM", [])
    ]
    refused = {
        entry["args"][0]["value"]
        for entry in rules_about("madvise", committed)
        if entry["action"] == "SCMP_ACT_ERRNO" and entry["errno"] == "EINVAL"
    }
    assert refused == {4, 24, 102}


def rules_about(call: str, of: Profile) -> list[Rule]:
    return [entry for entry in of["syscalls"] if call in entry["names"]]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, list[str]]:
    source, output = tmp_path / "source.json", tmp_path / "derived.json"
    source.write_text(json.dumps(profile(rule("read", "io_uring_setup"))))
    return source, output, ["--source", str(source), "--output", str(output)]


def test_check_passes_on_what_was_just_written(files: tuple[Path, Path, list[str]]) -> None:
    _, output, arguments = files
    assert derive.main(arguments) == 0
    first = output.read_bytes()
    assert derive.main([*arguments, "--check"]) == 0
    assert derive.main(arguments) == 0
    assert output.read_bytes() == first


def test_check_names_what_differs(files: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    source, output, arguments = files
    assert derive.main(arguments) == 0
    before = output.read_bytes()
    source.write_text(
        json.dumps(profile(rule("read", "mseal"), rule("bpf", action="SCMP_ACT_LOG"), defaultErrnoRet=38))
    )
    assert derive.main([*arguments, "--check"]) == 1
    said = capsys.readouterr().err
    assert "system calls: bpf, mseal\n" in said
    assert "settings: defaultErrnoRet\n" in said
    assert output.read_bytes() == before, "--check writes nothing"


def test_check_tells_layout_from_meaning(
    files: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, output, arguments = files
    assert derive.main(arguments) == 0
    output.write_text(json.dumps(json.loads(output.read_text())))
    assert derive.main([*arguments, "--check"]) == 1
    assert "only in layout" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"defaultAction": "SCMP_ACT_ERRNO"}', '{"defaultAction": "", "syscalls": [1]}']
)
def test_a_source_that_is_no_profile_is_refused(
    text: str, files: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    source, output, arguments = files
    source.write_text(text)
    assert derive.main(arguments) == 2
    assert str(source) in capsys.readouterr().err
    assert not output.exists()


def test_a_missing_file_is_named(files: tuple[Path, Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    _, output, arguments = files
    assert derive.main([*arguments, "--check"]) == 2
    assert str(output) in capsys.readouterr().err
