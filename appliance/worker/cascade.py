"""The cascade: the finished federated 3d_lowres model predicts, at this site, what 3d_cascade_fullres starts from.

Rules:

- The first stage is the model that the study `previous_stage` has left here: made with the same plans, its fold `all`
  or its folds 0 to 4 finished. No weights travel for it and nothing is trained again.
- Training cases are predicted by nnU-Net's own final validation of 3d_lowres with its `next_stage`: the networks, the
  resampling to the cascade's grid and the files are nnU-Net's. A case is predicted by the fold that held it out, so
  the cascade learns from errors as it will meet them; a model of fold `all` predicts the cases it was trained on, as
  nnU-Net's own does.
- The predictions lie where nnU-Net's trainer of the cascade looks for them, in this study's own results folder: whole
  or not there, and made once for the same data and plans. What else that validation writes is thrown away.
- Cases of imagesTs are predicted by the ensemble of the first stage's folds, as `nnUNetv2_predict` does it.

Worked example: study B names study A. Prepare of B finds `work/A/nnUNet_results/DATASET/TRAINER__PLANS__3d_lowres`
with fold_0 to fold_4 and writes `work/B/nnUNet_results/DATASET/TRAINER__PLANS__3d_lowres/predicted_next_stage/
3d_cascade_fullres/CASE.b2nd` for every training case; TRAINER is that of B.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from appliance.settings import Settings
from appliance.worker.dataset import Case
from appliance.worker.training import federated, release_memory
from appliance.worker.workspace import Control, Workspace
from federation import files, native
from federation.errors import Code, FednnunetError
from federation.study import CASCADE, LOWRES

FIVE = ("0", "1", "2", "3", "4")
PREDICTED = "predicted_next_stage"
MARKER = "predicted.json"


@dataclass(frozen=True)
class FirstStage:
    """The finished model of the study `previous_stage` at this site.

    Attributes
    ----------
    root : Path
        Everything of that study at this site.
    model : Path
        Its native model, `TRAINER__PLANS__3d_lowres`.
    folds : tuple of str
        (`all`,) or the five.
    """

    root: Path
    model: Path
    folds: tuple[str, ...]

    @property
    def trainer(self) -> str:
        """Name of its trainer class."""
        return self.model.name.split("__")[0]

    def require_same_split(self, splits: Sequence[Mapping[str, Sequence[str]]]) -> None:
        """Raise FNU-312 where a fold held out other cases than it would today: the cascade would learn from leaks."""
        if self.folds == ("all",):
            return
        path = self.root / "nnUNet_preprocessed" / self.model.parent.name / "splits_final.json"
        if files.read_json(path) != splits:
            raise FednnunetError(Code.FIRST_STAGE_CASES, f"{path} does not hold the split of the cases found now")


def find(workspace: Workspace, plans: Mapping[str, Any]) -> FirstStage:
    """The first stage of a cascade study at this site.

    Raises FNU-310 when its finished model does not lie here and FNU-311 when it was made with other plans.
    """
    study = workspace.study
    root = workspace.work / str(study.previous_stage)
    results = root / "nnUNet_results" / study.dataset
    models = sorted(results.glob(f"*__{plans['plans_name']}__{LOWRES}/plans.json"))
    if not models:
        raise FednnunetError(
            Code.FIRST_STAGE_MISSING, f"no model TRAINER__{plans['plans_name']}__{LOWRES} in {results}"
        )
    model = models[0].parent
    done = [fold for fold in (*FIVE, "all") if (model / f"fold_{fold}" / native.CHECKPOINT).exists()]
    folds = ("all",) if "all" in done else FIVE
    if not set(folds) <= set(done):
        raise FednnunetError(Code.FIRST_STAGE_MISSING, f"{model} has the folds {', '.join(done) or 'none'}")
    if files.sha256_json(files.read_json(models[0])) != files.sha256_json(plans):
        raise FednnunetError(Code.FIRST_STAGE_DIFFERS, f"{models[0]} are not the plans of this study")
    return FirstStage(root, model, folds)


def predictions(workspace: Workspace, plans: Mapping[str, Any]) -> Path:
    """Where nnU-Net's trainer of the cascade looks (`nnUNetTrainer.folder_with_segs_from_previous_stage`)."""
    model = f"{workspace.study.trainer}__{plans['plans_name']}__{LOWRES}"
    return workspace.results / model / PREDICTED / CASCADE


def predict_training_cases(
    first: FirstStage,
    workspace: Workspace,
    settings: Settings,
    plans: Mapping[str, Any],
    wanted: Mapping[str, Any],
    control: Control,
) -> None:
    """Predict every training case with the first stage, unless that has been done.

    Parameters
    ----------
    workspace : Workspace
        The cascade study's folders, prepared: the data of both stages lies there.
    wanted : Mapping
        What the predictions depend on (plans, data); they are made again when it changes.
    control : Control
        Asked between two cases.

    Raises
    ------
    FednnunetError
        FNU-304 when nnU-Net left a case out; FNU-702. Whatever nnU-Net raises.
    """
    target = predictions(workspace, plans).parent
    wanted = {**wanted, "previous_stage": workspace.study.previous_stage}
    if (target / MARKER).exists() and files.read_json(target / MARKER) == wanted:
        return
    with _results_elsewhere(workspace) as results, files.new_directory(target) as folder:
        for fold in first.folds:
            trainer = _trainer(first, fold, workspace, settings, plans, control)
            trainer.perform_actual_validation()
            del trainer
            release_memory()
        shutil.move(results / workspace.study.dataset / first.model.name / PREDICTED / CASCADE, folder / CASCADE)
        labels = workspace.preprocessed / "gt_segmentations"
        cases = {path.name.removesuffix(workspace.study.file_ending) for path in labels.iterdir()}
        left_out = cases - {path.name.rpartition(".")[0] for path in (folder / CASCADE).iterdir()}
        if left_out:
            raise FednnunetError(Code.PREPROCESSING_FAILED, f"{LOWRES} did not predict {', '.join(sorted(left_out))}")
        files.write_json(folder / MARKER, wanted)


def predict_test_cases(
    workspace: Workspace,
    settings: Settings,
    plans: Mapping[str, Any],
    cases: Mapping[str, Case],
    control: Control,
) -> dict[str, str]:
    """For each case of imagesTs a folder with the first stage's segmentation, named as nnU-Net's predictor expects.

    A case is predicted once for the same images. Raises FNU-310, FNU-311 and whatever nnU-Net raises.
    """
    first = find(workspace, plans)
    folders = {name: workspace.root / "first_stage" / _digest(name, case) for name, case in cases.items()}
    missing = [name for name, folder in sorted(folders.items()) if not folder.exists()]
    if missing:
        with _results_elsewhere(workspace):
            predictor = _ensemble(first, workspace, settings, plans, control)
            for done, name in enumerate(missing):
                control.check()
                control.phase(f"{LOWRES}: predicting test case {done + 1} of {len(missing)}")
                images = [str(path) for path in cases[name].images]
                expected = os.path.basename(images[0])[: -len(f"_0000{workspace.study.file_ending}")]
                with files.new_directory(folders[name]) as folder:
                    predictor.predict_from_files_sequential([images], [str(folder / expected)])
        del predictor
        release_memory()
    return {name: str(folder) for name, folder in folders.items()}


def _trainer(
    first: FirstStage, fold: str, workspace: Workspace, settings: Settings, plans: Mapping[str, Any], control: Control
) -> Any:
    """nnU-Net's trainer of the first stage, with the finished global weights of one fold."""
    control.check()
    native.use_threads(torch, settings.device, settings.threads)
    base = native.trainer_class(first.trainer)
    trainer = federated(base)(
        {**plans, "continue_training": False},
        LOWRES,
        native.fold_of(fold),
        workspace.dataset_json(),
        torch.device(settings.device.partition(":")[0]),
    )
    trainer.predicts(control, f"{LOWRES}, fold {fold}: predicting training case")
    trainer.initialize()
    content = _checkpoint(first, fold)
    native.plain_network(trainer.network).load_state_dict(content["network_weights"])
    trainer.inference_allowed_mirroring_axes = content["inference_allowed_mirroring_axes"]
    return trainer


def _checkpoint(first: FirstStage, fold: str) -> dict[str, Any]:
    path = first.model / f"fold_{fold}" / native.CHECKPOINT
    try:
        return native.load_checkpoint(torch, path)
    except native.BAD_CHECKPOINT as error:
        raise FednnunetError(Code.FIRST_STAGE_MISSING, f"{path} cannot be read: {type(error).__name__}") from error


def _ensemble(
    first: FirstStage, workspace: Workspace, settings: Settings, plans: Mapping[str, Any], control: Control
) -> Any:
    """nnU-Net's predictor over the networks of all folds; one at a time is on the device."""
    trainer = _trainer(first, first.folds[0], workspace, settings, plans, control)
    predictor = nnUNetPredictor(
        perform_everything_on_device=trainer.device.type == "cuda", device=trainer.device, allow_tqdm=False
    )
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predictor.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        [_checkpoint(first, fold)["network_weights"] for fold in first.folds],
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    return predictor


@contextlib.contextmanager
def _results_elsewhere(workspace: Workspace) -> Iterator[Path]:
    """Let nnU-Net write its results into a folder that is thrown away afterwards."""
    folder = files.beside(workspace.root / "first_stage_results")
    shutil.rmtree(folder, ignore_errors=True)
    with files.disk_errors(folder):
        folder.mkdir(parents=True)
    workspace.enter()
    os.environ.update(nnUNet_results=str(folder))
    try:
        yield folder
    finally:
        workspace.enter()
        shutil.rmtree(folder, ignore_errors=True)


def _digest(name: str, case: Case) -> str:
    """Of a case and its images as they lie on the disk, by size and time of change."""
    listing = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in case.images]
    return files.sha256_json([name, listing])[:16]
