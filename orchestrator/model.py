"""The first weights of a study, and the global model in nnU-Net's native layout with its zip.

Rules:

- The coordinator never imports torch: `initial_weights` and `export` run in the
  workshop (a child process) and raise its numbered error.
- The first weights are a function of (plans, study): seeded, on the CPU, every tensor once, float32.
- Pretrained weights are taken over by nnU-Net's own rule (`load_pretrained_weights`: every layer but the segmentation
  heads must fit). The checkpoint is read without running anything that it may hold (`weights_only`).
- The model is what nnU-Net's commands accept untouched, and the zip is written by nnU-Net's own export. It names no
  site and no case: the scores in `validation/summary.json` are pooled.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import random
import tempfile
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from federation import files, native, tasks
from federation.errors import Code, FednnunetError
from federation.plans import check_plans
from federation.study import Study, parse
from orchestrator.workshop import Workshop, borrowed

ERROR = "error.json"
Progress = Mapping[str, Mapping[str, Sequence[Any]]]


# for the coordinator: no torch


def initial_weights(
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    study: Study,
    out: Path,
    pretrained: Path | None = None,
    workshop: Workshop | None = None,
) -> None:
    """Write the weights that round 1 begins with.

    Parameters
    ----------
    plans, dataset_json : Mapping
        nnU-Net's plans and the pooled dataset.json.
    study : Study
        Its trainer, configuration and seed.
    out : Path
        The safetensors file to write: unique names, sorted, float32.
    pretrained : Path, optional
        A checkpoint of nnU-Net v2 to take all but the segmentation heads from.
    workshop : Workshop, optional
        Where the child process runs; one is opened for this alone otherwise.

    Raises
    ------
    FednnunetError
        FNU-111, 303, 305, 306, 403 or 702.
    """
    request = {"out": str(out.resolve()), "pretrained": str(pretrained.resolve()) if pretrained else None}
    _in_child("initial", out.parent, plans, dataset_json, study, request, workshop)


def export(
    folder: Path,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    fingerprint: Mapping[str, Any],
    study: Study,
    weights: Mapping[str, Path],
    validation: Mapping[str, Mapping[str, tasks.Validation]],
    out_zip: Path,
    progress: Progress | None = None,
    workshop: Workshop | None = None,
) -> Path:
    """Write the global model in nnU-Net's native layout below `folder`, and its zip.

    Parameters
    ----------
    folder : Path
        Takes the place of nnU-Net's `nnUNet_results`.
    fingerprint : Mapping
        dataset_fingerprint.json to go with the model (the pooled one).
    weights : Mapping[str, Path]
        The last global weights of each fold.
    validation : Mapping[str, Mapping[str, tasks.Validation]]
        For each fold what each site reported; it is pooled here.
    out_zip : Path
        For `nnUNetv2_install_pretrained_model_from_zip`.
    progress : Mapping, optional
        For each fold, one value for each epoch of `train_losses`, `val_losses`, `mean_fg_dice`, `lrs`: drawn in
        progress.png as nnU-Net draws it.
    workshop : Workshop, optional
        Where the child process runs; one is opened for this alone otherwise.

    Returns
    -------
    Path
        The model's folder, `folder/DatasetNNN_Name/TRAINER__PLANS__CONFIGURATION`.

    Raises
    ------
    FednnunetError
        FNU-303, 305, 306, 403, 404 or 702.
    """
    request = {
        "folder": str(folder.resolve()),
        "zip": str(out_zip.resolve()),
        "fingerprint": dict(fingerprint),
        "weights": {fold: str(path.resolve()) for fold, path in weights.items()},
        "summary": {fold: summary(study, list(validation.get(fold, {}).values())) for fold in weights},
        "progress": {fold: dict((progress or {}).get(fold, {})) for fold in weights},
    }
    _in_child("export", out_zip.parent, plans, dataset_json, study, request, workshop)
    return folder / study.dataset / native.model_name(study, plans)


def pool_scores(scores: Iterable[tasks.LabelScore]) -> tasks.LabelScore:
    """Dice of one label over the cases of several sites: each case counts the same."""
    known = [
        (score.cases, score.mean, score.std or 0.0, score.minimum)
        for score in scores
        if score.cases and score.mean is not None
    ]
    cases = sum(number for number, *_ in known)
    if not cases:
        return tasks.LabelScore(mean=None, std=None, minimum=None, cases=0)
    mean = sum(number * value for number, value, *_ in known) / cases
    square = sum(number * (value**2 + deviation**2) for number, value, deviation, _ in known) / cases
    minima = [minimum for *_, minimum in known if minimum is not None]
    return tasks.LabelScore(
        mean=mean,
        std=min(math.sqrt(max(square - mean**2, 0.0)), 1.0),
        minimum=min(minima) if minima else None,
        cases=cases,
    )


def summary(study: Study, reports: Sequence[tasks.Validation]) -> dict[str, Any]:
    """Pooled scores in the form of nnU-Net's summary.json, with no cases.

    Held-out training cases where the sites have them (folds 0 to 4), else the sites' test cases; `cases_of` says
    which.
    """
    kind = "validation" if any(report.validation for report in reports) else "test"
    mean = {}
    for name, key in study.label_keys.items():
        pooled = pool_scores(getattr(report, kind)[name] for report in reports if name in getattr(report, kind))
        if pooled.cases:
            mean[key] = {"Dice": pooled.mean, "Dice_std": pooled.std, "cases": pooled.cases}
    values = [entry["Dice"] for entry in mean.values() if entry["Dice"] is not None]
    foreground = {"Dice": math.fsum(values) / len(values)} if values else {}
    return {"cases_of": kind, "foreground_mean": foreground, "mean": mean, "metric_per_case": []}


def _in_child(
    command: str,
    scratch: Path,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    study: Study,
    request: Mapping[str, Any],
    workshop: Workshop | None,
) -> None:
    with files.disk_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".model-", dir=scratch) as name:
            directory = Path(name)
            body = {
                "study": study.model_dump(mode="json"),
                "plans": dict(plans),
                "dataset_json": dict(dataset_json),
                **request,
            }
            (directory / "request.json").write_text(json.dumps(body), encoding="utf-8")  # keys in their order
            environment = {
                name: str(directory / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
            }
            log = directory / "log"
            with borrowed(workshop) as place:
                status = place.run("orchestrator.model", [command, str(directory.resolve())], environment, log)
            if status == 0:
                return
            try:
                error = files.read_json(directory / ERROR)
            except FileNotFoundError:
                said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
                raise FednnunetError(Code.MODEL_NOT_BUILT, f"status {status}: {said}") from None
            raise FednnunetError(Code.of(error["code"]), error["found"])


# in the child


def build_network(plans: Mapping[str, Any], dataset_json: Mapping[str, Any], study: Study) -> Any:
    """The study's network on the CPU, as its trainer builds it (`nnUNetTrainer.initialize`)."""
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    check_plans(plans, study)
    trainer = native.trainer_class(study.trainer)
    manager = PlansManager(dict(plans))
    configuration = manager.get_configuration(study.configuration)
    channels = determine_num_input_channels(manager, configuration, dataset_json)
    heads = manager.get_label_manager(dataset_json).num_segmentation_heads
    return native.build_network(trainer, manager, configuration, channels, heads, deep=True)


def _seed(seed: int) -> None:
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - nnU-Net draws from the global state
    torch.manual_seed(seed)


def _initial(directory: Path, request: Mapping[str, Any], study: Study) -> None:
    _seed(study.seed)
    network = build_network(request["plans"], request["dataset_json"], study)
    if request["pretrained"] is not None:
        _check_pretrained(Path(request["pretrained"]), study)
        _take_pretrained(network, Path(request["pretrained"]), directory / "pretrained.pth")
    native.save_weights(network, Path(request["out"]))


def _check_pretrained(checkpoint: Path, study: Study) -> None:
    """Raise FNU-111 unless the file is the one that the study names by its SHA-256."""
    if study.pretrained_weights is None:
        return
    if not checkpoint.exists():
        raise FednnunetError(Code.PRETRAINED_UNREADABLE, f"{checkpoint} is not there")
    if (found := files.sha256_of(checkpoint)) != study.pretrained_weights:
        raise FednnunetError(Code.PRETRAINED_UNREADABLE, f"{checkpoint}: its SHA-256 is {found}")


def _take_pretrained(network: Any, checkpoint: Path, copy: Path) -> None:
    """nnU-Net's `load_pretrained_weights` on a copy that holds tensors alone; raises FNU-111."""
    import torch
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    try:
        loaded = native.load_checkpoint(torch, checkpoint)
        torch.save({"network_weights": loaded["network_weights"]}, copy)
        load_pretrained_weights(network, str(copy))
    except (*native.BAD_CHECKPOINT, KeyError, TypeError, AssertionError) as error:
        reason = str(error).strip().splitlines() or [repr(error)]
        raise FednnunetError(Code.PRETRAINED_UNREADABLE, f"{checkpoint}: {reason[0][:500]}") from error


def _export(directory: Path, request: Mapping[str, Any], study: Study) -> None:
    from nnunetv2.model_sharing.model_export import export_pretrained_model

    plans, dataset_json = request["plans"], request["dataset_json"]
    network = build_network(plans, dataset_json, study)
    folder = Path(request["folder"])
    model = folder / study.dataset / native.model_name(study, plans)
    with files.new_directory(model) as new:
        for name in ("plans", "dataset_json", "fingerprint"):
            target = {"plans": "plans", "dataset_json": "dataset", "fingerprint": "dataset_fingerprint"}[name]
            (new / f"{target}.json").write_text(json.dumps(request[name], indent=4), encoding="utf-8")
        for fold, weights in request["weights"].items():
            _write_fold(new / f"fold_{fold}", network, Path(weights), request, study, fold)
    os.environ.update(nnUNet_results=str(folder))
    with files.replacing(Path(request["zip"])) as temporary:
        export_pretrained_model(
            study.dataset,
            str(temporary),
            configurations=(study.configuration,),
            trainer=study.trainer,
            plans_identifier=plans["plans_name"],
            folds=tuple(native.fold_of(fold) for fold in request["weights"]),
        )


def _write_fold(folder: Path, network: Any, weights: Path, request: Mapping[str, Any], study: Study, fold: str) -> None:
    import torch
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    native.load_weights(network, weights, torch.from_numpy)
    trainer = native.trainer_class(study.trainer)(
        {**request["plans"], "continue_training": False},
        study.configuration,
        native.fold_of(fold),
        dict(request["dataset_json"]),
        torch.device("cpu"),
    )
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # sets the mirroring axes
    trainer.num_epochs = study.rounds * study.epochs_per_round
    trainer.network = network
    optimizer, _ = trainer.configure_optimizers()

    logger = LocalLogger()
    given = {key: list(values) for key, values in request["progress"][fold].items()}
    epochs = min((len(values) for values in given.values()), default=0)
    for key in logger.my_fantastic_logging:
        logger.my_fantastic_logging[key] = given.get(key, [math.nan] * epochs)[:epochs]
    content = native.checkpoint(
        network,
        study=study,
        fold=fold,
        plans=request["plans"],
        dataset_json=request["dataset_json"],
        device="cpu",
        mirroring_axes=trainer.inference_allowed_mirroring_axes,
        logging=logger.get_checkpoint(),
        optimizer_state={"state": {}, "param_groups": optimizer.state_dict()["param_groups"]},
        grad_scaler_state=None,
    )
    buffer = io.BytesIO()
    torch.save(content, buffer)
    folder.mkdir()
    (folder / native.CHECKPOINT).write_bytes(buffer.getvalue())
    logger.plot_progress_png(str(folder))
    (folder / "validation").mkdir()
    (folder / "validation" / "summary.json").write_text(
        json.dumps(request["summary"][fold], indent=4), encoding="utf-8"
    )


def warm() -> None:
    """Import what the jobs need, before they are asked for."""
    native.trainer_class("nnUNetTrainer")


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process: do what DIRECTORY/request.json asks; an error goes to DIRECTORY/error.json."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.model", description=main.__doc__)
    parser.add_argument("command", choices=("initial", "export"))
    parser.add_argument("directory", type=Path)
    chosen = parser.parse_args(arguments)
    request = json.loads((chosen.directory / "request.json").read_text(encoding="utf-8"))
    study = parse(request["study"])
    try:
        {"initial": _initial, "export": _export}[chosen.command](chosen.directory, request, study)
    except Exception as error:  # noqa: BLE001 - the parent raises it again
        traceback.print_exc()
        numbered = error
        if isinstance(error, OSError):
            numbered = files.disk_error(error, chosen.directory) or error
        if not isinstance(numbered, FednnunetError):
            numbered = FednnunetError(Code.MODEL_NOT_BUILT, repr(error))
        files.write_json(chosen.directory / ERROR, {"code": numbered.code.number, "found": numbered.found})
        return 1
    return 0
