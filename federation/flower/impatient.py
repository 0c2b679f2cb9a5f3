"""Connections that send a request slowly, or none, are ended: nobody holds the listeners' files open for nothing.

uvicorn waits for ever for a request's head and body (its one time limit is for a connection that has been answered), so
that whoever reaches the port can hold as many connections as the process may open, without a key. Here a head takes
HEAD seconds at most and a body BODY. The answer may take as long as it does; what is sent of it has to be taken within
BODY.

Nor does one connection fill the memory: a head, or what else httptools keeps until its end, has MOST_HEAD bytes at
most, of requests one waits for the answer to the one before, and of a body that nobody reads any more nothing is kept.
"""

from __future__ import annotations

import asyncio
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from federation.flower import lines

MOST_HEAD = 16 * 1024
"""Bytes of a head, or of a trailer."""
HEAD = 20.0
"""Seconds from the connection, or the answer before, to the end of a request's head."""
BODY = 600.0
"""Seconds for a body, either way: a chunk of 5 MiB at 0.07 Mbit/s."""


class Impatient(HttpToolsProtocol):
    """uvicorn's protocol with an end to its patience."""

    _due: asyncio.TimerHandle | None = None
    _taken: asyncio.TimerHandle | None = None
    _unended = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A connection: its first request is awaited."""
        super().connection_made(transport)
        lines.end_when_dead(transport.get_extra_info("socket"))
        self._within(HEAD)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        self._in_time()
        self._has_taken()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Something came; where it begins no request, one has to follow all the same."""
        self._unended += len(data)
        super().data_received(data)
        if self._unended > MOST_HEAD:
            self._end()
        elif self._due is None and (self.cycle is None or self.cycle.response_complete):
            self._within(HEAD)

    def on_message_begin(self) -> None:
        """A request; the one before may be answered all but for its end, no more than one may wait."""
        if self.pipeline:
            self._end()
            raise PermissionError("more requests at a time than anybody needs")
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._unended = 0
        self._within(BODY)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._unended = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """The answer has been sent: what has come of the body meanwhile is not read any more."""
        if self.cycle is not None and self.cycle.response_complete:  # else it is the one that waits
            self.cycle.body = bytearray()
        super().on_response_complete()

    def on_message_complete(self) -> None:
        """The body is there."""
        self._unended = 0
        self._in_time()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """More has been sent than the other side has taken."""
        super().pause_writing()
        self._has_taken()
        self._taken = self.loop.call_later(BODY, self._end)

    def resume_writing(self) -> None:
        """It has taken it."""
        self._has_taken()
        super().resume_writing()

    def _has_taken(self) -> None:
        if self._taken is not None:
            self._taken.cancel()
            self._taken = None

    def _within(self, seconds: float) -> None:
        self._in_time()
        self._due = self.loop.call_later(seconds, self._end)

    def _in_time(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    def _end(self) -> None:
        self._due = None
        transport: Any = self.transport
        if transport is not None:
            transport.abort()


def open_many_files() -> None:
    """Let this process hold as many connections as the machine allows it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
