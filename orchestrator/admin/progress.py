"""What a study's journal tells a person while it runs: a live screen, or plain lines where there is no terminal.

Everything shown is read from the journal's lines; nothing is asked of a site for it.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from federation.errors import Code, FednnunetError
from federation.study import CASCADE, LOWRES, Study
from federation.tasks import Validation
from orchestrator.admin.layers import layers_table, read_layers, summary

PHASES = (
    "enrolling",
    "describing",
    "fingerprinting",
    "planning",
    "preparing",
    "training",
    "validating",
    "finishing",
    "exporting",
)


@dataclass
class SiteView:
    """One site as the journal shows it."""

    state: str = "not seen yet"
    train_loss: float | None = None
    pseudo_dice: float | None = None
    sent: int = 0
    received: int = 0
    rounds: int = 0


@dataclass
class StudyView:
    """A study as its journal shows it, line after line."""

    study: Study
    phase: str = "starting"
    sites: dict[str, SiteView] = field(default_factory=dict)
    fold: str = ""
    round: int = 0
    seconds: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    ended: str | None = None
    reason: str = ""
    advice: str = ""
    number: int = 0
    pooled: dict[str, Any] = field(default_factory=dict)
    exported: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.sites = {site: SiteView() for site in self.study.sites}

    def take(self, line: dict[str, Any]) -> str | None:
        """Take one line into account; returns a plain line for people where it is worth one."""
        site = self.sites.get(line.get("site", ""))
        match line["event"]:
            case "opened":
                self.ended = None
            case "phase":
                self.phase = line["phase"]
                return f"{self.phase} ..."
            case "online":
                if site:
                    site.state = "online"
                return f"{line['site']} is online"
            case "asked":
                if site:
                    site.state = f"at work: {line['key']}"
                    site.sent += line["nbytes"]
                if line.get("why"):
                    return f"{line['site']}: {line['key']} sent again, {line['why']}"
            case "answered":
                self._answered(line)
            case "failed_answer" | "refused":
                if site:
                    site.state = line["reason"]
                return f"{line['site']}: {line['key']}: {line['reason']}"
            case "pooled":
                self.pooled = line
            case "layers" if not self.study.one_model:
                return summary(line["shared"], line["common"])
            case "closed":
                self.fold, self.round = line["fold"], line["round"]
                self.seconds.append(line["seconds"])
                for name, why in line["missing"].items():
                    self.sites[name].state = f"missing: {why}"
                return self._round_line(line)
            case "exported":
                self.exported = line
            case "done":
                self.ended = "done"
            case "failed":
                self.ended, self.reason = "failed", line["reason"]
                self.advice, self.number = line["advice"], line["number"]
        return None

    def _answered(self, line: dict[str, Any]) -> None:
        site = self.sites[line["site"]]
        site.state = f"done: {line['key']}"
        site.received += line["nbytes"]
        if training := line.get("training"):
            site.rounds += 1
            site.train_loss = training["train_loss"][-1]
            classes = [value for value in training["pseudo_dice"][-1] if value is not None]
            site.pseudo_dice = sum(classes) / len(classes) if classes else None

    def _round_line(self, line: dict[str, Any]) -> str:
        losses = [self.sites[name].train_loss for name in line["participants"]]
        dices = [self.sites[name].pseudo_dice for name in line["participants"]]
        missing = f", missing: {', '.join(line['missing'])}" if line["missing"] else ""
        return (
            f"fold {line['fold']}, round {line['round']} of {self.study.rounds}: loss {_mean(losses)}, pseudo-Dice "
            f"{_mean(dices)}, {len(line['participants'])} of {len(self.sites)} sites{missing}, {line['seconds']:.1f} s"
        )

    @property
    def done_rounds(self) -> int:
        """Rounds done, over all folds."""
        earlier = self.study.folds.index(self.fold) if self.fold else 0
        return earlier * self.study.rounds + self.round

    @property
    def all_rounds(self) -> int:
        """Rounds of the whole study."""
        return self.study.rounds * len(self.study.folds)

    def raise_failure(self, where: str) -> None:
        """Raise what made the study fail, if it has failed; `where` says where to look further."""
        if self.ended == "failed":
            code = Code.of(self.number)
            found = self.reason.removeprefix(f"FNU-{code.number} {code.title}").removeprefix(": ")
            advice = [self.advice]
            named = set(map(int, re.findall(r"FNU-(\d{3})", found))) - {code.number, Code.SITE_FAILED.number}
            for number in sorted(named):
                with contextlib.suppress(KeyError):  # a number that another version knows
                    advice.append(f"FNU-{number}: {Code.of(number).advice}")
            raise FednnunetError(code, f"{found}\n{where}", "\n".join(advice))

    def remaining(self) -> float | None:
        """Seconds of training to go, from the mean of the last rounds."""
        if not self.seconds:
            return None
        recent = self.seconds[-5:]
        return (self.all_rounds - self.done_rounds) * sum(recent) / len(recent)

    def screen(self, doing: Callable[[str], str] = lambda site: "") -> RenderableType:
        """The live screen, at least 80 columns wide.

        Parameters
        ----------
        doing : callable
            What a site's worker says it is doing, where this machine can know it.
        """
        steps = Text()
        reached = PHASES.index(self.phase) if self.phase in PHASES else -1
        for index, phase in enumerate(PHASES):
            style = "bold cyan" if index == reached else "green" if index < reached else "dim"
            steps.append(phase + ("  " if index < len(PHASES) - 1 else ""), style)
        left = self.remaining()
        eta = f", about {_clock(left)} to go" if left and self.phase == "training" else ""
        head = Text(f"{self.study.name}  ", "bold")
        head.append(f"round {self.done_rounds} of {self.all_rounds}, {_clock(time.monotonic() - self.began)}{eta}")
        table = Table(expand=True, box=None, pad_edge=False)
        for name in ("site", "state"):
            table.add_column(name, overflow="ellipsis", no_wrap=True, ratio=2 if name == "state" else 1)
        for name in ("loss", "pDice", "to site", "from site"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, site in self.sites.items():
            table.add_row(
                name,
                Text(doing(name) or site.state),
                _mean([site.train_loss]),
                _mean([site.pseudo_dice]),
                size(site.sent),
                size(site.received),
            )
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=self.all_rounds, completed=self.done_rounds))
        return Group(head, steps, bar, table)


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(nbytes: float) -> str:
    """A number of bytes for people (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def report_at_site(study: Study) -> Path:
    """What a site found wrong with its dataset, with the files' names: below the site's state folder, never here."""
    return Path("worker") / study.id / "examination" / "examination.txt"


class Tail:
    """Reads the lines that are added to a journal by another process."""

    def __init__(self, path: Path) -> None:
        self.path, self._position = path, 0

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines added since the last call."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as stream:
            stream.seek(self._position)
            data = stream.read()
        whole = data.rfind(b"\n") + 1
        self._position += whole
        return [json.loads(line) for line in data[:whole].splitlines()]


def watch(
    view: StudyView,
    tail: Tail,
    console: Console,
    look: Callable[[], None] = lambda: None,
    doing: Callable[[str], str] = lambda site: "",
) -> None:
    """Show a study until it has ended: a live screen on a terminal, plain lines elsewhere.

    Parameters
    ----------
    view, tail : StudyView, Tail
        What is known so far, and where more comes from.
    console : Console
        Where to show it.
    look : callable
        Called about five times a second; may raise to end the watch.
    doing : callable
        What a site's worker says it is doing, where this machine can know it.
    """
    live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
    with live or contextlib.nullcontext():
        while view.ended is None:
            look()
            for line in tail.lines():
                text = view.take(line)
                if text and live is None:
                    console.print(text, soft_wrap=True, highlight=False, markup=False)
                if line["event"] == "layers" and not view.study.one_model:
                    console.print(layers_table(read_layers(tail.path.parent)))
            if live is not None:
                live.update(view.screen(doing))
            time.sleep(0.2)


def scores_table(study: Study, fold: str, sites: dict[str, dict[str, Any]]) -> Table:
    """Dice of the global model, or of each site's own, on the site's held-out cases.

    `test` scores (imagesTs against labelsTs) are shown where a site has them, else those of the fold's held-out cases.
    """
    judged = "the global model" if study.one_model else "each site's own model"
    table = Table(title=f"Dice of {judged} on held-out cases, fold {fold}")
    table.add_column("site")
    table.add_column("held-out cases")
    parsed = {site: Validation.model_validate(value) for site, value in sites.items()}
    labels = sorted({label for value in parsed.values() for label in (*value.test, *value.validation)})
    names = {str(value): name for name, value in study.labels.items()}
    for label in labels:
        table.add_column(names.get(label, label), justify="right")
    for site, value in parsed.items():
        scores, cases, kind = (
            (value.test, value.test_cases, "imagesTs")
            if value.test_cases
            else (value.validation, value.validation_cases, f"fold {fold}")
        )
        cells = []
        for label in labels:
            score = scores.get(label)
            cells.append("-" if score is None or score.mean is None else f"{score.mean:.3f} ± {score.std or 0:.3f}")
        table.add_row(site, f"{cases} ({kind})" if cases else "none", *cells)
    return table


def print_end(console: Console, view: StudyView, folder: Path) -> None:
    """What a person wants to know when a study has ended well."""
    if view.exported is None:
        return
    for fold, entry in view.exported["validation"].items():
        console.print(scores_table(view.study, fold, entry["sites"]))
        for site, why in entry["missing"].items():
            console.print(f"[yellow]not scored:[/yellow] {site}: {escape(why)}")
    for site, why in view.exported["unfinished"].items():
        console.print(f"[yellow]without the final model:[/yellow] {site}: {escape(why)}")
    archive = folder / view.exported["path"]
    if not view.study.one_model:
        console.print("each site has a model of its own, in its state folder below worker/*/nnUNet_results")
        kept = f"shared layers: {archive} ({size(view.exported['nbytes'])}); no whole model can be made of them"
        console.print(kept, soft_wrap=True)
        return
    console.print(f"model: {archive} ({size(view.exported['nbytes'])})", soft_wrap=True)
    console.print(f"install it with: nnUNetv2_install_pretrained_model_from_zip {archive}", soft_wrap=True)
    _print_stages(console, view.study, folder)


def _print_stages(console: Console, study: Study, folder: Path) -> None:
    """What belongs together: a cascade predicts from what its first stage predicts, so nnU-Net needs both models."""
    if study.previous_stage is not None:
        archive = folder.parent / study.previous_stage / f"{study.dataset}.zip"
        console.print(
            f"its first stage too: nnUNetv2_install_pretrained_model_from_zip {archive}; the output folder of its "
            "nnUNetv2_predict is this model's -prev_stage_predictions",
            soft_wrap=True,
        )
    elif study.configuration == LOWRES and study.fold in ("0-4", "all"):
        console.print(f'for a cascade: configuration: {CASCADE}, previous_stage: "{study.id}"', soft_wrap=True)
