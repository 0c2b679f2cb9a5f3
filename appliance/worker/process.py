"""The worker as a process: no network, no orphans, an end within seconds.

Rules:

- No internet socket. Python asks an audit hook, which raises FNU-707; on Linux the kernel refuses as well (seccomp),
  for native code and for every child.
- The worker leads a session of its own; what it started ends with it, also when it is killed: each child asks the
  kernel for SIGKILL at its parent's death.
- It ends with its supervisor: PR_SET_PDEATHSIG gives SIGTERM.
- SIGTERM and SIGINT set a flag that a task looks at between two iterations; after a grace of two seconds the process
  ends anyway. Every file is whole or not there, so nothing is lost but the iterations since the last round.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

from federation.errors import Code, FednnunetError
from federation.processes import end_with_parent

GRACE = 2.0
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_FILTER, _ALL_THREADS, _KEEP_SPECULATION = 1, 1, 4  # seccomp(2): SET_MODE_FILTER, FLAG_TSYNC, FLAG_SPEC_ALLOW
_INTERNET = frozenset({int(socket.AF_INET), int(socket.AF_INET6), 17})  # 17: AF_PACKET
_SYSTEM_CALLS = {  # audit architecture, and the numbers of socket and seccomp
    "x86_64": (0xC000003E, 41, 317),
    "aarch64": (0xC00000B7, 198, 277),
}


def refuse_network() -> bool:
    """Refuse internet sockets from here on, for ever; returns whether the kernel refuses them too."""
    sys.addaudithook(_refuse)
    return _kernel_refuses()


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket."):
        return
    if event == "socket.__new__":
        refused = int(arguments[1]) in _INTERNET
    elif event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        refused = int(arguments[0].family) in _INTERNET
    else:
        refused = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
    if refused:
        raise FednnunetError(Code.WORKER_NETWORK, event)


def _kernel_refuses() -> bool:
    """A seccomp filter: socket(AF_INET | AF_INET6 | AF_PACKET) fails with EACCES (seccomp(2), BPF).

    For all threads, and without the guard against speculative store bypass that kernels before 5.16 switch on with a
    filter: it is for sandboxes that share a process with a stranger, and may slow a process down (not measured here).
    """
    if not sys.platform.startswith("linux") or platform.machine() not in _SYSTEM_CALLS:
        return False
    architecture, number, seccomp = _SYSTEM_CALLS[platform.machine()]
    load, equal, answer = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 13  # 13: EACCES
    program = [
        (load, 0, 0, 4),
        (equal, 0, 6, architecture),
        (load, 0, 0, 0),
        (equal, 0, 4, number),
        (load, 0, 0, 16),
        (equal, 3, 0, 2),
        (equal, 2, 0, 10),
        (equal, 1, 0, 17),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    library = ctypes.CDLL(None, use_errno=True)
    prctl, system_call = library.prctl, library.syscall
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
    system_call.argtypes = [ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p]
    if prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    if system_call(seccomp, _FILTER, _ALL_THREADS | _KEEP_SPECULATION, ctypes.addressof(header)) == 0:
        return True
    return bool(prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(header), 0, 0) == 0)  # before Linux 4.17: this thread alone


def lead(stop: threading.Event) -> None:
    """Become the leader of a session; end with the supervisor, on SIGTERM and on SIGINT.

    Parameters
    ----------
    stop : threading.Event
        Set when the process is asked to end.
    """
    parent = os.getppid()
    with contextlib.suppress(PermissionError):
        os.setsid()
    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        stop.set()
    os.register_at_fork(after_in_child=_be_a_child)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=_watch, args=(reader, stop), name="end", daemon=True).start()


def _watch(reader: int, stop: threading.Event) -> None:
    """Wait for the first signal, whose number comes through the pipe even while native code runs; see to the end."""
    while os.read(reader, 1)[0] not in (signal.SIGTERM, signal.SIGINT):
        pass
    stop.set()
    time.sleep(GRACE)
    kill_children()
    os._exit(0)


def _be_a_child() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def kill_children() -> None:
    """SIGKILL to every process that descends from this one or lives in its session."""
    own = os.getpid()
    own_session = os.getsid(0) if os.getsid(0) == own else None
    parents: dict[int, int] = {}
    doomed: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        process = int(entry.parent.name)
        parents[process] = int(fields[1])
        if own_session is not None and int(fields[3]) == own_session:
            doomed.add(process)
    doomed.add(own)
    while more := {process for process, parent in parents.items() if parent in doomed} - doomed:
        doomed |= more
    for process in doomed - {own}:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
