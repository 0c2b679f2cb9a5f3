"""How much of the SuperLink's memory hospitals take: what they send and fetch has room for so many chunks at a time.

Flower reads a request whole before it asks who sends it, and works at as many as come: whoever reaches the port could
send a body without an end, and with 64 hospitals that upload nnU-Net's default network the SuperLink took 6.4 GB
(benchmarks/scale.py).

Rules:

- A body over `SMALL` is read once its head is signed by a registered site (Flower's own check, which it makes again
  when it has read the body); one over `LARGEST` is refused with 413.
- `CHUNKS` of them, coming or going, are held at a time, of one site `OF_ONE_SITE`; of those over `CHUNK`, one. Who
  comes later waits its turn, its bytes at the hospital; after `PATIENCE` seconds it is told to come again (503), before
  its kernel takes the line for dead. So is who sends nothing more for as long as a dead line is waited for.
- `AT_WORK` at a time are parsed, checked and stored, or read and serialized: each is in memory several times then.
"""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b64decode
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

from fastapi import HTTPException, Request
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.superlink.dependencies.linkstate import get_linkstate
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from starlette.concurrency import run_in_threadpool

from federation.flower import lines
from federation.flower.transfer import MAX_BODY

FETCH = "/v1/fleet/pull-object"
"""Where a site fetches a part of a message."""
SMALL = 64 * 1024
"""Bytes up to which a body is nobody's concern."""
CHUNK = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + SMALL
"""Bytes of a request that carries a chunk of a file, at most."""
LARGEST = MAX_BODY + SMALL
"""Bytes of the largest request that the other side would take."""
CHUNKS, OF_ONE_SITE, AT_WORK = 96, 8, 4
_KEY = FLEET_HTTP_PUBLIC_KEY_HEADER.encode()
PATIENCE = 0.75 * lines.DEAD
"""Seconds for which a request waits for its turn."""


class _Busy(Exception):
    """It has to be sent again."""


class Room:
    """An ASGI application that lets what hospitals send and fetch through to Flower's as there is room for it.

    Parameters
    ----------
    app : ASGI application
        What it is let through to.
    flower : FastAPI
        Flower's own, whose state knows who is registered.
    """

    def __init__(self, app: Any, flower: Any) -> None:
        self._app, self._flower = app, flower
        self._chunks, self._huge = asyncio.Semaphore(CHUNKS), asyncio.Semaphore(1)
        self._at_work = asyncio.Semaphore(AT_WORK)
        self._held: Counter[bytes] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI call."""
        size = _size(scope) if scope["type"] == "http" else 0
        try:
            if size > LARGEST:
                await _refuse(send, 413)
            elif size > SMALL:
                await self._take_in(scope, size, receive, send)
            elif scope.get("path") == FETCH:
                await self._give_out(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        except _Busy:
            await _refuse(send, 503)

    async def _take_in(self, scope: Any, size: int, receive: Any, send: Any) -> None:
        """A large body."""
        if not await run_in_threadpool(self._is_known, scope):
            await _refuse(send, 401)
            return
        with self._counted(scope):
            async with self._place(size):
                body = await _whole(receive)
                if body is None:
                    return
                if len(body) > LARGEST:
                    await _refuse(send, 413)
                    return
                parts = [{"type": "http.request", "body": body, "more_body": False}]
                del body

                async def read() -> Any:
                    return parts.pop() if parts else await receive()

                answer = await self._work(scope, read)
        for message in answer:
            await send(message)

    async def _give_out(self, scope: Any, receive: Any, send: Any) -> None:
        """An answer that may be large: it has its place until the site has taken it."""
        async with self._place():
            answer = await self._work(scope, receive)
            if sum(len(message.get("body", b"")) for message in answer) <= SMALL:
                for message in answer:
                    await send(message)
                return
            with self._counted(scope):  # Flower has looked who it is
                while answer:
                    await send({**answer.pop(0), "more_body": True})
                await send({"type": "http.response.body", "body": b""})  # which waits until the rest has gone

    async def _work(self, scope: Any, receive: Any) -> list[Any]:
        """What Flower answers, kept until the next one may work."""
        answer: list[Any] = []

        async def keep(message: Any) -> None:
            answer.append(message)

        async with self._at_work:
            await self._app(scope, receive, keep)
        return answer

    def _is_known(self, scope: Any) -> bool:
        """Whether a request's head is signed by a registered site, now."""
        sender = SimpleNamespace(node_id=None)
        request = Request({**scope, "app": self._flower, "state": {"protobuf_request": sender}})
        with contextlib.suppress(HTTPException, ValueError):
            sender.node_id = get_linkstate(request).get_node_id_by_public_key(b64decode(_key(scope), validate=True))
            authenticate_node(request)
            return sender.node_id is not None
        return False

    @contextlib.contextmanager
    def _counted(self, scope: Any) -> Iterator[None]:
        key = _key(scope)
        if self._held[key] >= OF_ONE_SITE:
            raise _Busy
        self._held[key] += 1
        try:
            yield
        finally:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key]

    @contextlib.asynccontextmanager
    async def _place(self, size: int = CHUNK) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as places:
            async with _at_most(PATIENCE):
                if size > CHUNK:
                    await places.enter_async_context(self._huge)
                await places.enter_async_context(self._chunks)
            yield


@contextlib.asynccontextmanager
async def _at_most(seconds: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise _Busy from None


async def _whole(receive: Any) -> bytes | None:
    """A body, of which more than `LARGEST` is not read; None where its line ends."""
    parts, size = [], 0
    while size <= LARGEST:
        async with _at_most(lines.DEAD):
            message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body", False):
            break
    return b"".join(parts)


def _size(scope: Any) -> int:
    """Bytes of a request's body; `LARGEST` where its head does not say."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length")
    if length is None:
        return LARGEST if b"transfer-encoding" in headers else 0
    return int(length)


def _key(scope: Any) -> bytes:
    found: bytes = dict(scope["headers"]).get(_KEY, b"")
    return found


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
