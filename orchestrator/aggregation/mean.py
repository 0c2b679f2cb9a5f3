"""The weighted mean of the sites' weights (FedAvg, McMahan et al. 2017, algorithm 1), over update files.

Rules:

- Sites are taken in the order of their names: the result does not depend on who answered first.
- Sums are taken in float64 over pieces that fit the cache, and rounded to float32 once.
- Memory: one piece for each of a few buffers, whatever the number of sites and the size of the network.
- Tensors that are not floating point (counters) take the largest value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from federation.files import replacing
from federation.weights import TensorFile, TensorWriter

PIECE = 2**18  # elements: 1 MiB of float32, 2 MiB of float64


@dataclass(frozen=True)
class Update:
    """One site's update: its file and how much it counts (before normalisation)."""

    file: Path
    weight: float


def weighted_mean(updates: Mapping[str, Update], base: Path, out: Path) -> str:
    """Write the weighted mean of the updates.

    Parameters
    ----------
    updates : Mapping[str, Update]
        By site name. A file holds float32 weights, or float16 differences to `base`.
    base : Path
        The global weights of the round (float32): names, shapes and the base of differences.
    out : Path
        Where the mean goes, whole or not at all.

    Returns
    -------
    str
        SHA-256 of `out`.
    """
    reference = TensorFile(base)
    total = math.fsum(update.weight for update in updates.values())
    sites = [(TensorFile(updates[name].file), updates[name].weight / total) for name in sorted(updates)]
    streams = [open(file.path, "rb", buffering=0) for file, _ in sites]
    try:
        with open(base, "rb", buffering=0) as base_stream, replacing(out) as temporary, open(temporary, "wb") as target:
            writer = TensorWriter(target, reference.specs)
            accumulated, scaled = np.empty(PIECE, np.float64), np.empty(PIECE, np.float64)
            buffer = np.empty(PIECE * 8, np.uint8)
            for name in reference.names:
                spec = reference.spec(name)
                count = math.prod(spec.shape)
                if not np.issubdtype(spec.dtype, np.floating):
                    writer.write(np.maximum.reduce([file.read(name) for file, _ in sites]))
                    continue
                for start in range(0, count, PIECE):
                    size = min(PIECE, count - start)
                    into, part = accumulated[:size], scaled[:size]
                    into.fill(0.0)
                    share_of_base = 0.0
                    for (file, share), stream in zip(sites, streams, strict=True):
                        dtype = file.spec(name).dtype
                        if dtype != spec.dtype:
                            share_of_base += share
                        np.multiply(_piece(stream, file, name, dtype, start, size, buffer), share, out=part)
                        np.add(into, part, out=into)
                    if share_of_base:
                        np.multiply(
                            _piece(base_stream, reference, name, spec.dtype, start, size, buffer), share_of_base, out=part
                        )
                        np.add(into, part, out=into)
                    writer.write(into.astype(spec.dtype))
            digest = writer.finish()
            target.flush()
    finally:
        for stream in streams:
            stream.close()
    return digest


def _piece(
    stream: Any, file: TensorFile, name: str, dtype: np.dtype[Any], start: int, size: int, buffer: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """`size` elements of a tensor from element `start` on, in a buffer that is used again."""
    view = memoryview(buffer)[: size * dtype.itemsize]
    stream.seek(file.offset(name) + start * dtype.itemsize)
    if stream.readinto(view) != len(view):
        raise OSError(f"{file.path} became shorter while it was read")
    return np.frombuffer(view, dtype)
