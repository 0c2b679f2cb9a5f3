"""Write a bundle from an archive of `docker save`, and sign one: beside the file, then renamed."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.asymmetric import ed25519

from federation import files
from federation.errors import Code, FednnunetError
from orchestrator.bundle import keys
from orchestrator.bundle.archive import SavedImage
from orchestrator.bundle.description import (
    CONFIG,
    DESCRIPTION,
    SBOM,
    SIGNATURE,
    SUMS,
    Description,
    Layer,
    Since,
    layer_member,
    sums_of,
)
from orchestrator.bundle.tarfiles import CHUNK, END, Advance, Member, header, no_progress, padding
from orchestrator.bundle.verify import check_rest, open_file, read_front

_LEVEL = 6
"""Of gzip, as `docker push` uses it."""


@dataclass(frozen=True)
class Base:
    """What a bundle of changed layers leaves out.

    Attributes
    ----------
    since : Since
        Names the image.
    diff_ids : collection of str
        Its layers.
    """

    since: Since
    diff_ids: Collection[str]


def write(
    output: Path,
    image: SavedImage,
    references: list[str],
    created: dt.datetime,
    expires: dt.datetime,
    key: ed25519.Ed25519PrivateKey | None = None,
    base: Base | None = None,
    sbom: Path | None = None,
    advance: Advance = no_progress,
) -> Description:
    """Write a bundle.

    Parameters
    ----------
    output : Path
        The file to write.
    image : SavedImage
        What to put into it.
    references : list of str
        The names that the image gets where it is loaded.
    created, expires : datetime
        From when to when it holds, in UTC.
    key : Ed25519PrivateKey, optional
        Signs it.
    base : Base, optional
        Layers to leave out.
    sbom : Path, optional
        The parts list, CycloneDX.
    advance : Advance
        Called with the number of layer bytes packed.
    """
    where = output.name
    image.config.check_labels(where)
    left_out = base.diff_ids if base is not None else ()
    with (
        files.replacing(output) as temporary,
        tempfile.TemporaryDirectory(prefix=f".{output.name}.layers-", dir=output.parent) as folder,
    ):
        packed: dict[str, Path] = {}
        layers, hashes = [], {}
        for diff_id in image.config.layers:
            included = diff_id not in left_out
            path = Path(folder, f"{diff_id}.tar.gz") if included else None
            size, packed_sha256 = _pack(image.layer(diff_id), path, diff_id, where, advance)
            layers.append(Layer(diff_id=diff_id, size=size, included=included))
            if path is not None:
                name = layer_member(diff_id)
                packed[name], hashes[name] = path, packed_sha256
        if sbom is not None:
            packed[SBOM], hashes[SBOM] = sbom, files.sha256_of(sbom)
        description = Description(
            references=references,
            image=image.image,
            title=image.config.title,
            version=image.config.version,
            revision=image.config.revision,
            platform=image.config.platform,
            created=created.isoformat(),
            expires=expires.isoformat(),
            signer=keys.key_id(key.public_key()) if key is not None else None,
            layers=layers,
            since=base.since if base is not None else None,
        )
        with open(temporary, "xb") as stream:
            _write_front(stream, description, image.raw_config, hashes, key)
            for name, path in packed.items():
                _append(stream, name, path)
                if name != SBOM:
                    path.unlink()
            stream.write(END)
    return description


def sign(source: Path, output: Path, key: ed25519.Ed25519PrivateKey, advance: Advance = no_progress) -> Description:
    """Sign a bundle, in place of whatever signature it has; every member is checked against its manifest on the way.

    Parameters
    ----------
    source : Path
        The bundle.
    output : Path
        The signed one; may be the same file.
    key : Ed25519PrivateKey
        The key.
    advance : Advance
        Called with the number of bytes read.
    """
    with open_file(source) as stream, files.replacing(output) as temporary:
        front, reader = read_front(stream, str(source), advance)
        description = front.description.model_copy(update={"signer": keys.key_id(key.public_key())})
        hashes = {name: digest for name, digest in front.sums.items() if name not in {DESCRIPTION, CONFIG}}
        with open(temporary, "xb") as target:
            _write_front(target, description, front.raw_config, hashes, key)
            check_rest(reader, front, _copier(target))
            target.write(END)
    return description


def _copier(target: BinaryIO) -> Callable[[Member, bytes], None]:
    """Write members as they are read: the header before the first piece, the padding after the last."""
    written: dict[str, int] = {}

    def take(member: Member, piece: bytes) -> None:
        if member.name not in written:
            target.write(header(member.name, member.size))
        written[member.name] = written.get(member.name, 0) + len(piece)
        target.write(piece)
        if written[member.name] == member.size:
            target.write(padding(member.size))

    return take


def _pack(pieces: Iterator[bytes], path: Path | None, diff_id: str, where: str, advance: Advance) -> tuple[int, str]:
    """Pack a layer into `path` (None: only check it); returns its unpacked size and the SHA-256 of the packed file."""
    plain, packed, size = hashlib.sha256(), hashlib.sha256(), 0
    pack = zlib.compressobj(_LEVEL, zlib.DEFLATED, 31)
    with open(path, "xb") if path is not None else contextlib.nullcontext() as stream:
        for piece in pieces:
            plain.update(piece)
            size += len(piece)
            if stream is not None:
                data = pack.compress(piece)
                packed.update(data)
                stream.write(data)
            advance(len(piece))
        if stream is not None:
            data = pack.flush()
            packed.update(data)
            stream.write(data)
    if plain.hexdigest() != diff_id:
        raise FednnunetError(Code.IMAGE_UNSUITABLE, f"{where}: a layer's SHA-256 is not the diff id {diff_id}")
    return size, packed.hexdigest()


def _write_front(
    stream: BinaryIO,
    description: Description,
    raw_config: bytes,
    hashes: dict[str, str],
    key: ed25519.Ed25519PrivateKey | None,
) -> None:
    """Write manifest, signature, description and configuration; `hashes` are those of the members that follow."""
    raw = description.data()
    small = {DESCRIPTION: raw, CONFIG: raw_config}
    sums = sums_of({name: hashlib.sha256(data).hexdigest() for name, data in small.items()} | hashes)
    front = {SUMS: sums} | ({SIGNATURE: key.sign(sums)} if key is not None else {}) | small
    for name, data in front.items():
        stream.write(header(name, len(data)) + data + padding(len(data)))


def _append(stream: BinaryIO, name: str, path: Path) -> None:
    size = path.stat().st_size
    stream.write(header(name, size))
    with open(path, "rb") as source:
        while piece := source.read(CHUNK):
            stream.write(piece)
    stream.write(padding(size))
