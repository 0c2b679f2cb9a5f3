"""A whole federation on one machine: the processes that hospitals run, on loopback, each with its own state folder.

Rules:

- Nothing is simulated but the distance: one SuperLink with two listeners, one coordinator, and for each site a
  supernode, a link and a worker, started by the same commands as on different machines.
- Every process that is started is ended, also on Ctrl-C and on failure; a second start goes on where the first ended.
- A study that is there and has not ended is taken up again by the coordinator; only another one is submitted.

Layout of the state folder::

    orchestrator/            state of `orchestrator start` (authority, database, studies)
    sites/NAME/config/       site.toml, site.key, ca.crt, coordinator.pub, policy.toml
    sites/NAME/state/        state of `appliance start` (spool, ledger, worker, logs)
    planned/PLANS.json       how datasets were planned, for `train`
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from federation import files
from federation.audit import Tail
from federation.console import shown
from federation.errors import Code, FednnunetError
from federation.processes import Child, Lock, Supervisor, check_room, free_port
from federation.study import SITE_NAME, Study
from orchestrator.admin.progress import print_end, print_was_done, raise_failure, report_at_site, watch
from orchestrator.admin.reach import control, reaching
from orchestrator.enrollment.authority import Authority, create
from orchestrator.enrollment.ceremony import let_in
from orchestrator.history import REPORT, History, so_far

LOOPBACK = "127.0.0.1"
AGAIN = "the same `fednnunet simulate` command again"
"""How a simulated study goes on: nothing runs that `study resume` could ask."""
START_TIMEOUT = 120.0
REPORT_TIMEOUT = 60.0
POLICY = b'# Simulated: whoever starts the study owns the data.\nstudies = "any"\n'


@dataclass(frozen=True)
class SiteOptions:
    """What every simulated site gets in its site.toml; None: the appliance's own default.

    `role` is that of `appliance start`: with "link" somebody else does the worker's part (a benchmark's light site).
    """

    device: str = "cpu"
    preprocessing_processes: int | None = 1
    fingerprint_processes: int | None = 1
    augmentation_processes: int | None = 0
    threads: int | None = None
    poll: float = 0.2
    role: str = "all"

    @classmethod
    def for_device(cls, device: str, sites: int, np: int | None = None, npfp: int | None = None) -> SiteOptions:
        """On a CPU the sites share the cores, or have OMP_NUM_THREADS each; on a GPU nnU-Net's own choices hold."""
        if device == "cpu":
            asked = os.environ.get("OMP_NUM_THREADS", "")
            threads = int(asked) if asked.isdigit() and int(asked) else max(1, (os.cpu_count() or 1) // sites)
            return cls(device, np or 1, npfp or 1, 0, threads)
        return cls(device, np, npfp, None, None)


class Simulation:
    """A federation on this machine.

    Parameters
    ----------
    state : Path
        Where everything is kept.
    sites : Mapping[str, Path]
        Dataset folder of each site, by site name.
    options : SiteOptions
        Settings of the sites.
    """

    def __init__(self, state: Path, sites: Mapping[str, Path], options: SiteOptions) -> None:
        for name in sites:
            if not re.match(SITE_NAME, name):
                raise FednnunetError(Code.SETTINGS_INVALID, f"site name {name!r}: lower case, digits, - and _")
        self.state = state.resolve()
        self.sites = {name: Path(path).resolve() for name, path in sorted(sites.items())}
        self.options = options
        self.supervisor: Supervisor | None = None
        self.fleet_port = self.control_port = 0

    @property
    def orchestrator(self) -> Path:
        """State folder of the orchestrator."""
        return self.state / "orchestrator"

    def study_folder(self, study: Study) -> Path:
        """Folder of a study at the orchestrator."""
        return self.orchestrator / "studies" / study.id

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Start everything; end every process that was started, whatever happens."""
        lock = Lock(self.state)
        try:
            self.fleet_port, self.control_port = free_port(), free_port()
            authority = Authority(self.orchestrator / "authority")
            if not authority.ca.exists():
                create(authority.folder, [LOOPBACK, "localhost"])
            elif not authority.signing_key.exists():  # a state folder of a version that signed nothing
                authority.begin_signing_key()
            children = [self._orchestrator()]
            for name, data in self.sites.items():
                children.append(self._site(name, data, authority))
            self.supervisor = Supervisor(children, grace=15.0)
            try:
                children[0].start()
                self._register()
                for child in children[1:]:
                    child.start()
                yield
            finally:
                with _uninterrupted():
                    self.supervisor.stop()
        finally:
            lock.release()

    @property
    def fleet_address(self) -> str:
        """HOST:PORT of the hospitals' listener, while everything is `running`."""
        return f"{LOOPBACK}:{self.fleet_port}"

    @property
    def control_address(self) -> str:
        """HOST:PORT of the control listener, while everything is `running`."""
        return f"{LOOPBACK}:{self.control_port}"

    def address(self, name: str) -> str:
        """HOST:PORT that a site dials; a measurement may put something in between."""
        return self.fleet_address

    def control(self) -> Any:
        """A client of the control listener."""
        return control(self.orchestrator, self.control_address)

    def _orchestrator(self) -> Child:
        return Child(
            "orchestrator",
            [
                *(sys.executable, "-m", "orchestrator.cli", "start", "--state", str(self.orchestrator)),
                *("--fleet-port", str(self.fleet_port), "--control-port", str(self.control_port)),
                *("--poll", str(self.options.poll), "--no-follow", "--end-with-parent"),
            ],
            self.orchestrator / "logs" / "orchestrator.log",
            {"FEDNNUNET_LOG_FORMAT": "rich"},
            restart=False,
        )

    def _site(self, name: str, data: Path, authority: Authority) -> Child:
        config, state = self.state / "sites" / name / "config", self.state / "sites" / name / "state"
        address = self.address(name)
        if not (config / "site.key").exists():
            _command(
                [
                    *("-m", "appliance.cli", "init", "--name", name, "--orchestrator", address, "--data", str(data)),
                    *("--config", str(config), "--state", str(state), "--device", self.options.device),
                ]
            )
        shutil.copyfile(authority.ca, config / "ca.crt")
        shutil.copyfile(authority.signing_public, config / "coordinator.pub")
        files.write_bytes(config / "policy.toml", POLICY)
        settings: dict[str, Any] = {
            "log_format": "rich",
            "orchestrator": address,
            "data": str(data),
            "device": self.options.device,
            "poll": self.options.poll,
            "preprocessing_processes": self.options.preprocessing_processes,
            "fingerprint_processes": self.options.fingerprint_processes,
            "augmentation_processes": self.options.augmentation_processes,
            "threads": self.options.threads,
        }
        environment = {f"FEDNNUNET_{key.upper()}": str(value) for key, value in settings.items() if value is not None}
        return Child(
            name,
            [
                *(sys.executable, "-m", "appliance.cli", "start", "--config", str(config / "site.toml")),
                *("--role", self.options.role, "--no-follow", "--end-with-parent"),
            ],
            state / "logs" / "appliance.log",
            environment,
            restart=False,
        )

    def _register(self) -> None:
        from federation.flower.clients import HTTPError

        assert self.supervisor is not None
        end = time.monotonic() + START_TIMEOUT
        client = self.control()
        while True:
            self.supervisor.look()
            try:
                client.nodes()
                break
            except HTTPError as error:
                if time.monotonic() > end:
                    raise FednnunetError(Code.ORCHESTRATOR_UNREACHABLE, str(error).splitlines()[0]) from error
                time.sleep(0.1)
        for name in self.sites:
            let_in(self.orchestrator, client, name, (self.state / "sites" / name / "config" / "site.pub").read_bytes())

    def run(self, study: Study, console: Console) -> History:
        """Start everything, run a study to its end, end everything; raises what made the study fail.

        A study that is done already starts nothing.

        Parameters
        ----------
        study : Study
            Its sites must be those of this simulation.
        console : Console
            Where to show progress: a live screen on a terminal, plain lines elsewhere.
        """
        history, _ = self._so_far(study)
        if history.ended == "done":
            return history
        with self.running():
            return self.conduct(study, console)

    def conduct(self, study: Study, console: Console) -> History:
        """Run a study to its end while everything is `running`; raises what made it fail."""
        history, tail = self._so_far(study)
        resumed = tail.path.exists() and history.ended is None
        if resumed:
            console.print(f"study {study.name} goes on after: {history.phase}, round {history.done_rounds}")
        else:
            with reaching(self.control_address):
                self.control().start(study.model_dump_json())
        history.ended = None
        self._watch(history, tail, console)
        self._await_report(study)
        raise_failure(history, self._where(history), AGAIN)
        return history

    def _await_report(self, study: Study) -> None:
        """The coordinator writes the report once the journal has ended: a simulation must not end it before."""
        assert self.supervisor is not None
        journal, report = (self.study_folder(study) / name for name in ("journal.jsonl", REPORT))
        end = time.monotonic() + REPORT_TIMEOUT
        while time.monotonic() < end and not (
            report.exists() and report.stat().st_mtime_ns > journal.stat().st_mtime_ns
        ):
            self.supervisor.look()
            time.sleep(0.1)

    def _so_far(self, study: Study) -> tuple[History, Tail]:
        """What the journal of a study says already, and a tail that reads on from there."""
        if set(study.sites) != set(self.sites):
            raise FednnunetError(
                Code.SITES_MISMATCH, f"study: {', '.join(study.sites)}; given: {', '.join(self.sites) or 'none'}"
            )
        return so_far(study, self.study_folder(study))

    def _watch(self, history: History, tail: Tail, console: Console) -> None:
        assert self.supervisor is not None
        watch(history, tail, console, self._look_again, self.doing)

    def _look_again(self) -> None:
        """A full disk at the orchestrator keeps its journal from saying so."""
        assert self.supervisor is not None
        self.supervisor.look()
        check_room(self.orchestrator)

    def doing(self, site: str) -> str:
        """What a site's worker does, in its own words; nothing where it has not said."""
        try:
            status = files.read_json(self.state / "sites" / site / "state" / "worker" / "status.json")
            return str(status.get("phase") or "")
        except (OSError, ValueError):
            return ""

    def _where(self, history: History) -> str:
        """Where to look further: the report of each site that found a fault in its dataset, the journal, the logs."""
        study = history.study
        faulty = [site for site in self.sites if re.search(rf"\b{re.escape(site)}: FNU-(109|2\d\d)", history.reason)]
        reports = [self.state / "sites" / site / "state" / report_at_site(study) for site in faulty]
        places = [f"site report: {path}" for path in reports] + [f"journal: {self.study_folder(study)}"]
        return "\n".join([*places, f"logs: {self.state}/sites/*/state/logs, {self.orchestrator / 'logs'}"])


def is_simulated(orchestrator: Path) -> bool:
    """Whether this state folder of an orchestrator is that of a simulation."""
    folder = orchestrator.resolve()
    return folder.name == "orchestrator" and any(folder.parent.glob("sites/*/config/site.toml"))


def _command(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        raise shown(done.stderr) or FednnunetError(Code.SETTINGS_INVALID, (done.stderr or done.stdout).strip())


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not keep processes from being ended."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def simulate(study: Study, state: Path, sites: Mapping[str, Path], options: SiteOptions, console: Console) -> Path:
    """Run a study on this machine and show it; returns the study's folder at the orchestrator.

    SIGTERM is treated as Ctrl-C: every process is ended.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    simulation = Simulation(state, sites, options)
    try:
        history = simulation.run(study, console)
    except KeyboardInterrupt:
        console.print(
            "interrupted: every process is ended. The same command goes on where this one stopped.", soft_wrap=True
        )
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    print_end(console, history, simulation.study_folder(study))
    if simulation.supervisor is None:
        print_was_done(console, history)
    return simulation.study_folder(study)
