"""Read what `docker save` writes: the legacy layout (20.10) and the OCI one, both through `manifest.json`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import posixpath
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from federation.errors import Code, FednnunetError
from orchestrator.bundle.description import MAX_SMALL, ImageConfig
from orchestrator.bundle.tarfiles import CHUNK

_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_MAX_HOPS = 8
"""Links from one layer's path to the next; the legacy layout has one."""


@dataclass(frozen=True)
class SavedImage:
    """One image in an archive of `docker save`.

    Attributes
    ----------
    image : str
        SHA-256 of the configuration, in hex: the image id.
    raw_config : bytes
        The configuration.
    config : ImageConfig
        What it says.
    references : list of str
        The names it was saved under.
    """

    image: str
    raw_config: bytes
    config: ImageConfig
    references: list[str]
    _paths: dict[str, str]
    _archive: tarfile.TarFile
    _where: str

    def layer(self, diff_id: str) -> Iterator[bytes]:
        """A layer's tar file, unpacked, in pieces; the caller checks its SHA-256."""
        stream = _open(self._archive, self._paths[diff_id], self._where)
        with stream:
            first = stream.read(CHUNK)
            if first.startswith(_ZSTD):
                raise _unsuitable(self._where, "a layer is packed with zstd", "Save it with gzip or unpacked layers.")
            if not first.startswith(_GZIP):
                yield first
                while piece := stream.read(CHUNK):
                    yield piece
                return
            yield from _unpacked(first, stream, self._where)


@contextlib.contextmanager
def opened(path: Path, reference: str | None = None) -> Iterator[SavedImage]:
    """Open an archive of `docker save`.

    Parameters
    ----------
    path : Path
        The archive.
    reference : str, optional
        Its name; an image that was saved without a name answers to any.

    Raises
    ------
    FednnunetError
        FNU-150 where it is no such archive or holds no such image, FNU-144 where it lacks a layer.
    """
    where = str(path)
    try:
        archive = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except OSError as error:
        raise _unsuitable(where, error.strerror or "it cannot be read", "Check the path.") from error
    except tarfile.TarError as error:
        raise _unsuitable(where, f"not a tar file: {error}") from error
    with archive:
        try:
            yield _read(archive, where, reference)
        except tarfile.TarError as error:
            raise _unsuitable(where, f"the tar file is damaged: {error}") from error


def _read(archive: tarfile.TarFile, where: str, reference: str | None) -> SavedImage:
    try:
        entries = json.loads(_small(archive, "manifest.json", where))
        names = [name for entry in entries for name in entry.get("RepoTags") or []]
        if reference in names:
            entries = [entry for entry in entries if reference in (entry.get("RepoTags") or [])]
        elif reference is not None and names:
            raise _unsuitable(where, f"it holds {', '.join(map(str, names))}", f"Name one of these, not {reference}.")
        if len(entries) != 1:
            raise _unsuitable(where, "it holds several images, or none", "Name one of them as it was saved.")
        entry: dict[str, Any] = entries[0]
        raw = _small(archive, str(entry["Config"]), where)
        paths, references = [str(path) for path in entry["Layers"]], [str(r) for r in entry.get("RepoTags") or []]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unsuitable(where, "its manifest.json is not that of `docker save`") from error
    config = ImageConfig.read(raw, where)
    if len(paths) != len(config.diff_ids):
        raise FednnunetError(
            Code.LAYER_MISSING, f"{where}: {len(paths)} layers, its configuration names {len(config.diff_ids)}"
        )
    for path in paths:
        _open(archive, path, where).close()
    by_diff_id = dict(zip(config.diff_ids, paths, strict=True))
    return SavedImage(hashlib.sha256(raw).hexdigest(), raw, config, references, by_diff_id, archive, where)


def _open(archive: tarfile.TarFile, path: str, where: str) -> IO[bytes]:
    """A member's bytes; a link is followed inside the archive."""
    name = path
    for _ in range(_MAX_HOPS):
        try:
            member = archive.getmember(name)
        except KeyError as error:
            raise FednnunetError(Code.LAYER_MISSING, f"{where}: {path} is not in it") from error
        if member.isreg():
            stream = archive.extractfile(member)
            if stream is not None:
                return stream
        if not member.issym() and not member.islnk():
            break
        folder = posixpath.dirname(name) if member.issym() else ""
        name = posixpath.normpath(posixpath.join(folder, member.linkname))
    raise _unsuitable(where, f"{path} is neither a file nor a link to one")


def _small(archive: tarfile.TarFile, name: str, where: str) -> bytes:
    with _open(archive, name, where) as stream:
        data = stream.read(MAX_SMALL + 1)
    if len(data) > MAX_SMALL:
        raise _unsuitable(where, f"{name} is larger than {MAX_SMALL} bytes")
    return data


def _unpacked(first: bytes, stream: IO[bytes], where: str) -> Iterator[bytes]:
    """Unpack gzip in pieces of bounded size; several gzip members may follow each other."""
    unpack = zlib.decompressobj(31)
    data = first
    try:
        while data:
            yield unpack.decompress(data, CHUNK)
            data = unpack.unconsumed_tail or (unpack.unused_data if unpack.eof else b"") or stream.read(CHUNK)
            if unpack.eof and data:
                unpack = zlib.decompressobj(31)
        while not unpack.eof and (piece := unpack.decompress(b"", CHUNK)):
            yield piece
        if not unpack.eof:
            raise _unsuitable(where, "a layer ends too early")
    except zlib.error as error:
        raise _unsuitable(where, "a layer cannot be unpacked") from error


def _unsuitable(where: str, what: str, advice: str = "") -> FednnunetError:
    return FednnunetError(Code.IMAGE_UNSUITABLE, f"{where}: {what}", advice or Code.IMAGE_UNSUITABLE.advice)
