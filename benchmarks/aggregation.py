"""Memory and time of aggregation: 3 and 64 simulated updates of the default 31 M network, in a process of their own.

    python benchmarks/aggregation.py [--updates 3 64] [--output aggregation.json]

The floor is printed in the same run: reading every update once and writing one model once, with plain reads and writes
of 1 MiB into one buffer. Peak memory is the process's own high-water mark above its idle size (VmHWM - VmRSS).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from federation.weights import Spec, TensorFile, write_tensors

FEATURES = (32, 64, 128, 256, 320, 320)


def default_network() -> dict[str, Spec]:
    """Names and shapes of nnU-Net's default 3d network: PlainConvUNet, 6 stages, 2 convolutions each, 31.2 M."""
    specs: dict[str, Spec] = {}

    def add(name: str, *shape: int) -> None:
        specs[name] = Spec(np.dtype("<f4"), shape)

    def block(name: str, inputs: int, outputs: int) -> None:
        add(f"{name}.conv.weight", outputs, inputs, 3, 3, 3)
        for part in ("conv.bias", "norm.weight", "norm.bias"):
            add(f"{name}.{part}", outputs)

    previous = 1
    for stage, features in enumerate(FEATURES):
        block(f"encoder.{stage}.0", previous, features)
        block(f"encoder.{stage}.1", features, features)
        previous = features
    for stage, features in enumerate(reversed(FEATURES[:-1])):
        add(f"decoder.up.{stage}.weight", previous, features, 2, 2, 2)
        add(f"decoder.up.{stage}.bias", features)
        block(f"decoder.{stage}.0", 2 * features, features)
        block(f"decoder.{stage}.1", features, features)
        add(f"decoder.seg.{stage}.weight", 3, features, 1, 1, 1)
        add(f"decoder.seg.{stage}.bias", 3)
        previous = features
    return specs


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def child(folder: Path, count: int) -> None:
    """Aggregate `count` updates (the distinct files are used in turn) and print what it took."""
    from orchestrator.aggregation.mean import Update, weighted_mean

    files = sorted(folder.glob("update_*.safetensors"))
    updates = {f"site_{number:03d}": Update(files[number % len(files)], 10.0 + number) for number in range(count)}
    base = folder / "base.safetensors"
    for path in files:  # the files are in the page cache for both figures
        path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")
    idle = memory("VmRSS")
    started = time.perf_counter()
    weighted_mean(updates, base, folder / "global.safetensors")
    seconds = time.perf_counter() - started
    peak = memory("VmHWM")
    buffer = memoryview(bytearray(2**20))
    started = time.perf_counter()
    for number in range(count):
        with open(files[number % len(files)], "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    with open(folder / "floor", "wb") as target:
        for _ in range(base.stat().st_size // 2**20):
            target.write(buffer)
        target.flush()
        os.fsync(target.fileno())
    floor = time.perf_counter() - started
    print(json.dumps({"updates": count, "idle": idle, "above": peak - idle, "seconds": seconds, "floor": floor}))


def main() -> None:
    """Make the files, measure in child processes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[3, 64])
    parser.add_argument("--distinct", type=int, default=8, help="distinct update files on the disk")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.folder, arguments.child)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        specs = default_network()
        random = np.random.default_rng(0)
        for path in ["base", *(f"update_{number}" for number in range(arguments.distinct))]:
            write_tensors(
                folder / f"{path}.safetensors",
                specs,
                lambda tensor: random.standard_normal(specs[tensor].shape, dtype=np.float32),
            )
        model = TensorFile(folder / "base.safetensors").nbytes
        rows = []
        for count in arguments.updates:
            output = subprocess.run(
                [sys.executable, __file__, "--child", str(count), "--folder", str(folder)],
                check=True,
                capture_output=True,
                encoding="utf-8",
            ).stdout
            rows.append(json.loads(output))
    parameters = sum(spec.nbytes for spec in specs.values()) // 4
    table = Table(
        title=f"aggregation of the default network ({parameters / 1e6:.1f} M parameters, {model / 1e6:.1f} MB)"
    )
    for column in ("updates", "idle MB", "above idle MB", "in models", "s", "floor s (read all, write one)", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            str(row["updates"]),
            f"{row['idle'] / 1e6:.0f}",
            f"{row['above'] / 1e6:.1f}",
            f"{row['above'] / model:.3f}",
            f"{row['seconds']:.2f}",
            f"{row['floor']:.2f}",
            f"{row['seconds'] / row['floor']:.2f}",
        )
    Console(width=110).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps({"model_bytes": model, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
