"""A hospital behind a slow line that breaks: does the round end, how long does it take, what is sent twice.

    python benchmarks/slow_lines.py [--megabits 30] [--cut 10] [--lines none half-open] [--wire full] [--output FILE]

Two light (simulated) sites with real links and supernodes, nnU-Net's default network, one round a study: 124.8 MB to
the site (a first round's weights go in full), and as many back, or with `--wire` fewer. The first site's connection
goes through benchmarks/line.py: so many Mbit/s in each direction, 20 ms one way; then the same with the line cut in the
middle of the download, in the middle of the upload, and held (half-open: nothing is forwarded, nothing is closed) in
the middle of the upload. What is sent twice is what went over the socket beyond the undisturbed round. The floor is the
bytes at that bandwidth.

`--stuck` measures something else: four rounds whose deadline is 30 s more than the floor, with the line held from the
middle of the first upload on for two deadlines. A site that is stuck may cost the others a round's deadline, no more,
and takes part again once its line is back.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from light_site import LightSite
from line import Line
from wire import conduct, large_ct

from orchestrator.admin.simulate import Simulation, SiteOptions

MODEL = 124.8e6
UPDATE = {"full": 124.8e6, "half": 62.4e6, "int8": 31.2e6}
SLOW = "light_a"
LINES = {
    "none": "none",
    "download": "cut in the download",
    "upload": "cut in the upload",
    "half-open": "half-open in the upload",
}


class Slow(Simulation):
    """A simulation whose first site is behind a slow line."""

    line: Line | None = None
    megabits: float = 30.0
    wire: str = "full"

    @property
    def floor(self) -> float:
        """Seconds of a round's bytes, there and back."""
        return (MODEL + UPDATE[self.wire]) * 8e-6 / self.megabits

    def address(self, name: str) -> str:
        """The line for the first site."""
        if name != SLOW:
            return super().address(name)
        self.line = Line(self.fleet_port, self.megabits, latency=0.02)
        return f"127.0.0.1:{self.line.port}"


def disturbance(line: Line, kind: str, seconds: float, update: float, floor: float) -> Callable[[], None]:
    """What happens to the line in the middle of a round's transfer."""
    up, down = line.up, line.down

    def go() -> None:
        if kind == "none":
            return
        end = time.monotonic() + 1200 + floor
        while (line.down - down < MODEL / 2) if "download" in kind else (line.up - up < update / 2):
            if time.monotonic() > end:
                return
            time.sleep(0.05)
        (line.hold if "half-open" in kind else line.cut)(seconds)

    return go


def one_round(simulation: Slow, kind: str, seconds: float) -> dict[str, Any]:
    """One study of one round; its bytes and seconds from the task's push to the answer."""
    line = simulation.line
    assert line is not None
    name, deadline = f"line-{kind.replace(' ', '-')}", 900 + round(2 * simulation.floor + seconds)
    study = large_ct(name, ["light_a", "light_b"], 1, simulation.wire, deadline)
    told: list[dict[str, Any]] = []
    count: dict[str, tuple[int, int]] = {}

    def note(row: dict[str, Any]) -> None:
        told.append(row)
        if row["event"] == "weights" and row["round"] == 0:
            count["before"] = line.up, line.down
            happens = disturbance(line, kind, seconds, UPDATE[simulation.wire], simulation.floor)
            threading.Thread(target=happens, daemon=True).start()
        if row["event"] == "closed":
            count["after"] = line.up, line.down

    conduct(simulation, study, note)
    (closed,) = [row for row in told if row["event"] == "closed"]
    assert closed["participants"] == ["light_a", "light_b"], closed
    asked = sum(row["event"] == "asked" and row["site"] == SLOW and row["key"].startswith("train") for row in told)
    return {
        "what": kind,
        "seconds": closed["seconds"],
        "up": count["after"][0] - count["before"][0],
        "down": count["after"][1] - count["before"][1],
        "asked": asked,
    }


def stuck(simulation: Slow) -> list[dict[str, Any]]:
    """Rounds with a deadline while the first site is stuck in an upload; see the module."""
    line, told = simulation.line, list[dict[str, Any]]()
    assert line is not None
    deadline = round(simulation.floor + 30)
    study = large_ct("line-stuck", ["light_a", "light_b"], 4, simulation.wire, deadline)
    study = study.model_copy(update={"quorum": 1})
    happens = disturbance(line, "half-open", 2.0 * deadline, UPDATE[simulation.wire], simulation.floor)
    threading.Thread(target=happens, daemon=True).start()
    conduct(simulation, study, told.append)
    closed = [row for row in told if row["event"] == "closed"]
    assert all("light_b" in row["participants"] for row in closed), closed
    keys = ("round", "seconds", "participants")
    return [{"deadline": deadline, **{key: row[key] for key in keys}} for row in closed]


def table_of_lines(rows: list[dict[str, Any]], simulation: Slow, cut: float) -> Table:
    """What each disturbance has cost."""
    calm = rows[0]
    table = Table(
        title=f"{simulation.megabits:g} Mbit/s, wire: {simulation.wire}, the line away for {cut:g} s; "
        f"floor {simulation.floor:.0f} s"
    )
    for column in ("", "s", "to the site MB", "from the site MB", "sent twice MB", "times asked"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        row["twice"] = max(0, row["up"] + row["down"] - calm["up"] - calm["down"])
        megabytes = (f"{row[key] / 1e6:.1f}" for key in ("down", "up", "twice"))
        table.add_row(row["what"], f"{row['seconds']:.1f}", *megabytes, str(row["asked"]))
    return table


def table_of_rounds(rows: list[dict[str, Any]]) -> Table:
    """What a stuck site has cost the other one."""
    table = Table("round", "s", "who took part", title=f"a deadline of {rows[0]['deadline']} s, one of two sites stuck")
    for row in rows:
        table.add_row(str(row["round"]), f"{row['seconds']:.1f}", ", ".join(row["participants"]))
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabits", type=float, default=30.0)
    parser.add_argument("--cut", type=float, default=10.0, help="Seconds without the line.")
    parser.add_argument(
        "--lines", nargs="+", choices=list(LINES), default=list(LINES), help="Which; `none` goes first."
    )
    parser.add_argument("--stuck", action="store_true", help="A stuck site and the round's deadline, and nothing else.")
    parser.add_argument("--wire", choices=list(UPDATE), default="full")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        (Path(name) / "data").mkdir()
        sites = {site: Path(name) / "data" for site in ("light_a", "light_b")}
        simulation = Slow(Path(name) / "state", sites, SiteOptions(role="link"))
        simulation.megabits, simulation.wire = arguments.megabits, arguments.wire
        with simulation.running():
            light = [LightSite(simulation.state / "sites" / site / "state") for site in simulation.sites]
            for site in light:
                site.start()
            if arguments.stuck:
                rows = stuck(simulation)
                table = table_of_rounds(rows)
            else:
                rows = []
                for kind in (title for line, title in LINES.items() if line in {"none", *arguments.lines}):
                    rows.append(one_round(simulation, kind, arguments.cut))
                    print(json.dumps(rows[-1]), flush=True)
                table = table_of_lines(rows, simulation, arguments.cut)
            for site in light:
                site.stop()
    Console(width=110).print(table)
    if arguments.output:
        record = {"megabits": arguments.megabits, "wire": arguments.wire, "cut_seconds": arguments.cut}
        record |= {"floor_seconds": simulation.floor, "rows": rows}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
