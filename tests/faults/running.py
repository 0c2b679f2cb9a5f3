"""A running federation whose processes can be found and disturbed, and the small seeded study of its tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from commands import REPOSITORY
from rich.console import Console

from federation.audit import read
from federation.study import Study, parse
from orchestrator.admin.simulate import Simulation

TABLE = REPOSITORY / "build" / "faults.json"
SHARE = int(os.environ.get("FAULTS_SHARE", "16"))
"""One of so many transitions; `make faults` takes every one."""
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
        end = time.monotonic() + 300
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
                end = time.monotonic() + 600
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
        try:
            self.run(study)
        finally:
            thread.join()
        if failure:
            raise failure[0]


def told(folder: Path) -> list[dict[str, Any]]:
    """What the processes said of their starts and deaths."""
    path = folder / "record.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_table(name: str, row: dict[str, Any]) -> None:
    """Keep the figures of a run beside those of the others, for docs/reference/measured."""
    TABLE.parent.mkdir(exist_ok=True)
    known = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    TABLE.write_text(json.dumps(known | {name: row}, indent=1) + "\n")
