"""A line of our own between a site and the orchestrator: counted, as slow as asked, cut and held when asked.

A TCP proxy on loopback; what it counts is what goes over the socket, TLS included.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

_PIECE = 2**14  # bytes forwarded at once: at 1 Mbit/s an eighth of a second
_BUFFER = 2**16  # bytes that the kernel takes in before they are forwarded: loopback would take a whole chunk


class Line:
    """One line to a port of this machine.

    Parameters
    ----------
    target : int
        The port that it leads to.
    megabits : float, optional
        Bandwidth in each direction, Mbit/s, for all connections together; None: as fast as it goes.
    latency : float
        Seconds that each piece is under way, one way.

    Attributes
    ----------
    port : int
        Where the line begins.
    up, down : int
        Bytes that came from and went to the site.
    """

    def __init__(self, target: int, megabits: float | None = None, latency: float = 0.0) -> None:
        self._target, self._megabits, self._latency = target, megabits, latency
        self.up = self.down = self.port = 0
        self._free = {"up": 0.0, "down": 0.0}
        self._held, self._cut = 0.0, 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, daemon=True, name="line").start()
        self._ready.wait()

    def cut(self, seconds: float) -> None:
        """Reset every connection, and refuse new ones for so long."""
        self._cut = time.monotonic() + seconds
        self._loop.call_soon_threadsafe(self._reset)

    def hold(self, seconds: float) -> None:
        """Forward nothing for so long, while connections stay open: a half-open line. Then they are reset."""
        self._held = time.monotonic() + seconds
        self._loop.call_soon_threadsafe(lambda: self._loop.call_later(seconds, self._reset))

    def _reset(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)

        async def begin() -> None:
            listening = _socket()
            listening.bind(("127.0.0.1", 0))
            await asyncio.start_server(self._connection, sock=listening, limit=_PIECE)
            self.port = listening.getsockname()[1]
            self._ready.set()

        self._loop.run_until_complete(begin())
        self._loop.run_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if time.monotonic() < self._cut:
            writer.transport.abort()
            return
        with contextlib.suppress(OSError):
            far = _socket()
            await self._loop.sock_connect(far, ("127.0.0.1", self._target))
            far_reader, far_writer = await asyncio.open_connection(sock=far, limit=_PIECE)
            self._open |= {writer, far_writer}
            try:
                await asyncio.gather(self._copy(reader, far_writer, "up"), self._copy(far_reader, writer, "down"))
            finally:
                self._open -= {writer, far_writer}
                for one in (writer, far_writer):
                    one.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)  # what is under way: latency holds up nobody
        delivering = asyncio.create_task(self._deliver(pieces, writer))
        with contextlib.suppress(OSError):
            while data := await reader.read(_PIECE):
                setattr(self, direction, getattr(self, direction) + len(data))
                await self._room(len(data), direction)
                await pieces.put((time.monotonic() + self._latency, data))
        await pieces.put((0.0, b""))
        await delivering

    async def _deliver(self, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        broken = False
        while (piece := await pieces.get())[1]:
            if broken:  # the rest falls into the void
                continue
            await asyncio.sleep(max(0.0, piece[0] - time.monotonic()))
            while (held := self._held - time.monotonic()) > 0:
                await asyncio.sleep(held)
            try:
                writer.write(piece[1])
                await writer.drain()
            except (OSError, RuntimeError):
                broken = True
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof() if writer.can_write_eof() else writer.close()

    async def _room(self, size: int, direction: str) -> None:
        """Until the line has room for so many bytes."""
        while (held := self._held - time.monotonic()) > 0:
            await asyncio.sleep(held)
        if self._megabits is not None:
            now = time.monotonic()
            self._free[direction] = max(now, self._free[direction]) + size * 8e-6 / self._megabits
            await asyncio.sleep(self._free[direction] - now)


def _socket() -> socket.socket:
    """A socket that is not blocking, and takes in little."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    made.setblocking(False)
    return made
