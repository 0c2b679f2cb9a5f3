"""Prepare: lay out nnU-Net's folders for one study and preprocess the site's cases for the pooled plans.

Rules:

- The plans must be those that the orchestrator signed for (FNU-302) and name nothing but nnU-Net's own (FNU-305). With
  AsymFedAvg the site plans for itself (appliance.worker.planning).
- The dataset.json beside them is the study's, which a person here has approved; its number of cases alone is the pooled
  one. Any other is refused (FNU-305).
- The site's data is read-only: the raw folder holds links to it.
- Preprocessing is nnU-Net's own, case by case. Its result lies below `work/preprocessed`, keyed by plans,
  configuration and data: whole or not there, and done once for all studies that share the three.
- dataset_fingerprint.json is this site's own; another site's never arrives here.
- Folds are nnU-Net's own five-fold split of this site's cases.
- 3d_cascade_fullres has the data of 3d_fullres and of 3d_lowres, and the predictions of its first stage, which come
  last (appliance.worker.cascade).
- `prepared.json` comes last: a second Prepare with the same plans and data finds it and does nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from appliance import devices
from appliance.settings import Settings
from appliance.worker.dataset import Examination
from appliance.worker.planning import network, own_plan
from appliance.worker.workspace import Control, Interrupted, Workspace
from federation import files, native, tasks
from federation.errors import Code, FednnunetError
from federation.fingerprint import to_nnunet
from federation.plans import check_plans
from federation.processes import end_with_parent
from federation.study import CASCADE, LOWRES

ALMOST_FULL = 16 * 2**20
"""With fewer bytes free than this, a failure to write is taken for a full disk (blosc2 does not say why it failed)."""

Case = tuple[str, list[str], str]
"""Identifier, image files, label file."""


def prepare(
    task: tasks.Task,
    settings: Settings,
    workspace: Workspace,
    examination: Examination,
    control: Control,
) -> tasks.Preparation:
    """Make the site ready to train a study.

    Parameters
    ----------
    task : tasks.Task
        Prepare, with its plan where the study has one for all sites.
    examination : Examination
        The site's dataset, examined: its cases and its own fingerprint.

    Returns
    -------
    tasks.Preparation
        Training cases for each fold of the study.

    Raises
    ------
    FednnunetError
        FNU-302, 303, 305 for the plans; FNU-109 with fewer than 5 cases for a fold; FNU-304; FNU-702; FNU-706.
        For a cascade FNU-310, 311, 312 when its first stage does not lie here, or does not fit.
    """
    study = task.study
    import torch

    native.trainer_class(study.trainer)
    devices.require(torch, settings.device.partition(":")[0])
    examination.require_good()
    plan = own_plan(workspace, examination) if study.mode == "asymfedavg" else _given_plan(task)
    plans = plan.plans
    cases, digest = find_cases(examination)
    if study.fold != "all" and len(cases) < 5:
        raise FednnunetError(Code.TOO_FEW_CASES_FOR_FOLDS, f"{len(cases)} cases in {examination.folder}")
    splits = split(cases)
    preparation = tasks.Preparation(
        plans_sha256=plan.plans_sha256,
        training_cases={fold: len(cases) if fold == "all" else len(splits[int(fold)]["train"]) for fold in study.folds},
        device=settings.device,
        network=network(plan, study.configuration) if study.mode == "asymfedavg" else None,
    )
    if study.stop_after == "plan":
        return preparation
    wanted = {
        "plans_sha256": plan.plans_sha256,
        "data": digest,
        "labels": files.sha256_json([list(study.labels.items()), study.regions_class_order]),
        "plans_name": plans["plans_name"],
    }
    if study.previous_stage is None:
        _lay_out(plan, settings, workspace, examination, cases, splits, wanted, control)
        return preparation

    from appliance.worker import cascade

    first = cascade.find(workspace, plans)  # before hours of preprocessing
    first.require_same_split(splits)
    _lay_out(plan, settings, workspace, examination, cases, splits, wanted, control)
    cascade.predict_training_cases(first, workspace, settings, plans, wanted, control)
    return preparation


def _lay_out(
    plan: tasks.Plan,
    settings: Settings,
    workspace: Workspace,
    examination: Examination,
    cases: list[Case],
    splits: list[dict[str, list[str]]],
    wanted: Mapping[str, str],
    control: Control,
) -> None:
    """Write nnU-Net's folders and the preprocessed data, unless they are there as `wanted`."""
    study, plans = workspace.study, plan.plans
    configurations = [_with_data(plans, study.configuration)]
    if study.configuration == CASCADE:
        configurations.append(LOWRES)
    caches = {
        configuration: workspace.cache
        / f"{plan.plans_sha256[:16]}-{configuration}-{wanted['data'][:16]}-{wanted['labels'][:8]}"
        for configuration in configurations
    }
    marker = workspace.preprocessed / "prepared.json"
    if marker.exists() and files.read_json(marker) == wanted and all(cache.is_dir() for cache in caches.values()):
        return

    _link_raw(workspace, examination.folder, plan.dataset_json)
    for configuration, cache in caches.items():
        if not cache.is_dir():
            workspace.cache.mkdir(parents=True, exist_ok=True)
            with files.new_directory(cache) as folder:
                preprocess(
                    cases, folder, plans, plan.dataset_json, configuration, settings.preprocessing_processes, control
                )
    control.phase("writing the study's folders")
    if marker.exists() and files.read_json(marker)["plans_sha256"] != plan.plans_sha256:
        shutil.rmtree(workspace.root / "state", ignore_errors=True)  # of a network that is no more
    own = to_nnunet(examination.fingerprint(study.fingerprint_min_cases))
    with files.new_directory(workspace.preprocessed) as folder:
        _write_nnunet_json(folder / f"{plans['plans_name']}.json", plans)
        _write_nnunet_json(folder / "dataset.json", plan.dataset_json)
        _write_nnunet_json(folder / "dataset_fingerprint.json", own)
        _write_nnunet_json(folder / "splits_final.json", splits)
        (folder / "gt_segmentations").mkdir()
        for name, _, label in cases:
            (folder / "gt_segmentations" / f"{name}{study.file_ending}").symlink_to(label)
        for configuration, cache in caches.items():
            (folder / _identifier(plans, configuration)).symlink_to(cache.resolve(), target_is_directory=True)
        files.write_json(folder / "prepared.json", wanted)


def _given_plan(task: tasks.Task) -> tasks.Plan:
    if task.plan is None:
        raise FednnunetError(Code.ENVELOPE_INVALID, "prepare without a plan")
    if files.sha256_json(task.plan.plans) != task.plan.plans_sha256:
        raise FednnunetError(Code.PLANS_HASH, f"their SHA-256 is {files.sha256_json(task.plan.plans)}")
    check_plans(task.plan.plans, task.study)
    given = task.plan.dataset_json
    number = given.get("numTraining")
    if type(number) is not int or given != task.study.dataset_json(number):
        raise FednnunetError(Code.PLANS_REFUSED, f"dataset.json is not the study's: {str(given)[:200]}")
    return task.plan.model_copy(update={"dataset_json": task.study.dataset_json(number)})


def find_cases(examination: Examination) -> tuple[list[Case], str]:
    """The training cases in the order of their names, and a digest of what lies on the disk.

    The digest is taken over names, sizes and times of change of the files: it costs no reading of images.
    """
    cases, listing = [], []
    for name, case in sorted(examination.cases.items()):
        if case.label is None:
            raise FednnunetError(Code.IMAGE_WITHOUT_LABEL, name)
        for path in (*case.images, case.label):
            status = os.stat(path)
            listing.append([name, path.name, status.st_size, status.st_mtime_ns])
        cases.append((name, [str(path) for path in case.images], str(case.label)))
    return cases, files.sha256_json(listing)


def split(cases: list[Case]) -> list[dict[str, list[str]]]:
    """nnU-Net's five-fold split (`nnUNetTrainer.do_split`); empty with fewer than 5 cases."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    if len(cases) < 5:
        return []
    folds = generate_crossval_split([name for name, _, _ in cases], seed=12345, n_splits=5)
    return [{part: [str(name) for name in fold[part]] for part in ("train", "val")} for fold in folds]


def preprocess(
    cases: list[Case],
    folder: Path,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    configuration: str,
    processes: int,
    control: Control,
) -> None:
    """Run the configuration's preprocessor of nnU-Net over all cases into an empty folder.

    One process: here, one case after the other. More: spawned, as nnU-Net does it. Raises FNU-304 or FNU-702.
    """
    arguments = (dict(plans), configuration, dict(dataset_json), str(folder))
    try:
        if processes == 1 or len(cases) == 1:
            _start_preprocessing(*arguments)
            for done, case in enumerate(cases):
                control.check()
                control.phase(f"preprocessing case {done + 1} of {len(cases)}")
                _preprocess_case(case)
            return
        executor = ProcessPoolExecutor(
            min(processes, len(cases)),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_preprocessing,
            initargs=(*arguments, True),
        )
        try:
            waiting = [executor.submit(_preprocess_case, case) for case in cases]
            for done, future in enumerate(as_completed(waiting)):
                future.result()
                control.check()
                control.phase(f"preprocessing: {done + 1} of {len(cases)} cases done")
        finally:
            executor.shutdown(wait=True, cancel_futures=True)
    except BrokenProcessPool as error:
        raise FednnunetError(Code.OUT_OF_MEMORY, "a preprocessing process was killed") from error
    except (Interrupted, MemoryError):
        raise
    except Exception as error:
        if shutil.disk_usage(folder).free < ALMOST_FULL:
            raise FednnunetError(Code.DISK_FULL, f"{folder}: {error}") from error
        if isinstance(error, OSError):
            raise
        raise FednnunetError(Code.PREPROCESSING_FAILED, str(error)) from error


_running: dict[str, Any] = {}


def _start_preprocessing(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], folder: str, child: bool = False
) -> None:
    """Set up a process, this one or a spawned one, for `_preprocess_case`."""
    if child:
        end_with_parent(signal.SIGKILL)
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans)
    chosen = manager.get_configuration(configuration)
    _running.update(
        plans=manager,
        configuration=chosen,
        preprocessor=chosen.preprocessor_class(verbose=False),
        dataset_json=dataset_json,
        folder=folder,
    )


def _preprocess_case(case: Case) -> None:
    name, images, label = case
    target = os.path.join(_running["folder"], name)
    try:
        _running["preprocessor"].run_case_save(
            target, images, label, _running["plans"], _running["configuration"], _running["dataset_json"]
        )
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise RuntimeError(f"case {name}: {error!r}") from error


def _identifier(plans: Mapping[str, Any], configuration: str) -> str:
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    return str(PlansManager(dict(plans)).get_configuration(configuration).data_identifier)


def _with_data(plans: Mapping[str, Any], configuration: str) -> str:
    """The configuration that a configuration shares its preprocessed data with: the cascade's is 3d_fullres."""
    entry = plans["configurations"][configuration]
    return configuration if "data_identifier" in entry else _with_data(plans, entry["inherits_from"])


def _with_listing(data: Path, dataset_json: Mapping[str, Any]) -> dict[str, Any]:
    """The pooled dataset.json, with the site's own listing of its files where it has one."""
    own = files.read_json(data / "dataset.json")
    return {**dataset_json, **({"dataset": own["dataset"]} if "dataset" in own else {})}


def _link_raw(workspace: Workspace, data: Path, dataset_json: Mapping[str, Any]) -> None:
    with files.new_directory(workspace.raw) as folder:
        _write_nnunet_json(folder / "dataset.json", _with_listing(data, dataset_json))
        for entry in sorted(data.iterdir()):
            if entry.is_dir() and not entry.name.startswith("."):
                (folder / entry.name).symlink_to(entry.resolve(), target_is_directory=True)


def _write_nnunet_json(path: Path, value: Any) -> None:
    """JSON as nnU-Net writes it: keys in their order (that of `configurations` and `labels` has a meaning)."""
    from batchgenerators.utilities.file_and_folder_operations import save_json

    save_json(value, str(path), sort_keys=False)
