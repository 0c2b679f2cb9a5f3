"""What a comparison of configurations shows and writes, for `study best` and `simulate find_best_configuration`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from orchestrator.comparison import Candidate, best, compare, foreground_mean, instructions, write
from orchestrator.finished import Finished


def show(studies: Sequence[Finished], folder: Path, console: Console) -> None:
    """Compare finished cross-validations, print a table and the commands of the best, and write both below `folder`.

    Raises FNU-121 when they cannot be compared.
    """
    candidates = compare(studies)
    winner = best(candidates)
    console.print(_table(candidates, winner))
    console.print(
        f"mean Dice over the {winner.cases} held-out cases of folds 0 to 4 at {len(winner.sites)} sites; "
        "ensembles and postprocessing are not compared",
        soft_wrap=True,
    )
    path = write(candidates, folder)
    console.print(
        f"best: {winner.study.name}, {winner.study.configuration}; run it with (also in {path}):", soft_wrap=True
    )
    for line in instructions(winner):
        console.print(f"  {line}", soft_wrap=True, highlight=False)


def _table(candidates: Sequence[Candidate], winner: Candidate) -> Table:
    table = Table(title="cross-validation, Dice")
    table.add_column("study")
    table.add_column("configuration")
    labels = list(dict.fromkeys(label for candidate in candidates for label in candidate.labels))
    sites = list(winner.sites)
    for name in (*labels, "mean", *(f"mean {site}" for site in sites)):
        table.add_column(name, justify="right")
    for candidate in candidates:
        pooled = [candidate.labels[label].mean if label in candidate.labels else None for label in labels]
        each = [foreground_mean(candidate.sites[site]) for site in sites]
        is_best = candidate is winner
        table.add_row(
            candidate.study.name + ("  (best)" if is_best else ""),
            f"{candidate.study.trainer}__{candidate.source.plans_name}__{candidate.study.configuration}",
            *(_cell(value) for value in (*pooled, candidate.dice, *each)),
            style="bold green" if is_best else None,
        )
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
