"""kill -9 in the middle of a round: the study ends, and its weights are those of an undisturbed study, bit for bit.

One federation of two phantom hospitals runs for the whole module; each test submits a study of its own and kills one
process while round 2 is being trained. Training is seeded and has one thread, so the final digests can be compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import Done, fednnunet, good, wait_for, write_study
from rich.console import Console

from federation.audit import read
from federation.study import Study, parse
from orchestrator.admin.simulate import Simulation, SiteOptions
from orchestrator.enrollment.record import user

SITES = ("hospital_a", "hospital_b")


def study(name: str, **changes: Any) -> Study:
    """A small study; its name makes it another study, with the same seeds."""
    return parse(
        {
            "name": name,
            "dataset": "Dataset300_PhantomFederation",
            "sites": list(SITES),
            "channel_names": {"0": "synthetic"},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "planner": "SmallUNetPlanner",
            "fold": "all",
            "rounds": 3,
            "iterations_per_epoch": 15,
            "validation_iterations_per_epoch": 1,
            "round_deadline": 300,
            "step_deadline": 300,
            **changes,
        }
    )


@dataclass
class Federation:
    """A running federation, and what its journals say."""

    simulation: Simulation

    def journal(self, study: Study) -> list[dict[str, Any]]:
        path = self.simulation.study_folder(study) / "journal.jsonl"
        return read(path) if path.exists() else []

    def digest(self, study: Study) -> str:
        """Digest of the last global weights."""
        lines = [line for line in self.journal(study) if line["event"] == "weights"]
        assert lines[-1]["round"] == study.rounds
        return str(lines[-1]["digest"])

    def asked(self, study: Study, key: str, site: str) -> int:
        """How often a site was asked for a task."""
        return sum(
            line.get("key") == key and line.get("site") == site
            for line in self.journal(study)
            if line["event"] == "asked"
        )

    def process(self, command: str, site: str = "") -> psutil.Process:
        """The one process of this federation with this in its command line, once it is there.

        Forked children, which have the same command line, do not count.
        """
        end = time.monotonic() + 60
        while True:
            found = {}
            for process in psutil.process_iter(["cmdline", "status"]):
                line = " ".join(process.info["cmdline"] or [])
                alive = process.info["status"] != psutil.STATUS_ZOMBIE
                if alive and f"-m {command} " in line and str(self.simulation.state) in line and site in line:
                    found[process.pid] = process
            tops = []
            for process in found.values():
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just died
                    if process.ppid() not in found:
                        tops.append(process)
            if len(tops) == 1:
                return tops[0]
            assert time.monotonic() < end, f"{command} {site}: {tops}"
            time.sleep(0.1)

    def run(self, study: Study) -> None:
        self.simulation.conduct(study, Console(file=io.StringIO()))

    def works_on(self, site: str) -> str | None:
        """The task that a site's worker says it is doing."""
        path = self.simulation.state / "sites" / site / "state" / "worker" / "status.json"
        return json.loads(path.read_text())["task"] if path.exists() else None

    def run_and_disturb(self, study: Study, disturb: Callable[[], object], during: str | None = "hospital_a") -> None:
        """Run a study; disturb round 2 while the worker of `during` trains it, or as soon as both sites are asked."""
        key = "train-fold_all-0002"
        failure: list[BaseException] = []

        def begun() -> bool:
            if during is not None:
                return self.works_on(during) == key
            return all(self.asked(study, key, site) for site in SITES)

        def wait_and_disturb() -> None:
            try:
                end = time.monotonic() + 120
                while not (begun() and self.asked(study, key, "hospital_a")):
                    assert time.monotonic() < end, "round 2 never began"
                    time.sleep(0.02)
                if during is not None:
                    time.sleep(0.2)  # into the middle of the round
                assert not any(line["event"] == "closed" and line["round"] == 2 for line in self.journal(study)), (
                    "the round was over before it could be disturbed"
                )
                disturb()
            except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
                failure.append(error)

        thread = threading.Thread(target=wait_and_disturb)
        thread.start()
        self.run(study)
        thread.join()
        if failure:
            raise failure[0]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_phantom_sites: dict[str, Path]) -> Iterator[Federation]:
    sites = {name: tiny_phantom_sites[name] for name in SITES}
    options = SiteOptions(threads=1)
    simulation = Simulation(tmp_path_factory.mktemp("faults"), sites, options)
    with simulation.running():
        yield Federation(simulation)


@pytest.fixture(scope="module")
def undisturbed(federation: Federation) -> str:
    """Digest of the final weights of a study that nothing happens to."""
    calm = study("undisturbed")
    federation.run(calm)
    return federation.digest(calm)


@pytest.mark.parametrize(
    ("victim", "command", "site"),
    [
        ("coordinator", "orchestrator coordinator", ""),
        ("superlink", "orchestrator superlink", ""),
        pytest.param("link", "appliance.link link", "hospital_a", marks=pytest.mark.long),
        ("worker", "appliance.worker", "hospital_a"),
        pytest.param("supernode", "appliance.link supernode", "hospital_a", marks=pytest.mark.long),
    ],
)
def test_kill_9_in_the_middle_of_a_round_ends_in_the_same_bytes(
    federation: Federation, undisturbed: str, victim: str, command: str, site: str
) -> None:
    disturbed = study(f"kill_{victim}")
    killed: list[int] = []

    def kill() -> None:
        process = federation.process(command, site)
        killed.append(process.pid)
        os.kill(process.pid, signal.SIGKILL)

    federation.run_and_disturb(disturbed, kill)
    assert killed
    assert not psutil.pid_exists(killed[0]) or psutil.Process(killed[0]).status() == psutil.STATUS_ZOMBIE
    assert federation.process(command, site).pid != killed[0], "it was started again"
    assert federation.digest(disturbed) == undisturbed
    closed = [line for line in federation.journal(disturbed) if line["event"] == "closed"]
    assert [line["participants"] for line in closed] == [list(SITES)] * 3, "nobody was left out"


@pytest.mark.long
def test_a_site_that_falls_silent_is_left_out_at_the_deadline_and_the_record_says_so(federation: Federation) -> None:
    """Quorum 1 of 2: the rounds go on without the silent site, nothing is hidden, and the site is back afterwards."""
    silent = study("silent_site", quorum=1, round_deadline=15, step_deadline=15, rounds=2)
    worker = federation.process("appliance.worker", "hospital_b")
    try:
        federation.run_and_disturb(silent, worker.suspend, during=None)
    finally:
        worker.resume()
    closed = {line["round"]: line for line in federation.journal(silent) if line["event"] == "closed"}
    assert closed[1]["participants"] == list(SITES)
    assert closed[2]["participants"] == ["hospital_a"]
    assert closed[2]["missing"] == {"hospital_b": "no answer before the deadline"}
    (exported,) = [line for line in federation.journal(silent) if line["event"] == "exported"]
    assert list(exported["unfinished"]) == ["hospital_b"]
    assert list(exported["validation"]["all"]["missing"]) == ["hospital_b"]


@pytest.mark.long
def test_the_site_that_was_silent_takes_part_again(federation: Federation, undisturbed: str) -> None:
    after = study("after_silence")
    federation.run(after)
    assert federation.digest(after) == undisturbed


def test_kill_9_of_a_data_holding_worker_leaves_no_loader_behind(federation: Federation) -> None:
    worker = federation.process("appliance.worker", "hospital_b")
    children = worker.children(recursive=True)
    worker.kill()
    psutil.wait_procs([worker, *children], timeout=10)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_study_is_stopped_in_the_middle_of_a_round_and_resumed_to_the_same_bytes(
    federation: Federation, undisturbed: str, tmp_path: Path
) -> None:
    stopped = study("stopped")
    simulation = federation.simulation
    state, control = simulation.orchestrator, f"127.0.0.1:{simulation._control_port}"
    said: list[Done] = []
    federation.run_and_disturb(
        stopped, lambda: said.append(fednnunet("study", "stop", "stopped", "--state", state, cwd=tmp_path))
    )
    assert said[0].status == 0, said[0]
    assert "stopped after 1 of 3 rounds" in said[0].out
    lines = federation.journal(stopped)
    assert lines[-1]["event"] == "stopped"
    assert lines[-1]["by"] == user()
    assert not list((state / "studies" / stopped.id).glob("stop.json"))

    assert fednnunet("study", "stop", "stopped", "--state", state, cwd=tmp_path).out.endswith("stopped already\n")

    resumed = fednnunet("study", "resume", "stopped", "--state", state, "--control", control, cwd=tmp_path)
    assert resumed.status == 0, resumed
    assert federation.digest(stopped) == undisturbed
    assert federation.asked(stopped, "train-fold_all-0001", "hospital_a") == 1, "round 1 was not done again"
    listed = fednnunet("study", "list", "--state", state, cwd=tmp_path)
    assert "done" in next(line for line in listed.out.splitlines() if line.startswith("stopped"))
    recorded = [line["event"] for line in read(state / "audit.jsonl")]
    assert recorded[-2:] == ["study stop", "study resume"]


def test_a_stop_ends_the_work_of_a_round_that_would_take_hours_and_frees_the_device(
    federation: Federation, tmp_path: Path
) -> None:
    endless = study("endless", iterations_per_epoch=10**6)
    simulation = federation.simulation
    state, control = simulation.orchestrator, f"127.0.0.1:{simulation._control_port}"
    file = write_study(tmp_path / "endless.yaml", endless.model_dump(mode="json"))
    good(fednnunet("study", "submit", file, "--state", state, "--control", control, "--no-wait", cwd=tmp_path))
    wait_for(lambda: federation.works_on("hospital_a") == "train-fold_all-0001", 120, "round 1")
    good(fednnunet("study", "stop", "endless", "--state", state, cwd=tmp_path))
    wait_for(lambda: federation.works_on("hospital_a") is None, 60, "the worker's rest")
    spool = simulation.state / "sites" / "hospital_a" / "state" / "spool"
    wait_for((spool / "inbox" / endless.id / "train-fold_all-0001" / "cancel").exists, 1, "the cancelled task")
    wait_for(lambda: not (spool / "release").exists(), 60, "the freed device")
    assert not list((spool / "outbox" / endless.id).glob("train-*")), "no half round is sent"
