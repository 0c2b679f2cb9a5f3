"""How much of the SuperLink's memory hospitals take: what they send and fetch has room for so many chunks at a time.

Flower reads a request whole before it asks who sends it, and works at as many as come: whoever reaches the port could
send a body without an end, and with 64 hospitals that upload nnU-Net's default network the SuperLink took 6.4 GB
(benchmarks/scale.py).

Rules, for a body over `SMALL`, and for whoever fetches a part of a message:

- First its head has to be signed by a registered site, by Flower's own check; that is not made again when the body has
  come, for on a slow line the signature is too old by then. A body over `LARGEST` is refused (413).
- `CHUNKS` of them, coming or going, are held at a time, of one site `OF_ONE_SITE`; of those over `CHUNK`, or whose head
  does not say how large they are, one, and of one site one. Who comes later waits its turn, its bytes at the hospital;
  after `PATIENCE` seconds it is told to come again (503), before its kernel takes the line for dead. So is who sends
  nothing more for as long as that takes.
- `AT_WORK` at a time are parsed, checked and stored, or read and serialized: each is in memory several times then.
- An answer has its place until the site has taken it. It is sent in pieces: TLS takes whatever it is given at once, and
  the server would have forgotten of it, and ended the connection, long before a slow line is done.
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
from flwr.superlink.routers.fleet import node_auth
from starlette.concurrency import run_in_threadpool

from federation.flower import asgi, impatient, lines
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
PATIENCE = 0.75 * lines.DEAD
"""Seconds for which a request waits for its turn."""
_CLOSE = (b"connection", b"close")
"""Said to whoever need not send the rest of a body."""
_SENDER = "fednnunet.sender"
"""Where a request's scope holds the number of the site that signed it."""
_authenticate = node_auth.authenticate_node


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
        self._held: Counter[tuple[int, bool]] = Counter()  # by node, all of them and those over CHUNK

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI call."""
        size = _size(scope) if scope["type"] == "http" else 0
        fetches = scope.get("path") == FETCH
        if size <= SMALL and not fetches:
            await self._app(scope, receive, send)
        elif size > (SMALL if fetches else LARGEST):
            await asgi.answer(send, 413, _CLOSE)
        elif (node := await run_in_threadpool(self._sender, scope)) is None:
            await asgi.answer(send, 401)  # which it has to hear for certain: no close in the middle of its body
        else:
            scope[_SENDER] = node
            try:
                with self._counted(node, size):
                    before = await _whole(receive, SMALL) if fetches else None
                    async with self._place(size):
                        body = before if fetches else await _whole(receive, LARGEST)
                        if body is not None:
                            await _give(await self._work(scope, body, receive), send)
            except _Busy:
                await asgi.answer(send, 503, _CLOSE)
            except asgi.TooLarge:
                await asgi.answer(send, 413, _CLOSE)

    async def _work(self, scope: Any, body: bytes, receive: Any) -> list[Any]:
        """What Flower answers, kept until the next one may work."""
        answer: list[Any] = []
        parts = [{"type": "http.request", "body": body, "more_body": False}]

        async def read() -> Any:
            return parts.pop() if parts else await receive()

        async def keep(message: Any) -> None:
            answer.append(message)

        async with contextlib.AsyncExitStack() as work:
            async with _at_most(PATIENCE):
                await work.enter_async_context(self._at_work)
            await self._app(scope, read, keep)
        return answer

    def _sender(self, scope: Any) -> int | None:
        """The number of the registered site that signed a request's head, now; None where there is none."""
        claimed = SimpleNamespace(node_id=None)
        request = Request({**scope, "app": self._flower, "state": {"protobuf_request": claimed}})
        with contextlib.suppress(HTTPException, LookupError, ValueError):
            key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER], validate=True)
            claimed.node_id = get_linkstate(request).get_node_id_by_public_key(key)
            if claimed.node_id is not None:
                _authenticate(request)
                return int(claimed.node_id)
        return None

    @contextlib.contextmanager
    def _counted(self, node: int, size: int) -> Iterator[None]:
        """One more of a site, or `_Busy`; before it waits, so that one site's do not stand before all others'."""
        kinds = [(node, False), (node, True)] if size > CHUNK else [(node, False)]
        if self._held[node, False] >= OF_ONE_SITE or (size > CHUNK and self._held[node, True]):
            raise _Busy
        self._held.update(kinds)
        try:
            yield
        finally:
            self._held.subtract(kinds)
            for kind in kinds:
                if not self._held[kind]:
                    del self._held[kind]

    @contextlib.asynccontextmanager
    async def _place(self, size: int) -> AsyncIterator[None]:
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


async def _whole(receive: Any, most: int) -> bytes | None:
    """A body of which something comes now and then; see `asgi.whole`."""

    async def hear() -> Any:
        async with _at_most(lines.DEAD):
            return await receive()

    return await asgi.whole(hear, most)


async def _give(answer: list[Any], send: Any) -> None:
    """Send an answer; a large one in pieces, of which each waits until the one before has gone."""
    if sum(len(message.get("body", b"")) for message in answer) <= SMALL:
        for message in answer:
            await send(message)
        return
    with contextlib.suppress(TimeoutError):  # whereupon the server ends the connection
        async with asyncio.timeout(impatient.BODY):
            for message in answer:
                body = memoryview(message.get("body", b""))
                if message["type"] != "http.response.body":
                    await send(message)
                for at in range(0, len(body), SMALL):
                    await send({"type": "http.response.body", "body": bytes(body[at : at + SMALL]), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _size(scope: Any) -> int:
    """Bytes of a request's body; `LARGEST` where its head does not say, for a fetch none."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length")
    if length is None:
        return LARGEST if b"transfer-encoding" in headers and scope["path"] != FETCH else 0
    return int(length)


def _authenticate_once(request: Any) -> None:
    """Flower's check, where it has not been made yet; that a request speaks of its sender is looked at in any case."""
    node, told = request.scope.get(_SENDER), request.state.protobuf_request
    if node is None or not hasattr(told, "node"):
        _authenticate(request)
    elif told.node.node_id != node:
        raise HTTPException(401, "Invalid SuperNode authentication")


def use() -> None:
    """From here on Flower in this process asks once who sends a large request, when its head has come."""
    module: Any = node_auth
    module.authenticate_node = _authenticate_once
