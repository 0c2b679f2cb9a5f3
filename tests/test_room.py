"""What hospitals send and fetch takes a bounded part of the SuperLink's memory, and nothing of a stranger's is read."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from commands import wait_for
from fastapi import HTTPException
from fleet_site import Site
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node

from federation.flower import impatient, lines
from federation.flower import room as module
from federation.flower.room import CHUNK, CHUNKS, FETCH, LARGEST, OF_ONE_SITE, SMALL, Room
from federation.processes import free_port
from orchestrator.enrollment.authority import create

SEND = "/v1/fleet/push-object"
SITES = [Site() for _ in range(CHUNKS // OF_ONE_SITE + 1)]
HERE, OTHER, STRANGER = SITES[0], SITES[1], Site()
LARGE = SMALL + 1
TAKEN = 32 * 2**20


class Flower:
    """What stands behind: knows the registered keys, and remembers how much it was given, and how many at a time."""

    def __init__(self, answer: int = 3) -> None:
        self.answer, self.at_work, self.most = answer, 0, 0
        self.got, self.senders = list[int](), list[int | None]()
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
        self.senders.append(scope.get("fednnunet.sender"))
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
        if message["type"] == "http.response.body":
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
        async with asyncio.timeout(180):
            await steps(flower, Room(flower, flower))

    asyncio.run(all_of_it())


async def settled() -> None:
    """Whatever can go on has gone on: also what is looked up in a thread."""
    for _ in range(20):
        await asyncio.sleep(0.01)


async def until(found: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not found():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", [SEND, FETCH])
@pytest.mark.parametrize("stranger", ["unregistered", "yesterday", "another's signature", "no base64", "nothing"])
def test_of_a_stranger_no_byte_is_read(stranger: str, path: str) -> None:
    async def steps(flower: Flower, room: Room) -> None:
        claimed = Site()
        claimed.headers = lambda age: {  # type: ignore[method-assign]
            "unregistered": STRANGER.headers(),
            "yesterday": HERE.headers(86_400),
            "another's signature": {**OTHER.headers(), "flwr-public-key": HERE.headers()["flwr-public-key"]},
            "no base64": {**HERE.headers(), "flwr-public-key": "?"},
            "nothing": {},
        }[stranger]
        line = Line(room, claimed, path, size=SMALL if path == FETCH else CHUNK).send()
        await line.task
        assert (line.status, line.asked, flower.got) == (401, 0, [])

    run(steps)


def test_what_a_site_sends_comes_to_flower_whole_and_its_answer_to_the_site() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        line = Line(room, HERE, size=3 * LARGE).send(more=True).send(more=True).send()
        await line.task
        assert (line.status, flower.got, flower.senders) == (200, [3 * LARGE], [0])
        assert b"".join(part.get("body", b"") for part in line.answered) == bytes(3)

    run(steps)


def test_flower_takes_our_word_for_who_sent_a_body_that_took_long_and_for_nobody_else() -> None:
    def asked(node: int, **scope: Any) -> None:
        told = PushObjectRequest(node=Node(node_id=node))
        request: Any = SimpleNamespace(scope=scope, state=SimpleNamespace(protobuf_request=told), headers={})
        module._authenticate_once(request)

    asked(7, **{"fednnunet.sender": 7})
    for node, scope in ((8, {"fednnunet.sender": 7}), (7, {}), (0, {"fednnunet.sender": 7})):
        with pytest.raises(HTTPException) as refused:
            asked(node, **scope)
        assert refused.value.status_code == 401


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
        padded = Line(room, HERE, FETCH, LARGE)
        await padded.task
        assert (padded.status, padded.asked) == (413, 0)
        endless = Line(room, HERE, FETCH, None).send(LARGE, more=True)
        await endless.task
        assert (endless.status, endless.asked, flower.got) == (413, 1, [])

    run(steps)


def test_a_fetch_whose_body_does_not_come_takes_nobodys_place() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        stuck = [Line(room, site, FETCH, 5) for site in SITES for _ in range(OF_ONE_SITE - 1)]
        await until(lambda: all(line.asked for line in stuck))
        other = Line(room, OTHER).send()
        await other.task
        assert other.status == 200
        for line in stuck:
            line.ends()
        await asyncio.gather(*(line.task for line in stuck))
        assert not room._held

    run(steps)


def test_so_many_are_read_at_a_time_and_fewer_worked_at_and_the_rest_waits_at_the_hospitals() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        sent = [Line(room, site) for site in SITES for _ in range(OF_ONE_SITE)]
        await until(lambda: sum(line.asked for line in sent) == CHUNKS)
        small = Line(room, HERE, size=5).send(5)
        await until(lambda: flower.got == [5])  # which is not held up by them
        for line in sent:
            line.send()
        await until(lambda: room._held.total() == len(sent))  # who sends is looked up in threads
        await settled()
        assert sum(line.asked for line in sent) == CHUNKS
        assert flower.got == [5] + [LARGE] * module.AT_WORK
        assert len(room._held) == CHUNKS // OF_ONE_SITE + 1
        flower.most = 0
        flower.goes_on.set()
        await asyncio.gather(small.task, *(line.task for line in sent))
        assert {line.status for line in sent} == {200}
        assert flower.most <= module.AT_WORK + 1  # the small one among them

    run(steps)


class Spelled(Site):
    """A site that spells its key in another way each time: the last digit of a base64 holds bits of nothing."""

    def __init__(self, site: Site) -> None:
        self._key, self.public, self.times = site._key, site.public, 0

    def headers(self, age: float = 0.0) -> dict[str, str]:
        found, name = super().headers(age), "flwr-public-key"
        bare = found[name].rstrip("=")
        digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
        digit = digits[digits.index(bare[-1]) + self.times]
        self.times += 1
        return {**found, name: found[name].replace(bare, bare[:-1] + digit)}


def test_of_one_site_so_many_however_it_spells_its_key_and_of_another_still() -> None:
    async def steps(flower: Flower, room: Room) -> None:
        one = Spelled(HERE)
        lines_of_one = [Line(room, one) for _ in range(OF_ONE_SITE)]
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
        huge = Line(room, HERE, size=CHUNK + 1)
        await until(lambda: huge.asked > 0)  # who sends is looked up in threads: the second might come first
        second = Line(room, OTHER, size=CHUNK + 1)
        await second.task
        assert (second.status, second.asked) == (503, 0)
        assert (b"connection", b"close") in second.answered[0]["headers"]  # so that it need not send all of it
        another = Line(room, HERE, size=CHUNK + 1)
        await another.task
        assert (another.status, another.asked) == (503, 0)
        await Line(room, OTHER).send().task  # a chunk is not held up by it
        huge.send()
        await huge.task
        third = Line(room, OTHER, size=CHUNK + 1).send()
        await third.task
        assert (huge.status, third.status) == (200, 200)

    run(steps)


def test_who_waits_for_too_long_for_the_work_is_told_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.3)

    async def steps(flower: Flower, room: Room) -> None:
        sent = [Line(room, site).send() for site in SITES[: module.AT_WORK + 1]]
        await until(lambda: any(line.task.done() for line in sent))
        assert sorted(line.status or 0 for line in sent) == [0] * module.AT_WORK + [503]
        flower.goes_on.set()
        await asyncio.gather(*(line.task for line in sent))

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
        assert max(len(part.get("body", b"")) for part in slow[0].answered) <= SMALL  # TLS takes what it is given

    run(steps, answer=LARGE)

    async def nothing_there(flower: Flower, room: Room) -> None:
        flower.goes_on.set()
        asked = [Line(room, HERE, FETCH, 5).send(5) for _ in range(CHUNKS)]
        await asyncio.gather(*(line.task for line in asked))
        assert {line.status for line in asked} == {200}

    run(nothing_there)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Path, Room]]:
    """As a SuperLink serves it, by its protocol, uvloop and TLS; answers that no buffer of the machine holds."""
    monkeypatch.setattr(impatient, "BODY", 10.0)
    authority, port, flower = create(tmp_path / "authority", ["127.0.0.1"]), free_port(), Flower(TAKEN)
    room = Room(flower, flower)
    flower.goes_on.set()
    served = uvicorn.Server(
        uvicorn.Config(
            room,
            port=port,
            http=impatient.Impatient,
            loop="uvloop",
            lifespan="off",
            log_level="warning",
            ssl_certfile=authority.certificate,
            ssl_keyfile=authority.key,
        )
    )
    thread = threading.Thread(target=served.run)
    thread.start()
    while not served.started:
        time.sleep(0.01)
    yield port, authority.ca, room
    served.should_exit = True
    thread.join()


def fetching(port: int, ca: Path) -> ssl.SSLSocket:
    """A connection whose operating system holds little, and that has asked for a part of a message."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    plain.settimeout(60)
    plain.connect(("127.0.0.1", port))
    held = ssl.create_default_context(cafile=str(ca)).wrap_socket(plain, server_hostname="127.0.0.1")
    headers = "".join(f"{name}: {value}\r\n" for name, value in HERE.headers().items())
    held.sendall(f"POST {FETCH} HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n{headers}\r\nxx".encode())
    return held


def test_over_tls_what_is_not_taken_keeps_its_place_until_its_time_is_over(server: tuple[int, Path, Room]) -> None:
    port, ca, room = server
    with contextlib.ExitStack() as stack:
        first, *_ = [stack.enter_context(fetching(port, ca)) for _ in range(OF_ONE_SITE)]
        wait_for(lambda: room._held.total() == OF_ONE_SITE and room._at_work._value == module.AT_WORK, 60, "answers")
        with fetching(port, ca) as one_more:
            assert one_more.recv(100).startswith(b"HTTP/1.1 503")

        def free() -> bool:
            with contextlib.suppress(OSError):
                first.recv(100)  # a little now and then is no way to keep it either
            return not room._held and room._chunks._value == CHUNKS

        wait_for(free, 60, "places that are free again")


@pytest.mark.parametrize("seconds", [2.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_over_tls_a_slow_line_gets_all_of_it(
    server: tuple[int, Path, Room], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what it was given whole, uvicorn and uvloop forget after 35 s."""
    monkeypatch.setattr(impatient, "BODY", 600.0)
    port, ca, room = server
    with fetching(port, ca) as slow:
        taken = slow.recv(2**14)
        assert taken.startswith(b"HTTP/1.1 200")
        size, began = len(taken) - taken.index(b"\r\n\r\n") - 4, time.monotonic()
        while size < TAKEN:
            piece = slow.recv(2**14)
            assert piece, f"{size} bytes"
            size += len(piece)
            time.sleep(max(0.0, began + seconds * size / TAKEN - time.monotonic()))
        assert room._held.total() <= 1
