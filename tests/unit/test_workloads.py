"""Adapters: what they start, what they ask of a server, and what they make of its answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpuckpt.errors import (
    DaemonUnreachableError,
    DeadlineError,
    GpuckptError,
    InterruptedByUser,
    NotFoundError,
    UsageError,
    VerificationError,
)
from gpuckpt.manifest import Mount, Request, Workload
from gpuckpt.workload import adapter
from gpuckpt.workload.base import SOCKET_INSIDE, Accelerator, LaunchLine
from gpuckpt.workload.endpoint import Endpoint, RequestFailed
from gpuckpt.workload.guest import GUEST_FOLDER, guest_mount, present
from gpuckpt.workload.http import Http
from gpuckpt.workload.session_guest import Guest
from gpuckpt.workload.vllm import Vllm
from tests.fakes import Asked, UnixServer, response

Answer = Callable[[Asked], bytes | None]


@contextmanager
def served(tmp_path: Path, *answers: bytes | Answer) -> Iterator[tuple[Endpoint, list[Asked]]]:
    """A server that gives these answers one after the other, the last one for ever."""
    left = list(answers)

    def answer(asked: Asked) -> bytes | None:
        current = left.pop(0) if len(left) > 1 else left[0]
        return current(asked) if callable(current) else current

    with UnixServer(tmp_path / "server.sock", answer) as server:
        yield Endpoint(socket=server.path), server.asked


def events(*pieces: dict[str, Any] | str, done: bool = True) -> bytes:
    """A streamed answer as OpenAI's protocol has it, ended by closing the connection."""
    lines = [f"data: {piece if isinstance(piece, str) else json.dumps(piece)}\n\n" for piece in pieces]
    lines += ["data: [DONE]\n\n"] if done else []
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + "".join(lines).encode()


def tokens(*pairs: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"choices": [{"logprobs": {"tokens": [text], "token_logprobs": [value]}}]} for text, value in pairs]


FOX = tokens((" jumps", -0.5), (" over", -0.25))

# --- endpoints ------------------------------------------------------------------------------------------------


def test_requests_and_answers(tmp_path: Path) -> None:
    with served(tmp_path, response(404, "nothing here")) as (endpoint, asked):
        answer = endpoint.request("POST", "/path", '{"a": 1}')
    assert (answer.status, answer.body) == (404, b"nothing here")
    assert (asked[0].method, asked[0].path, asked[0].json) == ("POST", "/path", {"a": 1})
    assert asked[0].headers["content-type"] == "application/json" and asked[0].headers["connection"] == "close"


def test_a_stream_is_read_as_it_comes(tmp_path: Path) -> None:
    with served(tmp_path, events({"n": 1}, {"n": 2})) as (endpoint, asked):
        found = list(endpoint.stream("POST", "/x", {"stream": True}))
    assert [event for _, event in found] == [{"n": 1}, {"n": 2}]
    assert found[0][0] <= found[1][0]
    assert asked[0].json == {"stream": True}


def test_a_stream_that_is_left_early_is_closed(tmp_path: Path) -> None:
    with served(tmp_path, events({"n": 1}, {"n": 2})) as (endpoint, _):
        stream = endpoint.stream("POST", "/x", {})
        assert next(stream)[1] == {"n": 1}
        stream.close()


def test_an_error_status_of_a_stream_shows_the_answer(tmp_path: Path) -> None:
    with served(tmp_path, response(400, "no such model")) as (endpoint, _):
        with pytest.raises(RequestFailed) as caught:
            list(endpoint.stream("POST", "/x", {}))
        assert (caught.value.status, caught.value.cause) == (400, "no such model")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        events({"n": 1}, done=False),
        b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\ndata: {}\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\ndata",
        events("{not json"),
    ],
    ids=["nothing", "garbage", "no end", "short", "short chunk", "no json"],
)
def test_a_stream_that_breaks_off_or_makes_no_sense(tmp_path: Path, data: bytes) -> None:
    with served(tmp_path, data) as (endpoint, _), pytest.raises(DaemonUnreachableError) as caught:
        list(endpoint.stream("POST", "/x", {}))
    assert str(endpoint.socket) in caught.value.message


def test_nobody_listens(tmp_path: Path) -> None:
    for endpoint in (Endpoint(socket=tmp_path / "absent"), Endpoint(host="127.0.0.1", port=1)):
        with pytest.raises(DaemonUnreachableError):
            endpoint.request("GET", "/")
        assert not Http(Workload(kind="http")).healthy(endpoint)
        assert not Vllm(Workload(kind="vllm")).healthy(endpoint)


def test_a_server_that_says_nothing(tmp_path: Path) -> None:
    with served(tmp_path, lambda asked: None) as (endpoint, _), pytest.raises(DaemonUnreachableError):
        endpoint.request("GET", "/", timeout=0.05)


def test_an_interrupt_is_not_taken_for_an_ill_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during a health check must end the command, not count as “not yet”."""

    def interrupted(*_: object, **__: object) -> None:
        raise InterruptedByUser("interrupted")

    monkeypatch.setattr(Endpoint, "request", interrupted)
    for one in (Http(Workload(kind="http")), Vllm(Workload(kind="vllm"))):
        with pytest.raises(InterruptedByUser):
            one.healthy(Endpoint(port=1))


def test_endpoints_say_where_they_are() -> None:
    assert str(Endpoint(socket=Path("/x"))) == "unix:/x"
    assert str(Endpoint(host="10.0.0.1", port=80)) == "http://10.0.0.1:80"


# --- any HTTP server ------------------------------------------------------------------------------------------

SITE = Http(Workload(kind="http", health_path="/up", canary_request=Request(method="POST", path="/ask", body="{}")))


def test_a_record_gives_its_adapter_again() -> None:
    assert isinstance(adapter(SITE.record), Http)
    assert isinstance(adapter(Workload(kind="vllm")), Vllm)
    assert adapter(SITE.record).record == SITE.record


def test_the_socket_is_put_into_the_arguments() -> None:
    line = SITE.launch(["serve", "--uds={socket}", "{x}"], port=None, python=None)
    assert line.argv == ("serve", f"--uds={SOCKET_INSIDE}", "{x}")
    assert line.env["GPUCKPT_SOCKET"] == SOCKET_INSIDE and "PORT" not in line.env


def test_the_port_is_put_into_the_arguments() -> None:
    line = SITE.launch(["serve", "{port}"], port=8000, python=None)
    assert line.argv == ("serve", "8000") and line.env["PORT"] == "8000"


@pytest.mark.parametrize("arguments", [[], ["serve", "{port}"]])
def test_arguments_that_cannot_work(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        SITE.launch(arguments, port=None, python=None)


@pytest.mark.parametrize(("status", "well"), [(200, True), (204, True), (301, False), (404, False), (503, False)])
def test_health_is_a_good_status(tmp_path: Path, status: int, well: bool) -> None:
    with served(tmp_path, response(status)) as (endpoint, asked):
        assert SITE.healthy(endpoint) is well
    assert asked[0].path == "/up"


def test_warm_up_takes_turns(tmp_path: Path) -> None:
    requests = (Request(method="GET", path="/a"), Request(method="GET", path="/b"))
    with served(tmp_path, response(200)) as (endpoint, asked):
        Http(Workload(kind="http", warmup_requests=requests)).warm_up(endpoint, 3, ())
        SITE.warm_up(endpoint, 1, ())
    assert [one.path for one in asked] == ["/a", "/b", "/a", "/ask"]


def test_a_canary_that_repeats(tmp_path: Path) -> None:
    with served(tmp_path, response(200, "42")) as (endpoint, asked):
        canary = SITE.record_canary(endpoint)
        replay = SITE.replay(endpoint, canary)
        assert SITE.first_token(endpoint) > replay.first_token_ns > 0
    assert replay.differences == ()
    assert {(one.method, one.path, one.body) for one in asked} == {("POST", "/ask", b"{}")}


def test_a_canary_that_does_not_repeat(tmp_path: Path) -> None:
    with served(tmp_path, response(200, "1"), response(200, "2")) as (endpoint, _), pytest.raises(VerificationError):
        SITE.record_canary(endpoint)


def test_a_canary_that_fails(tmp_path: Path) -> None:
    with served(tmp_path, response(500, "broken")) as (endpoint, _), pytest.raises(RequestFailed):
        SITE.record_canary(endpoint)


def test_a_replay_names_its_differences(tmp_path: Path) -> None:
    with served(tmp_path, response(200, "42"), response(200, "42"), response(500, "43")) as (endpoint, _):
        different = SITE.replay(endpoint, SITE.record_canary(endpoint)).differences
    assert different == (
        "the status is 500, 200 was recorded",
        "the body differs from the recorded one; it begins b'43'",
    )


# --- vLLM: the launch line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "default", "model", "served_name"),
    [
        (["--model", "a/b"], None, "a/b", "gold"),
        (["--model=a/b", "--served-model-name", "m"], None, "a/b", "m"),
        (["a/b", "--served-model-name=m"], None, "a/b", "m"),
        ([], "c/d", "c/d", "gold"),
        (["--max-model-len", "9"], "c/d", "c/d", "gold"),
        (["--model", "a/b"], "c/d", "a/b", "gold"),
    ],
)
def test_the_model_is_found(arguments: list[str], default: str | None, model: str, served_name: str) -> None:
    record = Vllm.from_arguments(arguments, model=default, name="gold").record
    assert (record.kind, record.model, record.served_name) == ("vllm", model, served_name)


@pytest.mark.parametrize("arguments", [[], ["--max-model-len", "9"], ["--model"]])
def test_no_model(arguments: list[str]) -> None:
    with pytest.raises(UsageError, match="no model"):
        Vllm.from_arguments(arguments, model=None, name="gold")


def launched(arguments: list[str], *, port: int | None = None, model: str | None = None) -> list[str]:
    made = Vllm.from_arguments(arguments, model=model, name="gold")
    return list(made.launch(arguments, port=port, python=Path("/venv/python")).argv)


def test_the_launch_line() -> None:
    line = launched(["--model", "a/b", "--max-model-len", "9"])
    assert line[:3] == ["/venv/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert line[line.index("--uds") + 1] == SOCKET_INSIDE and "--port" not in line
    assert line.count("--model") == 1 and line[line.index("--model") + 1] == "a/b"
    assert line[line.index("--served-model-name") + 1] == "gold"
    assert "--enforce-eager" in line
    assert line[-2:] == ["--max-model-len", "9"], "what the user gives comes last and wins"


def test_the_launch_line_with_a_port() -> None:
    line = launched(["--model", "a/b"], port=8000)
    assert line[line.index("--port") + 1] == "8000" and "--uds" not in line


@pytest.mark.parametrize(
    ("arguments", "rest"),
    [
        (["--model=a/b", "--x"], ["--x"]),
        (["a/b", "--x"], ["--x"]),
        (["--x", "--model", "a/b", "--y"], ["--x", "--y"]),
        (["--x", "--model", "a/b", "--served-model-name", "m"], ["--x", "--served-model-name", "m"]),
    ],
)
def test_the_model_is_named_once(arguments: list[str], rest: list[str]) -> None:
    line = launched(arguments)
    assert sum(word == "--model" or word.startswith("--model=") for word in line) == 1
    assert sum(word.startswith("--served-model-name") for word in line) == 1
    assert line[-len(rest) :] == rest


GPU = Accelerator(gpu=True)


def line_on(on: Accelerator, *arguments: str) -> LaunchLine:
    return Vllm(Workload(kind="vllm", model="a/b")).launch(arguments, port=None, python=None, on=on)


def test_processors_are_as_ever() -> None:
    assert line_on(Accelerator()) == line_on(Accelerator(graphs=True))
    assert not {"OMP_NUM_THREADS", "NCCL_IB_DISABLE"} & set(line_on(Accelerator()).env)


def test_threads_that_wait_for_work_leave_the_cores_to_other_replicas(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    lines = [line_on(Accelerator()), line_on(GPU)]
    lines.append(Guest(Workload(kind="guest", model=str(tmp_path))).launch((), port=None, python=None))
    assert {line.env["GOMP_SPINCOUNT"] for line in lines} == {"20000"}


def test_on_a_gpu_it_is_eager_unless_graphs_are_asked_for() -> None:
    eager, graphs = line_on(GPU), line_on(Accelerator(gpu=True, graphs=True))
    assert "--enforce-eager" in eager.argv and "--compilation-config" not in eager.argv
    assert "--enforce-eager" not in graphs.argv
    chosen = json.loads(graphs.argv[graphs.argv.index("--compilation-config") + 1])
    assert chosen == {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, "nothing that needs the compiler"
    for line in (eager, graphs):
        assert line.env["TORCHINDUCTOR_COMPILE_THREADS"] == line.env["OMP_NUM_THREADS"] == "1"
        assert line.env["TORCHDYNAMO_DISABLE"] == "1"


@pytest.mark.parametrize("outside", [False, True])
def test_what_is_given_back_takes_sleep_mode_and_an_extension_of_the_workers(outside: bool) -> None:
    """Weights, or, where these stay in the image, caches."""
    argv = line_on(Accelerator(gpu=True, outside=outside), "--max-model-len", "9").argv
    assert argv.count("--enable-sleep-mode") == argv.count("--worker-extension-cls") == 1
    assert "--enable-sleep-mode" not in line_on(Accelerator()).argv
    extension = argv[argv.index("--worker-extension-cls") + 1]
    module, _, name = extension.rpartition(".")
    assert f"class {name}" in (Path(guest_mount().source) / f"{module.replace('.', '/')}.py").read_text()
    assert argv[-2:] == ("--max-model-len", "9"), "what the user gives comes last and wins"


def test_on_processors_there_is_no_sleep_mode() -> None:
    with pytest.raises(UsageError, match="processors"):
        line_on(Accelerator(outside=True))


@pytest.mark.parametrize(
    ("on", "arguments", "has", "lacks"),
    [
        (Accelerator(), (), (), ("--device", "--weights-outside")),
        (GPU, (), ("--device", "cuda"), ("--weights-outside",)),
        (GPU, ("--device", "cuda:1"), ("cuda:1",), ("cuda",)),
        (GPU, ("--device=cuda:1",), ("--device=cuda:1",), ("cuda", "--device")),
        (Accelerator(outside=True), (), ("--weights-outside",), ("--device",)),
        (Accelerator(gpu=True, outside=True, graphs=True), (), ("--weights-outside", "cuda"), ()),
    ],
)
def test_the_guest_s_launch_line(
    on: Accelerator, arguments: tuple[str, ...], has: tuple[str, ...], lacks: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    made = Guest(Workload(kind="guest", model=str(tmp_path)))
    argv = made.launch(arguments, port=None, python=None, on=on).argv
    assert set(has) <= set(argv) and not set(lacks) & set(argv)
    assert argv[len(argv) - len(arguments) :] == arguments


def test_a_model_s_folder_is_mounted_at_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to("model")
    model = str(tmp_path / "link")
    line = Vllm.from_arguments([], model=model, name="gold").launch([], port=None, python=None)
    _, mount = line.mounts
    assert mount.source == mount.destination == str(tmp_path / "model") and mount.read_only
    assert line.argv[line.argv.index("--model") + 1] == str(tmp_path / "model")
    assert line.env["HF_HUB_OFFLINE"] == "1"
    assert line.argv[0] == "python3"


def test_a_model_s_folder_that_is_none(tmp_path: Path) -> None:
    for model in (tmp_path / "absent", tmp_path):
        with pytest.raises(NotFoundError, match="no model at"):
            launched([], model=str(model))


# --- the guest's code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        SITE.launch(["serve"], port=None, python=None),
        Vllm(Workload(kind="vllm", model="a/b")).launch([], port=None, python=None),
    ],
    ids=["http", "vllm"],
)
def test_every_server_sees_the_guest_s_code(line: LaunchLine) -> None:
    (mount,) = line.mounts
    assert mount.read_only and mount.destination == GUEST_FOLDER == line.env["PYTHONPATH"]
    assert (Path(mount.source) / "gpuckpt_guest" / "lifecycle.py").is_file()
    assert (Path(mount.source) / "gpuckpt_guest.dist-info" / "entry_points.txt").is_file()
    assert "VLLM_PLUGINS" not in line.env, "unset, all plugins are loaded"


def test_a_golden_s_mount_of_it_is_where_this_installation_is() -> None:
    old = Mount(source="/somewhere/else", destination=GUEST_FOLDER)
    assert present(old) == guest_mount() != old
    model = Mount(source="/model", destination="/model")
    assert present(model) == model


@pytest.mark.parametrize(
    ("image", "user", "path"),
    [
        ({}, {}, "/opt/gpuckpt-guest"),
        ({}, {"PYTHONPATH": "/a:/b"}, "/opt/gpuckpt-guest:/a:/b"),
        ({"PYTHONPATH": "/image"}, {}, "/opt/gpuckpt-guest:/image"),
        ({"PYTHONPATH": "/image"}, {"PYTHONPATH": "/a"}, "/opt/gpuckpt-guest:/a"),
        ({"PYTHONPATH": "/image"}, {"PYTHONPATH": ""}, "/opt/gpuckpt-guest"),
        ({}, {"PYTHONPATH": "/a:/opt/gpuckpt-guest"}, "/opt/gpuckpt-guest:/a"),
    ],
)
def test_python_s_path_is_joined(image: dict[str, str], user: dict[str, str], path: str) -> None:
    line = SITE.launch(["serve"], port=None, python=None)
    assert line.environment(image, user)["PYTHONPATH"] == path


@pytest.mark.parametrize(
    ("image", "user", "plugins"),
    [
        ({}, {}, None),
        ({}, {"VLLM_PLUGINS": "mine"}, "mine,gpuckpt"),
        ({"VLLM_PLUGINS": "a,b"}, {}, "a,b,gpuckpt"),
        ({}, {"VLLM_PLUGINS": ""}, "gpuckpt"),
        ({}, {"VLLM_PLUGINS": "gpuckpt,mine"}, "gpuckpt,mine"),
    ],
)
def test_our_plugin_is_among_those_that_are_chosen(
    image: dict[str, str], user: dict[str, str], plugins: str | None
) -> None:
    line = Vllm(Workload(kind="vllm", model="a/b")).launch([], port=None, python=None)
    assert line.environment(image, user).get("VLLM_PLUGINS") == plugins


def test_whose_value_wins() -> None:
    line = LaunchLine(("serve",), {"A": "ours", "B": "ours"})
    image = {"A": "image", "B": "image", "C": "image", "PYTHONPATH": "/image"}
    assert line.environment(image, {"B": "user"}) == {"A": "ours", "B": "user", "C": "image", "PYTHONPATH": "/image"}


# --- vLLM: requests -------------------------------------------------------------------------------------------

MODEL = Vllm(Workload(kind="vllm", model="a/b", served_name="gold"))


def test_the_first_token_is_timed(tmp_path: Path) -> None:
    with served(tmp_path, events({"choices": []}, *FOX)) as (endpoint, asked):
        assert MODEL.first_token(endpoint) > 0
    assert asked[0].json["max_tokens"] == 1 and asked[0].json["stream"] is True


def test_no_token_at_all(tmp_path: Path) -> None:
    with served(tmp_path, events()) as (endpoint, _), pytest.raises(VerificationError):
        MODEL.first_token(endpoint)


def test_the_canary_is_greedy_and_exact(tmp_path: Path) -> None:
    with served(tmp_path, events(*FOX)) as (endpoint, asked):
        canary = MODEL.record_canary(endpoint)
        assert MODEL.replay(endpoint, canary).differences == ()
    assert canary.tokens == (" jumps", " over") and canary.logprobs == (-0.5, -0.25)
    assert len(asked) == 3 and len({one.body for one in asked}) == 1
    assert asked[0].json["temperature"] == 0 and asked[0].json["logprobs"] == 1


def test_the_canary_settles(tmp_path: Path) -> None:
    cold = events(*tokens((" jumps", -0.5000001), (" over", -0.25)))
    with served(tmp_path, cold, events(*FOX)) as (endpoint, asked):
        assert MODEL.record_canary(endpoint).logprobs == (-0.5, -0.25)
    assert len(asked) == 3


def test_a_canary_that_never_repeats(tmp_path: Path) -> None:
    answers = [events(*tokens((" jumps", -0.1 * index))) for index in range(5)]
    with served(tmp_path, *answers) as (endpoint, asked), pytest.raises(VerificationError, match="differ"):
        MODEL.record_canary(endpoint)
    assert len(asked) == 4


@pytest.mark.parametrize(
    ("answer", "differences"),
    [
        (tokens((" jumps", -0.5), (" under", -0.25)), ("token 1 is ' under', ' over' was recorded",)),
        (
            tokens((" jumps", -0.5), (" over", -0.25000000000000006)),
            ("logprob 1 is -0.25000000000000006, -0.25 was recorded",),
        ),
        (FOX[:1], ("1 tokens came, 2 were recorded",)),
        ([*FOX, *FOX[:1]], ("3 tokens came, 2 were recorded",)),
        ([], ("0 tokens came, 2 were recorded",)),
    ],
)
def test_a_replay_of_tokens_names_its_differences(
    tmp_path: Path, answer: list[dict[str, Any]], differences: tuple[str, ...]
) -> None:
    with served(tmp_path, events(*FOX), events(*FOX), events(*answer)) as (endpoint, _):
        assert MODEL.replay(endpoint, MODEL.record_canary(endpoint)).differences == differences


def test_a_server_that_fails_in_the_middle_of_the_canary(tmp_path: Path) -> None:
    with served(tmp_path, events(FOX[0], {"error": {"message": "engine died"}})) as (endpoint, _):
        with pytest.raises(VerificationError) as caught:
            MODEL.record_canary(endpoint)
        assert "engine died" in str(caught.value.cause)


def test_a_connection_that_breaks_in_the_middle_of_the_canary(tmp_path: Path) -> None:
    with served(tmp_path, events(FOX[0], done=False)) as (endpoint, _), pytest.raises(DaemonUnreachableError):
        MODEL.record_canary(endpoint)


@pytest.mark.parametrize("chat", [True, False])
def test_warm_up_covers_the_request_path(tmp_path: Path, chat: bool) -> None:
    def answer(asked: Asked) -> bytes:
        if "stream" not in asked.json:
            return response(200 if chat else 400)
        return events(*FOX)

    with served(tmp_path, answer) as (endpoint, asked):
        MODEL.warm_up(endpoint, 3, ["a", "b"])
    made = [one for one in asked if "stream" in one.json]
    assert [one.path.rpartition("/")[2] for one in made] == ["completions"] * 3
    assert [one.json.get("prompt") for one in made] == ["a", "b", None if chat else "a"]
    assert len({one.json["temperature"] for one in made}) == 2


def test_no_warm_up_asks_nothing(tmp_path: Path) -> None:
    with served(tmp_path, response(500)) as (endpoint, asked):
        MODEL.warm_up(endpoint, 0, [])
    assert asked == []


def metrics(running: float, waiting: float) -> bytes:
    return response(
        200,
        "# HELP vllm:num_requests_running number\n"
        f'vllm:num_requests_running{{engine="0",model_name="m"}} {running}\n'
        f"vllm:num_requests_waiting {waiting}\n"
        "vllm:num_requests_total 99\n",
    )


def test_quiesce_waits_until_nothing_runs(tmp_path: Path) -> None:
    with served(tmp_path, metrics(1.0, 0.0), metrics(0.0, 2.0), metrics(0.0, 0.0)) as (endpoint, asked):
        MODEL.quiesce(endpoint, timeout=60)
    assert len(asked) == 3


def test_a_server_that_is_never_quiet(tmp_path: Path) -> None:
    with served(tmp_path, metrics(1.0, 2.0)) as (endpoint, _), pytest.raises(DeadlineError, match="3 requests"):
        MODEL.quiesce(endpoint, timeout=0.01)


def test_errors_of_a_server_are_of_the_tree() -> None:
    assert issubclass(RequestFailed, GpuckptError)
