"""Make the pictures of the documentation from a real study of phantom hospitals: `make pictures` (about 5 minutes).

Three generated hospitals, 12 rounds, then each site's own comparison. The worker of the third is held for a while, so
that the pictures show a site that was missing. The live screen is what `fednnunet study watch` draws, as SVG; the rest
is what Chromium shows of status page and reports. No image of a patient is in any of them.
"""

from __future__ import annotations

import io
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "images"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import browser  # noqa: E402

from federation.study import parse  # noqa: E402
from orchestrator.admin.phantom import make_phantom_sites, phantom_study  # noqa: E402
from orchestrator.admin.progress import screen  # noqa: E402
from orchestrator.admin.simulate import Simulation, SiteOptions  # noqa: E402
from orchestrator.history import load  # noqa: E402

ROUNDS = 12
SECTIONS = {
    "report-scores": "How good the model is, by site",
    "report-curves": "Training",
    "report-participation": "Who took part",
    "report-data": "The data, pooled",
}
SITE_SECTIONS = {"site-report-compare": "Did it help us?", "site-report-worst": "The worst cases"}


def hold_worker(state: Path) -> psutil.Process:
    """Stop the worker of a site, as a machine that hangs; the process."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "appliance.worker" in line and any(str(state) in word for word in line):
            process.send_signal(signal.SIGSTOP)
            return process
    raise SystemExit(f"no worker below {state}")


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sites = make_phantom_sites(Path(folder) / "hospitals")
        study = parse(
            phantom_study(sites, ROUNDS, 20)
            | {"name": "phantom-organs", "compare": "local", "personalise_epochs": 3, "quorum": 2, "round_deadline": 30}
        )
        simulation = Simulation(Path(folder) / "state", sites, SiteOptions(threads=1))
        with simulation.running():
            take(simulation, study)
        here = simulation.study_folder(study)
        with browser() as page:
            page.set_viewport_size({"width": 1100, "height": 900})
            shoot(page, here / "report.html", SECTIONS)
            site = simulation.state / "sites" / "hospital_c" / "state" / "worker" / study.id / "report.html"
            shoot(page, site, SITE_SECTIONS)
    for path in sorted(PICTURES.iterdir()):
        print(f"{path.relative_to(ROOT)}\t{path.stat().st_size / 1000:.0f} kB")


def take(simulation: Simulation, study: Any) -> None:
    """Run the study and take the pictures of its course."""
    token = (simulation.orchestrator / "authority" / "control.token").read_text().strip()
    failure: list[BaseException] = []

    def run() -> None:
        try:
            simulation.conduct(study, Console(file=io.StringIO()))
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            failure.append(error)

    thread = threading.Thread(target=run)
    credentials: Any = {"username": "coordinator", "password": token}
    with browser(ignore_https_errors=True, http_credentials=credentials) as page:
        page.set_viewport_size({"width": 1100, "height": 900})
        page.goto(f"https://{simulation.control_address}")
        thread.start()
        page.get_by_role("link", name=study.name).click(timeout=120_000)
        page.get_by_text(f"round 5 of {ROUNDS}").first.wait_for(timeout=600_000)
        held = hold_worker(simulation.state / "sites" / "hospital_c")
        page.get_by_text(f"round 6 of {ROUNDS}").first.wait_for(timeout=600_000)
        held.send_signal(signal.SIGCONT)
        page.get_by_text(f"round 9 of {ROUNDS}").first.wait_for(timeout=600_000)
        page.screenshot(path=PICTURES / "status-page.png")
        console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True)
        console.print(screen(load(simulation.study_folder(study))))
        console.save_svg(str(PICTURES / "study-watch.svg"), title=f"fednnunet study watch {study.name}")
        thread.join()
    if failure:
        raise failure[0]


def shoot(page: Any, report: Path, sections: dict[str, str]) -> None:
    """A picture of each of these sections of a report."""
    page.goto(report.as_uri())
    for name, heading in sections.items():
        section = page.locator("section", has=page.get_by_role("heading", name=heading, exact=True))
        section.first.screenshot(path=PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
