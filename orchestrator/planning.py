"""From the pooled fingerprint to nnU-Net's plans, with no image.

Rules:

- nnU-Net's own planner classes plan; nothing of theirs is copied or patched. They see a stub dataset: a dataset.json
  with the pooled number of cases and the pooled dataset_fingerprint.json.
- Planning happens in a child process (``python -m orchestrator.planning FOLDER``), so that the coordinator never
  imports torch. The child gets and gives JSON files in one folder.
- The same fingerprint and study give the same plans, byte for byte, on any machine: no GPU is asked, and networks are
  built on torch's `meta` device, where they take no memory.
- The plans name the federated dataset and hold nothing of a single site.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from federation import files
from federation.errors import Code, FednnunetError
from federation.fingerprint import SiteFingerprint, to_nnunet
from federation.study import Study
from orchestrator.workshop import Workshop, borrowed

if TYPE_CHECKING:
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

REQUEST, ANSWER, LOG = "request.json", "answer.json", "planning.log"
RAW, PREPROCESSED = "nnUNet_raw", "nnUNet_preprocessed"
STUB = {"stub": {"images": ["-"], "label": "-"}}
"""Satisfies the planner's look for a training case; never shipped."""
SMALL_PATCH_3D, SMALL_PATCH_2D = 24, 128
SMALL_BATCH_3D, SMALL_BATCH_2D = 2, 4


@dataclass(frozen=True)
class PlannedStudy:
    """nnU-Net's plans for a study, their hash, and the pooled dataset.json that goes with them."""

    plans: dict[str, Any]
    plans_sha256: str
    dataset_json: dict[str, Any]


def plan(pooled: SiteFingerprint, study: Study, folder: Path, workshop: Workshop | None = None) -> PlannedStudy:
    """Plan a study from its pooled fingerprint, in a child process.

    Parameters
    ----------
    pooled : SiteFingerprint
        The sites' fingerprints, merged.
    study : Study
        Planner, gpu_memory_target, overwrite_target_spacing and plans_name are honoured.
    folder : Path
        Work folder; what lies in it is replaced. It keeps the request, nnU-Net's files and the log.
    workshop : Workshop, optional
        Where the child process runs; one is opened for this alone otherwise.

    Returns
    -------
    PlannedStudy
        `plans_sha256` is that of the canonical JSON (federation.files.sha256_json).

    Raises
    ------
    FednnunetError
        FNU-222: no site has foreground. FNU-301: nnU-Net could not plan. FNU-303: the study's configuration is not
        among those planned, and the study goes beyond planning.
    """
    fingerprint = to_nnunet(pooled)
    dataset_json = study.dataset_json(pooled.n_cases)
    with files.disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    request = {"study": study.model_dump(mode="json"), "fingerprint": fingerprint, "dataset_json": dataset_json}
    files.write_json(folder / REQUEST, request)
    environment = {"nnUNet_raw": str(folder / RAW), "nnUNet_preprocessed": str(folder / PREPROCESSED)}
    with borrowed(workshop) as place:
        status = place.run("orchestrator.planning", [str(folder)], environment, folder / LOG)
    if status != 0 or not (folder / ANSWER).exists():
        raise FednnunetError(Code.PLANNING_FAILED, f"{_reason(folder / LOG, status)} (log: {folder / LOG})")
    plans: dict[str, Any] = files.read_json(folder / ANSWER)["plans"]
    if study.stop_after in ("prepare", "finish"):
        require_configuration(plans, study.configuration)
    return PlannedStudy(plans=plans, plans_sha256=files.sha256_json(plans), dataset_json=dataset_json)


def require_configuration(plans: dict[str, Any], configuration: str) -> None:
    """Raise FNU-303, naming the planned configurations, where the plans lack this one."""
    planned = plans["configurations"]
    if configuration not in planned:
        reason = ""
        if configuration == "3d_lowres":
            reason = "; nnU-Net plans 3d_lowres only where a patch covers less than a quarter of the median image"
        elif configuration.startswith("3d"):
            reason = "; the images are two-dimensional"
        raise FednnunetError(
            Code.CONFIGURATION_MISSING,
            f"{configuration} was not planned, only {', '.join(sorted(planned))}{reason}",
        )


def describe(plans: dict[str, Any]) -> str:
    """A few lines for people: for each configuration patch, spacing, batch and stages, and the planner's name."""
    lines = [f"{plans['plans_name']} by {plans['experiment_planner_used']} for {plans['dataset_name']}"]
    for name, configuration in sorted(plans["configurations"].items()):
        if "patch_size" not in configuration:
            lines.append(f"  {name}: follows {configuration['inherits_from']}")
            continue
        arguments = configuration["architecture"]["arch_kwargs"]
        spacing = " x ".join(f"{value:.4g}" for value in configuration["spacing"])
        median = " x ".join(f"{value:.4g}" for value in configuration["median_image_size_in_voxels"])
        lines.append(
            f"  {name}: patch {' x '.join(map(str, configuration['patch_size']))}, spacing {spacing} mm, "
            f"median image {median}, batch {configuration['batch_size']}, {arguments['n_stages']} stages of "
            f"{'/'.join(map(str, arguments['features_per_stage']))} features, "
            f"{', '.join(configuration['normalization_schemes'])}"
        )
    return "\n".join(lines)


def _reason(log: Path, status: int) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][-500:] if lines else "no word from it"
    return f"the planner was killed by signal {-status}" if status < 0 else last


# the child process


def planner_class(name: str) -> type[ExperimentPlanner]:
    """The planner of this name (federation.study.PLANNERS); imports nnU-Net and torch.

    `SmallUNetPlanner` is ours, for demonstrations and tests on a CPU, and not for patients: 8 features in the first
    stage, at most 32, one convolution in a stage; patches of at most 24 voxels along an axis in 3D (batch 2) and 128
    pixels in 2D (batch 4), where nnU-Net would fill the GPU; and no 3d_lowres. Spacing, resampling and normalisation
    are nnU-Net's own.

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
            self.lowres_creation_threshold = 0.0

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
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    fitting = [reader for reader in LIST_OF_IO_CLASSES if file_ending.lower() in reader.supported_file_endings]
    if not two_dimensional:
        fitting = [reader for reader in fitting if reader.__name__ != "NaturalImage2DIO"] or fitting
    if not fitting:
        raise SystemExit(f"nnU-Net has no reader for {file_ending}")
    return str(fitting[0].__name__)


def _plan_here(folder: Path) -> dict[str, Any]:
    """Plan what `folder` asks for, in this process."""
    request = files.read_json(folder / REQUEST)
    study = Study.model_validate(request["study"])
    raw, preprocessed = folder / RAW, folder / PREPROCESSED
    fingerprint = request["fingerprint"]
    two_dimensional = all(shape[0] == 1 for shape in fingerprint["shapes_after_crop"])
    stub = dict(
        request["dataset_json"],
        dataset=STUB,
        overwrite_image_reader_writer=_reader_name(study.file_ending, two_dimensional),
    )
    files.write_json(raw / study.dataset / "dataset.json", stub)
    files.write_json(preprocessed / study.dataset / "dataset_fingerprint.json", fingerprint)
    chosen: dict[str, Any] = {}
    if study.gpu_memory_target is not None:
        chosen["gpu_memory_target_in_gb"] = study.gpu_memory_target
    if study.plans_name is not None:
        chosen["plans_name"] = study.plans_name
    if study.overwrite_target_spacing is not None:
        chosen["overwrite_target_spacing"] = [float(value) for value in study.overwrite_target_spacing]

    import torch

    planner = planner_class(study.planner)(study.dataset, **chosen)
    with torch.device("meta"):  # the planner builds networks to measure them, never to run them
        planner.plan_experiment()
    plans: dict[str, Any] = json.loads((preprocessed / study.dataset / f"{planner.plans_identifier}.json").read_bytes())
    return plans


def warm() -> None:
    """Import what planning needs, before it is asked for."""
    planner_class("ExperimentPlanner")


def main(arguments: Sequence[str]) -> None:
    """The job of the child process: plan what the folder asks for."""
    (folder,) = map(Path, arguments)
    files.write_json(folder / ANSWER, {"plans": _plan_here(folder)})
