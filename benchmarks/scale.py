"""How many sites one orchestrator carries: the real SuperLink and coordinator, light simulated sites, real sizes.

    python benchmarks/scale.py [--sites 8 32 128] [--network default|resenc_l|small] [--rounds 2] [--output scale.json]
        [--keep FOLDER]

Each light site is a thread here that speaks the Fleet API with a key, signatures and TLS of its own and answers at once
(benchmarks/light_site.py): it trains nothing, so a round is what the orchestrator, the network stack and the disk need.
All of it, the light sites too, shares this machine's cores and disk. `default`: nnU-Net's 31 M network, 124.8 MB of
weights each way; `resenc_l`: its 102 M network, 409 MB; `small`: the demo's network, 164 kB, where only the number of
sites counts.

For each number of sites: seconds of a round, split at the journal into asking all sites, the whole exchange, and
aggregation; peak memory of coordinator and SuperLink; the most disk used while a round was under way, and what stays
after it. A number of sites for which this machine has not the disk is left out and said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from light_site import LightClient
from wire import memory

from appliance import identity
from federation.audit import Tail
from federation.readable import moment
from federation.study import Study, parse
from orchestrator.admin.simulate import Simulation, SiteOptions
from orchestrator.enrollment.authority import Authority
from orchestrator.enrollment.ceremony import let_in
from orchestrator.history import History

MODEL = {"default": 124.8e6, "resenc_l": 409e6, "small": 0.17e6}
PLANNER = {"default": "ExperimentPlanner", "resenc_l": "nnUNetPlannerResEncL", "small": "SmallUNetPlanner"}
CT = {"dataset": "Dataset900_LargeCT", "channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}


class Watch(threading.Thread):
    """The most disk that the orchestrator's state takes."""

    def __init__(self, state: Path) -> None:
        super().__init__(daemon=True)
        self._state, self._over = state, threading.Event()
        self.disk = 0.0

    def run(self) -> None:
        """Look until stopped."""
        while not self._over.wait(0.5):
            self.disk = max(self.disk, used(self._state))

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self.join()


def used(folder: Path) -> float:
    """Megabytes below a folder, now."""
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that go meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_blocks * 512
    return total / 1e6


def study_of(names: list[str], network: str, rounds: int) -> Study:
    """A study that nobody trains."""
    fields = {"name": f"scale-{len(names)}", "sites": names, "rounds": rounds, "fold": "all"}
    return parse(fields | CT | {"planner": PLANNER[network]})


def measure(count: int, network: str, rounds: int, poll: float, keep: Path | None) -> dict[str, Any]:
    """One orchestrator, so many light sites, a whole study."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        here = Path(name)
        names = [f"light_{number:03d}" for number in range(count)]
        study = study_of(names, network, rounds)
        orchestrator = Simulation(here / "state", {}, SiteOptions())  # its sites come from elsewhere
        with orchestrator.running():
            authority = Authority(orchestrator.orchestrator / "authority")
            control, address = orchestrator.control(), orchestrator.fleet_address
            began = time.monotonic()
            sites = []
            for site in names:
                folder = here / "sites" / site
                public = identity.create(
                    folder, name=site, orchestrator=address, data=here, state=folder / "state", device="cpu"
                )
                let_in(orchestrator.orchestrator, control, site, public.read_bytes())
                sites.append(
                    LightClient(site, address, authority.ca.read_bytes(), authority.signing_public, folder, poll)
                )
            registered = time.monotonic() - began
            watch = Watch(orchestrator.orchestrator)
            watch.start()
            for one in sites:
                one.start()
            control.start(study.model_dump_json())
            history, tail = History(study), Tail(orchestrator.study_folder(study) / "journal.jsonl")
            asked: dict[str, list[float]] = {}
            try:
                while history.ended is None:
                    for line in tail.lines():
                        history.take(line)
                        if line["event"] == "asked" and line["key"].startswith("train"):
                            asked.setdefault(line["key"], []).append(moment(line["at"]))
                    if failed := [one.failure for one in sites if one.failure is not None]:
                        raise failed[0]
                    orchestrator.supervisor.look()  # type: ignore[union-attr]
                    time.sleep(0.2)
            finally:
                if keep is not None:
                    shutil.copytree(orchestrator.orchestrator / "logs", keep / str(count), dirs_exist_ok=True)
                    shutil.copy(orchestrator.study_folder(study) / "journal.jsonl", keep / str(count))
                elif history.ended != "done":
                    for log in ("superlink", "coordinator"):
                        print((orchestrator.orchestrator / "logs" / f"{log}.log").read_text()[-3000:], file=sys.stderr)
                watch.stop()
                for one in sites:
                    one.stop()
                for one in sites:
                    one.join(30)
            stays, peaks = used(orchestrator.orchestrator), memory(orchestrator)
        if history.ended != "done":
            raise SystemExit(f"{count} sites: {history.ended}: {history.reason}")
        exchange = statistics.median(one.seconds for one in history.rounds)
        aggregate = statistics.median(history.aggregation)
        whole = [len(one.participants) == count for one in history.rounds]
        assert all(whole), "a light site was missing"
        return {
            "sites": count,
            "network": network,
            "register_seconds": round(registered, 1),
            "steps_seconds": {key: round(value, 1) for key, value in history.spent().items()},
            "exchange_seconds": round(exchange, 2),
            "asking_seconds": round(statistics.median(max(times) - min(times) for times in asked.values()), 2),
            "aggregate_seconds": round(aggregate, 2),
            "megabytes_per_second": round(2 * count * MODEL[network] / 1e6 / exchange, 1),
            "coordinator_megabytes": round(peaks["coordinator"]),
            "superlink_megabytes": round(peaks["SuperLink"]),
            "disk_megabytes_most": round(watch.disk),
            "disk_megabytes_after": round(stays),
            "journal_lines": history.lines,
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--network", choices=list(MODEL), default="default")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--poll", type=float, default=0.5)
    parser.add_argument("--keep", type=Path, help="a folder for the orchestrator's logs and journals")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rows = []
    for count in arguments.sites:
        need = 1.5 * count * MODEL[arguments.network]  # updates, at their sites or at the coordinator, and on the way
        if shutil.disk_usage(tempfile.gettempdir()).free < need + 5e9:
            print(f"{count} sites: left out, {need / 1e9:.0f} GB of disk needed")
            continue
        rows.append(measure(count, arguments.network, arguments.rounds, arguments.poll, arguments.keep))
        print(json.dumps(rows[-1]), flush=True)
    table = Table(title=f"{arguments.network} network, {MODEL[arguments.network] / 1e6:.1f} MB of weights each way")
    columns = {
        "sites": "sites",
        "asking s": "asking_seconds",
        "exchange s": "exchange_seconds",
        "aggregate s": "aggregate_seconds",
        "MB/s": "megabytes_per_second",
        "coordinator MB": "coordinator_megabytes",
        "SuperLink MB": "superlink_megabytes",
        "disk MB, most": "disk_megabytes_most",
        "after": "disk_megabytes_after",
    }
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*(str(row[key]) for key in columns.values()))
    Console(width=110).print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
