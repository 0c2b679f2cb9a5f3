"""Whether /dev/shm is large enough: nnU-Net's loader processes hand their batches over through it.

A batch of the default network (two patches of 128 x 128 x 128, image and label) takes about 35 MB, and about a dozen
wait for the GPU. Docker gives a container 64 MB, with which torch is ended by SIGBUS in the middle of an epoch.
"""

from __future__ import annotations

import os

from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Number, fail, ok, skipped, warn
from federation.errors import Code

LEAST, ENOUGH = 500e6, 2e9


def check(context: Context) -> list[Finding]:
    """Compare its size with the bounds."""
    folder = context.machine.shared_memory
    if not folder.is_dir():
        return [skipped("this system has no /dev/shm")]
    status = os.statvfs(folder)
    return [judge(context, status.f_frsize * status.f_blocks, status.f_frsize * status.f_bavail)]


def judge(context: Context, total: int, free: int) -> Finding:
    """The finding for a size in bytes."""
    found = f"shared memory (/dev/shm) has {free / 1e9:.2g} of {total / 1e9:.2g} GB free"
    measured: dict[str, Number] = {"total_gb": round(total / 1e9, 3), "free_gb": round(free / 1e9, 3)}
    advice = "Start the container with --shm-size=8g or --ipc=host, or set augmentation_processes = 0 in site.toml."
    if context.settings.augmentation_processes == 0:
        return ok(f"{found}; not needed with augmentation_processes = 0", measured=measured)
    if free < LEAST:
        return fail(Code.SHARED_MEMORY_SMALL, f"{found}; {LEAST / 1e9:g} GB are needed", advice, measured=measured)
    if free < ENOUGH:
        return warn(f"{found}; {ENOUGH / 1e9:g} GB are safe", advice, Code.SHARED_MEMORY_SMALL, measured=measured)
    return ok(found, measured=measured)
