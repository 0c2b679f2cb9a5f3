"""Asks the worker's half in a child process (appliance.worker.trial): torch and nnU-Net are loaded there, not here."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any

from appliance.doctor.context import Context
from federation.errors import Code, FednnunetError

_LAST_LINES = 2000


def ask(context: Context, what: str, seconds: float) -> Any:
    """What the child answers.

    Raises
    ------
    FednnunetError
        The numbered error that the child met; FNU-717 when it ended without an answer, FNU-719 when it took too long.
    """
    question = {
        "settings": context.settings.model_dump(mode="json"),
        "study": None if context.study is None else context.study.model_dump(mode="json"),
    }
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "appliance.worker.trial", what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(json.dumps(question).encode(), seconds)
        except subprocess.TimeoutExpired:
            raise FednnunetError(Code.CHECK_TIMED_OUT, f"not within {seconds:g} s") from None
        finally:
            _end(process)
        for line in reversed(out.splitlines()):
            if line.startswith(b'{"answer":'):
                return json.loads(line)["answer"]
            if line.startswith(b'{"error":'):
                error = json.loads(line)["error"]
                raise FednnunetError(Code.of(error["number"]), error["found"], error["advice"])
        said.seek(0, os.SEEK_END)
        said.seek(max(0, said.tell() - _LAST_LINES))
        tail = said.read().decode(errors="replace").strip()
    if process.returncode == -signal.SIGBUS:
        raise FednnunetError(Code.SHARED_MEMORY_SMALL, "the process was ended by SIGBUS")
    if process.returncode == -signal.SIGKILL:
        raise FednnunetError(Code.OUT_OF_MEMORY, "the process was killed, as the kernel does when memory runs out")
    raise FednnunetError(Code.TRIAL_FAILED, f"exit status {process.returncode}: {tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of the child's session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
