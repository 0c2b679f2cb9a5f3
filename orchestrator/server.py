"""The orchestrator's processes: the SuperLink with its two listeners, the coordinator, and metrics where asked for."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from federation.logs import Shown
from federation.processes import LEAN, STATUS, Child, Lock, Supervisor, check_port, own_folders, stop_on_signals
from orchestrator.enrollment.authority import Authority

ROLES = ("superlink", "coordinator")


@dataclass(frozen=True)
class Server:
    """Where the orchestrator keeps its state and listens.

    Attributes
    ----------
    state : Path
        Folder of the authority, the database and the studies.
    fleet_host, fleet_port : str, int
        The hospitals' listener: the only one that hospitals may reach.
    control_host, control_port : str, int
        The control listener: loopback, or the inside of a cluster.
    poll : float
        Seconds between two looks of the coordinator.
    role : str
        superlink or coordinator, each in a container of its own, or all.
    metrics_host, metrics_port : str, int
        Where Prometheus may scrape, beside the coordinator; port 0: nowhere.
    """

    state: Path
    fleet_host: str = "127.0.0.1"
    fleet_port: int = 8443
    control_host: str = "127.0.0.1"
    control_port: int = 8100
    poll: float = 0.5
    role: str = "all"
    metrics_host: str = "127.0.0.1"
    metrics_port: int = 0

    @property
    def authority(self) -> Authority:
        """The authority's files."""
        return Authority(self.state / "authority")

    @property
    def database(self) -> Path:
        """The SuperLink's database."""
        return self.state / "superlink.db"

    def arguments(self) -> list[str]:
        """These settings as command-line arguments of `python -m orchestrator`."""
        return [
            *("--state", str(self.state), "--fleet-host", self.fleet_host, "--fleet-port", str(self.fleet_port)),
            *("--control-host", self.control_host, "--control-port", str(self.control_port)),
            *("--poll", str(self.poll)),
            *("--metrics-host", self.metrics_host, "--metrics-port", str(self.metrics_port)),
        ]

    def children(self) -> list[Child]:
        """The processes of this role, in the order of their start."""
        names = [role for role in ROLES if self.role in ("all", role)]
        if self.metrics_port and self.role != "superlink":
            names.append("metrics")
        return [
            Child(
                name,
                [sys.executable, "-m", "orchestrator", name, *self.arguments()],
                self.state / "logs" / f"{name}.log",
                {"FLWR_HOME": str(self.state / "flower"), **LEAN},
            )
            for name in names
        ]

    @property
    def supervisors(self) -> list[Path]:
        """Where the supervisors that may run this role have their locks."""
        roles = [self.state / f"role-{role}" for role in ROLES if self.role in ("all", role)]
        return [self.state, *roles]

    @property
    def lock_folder(self) -> Path:
        """Where the supervisor of this role has its lock and its status."""
        return self.state if self.role == "all" else self.state / f"role-{self.role}"

    def lock(self) -> list[Lock]:
        """Take the locks of this role: `all` holds those of both roles too, so that there is never a second of one."""
        folders = [self.lock_folder]
        if self.role == "all":
            folders += [self.state / f"role-{role}" for role in ROLES]
        locks = [Lock(folder) for folder in folders]
        for folder in folders[1:]:
            (folder / STATUS).unlink(missing_ok=True)
        return locks

    def check(self) -> None:
        """Raise a numbered error for what would make the start fail."""
        self.authority.check()
        if self.role != "coordinator":
            check_port(self.fleet_host, self.fleet_port)
            check_port(self.control_host, self.control_port)
        if self.metrics_port and self.role != "superlink":
            check_port(self.metrics_host, self.metrics_port)

    def run(self, shown: Shown | None = None) -> None:
        """Check, start, keep alive until SIGTERM or SIGINT; `shown` takes what the processes log."""
        stopped = stop_on_signals()
        locks = self.lock()
        try:
            self.check()
            os.environ.update(own_folders(self.state, self.lock_folder))
            Supervisor(self.children(), status=self.lock_folder, shown=shown).run(stopped)
        finally:
            for lock in locks:
                lock.release()


def superlink(server: Server) -> None:
    """Be the SuperLink."""
    from federation.flower.superlink import Listener, SuperLinkFiles, serve
    from orchestrator.books import Books
    from orchestrator.enrollment.waiting import Waiting
    from orchestrator.web.app import Pages

    authority = server.authority
    authority.check()
    serve(
        SuperLinkFiles(
            authority.ca,
            authority.certificate,
            authority.key,
            authority.secret,
            authority.token,
            server.database,
        ),
        Listener(server.fleet_host, server.fleet_port),
        Listener(server.control_host, server.control_port),
        enroll=Waiting(server.state).receive,
        page=Pages(Books(server.state, server.database)).app,
    )


def coordinator(server: Server) -> None:
    """Be the coordinator."""
    from orchestrator import coordinator as process

    logging.getLogger("httpx").setLevel(logging.WARNING)
    process.main(process.CoordinatorSettings(server.state, f"{server.control_host}:{server.control_port}", server.poll))


def metrics(server: Server) -> None:
    """Serve metrics."""
    from federation import scraping
    from orchestrator.metrics import Journals

    scraping.serve(Journals(server.state, server.database), server.metrics_host, server.metrics_port)
