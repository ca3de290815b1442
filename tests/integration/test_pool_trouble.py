"""Bad luck in the warm pool: each is told clearly, and everyone else is served."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from benchmarks.pool_soak import main as soak
from tests.integration.conftest import HERE, SERVER, Bench
from tests.integration.pooling import Asking, ask, complete, create_words, folder_of, kinds, pool, table, words

LONG = {"idle_freeze": "1h", "idle_release": "1h"}


def test_a_model_that_never_becomes_healthy_is_refused_and_others_are_served(bench: Bench) -> None:
    never = ["--start-timeout", "3s", *create_words(bench, "never", "--never-healthy")]
    parts = (table(bench, "never", create=never), table(bench, "a", **LONG))
    with pool(bench, *parts, health="retry = '0.2s'") as made:
        waiting = Asking(lambda: complete(made, "never"))
        assert complete(made, "a").text == words(4)
        answer = waiting.done()
        assert answer.status == 503 and int(answer.headers["retry-after"]) > 0
        message = answer.json["error"]["message"]
        assert "never cannot be brought up" in message and "could not be made" in message
        assert "did not become healthy" in message or "3 s" in message
        assert "could not be made" in made.model("never").trouble
        assert complete(made, "a").status == 200


def test_a_store_that_is_full_is_told_and_others_are_served(bench: Bench) -> None:
    large = ["--volume", f"{HERE}:{HERE}", "--canary", "GET /digest", "--"]
    large += ["/usr/bin/python3", str(SERVER), "{socket}", "--megabytes", "300"]
    bench.store_size = "96MiB"
    with pool(bench, table(bench, "a", **LONG), table(bench, "large", create=large), health="retry = '0.2s'") as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        answer = ask(made, "/upstream/large/digest")
        assert answer.status == 503
        message = answer.json["error"]["message"]
        assert "large cannot be brought up" in message and "the store has" in message
        assert complete(made, "a").text == words(4)
        assert list((bench.store / "staging").glob("*")) == []


def test_a_damaged_golden_is_quarantined_and_the_model_starts_cold(bench: Bench) -> None:
    with pool(bench, table(bench, "a", prepare=0, **LONG)) as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        files = [path for path in folder_of(bench, "a").rglob("*") if path.is_file()]
        target = max(files, key=lambda path: path.stat().st_size)
        with target.open("r+b") as file:
            file.seek(target.stat().st_size // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 0xFF]))
        answer = complete(made, "a")
        assert answer.status == 200 and answer.text == words(4)
        assert kinds(made, "a")[-4:] == ["failed", "quarantined", "made", "started"]
        assert 'gpuckpt_goldens_quarantined_total{model="a"} 1.0' in ask(made, "/metrics").body.decode()
        made.client.sleep("a", release=True)
        made.until("a", lambda one: not one.replicas)
        assert complete(made, "a").headers["x-gpuckpt-tier"] == "tmpfs"


def test_a_golden_that_somebody_has_removed_is_made_again(bench: Bench) -> None:
    with pool(bench, table(bench, "a", prepare=0, **LONG), health="retry = '0.2s'") as made:
        made.until("a", lambda one: one.golden.tier == "tmpfs")
        bench.ok("rm", bench.name("a"))
        assert complete(made, "a").text == words(4)
        assert made.model("a").golden.tier == "tmpfs"


def test_a_replica_that_somebody_pauses_is_replaced(bench: Bench) -> None:
    rules = "interval = '0.2s'\ntimeout = '3s'\nfailures = 2"  # longer than who is well ever takes
    with pool(bench, table(bench, "a", prepare=0, **LONG), health=rules) as made:
        assert complete(made, "a").text == words(4)
        container = f"gpuckpt-{bench.name('a')}.1"
        podman = ["podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]
        subprocess.run([*podman, "pause", container], check=True, capture_output=True)
        made.until("a", lambda _: "stopped" in kinds(made, "a"))
        assert complete(made, "a").text == words(4)


def test_what_never_fits_is_refused_at_once(bench: Bench) -> None:
    with pool(bench, "[budget]\nmemory = '1M'", table(bench, "a", memory="2G")) as made:
        answer = complete(made, "a")
        assert answer.status == 503
        assert "a needs 2.1 GB of memory, more than the budget leaves it" in answer.json["error"]["message"]


def test_a_second_pool_and_a_taken_address_are_refused(bench: Bench) -> None:
    with pool(bench, table(bench, "a", **LONG)) as made:
        second = bench.run("pool", "run", "--config", str(made.config))
        assert second.code == 7 and "a pool runs already" in second.err
    other = bench.folder / "other.toml"
    other.write_text('[front]\nlisten = ["127.0.0.1:1"]\n[models.a]\n')
    Path(bench.folder / "wrong.toml").write_text("[models.a]\nmax_replica = 2\n")
    wrong = bench.run("pool", "run", "--config", str(bench.folder / "wrong.toml"))
    assert wrong.code == 2 and "max_replicas" in wrong.err and "wrong.toml:2" in wrong.err


def test_a_short_soak(bench: Bench) -> None:
    """Random load and chaos of one seed: no wrong answer, no request lost, nothing left behind."""
    assert soak(["--quick", "--minutes", "0.6", "--seed", "3", "--output", str(bench.folder)]) == 0
