"""The processes of a study by hand, as docs/how-to/different-machines.md says: every command is the one written there.

The distance is simulated by two loopback addresses: hospitals dial 127.0.0.2, the control listener is on 127.0.0.1.
"""

from __future__ import annotations

import re
import signal
import socket
import stat
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
from commands import (
    APPLIANCE,
    FEDNNUNET,
    ORCHESTRATOR,
    REPOSITORY,
    Done,
    begin,
    command,
    end,
    good,
    phantom_study,
    refused,
    wait_for,
    write_study,
)

from federation.audit import read
from federation.flower.bundle import bundle_hash
from federation.processes import free_port

pytestmark = pytest.mark.slow

FLEET, CONTROL = "127.0.0.2", "127.0.0.1"
SITES = ("hospital_a", "hospital_b")
DOCUMENT = REPOSITORY / "docs" / "how-to" / "different-machines.md"


@dataclass
class Hand:
    """What a coordinator and two hospitals have before them: folders, ports, and the processes they started."""

    folder: Path
    fleet_port: int
    control_port: int
    started: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    @property
    def federation(self) -> Path:
        return self.folder / "federation"

    @property
    def control(self) -> str:
        return f"{CONTROL}:{self.control_port}"

    def config(self, site: str) -> Path:
        return self.folder / site / "config"

    def state(self, site: str) -> Path:
        return self.folder / site / "state"

    def start(self, name: str, module: str, *arguments: object) -> None:
        self.started[name] = begin(module, *arguments, cwd=self.folder)

    def listed(self) -> dict[str, str]:
        """What `fednnunet site list` says: status by site."""
        done = command(
            FEDNNUNET, "site", "list", "--state", self.federation, "--control", self.control, cwd=self.folder
        )
        rows = [line.split("\t") for line in good(done).out.splitlines()]
        return {name: status for name, state, status, *_ in rows if state == "approved"}

    def end_all(self) -> dict[str, tuple[Done, float]]:
        """SIGTERM to what was started, hospitals first; how each ended, and within how many seconds."""
        ended = {}
        for name in reversed(list(self.started)):
            process = self.started.pop(name)
            began = time.monotonic()
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            ended[name] = (end(process, 30), time.monotonic() - began)
        return ended


@pytest.fixture
def hand(tmp_path: Path, no_process_left: None) -> Iterator[Hand]:
    made = Hand(tmp_path, free_port(FLEET), free_port(CONTROL))
    try:
        yield made
    finally:
        made.end_all()


def test_a_study_by_hand_over_two_addresses_ends_with_a_model_and_leaves_no_process(
    hand: Hand, tiny_phantom_sites: dict[str, Path]
) -> None:
    # coordinator: make the federation, start the orchestrator
    said = good(command(FEDNNUNET, "federation", "init", hand.federation, "--name", FLEET, cwd=hand.folder))
    authority = hand.federation / "authority"
    assert str(authority / "ca.crt") in said.out
    assert stat.S_IMODE(authority.stat().st_mode) == 0o700
    for name in ("ca.key", "server.key", "coordinator.key", "control.token", "runtime.secret"):
        assert stat.S_IMODE((authority / name).stat().st_mode) == 0o600, name
    listeners = ("--fleet-host", FLEET, "--fleet-port", hand.fleet_port, "--control-port", hand.control_port)
    hand.start("orchestrator", ORCHESTRATOR, "start", "--state", hand.federation, *listeners)

    # hospitals: make the identity; coordinator: let the site in; hospitals: start
    for site in SITES:
        said = good(
            command(
                APPLIANCE,
                *("init", "--name", site, "--orchestrator", f"{FLEET}:{hand.fleet_port}"),
                *("--data", tiny_phantom_sites[site], "--config", hand.config(site), "--state", hand.state(site)),
                *("--device", "cpu"),
                cwd=hand.folder,
            )
        )
        assert re.search(r"SHA256:[A-Za-z0-9+/]{43}", said.out), said
        assert stat.S_IMODE((hand.config(site) / "site.key").stat().st_mode) == 0o600
        if site == SITES[0]:
            early = command(APPLIANCE, "start", "--config", hand.config(site) / "site.toml", cwd=hand.folder)
            refused(early, 113, "ca.crt")
        for name in ("ca.crt", "coordinator.pub"):
            (hand.config(site) / name).write_bytes((authority / name).read_bytes())
    wait_for(lambda: accepts(CONTROL, hand.control_port), 60, "the control listener")
    for site in SITES:
        key = hand.config(site) / "site.pub"
        added = command(
            FEDNNUNET,
            *("site", "add", site, key, "--state", hand.federation, "--control", hand.control),
            cwd=hand.folder,
        )
        assert f"{site} is registered" in good(added).out
        hand.start(site, APPLIANCE, "start", "--config", hand.config(site) / "site.toml")
    wait_for(lambda: hand.listed() == dict.fromkeys(SITES, "online"), 90, "both sites online")

    # hospitals reach one address, and it is not the control listener's
    assert not accepts(FLEET, hand.control_port), "the control listener is on loopback alone"
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in family(hand.started["orchestrator"].pid)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {(FLEET, hand.fleet_port), (CONTROL, hand.control_port)}
    for site in SITES:
        for process in family(hand.started[site].pid):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    assert connection.laddr.ip == "127.0.0.1", f"{site} listens beyond its own machine"

    # a second one on the same folders is told so
    again = command(ORCHESTRATOR, "start", "--state", hand.federation, *listeners, cwd=hand.folder)
    refused(again, 705, str(hand.federation))
    again = command(APPLIANCE, "start", "--config", hand.config(SITES[0]) / "site.toml", cwd=hand.folder)
    refused(again, 705, str(hand.state(SITES[0])))

    # coordinator: check, submit, look on
    study = write_study(hand.folder / "study.yaml", phantom_study(SITES))
    assert "a valid study" in good(command(FEDNNUNET, "study", "check", study, cwd=hand.folder)).out
    submit = (*("study", "submit", study, "--state", hand.federation), *("--control", hand.control))
    refused(command(FEDNNUNET, *submit, cwd=hand.folder), 502, "hospital_a: FNU-622", "hospital_b: FNU-622")
    for site in SITES:
        at = ("--config", hand.config(site) / "site.toml")
        assert "waits" in good(command(APPLIANCE, "studies", *at, cwd=hand.folder)).out
        shown = good(command(APPLIANCE, "approve", "small", *at, "--yes", cwd=hand.folder)).out
        assert "What leaves this hospital" in shown
    shown = good(command(FEDNNUNET, *submit, cwd=hand.folder)).out
    for line in ("is submitted", "hospital_a is online", "describing ...", "round 2 of 2", "2 of 2 sites", "model: "):
        assert line in shown, shown
    for site in SITES:
        assert re.search(rf"{site} .*2 \(imagesTs\)", shown), shown
    shown_path = re.search(r"^model: (.*\.zip)", shown, re.M)
    assert shown_path, shown
    archive = Path(shown_path[1])
    assert any(name.endswith("fold_all/checkpoint_final.pth") for name in zipfile.ZipFile(archive).namelist())
    assert read(archive.parent / "journal.jsonl")[-1]["event"] == "done"
    for site in SITES:
        assert list(hand.state(site).glob("worker/*/**/fold_all/checkpoint_final.pth")), f"no model at {site}"
        assert read(hand.state(site) / "link" / "ledger.jsonl")[0]["to"] == f"{FLEET}:{hand.fleet_port}"
        shown = good(
            command(APPLIANCE, "ledger", "verify", "--config", hand.config(site) / "site.toml", cwd=hand.folder)
        )
        assert "the chain holds" in shown.out

    # the coordinator sees which version each site has told, and that its link accepts this version's bundle
    sites = command(FEDNNUNET, "site", "list", "--state", hand.federation, "--control", hand.control, cwd=hand.folder)
    rows = [line.split("\t") for line in good(sites).out.splitlines()]
    assert {tuple(row[4:]) for row in rows} == {(version("fednnunet"), bundle_hash()[:12])}

    # the same command again says what there is, and does nothing twice
    lines = len(read(archive.parent / "journal.jsonl"))
    assert "model: " in good(command(FEDNNUNET, *submit, cwd=hand.folder)).out
    assert len(read(archive.parent / "journal.jsonl")) == lines

    # SIGTERM ends everything; `no_process_left` looks for what is left
    for name, (done, seconds) in hand.end_all().items():
        assert done.status == 0, f"{name}: {done}"
        assert "Traceback" not in done.err, f"{name}: {done}"
        assert seconds < 15, f"{name} took {seconds:.1f} s to end"


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    top = psutil.Process(pid)
    return [top, *top.children(recursive=True)]


def test_every_option_in_the_document_is_one_of_the_commands() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    modules = {"fednnunet": FEDNNUNET, "orchestrator": ORCHESTRATOR, "appliance": APPLIANCE}
    checked = []
    for line in commands:
        program, *words = line.split()
        if program not in modules:
            continue
        path = [word for word in words[: 2 if program == "fednnunet" else 1] if not word.startswith("-")]
        shown = command(modules[program], *path, "--help", cwd=REPOSITORY, NO_COLOR="1")
        for option in (word for word in words if word.startswith("-")):
            assert option.partition("=")[0] in good(shown).out, f"{option} of `{line}` is not known"
        checked.append(" ".join([program, *path]))
    for needed in (
        *("fednnunet federation init", "fednnunet site add", "fednnunet site list", "fednnunet study submit"),
        *("orchestrator start", "appliance init", "appliance start"),
    ):
        assert needed in checked, f"the document does not show `{needed}`"
