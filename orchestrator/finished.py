"""Studies that are done, read from their folders at the orchestrator; nothing is written and nobody is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import files
from federation.audit import read
from federation.study import Study
from orchestrator.history import Found, choose
from orchestrator.journal import read_study


@dataclass(frozen=True)
class Finished:
    """A study whose journal ends in `done`.

    Attributes
    ----------
    folder : Path
        Its folder.
    study : Study
        The study.
    at : str
        When it was done (UTC, ISO 8601).
    plans_sha256 : str or None
        The plans it was made with; None without one plan for all sites.
    exported : dict or None
        The journal's line of the exported model; None where the study stopped before.
    """

    folder: Path
    study: Study
    at: str
    plans_sha256: str | None
    exported: dict[str, Any] | None

    @property
    def plans_name(self) -> str:
        """Name of its plans, as nnU-Net's -p takes it; for a study with one plan."""
        return str(files.read_json(self.folder / "plan.json")["plans"]["plans_name"])

    @property
    def zip(self) -> Path | None:
        """The exported model, where there is one for all sites."""
        return self.folder / self.exported["path"] if self.exported and self.study.one_model else None


def load(folder: Path) -> Finished | None:
    """The study of a folder if it is done, else None. Raises FNU-504 when its journal, or what it is, was changed."""
    lines = read(folder / "journal.jsonl")
    if not lines or lines[-1]["event"] != "done":
        return None
    exported = [line for line in lines if line["event"] == "exported"]
    planned = [line for line in lines if line["event"] == "planned"]
    return Finished(
        folder,
        read_study(folder / "study.json"),
        lines[-1]["at"],
        planned[-1]["plans_sha256"] if planned else None,
        exported[-1] if exported else None,
    )


def load_all(studies: Path) -> list[Finished]:
    """Every study that is done below a folder of studies, the oldest first."""
    found = (load(path.parent) for path in studies.glob("*/study.json"))
    return sorted((study for study in found if study is not None), key=lambda study: study.at)


def find(studies: Path, given: str) -> Finished:
    """The finished study with this name, or with an id that begins so.

    Raises FNU-120 when there is none or more than one; what is there is named.
    """
    known = load_all(studies)
    found = choose(given, [Found(one.folder, one.study) for one in known], f"finished studies in {studies}")
    return next(one for one in known if one.folder == found.folder)
