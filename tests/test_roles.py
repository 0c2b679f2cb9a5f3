"""The orchestrator as two supervisors that share a state, as its pod runs it: readiness, the empty round, the end."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import (
    FEDNNUNET,
    ORCHESTRATOR,
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

from federation import audit
from federation.errors import Code, FednnunetError
from federation.processes import free_port
from orchestrator import readiness
from orchestrator.enrollment.authority import Authority, create
from orchestrator.server import Server

pytestmark = pytest.mark.slow


@dataclass
class Pod:
    """Simulated: a pod's two containers, as two process trees that share a folder and the loopback."""

    state: Path
    fleet: int
    control: int
    metrics: int

    @property
    def ports(self) -> tuple[object, ...]:
        return ("--state", self.state, "--fleet-port", self.fleet, "--control-port", self.control)

    def start(self, role: str) -> subprocess.Popen[str]:
        more = ("--role", role, "--poll", 0.1, "--metrics-port", self.metrics)
        return begin(ORCHESTRATOR, "start", *self.ports, *more, cwd=self.state)

    def scraped(self) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def health(self, *arguments: object) -> Done:
        return command(ORCHESTRATOR, "health", *self.ports, *arguments, cwd=self.state)

    def selftest(self, token: Path | None = None) -> Done:
        authority = Authority(self.state / "authority")
        return command(
            ORCHESTRATOR,
            *("selftest", "--fleet", f"localhost:{self.fleet}", "--control", f"localhost:{self.control}"),
            *("--ca", authority.ca, "--token", token or authority.token, "--timeout", 120),
            cwd=self.state,
        )

    def is_ready(self) -> bool:
        done = self.health("--ready")
        return done.status == 0 and done.out.count("\n") == 3  # one role that has not begun is passed over

    def submit(self, study: dict[str, Any]) -> Path:
        file = write_study(self.state / "study.yaml", study)
        where = ("--state", self.state, "--control", f"127.0.0.1:{self.control}", "--no-wait")
        good(command(FEDNNUNET, "study", "submit", file, *where, cwd=self.state))
        wait_for(lambda: list(self.state.glob("studies/*/journal.jsonl")), 120, "a journal")
        return next(self.state.glob("studies/*/journal.jsonl"))

    def server(self, role: str = "all") -> Server:
        return Server(self.state, fleet_port=self.fleet, control_port=self.control, role=role)


@contextlib.contextmanager
def running(pod: Pod) -> Iterator[dict[str, subprocess.Popen[str]]]:
    started = {role: pod.start(role) for role in ("superlink", "coordinator")}
    try:
        wait_for(pod.is_ready, 300, "ready")
        yield started
    finally:
        for process in started.values():
            process.send_signal(signal.SIGTERM)
        for process in started.values():
            end(process, 60)


@pytest.fixture
def pod(tmp_path: Path, no_process_left: None) -> Pod:
    create(tmp_path / "state" / "authority", ["orchestrator.example.org", "127.0.0.1"])
    return Pod(tmp_path / "state", free_port(), free_port(), free_port())


def copied_unless_gone(source: str, target: str) -> None:
    with contextlib.suppress(FileNotFoundError):  # what is being written has another name in a moment
        shutil.copy2(source, target)


def not_ready(server: Server) -> str:
    with pytest.raises(FednnunetError) as caught:
        readiness.check(server)
    assert caught.value.code is Code.NOT_READY
    return caught.value.found


def test_an_empty_round_readiness_by_role_and_a_study_that_a_shutdown_interrupts(pod: Pod, tmp_path: Path) -> None:
    refused(pod.health(), 722, "no supervisor")
    with running(pod) as started:
        for role, processes in (("superlink", ["superlink"]), ("coordinator", ["coordinator", "metrics"])):
            assert [line.split("\t")[0] for line in good(pod.health("--role", role)).out.splitlines()] == processes
        first = good(pod.selftest()).out.splitlines()
        assert [line.partition("\t")[0] for line in first] == ["ok"] * 5
        assert "empty round" in first[-1]
        assert not (pod.state / "selftest").exists(), "an empty round left something"

        log = (pod.state / "logs" / "superlink.log").read_text()
        assert log.count("EXPERIMENTAL") == 1, "what Flower says stands there once"
        assert "Running upgrade" not in log

        (tmp_path / "wrong").write_text("not the token")
        refused(pod.selftest(tmp_path / "wrong"), 723, "401")
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        other = create(tmp_path / "other", ["127.0.0.1"])
        done = command(
            ORCHESTRATOR,
            *("selftest", "--fleet", f"localhost:{pod.fleet}", "--control", f"localhost:{pod.control}"),
            *("--ca", other.ca, "--token", other.token),
            cwd=tmp_path,
        )
        refused(done, 606)

        journal = pod.submit(phantom_study(["nobody"], appear_deadline=600))
        wait_for(lambda: any(line.get("phase") == "enrolling" for line in audit.read(journal)), 120, "it waits")
        busy = good(pod.selftest()).out.splitlines()
        assert busy[-1].startswith("left out\t")
        assert good(pod.health("--ready")).out.count("\n") == 3
        label = f'study="{journal.parent.name[:16]}"'
        seen = pod.scraped()
        assert seen[f'fednnunet_study_phase{{name="small",phase="enrolling",{label}}}'] == 1
        assert seen[f"fednnunet_study_rounds{{{label}}}"] == 2
        assert seen[f"fednnunet_journal_lines_total{{{label}}}"] == len(audit.read(journal))

        started["coordinator"].send_signal(signal.SIGTERM)
        assert end(started["coordinator"], 60).status == 0
        assert audit.read(journal)[-1]["event"] == "interrupted"
        assert pod.health("--role", "superlink", "--ready").status == 0, "the SuperLink needs no coordinator"
        refused(pod.health("--role", "coordinator"), 722)

        started["coordinator"] = pod.start("coordinator")
        wait_for(lambda: audit.read(journal)[-1]["event"] == "opened", 300, "the study goes on")
        wait_for(pod.is_ready, 300, "ready")

        # what is damaged is named; in a copy, since the running one must stay whole
        server = pod.server()
        readiness.check(server)
        copy = Server(tmp_path / "copy", fleet_port=pod.fleet, control_port=pod.control)
        shutil.copytree(pod.state, copy.state, copy_function=copied_unless_gone)
        readiness.check(copy)
        damaged = copy.state / journal.relative_to(pod.state)
        damaged.write_bytes(damaged.read_bytes().replace(b'"enrolling"', b'"enroIling"'))
        assert journal.parent.name[:12] in not_ready(copy)
        audit.append(damaged, "done")
        readiness.check(copy)  # what has ended keeps nobody from work
        for beside in ("superlink.db-wal", "superlink.db-shm"):  # SQLite would mend the file from them
            (copy.state / beside).unlink(missing_ok=True)
        copy.database.write_bytes(b"no database")
        assert "database" in not_ready(copy)
        copy.database.unlink()
        assert "database" in not_ready(copy)
        with contextlib.closing(sqlite3.connect(copy.database)) as empty:
            empty.execute("CREATE TABLE other (id INTEGER)")
        assert "no SuperLink's database" in not_ready(copy)
        nobody = Server(copy.state, fleet_port=free_port(), control_port=pod.control)
        assert "hospitals' listener" in not_ready(nobody)
        nobody = Server(copy.state, fleet_port=pod.fleet, control_port=free_port(), role="coordinator")
        assert "control listener" in not_ready(nobody)
