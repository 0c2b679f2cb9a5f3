"""A tar file with one spelling: headers follow from name and size, and whatever else stands there is refused.

Python's `tarfile` reads links, extensions and sizes as the file likes to state them; a bundle comes from outside, so
its reader knows regular files and nothing more than that.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from federation.errors import Code, FednnunetError

CHUNK = 1 << 20
"""Bytes read at a time."""
END = bytes(2 * tarfile.BLOCKSIZE)
"""What closes a tar file."""
Advance = Callable[[int], None]


def no_progress(_count: int) -> None:
    """Tell nobody how far it is."""


def header(name: str, size: int) -> bytes:
    """The header block of a regular file: mode 0644, no owner, no date, so that equal content gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "ascii", "strict")


def padding(size: int) -> bytes:
    """The zeros that fill a member of `size` bytes up to whole blocks."""
    return bytes(-size % tarfile.BLOCKSIZE)


@dataclass(frozen=True)
class Member:
    """A member of the file: its name and its size in bytes."""

    name: str
    size: int


class Reader:
    """Read members one after the other.

    Parameters
    ----------
    stream : BinaryIO
        At the file's beginning.
    where : str
        The file's name, for errors.
    advance : Advance
        Called with the number of bytes read.
    """

    def __init__(self, stream: BinaryIO, where: str, advance: Advance = no_progress) -> None:
        self.where = where
        self._stream = stream
        self._advance = advance
        self._left = 0
        self._padding = b""

    def next(self) -> Member | None:
        """The next member; the one before must have been read to its end. None: the file ends as it must."""
        if self._left:
            raise ValueError("the member before has not been read")
        block = self._exactly(tarfile.BLOCKSIZE)
        if block == END[: tarfile.BLOCKSIZE]:
            if self._exactly(tarfile.BLOCKSIZE) != block or self._stream.read(1):
                raise self.changed("something stands after the end")
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
            if info.size < 0 or header(info.name, info.size) != block:
                raise self.changed(f"the header of a member is not a bundle's: {info.name[:100]!r}")
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            raise self.changed("the header of a member cannot be read") from error
        self._left, self._padding = info.size, padding(info.size)
        return Member(info.name, info.size)

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the member that `next` has returned, to be taken to the end."""
        while self._left:
            piece = self._exactly(min(CHUNK, self._left))
            self._left -= len(piece)
            yield piece
        if self._exactly(len(self._padding)) != self._padding:
            raise self.changed("something stands between two members")
        self._padding = b""

    def whole(self, member: Member, cap: int) -> bytes:
        """All bytes of a small member; raises FNU-141 where it is larger than `cap`."""
        if member.size > cap:
            raise self.changed(f"{member.name} has {member.size} bytes, more than {cap}")
        return b"".join(self.chunks())

    def skip(self) -> None:
        """Pass over the member that `next` has returned, unread."""
        self._stream.seek(self._left + len(self._padding), 1)
        self._left, self._padding = 0, b""

    def changed(self, what: str) -> FednnunetError:
        """FNU-141 that names the file."""
        return FednnunetError(Code.BUNDLE_CHANGED, f"{self.where}: {what}")

    def _exactly(self, count: int) -> bytes:
        data = self._stream.read(count)
        self._advance(len(data))
        if len(data) != count:
            raise self.changed("the file ends too early")
        return data
