"""What a check may look at: the site's settings, the study where one is given, and the machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from appliance.settings import Settings
from federation.study import Study


@dataclass(frozen=True)
class Machine:
    """Where the facts of the machine are read; another one stands in for a machine that is not at hand."""

    shared_memory: Path = Path("/dev/shm")  # noqa: S108
    meminfo: Path = Path("/proc/meminfo")
    cgroup: Path = Path("/sys/fs/cgroup")
    own_cgroup: Path = Path("/proc/self/cgroup")
    devices: Path = Path("/dev")
    free_bytes: Callable[[Path], int] = field(default=lambda folder: shutil.disk_usage(folder).free)


@dataclass(frozen=True)
class Context:
    """What every check is given.

    Attributes
    ----------
    settings : Settings
        The site's.
    config : Path, optional
        site.toml, where there is one.
    study : Study, optional
        The study that the site is to take part in.
    machine : Machine
        This machine.
    timeout : float
        Seconds that one step on the network may take.
    """

    settings: Settings
    config: Path | None = None
    study: Study | None = None
    machine: Machine = field(default_factory=Machine)
    timeout: float = 6.0
