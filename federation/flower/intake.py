"""The one path beside Flower's that hospitals reach: a POST of at most 16 KiB, handed to a function of ours.

Rules:

- Any other method is 405; a body over the cap is 413 before it is read; too many at once or in a minute is 429 or 503.
- The body is read within ten seconds, or not at all.
- What is done with it is the function's; it is called in a thread, and answers with a status and a few bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from federation.flower import asgi

MAX_BODY = 16 * 1024
PATIENCE = 10.0
AT_ONCE = 4
Handler = Callable[[bytes], tuple[int, bytes]]


class Intake:
    """An ASGI application for one path.

    Parameters
    ----------
    handler : callable
        ``handler(body) -> (status, answer)``.
    per_minute : int
        How many requests a minute are looked at, whoever they come from (behind a proxy all come from one address).
    """

    def __init__(self, handler: Handler, per_minute: int = 30, clock: Callable[[], float] = time.monotonic) -> None:
        self._handler, self._rate, self._clock = handler, per_minute / 60, clock
        self._most = self._left = float(per_minute)
        self._filled, self._running = clock(), 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI call."""
        status, answer = await self._answer(scope, receive)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(answer)).encode()),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _answer(self, scope: Any, receive: Any) -> tuple[int, bytes]:
        if scope["method"] != "POST":
            return 405, b""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:12]) > MAX_BODY:
            return 413, b""
        if not self._may():
            return 429, b""
        if self._running >= AT_ONCE:
            return 503, b""
        self._running += 1
        try:
            async with asyncio.timeout(PATIENCE):
                body = await asgi.whole(receive, MAX_BODY)
            if body is None:
                return 413, b""
            return await asyncio.to_thread(self._handler, body)
        except asgi.TooLarge:
            return 413, b""
        except TimeoutError:
            return 408, b""
        finally:
            self._running -= 1

    def _may(self) -> bool:
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._filled) * self._rate)
        self._filled = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
