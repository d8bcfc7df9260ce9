"""Streams of events over a made-up connection: what is sent, silences, who does not read."""

import asyncio
import json

import pytest

from cla_export.serve import events
from cla_export.serve.events import EventStream, event
from cla_export.serve.requests import Finish, Output
from cla_export.serve.streams import Group

LAST = Output("", (), finish=Finish("stop", None, 2, 0))


class Connection:
    """Keeps what is sent, of which it takes `takes` messages; then it takes no more."""

    def __init__(self, takes=1_000_000):
        self.sent, self.left, self._takes = [], asyncio.Event(), takes

    async def send(self, message):
        if len(self.sent) == self._takes:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def receive(self):
        await self.left.wait()
        return {"type": "http.disconnect"}

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent)


async def pieces_of(*pieces):
    for piece in pieces:
        yield piece


async def silence(until):
    yield b"a"
    await until.wait()
    yield b"z"


def run(stream, connection):
    return stream({}, connection.receive, connection.send)


def test_an_event_is_json_on_one_line():
    content = {"text": 'a\n\r"\\\u2028\0é🙂', "logprob": -1.5e-07, "none": None}
    data = event(content)
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    assert data.count(b"\n") == 2
    assert b"\r" not in data
    assert json.loads(data.removeprefix(b"data: ")) == content


def test_pieces_are_sent_as_they_are_and_the_end_is_told_once():
    async def main():
        connection, ends = Connection(), []
        await run(EventStream(pieces_of(b"a", b"b"), lambda: ends.append(1)), connection)
        return connection.sent, ends

    sent, ends = asyncio.run(main())
    assert sent[0]["type"] == "http.response.start"
    assert [(m["body"], m["more_body"]) for m in sent[1:]] == [
        (b"a", True), (b"b", True), (b"", False),
    ]  # fmt: skip
    assert ends == [1]


def test_what_pieces_raise_is_raised():
    async def broken():
        yield b"a"
        raise LookupError("broken")

    async def main():
        await run(EventStream(broken(), lambda: None), Connection())

    with pytest.raises(LookupError, match="broken"):
        asyncio.run(main())


def test_a_silence_is_broken(monkeypatch):
    monkeypatch.setattr(events, "PING_SECONDS", 0.01)

    async def main():
        connection, enough = Connection(), asyncio.Event()
        running = asyncio.create_task(run(EventStream(silence(enough), lambda: None), connection))
        while connection.body.count(b": ping\n\n") < 3:
            await asyncio.sleep(0.005)
        enough.set()
        await running
        return connection

    connection = asyncio.run(main())
    assert connection.body.replace(b": ping\n\n", b"") == b"az"
    assert connection.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


@pytest.mark.parametrize("takes", [0, 1, 2, 3])  # the start, a, ...; then z or a ping
def test_a_client_that_does_not_read_is_given_up(monkeypatch, takes):
    monkeypatch.setattr(events, "PING_SECONDS", 0.01)
    monkeypatch.setattr(events, "WRITE_SECONDS", 0.03)

    async def main():
        connection, left, enough = Connection(takes), asyncio.Event(), asyncio.Event()
        stream = EventStream(silence(enough), left.set)
        running = asyncio.create_task(run(stream, connection))
        if takes == 2:
            enough.set()
        await asyncio.wait_for(running, 60)
        return connection, left.is_set(), len(asyncio.all_tasks())

    connection, left, tasks = asyncio.run(main())
    assert len(connection.sent) == takes
    assert left
    assert tasks <= 3  # this one, and those that have been told to end


def test_a_client_that_leaves_is_noticed():
    async def main():
        connection, left = Connection(), asyncio.Event()
        running = asyncio.create_task(run(EventStream(silence(left), left.set), connection))
        while connection.body != b"a":
            await asyncio.sleep(0.001)
        connection.left.set()
        await running
        return connection.body

    assert asyncio.run(main()) == b"az"


def test_a_group_gives_what_came_in_its_order_until_all_have_ended():
    async def main():
        group = Group(streams=None, count=2)
        group.put(1, Output("a"))
        group.put(0, Output("b"))
        first = await group.read()
        waiting = asyncio.create_task(group.read())
        await asyncio.sleep(0)
        group.put(1, LAST)
        group.put(0, Output("c"))
        second = await waiting
        group.put(0, LAST)
        return first, second, await group.read(), await group.read()

    first, second, third, fourth = asyncio.run(main())
    assert [(index, output.text) for index, output in first] == [(1, "a"), (0, "b")]
    assert second == [(1, LAST), (0, Output("c"))]
    assert third == [(0, LAST)]
    assert fourth == []


def test_a_reader_that_gave_up_loses_nothing():
    async def main():
        group = Group(streams=None, count=1)
        waiting = asyncio.create_task(group.read())
        await asyncio.sleep(0)
        waiting.cancel()
        group.put(0, LAST)
        await asyncio.sleep(0)
        return waiting.cancelled(), await group.read()

    assert asyncio.run(main()) == (True, [(0, LAST)])
