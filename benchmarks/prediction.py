"""Sharded prediction beside one `nnUNetv2_predict`: seconds, CPU, the share that is lost to starting, equal bytes.

    python benchmarks/prediction.py [--cases 24] [--output prediction.json]

A study over phantom hospitals (synthetic) makes the model; `nnUNetv2_predict` predicts a folder once, then
`appliance predict` in 1, 2 and 4 shards at once, each a process as a pod runs it, all on this machine's cores. Starting
is everything before a shard's first case: the interpreter, torch, nnU-Net, the model.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from federation.study import parse
from orchestrator.admin.phantom import SITES, TINY_SITES, make_phantom_sites, phantom_study
from orchestrator.admin.simulate import Simulation, SiteOptions

SHARDS = (1, 2, 4)


def train(folder: Path) -> Path:
    """A model's zip, by one round over three small phantom hospitals."""
    study = parse({**phantom_study(SITES, rounds=1, iterations=4), "name": "prediction"})
    simulation = Simulation(
        folder / "federation", make_phantom_sites(folder / "data", TINY_SITES), SiteOptions.for_device("cpu", 3)
    )
    simulation.run(study, Console(file=io.StringIO()))
    (archive,) = simulation.study_folder(study).glob("*.zip")
    return archive


def timed(commands: list[list[str]], environment: dict[str, str]) -> tuple[float, float]:
    """Wall seconds until all of them have ended, and CPU seconds of all."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    running = [
        subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for command in commands
    ]
    for process in running:
        _, said = process.communicate()
        if process.returncode != 0:
            raise SystemExit(said.decode(errors="replace"))
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each prediction."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.nii.gz"))}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    cores = os.cpu_count() or 1
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fednnunet-benchmark-") as name:
        folder = Path(name)
        archive = train(folder)
        with zipfile.ZipFile(archive) as content:
            content.extractall(folder / "results")
        (model,) = (folder / "results").glob("Dataset*/*")
        site = replace(SITES["hospital_a"], training_cases=1, test_cases=chosen.cases)
        images = make_phantom_sites(folder / "images", {"hospital_a": site})["hospital_a"] / "imagesTs"
        binaries = Path(sys.executable).parent
        reference = folder / "reference"
        threads = str(cores)
        common = {"nnUNet_def_n_proc": threads, "OMP_NUM_THREADS": threads, "nnUNet_results": str(folder / "results")}
        common |= {"nnUNet_raw": name, "nnUNet_preprocessed": name}
        command = [str(binaries / "nnUNetv2_predict_from_modelfolder"), "-i", str(images), "-o", str(reference)]
        command += ["-m", str(model), "-f", "all", "-device", "cpu", "-npp", "1", "-nps", "1"]
        wall, cpu = timed([command], common)
        rows.append({"what": "nnU-Net", "shards": 1, "wall_s": wall, "cpu_s": cpu})
        expected = digests(reference)
        for count in SHARDS:
            out = folder / f"out-{count}"
            each = str(max(1, cores // count))
            commands = [
                [
                    *(str(binaries / "appliance"), "predict", "--input", str(images), "--output", str(out)),
                    *("--model", str(archive), "--device", "cpu", "--threads", each, "--shard", f"{index}/{count}"),
                ]
                for index in range(count)
            ]
            wall, cpu = timed(commands, {"OMP_NUM_THREADS": each})
            if digests(out) != expected:
                raise SystemExit(f"{count} shards wrote other bytes than nnUNetv2_predict")
            told = json.loads((out / ".predict" / "summary.json").read_bytes())
            start, total = told["seconds"]["start"], told["seconds"]["total"]
            rows.append(
                {
                    "what": "ours",
                    "shards": count,
                    "wall_s": wall,
                    "cpu_s": cpu,
                    "start_s": start / count,
                    "start_share": start / total,
                }
            )
    show(rows, chosen.cases)
    if chosen.output:
        rounded = [
            {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows
        ]
        chosen.output.write_text(json.dumps({"cases": chosen.cases, "cores": cores, "rows": rounded}, indent=1) + "\n")


def show(rows: list[dict[str, Any]], cases: int) -> None:
    """The table."""
    table = Table("command", "shards", "wall s", "CPU s", "start s", "lost", title=f"{cases} cases")
    for row in rows:
        start = f"{row['start_s']:.1f}" if "start_s" in row else ""
        share = f"{row['start_share']:.0%}" if "start_share" in row else ""
        table.add_row(row["what"], str(row["shards"]), f"{row['wall_s']:.1f}", f"{row['cpu_s']:.1f}", start, share)
    Console().print(table)


if __name__ == "__main__":
    main()
