"""A hospital's clock jumps by ten minutes in the middle of a study: the others go on, and it is back when the clock is.

The site's processes see the shifted time through libfaketime; every other clock stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from running import SITES, Federation, study

from orchestrator.admin.simulate import Simulation, SiteOptions

pytestmark = pytest.mark.timeout(600)

if (FOUND := find_spec("libfaketime")) is None:
    pytest.skip("libfaketime is for Linux on x86-64", allow_module_level=True)
LIBRARY = Path(str(FOUND.origin)).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
SHIFTED = "hospital_b"


class Shifted(Simulation):
    """A simulation in which one site has a clock of its own."""

    def _site(self, name: str, *arguments: Any) -> Any:
        child = super()._site(name, *arguments)
        if name != SHIFTED:
            return child
        clock = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        return replace(child, environment={**child.environment, **clock})

    @property
    def clock(self) -> Path:
        """What the shifted site's clock is ahead of the true one."""
        return self.state / "clock"


@pytest.fixture
def simulation(tmp_path: Path, tiny_phantom_sites: dict[str, Path]) -> Iterator[Shifted]:
    simulation = Shifted(tmp_path / "state", {name: tiny_phantom_sites[name] for name in SITES}, SiteOptions(threads=1))
    simulation.state.mkdir()
    simulation.clock.write_text("+0s")
    with simulation.running():
        yield simulation


@pytest.mark.parametrize(
    "jump", [pytest.param("+600s", marks=pytest.mark.long), pytest.param("-600s", marks=pytest.mark.exhaustive)]
)
def test_a_clock_that_is_off_by_ten_minutes_costs_that_site_its_rounds_and_no_more(
    simulation: Shifted, jump: str
) -> None:
    federation = Federation(simulation)
    shifted = study("shifted", quorum=1, rounds=8, round_deadline=40, step_deadline=120)

    def closed() -> dict[int, dict[str, Any]]:
        return {line["round"]: line for line in federation.journal(shifted) if line["event"] == "closed"}

    def told() -> bool:
        return "FNU-708" in (simulation.state / "sites" / SHIFTED / "state" / "logs" / "supernode.log").read_text()

    def off_and_right_again() -> None:
        simulation.clock.write_text(jump)
        wait_for(told, 120, "a word to the hospital that it is its clock")
        wait_for(lambda: any(line["missing"] for line in closed().values()), 120, "a round without the site")
        simulation.clock.write_text("+0s")

    federation.run_and_disturb(shifted, off_and_right_again, during=None)
    rounds = closed()
    assert list(rounds) == list(range(1, 9))
    without = [number for number, line in rounds.items() if SHIFTED not in line["participants"]]
    assert without
    assert all(rounds[number]["missing"][SHIFTED] for number in without)
    assert rounds[1]["participants"] == list(SITES)
    assert rounds[8]["participants"] == list(SITES), "it takes part again"
