"""Planning from a pooled fingerprint, with no images: the plans are those nnU-Net makes of the pooled data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from in_process import warm_workshop
from skimage import io as skimage_io

from appliance.worker import dataset
from appliance.worker.fingerprint import case_statistics, site_fingerprint
from federation import files
from federation import study as studies
from federation.errors import Code, FednnunetError
from federation.fingerprint import SiteFingerprint, merge
from federation.planners import planner_class
from federation.plans import check_plans
from federation.study import Study
from orchestrator import planning

INTENSITIES = "foreground_intensity_properties_per_channel"


def plan(pooled: SiteFingerprint, study: Study, folder: Path) -> planning.PlannedStudy:
    """Plan in a workshop that has imported nnU-Net already."""
    return planning.plan(pooled, study, folder, warm_workshop())


def make_study(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "name": "planning",
        "dataset": "Dataset601_Pooled",
        "sites": ["a", "b", "c"],
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "organ": 1, "tumour": 2},
        "fold": "all",
    }
    return studies.parse(values | changes)


def write_site(folder: Path, study: Study, site: int, cases: int) -> Path:
    """Synthetic CT-like cases; each site has its own offset, noise and slice distance."""
    random = np.random.default_rng(site)
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    for number in range(cases):
        shape = (int(random.integers(20, 40)), int(random.integers(46, 64)), int(random.integers(46, 64)))
        image = random.normal(-300, 100, shape)
        label = np.zeros(shape, np.uint8)
        label[4:16, 10:40, 10:40] = 1
        label[6:10, 20:30, 20:30] = 2
        image[label > 0] += 250 + 200 * site
        image[:, :5] = 0
        for part, name, array in (
            ("imagesTr", f"s{site}_{number}_0000", image),
            ("labelsTr", f"s{site}_{number}", label),
        ):
            if study.file_ending == ".png":
                flat = np.clip(array[8] / 4 + 100, 0, 255) if part == "imagesTr" else array[8]
                skimage_io.imsave(folder / part / f"{name}.png", flat.astype(np.uint8), check_contrast=False)
                continue
            written = sitk.GetImageFromArray(array.astype(np.int16 if part == "imagesTr" else np.uint8))
            written.SetSpacing((0.8, 0.8, (1.5, 3.0, 5.0)[site]))
            sitk.WriteImage(written, str(folder / part / f"{name}.nii.gz"))
    (folder / "dataset.json").write_text(json.dumps(study.dataset_json(cases)))
    return folder


def pooled_by_us(folders: Sequence[Path], study: Study) -> SiteFingerprint:
    found = [dataset.examine(folder, study, 1) for folder in folders]
    return merge([examination.fingerprint(study.fingerprint_min_cases) for examination in found])


def planned_by_nnunet(
    folders: Sequence[Path], planners: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, Any]]:
    """nnU-Net's own fingerprint extractor and planners on the pooled images, as one hospital would run them."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    name = "Dataset602_Central"
    raw = folder / "raw" / name
    listed = {}
    for site, source in enumerate(folders):
        content = json.loads((source / "dataset.json").read_text())
        ending = content["file_ending"]
        for label in sorted((source / "labelsTr").iterdir()):
            case = label.name.removesuffix(ending)
            image = source / "imagesTr" / f"{case}_0000{ending}"
            listed[f"{site}_{case}"] = {"images": [str(image)], "label": str(label)}
    raw.mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": len(listed), "dataset": listed}))
    monkeypatch.setenv("nnUNet_raw", str(folder / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder / "preprocessed"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    extractor = DatasetFingerprintExtractor(602, 1)
    extractor.num_foreground_voxels_for_intensitystats = 2e6  # nnU-Net's own setting is 1e8: minutes for nothing here
    extractor.run(overwrite_existing=True)
    result = {}
    for planner in planners:
        made = planner_class(planner)(602)
        made.plan_experiment()
        path = folder / "preprocessed" / name / f"{made.plans_identifier}.json"
        result[planner] = json.loads(path.read_text())
    return result


def assert_same_plans(ours: dict[str, Any], central: dict[str, Any]) -> None:
    """Equal but for the dataset's name; intensities within 0.2 % of their range (nnU-Net samples, we do not)."""
    ours, central = deepcopy(ours), deepcopy(central)
    assert ours.pop("dataset_name") != central.pop("dataset_name")
    found, truth = ours.pop(INTENSITIES), central.pop(INTENSITIES)
    assert ours == central
    assert found.keys() == truth.keys()
    for channel, expected in truth.items():
        extent = expected["max"] - expected["min"]
        assert found[channel].keys() == expected.keys()
        for name in ("mean", "std", "percentile_00_5", "percentile_99_5"):
            assert found[channel][name] == pytest.approx(expected[name], abs=0.002 * extent), name


def a_fingerprint(cases: int = 8, min_cases: int = 1, depth: int = 40, spacing: float = 1.0) -> SiteFingerprint:
    """A fingerprint of synthetic cases that are never written to disk."""
    random = np.random.default_rng(5)
    found = []
    for _ in range(cases):
        images = random.normal(100, 20, (1, depth, 64, 64)).astype(np.float32)
        label = np.zeros((1, depth, 64, 64), np.uint8)
        label[:, :, 10:30, 10:30] = 1
        found.append(case_statistics(images, label, (spacing, 1.0, 1.0)))
    return site_fingerprint(found, min_cases)


def test_plans_of_three_synthetic_hospitals_are_nnunets_own_on_the_pooled_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study()
    folders = [write_site(tmp_path / f"site_{site}", study, site, 4 + site) for site in range(3)]
    pooled = pooled_by_us(folders, study)
    planners = ("ExperimentPlanner", "nnUNetPlannerResEncM")
    central = planned_by_nnunet(folders, planners, tmp_path / "central", monkeypatch)
    for planner in planners:
        ours = plan(pooled, make_study(planner=planner), tmp_path / planner)
        assert_same_plans(ours.plans, central[planner])
        assert ours.plans["dataset_name"] == "Dataset601_Pooled"
        assert ours.dataset_json == study.dataset_json(15)
        assert ours.plans_sha256 == files.sha256_json(ours.plans)


def test_plans_of_natural_images_are_nnunets_own_on_the_pooled_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(file_ending=".png", channel_names={"0": "xray"}, configuration="2d")
    folders = [write_site(tmp_path / f"site_{site}", study, site, 3) for site in range(3)]
    central = planned_by_nnunet(folders, ["ExperimentPlanner"], tmp_path / "central", monkeypatch)
    ours = plan(pooled_by_us(folders, study), study, tmp_path / "plan")
    assert_same_plans(ours.plans, central["ExperimentPlanner"])
    assert list(ours.plans["configurations"]) == ["2d"]
    with pytest.raises(FednnunetError) as error:
        planning.require_configuration(ours.plans, "3d_fullres")
    assert error.value.code is Code.CONFIGURATION_MISSING


def test_plans_of_real_hippocampus_are_nnunets_own_on_the_pooled_data(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(
        channel_names={"0": "MRI"}, labels={"background": 0, "anterior": 1, "posterior": 2}, accept_float_labels=True
    )
    folders = [dataset.find_dataset(shared_data / "hippocampus" / f"hippo_{site}") for site in "abc"]
    central = planned_by_nnunet(folders, ["ExperimentPlanner"], tmp_path / "central", monkeypatch)
    ours = plan(pooled_by_us(folders, study), study, tmp_path / "plan")
    assert_same_plans(ours.plans, central["ExperimentPlanner"])
    assert ours.dataset_json["numTraining"] == 93


def test_planning_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    pooled, study = a_fingerprint(), make_study(planner="SmallUNetPlanner")
    first = plan(pooled, study, tmp_path / "plan")
    assert plan(pooled, study, tmp_path / "plan") == first
    assert "stub" not in json.dumps([first.plans, first.dataset_json])


@pytest.mark.parametrize(
    ("planner", "name"),
    [("nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"), ("nnUNetPlannerResEncXL", "nnUNetResEncUNetXLPlans")],
)
@pytest.mark.long
def test_larger_residual_encoders_are_planned(planner: str, name: str, tmp_path: Path) -> None:
    planned = plan(a_fingerprint(), make_study(planner=planner), tmp_path / "plan")
    assert planned.plans["plans_name"] == name
    assert planned.plans["experiment_planner_used"] == planner


def test_small_planner_plans_a_network_for_a_cpu(tmp_path: Path) -> None:
    study = make_study(planner="SmallUNetPlanner")
    planned = plan(a_fingerprint(), study, tmp_path / "plan").plans
    volume, plane = planned["configurations"]["3d_fullres"], planned["configurations"]["2d"]
    assert max(volume["patch_size"]) <= 24
    assert max(plane["patch_size"]) <= 128
    assert (volume["batch_size"], plane["batch_size"]) == (2, 4)
    assert max(volume["architecture"]["arch_kwargs"]["features_per_stage"]) <= 32
    assert volume["median_image_size_in_voxels"] == [40.0, 64.0, 64.0]
    assert "3d_fullres: patch 24 x 24 x 24" in planning.describe(planned)


def test_options_of_the_planner_are_honoured(tmp_path: Path) -> None:
    options = {"gpu_memory_target": 2.0, "overwrite_target_spacing": [2.0, 2.0, 2.0], "plans_name": "ourPlans"}
    planned = plan(a_fingerprint(depth=100), make_study(**options), tmp_path / "plan").plans
    assert planned["plans_name"] == "ourPlans"
    assert planned["configurations"]["3d_fullres"]["spacing"] == [2.0, 2.0, 2.0]
    assert planned["configurations"]["3d_fullres"]["data_identifier"] == "ourPlans_3d_fullres"


def test_each_channel_has_its_own_normalisation_also_beyond_ten_and_the_reader_is_the_studys(tmp_path: Path) -> None:
    names = {str(number): "CT" if number == 2 else f"MR{number}" for number in range(12)}
    reader = "NibabelIOWithReorient"
    study = make_study(planner="SmallUNetPlanner", channel_names=names, overwrite_image_reader_writer=reader)
    images, label = np.random.default_rng(0).normal(100, 10, (12, 32, 32, 32)), np.zeros((1, 32, 32, 32), np.uint8)
    label[:, 8:20, 8:20, 8:20] = 1
    cases = [case_statistics(images.astype(np.float32), label, (1.0, 1.0, 1.0))] * 6
    plans = plan(site_fingerprint(cases, 1), study, tmp_path / "plan").plans
    schemes = plans["configurations"]["3d_fullres"]["normalization_schemes"]
    assert schemes == ["CTNormalization" if number == 2 else "ZScoreNormalization" for number in range(12)]
    assert plans["image_reader_writer"] == reader
    check_plans(plans, study)


def test_a_fingerprint_of_groups_is_planned(tmp_path: Path) -> None:
    study = make_study(planner="SmallUNetPlanner", fingerprint_min_cases=4)
    assert plan(a_fingerprint(min_cases=4), study, tmp_path / "plan").plans["configurations"]["3d_fullres"]


def test_a_configuration_that_was_not_planned_is_named_with_those_that_were(tmp_path: Path) -> None:
    study = make_study(configuration="3d_lowres")
    with pytest.raises(FednnunetError) as error:
        plan(a_fingerprint(), study, tmp_path / "plan")
    assert error.value.code is Code.CONFIGURATION_MISSING
    assert "3d_lowres was not planned, only 2d, 3d_fullres" in error.value.found


def test_a_study_that_ends_with_the_plan_may_lack_its_configuration(tmp_path: Path) -> None:
    study = make_study(configuration="3d_lowres", stop_after="plan")
    assert plan(a_fingerprint(), study, tmp_path / "plan").plans_sha256


def test_what_nnunet_cannot_plan_is_an_error_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(FednnunetError) as error:
        plan(a_fingerprint(), make_study(file_ending=".xyz"), tmp_path / "plan")
    assert error.value.code is Code.PLANNING_FAILED
    assert "nnU-Net has no reader for .xyz" in error.value.found


def test_no_foreground_anywhere_is_found_before_planning(tmp_path: Path) -> None:
    images = np.ones((1, 8, 8, 8), np.float32)
    nothing = site_fingerprint([case_statistics(images, np.zeros_like(images), (1.0, 1.0, 1.0))], 1)
    with pytest.raises(FednnunetError) as error:
        plan(nothing, make_study(), tmp_path / "plan")
    assert error.value.code is Code.NO_FOREGROUND


def test_the_coordinator_imports_neither_torch_nor_nnunet_to_plan(tmp_path: Path) -> None:
    (tmp_path / "pooled.json").write_text(a_fingerprint().model_dump_json())
    (tmp_path / "study.json").write_text(make_study(planner="SmallUNetPlanner").model_dump_json())
    code = """
import sys
from pathlib import Path
from federation.fingerprint import SiteFingerprint
from federation.planners import planner_class
from federation.study import Study
from orchestrator import planning
folder = Path(sys.argv[1])
pooled = SiteFingerprint.model_validate_json((folder / "pooled.json").read_text())
planning.plan(pooled, Study.model_validate_json((folder / "study.json").read_text()), folder / "plan")
assert not {"torch", "nnunetv2"} & set(sys.modules)
"""
    root = Path(planning.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
