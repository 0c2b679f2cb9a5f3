"""How long one training iteration takes on this device, and how much memory.

In a child process (appliance.worker.trial): nnU-Net's default network (31 M parameters) and its loss on random numbers,
forward, backward and step. On a GPU with the patch and batch that nnU-Net plans for 8 GB; on a CPU with a small patch,
from which a whole one is guessed by its number of voxels. Loading and augmentation are not in it.
"""

from __future__ import annotations

import math

from appliance.doctor import child
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, fail, ok, skipped
from federation.errors import Code, FednnunetError
from federation.processes import is_held

SECONDS = 240.0
FULL = 2 * 128**3
"""Voxels of a batch that nnU-Net plans for 8 GB."""
VALIDATION = 50 / 3
"""An epoch's 50 iterations of online validation, forward only: about a third each."""


def check(context: Context) -> list[Finding]:
    """Train a little, unless the worker is doing so already."""
    if worker_runs(context):
        return [skipped("the appliance is running: its training would be disturbed", "Stop it, then ask again.")]
    try:
        trial = child.ask(context, "training", SECONDS)
    except FednnunetError as error:
        if error.code is Code.DEVICE_MISSING:
            return [fail(error.code, "the device is not there", "See the check device.")]
        raise
    patch, batch, seconds = trial["patch_size"], trial["batch_size"], trial["seconds"]
    epoch = (250 + VALIDATION) * seconds
    voxels = math.prod(patch) * batch
    whole = voxels >= FULL
    if not whole:
        epoch *= FULL / voxels
    said = f"about {epoch / 60:.1f} min" if epoch < 6000 else f"about {epoch / 3600:.1f} h"
    note = "" if whole else ", a guess for the patch of 128 x 128 x 128 and batch of 2 that a GPU would have"
    shape = " x ".join(map(str, patch))
    where = "of the GPU's memory" if trial["device"] == "cuda" else "of memory"
    return [
        ok(
            f"one iteration of the default network: {seconds:.3g} s on {trial['device']} (patch {shape}, "
            f"batch {batch}), {trial['peak_bytes'] / 1e9:.1f} GB {where} at its peak. An epoch of nnU-Net: "
            f"{said} of computing{note}",
            measured={
                "device": trial["device"],
                "seconds_per_iteration": round(seconds, 4),
                "patch_size": shape,
                "batch_size": batch,
                "peak_gb": round(trial["peak_bytes"] / 1e9, 2),
                "epoch_seconds": round(epoch, 1),
            },
        )
    ]


def worker_runs(context: Context) -> bool:
    """Whether an appliance of this state folder runs a worker now."""
    return any(is_held(context.settings.state / f"role-{role}") for role in ("all", "worker"))
