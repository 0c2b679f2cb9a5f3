"""A study while it runs, for people: a live screen, or plain lines where there is no terminal.

Everything shown is read from the journal's lines (orchestrator.history); nothing is asked of a site for it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from federation import files
from federation.audit import Tail
from federation.errors import Code, FednnunetError
from federation.readable import ago, clock, moment, number, size, timestamp
from federation.study import CASCADE, LOWRES, Study
from federation.tasks import Validation
from orchestrator.admin.layers import layers_table, read_layers, summary
from orchestrator.doubts import doubts
from orchestrator.history import PHASES, REPORT, History, mean

BLOCKS = "▁▂▃▄▅▆▇█"
SPARKS = 8  # columns of a curve
WARNINGS = 3  # on the screen


def plain(history: History, line: dict[str, Any]) -> str | None:
    """A plain line for people, where a line of the journal (taken already) is worth one."""
    match line["event"]:
        case "phase":
            return f"{line['phase']} ..."
        case "online":
            return f"{line['site']} is online"
        case "asked" if line.get("why"):
            return f"{line['site']}: {line['key']} sent again, {line['why']}"
        case "failed_answer" | "refused":
            return f"{line['site']}: {line['key']}: {line['reason']}"
        case "pooled":
            return "\n".join(doubts(history.study, line.get("tolerance", {}))) or None
        case "layers" if not history.study.one_model:
            return summary(line["shared"], line["common"])
        case "closed":
            return _round_line(history, line)
        case "stopped":
            return f"stopped by {line['by']}"
        case "interrupted":
            return "the orchestrator was shut down; the study goes on when it is back"
    return None


def _round_line(history: History, line: dict[str, Any]) -> str:
    epochs = [site.epochs[-1] for name in line["participants"] if (site := history.sites[name]).epochs]
    missing = f", missing: {', '.join(line['missing'])}" if line["missing"] else ""
    return (
        f"fold {line['fold']}, round {line['round']} of {history.study.rounds}: "
        f"loss {number(mean([epoch.train_loss for epoch in epochs]))}, "
        f"pseudo-Dice {number(mean([epoch.mean_dice for epoch in epochs]))}, "
        f"{len(line['participants'])} of {len(history.sites)} sites{missing}, {line['seconds']:.1f} s"
    )


def standing(history: History) -> str:
    """How a study stands, in one line: `small: training, round 3 of 8, since 2026-11-25 21:53:39 UTC`."""
    since = timestamp(history.phases[-1][1] if history.phases else history.began)
    return f"{history.study.name}: {history.phase}, round {history.done_rounds} of {history.all_rounds}, since {since}"


def raise_failure(history: History, where: str, go_on: str) -> None:
    """Raise what kept the study from its end: its failure, or FNU-509 when somebody stopped it.

    Parameters
    ----------
    history : History
        The study so far.
    where : str
        Where to look further.
    go_on : str
        What lets it go on after a stop, for people.
    """
    if history.ended == "stopped":
        done = f"{history.done_rounds} of {history.all_rounds} rounds"
        found = f"study {history.study.name}: stopped by {history.stopped_by} after {done}\n{where}"
        raise FednnunetError(Code.STUDY_STOPPED, found, f"To go on: {go_on}")
    if history.ended == "failed":
        code = Code.of(history.number)
        found = history.reason.removeprefix(f"FNU-{code.number} {code.title}").removeprefix(": ")
        advice = [history.advice]
        named = set(map(int, re.findall(r"FNU-(\d{3})", found))) - {code.number, Code.SITE_FAILED.number}
        for one in sorted(named):
            with contextlib.suppress(KeyError):  # a number that another version knows
                advice.append(f"FNU-{one}: {Code.of(one).advice}")
        raise FednnunetError(code, f"{found}\n{where}", "\n".join(advice))


def screen(history: History, doing: Callable[[str], str] = lambda site: "") -> RenderableType:
    """The live screen, at least 80 columns wide.

    Parameters
    ----------
    history : History
        The study so far.
    doing : callable
        What a site's worker says it is doing, where this machine can know it.
    """
    steps = Text()
    reached = PHASES.index(history.phase) if history.phase in PHASES else -1
    for index, phase in enumerate(PHASES):
        style = "bold cyan" if index == reached else "green" if index < reached else "dim"
        steps.append(phase + ("  " if index < len(PHASES) - 1 else ""), style)
    left = history.remaining()
    eta = f", about {clock(left)} of training to go" if left and history.phase == "training" else ""
    head = Text(f"{history.study.name}  ", "bold")
    since = time.time() - moment(history.began) if history.began else 0.0
    head.append(f"round {history.done_rounds} of {history.all_rounds}, {clock(since)}{eta}")
    bar = Table.grid(expand=True)
    bar.add_row(ProgressBar(total=history.all_rounds, completed=history.done_rounds))
    parts: list[RenderableType] = [head, steps, bar, _sites_table(history, doing)]
    for one in history.warnings[-WARNINGS:]:
        text = f"{one.at[11:19]} UTC {one.site or 'orchestrator'}: {one.text}"
        parts.append(Text(text, "yellow", overflow="ellipsis", no_wrap=True))
    return Group(*parts)


def _sites_table(history: History, doing: Callable[[str], str]) -> Table:
    table = Table(expand=True, box=None, pad_edge=False)
    table.add_column("site", overflow="ellipsis", no_wrap=True, min_width=10, max_width=20)
    table.add_column("state", overflow="ellipsis", no_wrap=True, ratio=1)
    for name in ("seen", "loss", "pDice", "curve", "to site", "from site"):
        table.add_column(name, justify="right", no_wrap=True)
    fold = history.rounds[-1].fold if history.rounds else history.study.folds[0]
    for name, site in history.sites.items():
        last = site.epochs[-1] if site.epochs else None
        table.add_row(
            name,
            Text(doing(name) or site.state),
            ago(site.seen),
            number(last.train_loss if last else None),
            number(last.mean_dice if last else None),
            sparkline([epoch.mean_dice for epoch in site.epochs if epoch.fold == fold]),
            size(site.sent),
            size(site.received),
        )
    if history.rounds and len(history.sites) > 1:
        losses, dices = history.pooled_curve(fold, "train_loss"), history.pooled_curve(fold, "mean_dice")
        table.add_row(
            Text("all sites", "bold"),
            f"fold {fold}",
            "",
            number(losses[-1][1] if losses else None),
            number(dices[-1][1] if dices else None),
            sparkline([value for _, value in dices]),
            size(sum(site.sent for site in history.sites.values())),
            size(sum(site.received for site in history.sites.values())),
        )
    return table


def sparkline(values: list[float | None], width: int = SPARKS) -> str:
    """A curve in `width` characters, lowest to highest; of more values each character is a mean."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    step = max(1.0, len(known) / width)
    edges = [round(index * step) for index in range(min(width, len(known)) + 1)]
    means = [sum(known[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in means)


def report_at_site(study: Study) -> Path:
    """What a site found wrong with its dataset, with the files' names: below the site's state folder, never here."""
    return Path("worker") / study.id / "examination" / "examination.txt"


def watch(
    history: History,
    tail: Tail,
    console: Console,
    look: Callable[[], None] = lambda: None,
    doing: Callable[[str], str] = lambda site: "",
) -> None:
    """Show a study until it has ended: a live screen on a terminal, plain lines elsewhere.

    Parameters
    ----------
    history, tail : History, Tail
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
        while history.ended is None:
            look()
            for line in tail.lines():
                history.take(line)
                text = plain(history, line)
                if text and live is None:
                    console.print(text, soft_wrap=True, highlight=False, markup=False)
                if line["event"] == "layers" and not history.study.one_model:
                    console.print(layers_table(read_layers(tail.path.parent)))
            if live is not None:
                live.update(screen(history, doing))
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
    for label in labels:
        table.add_column(Text(label), justify="right")
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


def print_end(console: Console, history: History, folder: Path) -> None:
    """What a person wants to know when a study has ended well."""
    if history.ended == "done" and history.study.stop_after != "finish":
        why = f"ended after {history.study.stop_after}, as its stop_after says"
        console.print(f"study {history.study.name} {why}: {folder}", soft_wrap=True, highlight=False)
    if history.exported is None:
        return
    for one in history.left_out:
        console.print(f"[yellow]left out:[/yellow] {escape(one.text)}", soft_wrap=True)
    for fold, entry in history.exported["validation"].items():
        console.print(scores_table(history.study, fold, entry["sites"]))
        for site, why in entry["missing"].items():
            console.print(f"[yellow]not scored:[/yellow] {site}: {escape(why)}")
    for site, why in history.exported["unfinished"].items():
        console.print(f"[yellow]without the final model:[/yellow] {site}: {escape(why)}")
    console.print(f"report: {folder / REPORT}", soft_wrap=True)
    archive = folder / history.exported["path"]
    if not history.study.one_model:
        console.print("each site has a model of its own, in its state folder below worker/*/nnUNet_results")
        kept = f"shared layers: {archive} ({size(history.exported['nbytes'])}); no whole model can be made of them"
        console.print(kept, soft_wrap=True)
        return
    console.print(f"model: {archive} ({size(history.exported['nbytes'])})", soft_wrap=True)
    console.print(f"install it with: nnUNetv2_install_pretrained_model_from_zip {archive}", soft_wrap=True)
    if (plan := folder / "plan.json").exists():
        plans = files.read_json(plan)["plans"]["plans_name"]
        console.print(f"predict with: {_predict(history.study, plans)}", soft_wrap=True, highlight=False)
    _print_stages(console, history.study, folder)


def print_was_done(console: Console, history: History) -> None:
    """The last line where a study that is done was asked for again: what stands above was made then."""
    text = f"nothing was run: study {history.study.name} is done already, since {timestamp(history.ended_at)}"
    console.print(text, style="yellow", soft_wrap=True, highlight=False)


def _predict(study: Study, plans: str) -> str:
    """nnU-Net's command that predicts with the exported model; `plans` is their name."""
    trainer = "" if study.trainer == Study.model_fields["trainer"].default else f" -tr {study.trainer}"
    previous = " -prev_stage_predictions FIRST_STAGE_OUT" if study.previous_stage is not None else ""
    return (
        f"nnUNetv2_predict -i IMAGES -o OUT -d {study.dataset} -c {study.configuration} -f {' '.join(study.folds)}"
        f"{trainer} -p {plans}{previous}"
    )


def _print_stages(console: Console, study: Study, folder: Path) -> None:
    """What belongs together: a cascade predicts from what its first stage predicts, so nnU-Net needs both models."""
    if study.previous_stage is not None:
        archive = folder.parent / study.previous_stage / f"{study.dataset}.zip"
        console.print(
            f"its first stage too: nnUNetv2_install_pretrained_model_from_zip {archive}; the output folder of its "
            "nnUNetv2_predict is FIRST_STAGE_OUT",
            soft_wrap=True,
        )
    elif study.configuration == LOWRES and study.fold in ("0-4", "all"):
        console.print(f'for a cascade: configuration: {CASCADE}, previous_stage: "{study.id}"', soft_wrap=True)
