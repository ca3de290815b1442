"""Where settings come from, which source wins, and what is said when one is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from gpuckpt import config_load
from gpuckpt.cli import cli
from gpuckpt.cli.context import load_settings
from gpuckpt.config import FIELDS, Settings, parse_seconds, parse_size
from gpuckpt.config_load import Loaded, load
from gpuckpt.errors import NotFoundError, UsageError

SEED = """MODEL_ID=Qwen/Qwen2-1.5B-Instruct     # Model to checkpoint
CONT_NAME=vllm-llm-demo               # Container name
API_PORT=8000                         # API port
CHECKPOINT_DIR=/mnt/checkpoint-ram    # Storage (tmpfs)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, and no configuration of this machine's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_load, "DEFAULT_FILE", tmp_path / "etc.toml")
    for name in [name for name in os.environ if name.startswith("GPUCKPT_")]:
        monkeypatch.delenv(name)
    return tmp_path


def read(
    toml: str | None = None,
    *,
    environ: Mapping[str, str] | None = None,
    dotenv: str | bytes | None = None,
    **flags: Any,
) -> Loaded:
    file = None
    if toml is not None:
        file = Path("given.toml")
        file.write_text(toml)
    if dotenv is not None:
        Path(".env").write_bytes(dotenv.encode() if isinstance(dotenv, str) else dotenv)
    named = {key.replace("__", "."): value for key, value in flags.items()}
    return load(file, environ=environ or {}, env_file=None, flags=named)


def refused(*args: Any, **kwargs: Any) -> str:
    """Everything that is said about a wrong setting, on one line."""
    with pytest.raises(UsageError) as caught:
        read(*args, **kwargs)
    error = caught.value
    return " | ".join(filter(None, [error.message, error.cause, error.remedy, *error.log]))


def test_without_any_source_everything_is_default() -> None:
    loaded = read()
    assert loaded.settings == Settings()
    assert loaded.origins == dict.fromkeys(FIELDS, "default")


def test_each_source_beats_the_one_before(folder: Path) -> None:
    toml = '[store]\npath = "/toml"\n'
    environ = {"GPUCKPT_STORE__PATH": "/environment"}
    dotenv = "# ours\nCHECKPOINT_DIR=/dotenv\n"
    seen = [
        read(toml),
        read(toml, dotenv=dotenv),
        read(toml, dotenv=dotenv, environ=environ),
        read(toml, dotenv=dotenv, environ=environ, store__path="/flag"),
    ]
    assert [(str(one.settings.store.path), one.origins["store.path"]) for one in seen] == [
        ("/toml", f"{folder}/given.toml"),
        ("/dotenv", f"{folder}/.env:2 (CHECKPOINT_DIR)"),
        ("/environment", "environment GPUCKPT_STORE__PATH"),
        ("/flag", "flag --store-path"),
    ]


def test_the_default_file_is_read_when_none_is_given(folder: Path) -> None:
    (folder / "etc.toml").write_text("[create]\nwarmup = 7\n")
    loaded = read()
    assert (loaded.settings.create.warmup, loaded.origins["create.warmup"]) == (7, f"{folder}/etc.toml")


def test_a_given_file_must_exist(folder: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no\.toml"):
        load(Path("no.toml"), environ={}, env_file=None, flags={})
    with pytest.raises(NotFoundError, match=r"no\.env"):
        load(None, environ={}, env_file=Path("no.env"), flags={})
    with pytest.raises(UsageError, match="cannot read"):
        load(folder, environ={}, env_file=None, flags={})


def test_the_seeds_dotenv_is_read_as_it_is(folder: Path) -> None:
    loaded = read(dotenv=SEED)
    create = loaded.settings.create
    assert (create.model, create.name, create.publish) == ("Qwen/Qwen2-1.5B-Instruct", "vllm-llm-demo", "8000")
    assert loaded.settings.store.path == Path("/mnt/checkpoint-ram")
    assert loaded.origins["create.publish"] == f"{folder}/.env:3 (API_PORT)"


@pytest.mark.parametrize(
    ("line", "model"),
    [
        ("export MODEL_ID=a", "a"),
        ("  MODEL_ID = a  ", "a"),
        ("MODEL_ID='a # b' # c", "a # b"),
        ("MODEL_ID='$a'", "$a"),
        (r'MODEL_ID="a \"b\""', 'a "b"'),
        ("MODEL_ID=a#b", "a#b"),
        ("MODEL_ID=a\r", "a"),
        ("\ufeffMODEL_ID=a", "a"),
        ("MODEL_ID=a\nMODEL_ID=b", "b"),
        ("MODEL_ID= # none", None),
        ("#MODEL_ID=a", None),
        ("MY_MODEL_ID=a", None),
        ("model_id=a", None),
        ("TOKEN=$(rm -rf /)\nnonsense\n'unclosed", None),
        ('KEY="one\nMODEL_ID=a\n"', None),
    ],
)
def test_dotenv_syntax(line: str, model: str | None) -> None:
    assert read(dotenv=line + "\n").settings.create.model == model


def test_dotenv_counts_lines_over_values_of_several_lines(folder: Path) -> None:
    loaded = read(dotenv='CERT="a\nb\nc"\nMODEL_ID=m\n')
    assert loaded.origins["create.model"] == f"{folder}/.env:4 (MODEL_ID)"


@pytest.mark.parametrize("value", ["${HOME}/x", '"$HOME/x"', "$(pwd)", "`pwd`"])
def test_dotenv_variables_are_refused_not_expanded(folder: Path, value: str) -> None:
    text = refused(dotenv=f"CHECKPOINT_DIR={value}\n")
    assert "variables are not expanded" in text and f"{folder}/.env:1 (CHECKPOINT_DIR)" in text


def test_dotenv_unclosed_quote_is_refused() -> None:
    assert "quotes" in refused(dotenv="MODEL_ID='a\n")


def test_dotenv_that_everybody_may_write_is_refused_only_when_it_steers_us(folder: Path) -> None:
    file = folder / ".env"
    file.write_text("HF_TOKEN=x\n")
    file.chmod(0o666)
    assert read().settings == Settings()
    file.write_text("MODEL_ID=x\n")
    text = refused()
    assert "everybody may write it" in text and f"--env-file {file}" in text
    assert load(None, environ={}, env_file=file, flags={}).settings.create.model == "x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_dotenv_of_another_user_is_refused_unless_sudo_was_theirs(folder: Path) -> None:
    file = folder / ".env"
    file.write_text("MODEL_ID=x\n")
    os.chown(file, 12345, -1)
    assert "belongs to user 12345" in refused()
    assert "belongs to user 12345" in refused(environ={"SUDO_UID": "1000"})
    assert read(environ={"SUDO_UID": "12345"}).settings.create.model == "x"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a link away")
def test_dotenv_through_a_link_of_another_user_is_refused(folder: Path) -> None:
    (folder / "real").write_text("MODEL_ID=x\n")
    (folder / ".env").symlink_to("real")
    assert read().settings.create.model == "x"
    os.lchown(folder / ".env", 12345, -1)
    assert "belongs to user 12345" in refused()


def test_dotenv_that_is_a_folder_or_fifo_is_passed_over(folder: Path) -> None:
    (folder / ".env").mkdir()
    assert read().settings == Settings()
    (folder / ".env").rmdir()
    os.mkfifo(folder / ".env")
    assert read().settings == Settings()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12GiB", 12 << 30),
        ("8G", 8 << 30),
        ("512M", 512 << 20),
        ("8GB", 8 * 10**9),
        ("1.5k", 1536),
        ("7", 7),
        ("7B", 7),
    ],
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value
    assert read(environ={"GPUCKPT_CRIU__GHOST_LIMIT": text}).settings.criu.ghost_limit == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("30s", 30), ("5min", 300), ("500ms", 0.5), ("1h 30min", 5400), ("2m", 120), ("45", 45), ("1d", 86400)],
)
def test_durations(text: str, value: float) -> None:
    assert parse_seconds(text) == value
    assert read(environ={"GPUCKPT_PODMAN__TIMEOUT": text}).settings.podman.timeout == value


@pytest.mark.parametrize("text", ["", "G", "12XB", "-1G", "1 G x", "0x10"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="512M"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "s", "5 weeks", "-3s", "5min 30", "5Min"])
def test_no_durations(text: str) -> None:
    with pytest.raises(ValueError, match="5min"):
        parse_seconds(text)


def test_environment_lists_and_the_short_prefix() -> None:
    loaded = read(environ={"GPUCKPT_CREATE__PROMPTS": '["a", "b, c"]', "GPUCKPT_PREFIX": "/short"})
    assert loaded.settings.create.prompts == ("a", "b, c")
    assert loaded.origins["paths.prefix"] == "environment GPUCKPT_PREFIX"
    assert read(environ={"GPUCKPT_CREATE__PROMPTS": "a, b"}).settings.create.prompts == ("a", "b")
    both = read(environ={"GPUCKPT_PATHS__PREFIX": "/long", "GPUCKPT_PREFIX": "/short"})
    assert both.settings.paths.prefix == Path("/long")


def test_environment_empty_and_foreign_variables_do_not_count() -> None:
    environ = {"GPUCKPT_STORE__PATH": "", "GPUCKPT_CONFIG": "x", "MODEL_ID": "x", "STORE__PATH": "/x"}
    assert read(environ=environ).origins == dict.fromkeys(FIELDS, "default")


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"GPUCKPT_STORE__PTH": "/x"}, "did you mean GPUCKPT_STORE__PATH?"),
        ({"GPUCKPT_store__path": "/x"}, "did you mean GPUCKPT_STORE__PATH?"),
        ({"GPUCKPT_STORE__WARMUP": "1"}, "did you mean GPUCKPT_CREATE__WARMUP?"),
        ({"GPUCKPT_CREATE__WARMUP": "many"}, 'create.warmup cannot be "many" (environment GPUCKPT_CREATE__WARMUP)'),
        ({"GPUCKPT_CREATE__PROMPTS": '["a'}, "GPUCKPT_CREATE__PROMPTS=one,two"),
    ],
)
def test_environment_refused(environ: dict[str, str], expected: str) -> None:
    assert expected in refused(environ=environ)


@pytest.mark.parametrize(
    ("toml", "expected"),
    [
        ("[store]\npath = \n", "not valid TOML | Invalid value (at line 2"),
        ('[stor]\npath = "/x"\n', "unknown setting stor ({file}:1) | did you mean store?"),
        ('[store]\n\npth = "/x"\n', "unknown setting store.pth ({file}:3) | did you mean store.path?"),
        ("[store]\nwarmup = 3\n", "did you mean create.warmup?"),
        ("warmup = 3\n", "did you mean create.warmup?"),
        ("zzz = 3\n", "the tables are paths, store, criu, podman, create"),
        ('store = "x"\n', "store must be a table ({file}:1) | begin it with [store]"),
        (
            '[store]\nhuge = "now"\n',
            "store.huge cannot be \"now\" ({file}:2) | it must be 'never', 'always', 'within_size' or",
        ),
        ('x = """\n[store]\nsize = 1\n"""\n', "unknown setting x ({file}:4)"),
        ("[create]\nwarmup = -1\n", "create.warmup cannot be -1 ({file}:2) | it must be greater than or equal to 0"),
        ('[store]\nsize = "12XB"\n', "12GiB"),
        ("[store]\nsize = 0\n", "must be greater than 0"),
        ('[store]\npath = "/a\\u0000b"\n', "NUL"),
        ('[paths]\nstate = "/a b"\n', "must not hold blanks or #"),
        ('[paths]\nrun = "/a#b"\n', "must not hold blanks or #"),
        (f"[store]\nsize = '{'9' * 400}.5G'\n", "a size that a machine can have"),
        ("[podman]\ntimeout = 99999999999999999999\n", "must be less than or equal to 31536000"),
        (f"a = {'[' * 50_000}\n", "nested too deeply"),
        ("#" * (1 << 20) + "\n", "larger than 1024 KiB"),
        ('[store]\npath = "a/b"\n', "must be an absolute path"),
        ("[podman]\ntimeout = inf\n", "must be less than or equal to 31536000"),
        ("[create]\nwarmup = true\n", "must not be true or false"),
        ('[create]\nprompts = "abc"\n', "must be a list"),
        ('[create]\nprompts = ["a", ""]\n', "must not be empty"),
        ('[create]\nname = "../x"\n', "must begin with a letter or digit"),
        ('[create]\nname = "x\\n"\n', "must begin with a letter or digit"),
        ("[create]\npublish = 99999\n", "must have ports from 1 to 65535"),
        ('[create]\npublish = "300.1.1.1:80"\n', "does not appear to be an IPv4"),
        ('[create]\npublish = "localhost:80"\n', "for example 8000"),
    ],
)
def test_file_refused(folder: Path, toml: str, expected: str) -> None:
    assert expected.format(file=folder / "given.toml") in refused(toml)


def test_every_wrong_value_is_told_at_once() -> None:
    text = refused('[store]\nsize = "x"\nhuge = "y"\n[create]\nwarmup = -1\n')
    assert all(key in text for key in ("store.size", "store.huge", "create.warmup"))


def test_a_value_that_is_not_utf8_can_still_be_reported() -> None:
    refused(dotenv=b"CONT_NAME=\xff\n").encode()


@pytest.mark.parametrize("value", ["8000", "8000:80", "127.0.0.1:8000", "127.0.0.1:8000:80", "[::1]:8000:80"])
def test_published_ports(value: str) -> None:
    assert read(create__publish=value).settings.create.publish == value


def test_relative_paths_of_flags_are_the_users(folder: Path) -> None:
    assert read(store__path="here").settings.store.path == folder / "here"
    assert read(criu__path=Path("criu")).settings.criu.path == folder / "criu"


def test_flags_not_given_do_not_hide_the_file() -> None:
    loaded = read("[create]\nwarmup = 7\n", create__warmup=None, create__prompts=())
    assert (loaded.settings.create.warmup, loaded.origins["create.prompts"]) == (7, "default")


def _probe(*args: str) -> Loaded:
    """What a command with a few options gets from its context."""
    got: list[Loaded] = []

    @click.command()
    @click.option("--name", "-n")
    @click.option("--warmup", default=3)
    @click.pass_context
    def command(ctx: click.Context, name: str | None, warmup: int) -> None:
        got.append(load_settings(ctx, create__name=name, create__warmup=warmup))

    command.main(list(args), standalone_mode=False, obj={"config_file": None})
    return got[0]


def test_context_calls_flags_what_the_user_called_them(folder: Path) -> None:
    (folder / "etc.toml").write_text("[create]\nwarmup = 7\n")
    loaded = _probe("-n", "golden")
    assert loaded.origins["create.name"] == "flag --name"
    assert loaded.settings.create.warmup == 7, "an option's own default must not hide the file"
    assert _probe("--warmup", "3").origins["create.warmup"] == "flag --warmup"


def test_show_json_is_the_contract(folder: Path) -> None:
    (folder / ".env").write_text(SEED)
    done = CliRunner().invoke(cli, ["config", "show", "--format", "json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert list(document) == ["version", "settings", "origins"]
    assert document["version"] == 1
    assert document["settings"]["store"]["path"] == "/mnt/checkpoint-ram"
    assert document["origins"]["store.path"] == f"{folder}/.env:4 (CHECKPOINT_DIR)"
    assert list(document["origins"]) == list(FIELDS)


def test_show_table_keeps_brackets_and_tells_origins() -> None:
    environ = {"GPUCKPT_CREATE__PUBLISH": "[::1]:8000:8000"}
    plain = CliRunner().invoke(cli, ["config", "show"], env=environ, catch_exceptions=False).stdout
    assert "[::1]:8000:8000" in plain and "ORIGIN" not in plain and "1.0 GiB" in plain
    full = CliRunner().invoke(cli, ["config", "show", "--origin"], env=environ, catch_exceptions=False).stdout
    assert "environment GPUCKPT_CREATE__PUBLISH" in full


def test_root_options_choose_the_files(folder: Path) -> None:
    (folder / "a.toml").write_text("[create]\nwarmup = 9\n")
    (folder / "a.env").write_text("MODEL_ID=m\n")
    args = ["--config", "a.toml", "--env-file", "a.env", "config", "show", "--format", "json"]
    settings = json.loads(CliRunner().invoke(cli, args, catch_exceptions=False).stdout)["settings"]["create"]
    assert (settings["warmup"], settings["model"]) == (9, "m")


def test_path_says_whether_the_file_is_there(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["config", "path"])
    assert done.stdout == f"{folder}/etc.toml\n" and "does not exist" in done.stderr
    (folder / "etc.toml").touch()
    assert CliRunner().invoke(cli, ["config", "path"]).stderr == ""
