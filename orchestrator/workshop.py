"""The workshop: a child process that has torch and nnU-Net at hand, for a coordinator that never imports them.

Rules:

- `open` returns at once; the imports (seconds) go on while the sites are busy with something else.
- Each job is a fork of the warm child: it starts without imports, and what it leaves behind or breaks ends with it.
- The child ends by itself after IDLE seconds without a job and gives its memory back: between planning and export, a
  thousand rounds later, nothing is held, and studies that follow each other share one child.
- It ends with the coordinator, also when the coordinator is killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from federation.processes import end_with_parent, told_parent

IDLE = 120.0
"""Seconds without a job after which the child ends; starting it again costs about 6 s of one core."""
_ROOT = Path(__file__).resolve().parents[1]


class Workshop:
    """Runs the `main` of modules that need torch, in forks of one warm child.

    Parameters
    ----------
    idle : float
        Seconds without a job after which the child ends.
    """

    def __init__(self, idle: float = IDLE) -> None:
        self._idle = idle
        self._process: subprocess.Popen[str] | None = None

    def open(self) -> None:
        """Start the child, unless it runs; it imports what jobs need while this returns."""
        if self._process is not None and self._process.poll() is None:
            return
        environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.workshop", str(self._idle)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=environment
            | told_parent()
            | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "nnUNet_compile": "false"}
            | {"nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1", "nnUNet_wandb_enabled": "0"},
        )

    def run(self, module: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Run ``module.main(arguments)`` in a fork of the child; returns its exit status, below 0 for a signal.

        Parameters
        ----------
        module : str
            A module with a `main` that takes a list of arguments.
        arguments : sequence of str
            Its arguments.
        environment : Mapping
            Variables that the job sees.
        log : Path
            Where what it prints goes.
        """
        job = {
            "module": module,
            "arguments": list(arguments),
            "environment": dict(environment),
            "log": str(log.resolve()),
        }
        for _ in range(2):  # the first child may have been about to end of idleness
            if (status := self._ask(json.dumps(job))) is not None:
                return status
        return 1

    def _ask(self, job: str) -> int | None:
        """The exit status of a job; None where the child has ended, in order, without taking it."""
        self.open()
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(job + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return int(answer)
        status = self._process.wait()
        self._process = None
        return status or None

    def close(self) -> None:
        """End the child."""
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()
            self._process.terminate()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def borrowed(workshop: Workshop | None) -> Iterator[Workshop]:
    """The given workshop, or one for this job alone."""
    if workshop is not None:
        yield workshop
        return
    own = Workshop()
    try:
        yield own
    finally:
        own.close()


def _job(job: Mapping[str, object]) -> int:
    """Do one job, in a fork of its own; returns its exit status."""
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    status = 1
    try:
        end_with_parent()
        log = os.open(str(job["log"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for stream in (1, 2):
            os.dup2(log, stream)
        environment, arguments = job["environment"], job["arguments"]
        assert isinstance(environment, dict)
        assert isinstance(arguments, list)
        os.environ.update(environment)
        status = importlib.import_module(str(job["module"])).main(arguments) or 0
    except BaseException:  # noqa: BLE001 - the fork ends here, whatever happened
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """The child, with its idle time as argument: import, then do one job for each line of standard input."""
    end_with_parent()
    idle = float(sys.argv[1])
    from orchestrator import model, planning

    planning.warm()
    model.warm()
    while select.select([sys.stdin], [], [], idle)[0] and (line := sys.stdin.readline()):
        print(_job(json.loads(line)), flush=True)


if __name__ == "__main__":
    main()
