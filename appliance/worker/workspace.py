"""Where the worker keeps one study's files, and what a running task may ask of the loop.

Rules:

- Everything of a study lies below `work/STUDY`, in nnU-Net's own folders; only preprocessed data is shared between
  studies (below `work/preprocessed`, keyed by plans and data), and what a dataset was found to be is copied.
- A task that runs long says what it does (`Control.phase`) and asks often whether it may go on (`Control.check`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from federation import files, native
from federation.errors import Code, FednnunetError
from federation.study import Study

RECENT = 8
"""Studies whose examinations are looked at for one of the same data."""


class Interrupted(Exception):
    """The task ends here without an answer: it was cancelled, or the worker is asked to end."""


def _nothing(*_: object) -> None:
    return None


@dataclass(frozen=True)
class Control:
    """What a task may ask of the loop.

    Attributes
    ----------
    check : Callable[[], None]
        Raises `Interrupted` when the task has to end; cheap enough for every iteration.
    phase : Callable[[str], None]
        Says in a few words what is being done, for people.
    """

    check: Callable[[], None] = field(default=_nothing)
    phase: Callable[[str], None] = field(default=_nothing)


@dataclass(frozen=True)
class Workspace:
    """The folders of one study at one site."""

    work: Path
    study: Study

    @property
    def root(self) -> Path:
        """Everything of this study."""
        return self.work / self.study.id

    @property
    def log(self) -> Path:
        """Tracebacks of failed tasks."""
        return self.root / "log"

    @property
    def raw(self) -> Path:
        """The dataset in nnU-Net's raw format: links to the site's data under the study's name for it."""
        return self.root / "nnUNet_raw" / self.study.dataset

    @property
    def preprocessed(self) -> Path:
        """nnU-Net's preprocessed folder of the dataset."""
        return self.root / "nnUNet_preprocessed" / self.study.dataset

    @property
    def results(self) -> Path:
        """nnU-Net's results folder of the dataset."""
        return self.root / "nnUNet_results" / self.study.dataset

    @property
    def examination(self) -> Path:
        """What the site's dataset was found to be, for people and for the next task."""
        return self.root / "examination"

    def other_examinations(self) -> list[Path]:
        """Those of the last studies besides this one."""
        found = [path for path in self.work.glob("*/examination") if path != self.examination]
        return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)[:RECENT]

    @property
    def cache(self) -> Path:
        """Preprocessed cases, shared by studies with the same plans and data."""
        return self.work / "preprocessed"

    def state(self, fold: str) -> Path:
        """What must survive the worker between two rounds of a fold."""
        return self.root / "state" / f"fold_{fold}"

    def globals(self, fold: str) -> Path:
        """The last global weights of a fold, by their digest."""
        return self.root / "globals" / f"fold_{fold}"

    def model(self, plans: dict[str, Any]) -> Path:
        """The folder of the native model."""
        return self.results / native.model_name(self.study, plans)

    def enter(self) -> None:
        """Point nnU-Net at these folders (it reads the variables when it needs them)."""
        for name, folder in (
            ("nnUNet_raw", self.raw.parent),
            ("nnUNet_preprocessed", self.preprocessed.parent),
            ("nnUNet_results", self.results.parent),
        ):
            folder.mkdir(parents=True, exist_ok=True)
            os.environ[name] = str(folder)

    def plans(self, plans_sha256: str | None) -> dict[str, Any]:
        """The plans this site has prepared; raises FNU-302 when they are not those asked for."""
        path = self.preprocessed / "prepared.json"
        if not path.exists():
            raise FednnunetError(Code.PLANS_HASH, "this site has not been prepared")
        prepared = files.read_json(path)
        if prepared["plans_sha256"] != plans_sha256:
            raise FednnunetError(Code.PLANS_HASH, f"prepared {prepared['plans_sha256']}, asked for {plans_sha256}")
        plans: dict[str, Any] = files.read_json(self.preprocessed / f"{prepared['plans_name']}.json")
        return plans

    def dataset_json(self) -> dict[str, Any]:
        """The pooled dataset.json that came with the plans."""
        value: dict[str, Any] = files.read_json(self.preprocessed / "dataset.json")
        return value
