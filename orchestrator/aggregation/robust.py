"""Methods that bound what a few faulty sites can do; every site counts the same, whatever it says of its cases.

- median (Yin et al. 2018, arXiv 1803.01498, definition 1): element by element, the middle value of the sites, or the
  mean of the two middle ones.
- trimmed_mean (ibid., definition 2): element by element, ``int(trim * n)`` of the n values are left out at each end,
  and the others averaged. A tensor that only few sites hold may have none left out: then it is their mean.
- krum, multi_krum (Blanchard et al. 2017, arXiv 1703.02757, section 4): a site's score is the sum of the squared
  distances to its ``n - f - 2`` closest others, f being `faulty_sites`. krum takes the update with the lowest score,
  multi_krum the mean of the `selected_sites` lowest.

Flower (1.41, `flwr.serverapp.strategy`) agrees, except where it is not sound:

- Its MultiKrum weights the chosen by the examples they claim, which an adversary chooses; the paper's mean is uniform.
- It takes ``|x|^2 + |y|^2 - 2xy`` of the weights in their own float32, which loses the distance between weights that
  differ little (a training's late rounds), and leaves out the first of the sorted distances as the site itself, which
  then need not be the site itself. Equal scores go by the order of arrival. Ours takes it of the differences to the
  base in float64, never counts a site as its own neighbour, and lets the site's name decide between equals.
- It accepts fewer than ``2f + 3`` sites, for which the paper proves nothing; ours refuses.
- It takes these methods over counters too; see `sources` for ours.

Memory: a piece is the shorter the more sites there are, so that the buffers of a thread stay the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from federation.study import Aggregation
from federation.weights import SINGLE
from orchestrator.aggregation.mean import weighted_mean
from orchestrator.aggregation.sources import (
    PIECE,
    Array,
    Inputs,
    Piece,
    Update,
    in_order,
    pieces,
    scratch,
    summed,
    write_store,
)

ROWS = 2**19  # elements of all sites' pieces together, in one thread: 2 MiB of float32
INDISTINCT = 1e-13  # of the squared lengths: below it a squared distance is the rounding of float64


# ---- element by element: median and trimmed mean --------------------------------------------------------------------


def middle_mean(rule: Aggregation, updates: Mapping[str, Update], base: Path, out: Path) -> str:
    """Write the median or the trimmed mean of the updates, element by element.

    Parameters
    ----------
    rule : Aggregation
        The method (`median` or `trimmed_mean`) and its `trim`.
    updates : Mapping[str, Update]
        By site name; the weights are not read.
    base : Path
        The round's global weights.
    out : Path
        Where the next global weights go.

    Returns
    -------
    str
        SHA-256 of `out`.
    """
    with Inputs(updates, base) as inputs:

        def kernel(piece: Piece) -> Array:
            rows = _rows(inputs, piece, SINGLE)
            cut = _cut(rule, len(rows))
            kept = _sorted(rows, cut)[cut : len(rows) - cut]
            mean: Array = (summed(kept, piece.size) / len(kept)).astype(SINGLE)
            return mean

        return write_store(inputs, out, kernel, _piece_size(len(inputs.sites)))


def _piece_size(sites: int) -> int:
    return max(1, min(PIECE, ROWS // sites))


def _rows(inputs: Inputs, piece: Piece, dtype: np.dtype[np.floating]) -> Array:
    """The sites' weights of a piece, one row for each site that holds it."""
    parts = inputs.parts(piece)
    rows = scratch("rows", len(parts) * piece.size, dtype).reshape(len(parts), piece.size)
    base = inputs.base_piece(piece)
    for part, row in zip(parts, rows, strict=True):
        part.values(base, row)
    return rows


def _cut(rule: Aggregation, count: int) -> int:
    """How many of `count` values are left out at each end."""
    return (count - 1) // 2 if rule.method == "median" else int(rule.trim * count)


def _sorted(rows: Array, cut: int) -> list[Array]:
    """The rows sorted element by element, as far as those from `cut` to the last but `cut` need it; uses up `rows`."""
    order, spare = list(rows), scratch("spare", rows.shape[1], rows.dtype)
    for low, high in _comparators(len(order), cut):
        np.minimum(order[low], order[high], out=spare)
        np.maximum(order[low], order[high], out=order[high])
        order[low], spare = spare, order[low]
    return order


@functools.cache
def _comparators(count: int, cut: int) -> list[tuple[int, int]]:
    """The comparisons of Batcher's sorting network (Knuth, volume 3, section 5.2.2, algorithm M) that are needed.

    A network compares whole rows, so a piece is sorted by vector instructions; comparisons that reach no row
    from `cut` to ``count - cut`` are left out.
    """
    needed, kept = set(range(cut, count - cut)), []
    for low, high in reversed(list(_batcher(count))):
        if low in needed or high in needed:
            needed |= {low, high}
            kept.append((low, high))
    return kept[::-1]


def _batcher(count: int) -> Iterator[tuple[int, int]]:
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(count - d) if i & p == r)
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1


# ---- update by update: Krum -----------------------------------------------------------------------------------------


def krum(
    rule: Aggregation, updates: Mapping[str, Update], base: Path, out: Path, chosen: Sequence[str] | None = None
) -> str:
    """Write the mean, every site counting the same, of the updates that Krum chooses.

    Parameters
    ----------
    rule : Aggregation
        The method (`krum` or `multi_krum`), `faulty_sites` and `selected_sites`.
    updates : Mapping[str, Update]
        By site name; the weights are not read.
    base : Path
        The round's global weights.
    out : Path
        Where the next global weights go.
    chosen : sequence of str or None
        What `select` returned for the same arguments, when the caller has asked it already.

    Returns
    -------
    str
        SHA-256 of `out`.
    """
    names = select(rule, updates, base) if chosen is None else chosen
    counted = {site: Update(updates[site].file, 1.0, updates[site].names) for site in names}
    return weighted_mean(counted, base, out)


def select(rule: Aggregation, updates: Mapping[str, Update], base: Path) -> list[str]:
    """The sites whose updates Krum takes, the lowest score first.

    Distances are taken over the floating-point tensors (weights and running statistics) that all updates hold. Scores
    are compared as float32: the last digits of a float64 sum do not decide, the sites' names do.

    Parameters
    ----------
    rule : Aggregation
        The method (`krum` or `multi_krum`), `faulty_sites` and `selected_sites`.
    updates : Mapping[str, Update]
        By site name. Raises ``ValueError`` for fewer than ``2 * faulty_sites + 3``, or when they share no tensor.
    base : Path
        The round's global weights.
    """
    sites, faulty = sorted(updates), rule.faulty_sites
    if len(sites) < 2 * faulty + 3:
        raise ValueError(f"Krum with {faulty} faulty sites needs {2 * faulty + 3} updates, not {len(sites)}")
    distances = squared_distances(updates, base)
    closest = len(sites) - faulty - 2
    ranked = []
    for number, site in enumerate(sites):
        others = np.sort(np.delete(distances[number], number))
        ranked.append((np.float32(math.fsum(others[:closest])), site))
    most = len(sites) - faulty
    count = 1 if rule.method == "krum" else min(rule.selected_sites or most, most)
    return [site for _, site in sorted(ranked)[:count]]


def squared_distances(updates: Mapping[str, Update], base: Path) -> Array:
    """Squared Euclidean distances between the updates, in the order of the sites' names.

    Returns
    -------
    ndarray, float64, (n, n)
        Symmetric, zero on the diagonal. ``|x|^2 + |y|^2 - 2xy`` of the differences to the base, summed over the pieces.
    """
    with Inputs(updates, base) as inputs:
        count = len(inputs.sites)
        shared = [key for key in inputs.keys if inputs.is_floating(key) and len(inputs.holders(key)) == count]
        if not shared:
            raise ValueError("Krum compares updates by the tensors that all of them hold, and there is none")

        def products(piece: Piece) -> Array:
            rows = _rows(inputs, piece, np.dtype("<f8"))
            rows -= inputs.base_piece(piece)
            inner: Array = rows @ rows.T
            return inner

        # float64 rows are twice as long in memory
        total = np.zeros((count, count))
        for inner in in_order(products, pieces(inputs.base.file, shared, _piece_size(2 * count))):
            total += inner
    lengths = np.diag(total)
    both = lengths[:, None] + lengths[None, :]
    distances = np.triu(both - 2 * total, 1)
    distances[distances < INDISTINCT * both] = 0.0
    symmetric: Array = distances + distances.T
    return symmetric
