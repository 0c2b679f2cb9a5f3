"""The coordinator: the resident process that drives one study after the other (orchestrator.conductor), run by run.

Rules:

- A run is what reaches the sites; a study outlives it. At its start, and after each run, the coordinator ends the runs
  that have lost their coordinator and starts a new one for each study whose journal has not ended.
- Whatever ends a study stands in its journal: a number and a reason, a stop, or the shutdown that interrupted it.
- A damaged study is said and left as it is; it holds up no other.
- It puts out of the SuperLink who was revoked meanwhile, and registers who is in by the registry and unknown there.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from federation import audit, files, keypairs, logs
from federation.errors import Code, FednnunetError
from federation.flower import clients
from federation.flower.runner import Run, RunLost, Stop, serve_runs
from federation.study import Study, parse
from orchestrator import selftest
from orchestrator.conductor import Conductor
from orchestrator.enrollment.authority import Authority
from orchestrator.enrollment.ceremony import forgotten, put_out_revoked
from orchestrator.enrollment.registry import Registry
from orchestrator.journal import ENDED, Journal, StopRequested, read_study, withdraw_stop
from orchestrator.signatures import CoordinatorSignatures, Signatures
from orchestrator.workshop import Workshop

log = logging.getLogger("fednnunet.coordinator")

DISK_PAUSE = 5.0
"""Seconds before a disk that did not take a study's journal is tried again."""

_OF_A_START = ("opened", "asked", "interrupted")  # lines that a study which makes no progress writes too


@dataclass(frozen=True)
class CoordinatorSettings:
    """Where the coordinator works.

    Attributes
    ----------
    state : Path
        The orchestrator's state folder.
    control : str
        HOST:PORT of the control listener.
    poll : float
        Seconds between two looks.
    """

    state: Path
    control: str
    poll: float

    @property
    def authority(self) -> Authority:
        """The authority's files."""
        return Authority(self.state / "authority")

    @property
    def signatures(self) -> Signatures:
        """The coordinator's key, and those of the sites as the registry has them."""
        key = self.authority.signing_key
        return CoordinatorSignatures(keypairs.load_private(key.read_bytes(), str(key)), Registry(self.state).public_key)

    @property
    def studies(self) -> Path:
        """Folder of the studies."""
        return self.state / "studies"


def drive(settings: CoordinatorSettings, run: Run, workshop: Workshop) -> None:
    """Drive the study of one run to its end, or until the run is lost."""
    if run.study_json == selftest.STUDY:
        selftest.empty_round(settings.state, run, settings.signatures, settings.poll)
        log.info("run %s: an empty round", run.run_id)
        return
    study = parse(json.loads(run.study_json), f"run {run.run_id}")
    with logs.about(study=study.id[:12]):
        _drive(settings, run, study, workshop)


def _drive(settings: CoordinatorSettings, run: Run, study: Study, workshop: Workshop) -> None:
    folder = settings.studies / study.id
    journal, shut_down = _open(folder, study, run), False
    try:
        shutil.rmtree(folder / "incoming", ignore_errors=True)
        if journal.state.ended == "done" or run.submission in journal.state.ended_submissions:
            return
        journal.write("opened", run=run.run_id, submission=run.submission)
        log.info("%s, run %s: %s", study.name, run.run_id, journal.state.phase)
        try:
            Conductor(
                run, journal, settings.state / "pretrained", settings.signatures, workshop, settings.poll
            ).conduct()
        except FednnunetError as error:
            journal.write("failed", number=error.code.number, reason=str(error), advice=error.advice)
            raise
        except OSError as error:
            numbered = files.disk_error(error, folder)
            numbered = numbered or FednnunetError(Code.STUDY_FAILED, f"{type(error).__name__}: {error}")
            log.exception("%s broke off", study.name)
            journal.write("failed", number=numbered.code.number, reason=str(numbered), advice=numbered.advice)
            raise numbered from error
        except StopRequested as asked:
            journal.stop(asked.by)
            log.info("%s: stopped by %s", study.name, asked.by)
            return
        except (RunLost, clients.HTTPError):
            raise
        except Stop:
            shut_down = True
            raise
        except Exception as error:  # a fault of ours: said once, in full, instead of a coordinator that dies for ever
            log.exception("%s broke off", study.name)
            failed = FednnunetError(Code.STUDY_FAILED, f"{type(error).__name__}: {error} (traceback in the log)")
            journal.write("failed", number=failed.code.number, reason=str(failed), advice=failed.advice)
            raise failed from error
    finally:
        journal.close()
        if shut_down:  # SIGTERM may have come in the middle of a line, also of the last: the file is read anew
            journal = Journal(folder, study)
            if journal.state.ended not in ENDED:
                journal.write("interrupted", run=run.run_id)
            journal.close()
        if journal.state.ended in ENDED:
            withdraw_stop(folder)
            _write_report(folder)


def _open(folder: Path, study: Study, run: Run) -> Journal:
    """A study's journal. While the disk does not take it there is nowhere to say so but the log: it is tried again."""
    while True:
        try:
            with files.disk_errors(folder):
                return Journal(folder, study)
        except FednnunetError as error:
            if error.code is not Code.DISK_FULL:
                raise
            log.error("%s waits for the disk: %s. %s", study.name, error, error.advice)
        time.sleep(DISK_PAUSE)
        run.check()


def _write_report(folder: Path) -> None:
    """The report of a study that has ended; a report that cannot be written changes nothing of the study."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.report", str(folder)], capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode != 0:
        log.warning("no report: %s", (done.stderr.strip().splitlines() or ["?"])[-1])


def unfinished(settings: CoordinatorSettings) -> list[Study]:
    """Studies whose journal has begun and not ended; one that cannot be read is said and holds up no other."""
    found = []
    for folder in sorted(settings.studies.glob("*")):
        if (folder / "journal.jsonl").exists():
            try:
                study = read_study(folder / "study.json")
                if _goes_on(folder, study):
                    found.append(study)
            except (FednnunetError, OSError) as error:
                log.error("study %s is left as it is: %s", folder.name[:12], error)
    return found


def _goes_on(folder: Path, study: Study) -> bool:
    journal = Journal(folder, study)
    try:
        if journal.state.ended not in ENDED:
            journal.check()
            return True
    except StopRequested as asked:  # nobody drove it when it was asked for
        journal.stop(asked.by)
    finally:
        journal.close()
    return False


def _carry_on(settings: CoordinatorSettings, control: clients.Control) -> None:
    """Flower forgets a run that loses its coordinator: end what is left of it and start a new run in its place.

    Called while no run is driven, so every run that is under way has lost its coordinator. Mostly its study has a
    journal that has not ended; but who died between taking the run and the journal's line of it has left nothing else.
    The new run is started before the old one is ended, so that the study is somewhere at every moment.
    """
    going_on: dict[str, tuple[str, str | None]]
    going_on = {study.id: (study.model_dump_json(), None) for study in unfinished(settings)}
    lost = control.under_way()
    for run in lost:
        if run.study_json == selftest.STUDY:
            going_on[selftest.STUDY] = run.study_json, run.submission
            continue
        try:
            study = parse(json.loads(run.study_json), f"run {run.run_id}")
        except (FednnunetError, ValueError):  # of another version
            continue
        if study.id not in going_on and not _has_ended(settings, study, run.submission):
            going_on[study.id] = study.model_dump_json(), run.submission
    for key, (text, submission) in going_on.items():
        log.info("study %s goes on in a new run", key[:12])
        control.start(text, submission)
    for run in lost:
        control.stop(run.run_id)


def _has_ended(settings: CoordinatorSettings, study: Study, submission: str) -> bool:
    """Whether the journal says that this submission of a study has come to its end; a damaged one does not go on."""
    folder = settings.studies / study.id
    if not (folder / "journal.jsonl").exists():
        return False
    try:
        journal = Journal(folder, study)
    except FednnunetError as error:
        log.error("study %s is left as it is: %s", study.id[:12], error)
        return True
    try:
        return journal.state.ended == "done" or submission in journal.state.ended_submissions
    finally:
        journal.close()


def main(settings: CoordinatorSettings) -> None:
    """Run the resident coordinator until SIGTERM."""

    def stop(*_: object) -> None:
        raise Stop(0)

    signal.signal(signal.SIGTERM, stop)
    authority = settings.authority
    authority.check()
    ca, token = authority.ca.read_bytes(), authority.token.read_text().strip()
    control = clients.Control(settings.control, ca, token)
    secret = clients.load_secret(authority.secret)
    workshop, pause, known = Workshop(), 0.0, ""
    next_try: float | None = 0.0
    for ran in serve_runs(settings.control, ca, secret, lambda run: drive(settings, run, workshop), settings.poll):
        if ran:  # a study that makes no progress is tried again after a pause that grows
            now = _progress(settings)
            pause = min(max(1.0, pause * 2), 60.0) if now == known else 0.0
            known, next_try = now, time.monotonic() + pause
        if next_try is not None and time.monotonic() >= next_try:
            try:
                put_out_revoked(settings.state, control)
                _register_again(settings.state, control)
                _carry_on(settings, control)
                next_try = None
            except clients.HTTPError as error:
                log.warning("the SuperLink does not answer: %s", str(error).splitlines()[0])


def _register_again(state: Path, control: clients.Control) -> None:
    """A SuperLink with a new database gets to know the sites again; one it refuses is said, and holds up nobody."""
    registry = Registry(state)
    with registry.changing():
        for site in forgotten(registry, control):
            try:
                control.register(site.public_key.encode(), site.name)
                log.info("%s is registered again: the SuperLink did not know it", site.name)
            except clients.HTTPError as error:
                log.warning("the SuperLink does not take %s: %s", site.name, str(error).splitlines()[0])


def _progress(settings: CoordinatorSettings) -> str:
    """Changes when any study's journal has grown by more than the lines of a restart."""
    return ",".join(_grown(path) for path in sorted(settings.studies.glob("*/journal.jsonl")))


def _grown(path: Path) -> str:
    try:
        return str(sum(line["event"] not in _OF_A_START for line in audit.read(path)))
    except FednnunetError:  # damaged
        return ""
