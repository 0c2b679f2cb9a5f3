"""A disk that is full or read-only at every single write: a numbered error, no torn file, and the study goes on.

Each file that coordinator, link or worker opens to write, each fsync and each rename fails once
(tests/faults/crash/sitecustomize.py). A study that ends with a numbered error is submitted again, as a person would who
has freed space, until it is done; its weights are those of a study that nothing happened to.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from commands import assert_nothing_half_written
from running import SITES, Federation, study, told, write_table

from federation.errors import Code, FednnunetError
from federation.study import Study
from orchestrator.admin.simulate import Simulation

pytestmark = [pytest.mark.exhaustive, pytest.mark.timeout(6000)]


@pytest.mark.parametrize("kind", ["ENOSPC", "EROFS"])
@pytest.mark.parametrize("role", ["coordinator", "link-hospital_a", "worker-hospital_a"])
def test_a_disk_that_fails_at_every_write_is_said_by_number_and_nothing_is_torn(
    killing: tuple[Simulation, Path], calm: str, monkeypatch: pytest.MonkeyPatch, role: str, kind: str
) -> None:
    monkeypatch.setenv("FAULTS_ROLES", role)
    monkeypatch.setenv("FAULTS_DISK", kind)
    simulation, folder = killing
    disturbed = study("disturbed", round_deadline=1200, step_deadline=1200)
    began, errors = time.monotonic(), 0
    with simulation.running():
        federation = Federation(simulation)
        while (error := ended_by(federation, disturbed)) is not None:
            assert "FNU-702" in str(error) or error.code is Code.DISK_FULL, error
            errors += 1
            assert errors <= 400
    failed = [line["label"] for line in told(folder) if line["what"] == "disk"]
    assert failed
    assert federation.digest(disturbed) == calm
    assert_nothing_half_written(simulation.state, but="worker")
    assert sorted(path.name for path in (simulation.state / "sites").iterdir()) == list(SITES)
    starts = sum(line["what"] == "start" for line in told(folder))
    row = {
        "failed writes": len(failed),
        "ended by a numbered error and submitted again": errors,
        "processes started again": starts - 1,
        "seconds": round(time.monotonic() - began, 1),
    }
    write_table(f"{kind} {role.partition('-')[0]}", row)


def ended_by(federation: Federation, study: Study) -> FednnunetError | None:
    """Submit a study and wait for its end: the error that ended it, or None when it is done."""
    try:
        federation.run(study)
    except FednnunetError as error:
        return error
    return None
