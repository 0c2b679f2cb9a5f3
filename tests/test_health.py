"""What `appliance health` asks, what the supervisor tells it, and the ports that its children get."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
