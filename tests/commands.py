"""The real command lines, as child processes, and what every refusal has in common. Used by several test files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from federation.audit import read

FEDNNUNET, ORCHESTRATOR, APPLIANCE = "orchestrator.admin.cli", "orchestrator.cli", "appliance.cli"
COLUMNS, LINES = 100, 24
REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit status {self.status}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def environment(**changes: str | None) -> dict[str, str]:
    """This process's environment with changes; None takes a variable out."""
    merged = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": str(COLUMNS), **changes}
    return {name: value for name, value in merged.items() if value is not None}


def begin(module: str, *arguments: object, cwd: Path, **changes: str | None) -> subprocess.Popen[str]:
    """Start a command in a session of its own; its two outputs are pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    )


def _hear_ctrl_c() -> None:
    """A test run in the background of a shell ignores SIGINT, and what it starts would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen[str], timeout: float = 600) -> Done:
    """Wait for a command; one that hangs is ended the way Ctrl-C would, and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        raise AssertionError(f"no end within {timeout} s: {Done(process.returncode, out, err)}") from None
    except BaseException:  # Ctrl-C on the tests
        process.send_signal(signal.SIGINT)
        process.wait(30)
        raise
    return Done(process.returncode, out, err)


def command(module: str, *arguments: object, cwd: Path, timeout: float = 600, **changes: str | None) -> Done:
    """Run a command to its end."""
    return end(begin(module, *arguments, cwd=cwd, **changes), timeout)


def fednnunet(*arguments: object, cwd: Path, timeout: float = 600, **changes: str | None) -> Done:
    """Run `fednnunet ...` to its end."""
    return command(FEDNNUNET, *arguments, cwd=cwd, timeout=timeout, **changes)


def appliance(*arguments: object, cwd: Path, timeout: float = 600, **changes: str | None) -> Done:
    """Run `appliance` to its end."""
    return command(APPLIANCE, *arguments, cwd=cwd, timeout=timeout, **changes)


def good(done: Done) -> Done:
    """The command ended well, and without a word on stderr."""
    assert done.status == 0, done
    assert "Traceback" not in done.err, done
    return done


def refused(done: Done, number: int, *named: str) -> Done:
    """The command ended with this numbered error, on one screen, and said what to do.

    Parameters
    ----------
    done : Done
        The command.
    number : int
        The number; the exit status follows from it.
    *named : str
        What the error must name: a file, a site, a value.
    """
    assert done.status == 10 + number // 100, done
    lines = done.err.splitlines()
    assert lines, done
    assert lines[0].startswith(f"FNU-{number} "), done
    assert any(line.startswith("What to do: ") and len(line) > len("What to do: ") + 10 for line in lines), done
    assert "Traceback" not in done.err + done.out, done
    height = sum(max(1, -(-len(line) // COLUMNS)) for line in lines)
    assert height <= LINES, f"{height} lines of {COLUMNS} columns: {done}"
    for text in named:
        assert text in done.err, f"{text!r} is not named: {done}"
    return done


def wait_for(condition: Callable[[], Any], timeout: float, what: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.05)


def assert_nothing_half_written(folder: Path, but: str = "preprocessed") -> None:
    """Every file that others read is whole, and outside folders named `but` nothing half written is left.

    Nor outside `incoming`: what is on its way lies there, and whose it is takes it away when it starts again.
    """
    for path in folder.rglob("*.json"):
        json.loads(path.read_bytes())
    for path in folder.rglob("*.jsonl"):
        assert read(path)
        assert path.read_bytes().endswith(b"\n"), f"{path} has a torn line"
    left = [path for path in folder.rglob(".*.writing-*") if not {but, "incoming"} & set(path.parts)]
    assert not left, left


def phantom_study(sites: Sequence[str], **changes: Any) -> dict[str, Any]:
    """A small study over phantom hospitals (synthetic), as plain data."""
    return {
        "name": "small",
        "dataset": "Dataset300_PhantomFederation",
        "sites": list(sites),
        "channel_names": {0: "synthetic"},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "planner": "SmallUNetPlanner",
        "fold": "all",
        "rounds": 2,
        "iterations_per_epoch": 5,
        "validation_iterations_per_epoch": 1,
        "round_deadline": 600,
        "step_deadline": 600,
        "appear_deadline": 300,
        **changes,
    }


def write_study(path: Path, study: dict[str, Any]) -> Path:
    """Write a study as YAML."""
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path
