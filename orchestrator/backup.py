"""`orchestrator backup`: one archive of the state, as it was at one moment, while everything runs.

Rules:

- The moment is one of hard links, beside the state: a file that is replaced or removed later is in the archive as it
  was. A file that only grows (journals, the audit chain) ends where it ended then.
- A study's moment is its journal's length before its files were linked. A file that recovery needs is there before the
  line that speaks of it, and goes only after a line `weights`: where one was written meanwhile, we link it anew.
- What the next start makes anew is left out: the SuperLink's database (what is on its way, who is connected), logs,
  caches, locks, files that are just being written.
- The archive is a plain tar with the state folder's name at its root. It holds the authority's private keys: mode 0600.
  It is written in one pass, so that it can also leave a container through a pipe. Whether one that came through a pipe
  is whole, the exit status says, not the archive: tar takes one that was cut off between two files.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from federation import files
from federation.errors import Code, FednnunetError

FOLDER = ".backup"
JOURNAL = "journal.jsonl"
STUDIES = "studies"
_ANEW = ("superlink.db", "logs", "cache", "flower", "lock", "status.json", "role-", FOLDER)
_TRIES, _PAUSE = 200, 0.05


@dataclass(frozen=True)
class Backup:
    """What was written: number of files, their bytes, SHA-256 of the archive."""

    number: int
    size: int
    sha256: str


def write(state: Path, output: Path) -> Backup:
    """Archive a state folder.

    Parameters
    ----------
    state : Path
        Folder made by `fednnunet federation init`.
    output : Path
        The tar to write, whole or not at all.

    Raises
    ------
    FednnunetError
        FNU-113 no state, FNU-129 the output is there, FNU-132 rounds end faster than they are linked, FNU-702, FNU-705
        another backup of this state is under way.
    """
    _check(state)
    if output.exists():
        raise FednnunetError(Code.OUTPUT_EXISTS, str(output))
    with files.disk_errors(output), files.replacing(output) as temporary:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
            return stream_to(state, stream)


def stream_to(state: Path, stream: IO[bytes]) -> Backup:
    """Archive a state folder into a stream that need not be a file; raises FNU-113, FNU-132, FNU-705."""
    _check(state)
    moment = state / FOLDER
    with files.locked(state / f"{FOLDER}.lock", FednnunetError(Code.ALREADY_RUNNING, f"{state}: another backup")):
        shutil.rmtree(moment, ignore_errors=True)  # of one that was killed
        try:
            with files.disk_errors(state):
                sizes = _take(state, moment)
            hashed = _Hashed(stream)
            _archive(moment, sizes, state.name, hashed)
            stream.flush()
            return Backup(len(sizes), sum(sizes.values()), hashed.digest.hexdigest())
        finally:
            shutil.rmtree(moment, ignore_errors=True)


def _check(state: Path) -> None:
    if not (state / "authority").is_dir():
        raise FednnunetError(
            Code.STATE_NOT_READY, f"{state} holds no authority; name the folder of `fednnunet federation init`"
        )


class _Hashed:
    """A stream that is written, and the SHA-256 of what went into it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write."""
        self.digest.update(data)
        return self._stream.write(data)


def _take(state: Path, moment: Path) -> dict[Path, int]:
    """Link everything that belongs in a backup below `moment`; each file's bytes, by its path there."""
    moment.mkdir(mode=0o700)
    studies = state / STUDIES
    sizes = _link(state, moment, (*_ANEW, STUDIES))
    if studies.is_dir():
        _like(studies, moment / studies.name)
        for study in sorted(path for path in studies.iterdir() if path.is_dir()):
            sizes |= _link_study(study, moment / studies.name / study.name)
    return sizes


def _link_study(study: Path, target: Path) -> dict[Path, int]:
    """Link a study within one round, its journal as long as it was before."""
    journal = study / JOURNAL
    for _ in range(_TRIES):
        length = journal.stat().st_size if journal.exists() else 0
        sizes = _link(study, target)
        if target / JOURNAL in sizes:
            sizes[target / JOURNAL] = length
        if not _lets_go(journal, length):
            return sizes
        shutil.rmtree(target)
        time.sleep(_PAUSE)
    raise FednnunetError(Code.BACKUP_RESTLESS, str(study))


def _lets_go(journal: Path, length: int) -> bool:
    """Whether a journal has got a line since it was `length` bytes long after which files are removed."""
    if not journal.exists():
        return False
    with open(journal, "rb") as stream:
        stream.seek(length)
        return b'"weights"' in stream.read()


def _link(source: Path, target: Path, skipped: tuple[str, ...] = ()) -> dict[Path, int]:
    """Link a folder's files below `target`, without names that begin as `skipped` and what vanishes meanwhile.

    Of a Secret that Kubernetes mounts, the names that it shows, not the folders (`..data`) that they point to.
    """
    sizes: dict[Path, int] = {}
    _like(source, target)
    for path in sorted(source.iterdir()):
        if _unfinished(path) or path.name.startswith(("..", *skipped)):
            continue
        with contextlib.suppress(FileNotFoundError):
            if path.is_dir():
                sizes |= _link(path, target / path.name)
            elif path.is_file():
                sizes[target / path.name] = _same(path, target / path.name)
    return sizes


def _like(source: Path, target: Path) -> None:
    """A folder with another's mode."""
    target.mkdir(exist_ok=True)
    target.chmod(source.stat().st_mode)


def _same(path: Path, target: Path) -> int:
    """Link a file, or copy it where it lies in another file system (a mounted Secret); its bytes at this moment."""
    try:
        os.link(path.resolve(strict=True), target)  # os.link itself follows no link on Linux
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM):
            raise
        shutil.copy2(path, target)
    return target.stat().st_size


def _unfinished(path: Path) -> bool:
    return any(path.match(pattern) for pattern in files.UNFINISHED)


def _archive(moment: Path, sizes: dict[Path, int], name: str, stream: Any) -> None:
    """Write the linked files as a tar whose root is `name`."""
    with tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        archive.add(moment, name, recursive=False)
        for path in sorted(moment.rglob("*")):
            member = f"{name}/{path.relative_to(moment)}"
            if path.is_dir():
                archive.add(path, member, recursive=False)
                continue
            with open(path, "rb") as content:
                info = archive.gettarinfo(arcname=member, fileobj=content)
                info.type, info.linkname, info.size = tarfile.REGTYPE, "", sizes[path]
                archive.addfile(info, content)
