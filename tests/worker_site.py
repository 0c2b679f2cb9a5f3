"""One small synthetic site for the worker's tests: data, plans by nnU-Net's own planner, a worker and its tasks."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from appliance.settings import Settings
from appliance.spool import Spool
from appliance.worker import dataset
from federation import files, tasks, weights
from federation.fingerprint import to_nnunet
from federation.study import Study, parse

SITE = "hospital_a"
NAME = "Dataset777_Blobs"
LABELS = {"background": 0, "outer": 1, "inner": 2}


def write_site(folder: Path, cases: int = 8, test_cases: int = 2, size: int = 24) -> Path:
    """A dataset in nnU-Net's raw format: an ellipsoid within an ellipsoid, in noise."""
    generator = np.random.default_rng(7)
    for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (folder / part).mkdir(parents=True)
    for number in range(cases + test_cases):
        part = "Tr" if number < cases else "Ts"
        grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij")).astype(float)
        centre = generator.uniform(size * 0.4, size * 0.6, 3)
        radius = generator.uniform(size * 0.25, size * 0.4, 3)
        distance = np.sqrt((((grid - centre[:, None, None, None]) / radius[:, None, None, None]) ** 2).sum(0))
        label = ((distance < 1).astype(np.uint8) + (distance < 0.5)).astype(np.uint8)
        image = label * 100.0 + 20 + generator.normal(0, 10, label.shape)
        for array, name in ((image.astype(np.float32), f"case_{number:02d}_0000"), (label, f"case_{number:02d}")):
            picture = sitk.GetImageFromArray(array)
            picture.SetSpacing((1.0, 1.0, 1.0))
            kind = "images" if name.endswith("_0000") else "labels"
            sitk.WriteImage(picture, str(folder / f"{kind}{part}" / f"{name}.nii.gz"))
    files.write_json(
        folder / "dataset.json",
        {"channel_names": {"0": "MR"}, "labels": LABELS, "numTraining": cases, "file_ending": ".nii.gz"},
    )
    return folder


def make_study(**changes: Any) -> Study:
    """A study of two rounds of two iterations."""
    value: dict[str, Any] = {
        "name": "blobs",
        "dataset": NAME,
        "sites": [SITE],
        "channel_names": {0: "MR"},
        "labels": LABELS,
        "rounds": 3,
        "iterations_per_epoch": 2,
        "validation_iterations_per_epoch": 1,
    }
    return parse({**value, **changes})


def make_plans(data: Path, study: Study, scratch: Path) -> dict[str, Any]:
    """Plans by nnU-Net's own planner from the site's fingerprint, with the network made small."""
    from batchgenerators.utilities.file_and_folder_operations import save_json
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    examination = dataset.examine(data, study, 1)
    raw, preprocessed = scratch / "raw" / NAME, scratch / "preprocessed" / NAME
    raw.parent.mkdir(parents=True)
    preprocessed.mkdir(parents=True)
    raw.symlink_to(data)
    save_json(to_nnunet(examination.fingerprint(1)), str(preprocessed / "dataset_fingerprint.json"))
    before = dict(os.environ)
    os.environ |= {"nnUNet_raw": str(raw.parent), "nnUNet_preprocessed": str(preprocessed.parent)}
    try:
        ExperimentPlanner(NAME).plan_experiment()
    finally:
        os.environ.clear()
        os.environ.update(before)
    plans: dict[str, Any] = files.read_json(preprocessed / "nnUNetPlans.json")
    configuration = plans["configurations"]["3d_fullres"]
    configuration |= {"patch_size": [16, 16, 16], "batch_size": 2}
    configuration["architecture"]["arch_kwargs"] |= {
        "n_stages": 3,
        "features_per_stage": [8, 16, 32],
        "kernel_sizes": [[3, 3, 3]] * 3,
        "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
    }
    return plans


@functools.cache
def shared_site() -> tuple[Path, dict[str, Any]]:
    """The site's data and its plans, made once for a test run; read only."""
    scratch = Path(tempfile.mkdtemp(prefix="fednnunet-blobs-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    data = write_site(scratch / "data")
    return data, make_plans(data, make_study(), scratch / "planning")


def make_settings(data: Path, state: Path, **changes: Any) -> Settings:
    """A site on a CPU with one thread and no loader processes: exact arithmetic."""
    values: dict[str, Any] = {
        "name": SITE,
        "orchestrator": "localhost:1",
        "data": data,
        "state": state,
        "device": "cpu",
        "preprocessing_processes": 1,
        "fingerprint_processes": 1,
        "augmentation_processes": 0,
        "threads": 1,
        "poll": 0.05,
    }
    return Settings(**{**values, **changes})


class Site:
    """A worker in this process and the link's side of its spool."""

    def __init__(self, settings: Settings, study: Study, plans: dict[str, Any]) -> None:
        from appliance.worker.__main__ import environment
        from appliance.worker.loop import Worker

        os.environ.update(environment(settings))
        self.settings, self.study, self.plans = settings, study, plans
        self.plans_sha256 = files.sha256_json(plans)
        self.spool = Spool(settings.spool)
        self.new_worker = lambda: Worker(settings, threading.Event())
        self.worker = self.new_worker()

    def prepare_task(self, **changes: Any) -> tasks.Task:
        plan = tasks.Plan(plans=self.plans, plans_sha256=self.plans_sha256, dataset_json=self.study.dataset_json(8))
        values: dict[str, Any] = {"study": self.study, "site": SITE, "kind": tasks.Kind.PREPARE, "plan": plan}
        return tasks.Task(**{**values, **changes})

    def task(self, kind: tasks.Kind, number: int | None = None, **changes: Any) -> tasks.Task:
        fold = self.study.folds[0]
        values: dict[str, Any] = {"study": self.study, "site": SITE, "kind": kind, "fold": fold, "round": number}
        return tasks.Task(**{**values, "plans_sha256": self.plans_sha256, **changes})

    def put(self, task: tasks.Task, file: Path | None = None) -> None:
        """Lay a task into the inbox, with full weights."""
        if file is None:
            self.spool.put_task(task, None)
            return
        copy = self.settings.spool / "sent.safetensors"
        copy.write_bytes(file.read_bytes())
        self.spool.put_task(task.model_copy(update={"weights": weights.describe_full(copy)}), copy)

    def ask(self, task: tasks.Task, file: Path | None = None) -> tasks.Result:
        """Lay a task into the inbox, let the worker do it, and take the answer."""
        self.put(task, file)
        for waiting in self.spool.waiting():
            self.worker.handle(waiting)
        result = self.spool.result(task)
        assert result is not None
        return result

    def update(self, task: tasks.Task) -> Path:
        """The update file of an answered task."""
        path = self.spool.result_parcel(task).weights
        assert path is not None
        return path

    def restart(self) -> None:
        """Another worker on the same files, as after kill -9: nothing of the first is left but the files."""
        self.worker = self.new_worker()


def prepared_site(state: Path, changes: dict[str, Any] | None = None, **study: Any) -> Site:
    """A site that has answered Prepare; `changes` to its settings, `study` to the study."""
    data, plans = shared_site()
    site = Site(make_settings(data, state, **(changes or {})), make_study(**study), plans)
    assert site.ask(site.prepare_task()).failure is None
    return site


@functools.cache
def initial_weights() -> Path:
    """Weights of a fresh network, by the orchestrator's own function."""
    from orchestrator import model

    data, plans = shared_site()
    out = data.parent / "initial.safetensors"
    study = make_study()
    model.initial_weights(plans, study.dataset_json(8), study, out)
    return out
