"""A study's folder at the orchestrator as it lies after rounds with a missing and a faulty site; made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from commands import phantom_study

from federation import audit, files
from federation.study import Study, parse

SITES = ("north", "south")


def training(loss: float, dice: float, epochs: int = 1) -> dict[str, Any]:
    """A site's report of a round."""
    return {
        "train_loss": [loss] * epochs,
        "val_loss": [loss] * epochs,
        "learning_rate": [0.01] * epochs,
        "pseudo_dice": [[dice, None]] * epochs,
        "seconds": {"train": 2.0, "validation": 0.5},
    }


def validation(mean: float) -> dict[str, Any]:
    """A site's answer to Validate."""
    score = {"mean": mean, "std": 0.05, "minimum": mean - 0.1, "cases": 4}
    return {"validation": {}, "validation_cases": 0, "test": {"organ": score}, "test_cases": 4, "seconds": 1.0}


class Written:
    """A study's folder, and a way to add lines to its journal."""

    def __init__(self, state: Path, name: str = "small", sites: tuple[str, ...] = SITES, **changes: Any) -> None:
        self.study: Study = parse({**phantom_study(sites, rounds=3), "name": name, **changes})
        self.folder = state / "studies" / self.study.id
        files.write_json(self.folder / "study.json", self.study.model_dump(mode="json"))

    def write(self, event: str, **fields: Any) -> None:
        """One more line."""
        audit.append(self.folder / "journal.jsonl", event, **fields)

    def round(self, number: int, missing: dict[str, str] | None = None, fold: str = "all") -> None:
        """A round; the first site is the better one, and every round is better than the one before."""
        absent = missing or {}
        key = f"train-fold_{fold}-{number:04d}"
        for place, site in enumerate(self.study.sites):
            self.write("asked", site=site, key=key, attempt=1, nbytes=1000)
            if site not in absent:
                told = training(1.0 / number + place, min(0.95, 0.5 + 0.1 * number - 0.05 * place))
                self.write("answered", site=site, key=key, nbytes=500, cases=10 + place, digest="d", training=told)
        took_part = [site for site in self.study.sites if site not in absent]
        self.write("closed", fold=fold, round=number, participants=took_part, missing=absent, seconds=2.5)
        self.write("weights", fold=fold, round=number, digest=f"{number:064d}", seconds=0.5, memory=10**8)

    def to_the_end(self) -> None:
        """A whole study: round 2 went on without the second site, whose first answer had been refused."""
        self.write("opened", run=1, submission="s")
        for phase in ("enrolling", "describing", "fingerprinting", "planning", "preparing"):
            self.write("phase", phase=phase)
            if phase == "enrolling":
                for site in self.study.sites:
                    self.write("online", site=site)
        self.write("planned", plans_sha256="e" * 64)
        self.write("phase", phase="training")
        self.write("weights", fold="all", round=0, digest="0" * 64)
        self.round(1)
        last = self.study.sites[-1]
        reason = "FNU-505 A site's update was refused: decoder.seg_layers.0.weight holds <NaN>"
        self.write("refused", site=last, key="train-fold_all-0002", attempt=1, reason=reason)
        self.round(2, {last: reason})
        self.round(3)
        self.write("phase", phase="validating")
        scores = {}
        for place, site in enumerate(self.study.sites):
            scores[site] = validation(0.9 - 0.2 * place)
            self.write("answered", site=site, key="validate-fold_all", nbytes=90, validation=scores[site])
        archive = self.folder / "Dataset300.zip"
        archive.write_bytes(b"PK")
        self.write(
            "exported",
            whole=True,
            path=archive.name,
            sha256=files.sha256_of(archive),
            nbytes=2,
            weights={"all": "d"},
            unfinished={},
            validation={"all": {"sites": scores, "missing": {}}},
        )
        self.write("done")
