"""The distance to the floor: a federated epoch beside one of `nnUNetv2_train`, and what a round costs besides.

    python benchmarks/floor.py [--network small] [--device cpu] [--threads 2] [--epochs 5] [--repeats 1] [--output FILE]

One hospital (phantom, synthetic), one epoch a round, the real processes on this machine; `nnUNetv2_train` trains on the
very files that the site has preprocessed, with the same plans and iterations, before and after each federated study, so
that a machine that becomes slower is seen; with `--repeats` they take turns. On a CPU both use so many threads (all
cores; with one less the orchestrator, which no hospital has on its machine, does not share them) and no process for
augmentation (`nnUNet_n_proc_DA=0`); on a GPU both have nnU-Net's own choices: mixed precision, torch.compile, its
loader processes.

- epoch: train and validation iterations; nnU-Net's "Epoch time" beside the site's report; medians, the first of each
  run left out. The ratio, and that of each federated study to the two plain runs around it: how far these are apart is
  what the machine does to the figure.
- round: what benchmarks/rounds.py splits, from the task's push to the next global weights.
- start: all processes (`orchestrator start`, `appliance start`) until the site is online and its worker waits; then
  `study submit` until the first round's task, and how much of that is fingerprint, planning and preprocessing.

`--poll` is the pause of coordinator, link and supernode at first; they look less often the longer they wait. 0.5 is the
product's own, `fednnunet simulate` has 0.2. benchmarks/gpu.py does the same for larger networks, with their memory.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rounds import split

from federation.audit import read
from federation.study import Study, parse
from federation.tasks import parse_result
from orchestrator.admin.phantom import SITES, make_phantom_sites, phantom_study
from orchestrator.admin.simulate import Simulation, SiteOptions

SITE = "hospital_a"
LARGE = replace(SITES[SITE], training_cases=4, test_cases=1, shape=(140, 144, 148))
NETWORKS = {
    "small": ("SmallUNetPlanner", SITES[SITE]),
    "default": ("ExperimentPlanner", LARGE),
    "resenc_l": ("nnUNetPlannerResEncL", LARGE),
}
"""Planner and data; from volumes of about 144 voxels a side nnU-Net plans its networks of 31 M and 102 M parameters."""
ENTRY = """
import os
import multiprocessing
import nnunetv2.run.run_training as training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Base
EPOCHS, ITERATIONS, VALIDATION = (int(os.environ[f"FLOOR_{name}"]) for name in ("EPOCHS", "ITERATIONS", "VALIDATION"))

class nnUNetTrainer(Base):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = EPOCHS
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = ITERATIONS, VALIDATION

    def perform_actual_validation(self, *arguments, **named):
        pass

training.recursive_find_trainer_class_by_name = lambda name: nnUNetTrainer
threads = int(os.environ["FLOOR_THREADS"]) or multiprocessing.cpu_count()
multiprocessing.cpu_count = lambda: threads  # what it gives torch on a CPU
training.run_training_entry()
"""
"""nnUNetv2_train with as many epochs and iterations as ours, without the prediction of whole cases at its end.

Without its search for a trainer, too: that imports them all, and some want a torchvision that fits torch."""


@dataclass(frozen=True)
class Amount:
    """How much is trained: epochs, and iterations of training and validation in each."""

    epochs: int
    iterations: int
    validation: int


def plain(site: Path, folder: Path, study: Study, amount: Amount, options: SiteOptions) -> list[float]:
    """Seconds of each epoch of `nnUNetv2_train` on what a site has preprocessed, with the site's compiler cache."""
    preprocessed = site / "worker" / study.id / "nnUNet_preprocessed"
    (dataset,) = (path.name for path in preprocessed.iterdir() if path.name.startswith("Dataset"))
    (plans,) = (path.stem for path in (preprocessed / dataset).glob("*Plans.json"))
    variables = {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(preprocessed),
        "nnUNet_results": str(folder / "results"),
        "FLOOR_EPOCHS": str(amount.epochs),
        "FLOOR_ITERATIONS": str(amount.iterations),
        "FLOOR_VALIDATION": str(amount.validation),
        "FLOOR_THREADS": str(options.threads or 0),
        "TORCHINDUCTOR_CACHE_DIR": str(site / "cache" / "torchinductor"),
        "TRITON_CACHE_DIR": str(site / "cache" / "triton"),
    }
    if options.device == "cpu":
        variables |= {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")} | variables
    (folder / "raw").mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", ENTRY, dataset, study.configuration, "all", "-p", plans, "-device", options.device],
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


def idle(simulation: Simulation) -> dict[str, float]:
    """Seconds until the site is online, and until its worker has loaded all and waits: as a hospital is found."""
    began, found = time.monotonic(), dict[str, float]()
    control = simulation.control()
    while len(found) < 2:
        if control.nodes()[SITE][1] == "online":
            found.setdefault("everything started to the site online", time.monotonic() - began)
        if simulation.doing(SITE) == "waiting":
            found.setdefault("everything started to the worker waiting", time.monotonic() - began)
        if time.monotonic() > began + 120:
            raise SystemExit("the site did not come online")
        time.sleep(0.05)
    return found


def starting(simulation: Simulation, study: Study, submitted: float) -> dict[str, float]:
    """Seconds from submitting to each step's end."""
    lines = read(simulation.study_folder(study) / "journal.jsonl")

    def at(event: str, **fields: Any) -> float:
        line = next(
            one
            for one in lines
            if one["event"] == event and all(one.get(key) == value for key, value in fields.items())
        )
        return dt.datetime.fromisoformat(line["at"]).timestamp()

    return {
        "submitted to the coordinator's first line": at("opened") - submitted,
        "describe and fingerprint": at("phase", phase="planning") - at("phase", phase="describing"),
        "plan": at("phase", phase="preparing") - at("phase", phase="planning"),
        "preprocess": at("phase", phase="training") - at("phase", phase="preparing"),
        "submitted to the first round's task": at("asked", key="train-fold_all-0001") - submitted,
    }


def phantom(network: str, amount: Amount, name: str) -> Study:
    """A study of the one hospital."""
    fields = {"name": name, "planner": NETWORKS[network][0], "validation_iterations_per_epoch": amount.validation}
    return parse(phantom_study([SITE], amount.epochs, amount.iterations) | fields)


def measure(
    network: str,
    amount: Amount,
    options: SiteOptions,
    short: Amount = Amount(1, 2, 1),
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
    repeats: int = 1,
) -> dict[str, Any]:
    """Short rounds, then plain and federated in turn; see the module. `keep` gets what is known after each step.

    The study of short rounds leaves preprocessed data and a warm compiler cache to all that follow.
    """
    plain_runs: list[list[float]] = []
    federated_runs: list[list[float]] = []
    found: dict[str, Any] = {"network": network, "device": options.device, "threads": options.threads}
    found |= {"poll": options.poll, "amount": asdict(amount), "short": asdict(short)}
    found |= {"epoch": {"plain": plain_runs, "federated": federated_runs}, "rounds": []}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        here = Path(name)
        data = make_phantom_sites(here / "hospitals", {SITE: NETWORKS[network][1]})
        first = phantom(network, short, "first")
        simulation = Simulation(here / "state", data, options)
        site = simulation.state / "sites" / SITE / "state"
        with simulation.running():
            found["start"] = idle(simulation)
            submitted = time.time()
            simulation.conduct(first, Console(file=io.StringIO()))
            found["start"] |= starting(simulation, first, submitted)
            found["short_rounds"] = split(simulation, first)
        keep(found)
        plain_runs.append(plain(site, here / "plain_0", first, amount, options))
        keep(found)
        for number in range(1, repeats + 1):
            study = phantom(network, amount, f"floor-{number}")
            with simulation.running():
                simulation.conduct(study, Console(file=io.StringIO()))
                federated_runs.append(federated(simulation, study))
                found["rounds"].append(split(simulation, study))
            compare(found)
            keep(found)
            plain_runs.append(plain(site, here / f"plain_{number}", first, amount, options))
            compare(found)
            keep(found)
    return found


def later(runs: list[list[float]]) -> float:
    """Median of all epochs but the first of each run."""
    return statistics.median(epoch for run in runs for epoch in run[1:])


def compare(found: dict[str, Any]) -> None:
    """The floor, the federated epoch's ratio to it, that of each study to the plain runs beside it, a round's cost."""
    plain_runs, federated_runs = found["epoch"]["plain"], found["epoch"]["federated"]
    found["floor"] = later(plain_runs)
    found["ratio"] = later(federated_runs) / found["floor"]
    found["ratios"] = [
        later([run]) / later(plain_runs[number : number + 2]) for number, run in enumerate(federated_runs)
    ]
    keys = ("down", "checkpoint", "other", "up", "aggregate")
    rows = [row for run in found["rounds"] for row in run[1:]]
    found["besides"] = {key: statistics.median(row[key] for row in rows) for key in keys}


def tables(found: dict[str, Any], amount: Amount) -> list[Table]:
    """What was measured, for people."""
    floor, besides = found["floor"], found["besides"]
    epoch = Table(
        title=f"seconds of an epoch ({amount.iterations} + {amount.validation} iterations), "
        f"{found['network']} network, {found['device']}, medians"
    )
    for column in ("", "s", "of the floor"):
        epoch.add_column(column, justify="left" if not column else "right")
    for number, run in enumerate(found["epoch"]["plain"]):
        epoch.add_row("nnUNetv2_train", f"{later([run]):.2f}", f"{later([run]) / floor:.3f}")
        for beside in found["epoch"]["federated"][number : number + 1]:
            epoch.add_row("federated", f"{later([beside]):.2f}", f"{later([beside]) / floor:.3f}")
    for title, value in (("all nnUNetv2_train", floor), ("all federated", later(found["epoch"]["federated"]))):
        epoch.add_row(title, f"{value:.2f}", f"{value / floor:.3f}")
    cost = Table(title="what a round costs besides, s (median of the later rounds)")
    for column in (*besides, "together", "in % of the round"):
        cost.add_column(column, justify="right")
    spent = sum(besides.values())
    whole = statistics.median(row["total"] for run in found["rounds"] for row in run[1:])
    cost.add_row(*(f"{value:.2f}" for value in besides.values()), f"{spent:.2f}", f"{100 * spent / whole:.1f}")
    start = Table(title="starting, s")
    for title in ("", "s"):
        start.add_column(title)
    for title, value in found["start"].items():
        start.add_row(title, f"{value:.2f}")
    return [epoch, cost, start]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="On a CPU, both for nnU-Net and ours.")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=250)
    parser.add_argument("--validation-iterations", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1, help="Federated studies, each between two plain runs.")
    parser.add_argument("--poll", type=float, default=SiteOptions.poll)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    amount = Amount(arguments.epochs, arguments.iterations, arguments.validation_iterations)
    if amount.epochs < 2:
        parser.error("--epochs: 2 or more, the first one is left out")
    options = replace(SiteOptions.for_device(arguments.device, 1), poll=arguments.poll)
    if arguments.device == "cpu":
        options = replace(options, threads=arguments.threads)
    found = measure(arguments.network, amount, options, repeats=arguments.repeats)
    for table in tables(found, amount):
        Console(width=110).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
