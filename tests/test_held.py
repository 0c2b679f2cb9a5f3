"""A site's look for a message is held: until there is one, until its time is over, or until its line ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message
from flwr.proto.node_pb2 import Node

from federation.flower import held as module
from federation.flower.clients import LOOK
from federation.flower.held import Held

SITE, OTHER = 7, 8
LONG = 60.0
EMPTY, FULL = b"", PullMessagesResponse(messages_list=[Message()]).SerializeToString()


class Flower:
    """What stands behind: answers each look with what is waiting, and remembers who looked."""

    def __init__(self) -> None:
        self.looked: list[int] = []
        self.waiting: dict[int, bytes] = {}
        self.status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        node = PullMessagesRequest.FromString(body).node.node_id
        self.looked.append(node)
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.waiting.pop(node, EMPTY)})


class Line:
    """One request, and what was answered."""

    def __init__(self, held: Held, node: int = SITE, body: bytes | None = None) -> None:
        self.body = PullMessagesRequest(node=Node(node_id=node)).SerializeToString() if body is None else body
        self.parts = [{"type": "http.request", "body": self.body, "more_body": False}]
        self.cut = asyncio.Event()
        self.answered: list[Any] = []
        self.task = asyncio.create_task(held({"type": "http", "path": LOOK}, self._receive, self._send))

    async def _receive(self) -> Any:
        if self.parts:
            return self.parts.pop(0)
        await self.cut.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.answered.append(message)

    async def ends(self) -> None:
        """The line is cut."""
        self.cut.set()
        await self.task

    @property
    def found(self) -> bytes:
        assert self.answered[0]["status"] == 200
        return bytes(self.answered[1]["body"])


def running(test: Callable[[Flower, Held], Awaitable[None]], hold: float = LONG) -> None:
    async def within() -> None:
        flower = Flower()
        async with asyncio.timeout(30):
            await test(flower, Held(flower, hold))

    asyncio.run(within())


async def idle(held: Held, node: int = SITE) -> None:
    """A first look, which finds nothing: from here on looks are held."""
    await Line(held, node).task


async def send(flower: Flower, held: Held) -> None:
    """A message for SITE."""
    flower.waiting[SITE] = FULL
    await asyncio.to_thread(held.sent, SITE)
    await asyncio.sleep(0)


async def is_held(line: Line) -> None:
    await asyncio.sleep(0.05)
    assert not line.task.done()


def test_a_first_look_goes_through_and_the_next_one_is_held_until_something_is_sent() -> None:
    async def test(flower: Flower, held: Held) -> None:
        await idle(held)
        await idle(held, OTHER)
        one, other = Line(held), Line(held, OTHER)
        await is_held(one)
        await send(flower, held)
        await one.task
        assert one.found == FULL
        await is_held(other)
        assert flower.looked == [SITE, OTHER, SITE]
        await other.ends()

    running(test)


def test_a_look_is_held_for_so_long_and_then_asks() -> None:
    async def test(flower: Flower, held: Held) -> None:
        await idle(held)
        line = Line(held)
        await line.task
        assert line.found == EMPTY
        assert flower.looked == [SITE, SITE]

    running(test, hold=0.1)


def test_what_is_sent_between_two_looks_is_found_by_the_next() -> None:
    async def test(flower: Flower, held: Held) -> None:
        await idle(held)
        await send(flower, held)
        line = Line(held)
        await line.task
        assert line.found == FULL

    running(test)


def test_the_look_after_a_message_is_held_until_that_is_given_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line may have lost it."""
    monkeypatch.setattr(module, "UNHEARD", 2.0 - module.LATE)

    async def test(flower: Flower, held: Held) -> None:
        flower.waiting[SITE] = FULL
        await Line(held).task
        line = Line(held)
        await is_held(line)
        await line.task
        assert flower.looked == [SITE, SITE]
        line = Line(held)  # it was fetched long ago
        await is_held(line)
        await line.ends()

    running(test)


def test_no_message_goes_to_a_look_whose_line_has_ended_or_that_was_followed_by_another() -> None:
    async def test(flower: Flower, held: Held) -> None:
        await idle(held)
        ended = Line(held)
        await is_held(ended)
        await ended.ends()
        older = Line(held)
        await is_held(older)
        newer = Line(held)
        await older.task
        assert older.found == EMPTY
        await send(flower, held)
        await newer.task
        assert newer.found == FULL
        assert flower.looked == [SITE, SITE]

    running(test)


def test_a_look_of_somebody_else_in_its_name_does_not_hold_up_a_site() -> None:
    """Only Flower, behind this, knows that it was somebody else: the site's next look goes through."""

    async def test(flower: Flower, held: Held) -> None:
        await idle(held)
        await send(flower, held)
        waiting, flower.waiting, flower.status = flower.waiting, {}, 401
        await Line(held).task
        flower.waiting, flower.status = waiting, 200
        line = Line(held)
        await line.task
        assert line.found == FULL

    running(test)


def test_who_is_refused_is_not_held() -> None:
    async def test(flower: Flower, held: Held) -> None:
        flower.status = 401
        for _ in range(3):
            await Line(held).task
        assert flower.looked == [SITE] * 3
        flower.status = 200
        await idle(held)
        flower.status = 401
        held.sent(SITE)
        await asyncio.sleep(0)
        await Line(held).task
        await Line(held).task  # its key was taken out meanwhile

    running(test)


def test_a_server_that_stops_holds_nothing() -> None:
    async def test(flower: Flower, held: Held) -> None:
        await idle(held)
        line = Line(held)
        await is_held(line)
        held.close()
        await line.task
        await Line(held).task
        assert flower.looked == [SITE] * 3

    running(test)


def test_what_is_no_look_is_passed_on_as_it_is() -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append([await receive() for _ in range(scope["parts"])])

    async def pass_on(path: str, parts: list[Any]) -> None:
        left = list(parts)

        async def receive() -> Any:
            return left.pop(0)

        await Held(app)({"type": "http", "path": path, "parts": len(parts)}, receive, None)

    large = [{"type": "http.request", "body": b"\xff" * 2**15, "more_body": number < 4} for number in range(5)]
    asyncio.run(pass_on(LOOK, large))
    asyncio.run(pass_on("/v1/fleet/push-object", large))
    assert seen == [large, large]
