"""Hash-chained JSON lines: a line cannot be changed, dropped or put elsewhere without being found.

Rules:

- A line holds ``seq``, ``at`` (UTC, ISO 8601), ``event``, its own fields, ``prev`` (the hash of the line
  before) and ``hash`` (SHA-256 of the canonical JSON of all the rest).
- A line counts when it is fsynced. `append` returns only then.
- A last line that was torn by a crash never counted: it is cut off when the file is opened for writing.
- Lines that are taken off the end leave a sound chain: whoever has kept its last hash finds that.
- A `Chain` is one process's own; a file that several processes write is for `append`, which locks it.
- Any other damage is FNU-504.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from federation.errors import Code, FednnunetError
from federation.files import canonical_json, disk_errors, locked, sha256_json, sync_directory

GENESIS = "0" * 64
_TAIL = 65536  # bytes read at first from the end of a chain


def _parse(path: Path, data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Lines that hold, and the length in bytes of what holds."""
    lines: list[dict[str, Any]] = []
    previous, good = GENESIS, 0
    for number, raw in enumerate(data.split(b"\n")):
        if good + len(raw) >= len(data):  # no newline after it: torn, or the empty rest
            break
        try:
            line = json.loads(raw)
            body = {key: value for key, value in line.items() if key != "hash"}
            sound = line["seq"] == number and line["prev"] == previous and line["hash"] == sha256_json(body)
        except (ValueError, KeyError, TypeError, AttributeError):
            sound = False
        if not sound:
            raise FednnunetError(Code.JOURNAL_DAMAGED, f"line {number + 1} of {path}")
        lines.append(line)
        previous = line["hash"]
        good += len(raw) + 1
    return lines, good


def read(path: Path) -> list[dict[str, Any]]:
    """All lines of a chain, verified; a torn last line is left out. Raises FNU-504."""
    if not path.exists():
        return []
    return _parse(path, path.read_bytes())[0]


def verify(path: Path) -> int:
    """The number of lines of a sound chain; raises FNU-504 with the first line that does not hold."""
    return len(read(path))


def append(path: Path, event: str, /, **fields: Any) -> dict[str, Any]:
    """Add one line to a chain that several processes write, one at a time; returns it once it is on the disk.

    Only the last line is looked at, so this costs the same however long the chain is; `verify` reads it all.

    Parameters
    ----------
    path : Path
        The file; made, with mode 0600, when it is not there.
    event : str
        What happened.
    **fields
        More about it: JSON values.
    """
    with locked(path):
        whole, torn = _end(path)
        if torn:
            with disk_errors(path):
                os.truncate(path, path.stat().st_size - torn)
        chain = Chain._after(path, _last(path, whole))
        try:
            return chain.append(event, **fields)
        finally:
            chain.close()


def last(path: Path) -> dict[str, Any] | None:
    """The last whole line of a chain, None where there is none yet; raises FNU-504 where its own hash does not hold."""
    found = _last(path, _end(path)[0])
    return found[0] if found else None


def _end(path: Path) -> tuple[bytes, int]:
    """The end of a chain, at least its last two whole lines, and the bytes of a torn line behind them."""
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        tail = b""
        while tail.rstrip(b"\n").count(b"\n") < 2 and len(tail) < size:
            stream.seek(size - min(size, max(_TAIL, 2 * len(tail))))
            tail = stream.read()
    whole = tail[: tail.rfind(b"\n") + 1]
    return whole, len(tail) - len(whole)


def _last(path: Path, lines: bytes) -> list[dict[str, Any]]:
    """The last line, in a list, when its own hash holds; an empty list where there is none."""
    if not lines:
        return []
    try:
        line = json.loads(lines.split(b"\n")[-2])
        if line["hash"] == sha256_json({key: value for key, value in line.items() if key != "hash"}):
            return [line]
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise FednnunetError(Code.JOURNAL_DAMAGED, f"the last line of {path}")


class Chain:
    """A chain opened for writing by one process.

    Parameters
    ----------
    path : Path
        The file; made when it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(path):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            sync_directory(path.parent)
        data = path.read_bytes()
        try:
            self.lines, good = _parse(path, data)
        except FednnunetError:
            self.close()
            raise
        if good < len(data):
            os.ftruncate(self._file, good)
            os.fsync(self._file)

    @classmethod
    def _after(cls, path: Path, last: list[dict[str, Any]]) -> Chain:
        """A chain that knows its last line alone."""
        chain = cls.__new__(cls)
        chain.path, chain.lines = path, last
        with disk_errors(path):
            chain._file = os.open(path, os.O_RDWR | os.O_APPEND)
        return chain

    def append(self, event: str, /, **fields: Any) -> dict[str, Any]:
        """Add one line and return it once it is on the disk. Raises FNU-702 when the disk is full."""
        body = {
            **fields,
            "seq": self.lines[-1]["seq"] + 1 if self.lines else 0,
            "at": dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "prev": self.lines[-1]["hash"] if self.lines else GENESIS,
        }
        line = {**body, "hash": sha256_json(body)}
        data = canonical_json(line) + b"\n"
        length = os.fstat(self._file).st_size
        with disk_errors(self.path):
            try:
                if os.write(self._file, data) != len(data):
                    raise OSError(28, "No space left on device")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, length)
                raise
        self.lines.append(line)
        return line

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.lines)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class Tail:
    """Reads the lines that another process adds to a chain, unverified; a line that is half written waits."""

    def __init__(self, path: Path) -> None:
        self.path, self._position = path, 0

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines added since the last call."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as stream:
            stream.seek(self._position)
            data = stream.read()
        whole = data.rfind(b"\n") + 1
        self._position += whole
        found = []
        for line in data[:whole].splitlines():
            with contextlib.suppress(ValueError):  # damage is told by whoever verifies the chain
                found.append(json.loads(line))
        return found
