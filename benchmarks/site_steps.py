"""A site's steps beside nnU-Net's own commands: fingerprint, preprocessing and validation, same data, same cores.

    python benchmarks/site_steps.py [--cases 20] [--output site_steps.json]

One phantom (synthetic) hospital and a small network, fold 0, the real processes on this machine's CPU. Ours: from the
task in the site's inbox to the answer in its outbox, in the worker that is running anyway; the federation's own time is
not in it. nnU-Net's: a command's wall time, which includes its start (imports; measured by itself as `-h`). Both have
all cores. What both write is compared: preprocessed cases and the validation's scores, number by number.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from federation.study import Study, parse
from orchestrator.admin.phantom import SITES, make_phantom_sites, phantom_study
from orchestrator.admin.simulate import Simulation, SiteOptions

SITE = "hospital_a"
SHAPE = (64, 96, 96)
VALIDATE = """
import nnunetv2.run.run_training as training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
training.recursive_find_trainer_class_by_name = lambda name: nnUNetTrainer
training.run_training_entry()
"""
"""nnUNetv2_train without its search for a trainer, which imports them all: some want a torchvision that fits torch."""


def timed(command: list[str], variables: dict[str, str]) -> float:
    """Wall seconds of a command; ends this script where it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")} | variables
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, check=False, capture_output=True, encoding="utf-8")
    if done.returncode != 0:
        raise SystemExit(f"{command[:3]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.perf_counter() - began


def at_the_site(simulation: Simulation, study: Study) -> dict[str, float]:
    """Seconds from each task's arrival in the inbox to its answer in the outbox, by the task's key."""
    spool = simulation.state / "sites" / SITE / "state" / "spool"
    return {
        path.parent.name: path.stat().st_mtime
        - (spool / "inbox" / study.id / path.parent.name / "task.json").stat().st_mtime
        for path in (spool / "outbox" / study.id).glob("*/result.json")
    }


def same_arrays(ours: Path, theirs: Path) -> int:
    """How many preprocessed arrays lie in both folders; ends this script where one differs or is missing."""
    names = sorted(path.name for path in theirs.iterdir() if path.suffix == ".b2nd")
    pairs = (
        (name, *(np.asarray(blosc2.open(str(folder / name), mode="r")[:]) for folder in (ours, theirs)))
        for name in names
    )
    different = [name for name, one, other in pairs if one.dtype != other.dtype or not np.array_equal(one, other)]
    if not names or different:
        raise SystemExit(f"other numbers than nnU-Net's: {different or 'there are none'}")
    return len(names)


def scores(summary: Path) -> list[Any]:
    """What a validation has found, case by case."""
    return [case["metrics"] for case in json.loads(summary.read_text())["metric_per_case"]]


def measure(cases: int) -> dict[str, Any]:
    """All steps, ours and nnU-Net's; see the module."""
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        here = Path(name)
        phantom = replace(SITES[SITE], training_cases=cases, test_cases=0, shape=SHAPE)
        data = make_phantom_sites(here / "hospitals", {SITE: phantom})
        study = parse(phantom_study([SITE], 1, 60) | {"name": "steps", "fold": "0"})
        options = SiteOptions(preprocessing_processes=cores, fingerprint_processes=cores, threads=cores)
        simulation = Simulation(here / "state", data, options)
        with simulation.running():
            simulation.conduct(study, Console(file=io.StringIO()))
        ours = at_the_site(simulation, study)
        work = simulation.state / "sites" / SITE / "state" / "worker" / study.id
        prepared = work / "nnUNet_preprocessed" / study.dataset
        (plans,) = (path.stem for path in prepared.glob("*Plans.json"))
        (results,) = (work / "nnUNet_results" / study.dataset).glob("*__*")
        number = study.dataset[len("Dataset") :].partition("_")[0]
        variables = {
            "nnUNet_raw": str(work / "nnUNet_raw"),
            "nnUNet_preprocessed": str(here / "preprocessed"),
            "nnUNet_results": str(here / "results"),
            "nnUNet_def_n_proc": str(cores),
            "nnUNet_compile": "f",
        }
        programs = Path(sys.executable).parent
        start = timed([str(programs / "nnUNetv2_preprocess"), "-h"], variables)
        fingerprint = [str(programs / "nnUNetv2_extract_fingerprint"), "-d", number, "-np", str(cores)]
        theirs = {"describe and fingerprint": timed([*fingerprint, "--verify_dataset_integrity"], variables)}
        shutil.copy(prepared / f"{plans}.json", here / "preprocessed" / study.dataset)
        shutil.copy(prepared / "dataset.json", here / "preprocessed" / study.dataset)
        preprocess = [str(programs / "nnUNetv2_preprocess"), "-d", number, "-plans_name", plans]
        preprocess += ["-c", study.configuration, "-np", str(cores)]
        theirs["preprocess"] = timed(preprocess, variables)
        (written,) = (path for path in (here / "preprocessed" / study.dataset).iterdir() if list(path.glob("*.b2nd")))
        compared = same_arrays(prepared / written.name, written)
        model = here / "results" / study.dataset / results.name
        shutil.copytree(results, model)
        shutil.rmtree(model / "fold_0" / "validation")
        validate = [sys.executable, "-c", VALIDATE, number, study.configuration, "0", "-p", plans, "--val"]
        theirs["validate"] = timed(
            [*validate, "-device", "cpu"], variables | {"nnUNet_preprocessed": str(prepared.parent)}
        )
        summary = Path("fold_0") / "validation" / "summary.json"
        if scores(model / summary) != scores(results / summary):
            raise SystemExit("other scores than nnU-Net's")
        steps = {
            "describe and fingerprint": ours["describe"] + ours["fingerprint"],
            "preprocess": ours["prepare"],
            "validate": ours["validate-fold_0"],
        }
        return {
            "cases": cases,
            "shape": SHAPE,
            "cores": cores,
            "start_of_a_command": start,
            "equal_preprocessed_arrays": compared,
            "validation_cases": len(scores(model / summary)),
            "steps": [{"step": key, "ours": steps[key], "nnunet": theirs[key]} for key in steps],
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.cases)
    start, equal = found["start_of_a_command"], found["equal_preprocessed_arrays"]
    table = Table(
        title=f"{found['cases']} cases of {' x '.join(map(str, SHAPE))} voxels, {found['cores']} cores; "
        f"{equal} preprocessed arrays and the scores of {found['validation_cases']} cases are equal"
    )
    for column in ("s", "at a site", "nnU-Net's command", "of which its start", "ours of nnU-Net's"):
        table.add_column(column, justify="left" if column == "s" else "right")
    for row in found["steps"]:
        times = (f"{row['ours']:.1f}", f"{row['nnunet']:.1f}", f"{start:.1f}", f"{row['ours'] / row['nnunet']:.2f}")
        table.add_row(row["step"], *times)
    Console(width=110).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
