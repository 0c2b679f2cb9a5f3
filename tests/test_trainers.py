"""nnU-Net's trainers: those on the list run rounds of a federation, and none of nnU-Net's is forgotten.

Real nnU-Net, one small synthetic site (tests/worker_site.py), the worker in this process.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worker_site import Site, make_settings, make_study, shared_site

from federation import files, native, planners, tasks, trainers
from federation.errors import FednnunetError
from federation.layers import is_statistic, kept_local, possible_names
from federation.study import PLANNERS, parse
from federation.weights import TensorFile
from orchestrator import model

TRAIN = tasks.Kind.TRAIN
BEHAVIOURS = (  # one of each kind; the others differ in a number
    "nnUNetTrainerDiceLoss",
    "nnUNetTrainerDiceCELoss_noSmooth",
    "nnUNetTrainerCELoss",
    "nnUNetTrainerTopk10LossLS01",
    "nnUNetTrainerDiceTopK10Loss",
    "nnUNetTrainerDA5",
    "nnUNetTrainerNoDA",
    "nnUNetTrainer_DASegOrd0",
    "nnUNetTrainer_onlyMirror01",
    "nnUNetTrainer_probabilisticOversampling",
    "nnUNetTrainer_warmup",
    "nnUNetTrainerCosAnneal",
    "nnUNetTrainerAdam",
    "nnUNetTrainerVanillaAdam",
    "nnUNetTrainerBN",
    "nnUNetTrainerNoDeepSupervision",
)
LONG_WAY = {name: int(number[1]) for name in trainers.ALLOWED if (number := re.search(r"_(\d+)epochs?(_|$)", name))}


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site's folder: all studies share the preprocessed cases."""
    return tmp_path_factory.mktemp("state")


def a_site(state: Path, trainer: str, **study: Any) -> Site:
    """The site, prepared for a study with this trainer."""
    data, plans = shared_site()
    rounds = {"rounds": LONG_WAY[trainer]} if trainer in LONG_WAY else {}
    site = Site(make_settings(data, state), make_study(trainer=trainer, **{**rounds, **study}), plans)
    assert site.ask(site.prepare_task()).failure is None
    return site


def first_weights(site: Site, out: Path) -> Path:
    """What the orchestrator's child process does, here in this one."""
    request = {"plans": site.plans, "dataset_json": site.study.dataset_json(8), "out": str(out), "pretrained": None}
    model._initial(out.parent, request, site.study)
    return out


def train(site: Site, number: int, start: Path) -> tuple[tasks.Training, Path]:
    task = site.task(TRAIN, number)
    result = site.ask(task, start)
    assert result.failure is None
    assert result.training is not None
    return result.training, site.update(task)


# ---- the list --------------------------------------------------------------------------------------------------------


def nnunets_trainers() -> set[str]:
    """Every class below nnunetv2.training.nnUNetTrainer, read without importing it."""
    package = importlib.util.find_spec("nnunetv2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "training" / "nnUNetTrainer"
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]
    return {node.name for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def test_every_trainer_of_nnunet_is_either_allowed_or_refused_with_a_reason() -> None:
    found = nnunets_trainers()
    assert set(trainers.ALLOWED) <= found, "a trainer that nnU-Net no longer has"
    refused = {
        name: [reason for pattern, reason in trainers.REFUSED.items() if re.fullmatch(pattern, name)] for name in found
    }
    unknown = {name for name in found - set(trainers.ALLOWED) if not refused[name]}
    assert not unknown, f"new in nnU-Net: try them, then list them in federation/trainers.py: {sorted(unknown)}"
    assert not [name for name in trainers.ALLOWED if refused[name]]
    for pattern in trainers.REFUSED:
        assert any(re.fullmatch(pattern, name) for name in found), f"nnU-Net has no {pattern}"


def test_allowed_trainers_need_nothing_but_nnunet() -> None:
    """As in an image with neither torchvision nor Adan nor an account anywhere."""
    code = """
import sys
for name in ("torchvision", "adan_pytorch", "wandb", "timm.models"):
    sys.modules[name] = None
from federation import native, trainers
for name in trainers.ALLOWED:
    assert native.trainer_class(name).__name__ == name
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "epochs", "reason"),
    [
        ("nnUNetTrainer", 7, None),
        ("nnUNetTrainer_5epochs", 5, None),
        ("nnUNetTrainer_1epoch", 1, None),
        ("nnUNetTrainer_250epochs_NoMirroring", 250, None),
        ("nnUNetTrainer_5epochs", 6, "trains 5 epochs"),
        ("nnUNetTrainer_250epochs_NoMirroring", 1000, "trains 250 epochs"),
        ("nnUNetTrainerAdan", 1000, "adan_pytorch"),
        ("nnUNetTrainerBenchmark_5epochs", 5, "speed"),
        ("nnUNet_Primus_M_Trainer", 1000, "transformer"),
        ("nnUNet_Trainer_BS8", 1000, "batch"),
        ("nnUNetTrainerUnheardOf", 1000, "not one of nnU-Net's trainers"),
    ],
)
def test_a_study_is_told_why_it_may_not_use_a_trainer(name: str, epochs: int, reason: str | None) -> None:
    told = trainers.fault(name, epochs)
    assert told is None if reason is None else reason in str(told)


@pytest.mark.parametrize("name", sorted(trainers.WITHOUT_REGIONS))
def test_a_loss_that_knows_no_regions_is_refused_before_any_site_is_asked(name: str) -> None:
    labels = {"labels": {"background": 0, "whole": [1, 2], "inner": 2}, "regions_class_order": [1, 2]}
    with pytest.raises(FednnunetError, match="knows no regions"):
        make_study(trainer=name, **labels)


def test_which_losses_know_no_regions_is_what_nnunet_says() -> None:
    import inspect

    found = {
        name
        for name in trainers.ALLOWED
        if "assert not self.label_manager.has_regions" in inspect.getsource(native.trainer_class(name)._build_loss)
    }
    assert found == trainers.WITHOUT_REGIONS


# ---- rounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in BEHAVIOURS else [pytest.mark.exhaustive]) for name in trainers.ALLOWED],
)
def test_a_trainer_trains_and_goes_on_after_a_restart_as_if_it_had_lived(
    state: Path, tmp_path: Path, name: str
) -> None:
    site = a_site(state, name)
    start = first_weights(site, tmp_path / "first.safetensors")
    rounds = min(2, site.study.rounds)
    training, update = train(site, 1, start)
    assert training.plans_sha256 == site.plans_sha256
    assert files.sha256_json(site.worker.trainer.plans) == site.plans_sha256, "the trainer changed its plans"
    assert files.sha256_of(update) != files.sha256_of(start)
    kept = tmp_path / "1.safetensors"
    kept.write_bytes(update.read_bytes())
    if rounds == 2:
        warm = train(site, 2, kept)
        expected = warm[0].learning_rate, files.sha256_of(warm[1])
        task = site.task(TRAIN, 2)
        for parcel in (site.spool.result_parcel(task), site.spool.task_parcel(task)):
            shutil.rmtree(parcel.folder)
        site.restart()
        again = train(site, 2, kept)
        assert (again[0].learning_rate, files.sha256_of(again[1])) == expected
    site.worker._close()


@pytest.mark.parametrize(
    ("name", "axes"),
    [("nnUNetTrainer", (0, 1, 2)), ("nnUNetTrainerNoMirroring", None), ("nnUNetTrainer_onlyMirror01", (0, 1))],
)
def test_prediction_mirrors_as_the_training_did(
    state: Path, name: str, axes: tuple[int, ...] | None, tmp_path: Path
) -> None:
    site = a_site(state, name, rounds=1)
    _, update = train(site, 1, first_weights(site, tmp_path / "first.safetensors"))
    assert site.ask(site.task(tasks.Kind.FINISH), update).failure is None
    (path,) = (site.settings.work / site.study.id / "nnUNet_results").rglob("checkpoint_final.pth")
    assert torch.load(path, weights_only=True)["inference_allowed_mirroring_axes"] == axes


def learning_rates(site: Site, numbers: list[int], start: Path, restart: bool = False) -> list[float]:
    rates = []
    for number in numbers:
        rates += train(site, number, start)[0].learning_rate
        if restart:
            site.restart()
    return rates


@pytest.mark.parametrize("restart", [False, True])
def test_cosine_annealing_follows_the_rounds(state: Path, tmp_path: Path, restart: bool) -> None:
    site = a_site(state, "nnUNetTrainerCosAnneal", rounds=4, iterations_per_epoch=1, seed=int(restart))
    rates = learning_rates(site, [1, 2, 4], first_weights(site, tmp_path / "first.safetensors"), restart)
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in (0, 1, 3)])


@pytest.mark.parametrize("restart", [False, True])
def test_the_warm_up_ends_also_for_a_site_that_missed_its_last_round(
    state: Path, tmp_path: Path, restart: bool
) -> None:
    site = a_site(state, "nnUNetTrainer_warmup", rounds=60, iterations_per_epoch=1, seed=int(restart))
    rates = learning_rates(site, [1, 49, 53, 54], first_weights(site, tmp_path / "first.safetensors"), restart)
    after = [0.01 * (1 - (epoch - 50) / 10) ** 0.9 for epoch in (52, 53)]
    assert rates == pytest.approx([0.01 / 50, 0.01 * 49 / 50, *after])


# ---- names of layers -------------------------------------------------------------------------------------------------


def a_large_fingerprint() -> dict[str, Any]:
    """nnU-Net's fingerprint of large synthetic scans: planners plan as many stages as they ever do."""
    numbers = {"mean": 0.0, "median": 0.0, "std": 1.0, "min": -5.0, "max": 5.0}
    return {
        "spacings": [[1.0, 1.0, 1.0]] * 20,
        "shapes_after_crop": [[400, 512, 512]] * 20,
        "foreground_intensity_properties_per_channel": {
            "0": {**numbers, "percentile_00_5": -3.0, "percentile_99_5": 3.0}
        },
        "median_relative_size_after_cropping": 1.0,
    }


@pytest.mark.parametrize("planner", PLANNERS)
def test_the_names_that_layers_can_have_are_those_of_nnunets_networks(planner: str, tmp_path: Path) -> None:
    residual = planner.startswith("nnUNetPlannerResEnc")
    study = make_study(planner=planner)
    dataset_json = study.dataset_json(20)
    plans = planners.make_plans(study, a_large_fingerprint(), dataset_json, tmp_path)
    possible = set(possible_names(residual))
    for configuration in ("2d", "3d_fullres", "3d_lowres"):
        for trainer in ("nnUNetTrainer", "nnUNetTrainerBN"):
            variant = make_study(planner=planner, configuration=configuration, trainer=trainer)
            with torch.device("meta"):
                tensors = native.unique_tensors(model.build_network(plans, dataset_json, variant))
            assert set(tensors) <= possible
            norms, heads = kept_local(tensors, ["norm"]), kept_local(tensors, ["seg_head"])
            assert {name for name in tensors if tensors[name].dim() <= 1 and ".norm." in name} == norms
            shapes = {tensors[name].shape[0] for name in heads}
            assert shapes == {len(study.labels)}, "one channel for each label"
            statistics = {name for name in tensors if is_statistic(name)}
            assert bool(statistics) == (trainer == "nnUNetTrainerBN")
            assert all("running" in name or tensors[name].dtype == torch.int64 for name in statistics)


def test_a_study_may_keep_any_layer_of_batch_normalisation_local() -> None:
    values = make_study(trainer="nnUNetTrainerBN").model_dump(mode="json")
    assert parse({**values, "keep_local": ["*.running_var"]}).keep_local == ["*.running_var"]


# ---- weights files ---------------------------------------------------------------------------------------------------


def test_counters_stay_whole_and_everything_else_is_float32_in_a_weights_file(tmp_path: Path) -> None:
    def network(kind: torch.dtype) -> torch.nn.Module:
        layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
        layers[0].to(kind)
        return layers

    saved = network(torch.bfloat16)
    saved[1].num_batches_tracked += 2**24 + 1  # float32 has no such number
    file = tmp_path / "weights.safetensors"
    native.save_weights(saved, file)
    source = TensorFile(file)
    kinds = {name: source.spec(name).dtype for name in source.names}
    assert kinds.pop("1.num_batches_tracked") == np.dtype("<i8")
    assert set(kinds.values()) == {np.dtype("<f4")}

    for kind in (torch.bfloat16, torch.float16, torch.float32):
        loaded = network(kind)
        native.load_weights(loaded, file, torch.from_numpy)
        assert int(loaded[1].num_batches_tracked) == 2**24 + 1
        assert torch.allclose(loaded[0].weight.float(), saved[0].weight.float(), atol=1e-3)
        native.save_weights(loaded, tmp_path / "again.safetensors")
        if kind is not torch.float16:
            assert files.sha256_of(tmp_path / "again.safetensors") == files.sha256_of(file)
