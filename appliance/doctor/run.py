"""Runs the checks one after the other, each with its time limit; none can end the doctor.

Rules:

- A check that waits for another one is skipped where that one failed: one cause, one failure. Asked for alone
  (`--only`), it runs.
- A check runs in a thread of its own. One that does not end in time is left behind (FNU-719); the thread does not keep
  the process alive.
- A check that crashes is FNU-718, with the traceback for the house alone.
- The exit status is that of the first failure: 10 + the hundreds of its number. Without one it is 0, and with
  `strict` 1 where there is a warning.
"""

from __future__ import annotations

import importlib
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, Status, fail, of_error, skipped
from federation.errors import Code, FednnunetError

Function = Callable[[Context], list[Finding]]


@dataclass(frozen=True)
class Check:
    """One check: the module ``appliance.doctor.NAME``.

    Attributes
    ----------
    name : str
        As in `--only` and in the table.
    group : str
        network, machine or data; also good for `--only` and `--skip`.
    seconds : float
        Its limit.
    needs : tuple of str
        Checks that must not have failed.
    """

    name: str
    group: str
    seconds: float
    needs: tuple[str, ...] = ()

    def load(self) -> Function:
        """Its function; imported when it is needed."""
        function: Function = importlib.import_module(f"appliance.doctor.{self.name}").check
        return function


CHECKS = (
    Check("user", "machine", 10),
    Check("mounts", "machine", 30),
    Check("versions", "machine", 60),
    Check("dns", "network", 15),
    Check("tcp", "network", 15, ("dns",)),
    Check("proxy", "network", 30),
    Check("tls", "network", 30, ("dns", "tcp", "proxy")),
    Check("clock", "network", 30, ("dns", "tcp", "proxy")),
    Check("enrollment", "network", 60, ("user", "dns", "tcp", "proxy", "tls", "clock")),
    Check("throughput", "network", 90, ("dns", "tcp", "proxy", "tls")),
    Check("memory", "machine", 10),
    Check("shared_memory", "machine", 10),
    Check("disk", "machine", 45),
    Check("device", "machine", 150),
    Check("dataset", "data", 3600, ("mounts",)),
    Check("training", "machine", 300, ("device",)),
)
"""In the order in which they run: what others hang on comes first."""


def choose(only: Sequence[str], skip: Sequence[str], checks: Sequence[Check] = CHECKS) -> list[Check]:
    """The checks named by `only` (all where it is empty) without those named by `skip`; raises FNU-112."""
    known = {check.name for check in checks} | {check.group for check in checks}
    chosen, left_out = _names(only), _names(skip)
    unknown = sorted((chosen | left_out) - known)
    if unknown:
        names = ", ".join(check.name for check in checks)
        raise FednnunetError(
            Code.SETTINGS_INVALID,
            f"no check is called {', '.join(unknown)}",
            f"Choose among {names}; or a group: network, machine, data.",
        )

    def named(check: Check, names: Collection[str]) -> bool:
        return check.name in names or check.group in names

    return [check for check in checks if (not chosen or named(check, chosen)) and not named(check, left_out)]


def _names(given: Sequence[str]) -> set[str]:
    return {name.strip().replace("-", "_") for text in given for name in text.split(",") if name.strip()}


def run(
    context: Context, checks: Sequence[Check], on_check: Callable[[str], None] = lambda name: None
) -> list[Finding]:
    """Every finding, in the order of the checks.

    Parameters
    ----------
    on_check : callable
        Told the name of each check that begins.
    """
    findings: list[Finding] = []
    failed: set[str] = set()
    for check in checks:
        cause = next((name for name in check.needs if name in failed), None)
        if cause is not None:
            found = [skipped(f"waits for {cause}")]
            failed.add(check.name)
        else:
            on_check(check.name)
            found = limited(check.load, context, check.seconds)
        if any(finding.status is Status.FAIL for finding in found):
            failed.add(check.name)
        findings += [replace(finding, name=check.name) for finding in found]
    return findings


def limited(load: Callable[[], Function], context: Context, seconds: float) -> list[Finding]:
    """What a check finds within its limit; never raises."""
    answers: list[list[Finding]] = []

    def work() -> None:
        try:
            answers.append(load()(context))
        except FednnunetError as error:
            answers.append([of_error(error)])
        except Exception as error:  # noqa: BLE001  # whatever it is, it becomes a numbered finding
            answers.append([_crashed(error)])

    thread = threading.Thread(target=work, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        return [fail(Code.CHECK_TIMED_OUT, f"not ended within {seconds:g} s", measured={"limit_seconds": seconds})]
    return answers[0]


def _crashed(error: Exception) -> Finding:
    where = "".join(traceback.format_exception(error)[-3:]).strip()
    private = {"traceback": Private("", f":\n{where}")}
    return fail(Code.CHECK_CRASHED, f"the check met {type(error).__name__}[traceback]", private=private)


def exit_status(findings: Sequence[Finding], strict: bool) -> int:
    """0, 1 (warnings, `strict`), or 10 + the hundreds of the first failure's number."""
    for finding in findings:
        if finding.status is Status.FAIL and finding.code is not None:
            return 10 + finding.code.number // 100
    return int(strict and any(finding.status is Status.WARN for finding in findings))


@dataclass(frozen=True)
class Examination:
    """All findings, and when they were made (UTC, seconds since 1970)."""

    findings: list[Finding]
    at: float
    seconds: float


def examine(
    context: Context, checks: Sequence[Check], on_check: Callable[[str], None] = lambda name: None
) -> Examination:
    """Run the checks and note the time."""
    at, started = time.time(), time.perf_counter()
    findings = run(context, checks, on_check)
    return Examination(findings, at, time.perf_counter() - started)
