"""The pages for coordinator, hospital and platform engineer, run as they stand: every block, in its own words.

The distance is simulated by two loopback addresses: hospitals dial 127.0.0.2, the control listener is on 127.0.0.1.
"""

from __future__ import annotations

import csv
import re
import shutil
import socket
import stat
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from commands import (
    APPLIANCE,
    FEDNNUNET,
    ORCHESTRATOR,
    Done,
    command,
    good,
    phantom_study,
    refused,
    wait_for,
    write_study,
)
from documents import Page, Person

from federation.audit import read
from federation.flower.bundle import bundle_hash
from federation.processes import free_port

pytestmark = pytest.mark.slow

FLEET, CONTROL = "127.0.0.2", "127.0.0.1"
SETTINGS = {
    "FEDNNUNET_THREADS": "1",
    "FEDNNUNET_AUGMENTATION_PROCESSES": "0",
    "FEDNNUNET_PREPROCESSING_PROCESSES": "1",
    "FEDNNUNET_FINGERPRINT_PROCESSES": "1",
    "FEDNNUNET_POLL": "0.2",
}


class Distance:
    """An orchestrator's machine and hospitals, each with folders of their own, and the people at them."""

    def __init__(self, folder: Path, data: dict[str, Path]) -> None:
        self.folder = folder
        self.fleet_port, self.control_port = free_port(FLEET), free_port(CONTROL)
        self.address = f"{FLEET}:{self.fleet_port}"
        self.federation = folder / "srv" / "federation"
        common = {"orchestrator.example.org:8443": self.address, "orchestrator.example.org": FLEET}
        listeners = f"--fleet-host {FLEET} --fleet-port {self.fleet_port} --control-port {self.control_port}"
        here = {
            "--fleet-host 0.0.0.0 --fleet-port 8443": listeners,
            "/srv": str(folder / "srv"),
            "/backup": str(folder / "backup"),
        }
        (folder / "srv").mkdir()
        (folder / "backup").mkdir()
        self.control = f"{CONTROL}:{self.control_port}"
        ports = {"FEDNNUNET_FLEET_PORT": str(self.fleet_port), "FEDNNUNET_CONTROL_PORT": str(self.control_port)}
        variables = {"FEDNNUNET_CONTROL": self.control, "FEDNNUNET_FLEET_HOST": FLEET, "FEDNNUNET_POLL": "0.2"} | ports
        self.coordinator = Person(folder / "coordinator", common | here, variables)
        self.hospitals = {
            name: Person(
                folder / name,
                common
                | {
                    "hospital_a": name,
                    "/data/Dataset401_Liver": str(path),
                    "/srv/appliance": str(folder / name / "srv"),
                    "--device cuda": "--device cpu",
                },
                SETTINGS,
            )
            for name, path in data.items()
        }

    def config(self, site: str) -> Path:
        return self.hospitals[site].folder / "srv" / "config"

    def state(self, site: str) -> Path:
        return self.hospitals[site].folder / "srv" / "state"

    def mail(self, name: str, sender: Path, receiver: Person) -> None:
        """A file goes from one machine to another, as an attachment would."""
        shutil.copyfile(sender / name, receiver.folder / name)

    def listed(self) -> dict[str, str]:
        """What `fednnunet site list` says: status by site."""
        rows = [line.split("\t") for line in good(self.asks("site", "list")).out.splitlines()]
        return {name: status for name, state, status, *_ in rows if state == "approved"}

    def asks(self, *arguments: object) -> Done:
        """A command of the coordinator that is on no page."""
        state, here = ("--state", self.federation), self.coordinator.folder
        return command(FEDNNUNET, *arguments, *state, cwd=here, FEDNNUNET_CONTROL=self.control)

    def runs(self) -> None:
        wait_for(lambda: accepts(CONTROL, self.control_port), 180, "the control listener")

    def online(self) -> None:
        wait_for(lambda: self.listed() == dict.fromkeys(self.hospitals, "online"), 300, "all sites online")

    def journal(self, name: str) -> list[dict[str, object]]:
        """What is in the journal of the study with this name."""
        for path in self.federation.glob("studies/*/study.json"):
            if f'"name":"{name}"' in path.read_text().replace(" ", ""):
                return read(path.parent / "journal.jsonl")
        return []

    def ends(self) -> list[Done]:
        """Hospitals stop, then the orchestrator."""
        return [done for person in (*self.hospitals.values(), self.coordinator) for done in person.stops()]


@pytest.fixture
def distance(tmp_path: Path, tiny_phantom_sites: dict[str, Path], no_process_left: None) -> Iterator[Distance]:
    made = Distance(tmp_path, {name: tiny_phantom_sites[name] for name in ("hospital_a", "hospital_b")})
    try:
        yield made
    finally:
        made.ends()


def study_of(distance: Distance, **changes: object) -> None:
    """study.yaml of the pages, over phantoms."""
    study = phantom_study(list(distance.hospitals)) | {"name": "liver-2026", "dataset": "Dataset401_Liver", **changes}
    write_study(distance.coordinator.folder / "study.yaml", study)


@pytest.mark.long
def test_a_study_as_coordinator_and_hospitals_read_it_ends_with_a_model_and_leaves_no_process(
    distance: Distance,
) -> None:
    run, join = Page.of("how-to/run-a-study.md"), Page.of("how-to/join-a-federation.md")
    coordinator, hospitals = distance.coordinator, distance.hospitals

    said = coordinator.reads(run, "1. Make the federation")
    authority = distance.federation / "authority"
    assert str(authority / "ca.crt") in said
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700
    for name in ("ca.key", "server.key", "coordinator.key", "control.token", "runtime.secret"):
        assert stat.S_IMODE((authority / name).stat().st_mode) == 0o600, name
    distance.runs()

    let_in = "2. Let the hospitals in"
    for site, hospital in hospitals.items():
        coordinator.reads(run, let_in, 0, {"hospital_a": site})
        distance.mail(f"{site}.invitation.json", coordinator.folder, hospital)
        hospital.reads(join, "1. Enroll", 0)
        words = hospital.reads(join, "1. Enroll", 1)
        assert stat.S_IMODE((distance.config(site) / "site.key").stat().st_mode) == 0o600
        distance.mail(f"{site}.request.json", distance.config(site), coordinator)
        shown = coordinator.reads(run, let_in, 1, {"hospital_a": site})
        spoken = re.search(r"its key +(\S+(?: \S+)+)$", words, re.MULTILINE)
        assert spoken
        assert spoken[1] in shown, "what the hospital reads aloud is what the coordinator sees"
        assert "dataset" in hospital.reads(join, "2. Ask the doctor")
        settings = distance.config(site) / "site.toml"
        settings.write_text(settings.read_text() + f"metrics_port = {free_port(CONTROL)}\n")
        hospital.reads(join, "3. Start it", 0)
    distance.online()
    for hospital in hospitals.values():
        shown = hospital.reads(join, "3. Start it", 1)
        for line in ("supernode\t", "link\t", "worker\t", "metrics\t", distance.address):
            assert line in shown, shown
        check_addresses(hospital.started[0][0].pid)

    # hospitals reach one address, and it is not the control listener's
    assert not accepts(FLEET, distance.control_port), "the control listener is on loopback alone"
    assert listening(coordinator.started[0][0].pid) == {(FLEET, distance.fleet_port), (CONTROL, distance.control_port)}

    # a second one on the same folders is told so
    start = ("--state", distance.federation, "--fleet-host", FLEET, "--fleet-port", distance.fleet_port)
    refused(command(ORCHESTRATOR, "start", *start, cwd=distance.folder), 705, str(distance.federation))
    again = ("--config", distance.config("hospital_a") / "site.toml")
    refused(command(APPLIANCE, "start", *again, cwd=distance.folder), 705, str(distance.state("hospital_a")))

    study_of(distance)
    assert "a valid study" in coordinator.reads(run, "3. Write the study", 0)
    wait_for(
        lambda: distance.journal("liver-2026")[-1:] and distance.journal("liver-2026")[-1]["event"] == "failed",
        300,
        "a refusal",
    )
    for site in hospitals:
        assert f"{site}: FNU-622" in str(distance.journal("liver-2026")[-1])
    for hospital in hospitals.values():
        shown = hospital.reads(join, "4. Decide")
        assert "waits" in shown
        assert "What leaves this hospital" in shown
    shown = coordinator.reads(run, "3. Write the study", 1)
    for line in ("is submitted", "hospital_a is online", "describing ...", "round 2 of 2", "2 of 2 sites", "model: "):
        assert line in shown, shown
    for site in hospitals:
        assert re.search(rf"{site} .*2 \(imagesTs\)", shown), shown
    assert distance.journal("liver-2026")[-1]["event"] == "done"

    assert "done" in coordinator.reads(run, "4. Watch it")
    coordinator.reads(run, "5. The report and the model", 0)
    coordinator.variables = {**coordinator.variables, **nnunet_folders(distance.folder)}
    coordinator.reads(run, "5. The report and the model", 1)
    archive = coordinator.folder / "liver-2026" / "Dataset401_Liver.zip"
    assert any(name.endswith("fold_all/checkpoint_final.pth") for name in zipfile.ZipFile(archive).namelist())
    assert list(distance.folder.glob("models/Dataset401_Liver/*/fold_all/checkpoint_final.pth"))
    for site, hospital in hospitals.items():
        assert list(distance.state(site).glob("worker/*/**/fold_all/checkpoint_final.pth")), f"no model at {site}"
        assert read(distance.state(site) / "link" / "ledger.jsonl")[0]["to"] == distance.address
        assert "the chain holds" in hospital.reads(join, "5. Say what left")
        hospital.reads(join, "6. Hand the result to your researchers")
        assert "phantom" in (hospital.folder / "report.html").read_text(), "its own cases are named in its own report"
        assert "train" in scrape(distance.config(site) / "site.toml")

    # the coordinator sees which version each site has told, and that its link accepts this version's bundle
    rows = [line.split("\t") for line in good(distance.asks("site", "list")).out.splitlines()]
    assert {tuple(row[4:]) for row in rows} == {(version("fednnunet"), bundle_hash()[:12])}

    # the same command again says what there is, and does nothing twice
    lines = len(distance.journal("liver-2026"))
    run.done.discard(("3. Write the study", 1))
    assert "model: " in coordinator.reads(run, "3. Write the study", 1)
    assert len(distance.journal("liver-2026")) == lines
    assert run.left() == join.left() == []

    # SIGTERM ends everything; `no_process_left` looks for what is left
    for person in (*hospitals.values(), coordinator):
        (done,) = person.stops()
        assert done.status == 0, done
        assert "Traceback" not in done.out, done


@pytest.mark.long
def test_enroll_watch_stop_back_up_and_restore_as_the_pages_say(distance: Distance) -> None:
    enroll, watch = Page.of("how-to/enroll-a-hospital.md"), Page.of("how-to/watch-a-study.md")
    operate, own_say = Page.of("how-to/operate.md"), Page.of("how-to/approve-a-study.md")
    coordinator, hospitals = distance.coordinator, distance.hospitals
    by_hand, online = hospitals.values()

    coordinator.reads(enroll, "Before: the coordinator makes the federation")
    distance.runs()
    # one hospital by files, then once more with keys that people carry; the other one online
    coordinator.reads(enroll, "By files", 0)
    distance.mail("hospital_a.invitation.json", coordinator.folder, by_hand)
    by_hand.reads(enroll, "By files", 1)
    distance.mail("hospital_a.request.json", distance.config("hospital_a"), coordinator)
    coordinator.reads(enroll, "By files", 2)
    good(distance.asks("site", "revoke", "hospital_a"))
    shutil.rmtree(distance.config("hospital_a"))
    init, fingerprint, add = enroll.blocks["Without an invitation"][0].strip().splitlines()
    by_hand.types(init)
    early = ("start", "--config", distance.config("hospital_a") / "site.toml")
    refused(command(APPLIANCE, *early, cwd=distance.folder), 113, "ca.crt")
    for name in ("ca.crt", "coordinator.pub"):
        distance.mail(name, distance.federation / "authority", by_hand)
        shutil.move(by_hand.folder / name, distance.config("hospital_a") / name)
    distance.mail("site.pub", distance.config("hospital_a"), coordinator)
    assert "SHA256:" in coordinator.types(fingerprint)
    coordinator.types(add)
    enroll.done.add(("Without an invitation", 0))
    by_hand.reads(enroll, "By files", 3)

    good(distance.asks("site", "invite", "hospital_b", "--orchestrator", distance.address))
    distance.mail("hospital_b.invitation.json", coordinator.folder, online)
    online.reads(enroll, "Online", 0)
    coordinator.reads(enroll, "Online", 1, {"hospital_a": "hospital_b"})
    enroll.done.discard(("By files", 3))
    online.reads(enroll, "By files", 3)
    distance.online()
    assert enroll.left() == []

    # a study that is asked for, approved, backed up while it runs, and cut off by the loss of the orchestrator's disk
    study_of(distance, rounds=60)
    refused(distance.asks("study", "submit", "study.yaml"), 502, "FNU-622")
    for hospital in hospitals.values():
        hospital.reads(own_say, "Approve a study")
    good(distance.asks("study", "submit", "study.yaml", "--no-wait"))
    rounds(distance, 3)
    coordinator.reads(operate, "See that it is well")
    coordinator.reads(operate, "Back up")
    rounds(distance, 6)
    coordinator.stops()
    coordinator.reads(operate, "Restore", 0)
    distance.runs()
    distance.online()

    def refusals() -> int:
        """How often a site has refused to go back."""
        return sum("FNU-621" in str(line) for line in distance.journal("liver-2026"))

    wait_for(lambda: refusals() >= 2, 300, "both sites refuse the past")
    for hospital in hospitals.values():
        hospital.reads(operate, "Restore", 1)
    wait_for(lambda: distance.journal("liver-2026")[-1]["event"] == "failed", 300, "the study ends for now")
    good(distance.asks("study", "submit", "study.yaml", "--no-wait"))
    rounds(distance, 8)

    coordinator.reads(operate, "Upgrade")
    coordinator.reads(operate, "Rotate certificates, tokens, keys")
    coordinator.stops()  # the new token is taken up by a start
    coordinator.types(enroll.blocks["Before: the coordinator makes the federation"][0].splitlines()[1])
    distance.runs()
    distance.online()
    rounds(distance, 10)

    # looked at, stopped, taken up again
    coordinator.reads(
        watch, "On a terminal", also={"fednnunet study watch": "timeout 5 fednnunet study watch"}, ends={124}
    )
    coordinator.reads(watch, "Stop, and go on", also={"resume liver-2026": "resume liver-2026 --no-wait"})
    events = [line["event"] for line in distance.journal("liver-2026")]
    assert "stopped" in events
    rounds(distance, 12)
    good(distance.asks("study", "stop", "liver-2026"))
    coordinator.reads(watch, "The report")
    coordinator.reads(watch, "TensorBoard, MLflow")
    assert (coordinator.folder / "liver-2026" / "SHA256SUMS").exists()
    assert operate.left() == []
    for hospital in hospitals.values():
        hospital.reads(own_say, "What has left")
    with open(by_hand.folder / "ledger.csv", encoding="utf-8") as stream:
        assert sum(row["kind"] == "train" for row in csv.DictReader(stream)) >= 12
    assert own_say.left() == []


def rounds(distance: Distance, number: int) -> None:
    """Wait for a round's weights."""

    def done() -> bool:
        lines = distance.journal("liver-2026")
        return bool(lines) and any(line["event"] == "weights" and line["round"] == number for line in lines)

    wait_for(done, 400, f"round {number}")


def nnunet_folders(folder: Path) -> dict[str, str]:
    """nnU-Net's three variables."""
    return {
        "nnUNet_results": str(folder / "models"),
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
    }


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def listening(pid: int) -> set[tuple[str, int]]:
    """Where a process, or one below it, listens."""
    top = psutil.Process(pid)
    return {
        (connection.laddr.ip, connection.laddr.port)
        for process in [top, *top.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }


def check_addresses(pid: int) -> None:
    for address, _ in listening(pid):
        assert address == "127.0.0.1", "an appliance listens beyond its own machine"


def scrape(settings: Path) -> str:
    """What the site's own Prometheus would be told."""
    import tomllib
    import urllib.request

    port = tomllib.loads(settings.read_text())["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())
