"""What every method of aggregation shares: the sites' files, read in pieces, and the next store, written in order.

Rules:

- Nothing here holds a tensor: a method sees one piece of one tensor, from each site that holds it.
- Sites are taken in the order of their names and pieces in the order of the file: the result does not depend on who
  answered first, nor on the number of threads.
- A tensor that no site holds keeps the base's value. Tensors that are not floating point (counters) take the largest
  value. Both hold in every method, so a method's kernel is only called for the others.
- A file that does not have the base's shapes and types is refused before anything is written.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from federation.errors import Code, FednnunetError
from federation.files import replacing
from federation.weights import BYTE, EXPONENTS, HALF, SINGLE, TensorFile, TensorWriter, exponents

Array = npt.NDArray[Any]
Answer = TypeVar("Answer")

PIECE = 2**16  # elements: 256 KiB of float32; the buffers of a thread stay in its cache
BLOCK = 8
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Update:
    """One site's update.

    Parameters
    ----------
    file : Path
        Float32 weights, or differences to the round's base.
    weight : float
        How much the site counts, before normalisation among the sites that hold a tensor.
    names : Mapping[str, str] or None
        Tensor of the store -> its name in this file. None: every tensor of the store, under the same name.
    """

    file: Path
    weight: float
    names: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one tensor of the store."""

    key: str
    start: int
    size: int


def pieces(base: TensorFile, keys: Iterable[str], size: int = PIECE) -> Iterator[Piece]:
    """The pieces of these tensors, none longer than `size` elements, in the order of the names."""
    for key in sorted(keys):
        count = math.prod(base.spec(key).shape)
        for start in range(0, count, size):
            yield Piece(key, start, min(size, count - start))


_scratch = threading.local()


def scratch(purpose: str, count: int, dtype: npt.DTypeLike = np.float64) -> Array:
    """`count` elements of a buffer that this thread uses again for the same purpose; what it holds is not defined."""
    buffer: Array | None = getattr(_scratch, purpose, None)
    if buffer is None or buffer.size < count or buffer.dtype != dtype:
        buffer = np.empty(count, dtype)
        setattr(_scratch, purpose, buffer)
    return buffer[:count]


class Source:
    """A file of tensors that stays open while it is read in pieces."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self.is_difference = EXPONENTS in file.specs
        self._exponents = exponents(file) if self.is_difference else {}
        self._descriptor = os.open(file.path, os.O_RDONLY)

    def read(self, name: str, start: int, size: int, buffer: Array) -> Array:
        """`size` elements of a tensor from element `start` on, in the memory of `buffer`."""
        dtype = self.file.spec(name).dtype
        view = memoryview(buffer.view(np.uint8))[: size * dtype.itemsize]
        if os.preadv(self._descriptor, [view], self.file.offset(name) + start * dtype.itemsize) != len(view):
            raise OSError(f"{self.file.path} became shorter while it was read")
        return np.frombuffer(view, dtype)

    def exponent(self, name: str) -> int:
        """A tensor's numbers count times two to this power."""
        return self._exponents.get(name, 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class Part:
    """One site's piece of one tensor, and how much it counts.

    The weight is a float32, so that products and the sum of the weights belong together.
    """

    source: Source
    name: str
    weight: np.float32
    start: int
    size: int

    def raw(self) -> Array:
        """The numbers as the file holds them, until this thread reads the next part."""
        return self.source.read(self.name, self.start, self.size, scratch("raw", self.size))

    @property
    def is_difference(self) -> bool:
        """Whether these numbers are a difference to the base: in a file of differences some tensors are whole."""
        return self.source.is_difference and self.source.file.spec(self.name).dtype in (HALF, BYTE)

    @property
    def factor(self) -> np.float32:
        """What the numbers of the file are multiplied with: the weight, and a difference's power of two."""
        return np.float32(np.ldexp(self.weight, self.source.exponent(self.name) if self.is_difference else 0))

    def values(self, base: Array, out: Array) -> None:
        """The site's weights, in the precision of `out`; `base` is the base's piece."""
        if not self.is_difference:
            if self.source.file.spec(self.name).dtype == out.dtype:
                self.source.read(self.name, self.start, self.size, out)
            else:
                np.copyto(out, self.raw())
            return
        scale = out.dtype.type(np.ldexp(1.0, self.source.exponent(self.name)))
        np.multiply(self.raw(), scale, out=out)
        np.add(base, out, out=out)


class Inputs(contextlib.AbstractContextManager["Inputs"]):
    """The open files of one aggregation.

    Parameters
    ----------
    updates : Mapping[str, Update]
        By site name. Raises ``ValueError`` when there is none, FNU-404 when one does not fit to `base`.
    base : Path
        The round's global weights.
    """

    def __init__(self, updates: Mapping[str, Update], base: Path) -> None:
        if not updates:
            raise ValueError("an aggregation needs an update")
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            self.base = self._source(base, opening)
            self.sites = sorted(updates)
            self._updates = [(updates[site], self._source(updates[site].file, opening)) for site in self.sites]
            for update, source in self._updates:
                self._check(update, source)
            self._open = opening.pop_all()

    @staticmethod
    def _source(path: Path, opening: contextlib.ExitStack) -> Source:
        source = Source(TensorFile(path))
        opening.callback(source.close)
        return source

    def _check(self, update: Update, source: Source) -> None:
        names = {key: key for key in self.base.file.specs} if update.names is None else update.names
        for key, name in names.items():
            wanted, found = self.base.file.specs.get(key), source.file.specs.get(name)
            if wanted is None or found is None or wanted.shape != found.shape:
                raise FednnunetError(Code.WEIGHTS_DO_NOT_FIT, f"{source.file.path}: {name} is not the store's {key}")
            smaller = (HALF, BYTE) if source.is_difference and wanted.dtype == SINGLE else ()
            if found.dtype not in (wanted.dtype, *smaller):
                raise FednnunetError(Code.WEIGHTS_DO_NOT_FIT, f"{source.file.path}: {name} is of type {found.dtype}")

    def __exit__(self, *_: object) -> None:
        self._open.close()

    @property
    def keys(self) -> list[str]:
        """The tensors of the store, sorted."""
        return self.base.file.names

    def is_floating(self, key: str) -> bool:
        """Whether a tensor holds weights or statistics, and not counters."""
        return bool(np.issubdtype(self.base.file.spec(key).dtype, np.floating))

    def holders(self, key: str) -> list[str]:
        """The sites that hold a tensor of the store, sorted."""
        pairs = zip(self.sites, self._updates, strict=True)
        return [site for site, (update, _) in pairs if update.names is None or key in update.names]

    def parts(self, piece: Piece) -> list[Part]:
        """The piece at each site that holds it, in the order of the sites' names."""
        found = []
        for update, source in self._updates:
            name = piece.key if update.names is None else update.names.get(piece.key)
            if name is not None:
                found.append(Part(source, name, SINGLE.type(update.weight), piece.start, piece.size))
        return found

    def base_piece(self, piece: Piece) -> Array:
        """The base's piece, until this thread asks for the next."""
        return self.base.read(piece.key, piece.start, piece.size, scratch("base", piece.size))


def in_order(kernel: Callable[[Piece], Answer], work: Iterable[Piece]) -> Iterator[Answer]:
    """What `kernel` answers for each piece, computed by `THREADS` threads, given back in the order of the pieces."""
    with concurrent.futures.ThreadPoolExecutor(THREADS, "aggregation") as pool:
        waiting: deque[concurrent.futures.Future[Answer]] = deque()
        for piece in work:
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
            waiting.append(pool.submit(kernel, piece))
        while waiting:
            yield waiting.popleft().result()


def write_store(inputs: Inputs, out: Path, kernel: Callable[[Piece], Array], size: int = PIECE) -> str:
    """Write the next global weights, whole or not at all.

    Parameters
    ----------
    inputs : Inputs
        The open files.
    out : Path
        Where the store goes.
    kernel : Callable[[Piece], Array]
        The next values, float32, of a piece of a floating-point tensor that a site holds. Called in several threads.
    size : int
        Elements of a piece.

    Returns
    -------
    str
        SHA-256 of `out`.
    """

    def values(piece: Piece) -> Array:
        if not inputs.holders(piece.key):
            return inputs.base_piece(piece).copy()
        if not inputs.is_floating(piece.key):
            return _largest(inputs.parts(piece))
        return kernel(piece)

    with replacing(out) as temporary, open(temporary, "wb") as target:
        writer = TensorWriter(target, inputs.base.file.specs)
        for part in in_order(values, pieces(inputs.base.file, inputs.keys, size)):
            writer.write(part)
        digest = writer.finish()
        target.flush()
    return digest


def _largest(parts: list[Part]) -> Array:
    largest = parts[0].raw().copy()
    for part in parts[1:]:
        np.maximum(largest, part.raw(), out=largest)
    return largest


def summed(terms: Iterable[Array], size: int) -> Array:
    """The sum of float32 arrays, as float64.

    `BLOCK` terms at a time are summed in float32 while they are in the cache, the blocks in float64: the error is at
    most BLOCK roundings of float32, whatever the number of terms. A term is used up before the next is asked for. The
    sum stands until this thread sums again.
    """
    total, block = scratch("total", size), scratch("block", size, SINGLE)
    total.fill(0.0)
    block.fill(0.0)
    for number, term in enumerate(terms, 1):
        np.add(block, term, out=block)
        if number % BLOCK == 0:
            np.add(total, block, out=total)
            block.fill(0.0)
    np.add(total, block, out=total)
    return total
