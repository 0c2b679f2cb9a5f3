"""What hospitals send and fetch takes a bounded part of the SuperLink's memory, and nothing of a stranger's is read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fleet_site import Site

from federation.flower import lines
from federation.flower import room as module
from federation.flower.room import CHUNK, CHUNKS, FETCH, LARGEST, OF_ONE_SITE, SMALL, Room

SEND = "/v1/fleet/push-object"
SITES = [Site() for _ in range(CHUNKS // OF_ONE_SITE + 1)]
HERE, OTHER, STRANGER = SITES[0], SITES[1], Site()
LARGE = SMALL + 1


class Flower:
    """What stands behind: knows the registered keys, and remembers how much it was given, and how many at a time."""

    def __init__(self, answer: int = 3) -> None:
        self.answer, self.got, self.at_work, self.most = answer, list[int](), 0, 0
        self.goes_on = asyncio.Event()
        numbers = {site.public: number for number, site in enumerate(SITES)}
        known = SimpleNamespace(get_node_id_by_public_key=numbers.get)
        self.state = SimpleNamespace(linkstate_factory=SimpleNamespace(state=lambda: known))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.at_work += 1
        self.most = max(self.most, self.at_work)
        size, more = 0, True
        while more:
            part = await receive()
            size, more = size + len(part["body"]), part["more_body"]
        self.got.append(size)
        await self.goes_on.wait()
        self.at_work -= 1
        head = [(b"content-length", str(self.answer).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": bytes(self.answer)})


class Line:
    """One request, of which the body comes as it is sent here, and what was answered."""

    def __init__(self, room: Room, site: Site, path: str = SEND, size: int | None = LARGE, age: float = 0.0) -> None:
        headers = {**site.headers(age), **({"transfer-encoding": "chunked"} if size is None else {})}
        if size is not None:
            headers["content-length"] = str(size)
        fields = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.asked, self.answered = 0, list[dict[str, Any]]()
        self.takes = asyncio.Event()
        self.takes.set()
        scope = {"type": "http", "method": "POST", "path": path, "headers": fields, "query_string": b""}
        self.task = asyncio.create_task(room(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        self.asked += 1
        return await self.parts.get()

    async def _send(self, message: dict[str, Any]) -> None:
        if message.get("body") == b"":  # uvicorn waits before the next message, not after the one that was too much
            await self.takes.wait()
        self.answered.append(message)

    def send(self, size: int = LARGE, more: bool = False) -> Line:
        """A part of the body."""
        self.parts.put_nowait({"type": "http.request", "body": bytes(size), "more_body": more})
        return self

    def ends(self) -> None:
        """The line is cut."""
        self.parts.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        return self.answered[0]["status"] if self.answered else None


def run(steps: Callable[[Flower, Room], Awaitable[None]], answer: int = 3) -> None:
    async def all_of_it() -> None:
        flower = Flower(answer)
        async with asyncio.timeout(60):
            await steps(flower, Room(flower, flower))

    asyncio.run(all_of_it())


async def settled() -> None:
    """Whatever can go on has gone on: also what is looked up in a thread."""
    for _ in range(20):
        await asyncio.sleep(0.01)


async def until(found: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not found():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stranger", ["unregistered", "yesterday", "another's signature", "no base64", "nothing"])
def test_of_a_stranger_no_byte_is_read(stranger: str) -> None:
    async def steps(flower: Flower, room: Room) -> None:
        claimed = Site()
        claimed.headers = lambda age: {  # type: ignore[method-assign]
            "unregistered": STRANGER.headers(),
            "yesterday": HERE.headers(86_400),
            "another's signature": {**OTHER.headers(), "flwr-public-key": HERE.headers()["flwr-public-key"]},
            "no base64": {**HERE.headers(), "flwr-public-key": "?"},
            "nothing": {},
        }[stranger]
        line = Line(room, claimed, size=CHUNK).send()
        await line.task
        assert (line.status, line.asked, flower.got) == (401, 0, [])

    run(steps)


def test_what_a_site_sends_comes_to_flower_whole_and_its_answer_to_the_site() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        line = Line(room, HERE, size=3 * LARGE).send(more=True).send(more=True).send()
        await line.task
        assert (line.status, flower.got) == (200, [3 * LARGE])
        assert b"".join(part.get("body", b"") for part in line.answered) == bytes(3)

    run(steps)


def test_too_large_is_refused_unread_and_without_an_end_once_it_is() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        announced = Line(room, HERE, size=LARGEST + 1)
        await announced.task
        assert (announced.status, announced.asked) == (413, 0)
        endless, step = Line(room, HERE, size=None), LARGEST // 4
        for _ in range(6):
            endless.send(step, more=True)
        await endless.task
        assert (endless.status, endless.asked, flower.got) == (413, 5, [])

    run(steps)


def test_so_many_are_read_at_a_time_and_fewer_worked_at_and_the_rest_waits_at_the_hospitals() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        sent = [Line(room, site) for site in SITES for _ in range(OF_ONE_SITE)]
        await until(lambda: sum(line.asked for line in sent) == CHUNKS)
        small = Line(room, HERE, size=5).send(5)
        await until(lambda: flower.got == [5])  # which is not held up by them
        for line in sent:
            line.send()
        await settled()
        assert sum(line.asked for line in sent) == CHUNKS
        assert flower.got == [5] + [LARGE] * module.AT_WORK
        flower.most = 0
        flower.goes_on.set()
        await asyncio.gather(small.task, *(line.task for line in sent))
        assert {line.status for line in sent} == {200}
        assert flower.most <= module.AT_WORK + 1  # the small one among them

    run(steps)


def test_of_one_site_so_many_and_of_another_still() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        lines_of_one = [Line(room, HERE) for _ in range(OF_ONE_SITE)]
        await until(lambda: all(line.asked for line in lines_of_one))
        one_more = Line(room, HERE)
        await one_more.task
        assert one_more.status == 503
        flower.goes_on.set()
        other = Line(room, OTHER).send()
        await other.task
        assert other.status == 200
        lines_of_one[0].send()
        await lines_of_one[0].task
        again = Line(room, HERE).send()
        await again.task
        assert again.status == 200
        for line in lines_of_one[1:]:
            line.ends()
        await asyncio.gather(*(line.task for line in lines_of_one))

    run(steps)


def test_who_waits_for_too_long_is_told_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)

    async def steps(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        huge, second = Line(room, HERE, size=CHUNK + 1), Line(room, OTHER, size=CHUNK + 1)
        await second.task
        assert (second.status, second.asked) == (503, 0)
        await Line(room, OTHER).send().task  # a chunk is not held up by it
        huge.send()
        await huge.task
        third = Line(room, OTHER, size=CHUNK + 1).send()
        await third.task
        assert (huge.status, third.status) == (200, 200)

    run(steps)


def test_a_line_that_ends_or_is_dead_gives_its_place_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "DEAD", 0.3)

    async def steps(flower: Flower, room: Room) -> None:
        for _ in range(2 * OF_ONE_SITE):
            cut = Line(room, HERE).send(5, more=True)
            cut.ends()
            await cut.task
            assert (cut.status, flower.got) == (None, [])
        silent = [Line(room, HERE).send(5, more=True) for _ in range(OF_ONE_SITE)]
        await asyncio.gather(*(line.task for line in silent))
        assert {line.status for line in silent} == {503}
        flower.goes_on.set()
        back = Line(room, HERE).send()
        await back.task
        assert back.status == 200

    run(steps)


def test_an_answer_has_its_place_until_the_site_has_taken_it_and_a_small_one_none() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        slow = [Line(room, site, FETCH, 5) for site in SITES[:-1] for _ in range(OF_ONE_SITE)]
        for line in slow:
            line.takes.clear()
            line.send(5)
        await until(lambda: len(flower.got) == CHUNKS)
        late = Line(room, SITES[-1], FETCH, 5).send(5)
        await settled()
        assert (len(flower.got), late.status) == (CHUNKS, None)
        slow[0].takes.set()
        await late.task
        assert late.status == 200
        for line in slow:
            line.takes.set()
        await asyncio.gather(*(line.task for line in slow))
        assert {sum(len(part.get("body", b"")) for part in line.answered) for line in slow} == {LARGE}
        assert not any(line.answered[-1].get("more_body") for line in slow)

    run(steps, answer=LARGE)

    async def nothing_there(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        asked = [Line(room, HERE, FETCH, 5).send(5) for _ in range(CHUNKS)]
        await asyncio.gather(*(line.task for line in asked))
        assert {line.status for line in asked} == {200}

    run(nothing_there)


def test_one_site_cannot_take_all_places_by_not_taking_what_it_asked_for() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        slow = [Line(room, HERE, FETCH, 5) for _ in range(OF_ONE_SITE + 1)]
        for line in slow:
            line.takes.clear()
            line.send(5)
        await until(lambda: all(line.answered for line in slow))
        for line in slow:
            line.takes.set()
        await asyncio.gather(*(line.task for line in slow))
        assert sorted(line.status or 0 for line in slow) == [200] * OF_ONE_SITE + [503]

    run(steps, answer=LARGE)
