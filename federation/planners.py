"""nnU-Net's planners, at the orchestrator for a pooled fingerprint (FFE) and at a site for its own (AsymFedAvg).

Rules:

- nnU-Net's own planner classes plan; nothing of theirs is copied or patched. They see a stub dataset: a dataset.json
  and a dataset_fingerprint.json, and no image.
- The same fingerprint and study give the same plans, byte for byte, on any machine: no GPU is asked, and networks are
  built on torch's `meta` device, where they take no memory.
- torch and nnU-Net are imported when something is planned, not before.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation import files
from federation.study import READER_2D, Study, readers_of

if TYPE_CHECKING:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

RAW, PREPROCESSED = "nnUNet_raw", "nnUNet_preprocessed"
STUB = {"stub": {"images": ["-"], "label": "-"}}
"""Satisfies the planner's look for a training case; never shipped."""
SMALL_PATCH_3D, SMALL_PATCH_2D = 24, 128
SMALL_BATCH_3D, SMALL_BATCH_2D = 2, 4


def make_plans(
    study: Study, fingerprint: Mapping[str, Any], dataset_json: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Plan in this process.

    Parameters
    ----------
    study : Study
        Planner, gpu_memory_target, overwrite_target_spacing and plans_name are honoured.
    fingerprint : Mapping
        nnU-Net's dataset_fingerprint.json.
    dataset_json : Mapping
        nnU-Net's dataset.json; its numTraining limits the batch size.
    folder : Path
        An empty work folder.

    Returns
    -------
    dict
        nnU-Net's plans, keys in nnU-Net's order.
    """
    raw, preprocessed = folder / RAW, folder / PREPROCESSED
    two_dimensional = all(shape[0] == 1 for shape in fingerprint["shapes_after_crop"])
    stub = dict(
        dataset_json,
        dataset=STUB,
        overwrite_image_reader_writer=study.overwrite_image_reader_writer
        or _reader_name(study.file_ending, two_dimensional),
    )
    files.write_json(raw / study.dataset / "dataset.json", stub)
    files.write_json(preprocessed / study.dataset / "dataset_fingerprint.json", dict(fingerprint))
    chosen: dict[str, Any] = {}
    if study.gpu_memory_target is not None:
        chosen["gpu_memory_target_in_gb"] = study.gpu_memory_target
    if study.plans_name is not None:
        chosen["plans_name"] = study.plans_name
    if study.overwrite_target_spacing is not None:
        chosen["overwrite_target_spacing"] = [float(value) for value in study.overwrite_target_spacing]

    with _environment(nnUNet_raw=str(raw), nnUNet_preprocessed=str(preprocessed), nnUNet_n_proc_DA="1"):
        import torch

        planner = planner_class(study.planner)(study.dataset, **chosen)
        with torch.device("meta"):  # the planner builds networks to measure them, never to run them
            planner.plan_experiment()
    plans: dict[str, Any] = json.loads((preprocessed / study.dataset / f"{planner.plans_identifier}.json").read_bytes())
    return plans


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """nnU-Net's variables, for as long as it plans (0 augmentation processes, which a worker may use, crash it)."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def planner_class(name: str) -> type[ExperimentPlanner]:
    """The planner of this name (federation.study.PLANNERS); imports nnU-Net and torch.

    `SmallUNetPlanner` is ours, for demonstrations and tests on a CPU, and not for patients: 8 features in the first
    stage, at most 32, one convolution in a stage; patches of at most 24 voxels along an axis in 3D (batch 2) and 128
    pixels in 2D (batch 4), where nnU-Net would fill the GPU. Spacing, resampling, normalisation and the rule
    for 3d_lowres are nnU-Net's own.

    Raises
    ------
    KeyError
        No such planner.
    """
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
        residual_encoder_unet_planners as residual,
    )

    class SmallUNetPlanner(ExperimentPlanner):
        """nnU-Net's planner with a small network; see `planner_class`."""

        def __init__(
            self,
            dataset_name_or_id: str | int,
            gpu_memory_target_in_gb: float = 8,
            preprocessor_name: str = "DefaultPreprocessor",
            plans_name: str = "nnUNetSmallPlans",
            overwrite_target_spacing: list[float] | None = None,
            suppress_transpose: bool = False,
        ) -> None:
            super().__init__(
                dataset_name_or_id,
                gpu_memory_target_in_gb,
                preprocessor_name,
                plans_name,
                overwrite_target_spacing,
                suppress_transpose,
            )
            self.UNet_base_num_features = 8
            self.UNet_max_features_2d = self.UNet_max_features_3d = 32
            self.UNet_blocks_per_stage_encoder = (1,) * 14
            self.UNet_blocks_per_stage_decoder = (1,) * 13

        def get_plans_for_configuration(
            self,
            spacing: Any,
            median_shape: Any,
            data_identifier: str,
            approximate_n_voxels_dataset: float,
            _cache: Any,
        ) -> dict[str, Any]:
            largest = SMALL_PATCH_3D if len(spacing) == 3 else SMALL_PATCH_2D
            capped = [min(size, largest) for size in median_shape]  # the patch starts from the median shape
            result: dict[str, Any] = super().get_plans_for_configuration(
                spacing, capped, data_identifier, approximate_n_voxels_dataset, _cache
            )
            result["median_image_size_in_voxels"] = median_shape
            result["batch_size"] = SMALL_BATCH_3D if len(spacing) == 3 else SMALL_BATCH_2D
            return result

    planners: dict[str, type[ExperimentPlanner]] = {
        "ExperimentPlanner": ExperimentPlanner,
        "nnUNetPlannerResEncM": residual.nnUNetPlannerResEncM,
        "nnUNetPlannerResEncL": residual.nnUNetPlannerResEncL,
        "nnUNetPlannerResEncXL": residual.nnUNetPlannerResEncXL,
        "SmallUNetPlanner": SmallUNetPlanner,
    }
    return planners[name]


def _reader_name(file_ending: str, two_dimensional: bool) -> str:
    """The reader that nnU-Net chooses for images with this ending: the first in its list that reads them."""
    fitting = readers_of(file_ending)
    if not two_dimensional:
        fitting = [reader for reader in fitting if reader != READER_2D] or fitting
    if not fitting:
        raise SystemExit(f"nnU-Net has no reader for {file_ending}")
    return fitting[0]
