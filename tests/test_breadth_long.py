"""The rest of nnU-Net's breadth: larger residual encoders and an ensemble of five folds; see test_breadth.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from in_process import Federation, predict
from test_breadth import CASES, a_study, check_model, federation, relabelled, sites  # noqa: F401 - fixtures

from federation import files
from federation.weights import TensorFile

pytestmark = pytest.mark.long


@pytest.mark.parametrize("size", ["L", pytest.param("XL", marks=pytest.mark.exhaustive)])
def test_larger_residual_encoders(
    federation: Federation,  # noqa: F811
    sites: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    size: str,
) -> None:
    study = a_study(planner=f"nnUNetPlannerResEnc{size}", gpu_memory_target=1, rounds=1)
    outcome = federation.run(study)
    assert outcome.plans["plans_name"] == f"nnUNetResEncUNet{size}Plans"
    assert len(check_model(outcome, sites, tmp_path, {"organ", "lesion"})) == 1
    assert "encoder.stages.1.blocks.2.conv2.conv.weight" in TensorFile(outcome.weights(1)).names


def test_five_folds_become_one_ensemble(
    federation: Federation,  # noqa: F811
    sites: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    outcome = federation.run(a_study(fold="0-4", rounds=1))
    for site, cases in CASES.items():
        held_out = [outcome.scores(site, fold).validation_cases for fold in outcome.study.folds]
        assert sum(held_out) == cases, "every case is held out once"
        model = federation.model_at_site(site, outcome.study)
        assert sorted(path.parent.name for path in model.rglob("checkpoint_final.pth")) == [
            f"fold_{fold}" for fold in range(5)
        ]
    assert len(set(outcome.exported["weights"].values())) == 5
    assert len(predict(outcome.zip, sites["hospital_a"] / "imagesTs", tmp_path, outcome.study.folds)) == 1


def test_hospitals_that_store_their_images_in_other_orientations_read_them_alike(
    sites: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The thick axis is another one of the array at each site, and the same for nnU-Net's reader that reorients."""
    turned = relabelled(sites, tmp_path / "raw")
    for site, axes in (("hospital_a", "LPS"), ("hospital_b", "ASL")):
        for path in turned[site].rglob("*.nii.gz"):
            image = sitk.ReadImage(str(path))
            image.SetSpacing((1.0, 1.0, 2.5))
            sitk.WriteImage(sitk.DICOMOrient(image, axes), str(path))
    there = Federation(tmp_path / "federation", turned)
    study = a_study(overwrite_image_reader_writer="NibabelIOWithReorient", rounds=1)
    outcome = there.run(study)
    pooled = files.read_json(outcome.folder / "fingerprint.json")
    assert {tuple(entry["spacing"]) for entry in pooled["geometry"]} == {(2.5, 1.0, 1.0)}
    assert outcome.plans["image_reader_writer"] == "NibabelIOWithReorient"
    (written,) = check_model(outcome, turned, tmp_path / "predicted", {"organ", "lesion"})
    image = sitk.ReadImage(str(next((turned["hospital_b"] / "imagesTs").glob("*.nii.gz"))))
    segmentation = sitk.ReadImage(str(written))
    assert segmentation.GetSize() == image.GetSize()
    np.testing.assert_allclose(segmentation.GetDirection(), image.GetDirection(), atol=1e-6)
