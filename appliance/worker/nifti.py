"""What ITK's NIfTI reader passes over in silence: files cut short, damaged compression, and voxels that are no number.

Rules:

- ITK fills what is missing of a truncated .nii or .nii.gz with zeros, and replaces NaN and infinity by zero, without a
  word; nnU-Net would train on both. So the bytes are looked at once more here.
- The file is streamed: memory does not grow with its size.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any, Protocol

import nibabel
import numpy as np

CHUNK = 1 << 22
GZIP = b"\x1f\x8b"
HEADERS: dict[int, Any] = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}


class _Stream(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, /) -> int: ...


class DamagedFile(Exception):
    """The file does not hold what its header promises."""


def count_not_finite(path: Path) -> int:
    """Check that a NIfTI file is whole, and count its stored voxels that are NaN or infinite.

    Parameters
    ----------
    path : Path
        A single-file NIfTI-1 or NIfTI-2, compressed or not. Any other file is left to its reader: 0.

    Returns
    -------
    int
        0 for integer types without a look at the voxels.

    Raises
    ------
    DamagedFile
        Fewer bytes than the header promises, or compression that does not check out.
    """
    with open(path, "rb") as raw:
        compressed = raw.read(2) == GZIP
        raw.seek(0)
        try:
            with gzip.GzipFile(fileobj=raw) if compressed else open(path, "rb") as stream:
                return _count(stream)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DamagedFile(str(error)) from error


def _count(stream: _Stream) -> int:
    start = stream.read(540)
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")} & set(HEADERS)
    if not sizes:
        return 0
    size = sizes.pop()
    if len(start) < size:
        raise DamagedFile("it ends within its header")
    header = HEADERS[size](start[:size], check=False)
    if not bytes(header["magic"]).startswith(b"n+"):  # header and voxels in two files
        return 0
    kind, offset = header.get_data_dtype(), int(header.get_data_offset())
    promised = int(np.prod(header.get_data_shape(), dtype=np.int64)) * kind.itemsize
    look = kind.kind == "f" and kind.itemsize in (2, 4, 8)
    bad = there = 0
    stream.seek(offset)
    while chunk := stream.read(CHUNK):  # to the end, where gzip's checksum stands
        part = chunk[: max(0, promised - there)]
        there += len(chunk)
        if look:
            whole = len(part) - len(part) % kind.itemsize
            bad += int(np.count_nonzero(~np.isfinite(np.frombuffer(part[:whole], dtype=kind))))
    if there < promised:
        raise DamagedFile(f"{there} of {promised} bytes of voxels are there")
    return bad
