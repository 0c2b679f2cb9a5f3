"""Keeps supernode, link and worker alive, and metrics where asked for: one container, one tree of processes.

The link and the supernode hold the site's key and the network; the worker holds the data and the device. Hardened, a
site starts `--role link` and `--role worker` as two containers that share the spool and nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from appliance import start_checks
from appliance.settings import Settings
from appliance.start_checks import Role
from federation.logs import Shown
from federation.processes import LEAN, Child, Lock, Supervisor, check_port, free_port, own_folders, stop_on_signals


def children(settings: Settings, config: Path | None, role: Role) -> list[Child]:
    """The processes of a role, in the order of their start."""
    logs = settings.state / "logs"
    arguments = ["--config", str(config)] if config is not None else []
    found: list[Child] = []
    if role in ("all", "link"):
        port = settings.supernode_port or free_port()
        for name in ("supernode", "link"):
            command = [sys.executable, "-m", "appliance.link", name, "--runtime-port", str(port), *arguments]
            found.append(Child(name, command, logs / f"{name}.log", dict(LEAN)))
        if settings.metrics_port:
            command = [sys.executable, "-m", "appliance.link", "metrics", *arguments]
            found.append(Child("metrics", command, logs / "metrics.log", dict(LEAN)))
    if role in ("all", "worker"):
        found.append(Child("worker", [sys.executable, "-m", "appliance.worker", *arguments], logs / "worker.log"))
    return found


def run(settings: Settings, config: Path | None, role: Role, shown: Shown | None = None) -> None:
    """Check, start, keep alive until SIGTERM or SIGINT; raises FNU-703 when a process cannot be kept alive."""
    stopped = stop_on_signals()
    start_checks.check(settings, role)
    folder = settings.state / f"role-{role}"
    lock = Lock(folder)
    try:
        if role != "worker" and settings.supernode_port:  # after the lock: whoever holds both is told as FNU-705
            check_port("127.0.0.1", settings.supernode_port)
        if role != "worker" and settings.metrics_port:
            check_port(settings.metrics_host, settings.metrics_port)
        os.environ.update(own_folders(settings.state, folder))
        Supervisor(children(settings, config, role), status=folder, shown=shown).run(stopped)
    finally:
        lock.release()
