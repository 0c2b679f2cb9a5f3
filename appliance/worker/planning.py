"""The site's own plan, from its own fingerprint (AsymFedAvg): neither leaves the site.

What leaves is `tasks.Network`: the network's class and arguments, patch size, spacing and batch size. The orchestrator
needs the first to know which layers the sites share, and people want to compare the others.
"""

from __future__ import annotations

import shutil

from appliance.worker.dataset import Examination
from appliance.worker.workspace import Workspace
from federation import files, planners, tasks
from federation.errors import Code, FednnunetError
from federation.fingerprint import to_nnunet
from federation.plans import check_plans


def own_plan(workspace: Workspace, examination: Examination) -> tasks.Plan:
    """Plan this site's dataset alone, as nnU-Net would.

    Raises
    ------
    FednnunetError
        FNU-222: no case has foreground. FNU-301: nnU-Net could not plan. FNU-303, 305: the plans lack the study's
        configuration (2D images in a 3D study), or cannot be used.
    """
    study = workspace.study
    folder = workspace.root / "planning"
    with files.disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    fingerprint = to_nnunet(examination.fingerprint(1))
    dataset_json = study.dataset_json(len(examination.cases))
    try:
        plans = planners.make_plans(study, fingerprint, dataset_json, folder)
    except (FednnunetError, MemoryError, OSError):
        raise
    except (Exception, SystemExit) as error:
        raise FednnunetError(Code.PLANNING_FAILED, repr(error)) from error
    check_plans(plans, study)
    return tasks.Plan(plans=plans, plans_sha256=files.sha256_json(plans), dataset_json=dataset_json)


def network(plan: tasks.Plan, configuration: str) -> tasks.Network:
    """What the site tells of its plan."""
    chosen = plan.plans["configurations"][configuration]
    return tasks.Network(
        plans_name=plan.plans["plans_name"],
        architecture=chosen["architecture"],
        patch_size=chosen["patch_size"],
        spacing=chosen["spacing"],
        batch_size=chosen["batch_size"],
    )
