"""Bytes on the wire for each site and round, counted at the socket: nnU-Net's default network, each `wire`.

    python benchmarks/wire.py [--rounds 4] [--output wire.json]

The orchestrator, the network and the links are real; the sites are light (simulated: they train nothing). One site's
connection goes through a proxy that counts every byte, TLS and polling included. Beside it stands the original
FednnU-Net: 125 MB up, 355 MB down and 125 MB up again for the same network, 604 MB (derived from its measured
traffic, see docs/explanation/wire-and-journal.md).
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from light_site import LightSite
from line import Line

from federation.audit import Tail
from federation.study import Study, parse
from orchestrator.admin.simulate import Simulation, SiteOptions

ORIGINAL = 604e6


class Counted(Simulation):
    """A simulation whose first site is reached through the counting proxy."""

    proxy: Line | None = None

    def address(self, name: str) -> str:
        """The proxy for the first site."""
        if name != sorted(self.sites)[0]:
            return super().address(name)
        self.proxy = Line(self.fleet_port)
        return f"127.0.0.1:{self.proxy.port}"


def large_ct(name: str, sites: list[str], rounds: int, wire: str, deadline: int = 900) -> Study:
    """A study for which nnU-Net plans its default network."""
    return parse(
        {
            "name": name,
            "dataset": "Dataset900_LargeCT",
            "sites": sites,
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "organ": 1},
            "rounds": rounds,
            "wire": wire,
            "fold": "all",
            "round_deadline": deadline,
        }
    )


def conduct(simulation: Simulation, study: Study, take: Callable[[dict[str, Any]], None]) -> None:
    """Run a study to its end; `take` sees each line of its journal soon after it was written."""
    ended = threading.Event()

    def follow() -> None:
        tail = Tail(simulation.study_folder(study) / "journal.jsonl")
        while not ended.is_set():
            for line in tail.lines():
                take(line)
            time.sleep(0.02)

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        simulation.conduct(study, Console(file=io.StringIO()))
    finally:
        ended.set()
        thread.join()


def rounds_of(simulation: Counted, study: Study) -> list[dict[str, Any]]:
    """Run a study and note the proxy's counts whenever a round is closed."""
    counts: list[dict[str, Any]] = []
    before: tuple[int, int] | None = None

    def note(line: dict[str, Any]) -> None:
        nonlocal before
        proxy = simulation.proxy
        assert proxy is not None
        if line["event"] == "weights" and line["round"] == 0:
            before = (proxy.up, proxy.down)
        if line["event"] == "closed" and before is not None:
            up, down = proxy.up, proxy.down
            counts.append(
                {"round": line["round"], "up": up - before[0], "down": down - before[1], "seconds": line["seconds"]}
            )
            before = (up, down)

    conduct(simulation, study, note)
    return counts


def memory(simulation: Simulation) -> dict[str, float]:
    """Peak resident memory of each kind of process of this federation, in MB."""
    kinds = {
        "coordinator": "-m orchestrator coordinator",
        "SuperLink": "-m orchestrator superlink",
        "supernode": "-m appliance.link supernode",
        "link": "-m appliance.link link",
    }
    peaks: dict[str, float] = {}
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        for kind, words in kinds.items():
            if words in command and str(simulation.state) in command:
                status = Path(f"/proc/{process.pid}/status").read_text()
                (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
                peaks[kind] = max(peaks.get(kind, 0.0), int(line.split()[1]) * 1024 / 1e6)
    return peaks


def main() -> None:
    """Run both wires and print the table."""
    peaks: dict[str, float] = {}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    table = Table(title="bytes at the socket of one site, default 31 M network (124.8 MB of float32)")
    for column in ("wire", "round", "to the site MB", "from the site MB", "both MB", "of the original's 604 MB", "s"):
        table.add_column(column, justify="right")
    rows = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        sites = {site: Path(name) / "data" for site in ("light_a", "light_b")}
        (Path(name) / "data").mkdir()
        simulation = Counted(Path(name) / "state", sites, SiteOptions(role="link"))
        with simulation.running():
            light = [LightSite(simulation.state / "sites" / site / "state") for site in sites]
            for site in light:
                site.start()
            for wire in get_args(Study.model_fields["wire"].annotation):
                for row in rounds_of(simulation, large_ct(f"wire_{wire}", sorted(sites), arguments.rounds, wire)):
                    rows.append({"wire": wire, **row})
                    both = row["up"] + row["down"]
                    cells = [row["down"] / 1e6, row["up"] / 1e6, both / 1e6]
                    table.add_row(
                        wire,
                        str(row["round"]),
                        *(f"{cell:.1f}" for cell in cells),
                        f"{both / ORIGINAL:.1%}",
                        f"{row['seconds']:.1f}",
                    )
            for site in light:
                site.stop()
            peaks = memory(simulation)
    Console(width=110).print(table)
    print("peak memory (VmHWM) after both studies, MB:", ", ".join(f"{k} {v:.0f}" for k, v in peaks.items()))
    if arguments.output:
        arguments.output.write_text(json.dumps({"rounds": rows, "peak_megabytes": peaks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
