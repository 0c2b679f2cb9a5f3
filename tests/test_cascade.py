"""3d_cascade_fullres: the federated 3d_lowres model predicts at every site, and the cascade is trained on that.

Two phantom hospitals (synthetic) whose images are large enough for nnU-Net to plan 3d_lowres. Only the network is
simulated (tests/in_process.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import fednnunet, phantom_study, refused
from in_process import Federation, Outcome

from federation import files
from federation.errors import Code, FednnunetError
from federation.plans import check_plans
from federation.study import Study, parse
from orchestrator import comparison, finished, stages
from orchestrator.admin.phantom import SITES as PHANTOMS
from orchestrator.admin.phantom import make_phantom_sites

pytestmark = pytest.mark.slow

HOSPITALS = ("hospital_a", "hospital_b")
TESTED = "hospital_a"
LOWRES_MODEL = "nnUNetTrainer__nnUNetSmallPlans__3d_lowres"
CASCADE_MODEL = "nnUNetTrainer__nnUNetSmallPlans__3d_cascade_fullres"


def large_sites(folder: Path, cases: int) -> dict[str, Path]:
    sites = {
        name: replace(PHANTOMS[name], training_cases=cases, test_cases=int(name == TESTED), shape=(52, 52, 52))
        for name in HOSPITALS
    }
    return make_phantom_sites(folder, sites)


def study(configuration: str, sites: tuple[str, ...] = HOSPITALS, **changes: Any) -> Study:
    return parse(
        phantom_study(sites, configuration=configuration, **{"rounds": 1, "iterations_per_epoch": 2, **changes})
    )


def cascade(first: Study, sites: tuple[str, ...] = HOSPITALS, **changes: Any) -> Study:
    return study("3d_cascade_fullres", sites, previous_stage=first.id, **changes)


@dataclass
class Stages:
    """A finished cascade and its finished first stage."""

    federation: Federation
    data: dict[str, Path]
    first: Outcome
    second: Outcome

    def site_results(self, site: str, stage: Outcome) -> Path:
        """nnU-Net's results folder of a study at a site."""
        return self.federation.site_work(site) / stage.study.id / "nnUNet_results" / stage.study.dataset


def run_both(folder: Path, cases: int, fold: str) -> Stages:
    data = large_sites(folder / "data", cases)
    federation = Federation(folder / "federation", data)
    first = federation.run(study("3d_lowres", fold=fold))
    return Stages(federation, data, first, federation.run(cascade(first.study, fold=fold)))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return run_both(tmp_path_factory.mktemp("cascade"), 2, "all")


def cases_of(data: Path) -> set[str]:
    return {path.name.removesuffix(".nii.gz") for path in (data / "labelsTr").iterdir()}


def nnunet(program: str, results: Path, *arguments: object) -> None:
    """One of nnU-Net's own commands, with the models below `results`."""
    folders = {
        "nnUNet_results": results,
        "nnUNet_raw": results / "raw",
        "nnUNet_preprocessed": results / "preprocessed",
    }
    subprocess.run(
        [str(Path(sys.executable).with_name(program)), *map(str, arguments)],
        env=os.environ | {name: str(path) for name, path in folders.items()},
        check=True,
        capture_output=True,
        encoding="utf-8",
    )


def install(outcome: Outcome, folder: Path) -> Path:
    """The exported model, as nnU-Net's own command unpacks it; its folder."""
    folder.mkdir(exist_ok=True)
    nnunet("nnUNetv2_install_pretrained_model_from_zip", folder, outcome.zip)
    (model,) = folder.glob(f"Dataset*/*{outcome.study.configuration}")
    return model


def input_channels(model: Path) -> int:
    import torch

    weights = torch.load(next(model.glob("fold_*")) / "checkpoint_final.pth", weights_only=True)["network_weights"]
    return int(weights["encoder.stages.0.0.convs.0.conv.weight"].shape[1])


def predict(model: Path, images: Path, out: Path, folds: tuple[str, ...], previous: Path | None = None) -> Path:
    """nnU-Net's own command as it comes."""
    _, plans, configuration = model.name.split("__")
    stage = ["-prev_stage_predictions", previous] if previous else []
    nnunet(
        "nnUNetv2_predict",
        model.parents[1],
        *("-d", model.parent.name, "-i", images, "-o", out, "-c", configuration, "-p", plans, "-f", *folds),
        *("-npp", 1, "-nps", 1, "-device", "cpu", *stage),
    )
    return out


def voxels(path: Path) -> Any:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def check_predictions(both: Stages) -> None:
    """Each site has a prediction of each of its training cases, on the grid of the cascade's data."""
    import blosc2

    for site, data in both.data.items():
        results = both.site_results(site, both.second)
        assert [path.name for path in (results / LOWRES_MODEL).iterdir()] == ["predicted_next_stage"]
        found = results / LOWRES_MODEL / "predicted_next_stage" / "3d_cascade_fullres"
        assert {path.stem for path in found.iterdir()} == cases_of(data)
        prepared = both.federation.site_work(site) / both.second.study.id / "nnUNet_preprocessed"
        for path in found.iterdir():
            image = blosc2.open(
                str(prepared / both.second.study.dataset / "nnUNetSmallPlans_3d_fullres" / path.name), mode="r"
            )
            previous = blosc2.open(str(path), mode="r")
            assert previous.shape == image.shape[1:]
            assert set(map(int, {*previous[:].ravel()})) <= {0, 1, 2}


def check_nnunet_agrees(both: Stages, tmp_path: Path, folds: tuple[str, ...]) -> None:
    """Both zips, installed side by side, predict by nnU-Net's own predictor what the sites have scored."""
    first, second = (install(stage, tmp_path / "results") for stage in (both.first, both.second))
    assert input_channels(first) == 1
    assert input_channels(second) == 1 + 2, "the image, and one channel for each label of the first stage"
    images = both.data[TESTED] / "imagesTs"
    lowres = predict(first, images, tmp_path / "lowres", folds)
    full = predict(second, images, tmp_path / "full", folds[:1], lowres)
    (ours,) = (both.site_results(TESTED, both.second) / CASCADE_MODEL / f"fold_{folds[0]}" / "test").glob("*.nii.gz")
    assert (voxels(ours) == voxels(full / ours.name)).all()


@pytest.mark.long
def test_every_training_case_is_predicted_by_the_first_stage_at_its_site(both: Stages) -> None:
    check_predictions(both)


@pytest.mark.long
def test_nnunet_predicts_with_both_models_what_the_sites_have_scored(both: Stages, tmp_path: Path) -> None:
    assert [both.second.scores(site).test_cases for site in HOSPITALS] == [1, 0]
    check_nnunet_agrees(both, tmp_path, ("all",))


@pytest.mark.long
def test_the_cascade_takes_over_the_plans_of_its_first_stage_and_the_cached_data(both: Stages) -> None:
    assert both.first.plans == both.second.plans
    for site in HOSPITALS:
        cache = both.federation.site_work(site) / "preprocessed"
        assert sorted(path.name.split("-")[1] for path in cache.iterdir()) == ["3d_fullres", "3d_lowres"]


@pytest.mark.long
def test_preparing_again_predicts_nothing_again(both: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    from appliance.worker import cascade as stage
    from appliance.worker.workspace import Control, Workspace

    federation, site = both.federation, HOSPITALS[0]
    workspace = Workspace(federation.site_work(site), both.second.study)
    monkeypatch.setattr(stage, "_trainer", None)
    wanted = files.read_json(workspace.preprocessed / "prepared.json")
    first = stage.find(workspace, both.second.plans)
    stage.predict_training_cases(first, workspace, federation.settings[site], both.second.plans, wanted, Control())
    with pytest.raises(TypeError, match="not callable"):
        changed = {**wanted, "data": "other"}
        stage.predict_training_cases(first, workspace, federation.settings[site], both.second.plans, changed, Control())


@pytest.mark.long
def test_a_cancelled_prediction_leaves_the_old_ones_whole(both: Stages) -> None:
    from appliance.worker import cascade as stage
    from appliance.worker.workspace import Control, Interrupted, Workspace

    federation, site = both.federation, HOSPITALS[1]
    workspace = Workspace(federation.site_work(site), both.second.study)
    predicted = stage.predictions(workspace, both.second.plans)
    before = {path.name: path.stat().st_mtime_ns for path in predicted.iterdir()}
    phases: list[str] = []

    def check() -> None:
        if phases:  # the first case is under way
            raise Interrupted(site)

    first = stage.find(workspace, both.second.plans)
    settings, control = federation.settings[site], Control(check, phases.append)
    with pytest.raises(Interrupted):
        stage.predict_training_cases(first, workspace, settings, both.second.plans, {"data": "other"}, control)
    assert phases == ["3d_lowres, fold all: predicting training case 1"]
    assert {path.name: path.stat().st_mtime_ns for path in predicted.iterdir()} == before
    assert not list(workspace.root.rglob(".*writing*"))


def first_stage_at_a_site(tmp_path: Path, folds: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """A site's workspace and plans, with the first stage's finished folds as empty files."""
    from appliance.worker.workspace import Workspace

    lowres, plans = study("3d_lowres", fold="0-4"), {"plans_name": "nnUNetSmallPlans"}
    root = tmp_path / lowres.id
    model = root / "nnUNet_results" / lowres.dataset / LOWRES_MODEL
    files.write_json(model / "plans.json", plans)
    for fold in folds:
        files.write_bytes(model / f"fold_{fold}" / "checkpoint_final.pth", b"")
    splits = [{"train": ["b"], "val": ["a"]}]
    files.write_json(root / "nnUNet_preprocessed" / lowres.dataset / "splits_final.json", splits)
    return Workspace(tmp_path, cascade(lowres)), plans


def test_a_site_says_by_number_what_keeps_its_first_stage_from_being_used(tmp_path: Path) -> None:
    from appliance.worker import cascade as stage

    five = ("0", "1", "2", "3", "4")
    workspace, plans = first_stage_at_a_site(tmp_path / "good", five)
    first = stage.find(workspace, plans)
    assert (first.folds, first.trainer) == (five, "nnUNetTrainer")
    first.require_same_split([{"train": ["b"], "val": ["a"]}])
    for code, wrong in (
        (Code.FIRST_STAGE_CASES, lambda: first.require_same_split([{"train": ["b"], "val": ["a", "c"]}])),
        (Code.FIRST_STAGE_DIFFERS, lambda: stage.find(workspace, {**plans, "other": 1})),
        (Code.FIRST_STAGE_MISSING, lambda: stage.find(workspace, {"plans_name": "others"})),
        (Code.FIRST_STAGE_MISSING, lambda: stage.find(*first_stage_at_a_site(tmp_path / "poor", five[:3]))),
    ):
        with pytest.raises(FednnunetError) as caught:
            wrong()
        assert caught.value.code is code


@pytest.mark.parametrize("stage", ["previous_stage", "next_stage"])
def test_a_stage_that_is_a_path_is_refused(stage: str) -> None:
    """nnU-Net joins the names of stages to its folders."""
    lowres = study("3d_lowres")
    plans = {
        "dataset_name": lowres.dataset,
        "plans_name": "nnUNetPlans",
        "configurations": {"3d_lowres": {"data_identifier": "nnUNetPlans_3d_lowres", stage: "../../../elsewhere"}},
    }
    with pytest.raises(FednnunetError, match="elsewhere") as caught:
        check_plans(plans, lowres)
    assert caught.value.code is Code.PLANS_REFUSED


@pytest.mark.long
def test_a_site_without_the_first_stages_model_says_so_by_number(both: Stages) -> None:
    model = both.site_results("hospital_b", both.first) / LOWRES_MODEL
    away = model.with_name("elsewhere")
    shutil.move(model, away)
    try:
        alone = cascade(both.first.study, ("hospital_b",), name="alone")  # a part of the first stage's sites may
        with pytest.raises(FednnunetError, match="hospital_b: FNU-310 The finished 3d_lowres model") as caught:
            both.federation.run(alone)
    finally:
        shutil.move(away, model)
    assert caught.value.code is Code.SITE_FAILED


def test_a_cascade_takes_over_no_dataset_json_but_its_own() -> None:
    """Hospitals refuse another one beside the plans: what it is made of is compared before a site is asked."""
    lowres = study("3d_lowres")
    others = {"overwrite_image_reader_writer": "NibabelIO", "dataset": "Dataset555_Other", "channel_names": {"0": "CT"}}
    for field, value in {**others, "file_ending": ".nrrd", "regions_class_order": [1]}.items():
        assert lowres.model_copy(update={field: value}).dataset_json(9) != lowres.dataset_json(9)
        assert field in stages.PLANNING
    assert "labels" in stages.PLANNING


@pytest.mark.long
def test_first_stages_that_do_not_fit_are_refused_before_a_site_is_asked(both: Stages) -> None:
    lowres = both.first.study
    for wrong, reason in (
        (cascade(both.second.study), "configuration 3d_cascade_fullres is not 3d_lowres"),
        (cascade(lowres, gpu_memory_target=4.0), "gpu_memory_target is None, not 4.0"),
        (cascade(lowres, (*HOSPITALS, "hospital_c")), "hospital_c took no part in it"),
        (cascade(study("3d_lowres", name="never")), "is not known here"),
    ):
        with pytest.raises(FednnunetError, match=reason) as caught:
            both.federation.run(wrong)
        assert caught.value.code is Code.FIRST_STAGE_DIFFERS
        assert not [line for line in both.federation.journal_lines(wrong) if line["event"] in ("phase", "asked")]


@pytest.mark.long
def test_the_newest_first_stage_that_fits_is_found(both: Stages) -> None:
    studies = both.first.folder.parent
    found = stages.newest(studies, cascade(both.second.study, rounds=7))
    assert found.study.id == both.first.study.id
    with pytest.raises(FednnunetError, match="trainer is nnUNetTrainer, not nnUNetTrainerNoDA") as caught:
        stages.newest(studies, cascade(both.second.study, trainer="nnUNetTrainerNoDA"))
    assert caught.value.code is Code.FIRST_STAGE_NOT_TRAINED


@pytest.mark.long
def test_the_end_of_a_cascade_says_that_both_models_are_needed(
    both: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from orchestrator.admin.progress import print_end
    from orchestrator.history import History

    view = History(both.second.study)
    for line in both.second.lines:
        view.take(line)
    print_end(Console(width=200), view, both.second.folder)
    out = capsys.readouterr().out
    assert f"nnUNetv2_install_pretrained_model_from_zip {both.first.zip}" in out
    assert "-prev_stage_predictions FIRST_STAGE_OUT" in out


def test_simulate_train_of_a_cascade_says_what_to_train_first(tmp_path: Path) -> None:
    large_sites(tmp_path / "raw", 1)
    files.write_json(tmp_path / "state" / "planned" / "nnUNetSmallPlans.json", {"planner": "SmallUNetPlanner"})
    arguments = ("301 302", "3d_cascade_fullres", "all", "-p", "nnUNetSmallPlans", "--state", tmp_path / "state")
    done = fednnunet("simulate", "train", *arguments, cwd=tmp_path, nnUNet_raw=str(tmp_path / "raw"))
    refused(done, 122, "3d_lowres")


def nnunet_figure(both: Stages, stage: Outcome, model: str) -> float:
    """nnU-Net's foreground mean over the cases of all sites and folds, from the summaries that stay at the sites."""
    cases = [
        case
        for site in HOSPITALS
        for path in (both.site_results(site, stage) / model).glob("fold_*/validation/summary.json")
        for case in files.read_json(path)["metric_per_case"]
    ]
    assert len(cases) == sum(len(cases_of(data)) for data in both.data.values())
    return float(np.mean([np.nanmean([case["metrics"][label]["Dice"] for case in cases]) for label in ("1", "2")]))


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_with_five_folds_each_case_is_predicted_by_the_fold_that_held_it_out(tmp_path: Path) -> None:
    both = run_both(tmp_path, 5, "0-4")
    check_predictions(both)
    check_nnunet_agrees(both, tmp_path / "out", ("0", "1", "2", "3", "4"))
    check_the_fold_that_held_out(both, tmp_path)
    check_the_best_configuration(both)


def first_stage_says(both: Stages, model: Path, site: str, case: str, fold: int) -> Any:
    """One fold's network over a case of 3d_lowres, resampled to the cascade's grid by nnU-Net's functions alone."""
    import blosc2
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    prepared = (
        both.federation.site_work(site) / both.second.study.id / "nnUNet_preprocessed" / both.second.study.dataset
    )
    low, full = (
        blosc2.open(str(prepared / f"nnUNetSmallPlans_{name}" / f"{case}.b2nd"), mode="r")
        for name in ("3d_lowres", "3d_fullres")
    )
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (fold,))
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(low[:]))
    spacing = predictor.configuration_manager.spacing
    logits = predictor.configuration_manager.resampling_fn_probabilities(logits, full.shape[1:], spacing, spacing)
    return np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits))


def check_the_fold_that_held_out(both: Stages, tmp_path: Path) -> None:
    import blosc2

    model = install(both.first, tmp_path / "first")
    for site in HOSPITALS:
        assert sum(both.second.scores(site, fold).validation_cases for fold in both.second.study.folds) == 5
    site = HOSPITALS[1]
    preprocessed = both.federation.site_work(site) / both.second.study.id / "nnUNet_preprocessed"
    splits = files.read_json(preprocessed / both.second.study.dataset / "splits_final.json")
    (case,) = splits[3]["val"]
    results = both.site_results(site, both.second) / LOWRES_MODEL / "predicted_next_stage" / "3d_cascade_fullres"
    previous = blosc2.open(str(results / f"{case}.b2nd"), mode="r")[:]
    assert (previous == first_stage_says(both, model, site, case, 3)).all()
    assert (previous != first_stage_says(both, model, site, case, 1)).any()


def check_the_best_configuration(both: Stages) -> None:
    """What `study best` compares is nnU-Net's own figure over all sites' cases."""
    studies = [finished.load(stage.folder) for stage in (both.first, both.second)]
    candidates = comparison.compare([one for one in studies if one is not None])
    for candidate, stage, model in zip(
        candidates, (both.first, both.second), (LOWRES_MODEL, CASCADE_MODEL), strict=True
    ):
        assert candidate.dice == pytest.approx(nnunet_figure(both, stage, model), rel=1e-12)
    better = both.first if candidates[0].dice >= candidates[1].dice else both.second
    assert comparison.best(candidates).study.id == better.study.id
