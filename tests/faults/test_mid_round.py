"""kill -9 in the middle of a round: the study ends, and its weights are those of an undisturbed study, bit for bit.

One federation of two phantom hospitals runs for the whole module; each test submits a study of its own and kills one
process while round 2 is being trained. Training is seeded and has one thread, so the final digests can be compared.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from commands import Done, fednnunet, good, wait_for, write_study
from running import SITES, Federation, study

from federation.audit import read
from federation.errors import Code, FednnunetError
from orchestrator.admin.simulate import AGAIN, Simulation, SiteOptions
from orchestrator.enrollment.record import user


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
        pytest.param("superlink", "orchestrator superlink", "", marks=pytest.mark.long),
        pytest.param("link", "appliance.link link", "hospital_a", marks=pytest.mark.long),
        pytest.param("worker", "appliance.worker", "hospital_a", marks=pytest.mark.long),
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
    silent = study("silent_site", quorum=1, round_deadline=40, step_deadline=40, rounds=2)
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
    psutil.wait_procs([worker, *children], timeout=60)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_a_study_is_stopped_in_the_middle_of_a_round_and_resumed_to_the_same_bytes(
    federation: Federation, undisturbed: str, tmp_path: Path
) -> None:
    stopped = study("stopped")
    simulation = federation.simulation
    state, control = simulation.orchestrator, simulation.control_address
    said: list[Done] = []
    worker = federation.process("appliance.worker", "hospital_a")

    def stop() -> None:
        worker.suspend()  # the round would be over before the command has begun
        try:
            said.append(fednnunet("study", "stop", "stopped", "--state", state, cwd=tmp_path))
        finally:
            worker.resume()

    with pytest.raises(FednnunetError, match=r"stopped by .* after 1 of 3 rounds") as caught:
        federation.run_and_disturb(stopped, stop)
    assert (caught.value.code, caught.value.advice) == (Code.STUDY_STOPPED, f"To go on: {AGAIN}")
    assert said[0].status == 0, said[0]
    assert said[0].out == f"study stopped is stopped after 1 of 3 rounds; to go on: {AGAIN}\n"
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
    state, control = simulation.orchestrator, simulation.control_address
    file = write_study(tmp_path / "endless.yaml", endless.model_dump(mode="json"))
    good(fednnunet("study", "submit", file, "--state", state, "--control", control, "--no-wait", cwd=tmp_path))
    wait_for(lambda: federation.works_on("hospital_a") == "train-fold_all-0001", 600, "round 1")
    good(fednnunet("study", "stop", "endless", "--state", state, cwd=tmp_path))
    wait_for(lambda: federation.works_on("hospital_a") is None, 300, "the worker's rest")
    spool = simulation.state / "sites" / "hospital_a" / "state" / "spool"
    wait_for((spool / "inbox" / endless.id / "train-fold_all-0001" / "cancel").exists, 60, "the cancelled task")
    wait_for(lambda: not (spool / "release").exists(), 300, "the freed device")
    assert not list((spool / "outbox" / endless.id).glob("train-*")), "no half round is sent"
