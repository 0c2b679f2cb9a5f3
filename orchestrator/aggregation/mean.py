"""The weighted mean of the sites' weights (FedAvg, McMahan et al. 2017, algorithm 1), over update files.

Rules:

- A tensor's weights are normalised among the sites that hold it.
- The mean is rounded to float32 once; see `summed` for the error before it.
- A difference counts as base plus difference: the base is added once, with the summed weights of the differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from federation.weights import SINGLE
from orchestrator.aggregation.sources import Array, Inputs, Part, Piece, Update, scratch, summed, write_store

__all__ = ["Update", "mean_kernel", "mean_step", "weighted_mean"]


def weighted_mean(updates: Mapping[str, Update], base: Path, out: Path) -> str:
    """Write the weighted mean of the updates.

    Parameters
    ----------
    updates : Mapping[str, Update]
        By site name.
    base : Path
        The global weights of the round (float32): names, shapes and the base of differences.
    out : Path
        Where the mean goes, whole or not at all.

    Returns
    -------
    str
        SHA-256 of `out`.
    """
    with Inputs(updates, base) as inputs:
        return write_store(inputs, out, lambda piece: mean_kernel(inputs, piece))


def mean_kernel(inputs: Inputs, piece: Piece) -> Array:
    """The weighted mean of a piece, float32."""
    parts = inputs.parts(piece)
    whole = _whole(parts)
    differences = [part for part in parts if part.is_difference]
    if differences:
        base = Part(inputs.base, piece.key, SINGLE.type(_whole(differences)), piece.start, piece.size)
        parts.append(base)
    total = summed(_products(parts), piece.size)
    np.divide(total, whole, out=total)
    mean: Array = total.astype(SINGLE)
    return mean


def mean_step(parts: list[Part], base: Array) -> Array:
    """How far the weighted mean of a piece is from the base, float64, until this thread sums again.

    Each site's step is taken before the mean, so the rounding is one of the steps, not of the weights: an adaptive
    optimizer divides small steps by small numbers.
    """
    total = summed(_products(parts, base), base.size)
    np.divide(total, _whole(parts), out=total)
    return total


def _whole(parts: list[Part]) -> float:
    return math.fsum(float(part.weight) for part in parts)


def _products(parts: list[Part], base: Array | None = None) -> Iterator[Array]:
    """Each part times its factor; full weights minus `base`, if it is given. One buffer, used again."""
    for part in parts:
        product = scratch("product", part.size, SINGLE)
        values = part.raw()
        if base is not None and not part.is_difference:
            values = np.subtract(values, base, out=product)
        yield np.multiply(values, part.factor, out=product)
