"""The warm pool as its users see it: the real daemon, real containers, real clients."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.integration.conftest import PREFIX, Bench
from tests.integration.pooling import Answer, Asking, ask, complete, kill, kinds, pool, reload, table, words

LONG = {"idle_freeze": "1h", "idle_release": "1h"}


def test_models_without_goldens_are_made_and_answer_through_one_address(bench: Bench) -> None:
    front = '[front]\nkeep_alive = "0.3s"'
    with pool(bench, front, table(bench, "a", aliases=["gpt-4o-mini"], **LONG), table(bench, "b", **LONG)) as made:
        # Held, not refused, while its golden is made; a stream hears comments meanwhile.
        early = Asking(lambda: complete(made, "a", stream=True)).done()
        assert early.status == 200 and early.text == words(4)
        assert early.headers["x-gpuckpt-tier"] == "cold" and b": waiting for the model" in early.body
        assert early.body.endswith(b"data: [DONE]\n\n")
        hot = complete(made, "gpt-4o-mini")
        assert hot.text == words(4) and hot.headers["x-gpuckpt-tier"] == "hot"
        assert (
            "wait;dur=" in hot.headers["server-timing"] and hot.headers["x-gpuckpt-replica"] == f"{bench.name('a')}.1"
        )
        # The other golden is made in the background, although nobody has asked for it.
        made.until("b", lambda one: one.golden.tier == "tmpfs")
        assert {one["id"] for one in ask(made, "/v1/models").json["data"]} == {"a", "b", "gpt-4o-mini"}
        assert ask(made, "/upstream/b/v1/models").json["data"][0]["id"] == "b"
        assert len(ask(made, "/v1/embeddings", {"model": "b", "input": "x"}).json["data"][0]["embedding"]) == 32
        unknown = complete(made, "gpt-4o-mimi")
        assert unknown.status == 404 and "did you mean “gpt-4o-mini”" in unknown.json["error"]["message"]
        # Real clients.
        curl = ["curl", "-sS", "-N", f"{made.url}/v1/completions", "-H", "content-type: application/json", "-d"]
        printed = subprocess.run(
            [*curl, '{"model": "a", "prompt": "the", "max_tokens": 3, "stream": true}'], capture_output=True, check=True
        ).stdout
        assert printed.count(b"data: {") == 3 and printed.endswith(b"data: [DONE]\n\n")
        script = bench.folder / "client.py"
        script.write_text(OPENAI)
        said = subprocess.run(
            [PREFIX / "server" / "bin" / "python", script, f"{made.url}/v1"], capture_output=True, check=True, text=True
        ).stdout
        assert said.splitlines() == ["a b gpt-4o-mini", words(3), words(3), "NotFoundError 404"]


OPENAI = """
import sys
from openai import NotFoundError, OpenAI
client = OpenAI(base_url=sys.argv[1], api_key="none")
print(*sorted(model.id for model in client.models.list()))
print(client.completions.create(model="a", prompt="the", max_tokens=3).choices[0].text)
print("".join(part.choices[0].text for part in client.completions.create(
    model="b", prompt="the", max_tokens=3, stream=True)))
try:
    client.completions.create(model="c", prompt="the")
except NotFoundError as error:
    print("NotFoundError", error.status_code)
"""


def test_idle_it_sinks_and_a_request_brings_it_back(bench: Bench) -> None:
    # Each step has rules of its own, with nothing behind it that time would bring before it is looked at.
    freezes, goes, sinks = (
        table(bench, "a", **rules)
        for rules in (
            {"idle_freeze": "0.5s", "idle_release": "1h"},
            {"idle_freeze": "0.5s", "idle_release": "0.5s"},
            {"idle_freeze": "0.5s", "idle_release": "0.5s", "idle_disk": "1s"},
        )
    )
    with pool(bench, freezes) as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        assert complete(made, "a").text == words(4)
        made.until("a", lambda one: one.tier == "standby")
        frozen = complete(made, "a")
        assert frozen.headers["x-gpuckpt-tier"] == "standby" and frozen.text == words(4)
        reload(bench, made, freezes, goes)
        made.until("a", lambda one: one.tier == "tmpfs" and not one.replicas)
        assert complete(made, "a").headers["x-gpuckpt-tier"] == "tmpfs"
        reload(bench, made, goes, sinks)
        made.until("a", lambda one: one.tier == "disk")
        reload(bench, made, sinks, table(bench, "a", **LONG))
        from_disk = complete(made, "a")
        assert from_disk.headers["x-gpuckpt-tier"] == "disk" and from_disk.text == words(4)
        # What is used comes back into memory.
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        text = ask(made, "/metrics").body.decode()
        for tier in ("standby", "tmpfs", "disk"):
            assert f'gpuckpt_wakes_total{{model="a",outcome="ok",tier="{tier}"}}' in text
            assert f'gpuckpt_ttft_seconds_count{{tier="{tier}"}}' in text
        assert 'gpuckpt_evictions_total{model="a",reason="idle"}' in text


def test_a_burst_gets_more_replicas_and_orders_are_followed(bench: Bench) -> None:
    with pool(bench, table(bench, "a", "--pause", "0.2", concurrency=1, max_replicas=4, **LONG)) as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        # Eight seconds each: the last replica is there before the first one is free again.
        several = [Asking(lambda: complete(made, "a", 40)) for _ in range(4)]
        answers = [one.done() for one in several]
        assert {one.text for one in answers} == {answers[0].text}
        assert len({one.headers["x-gpuckpt-replica"] for one in answers}) == 4
        socket = ("--socket", str(made.admin))
        bench.ok("pool", "sleep", "a", *socket)
        made.until("a", lambda one: [each.phase for each in one.replicas] == ["standby"] * 4)
        assert "hot" in bench.ok("pool", "wake", "a", *socket).out
        bench.ok("pool", "scale", "a", "2", *socket)
        made.until("a", lambda one: [each.phase for each in one.replicas].count("hot") == 2)
        bench.ok("pool", "scale", "a", "0", *socket)
        made.until("a", lambda one: not one.replicas)
        bench.ok("pool", "scale", "a", "auto", *socket)
        bench.ok("pool", "drain", "a", *socket)
        refused = complete(made, "a")
        assert (
            refused.status == 503 and refused.headers["retry-after"] and "drained" in refused.json["error"]["message"]
        )
        bench.ok("pool", "wake", "a", *socket)
        assert complete(made, "a").status == 200
        assert bench.run("pool", "scale", "a", "9", *socket).code == 2
        assert bench.run("pool", "wake", "b", *socket).code == 6


def test_a_replica_that_dies_is_replaced_and_its_requests_are_answered(bench: Bench) -> None:
    with pool(bench, table(bench, "a", "--pause", "0.2", **LONG)) as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        waiting = Asking(lambda: complete(made, "a", 50))  # nothing of it is sent before its end, in ten seconds
        made.until("a", lambda one: one.requests == 1)
        seen = Answer()
        streaming = Asking(lambda: complete(made, "a", 50, stream=True, into=seen))
        made.until("a", lambda one: one.requests == 2 and b"data: {" in seen.body)
        (replica,) = made.model("a").replicas
        kill(replica.pid)
        answer = waiting.done()
        assert answer.status == 200 and answer.text == words(50)
        assert 'retries;desc="1"' in answer.headers["server-timing"]
        # What has begun to stream cannot go on elsewhere: it is told so, and its connection is cut.
        cut = streaming.done()
        assert cut.broken and b'"code": "replica_failed"' in cut.body and cut.body.startswith(b"data: {")
        assert "lost" in kinds(made, "a")
        # A standby is looked after, too.
        made.client.sleep("a")
        standby = made.until("a", lambda one: [each.phase for each in one.replicas] == ["standby"]).replicas[0]
        kill(standby.pid)
        made.until("a", lambda one: standby.pid not in [each.pid for each in one.replicas])
        assert complete(made, "a").status == 200


def test_a_replica_that_hangs_is_found_and_replaced(bench: Bench) -> None:
    health = "interval = '0.5s'\ntimeout = '3s'\nfailures = 2"  # longer than who is well ever takes
    with pool(bench, table(bench, "a", **LONG), health=health) as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        complete(made, "a")
        (replica,) = made.model("a").replicas
        assert replica.pid
        os.kill(replica.pid, signal.SIGSTOP)
        assert complete(made, "a").text == words(4)
        lost = [event for event in made.client.events(model="a") if event.kind == "lost"]
        assert [event.reason for event in lost] == ["unhealthy"] and not Path(f"/proc/{replica.pid}").exists()


def test_the_daemon_killed_at_any_moment_finds_its_replicas_again(bench: Bench) -> None:
    parts = (table(bench, "a", max_replicas=2, concurrency=1, **LONG), table(bench, "b", min_standby=1, **LONG))
    with pool(bench, *parts) as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        made.until("b", lambda one: one.tier == "standby")
        complete(made, "a")
        pids = {each.pid for name in ("a", "b") for each in made.model(name).replicas}
        made.kill()
        # Killed in the middle of a restore as well.
        made.start()
        assert {each.pid for name in ("a", "b") for each in made.model(name).replicas} == pids
        assert complete(made, "a").headers["x-gpuckpt-tier"] == "hot"
        assert complete(made, "b").headers["x-gpuckpt-tier"] == "standby"
        made.client.scale("a", 2)
        time.sleep(0.15)
        made.kill()
        # While it is down, connections wait in the socket that systemd would hold.
        waiting = Asking(lambda: complete(made, "a"))
        time.sleep(0.3)
        made.start()
        assert waiting.done().text == words(4)
        assert sorted(bench.goldens()) == sorted([bench.name("a"), bench.name("b")])


def test_a_reload_disturbs_nobody(bench: Bench) -> None:
    slow = table(bench, "a", "--pause", "0.2", **LONG)
    with pool(bench, slow, table(bench, "b", **LONG)) as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        made.until("b", lambda one: one.golden.tier == "tmpfs")
        streaming = Asking(lambda: complete(made, "a", 50, stream=True))
        made.until("a", lambda one: one.requests == 1)
        before = made.config.read_text()
        made.config.write_text(before.replace(table(bench, "b", **LONG), table(bench, "c", **LONG)))
        assert made.process is not None
        made.process.send_signal(signal.SIGHUP)
        made.until("c", lambda one: one.golden.tier == "tmpfs")
        assert complete(made, "c").text == words(4) and complete(made, "b").status == 404
        # What is wrong changes nothing, and says where.
        made.config.write_text(before.replace("concurrency = 4", "concurency = 4", 1))
        failed = bench.run("pool", "reload", "--socket", str(made.admin))
        assert failed.code == 2 and "concurency" in failed.err and "pool.toml:" in failed.err
        assert complete(made, "c").status == 200
        answer = streaming.done()
        assert not answer.broken and answer.body.count(b"data: {") == 50
        assert "reloaded" in kinds(made)
