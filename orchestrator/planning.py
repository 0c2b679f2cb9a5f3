"""From the pooled fingerprint to nnU-Net's plans, with no image.

Rules:

- nnU-Net's own planners plan (federation.planners), from the pooled number of cases and the pooled
  dataset_fingerprint.json.
- Planning happens in a child process (``python -m orchestrator.planning FOLDER``), so that the coordinator never
  imports torch. The child gets and gives JSON files in one folder.
- The plans name the federated dataset and hold nothing of a single site.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import files, planners
from federation.errors import Code, FednnunetError
from federation.fingerprint import SiteFingerprint, to_nnunet
from federation.study import Study
from orchestrator.workshop import Workshop, borrowed

REQUEST, ANSWER, LOG = "request.json", "answer.json", "planning.log"


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
    with borrowed(workshop) as place:
        status = place.run("orchestrator.planning", [str(folder)], {}, folder / LOG)
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
    if not log.exists():
        return f"the planner did not start (exit {status}); the coordinator's log says why"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1][-500:] if lines else "no word from it"
    return f"the planner was killed by signal {-status}" if status < 0 else last


# the child process


def warm() -> None:
    """Import what planning needs, before it is asked for."""
    planners.planner_class("ExperimentPlanner")


def main(arguments: Sequence[str]) -> None:
    """The job of the child process: plan what the folder asks for."""
    (folder,) = map(Path, arguments)
    request = files.read_json(folder / REQUEST)
    study = Study.model_validate(request["study"])
    plans = planners.make_plans(study, request["fingerprint"], request["dataset_json"], folder)
    files.write_json(folder / ANSWER, {"plans": plans})
