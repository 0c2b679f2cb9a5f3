"""The journal of one study: what has happened, on the disk before anything counts on it.

Layout of a study's folder::

    study.json                                   the study
    journal.jsonl                                every transition, hash-chained (federation.audit)
    answers/KEY/SITE.json                        what a site answered (describe, fingerprint, prepare, ...)
    layers.json                                  who shares which layers
    first/NETWORK.safetensors                    the first weights of each network
    rounds/fold_K/0000/global.safetensors        the initial weights
    rounds/fold_K/NNNN/updates/SITE.{json,safetensors}
    rounds/fold_K/NNNN/global.safetensors        the weights after round NNNN
    rounds/fold_K/NNNN/difference.safetensors    the same as a difference (wire: half, int8)
    rounds/fold_K/NNNN/carry.safetensors         what rounding took away from it, for the next difference
    rounds/fold_K/NNNN/optimizer.safetensors     the state of the orchestrator's optimizer
    rounds/fold_K/NNNN/*-VIEW.safetensors        what a site gets that shares a part (orchestrator.views)
    quarantine/KEY-SITE-ATTEMPT.{json,safetensors}
    stop.json                                    somebody wants the study to stop (`fednnunet study stop`)
    incoming/                                    answers that are being fetched
    plan.json, fingerprint.json, planning/, model/, DATASET.zip or DATASET-shared.zip, report.html

Rules:

- A file is complete before the line that speaks of it is written; a file without its line does not count.
- States: enrolling, describing, fingerprinting, planning, preparing, training, validating, finishing, comparing,
  exporting, done | failed | stopped. A coordinator that starts reads the lines and goes on from there.
- Nothing is decided from a clock or from the order of arrival: the same lines lead to the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federation import audit, files
from federation.audit import Chain
from federation.errors import Code, FednnunetError
from federation.study import Study
from federation.tasks import Kind, Result, Task, parse_result

ENDED = ("done", "failed", "stopped")
STOP = "stop.json"


@dataclass
class State:
    """What the lines of a journal add up to."""

    phase: str = "new"
    ended: str | None = None
    reason: str = ""
    answered: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    closed: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    steps: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    weights: dict[str, tuple[int, str]] = field(default_factory=dict)
    holds: dict[str, str] = field(default_factory=dict)
    pooled: str | None = None
    plans_sha256: str | None = None
    layers: dict[str, Any] | None = None
    exported: dict[str, Any] | None = None
    submission: str = ""
    ended_submissions: set[str] = field(default_factory=set)

    def apply(self, line: dict[str, Any]) -> None:
        """Take one more line into account."""
        match line["event"]:
            case "opened":
                self.ended, self.reason, self.submission = None, "", line.get("submission", "")
            case "phase":
                self.phase = line["phase"]
            case "answered":
                self.answered[line["key"], line["site"]] = line
                if line.get("holds"):
                    self.holds[line["site"]] = line["holds"]
            case "failed_answer":
                self.failures[line["key"], line["site"]] += 1
            case "refused":
                self.failures[line["key"], line["site"]] += 1
            case "pooled":
                self.pooled = line["sha256"]
            case "planned":
                self.plans_sha256 = line["plans_sha256"]
            case "layers":
                self.layers = line
            case "closed":
                self.closed[line["fold"], line["round"]] = line
            case "step":
                self.steps[line["kind"], line["fold"] or ""] = line["missing"]
            case "weights":
                self.weights[line["fold"]] = (line["round"], line["digest"])
            case "exported":
                self.exported = line
            case "done" | "failed" | "stopped":
                self.ended, self.reason = line["event"], line.get("reason", "")
                if self.ended != "done":
                    self.ended_submissions.add(self.submission)


class StopRequested(Exception):
    """Somebody wants the study to stop: `by`, an operating system's user."""

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by


def request_stop(folder: Path, by: str) -> None:
    """Ask whoever drives the study in a folder, now or later, to stop it."""
    files.write_json(folder / STOP, {"by": by})


def withdraw_stop(folder: Path) -> None:
    """A study that begins, goes on or has ended is not to be stopped any more."""
    (folder / STOP).unlink(missing_ok=True)


def read_study(path: Path) -> Study:
    """The study that a study.json holds; raises FNU-504 where it is none, or of another version."""
    try:
        return Study.model_validate(files.read_json(path))
    except ValueError as error:
        raise FednnunetError(Code.JOURNAL_DAMAGED, f"{path} is no study, or of another version") from error


def under_way(studies: Path) -> Iterator[Path]:
    """Journals of the studies that have begun and not ended, by their last whole line."""
    for journal in sorted(studies.glob("*/journal.jsonl")):
        try:
            line = audit.last(journal)
        except FednnunetError:
            line = None  # the check of the whole file says what is wrong
        if line is None or line["event"] not in ENDED:
            yield journal


class Journal:
    """A study's folder, opened by the one coordinator that drives the study."""

    def __init__(self, folder: Path, study: Study) -> None:
        self.folder = folder
        self.study = study
        recorded = folder / "study.json"
        if recorded.exists():
            if read_study(recorded).id != study.id:
                raise FednnunetError(Code.JOURNAL_DAMAGED, f"{recorded} holds another study")
        else:
            files.write_json(recorded, study.model_dump(mode="json"))
        self._chain = Chain(folder / "journal.jsonl")
        self.state = State()
        for line in self._chain:
            self.state.apply(line)

    def write(self, event: str, **fields: Any) -> None:
        """Add one line; it is on the disk when this returns."""
        self.state.apply(self._chain.append(event, **fields))

    def phase(self, name: str) -> None:
        """Enter a phase, once."""
        if self.state.phase != name:
            self.write("phase", phase=name)

    def check(self) -> None:
        """Raise `StopRequested` when somebody wants the study to stop."""
        request = self.folder / STOP
        if request.exists():
            raise StopRequested(str(files.read_json(request)["by"]))

    def stop(self, by: str) -> None:
        """End the study here, until somebody resumes it."""
        self.write("stopped", by=by)
        withdraw_stop(self.folder)

    def close(self) -> None:
        """Close the file."""
        self._chain.close()

    # where things lie

    def round_folder(self, fold: str, number: int) -> Path:
        """Folder of a round."""
        return self.folder / "rounds" / f"fold_{fold}" / f"{number:04d}"

    def global_file(self, fold: str, number: int) -> Path:
        """Weights after a round; 0: the initial ones."""
        return self.round_folder(fold, number) / "global.safetensors"

    @property
    def first_weights(self) -> Path:
        """Folder of the first weights of each network."""
        return self.folder / "first"

    def optimizer_file(self, fold: str, number: int) -> Path:
        """State of the orchestrator's optimizer after a round."""
        return self.round_folder(fold, number) / "optimizer.safetensors"

    def answer_file(self, task: Task) -> Path:
        """Where a site's answer to a task goes."""
        if task.kind is Kind.TRAIN and task.fold is not None and task.round is not None:
            return self.round_folder(task.fold, task.round) / "updates" / f"{task.site}.json"
        return self.folder / "answers" / task.key / f"{task.site}.json"

    def update_file(self, task: Task) -> Path:
        """Where the weights of a site's answer go."""
        return self.answer_file(task).with_suffix(".safetensors")

    def quarantine(self, task: Task) -> Path:
        """Where a refused answer goes, without a suffix."""
        return self.folder / "quarantine" / f"{task.key}-{task.site}-{task.attempt}"

    # answers

    def attempt(self, task: Task) -> int:
        """Number of the next attempt at a task: one more than it has failed."""
        return self.state.failures[task.key, task.site] + 1

    def answer(self, task: Task) -> Result | None:
        """The recorded good answer to a task, or None."""
        if (task.key, task.site) not in self.state.answered:
            return None
        return parse_result(self.answer_file(task).read_bytes())

    def record(self, task: Task, result: Result, **fields: Any) -> None:
        """Record a good answer whose weights, if any, lie in `update_file` already."""
        files.write_bytes(self.answer_file(task), result.model_dump_json(indent=1).encode())
        self.write("answered", site=task.site, key=task.key, **fields)

    def forget_round(self, fold: str, number: int) -> None:
        """Free what no recovery needs any more: the updates of a round whose weights are on the disk, older globals."""
        for path in (self.round_folder(fold, number) / "updates").glob("*.safetensors"):
            path.unlink()
        if number >= 2:
            self._remove(fold, number - 2, "global*.safetensors")
        if number >= 1:
            self._remove(fold, number - 1, "difference*.safetensors", "carry.safetensors", "optimizer.safetensors")

    def _remove(self, fold: str, number: int, *patterns: str) -> None:
        for pattern in patterns:
            for path in self.round_folder(fold, number).glob(pattern):
                path.unlink()
