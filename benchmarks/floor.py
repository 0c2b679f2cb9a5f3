"""The distance to the floor: a federated epoch beside one of `nnUNetv2_train`, and what a round costs besides.

    python benchmarks/floor.py [--epochs 5] [--output floor.json]

One hospital (phantom, synthetic), nnU-Net's own 250 + 50 iterations an epoch, one epoch a round; the real network and
the real processes on this machine. `nnUNetv2_train`, as it comes, trains on the very files that the site has
preprocessed, with the same plans, once before and once after the federation, so that a machine that becomes slower is
seen. Both use all cores and no process for augmentation (`nnUNet_n_proc_DA=0`).

- epoch: train and validation iterations; nnU-Net's "Epoch time" beside the site's report; medians, the first left out.
- round: what benchmarks/rounds.py splits, from the task's push to the next global weights.
- start: `appliance start` until the site is online; `study submit` until the first training iteration, and how much of
  that is fingerprint, planning and preprocessing.
"""

from __future__ import annotations

import argparse
import datetime as dt
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rounds import split

from federation.audit import read
from federation.study import Study, parse
from federation.tasks import parse_result
from orchestrator.admin.phantom import make_phantom_sites, phantom_study
from orchestrator.admin.simulate import Simulation, SiteOptions

SITE = "hospital_a"
ITERATIONS, VALIDATION = 250, 50
ENTRY = """
import nnunetv2.run.run_training as training
import nnunetv2.training.nnUNetTrainer.variants.training_length.nnUNetTrainer_Xepochs as trainers
training.recursive_find_trainer_class_by_name = lambda name: getattr(trainers, name)
training.run_training_entry()
"""
"""nnUNetv2_train without its search for a trainer: it imports them all, and some want a torchvision that fits torch."""


def plain(preprocessed: Path, folder: Path, study: Study, epochs: int) -> list[float]:
    """Seconds of each epoch of `nnUNetv2_train` on a site's preprocessed data, as its log says."""
    (dataset,) = (path.name for path in preprocessed.iterdir() if path.name.startswith("Dataset"))
    (plans,) = (path.stem for path in (preprocessed / dataset).glob("*Plans.json"))
    variables = {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(preprocessed),
        "nnUNet_results": str(folder / "results"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_compile": "f",
    }
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")} | variables
    (folder / "raw").mkdir(parents=True)
    command = [sys.executable, "-c", ENTRY, dataset, study.configuration, "all"]
    done = subprocess.run(
        [*command, "-tr", f"nnUNetTrainer_{epochs}epochs", "-p", plans, "-device", "cpu"],
        env=environment, check=False, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(f"nnUNetv2_train ended with {done.returncode}:\n{done.stderr[-3000:]}")
    (log,) = folder.glob("results/*/*/fold_all/training_log_*.txt")
    return [float(found) for found in re.findall(r"Epoch time: ([\d.]+) s", log.read_text())]


def federated(simulation: Simulation, study: Study) -> list[float]:
    """Seconds of each round's epoch at the site, as it reports them."""
    outbox = simulation.state / "sites" / SITE / "state" / "spool" / "outbox" / study.id
    found = []
    for number in range(1, study.rounds + 1):
        report = parse_result((outbox / f"train-fold_all-{number:04d}" / "result.json").read_bytes()).training
        assert report is not None
        found.append(report.seconds["train"] + report.seconds["validation"])
    return found


def starting(simulation: Simulation, study: Study, site_started: float, submitted: float) -> dict[str, float]:
    """Seconds from the site's start to its being online, and from submitting to each step's end."""
    lines = read(simulation.study_folder(study) / "journal.jsonl")

    def at(event: str, **fields: Any) -> float:
        line = next(
            one
            for one in lines
            if one["event"] == event and all(one.get(key) == value for key, value in fields.items())
        )
        return dt.datetime.fromisoformat(line["at"]).timestamp()

    return {
        "site started to online": at("online") - site_started,
        "submitted to the coordinator's first line": at("opened") - submitted,
        "describe and fingerprint": at("phase", phase="planning") - at("phase", phase="describing"),
        "plan": at("phase", phase="preparing") - at("phase", phase="planning"),
        "preprocess": at("phase", phase="training") - at("phase", phase="preparing"),
        "submitted to the first round's task": at("asked", key="train-fold_all-0001") - submitted,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5, choices=[5, 10, 20])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    threads = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        here = Path(name)
        data = make_phantom_sites(here / "hospitals")
        fields = phantom_study([SITE], arguments.epochs, ITERATIONS)
        first = parse(fields | {"name": "first", "rounds": 1, "iterations_per_epoch": 2})
        study = parse(fields | {"name": "floor", "validation_iterations_per_epoch": VALIDATION})
        simulation = Simulation(here / "state", {SITE: data[SITE]}, SiteOptions(threads=threads))
        began = time.time()
        with simulation.running():
            submitted = time.time()
            simulation.conduct(first, Console(file=io.StringIO()))
            begin = starting(simulation, first, began, submitted)
        preprocessed = simulation.state / "sites" / SITE / "state" / "worker" / first.id / "nnUNet_preprocessed"
        before = plain(preprocessed, here / "before", first, arguments.epochs)
        with simulation.running():
            simulation.conduct(study, Console(file=io.StringIO()))
            ours, rows = federated(simulation, study), split(simulation, study)
        after = plain(preprocessed, here / "after", first, arguments.epochs)

    floor = statistics.median(before[1:] + after[1:])
    epoch = {
        "nnUNetv2_train, before": statistics.median(before[1:]),
        "federated": statistics.median(ours[1:]),
        "nnUNetv2_train, after": statistics.median(after[1:]),
    }
    ratio = epoch["federated"] / floor
    later = rows[1:]
    parts = {
        key: statistics.median(row[key] for row in later) for key in ("down", "checkpoint", "other", "up", "aggregate")
    }
    console = Console(width=110)
    table = Table(title=f"seconds of an epoch ({ITERATIONS} + {VALIDATION} iterations, {threads} threads), medians")
    for column in ("", "s", "of the floor"):
        table.add_column(column, justify="left" if not column else "right")
    for title, value in epoch.items():
        table.add_row(title, f"{value:.2f}", f"{value / floor:.3f}")
    console.print(table)
    table = Table(title="what a round costs besides, s (median of the later rounds)")
    for column in (*parts, "together", "in % of the round"):
        table.add_column(column, justify="right")
    spent = sum(parts.values())
    whole = statistics.median(row["total"] for row in later)
    table.add_row(*(f"{value:.2f}" for value in parts.values()), f"{spent:.2f}", f"{100 * spent / whole:.1f}")
    console.print(table)
    table = Table(title="starting, s")
    for title in ("", "s"):
        table.add_column(title)
    for title, value in begin.items():
        table.add_row(title, f"{value:.2f}")
    console.print(table)
    if arguments.output:
        record = {
            "epoch": {"before": before, "federated": ours, "after": after},
            "ratio": ratio,
            "rounds": rows,
            "besides": parts,
            "start": begin,
            "threads": threads,
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
