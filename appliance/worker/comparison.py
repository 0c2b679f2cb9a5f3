"""Did it help us? The site's own training, and the global model personalised, beside the global model, on its cases.

Rules:

- `local` begins with the weights that the federation began with, takes the same plans, trainer, seeds and number of
  epochs, and sees this site's cases alone.
- `personalised` goes on from the final global model for `personalise_epochs` on this site's cases, with a tenth of the
  trainer's learning rate, which falls from there as the trainer's does. A model that is trained is not warmed up again:
  `nnUNetTrainer_warmup` would end after ten epochs of fifty at a fiftieth of its rate.
- Both are judged as Validate judges the global model: same cases, same predictor, same metrics.
- Each epoch is kept, so that a worker that is killed goes on; what is done is not done again, unless a later version
  wrote its scores in a form that this one cannot read.
- What leaves are means, deviations, minima and numbers of cases. Scores of cases, distances and predictions stay.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from appliance.settings import Settings
from appliance.worker import validation
from appliance.worker.dataset import Case
from appliance.worker.training import FoldTrainer
from appliance.worker.workspace import Control, Workspace
from federation import files, native, tasks

LOCAL, PERSONALISED = "local", "personalised"
PERSONAL_STEP = 0.1
DONE = "done.json"


@dataclass(frozen=True)
class Variant(Workspace):
    """A workspace whose results and states are its own, over the data and plans of the study's.

    Attributes
    ----------
    study : Study
        The study as this variant trains it: a round is an epoch, nothing is kept from the round's weights.
    origin : Workspace
        The study's workspace.
    name : str
        `local` or `personalised`.
    """

    origin: Workspace
    name: str

    @property
    def root(self) -> Path:
        """The study's folder."""
        return self.origin.root

    @property
    def own(self) -> Path:
        """What this variant writes."""
        return self.root / "comparison" / self.name

    @property
    def results(self) -> Path:
        """nnU-Net's results folder of this variant."""
        return self.own / "nnUNet_results" / self.study.dataset

    def state(self, fold: str) -> Path:
        """What must survive the worker between two epochs."""
        return self.own / "state" / f"fold_{fold}"

    def weights(self, fold: str, number: int) -> Path:
        """The weights after an epoch; 0: those it begins with."""
        return self.state(fold) / "weights" / f"{number:06d}.safetensors"

    def done(self, fold: str) -> Path:
        """The scores, once they are there."""
        return self.own / f"fold_{fold}" / DONE


def variants(workspace: Workspace) -> tuple[Variant, Variant]:
    """The two trainings that the global model is compared with."""
    study = workspace.study
    as_one = {"wire": "full", "keep_local": [], "proximal_mu": 0.0, "momentum": "keep", "epochs_per_round": 1}
    alone = study.model_copy(update={**as_one, "rounds": study.rounds * study.epochs_per_round})
    personal = study.model_copy(update={**as_one, "rounds": study.personalise_epochs})
    return (
        Variant(workspace.work, alone, workspace, LOCAL),
        Variant(workspace.work, personal, workspace, PERSONALISED),
    )


def compare(
    workspace: Workspace,
    settings: Settings,
    fold: str,
    plans_sha256: str | None,
    test_cases: Mapping[str, Case],
    control: Control,
) -> tasks.Comparison:
    """Train and judge both variants of one fold, or what is left to do of that.

    Parameters
    ----------
    workspace : Workspace
        The study's workspace, with the finished model of the fold.
    test_cases : Mapping[str, Case]
        The cases of imagesTs with a label in labelsTs, by name.

    Returns
    -------
    tasks.Comparison
        Sums only. Raises whatever training and validation raise.
    """
    started = time.perf_counter()
    local, personalised = variants(workspace)
    final = workspace.model(workspace.plans(plans_sha256)) / f"fold_{fold}" / native.CHECKPOINT

    def from_the_model(network: Any) -> None:
        native.plain_network(network).load_state_dict(native.load_checkpoint(torch, final)["network_weights"])

    scores = [
        _variant(local, settings, fold, plans_sha256, test_cases, control, None, 1.0),
        _variant(personalised, settings, fold, plans_sha256, test_cases, control, from_the_model, PERSONAL_STEP),
    ]
    workspace.enter()
    return tasks.Comparison(local=scores[0], personalised=scores[1], seconds=round(time.perf_counter() - started, 3))


def _variant(
    workspace: Variant,
    settings: Settings,
    fold: str,
    plans_sha256: str | None,
    test_cases: Mapping[str, Case],
    control: Control,
    begin: Callable[[Any], None] | None,
    step: float,
) -> tasks.Validation:
    """Train one variant from where it stands and judge it; its weights are freed afterwards."""
    known = _known(workspace.done(fold))
    if known is not None:
        return known
    told = Control(control.check, lambda text: control.phase(f"{workspace.name}: {text}"))
    trainer = FoldTrainer(workspace, settings, fold, plans_sha256, step, trained=begin is not None)
    try:
        last = _train(workspace, trainer, fold, told, begin)
        report = validation.validate(trainer, last, test_cases, told)
    finally:
        trainer.close()
    files.write_json(workspace.done(fold), report.model_dump(mode="json"))
    shutil.rmtree(workspace.state(fold), ignore_errors=True)
    return report


def _known(path: Path) -> tasks.Validation | None:
    """The scores of a variant that is done; None where there are none that this version can read."""
    if not path.exists():
        return None
    try:
        return tasks.Validation.model_validate_json(path.read_bytes())
    except ValidationError:  # of a later version that was here before: computed anew
        return None


def _train(
    workspace: Variant, trainer: FoldTrainer, fold: str, control: Control, begin: Callable[[Any], None] | None
) -> Path:
    """Epoch after epoch, each from the weights of the one before; returns the last weights."""
    first = workspace.weights(fold, 0)
    if not first.exists():
        if begin is not None:
            begin(trainer.trainer.network)
        network = trainer.trainer.network
        first.parent.mkdir(parents=True, exist_ok=True)
        native.save_weights(network, first, sorted(native.unique_tensors(network)))
    trainer.resume(workspace.study.rounds + 1)
    current = workspace.weights(fold, trainer.round)
    for number in range(trainer.round + 1, workspace.study.rounds + 1):
        following = workspace.weights(fold, number)
        trainer.train(number, current, "", following, control)
        if number >= 2:
            workspace.weights(fold, number - 2).unlink(missing_ok=True)
        current = following
    return current


def hd95(reference: NDArray[np.bool_], prediction: NDArray[np.bool_], spacing: tuple[float, ...]) -> float | None:
    """95th percentile of the distances between two surfaces, in mm, both ways together; None where one is empty.

    As `medpy.metric.binary.hd95` (MedPy 0.5): surface voxels are those that an erosion takes away. Axes of one voxel
    (2D images) do not count.
    """
    flat = tuple(axis for axis, extent in enumerate(reference.shape) if extent == 1)
    reference, prediction = reference.squeeze(flat), prediction.squeeze(flat)
    spacing = tuple(extent for axis, extent in enumerate(spacing) if axis not in flat)
    if not reference.any() or not prediction.any():
        return None
    from scipy.ndimage import binary_erosion, distance_transform_edt

    inside = np.argwhere(reference | prediction)
    low, high = inside.min(axis=0), inside.max(axis=0) + 1
    span = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    surfaces = []
    for mask in (reference[span], prediction[span]):
        padded = np.pad(mask, 1)
        surfaces.append(padded ^ binary_erosion(padded))
    distances = [
        distance_transform_edt(~other, sampling=spacing)[surface] for surface, other in (surfaces, surfaces[::-1])
    ]
    return float(np.percentile(np.concatenate(distances), 95))
