"""What a round costs: the warm worker's first and later rounds, and where the time of a round goes.

    python benchmarks/rounds.py [--rounds 6] [--iterations 25] [--output rounds.json]

Three phantom hospitals train for real, on this machine's CPU, through the real network. The split of a round is taken
at the site that answered last, from times that the processes wrote themselves on one clock: the journal (asked,
answered, closed, aggregated), the spool (task laid in, answer laid out) and the site's report.

- down: from the push to the task in the site's inbox (transfer, polling)
- train, validation, checkpoint: the site's own report; start: building network and loaders (cold, once)
- other: the rest between inbox and outbox (loading weights, writing the update)
- up: from the outbox to the journal's line (transfer, polling, admission)
- aggregate: from the last answer to the next global weights, on the disk
"""

from __future__ import annotations

import argparse
import datetime as dt
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from federation.audit import read
from federation.study import Study, parse
from federation.tasks import parse_result
from orchestrator.admin.phantom import make_phantom_sites, phantom_study
from orchestrator.admin.simulate import Simulation, SiteOptions

COLUMNS = ("total", "down", "start", "train", "validation", "checkpoint", "other", "up", "aggregate")


def seconds(line: dict[str, Any]) -> float:
    """When a journal line was written."""
    return dt.datetime.fromisoformat(line["at"]).timestamp()


def split(simulation: Simulation, study: Study) -> list[dict[str, Any]]:
    """The split of every round at the site that answered last."""
    lines = read(simulation.study_folder(study) / "journal.jsonl")
    rows = []
    for number in range(1, study.rounds + 1):
        key = f"train-fold_all-{number:04d}"
        asked = {line["site"]: line for line in lines if line["event"] == "asked" and line["key"] == key}
        answered = {line["site"]: line for line in lines if line["event"] == "answered" and line["key"] == key}
        (aggregated,) = [line for line in lines if line["event"] == "weights" and line["round"] == number]
        last = max(answered, key=lambda site: seconds(answered[site]))
        spool = simulation.state / "sites" / last / "state" / "spool"
        laid_in = (spool / "inbox" / study.id / key / "task.json").stat().st_mtime
        result = spool / "outbox" / study.id / key / "result.json"
        report = parse_result(result.read_bytes()).training
        assert report is not None
        spent = {name: report.seconds.get(name, 0.0) for name in ("start", "train", "validation", "checkpoint")}
        laid_out = result.stat().st_mtime
        rows.append(
            {
                "round": number,
                "site": last,
                "began": min(map(seconds, asked.values())),
                "total": seconds(aggregated) - min(map(seconds, asked.values())),
                "down": laid_in - seconds(asked[last]),
                **spent,
                "other": laid_out - laid_in - sum(spent.values()),
                "up": seconds(answered[last]) - laid_out,
                "aggregate": seconds(aggregated) - seconds(answered[last]),
            }
        )
    return rows


def main() -> None:
    """Run a study and print the split of its rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        sites = make_phantom_sites(Path(name) / "hospitals")
        study = parse(phantom_study(sites, arguments.rounds, arguments.iterations) | {"name": "rounds"})
        simulation = Simulation(Path(name) / "state", sites, SiteOptions(threads=1))
        with simulation.running():
            simulation.conduct(study, Console(file=io.StringIO()))
            rows = split(simulation, study)
    table = Table(
        title=f"seconds of a round, small network, {arguments.iterations} iterations, 3 sites on this machine"
    )
    for column in ("round", *COLUMNS):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["round"]), *(f"{row[column]:.2f}" for column in COLUMNS))
    Console(width=110).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
