"""kill -9 at every transition of coordinator, link and worker: the study ends, with the bytes of an undisturbed one.

A transition is a line of journal, arrivals or ledger (killed after it), or a file that takes its place (killed before
it); tests/faults/crash/sitecustomize.py does it, inside the process, so that none is missed. SuperLink and supernode,
which have no transitions of ours, are killed at random times from outside.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from running import SHARE, SITES, Federation, study, told, write_table

from orchestrator.admin.simulate import Simulation

pytestmark = pytest.mark.timeout(3000)


CHOICES = [
    [("orchestrator superlink", "")],
    [("appliance.link supernode", "hospital_a")],
    [("orchestrator superlink", ""), ("orchestrator coordinator", "")],  # what was under way belongs to a run that ends
]
"""Who is killed together at a random time: commands, and whose."""


def figures(lines: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Kills, and seconds from a kill to the next life of that process."""
    waits = []
    for at, line in enumerate(lines):
        if line["what"] == "kill":
            waits.append(
                next(one["at"] for one in lines[at:] if one["what"] == "start" and one["role"] == line["role"])
                - line["at"]
            )
    kinds = collections.Counter(line["role"] for line in lines if line["what"] == "kill")
    return {
        "kills": dict(kinds),
        "seconds_to_the_next_life": {"median": round(statistics.median(waits), 2), "most": round(max(waits), 2)},
        "seconds": round(seconds, 1),
    }


@pytest.mark.parametrize(
    "roles",
    [
        pytest.param(["coordinator"], marks=pytest.mark.long),
        pytest.param(["link-hospital_a"], marks=pytest.mark.exhaustive),
        pytest.param(["worker-hospital_a"], marks=pytest.mark.exhaustive),
    ],
    ids=lambda roles: roles[0].partition("-")[0],
)
def test_killed_at_every_transition_the_study_ends_in_the_same_bytes(
    killing: tuple[Simulation, Path], calm: str, monkeypatch: pytest.MonkeyPatch, roles: list[str]
) -> None:
    monkeypatch.setenv("FAULTS_ROLES", ",".join(roles))
    simulation, folder = killing
    disturbed = study("disturbed", round_deadline=1200, step_deadline=1200)
    began = time.monotonic()
    with simulation.running():
        federation = Federation(simulation)
        federation.run(disturbed)
    lines = told(folder)
    row = figures(lines, time.monotonic() - began)
    deaths = sum(line["what"] == "kill" for line in lines)
    assert deaths >= 1
    assert federation.digest(disturbed) == calm
    kept = simulation.study_folder(disturbed)
    assert [*kept.glob("rounds/*/*/updates/*.safetensors"), *kept.glob("incoming/*")] == [], "no weights lie about"
    closed = [line for line in federation.journal(disturbed) if line["event"] == "closed"]
    assert [line["participants"] for line in closed] == [list(SITES)] * 3, "nobody was left out"
    assert row["seconds_to_the_next_life"]["most"] <= 60
    log = (simulation.state / "sites" / "hospital_a" / "state" / "logs" / "worker.log").read_text()
    begun = log.count("begins, attempt") - log.count("task=describe: begins")
    row["tasks_begun_at_hospital_a"] = log.count("begins, attempt")
    if roles == ["link-hospital_a"]:
        assert all(
            log.count(f"task=train-fold_all-000{number} fold=all round={number}}}: begins") == 1 for number in (1, 2, 3)
        )
    assert begun <= 8 + deaths, "at most one task is done again for each death"
    write_table(roles[0].partition("-")[0], row)


@pytest.mark.exhaustive
def test_superlink_and_supernode_killed_at_random_times(
    killing: tuple[Simulation, Path], calm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAULTS_ROLES", "")
    simulation, _ = killing
    chance, most = random.Random(8), max(3, 24 // SHARE)
    kills: list[tuple[str, float]] = []
    over = threading.Event()
    with simulation.running():
        federation = Federation(simulation)

        def disturb() -> None:
            while len(kills) < most and not over.wait(chance.uniform(2.0, 7.0)):
                killed = [(name, federation.process(*name)) for name in chance.choice(CHOICES)]
                for _, process in killed:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                died = time.monotonic()
                for name, process in killed:
                    while federation.process(*name).pid == process.pid and not over.is_set():
                        time.sleep(0.05)
                    kills.append((name[0], time.monotonic() - died))

        thread = threading.Thread(target=disturb)
        disturbed = study("disturbed", rounds=3, iterations_per_epoch=15, round_deadline=1200, step_deadline=1200)
        began = time.monotonic()
        thread.start()
        try:
            federation.run(disturbed)
        finally:
            over.set()
            thread.join()
    assert len(kills) >= 1
    assert federation.digest(disturbed) == calm
    assert max(seconds for _, seconds in kills) <= 60
    write_table(
        "superlink and supernode",
        {
            "kills": dict(collections.Counter(command for command, _ in kills)),
            "seconds_to_the_next_life": {
                "median": round(statistics.median(seconds for _, seconds in kills), 2),
                "most": round(max(seconds for _, seconds in kills), 2),
            },
            "seconds": round(time.monotonic() - began, 1),
        },
    )
