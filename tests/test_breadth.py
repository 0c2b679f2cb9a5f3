"""nnU-Net's breadth, federated: a whole study for each configuration, planner and kind of label.

Real nnU-Net on synthetic phantoms; only the network is simulated (tests/in_process.py). Each study ends in a zip with
which nnU-Net's own predictor predicts. What takes longer is in test_breadth_long.py.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from commands import phantom_study
from in_process import Federation, Outcome, predict

from federation import files
from federation.errors import Code, FednnunetError
from federation.layers import is_statistic
from federation.study import Study, parse
from federation.tasks import Kind
from federation.weights import TensorFile
from orchestrator.admin.phantom import PhantomSite, make_phantom_sites

pytestmark = pytest.mark.slow

CASES = {"hospital_a": 5, "hospital_b": 7}
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}
IGNORE = {"labels": {"background": 0, "organ": 1, "ignore": 2}}


def make_sites(folder: Path, size: int, cases: Mapping[str, int]) -> dict[str, Path]:
    """Two phantom hospitals with different intensities and one test case each."""
    sites = {
        name: PhantomSite(f"Dataset30{number}_Phantom", cases[name], 1, (size, size, size), scale=100.0 * number)
        for number, name in enumerate(cases, 1)
    }
    return make_phantom_sites(folder, sites)


def relabelled(sites: Mapping[str, Path], folder: Path, **changes: Any) -> dict[str, Path]:
    """Copies of datasets whose dataset.json says something else of the labels."""
    result = {}
    for name, source in sites.items():
        result[name] = shutil.copytree(source, folder / source.name)
        path = result[name] / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return result


def a_study(**changes: Any) -> Study:
    """Two rounds of two iterations."""
    return parse(phantom_study(list(CASES), **{"iterations_per_epoch": 2, **changes}))


def check_model(outcome: Outcome, sites: Mapping[str, Path], scratch: Path, labels: set[str]) -> list[Path]:
    """Every site has scored the model on its test case, and nnU-Net predicts that case with the exported zip."""
    for site, data in sites.items():
        scores = outcome.scores(site)
        assert set(scores.test) == labels
        assert scores.test_cases == 1
        assert (data / "imagesTs").exists()
    return predict(outcome.zip, sites["hospital_b"] / "imagesTs", scratch)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_sites(tmp_path_factory.mktemp("raw"), 22, CASES)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, sites: dict[str, Path]) -> Federation:
    return Federation(tmp_path_factory.mktemp("federation"), sites)


@pytest.fixture(scope="module")
def fullres(federation: Federation) -> Outcome:
    return federation.run(a_study())


# ---- configurations and planners -------------------------------------------------------------------------------------


def test_3d_fullres(fullres: Outcome, sites: dict[str, Path], tmp_path: Path) -> None:
    assert len(check_model(fullres, sites, tmp_path, {"organ", "lesion"})) == 1
    assert len(fullres.plans["configurations"]["3d_fullres"]["patch_size"]) == 3


def test_2d(federation: Federation, sites: dict[str, Path], tmp_path: Path) -> None:
    outcome = federation.run(a_study(configuration="2d"))
    assert len(check_model(outcome, sites, tmp_path, {"organ", "lesion"})) == 1
    assert TensorFile(outcome.weights(2)).spec("encoder.stages.0.0.convs.0.conv.weight").shape[2:] == (3, 3)


@pytest.mark.long
def test_3d_lowres(tmp_path: Path) -> None:
    """Images of 56 voxels a side against a patch of 24: nnU-Net plans a lower resolution."""
    sites = make_sites(tmp_path / "raw", 56, {"hospital_a": 2, "hospital_b": 2})
    outcome = Federation(tmp_path / "federation", sites).run(a_study(configuration="3d_lowres", rounds=1))
    low, full = (outcome.plans["configurations"][name] for name in ("3d_lowres", "3d_fullres"))
    assert min(low["spacing"]) > max(full["spacing"])
    (written,) = check_model(outcome, sites, tmp_path, {"organ", "lesion"})
    image = sitk.ReadImage(str(next((sites["hospital_b"] / "imagesTs").glob("*.nii.gz"))))
    assert sitk.ReadImage(str(written)).GetSize() == image.GetSize()


@pytest.mark.long
def test_residual_encoder_m(federation: Federation, sites: dict[str, Path], tmp_path: Path) -> None:
    """With little GPU memory to fill: the batch is nnU-Net's smallest."""
    study = a_study(planner="nnUNetPlannerResEncM", gpu_memory_target=1, rounds=1, iterations_per_epoch=1)
    outcome = federation.run(study)
    assert len(check_model(outcome, sites, tmp_path, {"organ", "lesion"})) == 1
    assert "encoder.stages.0.blocks.0.conv1.conv.weight" in TensorFile(outcome.weights(1)).names


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_regions(sites: dict[str, Path], tmp_path: Path) -> None:
    regional = relabelled(sites, tmp_path / "raw", **REGIONS)
    outcome = Federation(tmp_path / "federation", regional).run(a_study(**REGIONS))
    (written,) = check_model(outcome, regional, tmp_path, {"whole", "lesion"})
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(written))))) <= {0, 1, 2}
    with zipfile.ZipFile(outcome.zip) as archive:
        (summary,) = (name for name in archive.namelist() if name.endswith("validation/summary.json"))
        assert set(json.loads(archive.read(summary))["mean"]) <= {"(1, 2)", "2"}


def test_ignore_label(sites: dict[str, Path], tmp_path: Path) -> None:
    """What is marked as ignored neither trains nor is predicted nor is scored."""
    partly = relabelled(sites, tmp_path / "raw", **IGNORE)
    outcome = Federation(tmp_path / "federation", partly).run(a_study(**IGNORE))
    (written,) = check_model(outcome, partly, tmp_path, {"organ"})
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(written))))) <= {0, 1}
    assert TensorFile(outcome.weights(2)).spec("decoder.seg_layers.0.bias").shape == (2,)


# ---- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_one_fold_is_scored_on_the_cases_that_it_held_out(
    federation: Federation, sites: dict[str, Path], tmp_path: Path
) -> None:
    outcome = federation.run(a_study(fold=0, rounds=1, save_probabilities=True))
    for site, cases in CASES.items():
        scores = outcome.scores(site)
        assert (scores.validation_cases, scores.test_cases) == (-(-cases // 5), 1)
        assert set(scores.validation) == {"organ", "lesion"}
        folder = federation.model_at_site(site, outcome.study) / "fold_0" / "validation"
        assert len(files.read_json(folder / "summary.json")["metric_per_case"]) == scores.validation_cases
        assert len(list(folder.glob("*.npz"))) == scores.validation_cases, "the probabilities stay here"
    assert len(predict(outcome.zip, sites["hospital_a"] / "imagesTs", tmp_path, ["0"])) == 1


# ---- pretrained weights ----------------------------------------------------------------------------------------------


def keep_checkpoint(federation: Federation, outcome: Outcome) -> str:
    """Lay a finished study's checkpoint where the orchestrator looks for pretrained weights; its SHA-256."""
    (checkpoint,) = (outcome.folder / "model").rglob("checkpoint_final.pth")
    digest = files.sha256_of(checkpoint)
    federation.pretrained.mkdir(exist_ok=True)
    shutil.copyfile(checkpoint, federation.pretrained / f"{digest}.pth")
    return digest


@pytest.mark.long
def test_a_study_begins_with_the_weights_of_an_earlier_one_but_for_the_heads(
    federation: Federation, fullres: Outcome
) -> None:
    digest = keep_checkpoint(federation, fullres)
    outcome = federation.run(a_study(pretrained_weights=digest, rounds=1, seed=7))
    earlier, first = TensorFile(fullres.weights(2)), TensorFile(outcome.weights(0))
    assert first.names == earlier.names
    same = {name for name in first.names if np.array_equal(first.read(name), earlier.read(name))}
    heads = {name for name in first.names if ".seg_layers." in name}
    assert set(first.names) - heads <= same
    assert not any(name.endswith(".weight") for name in heads & same), "biases begin at 0, always"


@pytest.mark.parametrize("fault", ["missing", "changed", "other network"])
def test_pretrained_weights_that_are_not_those_of_the_study_are_refused(
    federation: Federation, fullres: Outcome, fault: str
) -> None:
    digest, changes = keep_checkpoint(federation, fullres), {}
    path = federation.pretrained / f"{digest}.pth"
    if fault == "missing":
        path.unlink()
    elif fault == "changed":
        digest = "0" * 64
        path.rename(federation.pretrained / f"{digest}.pth")
    else:
        changes = {"configuration": "2d"}
    study = a_study(pretrained_weights=digest, rounds=1, name=fault.replace(" ", "-"), **changes)
    with pytest.raises(FednnunetError) as caught:
        federation.run(study)
    assert caught.value.code is Code.PRETRAINED_UNREADABLE
    assert not any(
        line["event"] == "asked" and str(Kind.TRAIN) in line["key"] for line in federation.journal_lines(study)
    )


# ---- batch normalisation ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("wire", ["full", "half"])
def test_batch_normalisation_has_statistics_of_all_sites_after_a_round(
    federation: Federation, sites: dict[str, Path], tmp_path: Path, wire: str
) -> None:
    outcome = federation.run(a_study(trainer="nnUNetTrainerBN", wire=wire))
    before, after = TensorFile(outcome.weights(1)), TensorFile(outcome.weights(2))
    counters = [name for name in after.names if name.endswith("num_batches_tracked")]
    statistics = [name for name in after.names if is_statistic(name) and name not in counters]
    assert len(statistics) == 2 * len(counters) > 0
    for name in counters:
        assert before.spec(name).dtype == np.dtype("<i8")
        assert (before.read(name), after.read(name)) == (2, 4), "two iterations a round"
    for name in statistics:
        assert not np.array_equal(before.read(name), after.read(name))
    if wire == "full":
        sent = {site: TensorFile(outbox_of(federation, outcome, site)) for site in CASES}
        for name in [*statistics, "decoder.seg_layers.0.weight"]:
            mean = sum(CASES[site] * sent[site].read(name).astype(float) for site in CASES) / sum(CASES.values())
            np.testing.assert_allclose(after.read(name), mean, rtol=1e-6, atol=1e-7)
        assert len(check_model(outcome, sites, tmp_path, {"organ", "lesion"})) == 1


def outbox_of(federation: Federation, outcome: Outcome, site: str) -> Path:
    """The update that a site has sent in the last round."""
    key = f"train-fold_{outcome.study.folds[0]}-{outcome.study.rounds:04d}"
    return federation.settings[site].spool / "outbox" / outcome.study.id / key / "weights.safetensors"
