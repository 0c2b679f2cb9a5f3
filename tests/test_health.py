"""What `appliance health` asks, what the supervisor tells it, and the ports that its children get."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from commands import REPOSITORY, wait_for

from federation import health, processes
from federation.errors import Code, FednnunetError
from federation.processes import STATUS, Child, Lock, Supervisor, own_folders


def supervised(folder: Path, program: str) -> Supervisor:
    child = Child("worker", [sys.executable, "-c", program], folder / "logs" / "worker.log")
    supervisor = Supervisor([child], grace=2, status=folder)
    supervisor.start()
    supervisor._tell()
    return supervisor


def refused(folder: Path) -> str:
    with pytest.raises(FednnunetError) as caught:
        health.ask([folder])
    assert caught.value.code is Code.NOT_RUNNING
    return caught.value.found


def test_healthy_then_silent_then_down_then_gone(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    supervisor = supervised(tmp_path, "import time; time.sleep(60)")
    try:
        (found,) = health.ask([tmp_path])
        assert (found.name, found.restarts) == ("worker", 0)
        assert found.pid == supervisor.children[0].pid
        past = time.time() - health.PATIENCE - 1
        os.utime(tmp_path / STATUS, (past, past))
        assert "has not looked" in refused(tmp_path)
        os.utime(tmp_path / STATUS)
    finally:
        supervisor.stop()
    assert "down: worker" in refused(tmp_path)
    lock.release()
    assert "no supervisor" in refused(tmp_path)


CHILD = """
import sys, time
from pathlib import Path
from federation.processes import end_with_parent
folder = Path(sys.argv[1])
(folder / "begun").touch()
while not (folder / "go").exists():
    time.sleep(0.01)
end_with_parent()
(folder / "lives").touch()
"""
PARENT = """
import os, sys, time
from pathlib import Path
from federation.processes import Child
folder = Path(sys.argv[1])
Child("child", [sys.executable, "-c", sys.argv[2], str(folder)], folder / "log").start()
while not (folder / "begun").exists():
    time.sleep(0.01)
os._exit(0)
"""


def test_a_child_whose_parent_is_gone_before_it_could_ask_ends_at_once(tmp_path: Path, no_process_left: None) -> None:
    """It belongs to init by then, and would run for ever."""
    subprocess.run([sys.executable, "-c", PARENT, tmp_path, CHILD], cwd=REPOSITORY, check=True, timeout=60)
    (tmp_path / "go").touch()
    wait_for(lambda: not processes_with(str(tmp_path)), 30, "the child is gone")
    assert not (tmp_path / "lives").exists()


def processes_with(argument: str) -> list[int]:
    return [one.pid for one in psutil.process_iter(["cmdline"]) if argument in (one.info["cmdline"] or [])]


def test_the_start_of_one_role_leaves_the_temporary_files_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.delenv("TMPDIR", raising=False)
    for role in ("a", "b"):
        (tmp_path / role).mkdir()
    first = own_folders(tmp_path, tmp_path / "a")
    kept = Path(first["TMPDIR"]) / "kept"
    kept.write_text("")
    own_folders(tmp_path, tmp_path / "b")
    assert kept.exists()
    own_folders(tmp_path, tmp_path / "a")
    assert not kept.exists()


def test_a_free_port_is_nobody_elses_and_can_be_listened_at() -> None:
    """Appliances that start at once ask at once: a port that was only looked at was given to two of them."""
    port = processes.free_port()
    ask = (
        "import socket\n"
        "def bound(port):\n"
        "    one = socket.socket()\n"
        "    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        "    one.bind(('127.0.0.1', port))\n"
        "    return one\n"
        "held = [bound(0) for _ in range(900)]\n"
        f"assert {port} not in [one.getsockname()[1] for one in held]\n"
        f"bound({port}).listen()\n"
    )
    subprocess.run([sys.executable, "-c", ask], check=True)
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind(("127.0.0.1", port))
