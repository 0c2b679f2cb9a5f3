"""The orchestrator's own chain: who did what, STATE/audit.jsonl (federation.audit), written by several processes.

Rules:

- Every command that changes something, every approval and every refusal is a line, with the user of the operating
  system. Commands that only read are none.
- No secret is ever written: no token, no key but public ones' fingerprints.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from federation import audit
from federation.errors import FednnunetError

FILE = "audit.jsonl"


def record(state: Path, event: str, **fields: Any) -> None:
    """Append one line to the orchestrator's chain; raises FNU-504 or FNU-702 rather than go on unrecorded."""
    audit.append(state / FILE, event, by=user(), **fields)


@contextlib.contextmanager
def recorded(state: Path, event: str, **fields: Any) -> Iterator[None]:
    """Record `event` when the block ends well, or that it was refused and by which numbered error."""
    with refusals(state, event, **fields):
        yield
    record(state, event, **fields)


@contextlib.contextmanager
def refusals(state: Path, event: str, **fields: Any) -> Iterator[None]:
    """Record that `event` was refused, and by which numbered error, when the block raises one.

    A state folder that is not there, such as a mistyped one, is not made for it.
    """
    try:
        yield
    except FednnunetError as error:
        if not state.is_dir():
            raise
        record(state, f"{event} refused", code=error.code.number, title=error.code.title, **fields)
        raise


def user() -> str:
    """The name of this process's user, from the system and not from a variable that anybody can set."""
    uid = os.getuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
