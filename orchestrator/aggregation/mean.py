"""The weighted mean of the sites' weights (FedAvg, McMahan et al. 2017, algorithm 1), over update files.

Rules:

- Sites are taken in the order of their names: the result does not depend on who answered first, nor on the number of
  threads.
- Products of `BLOCK` sites are summed in float32 while they are in the cache, the blocks in float64; the mean is
  rounded to float32 once. The error is at most BLOCK roundings of float32, whatever the number of sites.
- Memory: a few pieces for each thread, whatever the number of sites and the size of the network.
- Tensors that are not floating point (counters) take the largest value.
"""

from __future__ import annotations

import concurrent.futures
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from federation.files import replacing
from federation.weights import EXPONENTS, TensorFile, TensorWriter, exponents

PIECE = 2**16  # elements: 256 KiB of float32; the buffers of a thread stay in its cache
BLOCK = 8
THREADS = min(4, os.cpu_count() or 1)
_SINGLE = np.dtype("<f4")


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
    sites = [_Source(TensorFile(updates[name].file), updates[name].weight) for name in sorted(updates)]
    whole = math.fsum(float(site.weight) for site in sites)
    differences = [float(site.weight) for site in sites if site.file.specs != reference.specs]
    if differences:
        sites.append(_Source(reference, math.fsum(differences)))
    try:
        with replacing(out) as temporary, open(temporary, "wb") as target:
            writer = TensorWriter(target, reference.specs)
            with concurrent.futures.ThreadPoolExecutor(THREADS, "mean") as pool:
                waiting: deque[concurrent.futures.Future[npt.NDArray[Any]]] = deque()
                for name, start, size in _pieces(reference):
                    if len(waiting) > 2 * THREADS:
                        writer.write(waiting.popleft().result())
                    if np.issubdtype(reference.spec(name).dtype, np.floating):
                        waiting.append(pool.submit(_mean_of_piece, sites, whole, name, start, size))
                    else:
                        waiting.append(pool.submit(_largest, sites, name, start, size))
                while waiting:
                    writer.write(waiting.popleft().result())
            digest = writer.finish()
            target.flush()
    finally:
        for site in sites:
            site.close()
    return digest


def _pieces(reference: TensorFile) -> Iterator[tuple[str, int, int]]:
    """Name, first element and number of elements of every piece, in the order of the file."""
    for name in reference.names:
        count = math.prod(reference.spec(name).shape)
        for start in range(0, count, PIECE):
            yield name, start, min(PIECE, count - start)


class _Source:
    """An open file and how much it counts: a float32, so that products and the sum of weights belong together."""

    def __init__(self, file: TensorFile, weight: float) -> None:
        self.file, self.weight = file, _SINGLE.type(weight)
        self._exponents = exponents(file) if EXPONENTS in file.specs else {}
        self._descriptor = os.open(file.path, os.O_RDONLY)

    def read(self, name: str, start: int, size: int, buffer: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`size` elements of a tensor from element `start` on, in a buffer that is used again."""
        dtype = self.file.spec(name).dtype
        view = memoryview(buffer.view(np.uint8))[: size * dtype.itemsize]
        if os.preadv(self._descriptor, [view], self.file.offset(name) + start * dtype.itemsize) != len(view):
            raise OSError(f"{self.file.path} became shorter while it was read")
        return np.frombuffer(view, dtype)

    def factor(self, name: str) -> np.float32:
        """What a tensor's numbers are multiplied with: the weight, and a difference's power of two."""
        return np.float32(np.ldexp(self.weight, self._exponents.get(name, 0)))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


_buffers = threading.local()


def _mean_of_piece(sites: list[_Source], whole: float, name: str, start: int, size: int) -> npt.NDArray[Any]:
    if not hasattr(_buffers, "raw"):
        _buffers.raw = np.empty(PIECE, np.float64)
        _buffers.product, _buffers.block = np.empty(PIECE, _SINGLE), np.empty(PIECE, _SINGLE)
        _buffers.total = np.empty(PIECE, np.float64)
    product, block, total = _buffers.product[:size], _buffers.block[:size], _buffers.total[:size]
    total.fill(0.0)
    for first in range(0, len(sites), BLOCK):
        block.fill(0.0)
        for site in sites[first : first + BLOCK]:
            np.multiply(site.read(name, start, size, _buffers.raw), site.factor(name), out=product)
            np.add(block, product, out=block)
        np.add(total, block, out=total)
    np.divide(total, whole, out=total)
    mean: npt.NDArray[Any] = total.astype(_SINGLE)
    return mean


def _largest(sites: list[_Source], name: str, start: int, size: int) -> npt.NDArray[Any]:
    buffer = np.empty(size, np.float64)
    largest: npt.NDArray[Any] = np.maximum.reduce([site.read(name, start, size, buffer).copy() for site in sites])
    return largest
