"""From the engine into a bundle and back: what `fednnunet image save`, `verify` and `load` do.

Order of a load: open the file once; verify all of it; only then ask the engine what is installed; refuse an older
version; hand the layers over, each hashed again as it passes.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from federation import files
from federation.enrollment import now
from federation.errors import Code, FednnunetError
from orchestrator.admin.images import Engine, engine
from orchestrator.admin.transfer import transfer
from orchestrator.bundle import archive as archives
from orchestrator.bundle import keys
from orchestrator.bundle.description import SUMS, Description, ImageConfig, Since
from orchestrator.bundle.verify import (
    BundleBase,
    Front,
    LayerSource,
    check,
    docker_archive,
    open_file,
    read_front,
)
from orchestrator.bundle.versions import version_key
from orchestrator.bundle.write import Base, write


@dataclass(frozen=True)
class Checked:
    """A verified bundle, still open.

    Attributes
    ----------
    front : Front
        What it holds.
    words : str
        The signer's key, as people read it.
    where : str
        The file's name.
    stream : BinaryIO
        The open file.
    sources : tuple of LayerSource
        Where the layers are that it leaves out; empty: none was given.
    """

    front: Front
    words: str
    where: str
    stream: BinaryIO
    sources: tuple[LayerSource, ...]


class ArchiveBase:
    """The layers of an archive of `docker save`."""

    def __init__(self, saved: archives.SavedImage) -> None:
        self._saved = saved

    def layer(self, diff_id: str) -> Iterator[bytes] | None:
        """The layer's tar file in pieces; None: it is not there."""
        return self._saved.layer(diff_id) if diff_id in self._saved.config.diff_ids else None


def check_output(path: Path | None) -> None:
    """Raise FNU-112 where a file shall be written and a folder is."""
    if path is not None and path.is_dir():
        raise FednnunetError(Code.SETTINGS_INVALID, f"{path} is a folder", "Name a file in it.")


def save(
    reference: str, key: Path | None, archive: Path | None, since: str | None, days: int, output: Path | None
) -> tuple[Path, Description]:
    """Write a bundle; see the command for the parameters.

    Returns
    -------
    Path
        The bundle.
    Description
        What it holds.
    """
    check_output(output)
    private = keys.load_private(key) if key is not None else None
    base = _since(since) if since is not None else None
    folder = output.parent if output is not None else Path()
    with contextlib.ExitStack() as stack:
        stack.enter_context(files.disk_errors(output or folder))
        folder.mkdir(parents=True, exist_ok=True)
        name = reference if ":" in reference.rsplit("/", 1)[-1] else f"{reference}:latest"
        if archive is None:
            spool = stack.enter_context(tempfile.TemporaryDirectory(prefix=".image-save-", dir=folder))
            archive = Path(spool, "image.tar")
            with engine() as docker:
                found = docker.image(reference)
                if name not in found.references:
                    name = next(iter(found.references), f"sha256:{found.id}")
                _spool(docker, name, found.size, archive)
        image = stack.enter_context(archives.opened(archive, name))
        references = [] if name.startswith("sha256:") else [name]
        image.config.check_labels(reference)
        path = output or Path(_file_name(references, image.config, base))
        sbom = _sbom(archive, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".image-sbom-", dir=folder))))
        moment = now()
        with transfer("save", archive.stat().st_size) as advance:
            description = write(
                path, image, references, moment, moment + dt.timedelta(days=days), private, base, sbom, advance
            )
    return path, description


@contextlib.contextmanager
def verified(bundle: Path, trusted: Sequence[Path], bases: Sequence[Path]) -> Iterator[Checked]:
    """Verify a bundle and keep it open; raises FNU-140 to FNU-146, FNU-154 and FNU-155."""
    public = keys.load_public(trusted)
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(open_file(bundle))
        sources = tuple(stack.enter_context(_base(path)) for path in bases)
        with transfer("verify", os.fstat(stream.fileno()).st_size) as advance:
            front, key = check(stream, str(bundle), public, now(), sources, advance)
        yield Checked(front, keys.words(key), str(bundle), stream, sources)


def to_archive(checked: Checked, path: Path, installed: str | None, allow_downgrade: bool) -> None:
    """Write what `docker load` reads."""
    check_output(path)
    if installed is not None:
        _no_downgrade(checked.front.description, installed, allow_downgrade)
    with files.replacing(path) as temporary, open(temporary, "xb") as stream:
        with transfer("write", _size(checked.front.description)) as advance:
            for piece in docker_archive(checked.stream, checked.where, checked.front, checked.sources, advance):
                stream.write(piece)


def load(checked: Checked, allow_downgrade: bool) -> None:
    """Load a verified bundle into the engine; raises FNU-144, FNU-147, FNU-148 or FNU-153."""
    description = checked.front.description
    with contextlib.ExitStack() as stack:
        docker = stack.enter_context(engine())
        newest = docker.newest(description.title)
        if newest is not None:
            _no_downgrade(description, newest.version, allow_downgrade)
        sources = checked.sources
        if description.since is not None and not sources:
            sources = (stack.enter_context(_installed_base(docker, description.since)),)
        with transfer("load", _size(description)) as advance:
            docker.load(docker_archive(checked.stream, checked.where, checked.front, sources, advance))
        docker.image(description.references[0] if description.references else f"sha256:{description.image}")


def _no_downgrade(description: Description, installed: str, allowed: bool) -> None:
    here, there = version_key(description.version), version_key(installed)
    if there is None:
        raise FednnunetError(Code.SETTINGS_INVALID, f"{installed!r} is not a version")
    if here is not None and here >= there:
        return
    if not allowed:
        raise FednnunetError(
            Code.OLDER_THAN_INSTALLED,
            f"{description.title}: {installed} is installed, the bundle holds {description.version}",
        )
    print(
        f"WARNING: DOWNGRADE of {description.title}: {installed} is installed, {description.version} is loaded, "
        "as --allow-downgrade says",
        file=sys.stderr,
    )


def _size(description: Description) -> int:
    return sum(layer.size for layer in description.layers)


# ---- bases -----------------------------------------------------------------------------------------------------------


def _is_bundle(path: Path) -> bool:
    """Whether the file begins as a bundle does; what it holds is checked where it is read."""
    with open_file(path) as stream:
        return stream.read(len(SUMS)) == SUMS.encode()


@contextlib.contextmanager
def _base(path: Path) -> Iterator[LayerSource]:
    """A file's layers: of a bundle, or of an archive of `docker save`."""
    if _is_bundle(path):
        with open_file(path) as stream:
            yield BundleBase(stream, str(path))
    else:
        with archives.opened(path) as saved:
            yield ArchiveBase(saved)


@contextlib.contextmanager
def _installed_base(docker: Engine, since: Since) -> Iterator[LayerSource]:
    """The layers of the image that a bundle builds on, from the engine; raises FNU-144 where it is not there."""
    for reference in (f"sha256:{since.image}", *since.references):
        try:
            found = docker.image(reference)
        except FednnunetError as error:
            if error.code is not Code.IMAGE_UNKNOWN:
                raise
        else:
            break
    else:
        raise FednnunetError(
            Code.LAYER_MISSING, f"it builds on version {since.version}, image {since.image[:12]}: not in the engine"
        )
    with tempfile.TemporaryDirectory(prefix="fednnunet-base-") as spool:
        path = Path(spool, "base.tar")
        with files.disk_errors(path):
            _spool(docker, reference, found.size, path)
        with archives.opened(path) as saved:
            yield ArchiveBase(saved)


def _since(old: str) -> Base:
    """What a bundle of changed layers leaves out: the layers of a bundle, an archive or an image."""
    path = Path(old)
    if not path.is_file():
        with engine() as docker:
            found = docker.image(old)
        since = Since(image=found.id, version=found.version, references=list(found.references))
        return Base(since, frozenset(found.diff_ids))
    if _is_bundle(path):
        with open_file(path) as stream:
            front, _ = read_front(stream, old)
        described = front.description
        since = Since(image=described.image, version=described.version, references=described.references)
        return Base(since, frozenset(front.config.diff_ids))
    with archives.opened(path) as saved:
        since = Since(image=saved.image, version=saved.config.version, references=saved.references)
        return Base(since, frozenset(saved.config.diff_ids))


# ---- saving ----------------------------------------------------------------------------------------------------------


def _spool(docker: Engine, reference: str, size: int, path: Path) -> None:
    with transfer("read", size) as advance:
        docker.save(reference, path, advance)


def _file_name(references: list[str], config: ImageConfig, base: Base | None) -> str:
    """`NAME-VERSION.fnubundle.tar`; the tag stands for the version where it begins with it (`0.1.0-cpu`)."""
    tag = references[0].rsplit(":", 1)[-1] if references else ""
    version = tag if tag.startswith(config.version) else config.version
    since = f"-since-{base.since.version}" if base is not None else ""
    return re.sub(r"[^A-Za-z0-9._+-]", "-", f"{config.title}-{version}{since}") + ".fnubundle.tar"


def _sbom(archive: Path, folder: Path) -> Path | None:
    """The parts list, CycloneDX, by syft; None, and a line that says so, where syft is not there."""
    syft = shutil.which("syft")
    if syft is None:
        print("syft is not on the PATH: the bundle has no parts list (SBOM)")
        return None
    path = folder / "sbom.cdx.json"
    command = [syft, f"docker-archive:{archive.resolve()}", "--output", "cyclonedx-json", "--quiet"]
    with open(path, "xb") as stream:
        done = subprocess.run(
            command,
            stdout=stream,
            stderr=subprocess.PIPE,
            env=os.environ | {"SYFT_CHECK_FOR_APP_UPDATE": "false"},
            check=False,
        )
    if done.returncode or not path.stat().st_size:
        said = done.stderr.decode("utf-8", "replace").strip()[-300:]
        raise FednnunetError(
            Code.IMAGE_UNSUITABLE, f"syft ended with status {done.returncode}: {said}", "Mend syft or take it away."
        )
    return path
