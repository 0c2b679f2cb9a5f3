"""The one entry: a study's `aggregation` turns the sites' updates into the next global weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from federation.study import KRUM, Aggregation
from orchestrator.aggregation.mean import weighted_mean
from orchestrator.aggregation.optimizers import optimizer_step
from orchestrator.aggregation.robust import krum, middle_mean
from orchestrator.aggregation.sources import Update

__all__ = ["Update", "aggregate"]


def aggregate(
    rule: Aggregation,
    updates: Mapping[str, Update],
    base: Path,
    out: Path,
    before: Path,
    after: Path,
    chosen: Sequence[str] | None = None,
) -> str:
    """Write the next global weights, whole or not at all.

    Parameters
    ----------
    rule : Aggregation
        The method and its numbers.
    updates : Mapping[str, Update]
        By site name.
    base : Path
        The round's global weights (float32).
    out : Path
        Where the next global weights go.
    before, after : Path
        The optimizer's state of the round before and of this round. Only optimizers read and write them; in the first
        round `before` is not there.
    chosen : sequence of str or None
        krum and multi_krum: what `robust.select` returned, when the caller has asked it already. None: ask it here.

    Returns
    -------
    str
        SHA-256 of `out`.
    """
    if rule.method == "mean":
        return weighted_mean(updates, base, out)
    if rule.method in ("median", "trimmed_mean"):
        return middle_mean(rule, updates, base, out)
    if rule.method in KRUM:
        return krum(rule, updates, base, out, chosen)
    return optimizer_step(rule, updates, base, out, before, after)
