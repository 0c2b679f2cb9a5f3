"""Child processes that are kept alive, and all ended: both sides run several, on one machine or in one container.

Rules:

- Each child leads a session of its own; what it leaves behind when it dies (data loaders, say) is killed with it.
- A child that dies is started again after a pause that grows; one that dies at once, again and again, is FNU-703, or
  the numbered error that it printed last.
- The children end with their parent, also when the parent is killed: each asks the kernel for it (`end_with_parent`),
  and is told who its parent is, which may be gone before it can ask.
- A supervisor says how its children are in `status.json` beside its lock, and that it still looks by the file's time;
  `federation.health` reads that. It shows what they log, where it has a screen.
- Their caches lie below the state too, and their temporary files where there is no other place: nothing else of a
  container can be written.
- One folder, one owner: a lock file, held for as long as the process lives, keeps a second one out (FNU-705).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from federation import console, files
from federation.errors import Code, FednnunetError
from federation.files import disk_errors
from federation.logs import Follower, Shown

log = logging.getLogger("fednnunet.processes")

_PR_SET_PDEATHSIG = 1
QUICK = 5.0  # seconds: a life shorter than this is a failed start
QUICK_DEATHS = 6
ROOM = 2**20  # bytes: a disk with less is full: databases and logs cannot be kept
GRACE = 8.0  # seconds between SIGTERM and SIGKILL
HEARTBEAT = 5.0  # seconds between two signs of life of a supervisor
STATUS = "status.json"


_PARENT = "_FEDNNUNET_PARENT"


def told_parent() -> dict[str, str]:
    """What a child of this process needs in its environment for `end_with_parent`."""
    return {_PARENT: str(os.getpid())}


def end_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel for a signal at the death of the parent (Linux; elsewhere nothing happens)."""
    if sys.platform.startswith("linux"):
        parent = int(os.environ.pop(_PARENT, os.getppid()))
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def settle() -> None:
    """Keep what is loaded out of garbage collection from here on: it is there until the process ends.

    Python looks through everything that is left each time that a quarter of it is new; for a web application and its
    database models that was three tenths of what a busy SuperLink did (docs/explanation/scaling.md).
    """
    gc.collect()
    gc.freeze()


def reach_loopback_directly() -> None:
    """Keep calls within this machine off any proxy: HTTP_PROXY would catch them, with their secrets."""
    for name in ("NO_PROXY", "no_proxy"):
        names = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join([*names, *(own for own in ("127.0.0.1", "localhost") if own not in names)])


class Lock:
    """The right to use a folder; released when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        check_room(folder)
        with disk_errors(folder):
            self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._take()
        except BlockingIOError as error:
            holder = os.pread(self._file, 32, 0).decode(errors="replace").strip()
            os.close(self._file)
            raise FednnunetError(Code.ALREADY_RUNNING, f"{folder}, held by process {holder or '?'}") from error
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def _take(self, tries: int = 20) -> None:
        """Take it; `is_held` has it for a moment when it asks, on a busy machine for a while."""
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tries -= 1
                if not tries:
                    raise
                time.sleep(0.05)

    def release(self) -> None:
        """Give the folder back."""
        os.close(self._file)


def is_held(folder: Path) -> bool:
    """Whether a process has the right to use a folder now; asked without taking it, for a moment (`Lock._take`)."""
    try:
        with open(folder / "lock", "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


_reserved: list[socket.socket] = []


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that is free, and stays so for as long as this process lives.

    It stays bound here, without listening: nobody else is given it, and a server that sets SO_REUSEADDR, as uvicorn
    does, can still listen there. Two appliances that start at once would else be given the same port.
    """
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((host, 0))
    _reserved.append(probe)
    port: int = probe.getsockname()[1]
    return port


def check_port(host: str, port: int) -> None:
    """Raise FNU-701 when nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES, errno.EADDRNOTAVAIL):
            raise FednnunetError(Code.PORT_IN_USE, f"{host}:{port}: {error.strerror}") from error
        raise FednnunetError(Code.SETTINGS_INVALID, f"{host}:{port}: {error}") from error


def check_room(folder: Path) -> None:
    """Raise FNU-702 when a folder cannot be made or written, or its disk has less than `ROOM` bytes left."""
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileNotFoundError, NotADirectoryError, FileExistsError) as error:
            raise FednnunetError(
                Code.DISK_FULL, f"{error.strerror}: {folder}", "Choose another folder, one that can be made."
            ) from error
    if not os.access(folder, os.W_OK):
        raise FednnunetError(Code.DISK_FULL, f"{folder} is not writable")
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise FednnunetError(Code.DISK_FULL, f"{folder}: {free} bytes left, {ROOM} needed to go on")


LEAN = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "67108864", "MALLOC_TRIM_THRESHOLD_": "67108864"}
"""Environment of a process that moves models in pieces of megabytes through several threads.

Two arenas: with glibc's own settings each thread keeps what it has freed, and the peak grows to several models. Blocks
up to 64 MiB come from them and stay there: otherwise each piece is mapped, cleared page by page, and given back."""


@dataclass
class Child:
    """A process to keep alive.

    Attributes
    ----------
    name : str
        For people and for the log file.
    command : sequence of str
        Program and arguments.
    log : Path
        Where its output goes (appended).
    environment : dict
        Added to this process's environment.
    restart : bool
        False: an exit with a status is final (FNU-703); only a death by a signal is followed by another start.
    """

    name: str
    command: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    restart: bool = True
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    next_start: float = 0.0
    quick_deaths: int = 0
    starts: int = 0
    since: float = 0.0

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self.process.pid if self.process is not None and self.process.poll() is None else None

    def start(self) -> None:
        """Start it now."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as stream:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **told_parent(), **self.environment},
                start_new_session=True,
            )
        self.started = time.monotonic()
        self.since = time.time()
        self.starts += 1

    def signal(self, number: int) -> None:
        """Send a signal to it, or with SIGKILL to all of its session."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            elif self.process.poll() is None:
                self.process.send_signal(number)

    def tail(self, lines: int = 5) -> str:
        """The last lines of its log."""
        try:
            with open(self.log, "rb") as stream:
                stream.seek(max(0, self.log.stat().st_size - 4096))
                text = stream.read().decode(errors="replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


class Supervisor:
    """Keeps children alive until it is told to stop.

    Parameters
    ----------
    children : sequence of Child
        In the order of their start; ended in the opposite order.
    grace : float
        Seconds between SIGTERM and SIGKILL; more where the children are supervisors themselves.
    status : Path, optional
        Folder of the lock: where `status.json` is kept.
    shown : callable, optional
        Takes each event of the children's logs.
    """

    def __init__(
        self, children: Sequence[Child], grace: float = GRACE, status: Path | None = None, shown: Shown | None = None
    ) -> None:
        self.children, self._grace = list(children), grace
        self._status, self._told, self._beat = status, b"", 0.0
        self._shown = shown
        self._followers = [Follower(child.log, child.name) for child in self.children]

    def start(self) -> None:
        """Start every child."""
        for child in self.children:
            child.start()

    def look(self) -> None:
        """Start again what has died; raises FNU-703 when a child cannot be kept alive."""
        now = time.monotonic()
        for child in self.children:
            if child.process is None or child.process.poll() is None:
                continue
            if child.next_start == 0.0:
                code = child.process.returncode
                lived = now - child.started
                child.signal(signal.SIGKILL)  # what it left behind
                child.quick_deaths = child.quick_deaths + 1 if lived < QUICK else 0
                if child.quick_deaths >= QUICK_DEATHS or (not child.restart and code >= 0):
                    check_room(child.log.parent)
                    said = console.shown(child.tail(24))
                    if said is not None and said.exit_status == code:
                        found = f"{child.name}: {said.found}\nlog: {child.log}"
                        raise FednnunetError(said.code, found, said.advice)
                    raise FednnunetError(
                        Code.PROCESS_DIED, f"{child.name} (exit {code}), log {child.log}\n{child.tail()}"
                    )
                pause = min(0.2 * 2**child.quick_deaths, 10.0)
                log.warning("%s ended (exit %s), starting it again in %.1f s", child.name, code, pause)
                child.next_start = now + pause
            elif now >= child.next_start:
                child.next_start = 0.0
                child.start()

    def run(self, stopped: Callable[[], bool], every: float = 0.2) -> None:
        """Start all and keep them alive until `stopped` says so; they are ended in any case."""
        try:
            self.start()
            while not stopped():
                self.look()
                self._tell()
                self._follow()
                time.sleep(every)
        finally:
            self.stop()
            self._follow(last=True)

    def _tell(self) -> None:
        """Write how the children are when that has changed; else leave a sign of life."""
        if self._status is None:
            return
        states = [
            {"name": child.name, "pid": child.pid, "restarts": max(0, child.starts - 1), "since": round(child.since, 1)}
            for child in self.children
        ]
        told, path = files.canonical_json({"pid": os.getpid(), "processes": states}), self._status / STATUS
        now = time.monotonic()
        if told != self._told:
            with contextlib.suppress(OSError, FednnunetError):  # a full disk shows where it matters
                files.write_bytes(path, told)
                self._told, self._beat = told, now
        if now - self._beat >= HEARTBEAT:
            try:
                os.utime(path)
            except OSError:
                self._told = b""
            self._beat = now

    def _follow(self, last: bool = False) -> None:
        """Show what is new in the logs; where nobody asked, only keep the files from growing for ever."""
        for follower in self._followers:
            for event in follower.read(last):
                if self._shown is not None:
                    self._shown(event)

    def stop(self) -> None:
        """SIGTERM to every child, last first, and SIGKILL to what is left of their sessions after the grace."""
        running = [child for child in reversed(self.children) if child.process is not None]
        for child in running:
            child.signal(signal.SIGTERM)
        end = time.monotonic() + self._grace
        for child in running:
            if child.process is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, end - time.monotonic()))
                child.signal(signal.SIGKILL)
                child.process.wait()
        self._tell()


def own_folders(state: Path, owned: Path) -> dict[str, str]:
    """Make `state/cache`, and an empty `tmp` in the folder whose lock is held; returns the variables that lead there.

    `tmp` is for machines without a /tmp that can be written, such as a container with a read-only root; elsewhere
    the usual one stays, whose short name the sockets between processes need (107 bytes). Two roles may share a state:
    the start of one must not empty what the other one uses.
    """
    temporary, cache = owned / "tmp", state / "cache"
    usual = [os.environ.get("TMPDIR", ""), "/tmp", "/var/tmp"]  # noqa: S108
    with disk_errors(state):
        shutil.rmtree(temporary, ignore_errors=True)
        cache.mkdir(parents=True, exist_ok=True)
        variables = {
            "XDG_CACHE_HOME": str(cache),
            "MPLCONFIGDIR": str(cache / "matplotlib"),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }
        if not any(folder and os.access(folder, os.W_OK) for folder in usual):
            temporary.mkdir(exist_ok=True)
            variables["TMPDIR"] = str(temporary)
    return variables


def use_cache(state: Path) -> None:
    """Let matplotlib keep its cache below a state folder, where the environment says nothing else.

    In a container with a read-only root there may be no other place.
    """
    os.environ.setdefault("MPLCONFIGDIR", str(state / "cache" / "matplotlib"))


def stop_on_signals() -> Callable[[], bool]:
    """From here on SIGTERM and SIGINT ask this process to stop; returns whether one has come."""
    came: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: came.append(received))
    return lambda: bool(came)
