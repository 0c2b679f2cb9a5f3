"""The two stages of a cascade: which finished study of 3d_lowres a study of 3d_cascade_fullres may start from.

Rules:

- The first stage is done and has one model for all sites, with fold 0-4 or all: nnU-Net's cascade needs a prediction
  for every training case.
- Every site of the cascade took part in it: its model lies there already, and nothing of it travels again.
- The cascade is trained with the first stage's own plans: they are taken over, not made again.
"""

from __future__ import annotations

from pathlib import Path

from federation import files
from federation.errors import Code, FednnunetError
from federation.study import LOWRES, Study
from federation.tasks import Plan
from orchestrator import finished
from orchestrator.finished import Finished

PLANNING = (
    "dataset",
    "channel_names",
    "labels",
    "regions_class_order",
    "file_ending",
    "overwrite_image_reader_writer",
    "fingerprint_min_cases",
    "planner",
    "gpu_memory_target",
    "overwrite_target_spacing",
    "plans_name",
)
"""What two studies must agree on to be made with the same plans."""
MOST_NAMED = 3


def first_stage(study: Study, studies: Path) -> Finished | None:
    """The finished first stage of a cascade study; None where the study has none.

    Parameters
    ----------
    studies : Path
        The orchestrator's folder of studies.

    Raises
    ------
    FednnunetError
        FNU-311, with everything that does not fit.
    """
    if study.previous_stage is None:
        return None
    folder = studies / study.previous_stage
    found = finished.load(folder)
    if found is None:
        what = "is not done" if (folder / "study.json").exists() else "is not known here"
        raise FednnunetError(Code.FIRST_STAGE_DIFFERS, f"study {study.previous_stage[:16]} {what} ({folder})")
    faults = _faults(found, study)
    if faults:
        raise FednnunetError(Code.FIRST_STAGE_DIFFERS, f"study {found.study.name}: {'; '.join(faults)}")
    return found


def plan_of_first_stage(study: Study, studies: Path) -> Plan | None:
    """The plan that a cascade study takes over; None where the study plans for itself. Raises FNU-302, FNU-311."""
    first = first_stage(study, studies)
    if first is None:
        return None
    plan = Plan.model_validate_json((first.folder / "plan.json").read_bytes())
    if not plan.plans_sha256 == first.plans_sha256 == files.sha256_json(plan.plans):
        raise FednnunetError(Code.PLANS_HASH, f"{first.folder / 'plan.json'} is not what its study had planned")
    return plan


def newest(studies: Path, study: Study) -> Finished:
    """The newest first stage that fits a cascade study, whatever it names, with the same trainer. Raises FNU-122."""
    others = []
    for found in reversed(finished.load_all(studies)):
        faults = _faults(found, study)
        if found.study.trainer != study.trainer:
            faults.append(f"trainer is {found.study.trainer}, not {study.trainer}")
        if not faults:
            return found
        others.append(f"\n  {found.study.id[:16]}  {found.study.name}: {'; '.join(faults)}")
    raise FednnunetError(Code.FIRST_STAGE_NOT_TRAINED, f"none in {studies}{''.join(others[:MOST_NAMED])}")


def _faults(first: Finished, study: Study) -> list[str]:
    """Why a study cannot be the first stage of another."""
    other = first.study
    faults = []
    if other.configuration != LOWRES:
        faults.append(f"configuration {other.configuration} is not {LOWRES}")
    if other.fold not in ("0-4", "all"):
        faults.append(f"fold {other.fold} predicts a part of the cases alone")
    if first.exported is None or not other.one_model:
        faults.append("it ended without one model for all sites")
    for field in PLANNING:
        its, wanted = getattr(other, field), getattr(study, field)
        if its != wanted:
            faults.append(f"{field} is {its}, not {wanted}")
    absent = sorted(set(study.sites) - set(other.sites))
    if absent:
        faults.append(f"{', '.join(absent)} took no part in it")
    return faults
