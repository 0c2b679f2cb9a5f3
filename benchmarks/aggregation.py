"""Memory and time of every method of aggregation, beside Flower's own strategies on the same updates in the same run.

    python benchmarks/aggregation.py [--updates 8 32] [--methods mean median ...] [--ours] [--output aggregation.json]

Each figure is taken in a process of its own, over simulated updates of the default 31 M network. The floor is reading
every update once and writing one model once, with plain reads and writes of 1 MiB into one buffer. Peak memory is the
process's own high-water mark above its idle size (VmHWM - VmRSS).

Ours goes from update files to the next weights' file. Flower's strategies keep all updates in memory: the time is that
of `aggregate_train` alone, over messages that are there already (in a run they come from the network and are kept too),
and the memory that of the messages and of `aggregate_train`. The optimizers are measured in their second round, and
Flower's memory holds their moments.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from federation.study import Aggregation
from federation.weights import Spec, TensorFile, write_tensors

FEATURES = (32, 64, 128, 256, 320, 320)
OPTIMIZERS = ("fedavgm", "fedadagrad", "fedyogi", "fedadam")
METHODS = ("mean", *OPTIMIZERS, "median", "trimmed_mean", "krum", "multi_krum")
FAULTY = 2


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


def measured(prepare: Callable[[], Any], work: Callable[[Any], object]) -> dict[str, float]:
    """Memory above idle of both, and seconds of `work`."""
    Path("/proc/self/clear_refs").write_text("5")
    idle = memory("VmRSS")
    given = prepare()
    started = time.perf_counter()
    work(given)
    seconds = time.perf_counter() - started
    return {"idle": idle, "above": memory("VmHWM") - idle, "seconds": seconds}


def rule_of(method: str) -> Aggregation:
    return Aggregation(method=method, faulty_sites=FAULTY)  # type: ignore[arg-type]


def update_files(folder: Path, count: int) -> list[Path]:
    """As many updates as asked for: the distinct files are used in turn."""
    files = sorted(folder.glob("update_*.safetensors"))
    return [files[number % len(files)] for number in range(count)]


def ours(folder: Path, method: str, count: int) -> dict[str, float]:
    """From update files to the file of the next weights."""
    from orchestrator.aggregation.rules import Update, aggregate

    updates = {f"s{number:03d}": Update(path, 10.0 + number) for number, path in enumerate(update_files(folder, count))}
    base, out, before = folder / "base.safetensors", folder / "global.safetensors", folder / "before"
    if method in OPTIMIZERS:
        asked(folder, "first", method, 2)  # the round before, whose state is read
    return measured(lambda: None, lambda _: aggregate(rule_of(method), updates, base, out, before, folder / "after"))


def first(folder: Path, method: str, count: int) -> dict[str, float]:
    """An optimizer's first round, for its state."""
    from orchestrator.aggregation.rules import Update, aggregate

    updates = {f"s{number}": Update(path, 1.0) for number, path in enumerate(update_files(folder, count))}
    base, out = folder / "base.safetensors", folder / "global.safetensors"
    return measured(
        lambda: None,
        lambda _: aggregate(rule_of(method), updates, base, out, folder / "none", folder / "before"),
    )


def flowers(folder: Path, method: str, count: int) -> dict[str, float]:
    """Flower's strategy on messages that hold the same updates, each in memory of its own as they would arrive."""
    from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
    from flwr.serverapp import strategy as kinds

    rule = rule_of(method)
    moments = {"eta": rule.step, "tau": rule.tau}
    betas = {"beta_1": rule.beta_1, "beta_2": rule.beta_2}
    strategy: Any = {
        "mean": kinds.FedAvg,
        "fedavgm": lambda: kinds.FedAvgM(server_learning_rate=rule.step, server_momentum=rule.server_momentum),
        "fedadagrad": lambda: kinds.FedAdagrad(**moments),
        "fedyogi": lambda: kinds.FedYogi(**moments, **betas),
        "fedadam": lambda: kinds.FedAdam(**moments, **betas),
        "median": kinds.FedMedian,
        "trimmed_mean": lambda: kinds.FedTrimmedAvg(beta=rule.trim),
        "krum": lambda: kinds.Krum(num_malicious_nodes=FAULTY),
        "multi_krum": lambda: kinds.MultiKrum(num_malicious_nodes=FAULTY, num_nodes_to_select=count - FAULTY),
    }[method]()

    def record(path: Path) -> ArrayRecord:
        file = TensorFile(path)
        return ArrayRecord({name: Array(file.read(name)) for name in file.names})

    def replies(paths: list[Path]) -> list[Message]:
        about = {"run_id": 1, "message_id": "", "dst_node_id": 0, "reply_to_message_id": "", "group_id": ""}
        return [
            Message(
                RecordDict({"arrays": record(path), "metrics": MetricRecord({"num-examples": 10 + number})}),
                metadata=Metadata(**about, src_node_id=number + 1, created_at=0.0, ttl=60.0, message_type="train"),
            )
            for number, path in enumerate(paths)
        ]

    def prepare() -> list[Message]:
        if method in OPTIMIZERS:
            base = record(folder / "base.safetensors")
            start = base if method == "fedavgm" else {name: array.numpy() for name, array in base.items()}
            strategy.current_arrays = start
            strategy.aggregate_train(1, replies(update_files(folder, 2)))
            strategy.current_arrays = start
        return replies(update_files(folder, count))

    # Flower's Krum holds every update four times: should memory run out, this process goes, and no other
    Path("/proc/self/oom_score_adj").write_text("1000")
    return measured(prepare, lambda given: strategy.aggregate_train(2, given))


def floor(folder: Path, count: int) -> dict[str, float]:
    """Reading every update and writing one model, nothing else."""

    def work(buffer: memoryview) -> None:
        for path in update_files(folder, count):
            with open(path, "rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass
        with open(folder / "floor", "wb") as target:
            for _ in range((folder / "base.safetensors").stat().st_size // 2**20):
                target.write(buffer)
            target.flush()
            os.fsync(target.fileno())

    return measured(lambda: memoryview(bytearray(2**20)), work)


def child(folder: Path, what: str, method: str, count: int) -> None:
    """Measure one thing and print what it took."""
    for path in [folder / "base.safetensors", *set(update_files(folder, count))]:
        with open(path, "rb", buffering=0) as stream:  # the files are in the page cache for all figures
            while stream.read(2**20):
                pass
    measure = {"ours": ours, "first": first, "flower": flowers}
    found = floor(folder, count) if what == "floor" else measure[what](folder, method, count)
    print(json.dumps({"what": what, "method": method, "updates": count, **found}))


def asked(folder: Path, what: str, method: str, count: int) -> dict[str, Any]:
    """The same, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", what, method, str(count), "--folder", str(folder)],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # Flower's log
        encoding="utf-8",
    )
    if what == "flower" and done.returncode == -signal.SIGKILL:
        return {"what": what, "method": method, "updates": count, "out_of_memory": True}
    done.check_returncode()
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def main() -> None:
    """Make the files, measure in child processes, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--ours", action="store_true", help="leave Flower's strategies out")
    parser.add_argument("--distinct", type=int, default=8, help="distinct update files on the disk")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        what, method, count = arguments.child
        child(arguments.folder, what, method, int(count))
        return
    specs = default_network()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random = np.random.default_rng(0)
        for path in ["base", *(f"update_{number}" for number in range(arguments.distinct))]:
            write_tensors(
                folder / f"{path}.safetensors",
                specs,
                lambda tensor: random.standard_normal(specs[tensor].shape, dtype=np.float32),
            )
        model = TensorFile(folder / "base.safetensors").nbytes
        for count in arguments.updates:
            rows.append(asked(folder, "floor", "", count))
            for method in arguments.methods:
                rows += [asked(folder, what, method, count) for what in ("ours", "flower")[: 2 - arguments.ours]]
    show(rows, model, sum(spec.nbytes for spec in specs.values()) // 4)
    if arguments.output:
        arguments.output.write_text(json.dumps({"model_bytes": model, "rows": rows}, indent=1) + "\n")


def show(rows: list[dict[str, Any]], model: int, parameters: int) -> None:
    """Print the table: one line for each method and number of updates, ours and Flower's side by side."""
    found = {(row["what"], row["method"], row["updates"]): row for row in rows}
    table = Table(
        title=f"aggregation of the default network ({parameters / 1e6:.1f} M parameters, {model / 1e6:.1f} MB)",
        caption="MB: peak above idle. floor: read all updates, write one model.",
    )
    for column in ("method", "updates", "MB", "in models", "s", "times floor", "Flower MB", "in models", "Flower s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for what, method, count in found:
        row, other = found[what, method, count], found.get(("flower", method, count))
        if what == "flower":
            continue
        bottom = found["floor", "", count]["seconds"]
        beside = []
        if other and "above" in other:
            beside = [f"{other['above'] / 1e6:.0f}", f"{other['above'] / model:.1f}", f"{other['seconds']:.2f}"]
        elif other:
            beside = ["out of memory"]
        table.add_row(
            method or what,
            str(count),
            f"{row['above'] / 1e6:.1f}",
            f"{row['above'] / model:.3f}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / bottom:.2f}",
            *beside,
            end_section=method == METHODS[-1],
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
