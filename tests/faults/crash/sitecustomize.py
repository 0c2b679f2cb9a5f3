"""Kills a process of ours at its transitions, or takes its disk away: Python runs this at the start of every process
that has it on its path.

A transition is a line of a hash chain (journal, arrivals, ledger), killed after it is on the disk, or a file or folder
that is moved to its place, killed before that. Each distinct transition of a process kills once: the next life passes
it. The folder `FAULTS_CRASH` keeps which, and a line for each start and each kill; `FAULTS_ROLES` says whose.

With `FAULTS_DISK` nothing is killed: each file that is opened to be written, each fsync of one and each rename fails
once, as on a disk that is full at that moment (ENOSPC) or was mounted read-only (EROFS).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import sys
import time

FOLDER = os.environ.get("FAULTS_CRASH", "")
DISK = os.environ.get("FAULTS_DISK", "")
SHARE = int(os.environ.get("FAULTS_SHARE", "1"))
OWN = os.getpid()
BY_CHANCE = {
    r"[0-9a-f]{16,}": "ID",
    r"(writing|retired|attempt)-\d+": r"\1",
    r"(^|/)(\.\w+)-[a-z0-9_]{8}(?=/|$)": r"\1\2",  # a temporary folder
    r"(training_log)_[\d_]+": r"\1",
}
"""Parts of a path that are others in every run or attempt: with them a study would meet new faults for ever."""


def role() -> str:
    """Which process this is: coordinator, superlink, link-SITE, worker-SITE, supervisor, or "" for any other."""
    line = " ".join(sys.orig_argv)
    if found := re.search(r"-m orchestrator (coordinator|superlink)", line):
        return found[1]
    site = re.search(r"/sites/([^/]+)/config/", line)
    if site and (found := re.search(r"-m appliance\.(?:(link) link|(worker)) ", line)):
        return f"{found[1] or found[2]}-{site[1]}"
    return "supervisor" if re.search(r"-m (orchestrator|appliance)\.cli start", line) else ""


def say(what: str, label: str) -> None:
    """One line to the record of all processes."""
    line = json.dumps({"at": time.time(), "role": ROLE, "what": what, "label": label}) + "\n"
    with open(os.path.join(FOLDER, "record.jsonl"), "a", encoding="utf-8") as stream:
        stream.write(line)


def pass_or_die(label: str) -> None:
    """Die here for the first time, pass from then on; with a share, only at one of so many transitions."""
    if os.getpid() != OWN:
        return
    name = hashlib.sha256(f"{ROLE} {label}".encode()).hexdigest()
    if int(name[:8], 16) % SHARE:
        return
    try:
        os.close(os.open(os.path.join(FOLDER, name), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    say("disk" if DISK else "kill", label)
    if DISK:
        number = getattr(errno, DISK)
        raise OSError(number, os.strerror(number))
    os.kill(OWN, signal.SIGKILL)


def plain(path: str) -> str:
    """A path as it is in every run: no folder of the test, no id of a study, nothing by chance."""
    short = path.partition("/state/")[2] or os.path.basename(path)
    for pattern, instead in BY_CHANCE.items():
        short = re.sub(pattern, instead, short)
    return short


def hook(event: str, arguments: tuple[object, ...]) -> None:
    """Before a file takes its place."""
    if event == "os.rename":
        target = os.fsdecode(arguments[1])  # type: ignore[arg-type]
        if FOLDER not in target and "status.json" not in target:
            pass_or_die(f"before {plain(target)}")


def is_ours(path: str) -> bool:
    """A file that a process of ours keeps: not a log, not a cache, nothing that only people look at."""
    below = path.partition("/state/")[2]
    return bool(below) and FOLDER not in path and not re.search(r"(^|/)(logs|cache|flower)/|status\.json|/lock$", below)


def disk_hook(event: str, arguments: tuple[object, ...]) -> None:
    """Before a file is opened to be written, or takes its place."""
    if event == "open" and isinstance(arguments[0], str | bytes):
        path, flags = os.fsdecode(arguments[0]), arguments[2]
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and is_ours(path):
            pass_or_die(f"open {plain(path)}")
    elif event == "os.rename":
        target = os.fsdecode(arguments[1])  # type: ignore[arg-type]
        if is_ours(target):
            pass_or_die(f"rename {plain(target)}")


def failing_fsync() -> None:
    """What was written is refused at last: half of it may be on the disk."""
    fsync = os.fsync

    def fails(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if is_ours(path):
            pass_or_die(f"fsync {plain(path)}")
        fsync(descriptor)

    os.fsync = fails


def after_lines() -> None:
    """After a line of a chain."""
    from federation.audit import Chain

    append = Chain.append

    def appended(chain: Chain, event: str, /, **fields: object) -> object:
        line = append(chain, event, **fields)
        what = " ".join(
            str(fields[key]) for key in ("site", "key", "kind", "fold", "round", "phase") if fields.get(key)
        )
        pass_or_die(f"after {chain.path.name}: {event} {what}")
        return line

    Chain.append = appended  # type: ignore[method-assign]


ROLE = role() if FOLDER else ""
if ROLE == "supervisor":
    from federation import processes

    processes.QUICK = 0.0  # who dies here is no process that cannot be kept alive
elif ROLE and ROLE in os.environ["FAULTS_ROLES"].split(","):
    say("start", "")
    if ROLE.startswith("worker"):
        from appliance.worker import loop

        loop.LIVES = 10**6  # it dies at the same task many times
    if DISK:
        failing_fsync()
        sys.addaudithook(disk_hook)
    else:
        after_lines()
        sys.addaudithook(hook)
