"""Did it help us? Three models over the same cases: what is made up and what is missed counts, for all alike.

Real files and nnU-Net's own metrics; the models are simulated: their predictions are boxes that these tests draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from worker_site import SITE, make_study

from appliance.spool import Spool
from appliance.worker import comparison, site_report
from appliance.worker.site_report import FEDERATED, MODELS, Compared, SiteStudy, compared
from federation import tasks
from federation.report.page import Section, render
from federation.study import Study

LOCAL, PERSONALISED = comparison.LOCAL, comparison.PERSONALISED
PLANS = {"plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO"}
Box = tuple[int, int] | None
"""From and to, in voxels along one axis; None: nothing."""


def lesions() -> Study:
    """A study of one label that not every patient has."""
    return make_study(labels={"background": 0, "lesion": 1}, fold="0", compare="local")


def judged(folder: Path, study: Study, references: Mapping[str, Box], **models: Mapping[str, Box]) -> SiteStudy:
    """A site at which three models have predicted these boxes in imagesTs, scored as a worker scores them."""
    spool = Spool(folder / "spool")
    spool.put_task(tasks.Task(study=study, site=SITE, kind=tasks.Kind.COMPARE, fold="0", plans_sha256="a" * 64), None)
    told = SiteStudy(spool, folder / "work", study.id)
    workspaces = {FEDERATED: told.workspace, **{one.name: one for one in comparison.variants(told.workspace)}}
    for model, boxes in models.items():
        out = workspaces[model].model(PLANS) / "fold_0" / "test"
        out.mkdir(parents=True, exist_ok=True)
        per_case = []
        for name, box in references.items():
            reference, prediction = folder / f"{name}.nii.gz", out / f"{name}.nii.gz"
            _write(reference, box, study.labels.get("ignore"))
            _write(prediction, boxes[name])
            ignored = study.labels.get("ignore")
            per_case.append(compute_metrics(str(reference), str(prediction), SimpleITKIO(), [1], ignored))
            recursive_fix_for_json_export(per_case[-1])
        save_summary_json({"metric_per_case": per_case, "mean": {}, "foreground_mean": {}}, str(out / "summary.json"))
    return told


def _write(path: Path, box: Box, ignored: Any = None) -> None:
    mask = np.zeros((3, 3, 40), np.uint8)
    if ignored is not None:
        mask[:, :, 30:] = ignored
    if box is not None:
        mask[:, :, slice(*box)] = 1
    sitk.WriteImage(sitk.GetImageFromArray(mask), str(path))


def nnunets_mean(told: SiteStudy, workspace: Any = None) -> float:
    values = [case.dice["lesion"] for case in told.cases(PLANS, "0", "test", workspace)]
    return float(np.mean([value for value in values if value is not None]))


def shown(told: SiteStudy) -> str:
    return render(site_report.Page("x", "x", [Section("x", site_report._comparison(told, PLANS))], "x"))


WITH = [f"with_{number:02d}" for number in range(12)]
WITHOUT = [f"without_{number:02d}" for number in range(12)]


@pytest.fixture
def made_up(tmp_path: Path) -> SiteStudy:
    """Twelve cases with the lesion, where federated is a little better, and twelve without.

    In nine of these federated predicts something, and personalised in one of the three others; local in none.
    """
    references: dict[str, Box] = {**dict.fromkeys(WITH, (10, 20)), **dict.fromkeys(WITHOUT)}
    federated: dict[str, Box] = {name: (11 + place % 2, 21) for place, name in enumerate(WITH)}
    local: dict[str, Box] = {name: (12 + place % 2, 22) for place, name in enumerate(WITH)}
    federated |= {name: (5, 6) if place < 9 else None for place, name in enumerate(WITHOUT)}
    personalised = {**federated, **dict.fromkeys(WITHOUT), WITHOUT[9]: (5, 6)}
    return judged(
        tmp_path,
        lesions(),
        references,
        local={**local, **dict.fromkeys(WITHOUT)},
        federated=federated,
        personalised=personalised,
    )


def test_a_model_that_makes_up_lesions_in_patients_without_one_is_not_better(made_up: SiteStudy) -> None:
    (one,) = compared(made_up, PLANS, "0", "test")
    assert one.cases == [*WITH, *WITHOUT[:10]], "the two cases in which nobody predicted anything tell nothing"
    assert one.present == [True] * 12 + [False] * 10
    local, _ = comparison.variants(made_up.workspace)
    assert nnunets_mean(made_up) < nnunets_mean(made_up, local)
    assert one.verdict == "worse"
    gains = np.subtract(one.dice[FEDERATED], one.dice[LOCAL])
    assert one.difference == (pytest.approx(gains.mean()), *site_report.interval(list(gains)))
    assert one.dice[FEDERATED][12:] == [0.0] * 9 + [1.0]
    assert one.dice[LOCAL][12:] == [1.0] * 10
    assert one.dice[PERSONALISED][12:] == [1.0] * 9 + [0.0]


def test_the_report_says_how_often_each_model_made_a_label_up(made_up: SiteStudy) -> None:
    text = shown(made_up)
    assert "for lesion (22 cases): the federated model is worse than our own training alone" in text
    assert "How it is counted" in text
    (one,) = compared(made_up, PLANS, "0", "test")
    table = site_report._mistakes([one])
    assert dict(zip(table.header, table.rows[0], strict=True)) == {
        "label": "lesion",
        "local: predicted where there is none": "0 of 12",
        "federated: predicted where there is none": "9 of 12",
        "personalised: predicted where there is none": "1 of 12",
        "local: missed altogether": "0 of 12",
        "federated: missed altogether": "0 of 12",
        "personalised: missed altogether": "0 of 12",
    }
    assert "9 of 12" in text


def test_a_lesion_that_a_model_leaves_out_or_puts_elsewhere_is_missed(tmp_path: Path) -> None:
    references: dict[str, Box] = {"a": (10, 20), "b": (10, 20), "c": (10, 20)}
    found: dict[str, Box] = dict(references)
    told = judged(
        tmp_path, lesions(), references, local={"a": None, "b": (30, 35), "c": (10, 20)}, federated=found,
        personalised={**found, "a": None},
    )  # fmt: skip
    (one,) = compared(told, PLANS, "0", "test")
    assert [one.missed(model) for model in MODELS] == [2, 0, 1]
    assert [one.made_up(model) for model in MODELS] == [0, 0, 0]
    assert (one.cases, one.without) == (["a", "b", "c"], 0)


def test_a_label_that_nobody_has_and_nobody_predicted_is_not_compared(tmp_path: Path) -> None:
    nothing: dict[str, Box] = {"a": None, "b": None}
    told = judged(tmp_path, lesions(), nothing, local=nothing, federated=nothing, personalised=nothing)
    assert compared(told, PLANS, "0", "test") == []


def test_few_differences_that_are_all_the_same_decide_nothing() -> None:
    """Student's interval of equal differences has no width: two patients with a made-up lesion would be a verdict."""

    def verdict(cases: int) -> str:
        names = [str(number) for number in range(cases)]
        return Compared("x", names, [False] * cases, cases, {}, (-1.0, *site_report.interval([-1.0] * cases))).verdict

    assert [verdict(cases) for cases in (1, 2, 5, 6)] == [*["no clear difference"] * 3, "worse"]


def shifted(box: tuple[int, int], by: int) -> Box:
    return box[0] + by, box[1] + by


def test_hd95_is_over_the_cases_that_every_model_found(tmp_path: Path) -> None:
    """Local finds the easy half alone, to 1 mm; federated these as well as local, and the hard ones to 4 mm."""
    references: dict[str, Box] = {f"case_{number}": (10, 20) for number in range(6)}
    easy = list(references)[:3]
    local = {name: shifted((10, 20), 1) if name in easy else None for name in references}
    federated = {name: shifted((10, 20), 1 if name in easy else 4) for name in references}
    told = judged(tmp_path, lesions(), references, local=local, federated=federated, personalised=federated)
    assert ">2.5<" not in shown(told), "the median of all that federated found"
    far = site_report.distances(told, PLANS, "0", "test")["lesion"]
    assert far.cases == easy
    assert far.of == {model: [1.0, 1.0, 1.0] for model in MODELS}
    (one,) = compared(told, PLANS, "0", "test")
    assert [one.missed(model) for model in MODELS] == [3, 0, 0], "what was missed is told beside it"


def test_where_there_are_too_many_cases_hd95_takes_the_same_ones_by_name_whatever_their_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site_report, "MOST_CASES", 2)
    references: dict[str, Box] = {f"case_{number}": (10, 20) for number in range(4)}
    local = {name: shifted((10, 20), by) for name, by in zip(references, (1, 2, 3, 4), strict=True)}
    federated = {name: shifted((10, 20), by) for name, by in zip(references, (4, 3, 2, 1), strict=True)}
    told = judged(tmp_path, lesions(), references, local=local, federated=federated, personalised=federated)
    text = shown(told)
    assert ">1.5<" in text, "local's median, not that of its own worst two"
    assert "2 of 4" in text
    far = site_report.distances(told, PLANS, "0", "test")["lesion"]
    assert far.cases == ["case_0", "case_1"]
    assert (far.of[LOCAL], far.of[FEDERATED]) == ([1.0, 2.0], [4.0, 3.0])
    assert far.counted == "2 of 4"


def test_hd95_is_measured_anew_where_a_model_was_judged_anew(tmp_path: Path) -> None:
    references: dict[str, Box] = {"a": (10, 20), "b": (10, 20)}
    near, far = (dict.fromkeys(references, shifted((10, 20), by)) for by in (1, 5))
    told = judged(tmp_path, lesions(), references, local=near, federated=near, personalised=near)
    assert site_report.distances(told, PLANS, "0", "test")["lesion"].of[LOCAL] == [1.0, 1.0]
    again = judged(tmp_path, lesions(), references, local=far)
    assert site_report.distances(again, PLANS, "0", "test")["lesion"].of[LOCAL] == [5.0, 5.0]


def test_hd95_leaves_out_what_the_reference_says_to_ignore_as_nnunets_dice_does(tmp_path: Path) -> None:
    study = make_study(labels={"background": 0, "lesion": 1, "ignore": 2}, fold="0", compare="local")
    references: dict[str, Box] = {"a": (10, 20), "b": (10, 20)}
    near, up_to, beyond = (dict.fromkeys(references, (11, end)) for end in (21, 30, 36))
    told = judged(tmp_path, study, references, local=near, federated=up_to, personalised=beyond)
    far = site_report.distances(told, PLANS, "0", "test")["lesion"]
    assert far.of[LOCAL] == [1.0, 1.0]
    assert far.of[PERSONALISED] == far.of[FEDERATED] != far.of[LOCAL]
