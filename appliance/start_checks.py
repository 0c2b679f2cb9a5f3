"""What would make a start fail, or make it unsafe: told by number before any process runs.

Rules:

- Every fault is told, so that one start shows all that is to be mended; the last one gives the exit status.
- Each half is asked for what it needs: the link for its keys and the policy, the worker for data and shared memory.
- `strict_mounts`, which the image sets, adds what a plain machine may do and a container must not: run as root, see
  data that could be written, go without shared memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from appliance.doctor.context import Machine
from appliance.doctor.shared_memory import LEAST
from appliance.link import policy
from appliance.settings import Settings
from federation import console, keypairs
from federation.errors import Code, FednnunetError
from federation.processes import check_room

Role = Literal["all", "link", "worker"]
ENROLL = "Run `appliance enroll` with the coordinator's invitation."


def check(settings: Settings, role: Role, machine: Machine | None = None) -> None:
    """Tell every fault; raises the last one.

    Parameters
    ----------
    settings : Settings
        The site's.
    role : str
        Which half is to run here, or all.
    machine : Machine, optional
        Where the machine's facts are read.
    """
    found = list(faults(settings, role, machine or Machine()))
    for error in found[:-1]:
        console.show(error)
    if found:
        raise found[-1]


def faults(settings: Settings, role: Role, machine: Machine) -> Iterator[FednnunetError]:
    """The faults, in the order in which they are best mended."""
    if settings.strict_mounts and os.geteuid() == 0:
        yield FednnunetError(
            Code.RUNS_AS_ROOT, "uid 0", "Leave out --user: the image has its own (10001), or name an ordinary one."
        )
    yield from _caught(lambda: _check_state(settings.state))
    if role in ("all", "link"):
        yield from _keys(settings)
        yield from _caught(lambda: policy.load(settings.policy))
    if role in ("all", "worker"):
        yield from _data(settings)
        if settings.strict_mounts and settings.augmentation_processes != 0:
            yield from _shared_memory(machine.shared_memory)


def _caught(step: Callable[[], object]) -> Iterator[FednnunetError]:
    try:
        step()
    except FednnunetError as error:
        yield error


def _check_state(state: Path) -> None:
    if state.is_dir() and not os.access(state, os.W_OK | os.X_OK):
        raise FednnunetError(
            Code.DISK_FULL,
            f"state {state} belongs to uid {state.stat().st_uid} and cannot be written by uid {os.geteuid()}",
            f"On the host: chown -R {os.geteuid()}:{os.getegid()} FOLDER, and mount it without :ro.",
        )
    check_room(state)


def _keys(settings: Settings) -> Iterator[FednnunetError]:
    for path, what in (
        (settings.ca_certificate, "ca_certificate"),
        (settings.coordinator_key, "coordinator_key"),
        (settings.site_key, "site_key"),
    ):
        if (path.parent.is_dir() and not os.access(path.parent, os.X_OK)) or (
            path.is_file() and not os.access(path, os.R_OK)
        ):
            code = Code.KEY_UNUSABLE if path == settings.site_key else Code.MOUNT_UNREADABLE
            advice = f"Let uid {os.geteuid()} read it: on the host, chown -R {os.geteuid()}:{os.getegid()} CONFIG."
            yield FednnunetError(code, f"{what} {path} cannot be read by uid {os.geteuid()}", advice)
        elif not path.is_file():
            yield FednnunetError(Code.STATE_NOT_READY, f"{what} {path} is missing", ENROLL)
        elif path == settings.coordinator_key:
            yield from _caught(lambda: keypairs.load_public(path.read_bytes(), str(path)))  # noqa: B023 - called at once


def _data(settings: Settings) -> Iterator[FednnunetError]:
    data = settings.data
    if not data.is_dir():
        yield FednnunetError(
            Code.DATASET_JSON_MISSING, f"data {data} is not a folder", "Mount it: -v /where/it/lies:/data:ro."
        )
    elif not os.access(data, os.R_OK | os.X_OK):
        yield FednnunetError(
            Code.MOUNT_UNREADABLE, f"data {data} cannot be read by uid {os.geteuid()}", "Let this user read all in it."
        )
    elif not any(data.iterdir()):
        yield FednnunetError(
            Code.DATASET_JSON_MISSING, f"data {data} is empty", "Mount the dataset: -v /where/it/lies:/data:ro."
        )
    elif settings.strict_mounts and _mounted_writable(data):
        yield FednnunetError(
            Code.DATA_WRITABLE,
            f"data {data}",
            "Mount it read-only (-v /where/it/lies:/data:ro), so that nothing in the container can change it.",
        )


def _mounted_writable(data: Path) -> bool:
    """Whether the mount of the data lets anybody write, whatever the permissions of its files say."""
    return not os.statvfs(data).f_flag & os.ST_RDONLY


def _shared_memory(folder: Path) -> Iterator[FednnunetError]:
    size = os.statvfs(folder).f_frsize * os.statvfs(folder).f_blocks if folder.is_dir() else 0
    if size < LEAST:
        yield FednnunetError(Code.SHARED_MEMORY_SMALL, f"{folder}: {size / 1e6:.0f} MB, {LEAST / 1e6:.0f} are needed")
