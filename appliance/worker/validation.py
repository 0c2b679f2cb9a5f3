"""Validate and Finish: how good the global model is on the site's own cases, and the native model for the site.

Rules:

- The global weights are judged, never the site's own after a round; with layers that stay at the site, these layers
  and the global ones together: the model that the site gets.
- Held-out training cases of a fold: nnU-Net's own validation, written where nnU-Net writes it. Fold `all` holds none
  out, and nothing is measured on cases that trained.
- Cases of imagesTs that have a label in labelsTs: nnU-Net's predictor, scored with nnU-Net's own metrics. For a
  cascade its first stage predicts them before (appliance.worker.cascade).
- What leaves is mean, deviation, minimum and number of cases for each label. Scores of single cases stay here.
- The native model is what nnU-Net's commands accept: `dataset.json`, `plans.json`, this site's own
  `dataset_fingerprint.json`, and for each fold `checkpoint_final.pth`, `progress.png`, `validation/summary.json`.
"""

from __future__ import annotations

import io
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, save_summary_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from appliance.worker import cascade
from appliance.worker.dataset import Case
from appliance.worker.training import FoldTrainer
from appliance.worker.workspace import Control
from federation import files, native, tasks
from federation.study import Study


def validate(
    fold_trainer: FoldTrainer, global_weights: Path, test_cases: Mapping[str, Case], control: Control
) -> tasks.Validation:
    """Judge the global weights on this site's cases.

    Parameters
    ----------
    fold_trainer : FoldTrainer
        The fold's trainer; its loaders need not run. Afterwards its network holds the global weights.
    global_weights : Path
        Float32 weights file.
    test_cases : Mapping[str, Case]
        The cases of imagesTs with a label in labelsTs, by name.

    Returns
    -------
    tasks.Validation
        Sums only. Raises FNU-404 and whatever nnU-Net raises.
    """
    started = time.perf_counter()
    fold_trainer.take(global_weights)
    trainer, study = fold_trainer.trainer, fold_trainer.study
    report: dict[str, Any] = {}
    if fold_trainer.fold != "all":
        trainer.predicts(control, f"validating fold {fold_trainer.fold}: held-out case")
        folder = Path(trainer.output_folder) / "validation"
        shutil.rmtree(folder, ignore_errors=True)
        trainer.perform_actual_validation(study.save_probabilities)
        per_case = files.read_json(folder / "summary.json")["metric_per_case"]
        report["validation"] = scores(study, per_case)
        report["validation_cases"] = len(per_case)
    if test_cases:
        per_case = _predict_test_cases(fold_trainer, test_cases, control)
        report["test"] = scores(study, per_case)
        report["test_cases"] = len(per_case)
    return tasks.Validation(seconds=round(time.perf_counter() - started, 3), **report)


def scores(study: Study, per_case: Sequence[Mapping[str, Any]]) -> dict[str, tasks.LabelScore]:
    """Dice over cases for each label of the study, by the label's name.

    `per_case` is nnU-Net's `metric_per_case`: `metrics` by label or region, a case in which the label neither occurs
    nor was predicted has no Dice (NaN) and does not count.
    """
    result = {}
    for name, key in study.label_keys.items():
        values = []
        for case in per_case:
            metrics = {str(label): value for label, value in case["metrics"].items()}
            dice = float(metrics[key]["Dice"])
            if not math.isnan(dice):
                values.append(dice)
        result[name] = tasks.LabelScore(
            mean=float(np.mean(values)) if values else None,
            std=float(np.std(values)) if values else None,
            minimum=min(values) if values else None,
            cases=len(values),
        )
    return result


def _predict_test_cases(fold_trainer: FoldTrainer, cases: Mapping[str, Case], control: Control) -> list[dict[str, Any]]:
    """Predict and score imagesTs; predictions and scores of each case stay in the fold's folder `test`."""
    trainer, study = fold_trainer.trainer, fold_trainer.study
    predictor = nnUNetPredictor(
        perform_everything_on_device=trainer.device.type == "cuda", device=trainer.device, allow_tqdm=False
    )
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [native.plain_network(trainer.network).state_dict()],
        trainer.dataset_json,
        study.trainer,
        trainer.inference_allowed_mirroring_axes,
    )
    folder = Path(trainer.output_folder) / "test"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    manager = trainer.label_manager
    reader = trainer.plans_manager.image_reader_writer_class()
    previous: Mapping[str, str] = {}
    if study.previous_stage is not None:
        previous = cascade.predict_test_cases(
            fold_trainer.workspace, fold_trainer.settings, fold_trainer.plans, cases, control
        )
    per_case = []
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    try:
        for done, (name, case) in enumerate(sorted(cases.items())):
            control.check()
            control.phase(f"predicting test case {done + 1} of {len(cases)}")
            predictor.predict_from_files_sequential(
                [[str(path) for path in case.images]],
                [str(folder / name)],
                study.save_probabilities,
                folder_with_segs_from_prev_stage=previous.get(name),
            )
            per_case.append(
                compute_metrics(
                    str(case.label),
                    str(folder / f"{name}{study.file_ending}"),
                    reader,
                    manager.foreground_regions if manager.has_regions else manager.foreground_labels,
                    manager.ignore_label,
                )
            )
    finally:
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    for item in per_case:
        recursive_fix_for_json_export(item)
    means = {
        label: {"Dice": _mean([case["metrics"][label]["Dice"] for case in per_case])}
        for label in per_case[0]["metrics"]
    }
    foreground = {"Dice": _mean([value["Dice"] for value in means.values()])}
    save_summary_json(
        {"metric_per_case": per_case, "mean": means, "foreground_mean": foreground}, str(folder / "summary.json")
    )
    return per_case


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def finish(fold_trainer: FoldTrainer, global_weights: Path, control: Control) -> Path:
    """Write the native model of one fold; returns the model's folder. Raises FNU-404 and FNU-702."""
    control.phase("writing the native model")
    fold_trainer.take(global_weights)
    trainer, workspace = fold_trainer.trainer, fold_trainer.workspace
    model, folder = Path(trainer.output_folder_base), Path(trainer.output_folder)
    for target, source in (
        ("plans.json", f"{fold_trainer.plans['plans_name']}.json"),
        ("dataset.json", "dataset.json"),
        ("dataset_fingerprint.json", "dataset_fingerprint.json"),
    ):
        files.write_bytes(model / target, (workspace.preprocessed / source).read_bytes())
    trainer.logger.begin(fold_trainer.study.rounds * fold_trainer.study.epochs_per_round)
    content = native.checkpoint(
        trainer.network,
        study=fold_trainer.study,
        fold=fold_trainer.fold,
        plans=fold_trainer.plans,
        dataset_json=fold_trainer.dataset_json,
        device=str(trainer.device),
        mirroring_axes=trainer.inference_allowed_mirroring_axes,
        logging=native.plain(trainer.logger.get_checkpoint()),
        optimizer_state=fold_trainer.blank_optimizer_state(),
        grad_scaler_state=trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
    )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    trainer.logger.draw(folder)
    summary = folder / "validation" / "summary.json"
    if not summary.exists():
        files.write_json(summary, {"foreground_mean": {}, "mean": {}, "metric_per_case": []})
    files.write_bytes(folder / native.CHECKPOINT, buffer.getvalue())
    return model
