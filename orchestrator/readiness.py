"""Whether the orchestrator can do its work, and not only whether its processes run: what a readiness probe asks.

Rules:

- Each role is asked for its own part. SuperLink: both listeners answer with a certificate of the authority, and the
  database can be opened and read. Coordinator: the control listener answers, and the journal of every study that has
  not ended holds, line by line.
- Nothing is written, and nothing is asked that wants a token: a probe comes every few seconds, on a full disk too.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from federation import audit, endpoint
from federation.errors import Code, FednnunetError
from federation.processes import reach_loopback_directly
from orchestrator.journal import under_way
from orchestrator.server import Server

_ANYWHERE = ("0.0.0.0", "::", "")  # noqa: S104 - what a listener was told, not what is listened at


def check(server: Server) -> None:
    """Raise FNU-723 with the first thing that keeps a role of this orchestrator from its work."""
    reach_loopback_directly()
    control = _reached(server.control_host, server.control_port)
    if server.role != "coordinator":
        _answers(server, "hospitals' listener", _reached(server.fleet_host, server.fleet_port))
        _answers(server, "control listener", control)
        _database(server.database)
    if server.role != "superlink":
        _answers(server, "control listener", control)
        for journal in under_way(server.state / "studies"):
            with _part(f"journal of study {journal.parent.name[:12]}"):
                audit.verify(journal)


def _reached(host: str, port: int) -> str:
    """Where a listener is dialled on its own machine."""
    return f"{'127.0.0.1' if host in _ANYWHERE else host}:{port}"


def _answers(server: Server, name: str, address: str) -> None:
    with _part(name):
        endpoint.check(address, server.authority.ca.read_text())


def _database(path: Path) -> None:
    with _part("database"):
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as opened:
            if not opened.execute("SELECT count(*) FROM sqlite_master WHERE name = 'node'").fetchone()[0]:
                raise FednnunetError(Code.NOT_READY, f"{path} is no SuperLink's database")


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    try:
        yield
    except (FednnunetError, OSError, sqlite3.Error) as error:
        raise FednnunetError(Code.NOT_READY, f"{name}: {error}") from error
