"""The best configuration over all sites, from sums alone: the number is nnU-Net's own.

Segmentations are random blocks (synthetic); nnU-Net scores them at each site and, to compare, all together. The
studies' folders are written by hand, as a coordinator leaves them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from commands import fednnunet, good, phantom_study, refused

from federation import files
from federation.audit import Chain
from federation.errors import Code, FednnunetError
from federation.study import parse
from orchestrator import comparison, finished

SITES = ("hospital_a", "hospital_b", "hospital_c")
LABELS = {"background": 0, "organ": 1, "lesion": 2}
CASES = {"hospital_a": 5, "hospital_b": 7, "hospital_c": 11}


def write_segmentation(path: Path, array: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))


def segmentations(folder: Path, seed: int, mistakes: float) -> Path:
    """Reference and prediction of every case; some cases have no lesion, in some nothing is predicted."""
    for number, site in enumerate(SITES):
        for case in range(CASES[site]):
            truth = np.random.default_rng((1, number, case))
            chance = np.random.default_rng((seed, number, case))
            reference = np.zeros((8, 9, 10), np.uint8)
            reference[1:6, 2:7, 2:8] = 1
            if truth.random() < 0.6:
                reference[2:4, 3:5, 3:5] = 2
            wrong = chance.random(reference.shape) < mistakes * (1 + number)
            predicted = np.where(wrong, chance.integers(0, 2 + (reference.max() == 2), reference.shape), reference)
            name = f"{site}_{case:02d}.nii.gz"
            write_segmentation(folder / "reference" / name, reference)
            write_segmentation(folder / "predicted" / name, predicted.astype(np.uint8))
    return folder


def site_report(folder: Path, site: str, fold: int) -> dict[str, Any]:
    """What a site would report of its held-out cases: nnU-Net's metrics, reduced by the appliance's own function."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    from appliance.worker.validation import scores

    per_case = [
        compute_metrics(str(path), str(folder / "predicted" / path.name), SimpleITKIO(), [1, 2])
        for path in sorted((folder / "reference").glob(f"{site}_*"))[fold::5]
    ]
    study = parse(phantom_study(SITES, labels=LABELS))
    validation = {name: score.model_dump() for name, score in scores(study, per_case).items()}
    return {"validation": validation, "validation_cases": len(per_case), "seconds": 1.0}


def write_study(state: Path, name: str, folder: Path | None, configuration: str = "3d_fullres", **changes: Any) -> str:
    """A study's folder as its coordinator leaves it; returns its id."""
    study = parse(phantom_study(SITES, name=name, configuration=configuration, **{"fold": "0-4", **changes}))
    target = state / "studies" / study.id
    files.write_json(target / "study.json", study.model_dump(mode="json"))
    files.write_json(target / "plan.json", {"plans": {"plans_name": "nnUNetSmallPlans"}})
    chain = Chain(target / "journal.jsonl")
    chain.append("planned", plans_sha256="0" * 64)
    if folder is not None:
        validation = {
            fold: {"sites": {site: site_report(folder, site, int(fold)) for site in SITES}, "missing": {}}
            for fold in study.folds
        }
        chain.append("exported", path=f"{study.dataset}.zip", validation=validation, unfinished={}, nbytes=1)
    chain.append("done")
    chain.close()
    return study.id


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("predictions")
    return {"good": segmentations(folder / "good", 2, 0.05), "poor": segmentations(folder / "poor", 3, 0.2)}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, predictions: dict[str, Path]) -> Path:
    state = tmp_path_factory.mktemp("orchestrator")
    write_study(state, "flat", predictions["poor"], "2d")
    first = write_study(state, "low", predictions["good"], "3d_lowres")
    write_study(state, "full", predictions["good"])
    write_study(state, "cascade", predictions["good"], "3d_cascade_fullres", previous_stage=first)
    return state


def of(state: Path, *names: str) -> list[finished.Finished]:
    return [finished.find(state / "studies", name) for name in names]


@pytest.mark.slow
def test_the_pooled_number_is_nnunets_own_over_all_cases_together(state: Path, predictions: dict[str, Path]) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    candidates = comparison.compare(of(state, "flat", "full"))
    for candidate, folder in zip(candidates, (predictions["poor"], predictions["good"]), strict=True):
        together = compute_metrics_on_folder(
            str(folder / "reference"),
            str(folder / "predicted"),
            None,
            SimpleITKIO(),
            ".nii.gz",
            [1, 2],
            num_processes=1,
        )
        assert candidate.dice == pytest.approx(together["foreground_mean"]["Dice"], rel=1e-12)
        for name, number in (("organ", 1), ("lesion", 2)):
            assert candidate.labels[name].mean == pytest.approx(together["mean"][number]["Dice"], rel=1e-12)
        assert candidate.labels["organ"].cases == sum(CASES.values())
        assert 0 < candidate.labels["lesion"].cases < sum(CASES.values()), "cases without a lesion do not count for it"
        unweighted = np.mean([comparison.foreground_mean(labels) for labels in candidate.sites.values()])
        assert candidate.dice != pytest.approx(unweighted, rel=1e-4), "a mean over sites is another number"
    assert comparison.best(candidates).study.name == "full"


def test_of_equals_the_first_given_is_the_best(state: Path) -> None:
    for names in (("low", "full"), ("full", "low")):
        assert comparison.best(comparison.compare(of(state, *names))).study.name == names[0]


def test_study_best_shows_the_winner_and_writes_its_commands(state: Path, tmp_path: Path) -> None:
    done = good(fednnunet("study", "best", "flat", "cascade", "--state", state, cwd=tmp_path, COLUMNS="220"))
    assert "cascade  (best)" in done.out
    for site in SITES:
        assert f"mean {site}" in done.out
    folder = state / "best" / "Dataset300_PhantomFederation"
    lines = (folder / "inference_instructions.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["nnUNetv2_install_pretrained_model_from_zip", "nnUNetv2_predict"] * 2
    assert "-c 3d_lowres" in lines[1]
    assert lines[1].split("-o ")[1].split()[0] == lines[3].split("-prev_stage_predictions ")[1]
    assert lines[3].startswith(
        "nnUNetv2_predict -d Dataset300_PhantomFederation -i INPUT_FOLDER -o OUTPUT_FOLDER -f 0 1 2 3 4 "
        "-tr nnUNetTrainer -c 3d_cascade_fullres -p nnUNetSmallPlans"
    )
    information = json.loads((folder / "inference_information.json").read_text())
    assert [model["configuration"] for model in information["considered_models"]] == ["2d", "3d_cascade_fullres"]
    text = done.out + (folder / "inference_information.json").read_text()
    assert not [case for case in text.split() if case.startswith("hospital_a_0")], "no case is named"


def test_simulate_find_best_configuration_finds_what_is_trained(
    state: Path, tmp_path: Path, tiny_phantom_sites: dict[str, Path], predictions: dict[str, Path]
) -> None:
    def find(*arguments: str) -> Any:
        raw = str(next(iter(tiny_phantom_sites.values())).parent)
        return fednnunet(
            "simulate", "find_best_configuration", "301 302 303", "-p", "nnUNetSmallPlans", *arguments, cwd=tmp_path,
            nnUNet_raw=raw, COLUMNS="220",
        )  # fmt: skip

    where = tmp_path / "fednnunet-state" / "301_302_303"
    refused(find(), 120, "fold 0-4")
    names = [f"site_{number}" for number in (301, 302, 303)]
    renamed = dict(zip(SITES, names, strict=True))
    for source, configuration in (("poor", "2d"), ("good", "3d_fullres")):
        study = parse(phantom_study(names, name="train", configuration=configuration, fold="0-4"))
        target = where / "orchestrator" / "studies" / study.id
        files.write_json(target / "study.json", study.model_dump(mode="json"))
        files.write_json(target / "plan.json", {"plans": {"plans_name": "nnUNetSmallPlans"}})
        chain = Chain(target / "journal.jsonl")
        validation = {
            fold: {"sites": {renamed[site]: site_report(predictions[source], site, int(fold)) for site in SITES}}
            for fold in study.folds
        }
        chain.append("exported", path="model.zip", validation=validation)
        chain.append("done")
        chain.close()
    done = good(find())
    assert "nnUNetTrainer__nnUNetSmallPlans__3d_lowres: no finished study with fold 0-4, left out" in done.out
    assert "best: train, 3d_fullres" in done.out
    assert "best: train, 2d" in good(find("-c", "2d")).out
    refused(find("-c", "2d 3d_lowres"), 120, "3d_lowres")
    refused(find("-f", "0"), 105, "all five folds")


def test_what_cannot_be_compared_is_refused_with_the_reason(state: Path, predictions: dict[str, Path]) -> None:
    write_study(state, "one-fold", None, fold="0")
    write_study(state, "stopped", None, stop_after="prepare")
    write_study(state, "renamed", predictions["good"], dataset="Dataset301_Other")
    for names, reason in (
        (("one-fold",), "has fold 0, not 0-4"),
        (("stopped",), "has no one model for all sites"),
        (("full", "renamed"), "differ in dataset"),
    ):
        with pytest.raises(FednnunetError, match=reason) as caught:
            comparison.compare(of(state, *names))
        assert caught.value.code is Code.STUDIES_NOT_COMPARABLE
    with pytest.raises(FednnunetError, match="never: 0 finished studies") as caught:
        of(state, "never")
    assert caught.value.code is Code.STUDY_NOT_FOUND
