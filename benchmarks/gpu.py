"""On a GPU: a federated epoch beside one of `nnUNetv2_train`, first and later rounds, and the GPU's memory over rounds.

    python benchmarks/gpu.py [--network default|resenc_l] [--epochs 3] [--rounds 50] [--output gpu.json]

Needs one CUDA device that nobody else uses, a C compiler (torch.compile), and about 10 GB of disk; makes its own data
(synthetic volumes of about 144 voxels a side, for which nnU-Net plans its networks of 31 M and 102 M parameters). Mixed
precision, torch.compile and nnU-Net's own number of loader processes, on both sides (benchmarks/floor.py).

First a study of many short rounds: what a round takes, and the most memory that the device had in use during each, as
nvidia-smi says it. Memory that grows with the rounds would end a long study. Then the epochs side by side. What is
known is printed, and written to the output, after each step.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from floor import NETWORKS, Amount, measure, tables

from orchestrator.admin.simulate import SiteOptions

GPU = ["nvidia-smi", "--format=csv,noheader,nounits"]


@contextlib.contextmanager
def memory() -> Iterator[list[tuple[float, int]]]:
    """Moments (seconds since 1970) and MiB in use on the device, while the context is open."""
    found: list[tuple[float, int]] = []
    process = subprocess.Popen(
        [*GPU, "--query-gpu=memory.used", "--loop-ms=200"], stdout=subprocess.PIPE, encoding="utf-8"
    )

    def follow() -> None:
        assert process.stdout is not None
        found.extend((time.time(), int(line)) for line in process.stdout)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield found
    finally:
        process.terminate()
        process.wait()
        thread.join()


def with_memory(rows: list[dict[str, Any]], used: list[tuple[float, int]]) -> list[dict[str, Any]]:
    """Each round with the most memory in use during it, MiB."""
    return [
        row | {"gpu_mib": max((mib for moment, mib in used if 0 <= moment - row["began"] <= row["total"]), default=0)}
        for row in rows
    ]


def over_rounds(rows: list[dict[str, Any]], short: Amount) -> Table:
    """What the short rounds took, and their memory: the first, and both halves of the others."""
    table = Table(title=f"{short.epochs} rounds of {short.iterations} iterations, s (medians), and most memory in use")
    columns = ("total", "start", "down", "train", "validation", "checkpoint", "other", "up", "aggregate")
    for column in ("round", *columns, "GPU MiB"):
        table.add_column(column, justify="right")
    half = len(rows) // 2
    for title, part in (("1", rows[:1]), (f"2 to {half}", rows[1:half]), (f"{half + 1} on", rows[half:])):
        if part:
            middle = (f"{statistics.median(row[column] for row in part):.2f}" for column in columns)
            table.add_row(title, *middle, str(max(row["gpu_mib"] for row in part)))
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="default")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--validation-iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=50, help="Short rounds, before the epochs.")
    parser.add_argument("--short-iterations", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    amount = Amount(arguments.epochs, arguments.iterations, arguments.validation_iterations)
    short = Amount(arguments.rounds, arguments.short_iterations, 1)
    options = replace(SiteOptions.for_device("cuda", 1), poll=0.5)  # as a hospital has it
    device = subprocess.run(
        [*GPU, "--query-gpu=name,driver_version"], check=True, capture_output=True, encoding="utf-8"
    ).stdout.strip()
    record: dict[str, Any] = {"gpu": device, "torch": importlib.metadata.version("torch")}
    console = Console(width=120)
    console.print(device)
    began = time.monotonic()
    with memory() as used:

        def keep(found: dict[str, Any]) -> None:
            if "short_rounds" not in record:
                found["short_rounds"] = with_memory(found["short_rounds"], used)
                console.print(over_rounds(found["short_rounds"], short))
            record.update(found)
            print(f"{time.monotonic() - began:.0f} s:", json.dumps(found["epoch"]), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(record, indent=1) + "\n")

        found = measure(arguments.network, amount, options, short, keep)
    for table in tables(found, amount):
        console.print(table)


if __name__ == "__main__":
    main()
