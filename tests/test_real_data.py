"""Whole studies on real images: the global model segments every site's labelsTs, and nnU-Net's own commands agree.

Two studies, each from Describe to the exported zip over the real processes, with the small network and few
iterations: three hospitals' chest X-rays (2d, fold 0, by the command line) and hippocampus (3d_fullres, fold all, by
`Simulation`). The three hippocampus "sites" are one institution, split by intensity scale (medians about 61, 553 and
244000). Skipped where ../shared/data is absent; the phantom studies of tests/faults still run then.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from federation import files, native, tasks
from federation.audit import read
from federation.study import Study, parse
from orchestrator import model
from orchestrator.admin.simulate import Simulation, SiteOptions

pytestmark = [pytest.mark.slow, pytest.mark.long]

SMALL = {"planner": "SmallUNetPlanner", "validation_iterations_per_epoch": 1, "round_deadline": 300}
LUNG = {
    **SMALL,
    "name": "lungs",
    "dataset": "Dataset101_LungCXR",
    "sites": ["jsrt_jp", "montgomery_us", "shenzhen_cn"],
    "channel_names": {"0": "xray"},
    "labels": {"background": 0, "lung": 1},
    "file_ending": ".png",
    "configuration": "2d",
    "overwrite_target_spacing": [999.0, 2.0, 2.0],  # a patch of the small network then covers the whole image
    "fold": "0",
    "rounds": 8,
    "iterations_per_epoch": 25,
}
HIPPOCAMPUS = {
    **SMALL,
    "name": "hippocampus",
    "dataset": "Dataset004_Hippocampus",
    "sites": ["hippo_a", "hippo_b", "hippo_c"],
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "anterior": 1, "posterior": 2},
    "configuration": "3d_fullres",
    "accept_float_labels": True,  # hippo_b holds one
    "overwrite_target_spacing": [2.0, 2.0, 2.0],  # a patch of the small network then covers the whole image
    "trainer": "nnUNetTrainerAdam",  # leaves the background after 200 iterations, SGD after more than 400
    "fold": "all",
    "rounds": 10,
    "iterations_per_epoch": 40,
}


@dataclass
class Done:
    """A study that has ended, and its folder at the orchestrator."""

    study: Study
    data: dict[str, Path]
    folder: Path

    @property
    def exported(self) -> dict[str, Any]:
        """The journal's line about the exported model."""
        (line,) = [line for line in read(self.folder / "journal.jsonl") if line["event"] == "exported"]
        return line

    def scores(self) -> dict[str, tasks.Validation]:
        """What each site answered to Validate."""
        entry = self.exported["validation"][self.study.fold]
        assert entry["missing"] == {}
        return {site: tasks.Validation.model_validate(value) for site, value in entry["sites"].items()}


@pytest.fixture(scope="module")
def lungs(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The X-ray study, run by the command that people type."""
    folder = tmp_path_factory.mktemp("lungs")
    data = {site: shared_data / "lung_xray" / site / "Dataset101_LungCXR" for site in LUNG["sites"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(LUNG))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "orchestrator.admin.cli", "simulate", "run", str(folder / "study.yaml")),
            *("--state", str(folder / "state"), *(f"--site={site}={path}" for site, path in data.items())),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nnUNetv2_install_pretrained_model_from_zip" in done.stdout
    study = parse(LUNG)
    return Done(study, data, folder / "state" / "orchestrator" / "studies" / study.id)


@pytest.fixture(scope="module")
def hippocampus(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The hippocampus study."""
    folder = tmp_path_factory.mktemp("hippocampus")
    study = parse(HIPPOCAMPUS)
    data = {site: shared_data / "hippocampus" / site / "Dataset004_Hippocampus" for site in study.sites}
    simulation = Simulation(folder, data, SiteOptions(threads=1))
    simulation.run(study, Console(file=io.StringIO()))
    return Done(study, data, simulation.study_folder(study))


def untrained(done: Done, folder: Path, cases: int = 3) -> dict[str, float]:
    """Dice of the study's own initial weights on the first cases of each site's labelsTs."""
    import torch
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    study, plan = done.study, files.read_json(done.folder / "plan.json")
    plans, dataset_json = plan["plans"], plan["dataset_json"]
    first = folder / "initial.safetensors"
    model.initial_weights(plans, dataset_json, study, first)
    network = model.build_network(plans, dataset_json, study)
    native.load_weights(network, first, torch.from_numpy)
    manager = PlansManager(plans)
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False)
    configuration = manager.get_configuration(study.configuration)
    state = [network.state_dict()]
    predictor.manual_initialization(network, manager, configuration, state, dataset_json, study.trainer, None)
    network.decoder.deep_supervision = False
    labels = sorted(study.label_values() - {0})
    result = {}
    for site, data in done.data.items():
        dice = []
        for label in sorted((data / "labelsTs").glob(f"*{study.file_ending}"))[:cases]:
            case = label.name.removesuffix(study.file_ending)
            image, out = data / "imagesTs" / f"{case}_0000{study.file_ending}", folder / site / case
            out.parent.mkdir(exist_ok=True)
            predictor.predict_from_files_sequential([[str(image)]], [str(out)])
            found = compute_metrics(
                str(label), f"{out}{study.file_ending}", manager.image_reader_writer_class(), labels, None
            )
            dice.append(np.mean([found["metrics"][value]["Dice"] for value in labels]))
        result[site] = float(np.mean(dice))
    return result


# Where these lie, with the same network and iterations (seed and data as here, 2 cores, 2026-11-23): the lung study
# gave 0.887 (jsrt_jp), 0.795 (montgomery_us), 0.840 (shenzhen_cn). Models of one site that were never averaged (that
# site alone, fold all) gave at the three, in this order: jsrt_jp's 0.868, 0.757, 0.730; montgomery_us's 0.854, 0.763,
# 0.612; shenzhen_cn's 0.863, 0.825, 0.876. Each fails somewhere. A threshold at the mean grey value gives 0.70, 0.50,
# 0.49. Hippocampus gave 0.75 to 0.81; its sites differ in scale alone, which nnU-Net's normalisation takes away, so
# that a model of one site fits the others (0.68 to 0.75: benchmarks/accuracy.py): there only the untrained one fails.
THRESHOLDS = {
    "lungs": {"jsrt_jp": 0.865, "montgomery_us": 0.775, "shenzhen_cn": 0.78},
    "hippocampus": dict.fromkeys(HIPPOCAMPUS["sites"], 0.6),
}


@pytest.mark.parametrize("name", ["lungs", "hippocampus"])
def test_the_global_model_segments_labelsts_of_every_site_and_an_untrained_one_does_not(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    done: Done = request.getfixturevalue(name)
    scores = done.scores()
    before = untrained(done, tmp_path)
    assert set(scores) == set(before) == set(done.study.sites)
    for site, answer in scores.items():
        labels = len(list((done.data[site] / "labelsTs").glob(f"*{done.study.file_ending}")))
        assert answer.test_cases == labels
        assert set(answer.test) == set(done.study.labels) - {"background"}
        for label, score in answer.test.items():
            assert score.mean > THRESHOLDS[name][site], f"{site}, {label}"
        assert before[site] < 0.5 * THRESHOLDS[name][site], "an untrained network"


def test_fold_0_holds_cases_out_and_fold_all_holds_none(lungs: Done, hippocampus: Done) -> None:
    training = {"jsrt_jp": 40, "montgomery_us": 60, "shenzhen_cn": 80}
    for site, answer in lungs.scores().items():
        assert answer.validation_cases == training[site] // 5
        assert answer.validation["lung"].mean == pytest.approx(answer.test["lung"].mean, abs=0.15)
    assert all(answer.validation_cases == 0 for answer in hippocampus.scores().values())


@pytest.mark.parametrize("name", ["lungs", "hippocampus"])
def test_every_round_had_every_site(name: str, request: pytest.FixtureRequest) -> None:
    done: Done = request.getfixturevalue(name)
    closed = [line for line in read(done.folder / "journal.jsonl") if line["event"] == "closed"]
    assert [line["participants"] for line in closed] == [sorted(done.study.sites)] * done.study.rounds


def command(name: str, results: Path, *arguments: object) -> None:
    """Run one of nnU-Net's commands as people do."""
    folders = {key: str(results) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    done = subprocess.run(
        [Path(sys.executable).with_name(name), *map(str, arguments)],
        env={**os.environ, **folders, "nnUNet_def_n_proc": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nnunets_commands_give_the_dice_that_the_study_reports(lungs: Done, tmp_path: Path) -> None:
    site, results, out = "jsrt_jp", tmp_path / "results", tmp_path / "predictions"
    results.mkdir()
    command("nnUNetv2_install_pretrained_model_from_zip", results, lungs.folder / lungs.exported["path"])
    (installed,) = (results / lungs.study.dataset).iterdir()
    plans = installed.name.split("__")[1]
    chosen = ["-d", "101", "-p", plans, "-c", "2d", "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0"]
    command("nnUNetv2_predict", results, "-i", lungs.data[site] / "imagesTs", "-o", out, *chosen)
    described = ["-djfile", installed / "dataset.json", "-pfile", installed / "plans.json", "-np", "1"]
    command("nnUNetv2_evaluate_folder", results, lungs.data[site] / "labelsTs", out, *described)
    score = files.read_json(out / "summary.json")["mean"]["1"]["Dice"]
    assert score == pytest.approx(lungs.scores()[site].test["lung"].mean, abs=0.005)
