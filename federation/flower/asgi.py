"""What our ASGI applications share: a body that is read whole, and an answer without one."""

from __future__ import annotations

from typing import Any


class TooLarge(Exception):
    """More of a body came than is taken."""


async def whole(receive: Any, most: int) -> bytes | None:
    """A request's body; None where its line ends first, `TooLarge` where more than `most` bytes come."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(bytes(message.get("body", b"")))
        size += len(parts[-1])
        if size > most:
            raise TooLarge
        if not message.get("more_body", False):
            return b"".join(parts)


async def answer(send: Any, status: int, *headers: tuple[bytes, bytes]) -> None:
    """An answer without a body."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0"), *headers]})
    await send({"type": "http.response.body", "body": b""})
