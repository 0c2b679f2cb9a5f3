"""Facts about the worker as a process: no socket, no orphan, an end within seconds, nothing half written."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from worker_site import Site, initial_weights, make_settings, make_study, shared_site

from appliance.settings import Settings
from appliance.worker import loop
from federation import files, tasks

REPOSITORY = Path(__file__).parents[1]
TRAIN = tasks.Kind.TRAIN
LONG = {"iterations_per_epoch": 100000, "rounds": 3}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")


def wait(condition: Callable[[], object], seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def environment(settings: Settings) -> dict[str, str]:
    values = {f"FEDNNUNET_{key.upper()}": str(value) for key, value in settings if value is not None}
    return {**os.environ, **values, "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that end with the test."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


def start(site: Site, started: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    log = (site.settings.state / f"worker-{len(started)}.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "appliance.worker"], env=environment(site.settings), stdout=log, stderr=log
    )
    started.append(process)
    return process


def session(leader: int) -> set[int]:
    """The living processes of a session."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.add(int(entry.parent.name))
    return found


def internet_sockets(process: int) -> set[str]:
    """Sockets of TCP and UDP that a process holds."""
    held = set()
    for descriptor in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(os.readlink(descriptor))
    known = set()
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6"):
        path = Path(f"/proc/{process}/net/{table}")
        if path.exists():
            known |= {f"socket:[{line.split()[9]}]" for line in path.read_text().splitlines()[1:]}
    return held & known


def is_training(site: Site) -> bool:
    status = site.settings.work / "status.json"
    return status.exists() and ", iteration " in files.read_json(status)["phase"]


def make_site(state: Path, augmentation_processes: int = 0, **study: object) -> Site:
    data, plans = shared_site()
    settings = make_settings(data, state, augmentation_processes=augmentation_processes)
    before = dict(os.environ)
    try:
        return Site(settings, make_study(**study), plans)
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_the_worker_opens_no_socket_ends_within_seconds_and_leaves_no_orphan(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    site = make_site(tmp_path, augmentation_processes=2, **LONG)
    process = start(site, started)
    site.put(site.prepare_task())
    site.put(site.task(TRAIN, 1), initial_weights())
    wait(lambda: is_training(site))
    members = session(process.pid)
    assert len(members) >= 3  # the worker and its loaders
    assert all(internet_sockets(member) == set() for member in members)

    process.terminate()
    process.wait(60)  # the round would take an hour
    wait(lambda: session(process.pid) == set())
    assert site.spool.result(site.task(TRAIN, 1)) is None
    assert [task.key for task in site.spool.waiting()] == ["train-fold_0-0001"]
    assert not list(site.spool.outbox.rglob("*.writing-*"))


def test_killed_in_a_round_and_started_again_the_worker_sends_the_same_bytes(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    def run(killed: bool) -> list[str]:
        site = make_site(tmp_path / str(killed), iterations_per_epoch=120)  # a status stands for a second
        first, second = site.task(TRAIN, 1), site.task(TRAIN, 2)
        process = start(site, started)
        site.put(site.prepare_task())
        site.put(first, initial_weights())
        wait(lambda: site.spool.result(first) is not None)
        site.put(second, initial_weights())
        if killed:
            wait(lambda: is_training(site) and "round 2" in (site.settings.work / "status.json").read_text())
            process.kill()
            process.wait()
            assert site.spool.result(second) is None
            process = start(site, started)
        wait(lambda: site.spool.result(second) is not None)
        process.terminate()
        return [files.sha256_of(site.update(task)) for task in (first, second)]

    assert run(killed=True) == run(killed=False)


def test_a_task_that_kills_every_worker_is_answered_instead_of_killing_one_more(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    """As the kernel does each time that memory runs out."""
    site = make_site(tmp_path, **LONG)
    lives, first = site.settings.work / "lives.json", site.task(TRAIN, 1)
    site.put(site.prepare_task())
    process = start(site, started)
    wait(lambda: site.spool.result(site.prepare_task()) is not None and not lives.exists())
    site.put(first, initial_weights())
    for number in range(1, loop.LIVES + 1):
        wait(lambda number=number: lives.exists() and files.read_json(lives)["lives"] == number)
        process.kill()
        process.wait()
        assert site.spool.result(first) is None
        process = start(site, started)
    wait(lambda: site.spool.result(first) is not None)
    failure = site.spool.result(first).failure
    assert [(problem.code, problem.count) for problem in failure.problems] == [(412, 1)]
    wait(lambda: not lives.exists())  # a moment after the answer

    again = first.model_copy(update={"attempt": 2})  # when more memory is there
    site.put(again, initial_weights())
    wait(lambda: is_training(site))
    assert files.read_json(lives)["lives"] == 1
    process.terminate()
    process.wait(60)
    assert not lives.exists(), "an end that was asked for is no death"


def test_a_killed_workers_loaders_do_not_outlive_it(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    site = make_site(tmp_path, augmentation_processes=2, **LONG)
    process = start(site, started)
    site.put(site.prepare_task())
    site.put(site.task(TRAIN, 1), initial_weights())
    wait(lambda: is_training(site))
    process.kill()
    process.wait()
    wait(lambda: session(process.pid) == set())


def test_the_worker_ends_with_its_supervisor(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    site = make_site(tmp_path)
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-m', 'appliance.worker']); time.sleep(600)"
    supervisor = subprocess.Popen([sys.executable, "-c", code], env=environment(site.settings))
    started.append(supervisor)
    status = site.settings.work / "status.json"
    wait(status.exists)
    worker = files.read_json(status)["pid"]
    supervisor.kill()
    supervisor.wait()
    wait(lambda: not Path(f"/proc/{worker}").exists())


def test_a_failure_in_the_process_is_answered_and_the_next_task_is_done(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    site = make_site(tmp_path)
    start(site, started)
    early = site.task(TRAIN, 1)
    site.put(early, initial_weights())  # before Prepare
    wait(lambda: site.spool.result(early) is not None)
    assert [problem.code for problem in site.spool.result(early).failure.problems] == [302]
    describe = tasks.Task(study=site.study, site="hospital_a", kind=tasks.Kind.DESCRIBE)
    site.put(describe)
    wait(lambda: site.spool.result(describe) is not None)
    description = site.spool.result(describe).description
    assert (description.training_cases, description.test_cases) == (8, 2)
    assert {"nnunetv2", "torch"} <= set(description.versions)
    fingerprint = tasks.Task(study=site.study, site="hospital_a", kind=tasks.Kind.FINGERPRINT)
    site.put(fingerprint)
    wait(lambda: site.spool.result(fingerprint) is not None)
    assert site.spool.result(fingerprint).fingerprint.n_cases == 8


def test_python_and_its_children_are_refused_internet_sockets_and_keep_local_ones() -> None:
    code = """
import ctypes, socket, subprocess, sys, threading
from appliance.worker import process
from federation.errors import FednnunetError
begin, native = threading.Event(), ctypes.CDLL(None).socket
opened = []
early = threading.Thread(target=lambda: (begin.wait(), opened.append(native(2, 1, 0))))
early.start()
kernel = process.refuse_network()
begin.set()
early.join()
assert kernel == (opened[0] == -1), "a thread that ran before"
for attempt in (
    lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: socket.getaddrinfo("example.org", 80),
):
    try:
        attempt()
    except FednnunetError as error:
        assert error.code.number == 707
    else:
        sys.exit("not refused")
socket.socket(socket.AF_UNIX).close()
socket.socketpair()
child = "import socket; socket.socket(socket.AF_UNIX).close(); socket.socket(socket.AF_INET6)"
done = subprocess.run([sys.executable, "-c", child], capture_output=True, encoding="utf-8")
assert not kernel or "PermissionError" in done.stderr, done.stderr
print(kernel)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(platform.machine() in ("x86_64", "aarch64"))


def test_a_setting_that_is_not_valid_is_a_numbered_error(tmp_path: Path) -> None:
    config = tmp_path / "site.toml"
    config.write_text('name = "hospital_a"\norchestrator = "localhost:1"\ngpu = 1\n')
    arguments = [sys.executable, "-m", "appliance.worker", "--config", str(config)]
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 11
    assert "FNU-112" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cancelled_task_and_a_study_that_is_over_free_the_loaders_and_the_device(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    site = make_site(tmp_path, augmentation_processes=2, **LONG)
    process = start(site, started)
    site.put(site.prepare_task())
    wait(lambda: len(session(process.pid)) >= 3)  # the first fold's trainer is warm
    site.spool.release()
    wait(lambda: session(process.pid) == {process.pid})
    site.put(site.task(TRAIN, 1), initial_weights())
    wait(lambda: is_training(site) and len(session(process.pid)) >= 3)
    site.spool.cancel(site.task(TRAIN, 1))
    wait(lambda: session(process.pid) == {process.pid})
    assert site.spool.result(site.task(TRAIN, 1)) is None
