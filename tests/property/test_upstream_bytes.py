"""Answers of replicas: whatever pieces their bytes come in, and whatever they are."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuckpt.service.upstream import UpstreamError
from tests.service_world import OK, chunk, run, turns
from tests.wire import CHUNKED, connected, exchanged


def cut(wire: bytes, data: st.DataObject) -> list[bytes]:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(wire) - 1)), max_size=10)))
    return [wire[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(wire)], strict=True)]


@given(st.data())
def test_how_the_bytes_come_does_not_matter(data: st.DataObject) -> None:
    bodies = data.draw(st.lists(st.binary(min_size=1, max_size=40), max_size=6))
    framing = data.draw(st.sampled_from(("length", "chunks", "end")))
    interim = data.draw(st.sampled_from((b"", b"HTTP/1.1 103 Early\r\nx: 0\r\n\r\n")))
    whole = b"".join(bodies)
    head = interim + OK + b"x: y\r\n"
    if framing == "length":
        wire = head + b"content-length: %d\r\n\r\n" % len(whole) + whole
    elif framing == "chunks":
        wire = head + CHUNKED + b"".join(map(chunk, bodies)) + b"0\r\nx: trailer\r\n\r\n"
    else:
        wire = head + b"\r\n" + whole

    connection, body = run(exchanged(cut(wire, data), lost=framing == "end"))
    assert (connection.status, body) == (200, whole)
    assert [value for name, value in connection.headers if name == b"x"] == [b"y"]
    assert connection.finish() is (framing != "end")


@given(st.data())
def test_an_answer_that_ends_early_is_never_whole(data: st.DataObject) -> None:
    wire = OK + CHUNKED + chunk(b"hello") + chunk(b"world") + chunk(b"")
    short = wire[: data.draw(st.integers(0, len(wire) - 1))]
    with pytest.raises(UpstreamError):
        run(exchanged(cut(short, data) if short else [], lost=True))


@given(st.binary(max_size=200))
def test_garbage_is_refused_or_understood(garbage: bytes) -> None:
    with contextlib.suppress(UpstreamError):
        run(exchanged([OK, garbage], lost=True))


@given(st.data())
def test_what_is_poured_keeps_its_order(data: st.DataObject) -> None:
    """Some pieces the sink takes, some wait for the reader, which takes its time."""
    bodies = [bytes((number,)) * 3 for number in range(data.draw(st.integers(1, 30)))]
    takes = data.draw(st.lists(st.booleans(), min_size=30, max_size=30))
    rests = data.draw(st.lists(st.integers(0, 3), min_size=30, max_size=30))
    got = b""

    def sink(piece: bytes) -> bool:
        nonlocal got
        if takes.pop():
            got += piece
            return True
        return False

    async def test() -> None:
        nonlocal got
        connection, _ = connected()
        asking = asyncio.create_task(connection.exchange("GET", b"/", [], b""))
        await asyncio.sleep(0)

        async def feed() -> None:
            connection.data_received(OK + CHUNKED)
            for body in bodies:
                connection.data_received(chunk(body))
                await turns(rests.pop())
            connection.data_received(chunk(b""))

        feeding = asyncio.create_task(feed())
        await asking
        connection.pour(sink)
        while piece := await connection.read():
            await asyncio.sleep(0)  # as a client that must be waited for
            got += piece
        await feeding
        assert connection.finish()

    run(test())
    assert got == b"".join(bodies)
