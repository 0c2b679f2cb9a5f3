"""Whether there is room for what a study writes below `state`.

An estimate: nnU-Net's preprocessed cases are float32, compressed, at the plan's spacing; three times the bytes of the
raw dataset is more than we have seen for .nii.gz, and images stored without compression take less. 3 GB are added for
weights, states between rounds, checkpoints and logs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Number, Private, fail, ok, warn
from federation.errors import Code

FACTOR, FIXED, LEAST = 3, 3e9, 1e9
SECONDS = 20.0


def check(context: Context) -> list[Finding]:
    """Compare what is free with the estimate."""
    state = context.settings.state
    place = existing(state)
    free = context.machine.free_bytes(place)
    raw, whole = dataset_bytes(context.settings.data)
    wanted = FACTOR * raw + FIXED
    private = {"state": Private("the state folder", str(state))}
    of = f"the dataset's {raw / 1e9:.2g} GB{'' if whole else ' or more'}" if raw else "a dataset that was not found"
    found = f"{free / 1e9:.1f} GB free for [state]; {wanted / 1e9:.1f} GB are a safe guess from {of}"
    measured: dict[str, Number] = {
        "free_gb": round(free / 1e9, 2),
        "dataset_gb": round(raw / 1e9, 3),
        "wanted_gb": round(wanted / 1e9, 2),
    }
    advice = "Free space, or mount a larger disk as [state]."
    if free < LEAST + raw:
        return [fail(Code.DISK_SMALL, found, advice, private=private, measured=measured)]
    if free < wanted:
        return [warn(found, advice, Code.DISK_SMALL, private=private, measured=measured)]
    return [ok(found, private=private, measured=measured)]


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_dir():
            return place
    return Path("/")


def dataset_bytes(data: Path) -> tuple[int, bool]:
    """Bytes of the files below a folder, and whether all were seen in time."""
    total, end = 0, time.monotonic() + SECONDS
    for folder, _, names in os.walk(data):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:
                continue
        if time.monotonic() > end:
            return total, False
    return total, True
