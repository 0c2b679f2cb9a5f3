"""What a study's journal tells, added up over time: for the live screen, the report, the metrics and the web page.

Rules:

- One line after the other, from the first on; the same lines give the same history, whoever reads them and when.
- Nothing is asked of a site and nothing is written. Site names, counts and sums: no case and no patient is known here.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federation.audit import Tail
from federation.errors import Code, FednnunetError
from federation.readable import moment
from federation.study import Study
from orchestrator.doubts import doubts

PHASES = (
    "enrolling",
    "describing",
    "fingerprinting",
    "planning",
    "preparing",
    "training",
    "validating",
    "finishing",
    "comparing",
    "exporting",
)
REPORT = "report.html"
"""A study's report, in its folder at the orchestrator."""
MOST_WARNINGS = 200
MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Epoch:
    """One epoch at one site.

    Attributes
    ----------
    fold : str
        The fold.
    round, epoch : int
        The round, and the epoch counted over all rounds of the fold; both from 1.
    train_loss, val_loss, learning_rate : float
        As nnU-Net logs them.
    pseudo_dice : list of (float or None)
        nnU-Net's online Dice for each foreground class; None where a class did not occur.
    """

    fold: str
    round: int
    epoch: int
    train_loss: float
    val_loss: float
    learning_rate: float
    pseudo_dice: list[float | None]

    @property
    def mean_dice(self) -> float | None:
        """Mean of the classes that occurred."""
        return mean(self.pseudo_dice)


@dataclass
class SiteHistory:
    """One site.

    Attributes
    ----------
    state : str
        What it does now, for people.
    seen : str or None
        When it gave its last sign (UTC, ISO 8601).
    sent, received : int
        Bytes to and from it.
    epochs : list of Epoch
        What it has trained.
    cases : dict
        Training cases by fold, as the site declared them when it prepared: what its update counts.
    scores : dict
        Its answer to Validate (federation.tasks.Validation) by fold.
    comparisons : dict
        Its answer to Compare (federation.tasks.Comparison) by fold.
    seconds : dict
        What its rounds spent their time on: `start`, `train`, `validation`, `checkpoint`.
    refused : Counter
        Answers of it that were refused, by error number.
    """

    state: str = "not seen yet"
    seen: str | None = None
    sent: int = 0
    received: int = 0
    epochs: list[Epoch] = field(default_factory=list)
    cases: dict[str, int] = field(default_factory=dict)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    comparisons: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: int = 0
    missed: int = 0
    answered: float = 0.0
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Round:
    """One round that is closed: who took part, why the others did not, and its seconds."""

    fold: str
    round: int
    at: str
    participants: list[str]
    missing: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class LeftOut:
    """A site that was missing in half of the rounds or more, and its part of all training cases where that is known."""

    site: str
    missed: int
    rounds: int
    share: float | None

    @property
    def text(self) -> str:
        """What it means, for people."""
        cases = f", which has {self.share:.0%} of the training cases," if self.share is not None else ""
        return f"{self.site}{cases} had no part in {self.missed} of {self.rounds} rounds: the model is the others'."


@dataclass(frozen=True)
class Warned:
    """Something that a person should know: when, which site (or "", the orchestrator), what.

    A `lasting` one is true of the whole study, and does not give way to newer ones.
    """

    at: str
    site: str
    text: str
    lasting: bool = False


@dataclass
class History:
    """A study as its journal shows it, line after line."""

    study: Study
    phase: str = "starting"
    phases: list[tuple[str, str]] = field(default_factory=list)
    sites: dict[str, SiteHistory] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    aggregation: list[float] = field(default_factory=list)
    memory: int = 0
    weights: dict[str, tuple[int, str]] = field(default_factory=dict)
    warnings: list[Warned] = field(default_factory=list)
    began: str | None = None
    last: str | None = None
    lines: int = 0
    starts: int = 0
    interrupted: int = 0
    ended: str | None = None
    ended_at: str | None = None
    reason: str = ""
    advice: str = ""
    number: int = 0
    stopped_by: str = ""
    plans_sha256: str | None = None
    pooled: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] | None = None
    exported: dict[str, Any] | None = None
    _spent: dict[str, float] = field(default_factory=dict)
    _since: str | None = None

    def __post_init__(self) -> None:
        self.sites = {site: SiteHistory() for site in self.study.sites}

    def take(self, line: dict[str, Any]) -> None:
        """Take one line into account."""
        at: str = line["at"]
        self._time_goes_on(line["event"], at)
        self.lines, self.last, self.began = self.lines + 1, at, self.began or at
        site = self.sites.get(line.get("site", ""))
        match line["event"]:
            case "opened":
                self.ended, self.ended_at, self.reason = None, None, ""
                self.starts += 1
            case "interrupted":
                self.interrupted += 1
                self.warn(at, "", "the orchestrator was shut down")
            case "phase":
                self.phase = line["phase"]
                self.phases.append((self.phase, at))
            case "online" if site:
                site.state, site.seen = "online", at
            case "asked" if site:
                site.state = f"at work: {line['key']}"
                site.sent += line["nbytes"]
                if line.get("why"):
                    self.warn(at, line["site"], f"{line['key']} sent again, {line['why']}")
            case "answered" if site:
                self._answered(site, line)
            case "failed_answer" | "refused" if site:
                self._failed(site, line)
            case "pooled":
                self.pooled = line
                for text in doubts(self.study, line.get("tolerance", {})):
                    self.warn(at, "", text, lasting=True)
            case "planned":
                self.plans_sha256 = line["plans_sha256"]
            case "layers":
                self.layers = line
                for name, cases in line.get("cases", {}).items():
                    self.sites[name].cases = dict(cases)
            case "closed":
                self._closed(line)
            case "step":
                for name, why in line["missing"].items():
                    self.warn(at, name, f"missing in {line['kind']}: {why}")
            case "weights":
                self.weights[line["fold"]] = (line["round"], line["digest"])
                if line["round"]:
                    self.aggregation.append(line.get("seconds", 0.0))
                self.memory = line.get("memory", self.memory)
            case "exported":
                self.exported = line
            case "done" | "failed" | "stopped":
                self.ended, self.ended_at = line["event"], at
                self.reason, self.advice = line.get("reason", ""), line.get("advice", "")
                self.number, self.stopped_by = line.get("number", 0), line.get("by", "")

    def _time_goes_on(self, event: str, at: str) -> None:
        """Add what has passed since the line before to the phase; not the time in which no coordinator ran."""
        if self._since is not None and event != "opened" and self.ended is None:
            self._spent[self.phase] = self._spent.get(self.phase, 0.0) + max(0.0, moment(at) - moment(self._since))
        self._since = at

    def _answered(self, site: SiteHistory, line: dict[str, Any]) -> None:
        site.state, site.seen = f"done: {line['key']}", line["at"]
        site.received += line["nbytes"]
        site.answered = moment(line["at"])
        if training := line.get("training"):
            fold, number = _fold_and_round(line["key"])
            site.cases[fold] = line["cases"]
            for part, seconds in training["seconds"].items():
                site.seconds[part] = site.seconds.get(part, 0.0) + seconds
            before = (number - 1) * self.study.epochs_per_round
            columns = zip(
                training["train_loss"],
                training["val_loss"],
                training["learning_rate"],
                training["pseudo_dice"],
                strict=True,
            )
            site.epochs += [Epoch(fold, number, before + done + 1, *values) for done, values in enumerate(columns)]
        if validation := line.get("validation"):
            site.scores[line["key"].partition("fold_")[2]] = validation
        if comparison := line.get("comparison"):
            site.comparisons[line["key"].partition("fold_")[2]] = comparison

    def _failed(self, site: SiteHistory, line: dict[str, Any]) -> None:
        site.state, site.seen = line["reason"], line["at"]
        if line["event"] == "refused":
            number = line["reason"].partition("FNU-")[2][:3]
            site.refused[number if number.isdigit() else ""] += 1
        else:
            site.failures += 1
        self.warn(line["at"], line["site"], f"{line['key']}: {line['reason']}")

    def _closed(self, line: dict[str, Any]) -> None:
        one = Round(
            line["fold"], line["round"], line["at"], line["participants"], line["missing"], float(line["seconds"])
        )
        self.rounds.append(one)
        for name, why in one.missing.items():
            self.sites[name].state = f"missing: {why}"
            self.sites[name].missed += 1
            self.warn(one.at, name, f"round {one.round} of fold {one.fold} went on without it: {why}")

    def warn(self, at: str, site: str, text: str, lasting: bool = False) -> None:
        """Keep a warning; of very many the newest, and those that last."""
        self.warnings.append(Warned(at, site, text, lasting))
        if len(self.warnings) > MOST_WARNINGS:
            self.warnings.remove(next(one for one in self.warnings if not one.lasting))

    @property
    def done_rounds(self) -> int:
        """Rounds done, over all folds."""
        return len({(one.fold, one.round) for one in self.rounds})

    @property
    def all_rounds(self) -> int:
        """Rounds of the whole study."""
        return self.study.rounds * len(self.study.folds)

    @property
    def left_out(self) -> list[LeftOut]:
        """Sites without which half of the rounds or more went on, those with the most cases first."""
        cases = {name: sum(site.cases.values()) for name, site in self.sites.items()}
        total = sum(cases.values()) if all(cases.values()) else 0
        found = [
            LeftOut(name, site.missed, len(self.rounds), cases[name] / total if total else None)
            for name, site in self.sites.items()
            if site.missed and 2 * site.missed >= len(self.rounds)
        ]
        return sorted(found, key=lambda one: -(one.share or 0.0))

    @property
    def standing(self) -> str:
        """The phase, or how the study has ended."""
        return self.ended or self.phase

    def spent(self) -> dict[str, float]:
        """Seconds in each phase while a coordinator ran, in the order of the phases."""
        return {phase: self._spent[phase] for phase in ("starting", *PHASES) if phase in self._spent}

    def remaining(self) -> float | None:
        """Seconds of training to go, from the mean of the last rounds."""
        if not self.rounds:
            return None
        recent = self.rounds[-5:]
        return (self.all_rounds - self.done_rounds) * sum(one.seconds for one in recent) / len(recent)

    def pooled_curve(self, fold: str, name: str) -> list[tuple[int, float]]:
        """(epoch, mean over the sites that trained it) of `train_loss`, `val_loss`, `learning_rate` or `mean_dice`."""
        found: dict[int, list[float]] = {}
        for site in self.sites.values():
            for epoch in site.epochs:
                value = getattr(epoch, name)
                if epoch.fold == fold and value is not None:
                    found.setdefault(epoch.epoch, []).append(value)
        return [(number, sum(values) / len(values)) for number, values in sorted(found.items())]


def so_far(study: Study, folder: Path) -> tuple[History, Tail]:
    """What the journal in a study's folder says already, and a tail that reads on from there."""
    history, tail = History(study), Tail(folder / "journal.jsonl")
    for line in tail.lines():
        history.take(line)
    return history, tail


def load(folder: Path) -> History:
    """The history of the study in a folder of the orchestrator's state. Raises OSError and ValueError."""
    return so_far(Study.model_validate_json((folder / "study.json").read_bytes()), folder)[0]


@dataclass(frozen=True)
class Found:
    """A study below the folder of studies: where it lies and what it is."""

    folder: Path
    study: Study

    def line(self) -> str:
        """One line for people."""
        study = self.study
        return f"{study.id[:16]}  {study.name}, {study.configuration}, fold {study.fold}"


def studies(folder: Path) -> list[Found]:
    """Every study below the folder of studies, the newest last (by the first line of its journal)."""
    found = []
    for path in folder.glob("*/study.json"):
        with contextlib.suppress(OSError, ValueError):  # half written, or of another version
            found.append(Found(path.parent, Study.model_validate_json(path.read_bytes())))
    return sorted(found, key=lambda one: (_began(one.folder), one.study.id))


def _began(folder: Path) -> str:
    """When a study began, in UTC; one that is about to begin is later than all others."""
    try:
        with open(folder / "journal.jsonl", "rb") as stream:
            return str(json.loads(stream.readline())["at"])
    except (OSError, ValueError, KeyError):
        return "later"


def choose(given: str, known: Sequence[Found], what: str) -> Found:
    """The study that is called so.

    Raises FNU-120 when there is none or more than one; what is there is named.

    Parameters
    ----------
    given : str
        A name, or at least the first four letters of an id.
    known : sequence of Found
        Those to choose from.
    what : str
        What they are, for the error: `studies in FOLDER`.
    """
    chosen = [one for one in known if one.study.is_called(given)]
    if len(chosen) != 1:
        there = "".join(f"\n  {one.line()}" for one in (chosen or known)[-MOST_NAMED:])
        found = f"{given}: {len(chosen)} {what}{', which has:' if known else ', which has none'}"
        raise FednnunetError(Code.STUDY_NOT_FOUND, found + there)
    return chosen[0]


def mean(values: list[float | None]) -> float | None:
    """Mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _fold_and_round(key: str) -> tuple[str, int]:
    """Of `train-fold_0-0007`: `0` and 7."""
    fold, _, number = key.partition("fold_")[2].rpartition("-")
    return fold, int(number)
