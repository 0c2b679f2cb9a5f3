"""Fixtures that tests of every part share.

The environment is made clean before anything is imported: one thread for each process, no path variable of
nnU-Net, nothing of Flower that phones home.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
for _name in [
    name for name in os.environ if name.lower().startswith("nnunet_") or name.startswith(("FEDNNUNET_", "FLWR_"))
]:
    del os.environ[_name]
os.environ |= {
    "nnUNet_compile": "f",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}

RECORDS = Path(__file__).resolve().parents[1] / "build" / "commands"


def _write_down(event: str, arguments: tuple[Any, ...]) -> None:
    """Every process that a test starts, for tests/documented.py."""
    if event == "subprocess.Popen" and isinstance(arguments[1], list | tuple):
        with contextlib.suppress(OSError, TypeError, ValueError):
            RECORDS.mkdir(parents=True, exist_ok=True)
            with open(RECORDS / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps([os.fsdecode(word) for word in arguments[1]]) + "\n")


sys.addaudithook(_write_down)
REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


HEAVY = ("test_mid_round.py", "test_simulate.py", "test_documents.py", "test_in_process.py", "test_bad_input.py")
"""Files that take minutes each. They begin first: one of them at the end would have a processor to itself."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order of the files."""
    items.sort(key=lambda item: HEAVY.index(item.path.name) if item.path.name in HEAVY else len(HEAVY))


@pytest.fixture(scope="session", autouse=True)
def flower_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A writable FLWR_HOME of this test run's own."""
    home = tmp_path_factory.mktemp("flwr")
    os.environ["FLWR_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real datasets beside the repository; read-only. Skips where it is absent."""
    if not (SHARED_DATA / "README.md").exists():
        pytest.skip("real data absent: ../shared/data does not lie beside the repository")
    return SHARED_DATA


@pytest.fixture(scope="session")
def phantom_sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's three phantom hospitals (synthetic): dataset folder by site name. Do not write into them."""
    from orchestrator.admin.phantom import make_phantom_sites

    return make_phantom_sites(tmp_path_factory.mktemp("phantom"))


@pytest.fixture(scope="session")
def tiny_phantom_sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The phantom hospitals with six cases of about 24 voxels a side. Do not write into them."""
    from orchestrator.admin.phantom import TINY_SITES, make_phantom_sites

    return make_phantom_sites(tmp_path_factory.mktemp("tiny_phantom"), TINY_SITES)


def _marked(mark: str) -> list[str]:
    """Processes, on this machine, that carry `mark` in their environment: `PID command line`."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            ours = process.pid != os.getpid() and process.environ().get("FEDNNUNET_TEST_MARK") == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture
def no_process_left(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a process behind, one that has lost its parent too.

    Processes are known by a variable that they inherit, so it must not be taken out of their environment.
    A minute is given to those that are just ending; what is left then is killed.
    """
    import psutil

    mark = f"{os.getpid()}-{request.node.nodeid}"
    monkeypatch.setenv("FEDNNUNET_TEST_MARK", mark)
    yield
    deadline = time.monotonic() + 60
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for line in left:
        try:
            psutil.Process(int(line.split()[0])).kill()
        except psutil.NoSuchProcess:
            continue
    assert not left, "processes left behind:\n" + "\n".join(left)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, int], Path]]:
    """Mounts file systems of a few megabytes; skips where that is not allowed."""
    mounted: list[Path] = []

    def mount(folder: Path, megabytes: int) -> Path:
        folder.mkdir(parents=True)
        tried = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if tried.returncode != 0:
            pytest.skip(f"a small disk cannot be mounted here: {tried.stderr.strip()}")
        mounted.append(folder)
        return folder

    try:
        if os.geteuid() != 0:
            pytest.skip("a small disk cannot be mounted here: this takes root")
        yield mount
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
