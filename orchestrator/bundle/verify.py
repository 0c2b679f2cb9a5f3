"""Check a bundle from its first byte to its last, and hand out its layers only as they are checked again."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from cryptography.hazmat.primitives.asymmetric import ed25519

from federation import keypairs
from federation.enrollment import SKEW
from federation.errors import Code, FednnunetError
from orchestrator.bundle import keys
from orchestrator.bundle.description import (
    CONFIG,
    DESCRIPTION,
    MAX_SMALL,
    SBOM,
    SIGNATURE,
    SIGNATURE_BYTES,
    SUMS,
    Description,
    ImageConfig,
    Layer,
    docker_manifest,
    layer_member,
    read_sums,
)
from orchestrator.bundle.tarfiles import CHUNK, END, Advance, Member, Reader, header, no_progress, padding


class LayerSource(Protocol):
    """Where layers come from that a bundle leaves out; nothing that it gives is trusted."""

    def layer(self, diff_id: str) -> Iterator[bytes] | None:
        """The layer's tar file in pieces; None: it is not there."""


@dataclass(frozen=True)
class Front:
    """The small members at the beginning, with their chain checked but no signature yet.

    Attributes
    ----------
    raw_sums, signature : bytes
        The manifest and, where there is one, its signature.
    sums : dict of str to str
        SHA-256 by member name, in the file's order.
    description : Description
        `bundle.json`.
    raw_config : bytes
        The image's configuration.
    config : ImageConfig
        What it says.
    """

    raw_sums: bytes
    signature: bytes | None
    sums: dict[str, str]
    description: Description
    raw_config: bytes
    config: ImageConfig


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a bundle; raises FNU-140 where there is none."""
    try:
        stream = open(path, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise FednnunetError(Code.BUNDLE_UNREADABLE, f"{path}: {error.strerror}") from error
    with stream:
        yield stream


def check(
    stream: BinaryIO,
    where: str,
    trusted: Sequence[ed25519.Ed25519PublicKey],
    now: dt.datetime,
    sources: Sequence[LayerSource] = (),
    advance: Advance = no_progress,
) -> tuple[Front, ed25519.Ed25519PublicKey]:
    """Check a bundle.

    Parameters
    ----------
    stream : BinaryIO
        The bundle, seekable.
    where : str
        Its name, for errors.
    trusted : sequence of Ed25519PublicKey
        One of them must have signed it.
    now : datetime
        The time.
    sources : sequence of LayerSource
        If any is given, the layers that the bundle leaves out are checked in them too.
    advance : Advance
        Called with the number of bytes read.

    Returns
    -------
    Front
        The checked description.
    Ed25519PublicKey
        Whose signature it is.

    Raises
    ------
    FednnunetError
        FNU-140 to FNU-146 and FNU-155.
    """
    stream.seek(0)
    reader = Reader(stream, where, advance)
    raw_sums, signature, member = _signed_part(reader)
    if signature is None:
        raise FednnunetError(Code.BUNDLE_UNSIGNED, where)
    key = next((key for key in trusted if keypairs.holds(key, signature, raw_sums)), None)
    if key is None:
        raise _why_not(stream, where, trusted)
    front = _front(reader, raw_sums, signature, member)
    _check_dates(front.description, now, where)
    check_rest(reader, front)
    if sources:
        for layer in front.description.layers:
            if not layer.included:
                for _ in base_layer(layer, sources, where):
                    pass
    return front, key


def read_front(stream: BinaryIO, where: str, advance: Advance = no_progress) -> tuple[Front, Reader]:
    """Read the small members without any trust; the reader then stands before the first layer."""
    stream.seek(0)
    reader = Reader(stream, where, advance)
    raw_sums, signature, member = _signed_part(reader)
    return _front(reader, raw_sums, signature, member), reader


def check_rest(reader: Reader, front: Front, take: Callable[[Member, bytes], None] | None = None) -> None:
    """Check layers and parts list up to the file's end.

    Parameters
    ----------
    reader : Reader
        It stands before the first layer.
    front : Front
        What must follow.
    take : callable, optional
        Gets each member's bytes as they stand in the file, piece by piece.
    """
    for layer in front.description.included:
        member = _expected(reader, layer_member(layer.diff_id))
        packed = _hashed(reader, member, front.sums, take)
        for _ in unpacked(packed, layer, reader.where):
            pass
    if SBOM in front.sums:
        for _ in _hashed(reader, _expected(reader, SBOM), front.sums, take):
            pass
    extra = reader.next()
    if extra is not None:
        raise reader.changed(f"a member that its manifest does not name: {extra.name!r}")


def docker_archive(
    stream: BinaryIO, where: str, front: Front, sources: Sequence[LayerSource] = (), advance: Advance = no_progress
) -> Iterator[bytes]:
    """What `docker load` reads, in pieces; each layer is checked once more as it passes, the manifest comes last.

    So a file that changes after it was checked gives an archive that ends without a manifest, which nothing loads.

    Parameters
    ----------
    stream : BinaryIO
        The bundle, the same open file that was checked.
    where : str
        Its name, for errors.
    front : Front
        What `check` has returned.
    sources : sequence of LayerSource
        Where the layers are that the bundle leaves out.
    advance : Advance
        Called with the number of bytes handed out.
    """
    again, reader = read_front(stream, where)
    if again != front:
        raise reader.changed("it has been changed since it was checked")
    for layer in front.description.layers:
        yield header(f"{layer.diff_id}.tar", layer.size)
        if layer.included:
            packed = _hashed(reader, _expected(reader, layer_member(layer.diff_id)), front.sums, None)
            pieces = unpacked(packed, layer, where)
        else:
            pieces = base_layer(layer, sources, where)
        for piece in pieces:
            advance(len(piece))
            yield piece
        yield padding(layer.size)
    manifest = docker_manifest(front.description, front.config)
    for name, data in ((f"{front.description.image}.json", front.raw_config), ("manifest.json", manifest)):
        yield header(name, len(data)) + data + padding(len(data))
    yield END


def unpacked(packed: Iterator[bytes], layer: Layer, where: str) -> Iterator[bytes]:
    """Unpack a layer up to its declared size; raises FNU-141 unless size and SHA-256 are those declared."""
    unpack, digest, size = zlib.decompressobj(31), hashlib.sha256(), 0
    wrong = FednnunetError(Code.BUNDLE_CHANGED, f"{where}: layer {layer.diff_id} is not the one that was signed")
    for data in packed:
        rest = data
        while rest:
            if unpack.eof:
                raise wrong
            try:
                piece = unpack.decompress(rest, CHUNK)
            except zlib.error as error:
                raise wrong from error
            rest = unpack.unconsumed_tail or unpack.unused_data
            size += len(piece)
            if size > layer.size:
                raise FednnunetError(
                    Code.BUNDLE_CHANGED,
                    f"{where}: layer {layer.diff_id} unpacks to more than the {layer.size} declared",
                )
            digest.update(piece)
            yield piece
    while not unpack.eof and (piece := unpack.decompress(b"", CHUNK)):
        size += len(piece)
        digest.update(piece)
        yield piece
    if not unpack.eof or size != layer.size or digest.hexdigest() != layer.diff_id:
        raise wrong


def base_layer(layer: Layer, sources: Sequence[LayerSource], where: str) -> Iterator[bytes]:
    """A layer that the bundle leaves out, from the first source that has it; raises FNU-144."""
    for source in sources:
        pieces = source.layer(layer.diff_id)
        if pieces is None:
            continue
        digest, size = hashlib.sha256(), 0
        for piece in pieces:
            size += len(piece)
            if size > layer.size:
                break
            digest.update(piece)
            yield piece
        if size != layer.size or digest.hexdigest() != layer.diff_id:
            raise FednnunetError(Code.LAYER_MISSING, f"{where}: layer {layer.diff_id} has been changed in the base")
        return
    raise FednnunetError(Code.LAYER_MISSING, f"{where} builds on another image: layer {layer.diff_id} is not at hand")


class BundleBase:
    """The layers of another bundle."""

    def __init__(self, stream: BinaryIO, where: str) -> None:
        front, _ = read_front(stream, where)
        self._stream, self._where = stream, where
        self._layers = {layer.diff_id: layer for layer in front.description.included}

    def layer(self, diff_id: str) -> Iterator[bytes] | None:
        """The layer's tar file in pieces; None: it is not there."""
        wanted = self._layers.get(diff_id)
        return None if wanted is None else self._pieces(wanted)

    def _pieces(self, layer: Layer) -> Iterator[bytes]:
        _, reader = read_front(self._stream, self._where)
        while (member := reader.next()) is not None:
            if member.name == layer_member(layer.diff_id):
                yield from unpacked(reader.chunks(), layer, self._where)
                return
            reader.skip()
        raise FednnunetError(Code.LAYER_MISSING, f"{self._where}: layer {layer.diff_id} is not in it")


# ---- the beginning ---------------------------------------------------------------------------------------------------


def _signed_part(reader: Reader) -> tuple[bytes, bytes | None, Member]:
    """Manifest, signature or None, and the member that follows; raises FNU-140 for a file that is no bundle."""
    try:
        member = reader.next()
    except FednnunetError as error:
        raise FednnunetError(Code.BUNDLE_UNREADABLE, error.found) from error
    if member is None or member.name != SUMS:
        raise FednnunetError(Code.BUNDLE_UNREADABLE, f"{reader.where}: its first member is not {SUMS}")
    raw_sums = reader.whole(member, MAX_SMALL)
    member, signature = reader.next(), None
    if member is not None and member.name == SIGNATURE:
        signature = reader.whole(member, SIGNATURE_BYTES)
        if len(signature) != SIGNATURE_BYTES:
            raise FednnunetError(Code.BUNDLE_SIGNATURE_CHANGED, f"{reader.where}: {SIGNATURE} is not 64 bytes")
        member = reader.next()
    if member is None:
        raise reader.changed("it ends after its manifest")
    return raw_sums, signature, member


def _front(reader: Reader, raw_sums: bytes, signature: bytes | None, member: Member) -> Front:
    sums = read_sums(raw_sums, reader.where)
    if member.name != DESCRIPTION:
        raise reader.changed(f"{member.name!r} where {DESCRIPTION} belongs")
    raw = reader.whole(member, MAX_SMALL)
    _equal(reader, DESCRIPTION, raw, sums)
    description = Description.read(raw, reader.where)
    raw_config = reader.whole(_expected(reader, CONFIG), MAX_SMALL)
    _equal(reader, CONFIG, raw_config, sums)
    if hashlib.sha256(raw_config).hexdigest() != description.image:
        raise reader.changed(f"{CONFIG} is not that of the image that {DESCRIPTION} names")
    config = ImageConfig.read(raw_config, reader.where)
    stated = (description.title, description.version, description.revision, description.platform)
    if stated != (config.title, config.version, config.revision, config.platform):
        raise reader.changed(f"{DESCRIPTION} and {CONFIG} differ in title, version, revision or platform")
    described = [layer.diff_id for layer in description.layers]
    if described != config.layers:
        raise FednnunetError(
            Code.LAYER_MISSING, f"{reader.where}: its layers are not those that its configuration names"
        )
    if description.since is None and len(description.included) != len(described):
        raise FednnunetError(Code.LAYER_MISSING, f"{reader.where}: it leaves layers out and names no base")
    members = [DESCRIPTION, CONFIG, *(layer_member(layer.diff_id) for layer in description.included)]
    if [name for name in sums if name != SBOM] != members:
        raise FednnunetError(Code.LAYER_MISSING, f"{reader.where}: {SUMS} names other layers than {DESCRIPTION}")
    return Front(raw_sums, signature, sums, description, raw_config, config)


def _expected(reader: Reader, name: str) -> Member:
    """The next member, which must be this one."""
    member = reader.next()
    if member is not None and member.name == name:
        return member
    if name.startswith("layers/") and (member is None or member.name.startswith("layers/") or member.name == SBOM):
        raise FednnunetError(Code.LAYER_MISSING, f"{reader.where}: {name} is not in it")
    found = "nothing" if member is None else repr(member.name)
    raise reader.changed(f"{found} where {name} belongs")


def _hashed(
    reader: Reader, member: Member, sums: dict[str, str], take: Callable[[Member, bytes], None] | None
) -> Iterator[bytes]:
    digest = hashlib.sha256()
    for piece in reader.chunks():
        digest.update(piece)
        if take is not None:
            take(member, piece)
        yield piece
    if digest.hexdigest() != sums[member.name]:
        raise _differs(reader, member.name)


def _equal(reader: Reader, name: str, data: bytes, sums: dict[str, str]) -> None:
    if hashlib.sha256(data).hexdigest() != sums[name]:
        raise _differs(reader, name)


def _differs(reader: Reader, name: str) -> FednnunetError:
    return reader.changed(f"the SHA-256 of {name} is not the one in {SUMS}")


# ---- signature and dates ---------------------------------------------------------------------------------------------


def _why_not(stream: BinaryIO, where: str, trusted: Sequence[ed25519.Ed25519PublicKey]) -> FednnunetError:
    """Why no trusted signature holds: the manifest fits its members no more, the key is another, or the signature is.

    What is read here only chooses the words of a refusal.
    """
    try:
        front, reader = read_front(stream, where)
        if front.description.signer not in {keys.key_id(key) for key in trusted}:
            signer = front.description.signer or "nobody"
            known = ", ".join(keys.words(key) for key in trusted)
            return FednnunetError(Code.SIGNER_UNKNOWN, f"{where}: it names key {signer}; trusted here: {known}")
        check_rest(reader, front)
    except FednnunetError as error:
        return FednnunetError(Code.BUNDLE_MANIFEST_CHANGED, f"no signature holds, and {error.found}")
    return FednnunetError(Code.BUNDLE_SIGNATURE_CHANGED, f"{where}: the rest is whole, {SIGNATURE} is not its own")


def _check_dates(description: Description, now: dt.datetime, where: str) -> None:
    created, expires = (dt.datetime.fromisoformat(text) for text in (description.created, description.expires))
    if now > expires:
        raise FednnunetError(Code.BUNDLE_DATES, f"{where} has expired on {expires:%Y-%m-%d %H:%M} UTC")
    if now < created - SKEW:
        raise FednnunetError(Code.BUNDLE_DATES, f"{where} is of {created:%Y-%m-%d %H:%M} UTC, this clock says {now:%c}")
