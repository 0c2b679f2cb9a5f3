"""Archives as `docker save` writes them, made by hand: the legacy layout and the OCI one, for several test files."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def layer(**files: str) -> bytes:
    """A layer: a tar file of small files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, text in files.items():
            add(archive, name, text.encode())
    return buffer.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a regular file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def config_of(layers: Sequence[bytes], version: str, title: str) -> bytes:
    """An image's configuration."""
    labels = {
        "org.opencontainers.image.title": title,
        "org.opencontainers.image.version": version,
        "org.opencontainers.image.revision": "abc123",
    }
    value: dict[str, Any] = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]},
        "history": [{"created": "2026-01-01T00:00:00Z"} for _ in layers],
    }
    return json.dumps(value).encode()


def saved(
    path: Path,
    layers: Sequence[bytes],
    version: str = "0.2.0",
    title: str = "fednnunet-appliance",
    oci: bool = False,
    left_out: int | None = None,
) -> str:
    """Write an archive of one image; returns the image's name.

    Parameters
    ----------
    path : Path
        The archive.
    layers : sequence of bytes
        Lowest first. In the legacy layout one that comes again is a symlink to the first.
    version, title : str
        Labels.
    oci : bool
        The layout of newer engines, with packed layers.
    left_out : int, optional
        Number of a layer that is not written.
    """
    name = f"fednnunet/{title.removeprefix('fednnunet-')}:{version}-cpu"
    config = config_of(layers, version, title)
    digest = hashlib.sha256(config).hexdigest()
    config_path = f"blobs/sha256/{digest}" if oci else f"{digest}.json"
    paths: list[str] = []
    with tarfile.open(path, "w") as archive:
        add(archive, config_path, config)
        for number, data in enumerate(layers):
            packed = gzip.compress(data) if oci else data
            folder = hashlib.sha256(f"{number}".encode()).hexdigest()
            where = f"blobs/sha256/{hashlib.sha256(packed).hexdigest()}" if oci else f"{folder}/layer.tar"
            paths.append(where)
            if number == left_out:
                continue
            if not oci and data in layers[:number]:
                link = tarfile.TarInfo(where)
                link.type, link.linkname = tarfile.SYMTYPE, f"../{paths[list(layers).index(data)]}"
                archive.addfile(link)
            elif where not in archive.getnames():
                add(archive, where, packed)
        if oci:
            add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        add(
            archive,
            "manifest.json",
            json.dumps([{"Config": config_path, "RepoTags": [name], "Layers": paths}]).encode(),
        )
    return name
