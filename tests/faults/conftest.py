"""What the tests of faults share: the digest that nothing may change, and a federation to disturb."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from commands import REPOSITORY
from rich.console import Console
from running import SHARE, SITES, Federation, study

from orchestrator.admin.simulate import Simulation, SiteOptions

CRASH = Path(__file__).parent / "crash"


@pytest.fixture(scope="session")
def calm(tmp_path_factory: pytest.TempPathFactory, tiny_phantom_sites: dict[str, Path]) -> str:
    """Digest of the final weights of a study that nothing happens to."""
    simulation = Simulation(
        tmp_path_factory.mktemp("calm"), {name: tiny_phantom_sites[name] for name in SITES}, SiteOptions(threads=1)
    )
    with simulation.running():
        undisturbed = study("undisturbed", round_deadline=1200, step_deadline=1200)
        simulation.conduct(undisturbed, Console(file=io.StringIO()))
        return Federation(simulation).digest(undisturbed)


@pytest.fixture
def killing(
    tmp_path: Path, tiny_phantom_sites: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Simulation, Path]:
    """A federation whose processes tests/faults/crash kills, and the folder of its record."""
    folder = tmp_path / "crash"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{CRASH}:{REPOSITORY}")
    monkeypatch.setenv("FAULTS_CRASH", str(folder))
    monkeypatch.setenv("FAULTS_SHARE", str(SHARE))
    sites = {name: tiny_phantom_sites[name] for name in SITES}
    return Simulation(tmp_path / "state", sites, SiteOptions(threads=1)), folder
