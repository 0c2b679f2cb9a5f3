"""Keeps supernode, link and worker alive: one container, three processes.

The link and the supernode hold the site's key and the network; the worker holds the data and the device. Hardened, a
site starts `--role link` and `--role worker` as two containers that share the spool and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from appliance.link import policy
from appliance.settings import Settings
from federation import signing
from federation.errors import Code, FednnunetError
from federation.processes import LEAN, Child, Lock, Supervisor, check_port, check_room, free_port, stop_on_signals

Role = Literal["all", "link", "worker"]


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
    if role in ("all", "worker"):
        found.append(Child("worker", [sys.executable, "-m", "appliance.worker", *arguments], logs / "worker.log"))
    return found


def check(settings: Settings, role: Role) -> None:
    """Raise a numbered error for what would make the start fail: missing files, a read-only state, a taken port."""
    if role in ("all", "link"):
        for path, what in (
            (settings.ca_certificate, "ca_certificate"),
            (settings.coordinator_key, "coordinator_key"),
            (settings.site_key, "site_key"),
        ):
            if not path.is_file():
                raise FednnunetError(
                    Code.STATE_NOT_READY,
                    f"{what} {path} is missing",
                    "Run `appliance enroll` with the coordinator's invitation.",
                )
        signing.load_public(settings.coordinator_key.read_bytes(), str(settings.coordinator_key))
        policy.load(settings.policy)
        if settings.supernode_port:
            check_port("127.0.0.1", settings.supernode_port)
    if role in ("all", "worker") and not settings.data.is_dir():
        raise FednnunetError(Code.DATASET_JSON_MISSING, f"data {settings.data} is not a folder")
    check_room(settings.state)


def run(settings: Settings, config: Path | None, role: Role) -> None:
    """Check, start, keep alive until SIGTERM or SIGINT; raises FNU-703 when a process cannot be kept alive."""
    stopped = stop_on_signals()
    lock = Lock(settings.state / f"role-{role}")
    try:
        check(settings, role)
        Supervisor(children(settings, config, role)).run(stopped)
    finally:
        lock.release()
