"""Files that are whole or not there: written beside, fsynced, renamed.

Rules:

- Nothing that another process reads is ever written in place.
- A rename counts only when its folder has been fsynced.
- A full or read-only disk is error FNU-702, and what was half written is taken away again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from federation.errors import Code, FednnunetError

_FULL = {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG}
_DISK = {*_FULL, errno.EACCES, errno.EPERM}


def says_disk(error: BaseException) -> bool:
    """Whether an error says by itself that a disk is full or read-only: what one who reads files cannot meet."""
    return isinstance(error, OSError) and error.errno in _FULL


def disk_error(error: OSError, path: Path) -> FednnunetError | None:
    """FNU-702 for an ``OSError`` that says the disk is full or not writable, else None."""
    if error.errno in _DISK:
        return FednnunetError(Code.DISK_FULL, f"{error.strerror}: {path}")
    return None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "full" and "read-only" from the operating system into FNU-702."""
    try:
        yield
    except OSError as error:
        numbered = disk_error(error, path)
        if numbered is None:
            raise
        raise numbered from error


def sync_directory(path: Path) -> None:
    """fsync a directory, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """fsync a file that somebody else wrote."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


UNFINISHED = (".*.writing-*", ".*.retired-*")
"""Names of what is being written or replaced; where nobody does that, a process that was killed has left it."""


def beside(path: Path) -> Path:
    """The name under which `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.writing-{os.getpid()}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; when the block ends well, it becomes `path`, durably."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    with disk_errors(path):
        try:
            yield temporary
            sync_file(temporary)
            os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            stream.write(data)


def write_new(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that must not be there, whole or not at all; raises ``FileExistsError`` and changes nothing then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    with disk_errors(path):
        try:
            with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
                stream.write(data)
            sync_file(temporary)
            os.link(temporary, path)
            sync_directory(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: FednnunetError | None = None) -> Iterator[None]:
    """One process at a time: wait for a lock file, hold it for the block; a process that dies gives it back.

    With `busy` nobody waits: that is raised where another process holds it.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            raise busy or AssertionError from None
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, whole or not at all; keys in their order, which nnU-Net's labels count by."""
    write_bytes(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_bytes())


def remove_directory(path: Path) -> None:
    """Take a folder away at once: whoever makes it anew meanwhile loses nothing of it, and is not in the way."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(_retire(path), ignore_errors=True)


def _retire(path: Path) -> Path:
    """Give a folder another name; nothing else has it."""
    retired = path.with_name(f".{path.name}.retired-{os.getpid()}")
    shutil.rmtree(retired, ignore_errors=True)
    os.replace(path, retired)
    return retired


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; when the block ends well, it becomes `path`, durably.

    Every file in it is fsynced first. A `path` that is already there is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    with disk_errors(path):
        try:
            temporary.mkdir()
            yield temporary
            for item in sorted(temporary.rglob("*")):
                if item.is_file() and not item.is_symlink():
                    sync_file(item)
                elif item.is_dir():
                    sync_directory(item)
            sync_directory(temporary)
            if path.exists():
                retired = _retire(path)
                os.replace(temporary, path)
                shutil.rmtree(retired, ignore_errors=True)
            else:
                os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def canonical_json(value: Any) -> bytes:
    """One spelling of a JSON value: sorted keys, no spaces, UTF-8. Hashes are taken over this."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hex."""
    return hashlib.sha256(canonical_json(value)).hexdigest()
