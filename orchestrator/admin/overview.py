"""What `fednnunet study list` and `study show` print, from the journals alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from federation.readable import ago, clock, number, size
from orchestrator.admin.progress import print_end, scores_table, sparkline
from orchestrator.history import Found, History

STANDING = {"done": "green", "failed": "red", "stopped": "yellow"}
PRESENT, ABSENT, OPEN = "█", "·", " "
WARNINGS = 12


def studies_table(known: Sequence[tuple[Found, History]]) -> Table:
    """One line for each study."""
    table = Table(box=None, pad_edge=False)
    for name in ("study", "id", "state", "round", "sites", "pDice", "last line"):
        table.add_column(name, overflow="fold")
    for found, history in known:
        dice = history.pooled_curve(history.rounds[-1].fold, "mean_dice") if history.rounds else []
        table.add_row(
            found.study.name,
            found.study.id[:12],
            Text(history.standing, STANDING.get(history.standing, "cyan")),
            f"{history.done_rounds} of {history.all_rounds}",
            str(len(found.study.sites)),
            number(dice[-1][1] if dice else None),
            f"{ago(history.last)} ago" if history.last else "-",
        )
    return table


def overview(history: History, folder: Path, console: Console) -> None:
    """Everything that the journal says of a study, on one or two screens."""
    study = history.study
    console.print(Text.assemble((study.name, "bold"), f"  {study.id}"), soft_wrap=True)
    standing = Text(history.standing, STANDING.get(history.standing, "cyan"))
    standing.append(f", round {history.done_rounds} of {history.all_rounds}", "default")
    if history.reason:
        standing.append(f": {history.reason}")
    console.print(standing, soft_wrap=True)
    console.print(
        f"{study.mode}, {study.configuration}, fold {study.fold}, {study.aggregation.method}", highlight=False
    )
    console.print(_sites(history))
    if history.rounds:
        console.print(participation(history))
    spent = ", ".join(f"{phase} {clock(seconds)}" for phase, seconds in history.spent().items())
    console.print(f"time: {spent}; aggregating {sum(history.aggregation):.1f} s", highlight=False)
    if history.exported is None:
        for fold in study.folds:
            told = {name: site.scores[fold] for name, site in history.sites.items() if fold in site.scores}
            if told:
                console.print(scores_table(study, fold, told))
    for one in history.warnings[-WARNINGS:]:
        console.print(
            f"[yellow]{one.at[:19]}[/yellow] {one.site or 'orchestrator'}: {escape(one.text)}", soft_wrap=True
        )
    if len(history.warnings) > WARNINGS:
        console.print(f"{len(history.warnings) - WARNINGS} earlier warnings: the report has them")
    print_end(console, history, folder)
    console.print(f"folder: {folder}", soft_wrap=True, highlight=False)


def _sites(history: History) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("site", "seen", "cases", "loss", "pDice", "curve", "to site", "from site", "missed"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for name, site in history.sites.items():
        last = site.epochs[-1] if site.epochs else None
        table.add_row(
            name,
            ago(site.seen),
            str(site.cases[last.fold]) if last else "-",
            number(last.train_loss if last else None),
            number(last.mean_dice if last else None),
            sparkline([epoch.mean_dice for epoch in site.epochs if last and epoch.fold == last.fold], 12),
            size(site.sent),
            size(site.received),
            str(site.missed),
        )
    return table


def participation(history: History, width: int = 60) -> Table:
    """Who took part in which round; of more rounds than fit each sign is several: absent where one was missed."""
    table = Table(box=None, pad_edge=False)
    table.add_column("site")
    table.add_column(f"rounds: {PRESENT} took part, {ABSENT} was missing", no_wrap=True)
    total = history.all_rounds
    step = max(1, -(-total // width))
    for name in history.sites:
        signs = []
        for begin in range(0, total, step):
            rounds = history.rounds[begin : begin + step]
            signs.append(OPEN if not rounds else ABSENT if any(name in one.missing for one in rounds) else PRESENT)
        table.add_row(name, "".join(signs))
    return table
