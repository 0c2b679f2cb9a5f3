"""A site's look for a message is held until there is one: nobody looks again and again, and nobody learns of it late.

Flower's supernode looks every three seconds. With many sites these looks are a large part of what a SuperLink does
(benchmarks/scale.py), and each message waits for the next of them. Here a look that would find nothing is answered
when the coordinator sends something, at the latest after `HOLD` seconds. Flower's handler, behind this, says what there
is, and to whom; what is held costs a timer.

Rules:

- A look is held where the one before it was let in, and nothing has been sent since: the first look of a node goes
  through, and one that follows a message is held for no longer than until that would be given out again.
- A site has one look at a time: of two, the older one's line is gone, and its look finds nothing.
- A look whose line ends while it is held is forgotten: no message is given out to it.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from federation.flower import asgi
from federation.flower.clients import LOOK
from federation.patience import HOLD, UNHEARD

LATE = 0.5
"""Seconds after that moment for which a look is held still."""
LARGEST = 64 * 1024
"""Bytes of a request for which it is read here; it holds a node's number."""


class Held:
    """An ASGI application that holds looks before they reach Flower's.

    Parameters
    ----------
    app : ASGI application
        Flower's.
    hold : float
        Most seconds for which a look is held.
    """

    def __init__(self, app: Any, hold: float = HOLD) -> None:
        self._app, self._hold = app, hold
        self._given: dict[int, float] = {}  # nodes whose last look was let in, and when they were last given a message
        self._sent: set[int] = set()
        self._looks: dict[int, asyncio.Future[bool]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI call."""
        if scope["type"] != "http" or scope["path"] != LOOK:
            await self._app(scope, receive, send)
            return
        self._loop = asyncio.get_running_loop()
        read = await _read(receive)
        node = _node(read)
        if not await self._ready(node, receive):
            await asgi.answer(send, 200, (b"content-type", PROTOBUF_MEDIA_TYPE.encode()))
            return
        given = self._given.pop(node, -math.inf)
        self._sent.discard(node)

        async def again() -> Any:
            return read.pop(0) if read else await receive()

        status, size = 0, 0

        async def watched(message: Any) -> None:
            nonlocal status, size
            status = message.get("status", status)
            size += len(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body", False) and status == 200:
                self._given[node] = time.monotonic() if size else given
            await send(message)

        await self._app(scope, again, watched)

    def sent(self, node: int) -> None:
        """Say that something has been sent to a node; from any thread, once it is in the database."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake, node)

    def close(self) -> None:
        """Hold nothing any more; in the loop's thread."""
        self._closed = True
        for look in self._looks.values():
            _end(look, True)

    def _wake(self, node: int) -> None:
        self._sent.add(node)
        if node in self._looks:
            _end(self._looks[node], True)

    async def _ready(self, node: int, receive: Any) -> bool:
        """Hold a look; whether it is still wanted."""
        if self._closed or node not in self._given or node in self._sent:
            return True
        until_again = self._given[node] + UNHEARD + LATE - time.monotonic()
        if node in self._looks:
            _end(self._looks[node], False)
        look = self._looks[node] = asyncio.get_running_loop().create_future()
        gone = asyncio.ensure_future(receive())
        try:
            hold = min(self._hold, until_again) if until_again > 0 else self._hold
            await asyncio.wait({look, gone}, timeout=hold, return_when=asyncio.FIRST_COMPLETED)
            return not gone.done() and (not look.done() or look.result())
        finally:
            gone.cancel()
            if self._looks.get(node) is look:
                del self._looks[node]


def _end(look: asyncio.Future[bool], wanted: bool) -> None:
    if not look.done():
        look.set_result(wanted)


async def _read(receive: Any) -> list[Any]:
    """The parts of a request, up to `LARGEST`."""
    parts, size = [], 0
    while True:
        part = await receive()
        parts.append(part)
        size += len(part.get("body", b""))
        if part["type"] != "http.request" or not part.get("more_body", False) or size > LARGEST:
            return parts


def _node(parts: list[Any]) -> int:
    """The node that looks, by its own word: who it is, Flower asks behind this. 0 where it is not said."""
    if parts[-1].get("more_body", False):
        return 0
    try:
        return int(PullMessagesRequest.FromString(b"".join(part.get("body", b"") for part in parts)).node.node_id)
    except DecodeError:
        return 0
