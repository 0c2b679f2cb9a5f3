"""Whether what a supervisor keeps alive is alive: what `appliance health` and `orchestrator health` ask.

Rules:

- A supervisor that has gone holds no lock; one that hangs leaves no sign of life in `status.json`; a process that is
  down has no pid there. Each is FNU-722, with what was found. Where two roles share a state, what runs is asked.
- No process is looked for by its pid: it may live in another container.
- Cheap, and it writes nothing: a container asks every few seconds, on a full disk too.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import files
from federation.errors import Code, FednnunetError
from federation.processes import STATUS, is_held

PATIENCE = 15.0  # seconds without a sign of life


@dataclass(frozen=True)
class Health:
    """How one process is.

    Attributes
    ----------
    name : str
        The process.
    pid : int or None
        None while it is down.
    restarts : int
        Since the supervisor started.
    since : str
        Start of this life, ISO 8601.
    """

    name: str
    pid: int | None
    restarts: int
    since: str


def ask(folders: Sequence[Path]) -> list[Health]:
    """The processes of the supervisors that hold these folders' locks; raises FNU-722 when not all of them run.

    Parameters
    ----------
    folders : sequence of Path
        Where a supervisor may have its lock and its status. One must run; what never ran is passed over.
    """
    there = [folder for folder in folders if (folder / STATUS).is_file() and is_held(folder)]
    if not there:
        raise FednnunetError(Code.NOT_RUNNING, "no supervisor runs", "Start it; its log says why it ended.")
    found: list[Health] = []
    for folder in there:
        path = folder / STATUS
        silent = time.time() - path.stat().st_mtime
        if silent > PATIENCE:
            raise FednnunetError(Code.NOT_RUNNING, f"the supervisor has not looked for {silent:.0f} s")
        found += [_health(state) for state in files.read_json(path)["processes"]]
    down = [process for process in found if process.pid is None]
    if down:
        said = ", ".join(f"{process.name} (restarted {process.restarts} times)" for process in down)
        raise FednnunetError(Code.NOT_RUNNING, f"down: {said}")
    return found


def table(found: Sequence[Health]) -> list[str]:
    """One line for each process, TAB between: name, pid, restarts, since."""
    return ["\t".join((each.name, str(each.pid), f"{each.restarts} restarts", each.since)) for each in found]


def _health(state: dict[str, Any]) -> Health:
    since = dt.datetime.fromtimestamp(state["since"], dt.UTC).isoformat(timespec="seconds")
    return Health(state["name"], state["pid"], state["restarts"], since)
