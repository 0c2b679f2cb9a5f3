"""Which configuration is best: nnU-Net's find_best_configuration from what the sites have reported already.

Rules:

- Compared is the number that nnU-Net compares: the mean over the labels of the mean Dice over all held-out cases of
  the folds 0 to 4 (`accumulate_cv_results`). Every case counts the same, at whichever site it lies. The sites have
  reported mean and number of cases for each label and fold; nothing is asked of them, and no case is named.
- A case in which a label neither occurs nor was predicted does not count for that label (nnU-Net's NaN). A label with
  no case at all is left out; there nnU-Net's own figure is NaN.
- The same cases everywhere, or no comparison (FNU-121): one dataset and its labels, the same sites, for each fold a
  score from every site over the same number of cases.
- Of equals the first given is the best, as with nnU-Net: name the simpler one first.
- Single configurations alone. An ensemble and a postprocessing are chosen by nnU-Net from new segmentations of every
  held-out case; the sites have not been asked for those.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import files
from federation.errors import Code, FednnunetError
from federation.study import LOWRES, Study
from federation.tasks import LabelScore, Validation
from orchestrator import finished
from orchestrator.finished import Finished
from orchestrator.model import pool_scores

SAME = ("dataset", "labels", "regions_class_order", "channel_names", "file_ending")
INSTRUCTIONS, INFORMATION = "inference_instructions.txt", "inference_information.json"


@dataclass(frozen=True)
class Candidate:
    """A finished cross-validation, pooled.

    Attributes
    ----------
    source : Finished
        The study.
    labels : dict
        Pooled Dice of each foreground label over all held-out cases of all sites.
    sites : dict
        The same of each site's own cases alone.
    cases : int
        Number of held-out cases of all sites.
    """

    source: Finished
    labels: dict[str, LabelScore]
    sites: dict[str, dict[str, LabelScore]]
    cases: int

    @property
    def study(self) -> Study:
        """The study."""
        return self.source.study

    @property
    def dice(self) -> float:
        """nnU-Net's `foreground_mean` of Dice."""
        return foreground_mean(self.labels)


def foreground_mean(labels: dict[str, LabelScore]) -> float:
    """Mean over the labels of their mean Dice; NaN without any."""
    means = [score.mean for score in labels.values() if score.mean is not None]
    return math.fsum(means) / len(means) if means else math.nan


def compare(studies: Sequence[Finished]) -> list[Candidate]:
    """Pool the cross-validation of each study, in the order given.

    Raises
    ------
    FednnunetError
        FNU-121 when they are not over the same cases.
    """
    first = studies[0]
    for one in studies:
        _require_complete(one)
        differ = [name for name in SAME if getattr(one.study, name) != getattr(first.study, name)]
        if set(one.study.sites) != set(first.study.sites):
            differ.append("sites")
        if _held_out(one) != _held_out(first):
            differ = differ or ["the number of held-out cases"]
        if differ:
            raise FednnunetError(
                Code.STUDIES_NOT_COMPARABLE, f"{_named(one)} and {_named(first)} differ in {', '.join(differ)}"
            )
    return [_pool(one) for one in studies]


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate with the highest foreground mean; of equals the first."""
    return max(candidates, key=lambda candidate: -math.inf if math.isnan(candidate.dice) else candidate.dice)


def instructions(winner: Candidate) -> list[str]:
    """nnU-Net's commands that install and run a candidate, the first stage of a cascade first."""
    lines: list[str] = []
    study, previous = winner.study, ""
    if study.previous_stage is not None:
        first = finished.load(winner.source.folder.parent / study.previous_stage)
        if first is None or first.zip is None:
            raise FednnunetError(
                Code.FIRST_STAGE_DIFFERS, f"study {study.previous_stage[:16]} is gone from the studies"
            )
        lines += _commands(first.zip, first.study, winner.source.plans_name, LOWRES, "OUTPUT_FOLDER_PREV_STAGE", "")
        previous = " -prev_stage_predictions OUTPUT_FOLDER_PREV_STAGE"
    assert winner.source.zip is not None
    lines += _commands(
        winner.source.zip, study, winner.source.plans_name, study.configuration, "OUTPUT_FOLDER", previous
    )
    return lines


def _commands(archive: Path, study: Study, plans: str, configuration: str, out: str, more: str) -> list[str]:
    return [
        f"nnUNetv2_install_pretrained_model_from_zip {archive}",
        f"nnUNetv2_predict -d {study.dataset} -i INPUT_FOLDER -o {out} -f {' '.join(study.folds)} "
        f"-tr {study.trainer} -c {configuration} -p {plans}{more}",
    ]


def write(candidates: Sequence[Candidate], folder: Path) -> Path:
    """Write what was found, as nnU-Net does: the commands as text, and everything as JSON; returns the text's path."""
    winner = best(candidates)
    information = {
        "dataset_name_or_id": winner.study.dataset,
        "folds": [int(fold) for fold in winner.study.folds],
        "ensembling_allowed": False,
        "considered_models": [_information(candidate) for candidate in candidates],
        "best_model_or_ensemble": {
            "result_on_crossval_pre_pp": _number(winner.dice),
            "selected_model_or_models": [_information(winner)],
        },
    }
    files.write_json(folder / INFORMATION, information)
    text = folder / INSTRUCTIONS
    files.write_bytes(text, ("\n".join(instructions(winner)) + "\n").encode())
    return text


def _information(candidate: Candidate) -> dict[str, Any]:
    study = candidate.study
    return {
        "configuration": study.configuration,
        "trainer": study.trainer,
        "plans_identifier": candidate.source.plans_name,
        "study": study.id,
        "zip": str(candidate.source.zip),
        "foreground_mean": _number(candidate.dice),
        "labels": {name: _score(score) for name, score in candidate.labels.items()},
        "sites": {
            site: {
                "foreground_mean": _number(foreground_mean(labels)),
                "labels": {k: _score(v) for k, v in labels.items()},
            }
            for site, labels in candidate.sites.items()
        },
    }


def _score(score: LabelScore) -> dict[str, float | int | None]:
    return {"Dice": score.mean, "cases": score.cases}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _named(one: Finished) -> str:
    return f"{one.study.name} ({one.study.id[:16]})"


def _reports(one: Finished) -> dict[str, dict[str, Validation]]:
    """For each fold what each site reported."""
    assert one.exported is not None
    return {
        fold: {site: Validation.model_validate(value) for site, value in entry["sites"].items()}
        for fold, entry in one.exported["validation"].items()
    }


def _held_out(one: Finished) -> dict[tuple[str, str], int]:
    """Number of held-out cases by fold and site."""
    return {
        (fold, site): item.validation_cases for fold, sites in _reports(one).items() for site, item in sites.items()
    }


def _require_complete(one: Finished) -> None:
    found = ""
    if one.study.fold != "0-4":
        found = f"has fold {one.study.fold}, not 0-4"
    elif not one.study.one_model or one.zip is None:
        found = "has no one model for all sites"
    elif gaps := [
        f"{site} in fold {fold}"
        for fold in one.study.folds
        for site in one.study.sites
        if not _held_out(one).get((fold, site))
    ]:
        found = f"was not scored by {', '.join(gaps[:5])}"
    if found:
        raise FednnunetError(Code.STUDIES_NOT_COMPARABLE, f"{_named(one)} {found}")


def _pool(one: Finished) -> Candidate:
    reports = _reports(one)

    def pooled(sites: Sequence[str]) -> dict[str, LabelScore]:
        chosen = [fold[site] for fold in reports.values() for site in sites]
        names = [name for name in one.study.labels if any(name in report.validation for report in chosen)]
        return {
            name: pool_scores(report.validation[name] for report in chosen if name in report.validation)
            for name in names
        }

    sites = {site: pooled([site]) for site in sorted(one.study.sites)}
    return Candidate(one, pooled(one.study.sites), sites, sum(_held_out(one).values()))
