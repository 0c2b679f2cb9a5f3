"""`orchestrator backup`: what the archive holds of a state that changes while it is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import REPOSITORY, command, good, refused, wait_for

from federation import audit
from federation.errors import Code, FednnunetError
from orchestrator import backup

ORCHESTRATOR = "orchestrator.cli"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The files of an orchestrator, made by hand."""
    state = tmp_path / "federation"
    for name, content in {
        "authority/ca.key": "private",
        "sites/hospital_a.json": "{}",
        "audit.jsonl": "line\n",
        "studies/s/study.json": "{}",
        "studies/s/rounds/fold_all/0000/global.safetensors": "weights",
        "superlink.db": "database",
        "superlink.db-wal": "log",
        "logs/coordinator.log": "log",
        "status.json": "{}",
        "role-coordinator/lock": "",
        "cache/matplotlib/list.json": "{}",
        "studies/s/.report.html.writing-7": "half",
    }.items():
        path = state / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (state / "authority/ca.key").chmod(0o600)
    (state / "authority").chmod(0o700)
    (state / "studies/s/incoming").mkdir()
    return state


def extracted(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="tar")
    return folder / "federation"


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


def test_what_the_next_start_makes_anew_is_left_out_and_the_rest_is_the_same(state: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.tar"
    said = good(command(ORCHESTRATOR, "backup", "--state", state, "--output", output, cwd=tmp_path)).out
    copy = extracted(output, tmp_path / "copy")
    assert files_of(copy) == {
        "authority/ca.key",
        "sites/hospital_a.json",
        "audit.jsonl",
        "studies/s/study.json",
        "studies/s/rounds/fold_all/0000/global.safetensors",
    }
    for name in files_of(copy):
        assert (copy / name).read_bytes() == (state / name).read_bytes()
        assert (copy / name).stat().st_mode == (state / name).stat().st_mode
    assert (copy / "authority").stat().st_mode == (state / "authority").stat().st_mode
    assert (copy / "studies/s/incoming").is_dir()
    assert stat.S_IMODE(output.stat().st_mode) == 0o600
    assert hashlib.sha256(output.read_bytes()).hexdigest() in said
    assert "5 files" in said
    assert not (state / backup.FOLDER).exists()


def test_through_a_pipe_it_is_the_same_archive_and_what_is_said_goes_beside_it(state: Path, tmp_path: Path) -> None:
    output, piped = tmp_path / "b.tar", tmp_path / "piped.tar"
    backup.write(state, output)
    arguments = [sys.executable, "-m", ORCHESTRATOR, "backup", "--state", str(state), "--output", "-"]
    with open(piped, "wb") as stream:
        done = subprocess.run(arguments, stdout=stream, stderr=subprocess.PIPE, cwd=REPOSITORY, check=True, timeout=120)
    assert hashlib.sha256(piped.read_bytes()).hexdigest() in done.stderr.decode()
    assert contents(extracted(piped, tmp_path / "1")) == contents(extracted(output, tmp_path / "2"))
    assert not (state / backup.FOLDER).exists()


def test_a_secret_that_kubernetes_mounts_is_in_it_once(state: Path, tmp_path: Path) -> None:
    """A folder of this version, a link `..data` to it, and each name a link through that."""
    authority = state / "authority"
    hidden = authority / "..2026_11_26"
    hidden.mkdir()
    for path in list(authority.iterdir()):
        if path.is_file():
            path.rename(hidden / path.name)
            path.symlink_to(f"..data/{path.name}")
    (authority / "..data").symlink_to(hidden.name)
    backup.write(state, tmp_path / "b.tar")
    copy = extracted(tmp_path / "b.tar", tmp_path / "copy")
    assert {name for name in files_of(copy) if name.startswith("authority")} == {"authority/ca.key"}
    assert not (copy / "authority/ca.key").is_symlink()
    assert (copy / "authority/ca.key").read_text(encoding="utf-8") == "private"


def test_one_backup_at_a_time_and_a_state_that_is_none_leaves_nothing(state: Path, tmp_path: Path) -> None:
    """Whoever reads a pipe may stop reading, and must not hold up the others without a word."""
    reading, writing = os.pipe()
    arguments = [sys.executable, "-m", ORCHESTRATOR, "backup", "--state", str(state), "--output", "-"]
    (state / "studies/s/large").write_bytes(os.urandom(2_000_000))
    with subprocess.Popen(arguments, stdout=writing, cwd=REPOSITORY) as stuck:
        os.close(writing)
        wait_for(lambda: (state / backup.FOLDER / "studies/s/large").exists(), 60, "the first is under way")
        refused(command(ORCHESTRATOR, "backup", "--state", state, "--output", tmp_path / "b.tar", cwd=tmp_path), 705)
        os.close(reading)
        assert stuck.wait(60) != 0, "its reader has gone"
    assert not (state / backup.FOLDER).exists()
    refused(command(ORCHESTRATOR, "backup", "--state", tmp_path, "--output", tmp_path / "x/c.tar", cwd=tmp_path), 113)
    assert not (tmp_path / "x").exists()


def test_an_output_that_is_there_and_a_folder_that_is_no_state_are_refused(state: Path, tmp_path: Path) -> None:
    output = tmp_path / "b.tar"
    other = tmp_path / "c.tar"
    output.write_text("of yesterday", encoding="utf-8")
    refused(command(ORCHESTRATOR, "backup", "--state", state, "--output", output, cwd=tmp_path), 129, "b.tar")
    assert output.read_text(encoding="utf-8") == "of yesterday"
    refused(
        command(ORCHESTRATOR, "backup", "--state", tmp_path, "--output", tmp_path / "c.tar", cwd=tmp_path),
        113,
        "no authority",
    )
    assert not other.exists()


def test_what_a_killed_backup_has_left_goes_with_the_next(state: Path, tmp_path: Path) -> None:
    left = state / backup.FOLDER / "authority" / "old.key"
    left.parent.mkdir(parents=True)
    left.write_text("old", encoding="utf-8")
    backup.write(state, tmp_path / "b.tar")
    assert "authority/old.key" not in files_of(extracted(tmp_path / "b.tar", tmp_path / "copy"))
    assert not left.exists()


def test_files_of_another_file_system_are_copied(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other_device(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", other_device)
    backup.write(state, tmp_path / "b.tar")
    copy = extracted(tmp_path / "b.tar", tmp_path / "copy")
    assert (copy / "authority/ca.key").read_text(encoding="utf-8") == "private"
    assert (copy / "authority/ca.key").stat().st_mode == (state / "authority/ca.key").stat().st_mode


def test_a_full_disk_leaves_neither_an_archive_nor_links(
    state: Path, tmp_path: Path, small_disk: Callable[[Path, int], Path]
) -> None:
    (state / "studies/s/large").write_bytes(os.urandom(2_000_000))
    disk = small_disk(tmp_path / "disk", 1)
    with pytest.raises(FednnunetError) as caught:
        backup.write(state, disk / "b.tar")
    assert caught.value.code is Code.DISK_FULL
    assert list(disk.iterdir()) == []
    assert not (state / backup.FOLDER).exists()


@contextmanager
def rounds_go_on(study: Path, pause: float) -> Iterator[None]:
    """Round after round: an update, its line, the weights, their line, and then the update is not needed any more."""
    stopped = threading.Event()

    def work() -> None:
        number = 0
        while not stopped.is_set():
            number += 1
            folder = study / "rounds" / f"{number:04d}"
            folder.mkdir(parents=True)
            for name in ("update", "weights"):
                (folder / name).write_bytes(os.urandom(1000))
                audit.append(study / backup.JOURNAL, name, round=number)
                time.sleep(pause)
            (folder / "update").unlink()
            if number > 1:
                (study / "rounds" / f"{number - 1:04d}" / "weights").unlink()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def test_every_file_that_the_journal_needs_is_in_it_though_rounds_go_on(state: Path, tmp_path: Path) -> None:
    study = state / "studies/s"
    seen, written, began = set(), 0, time.monotonic()
    backup.write(state, tmp_path / "before.tar")
    with rounds_go_on(study, 0.02 + time.monotonic() - began):  # else a slow machine never links within one round
        while written < 25 or not (study / "rounds/0008").exists():
            backup.write(state, tmp_path / f"{written}.tar")
            written += 1
    for number in range(written):
        copy = extracted(tmp_path / f"{number}.tar", tmp_path / f"copy{number}") / "studies/s"
        if not (copy / backup.JOURNAL).exists():  # of the moment before the first round
            continue
        audit.verify(copy / backup.JOURNAL)
        lines = [json.loads(line) for line in (copy / backup.JOURNAL).read_text(encoding="utf-8").splitlines()]
        if not lines:
            continue
        last = lines[-1]
        assert (copy / "rounds" / f"{last['round']:04d}" / last["event"]).stat().st_size == 1000
        if last["event"] == "update" and last["round"] > 1:
            assert (copy / "rounds" / f"{last['round'] - 1:04d}" / "weights").stat().st_size == 1000
        seen.add(last["round"])
        assert (copy / backup.JOURNAL).read_bytes().endswith(b"\n")
    assert len(seen) > 2


def test_rounds_that_end_faster_than_they_are_linked_are_said_by_number(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = backup._link

    def while_a_round_ends(source: Path, target: Path, skipped: tuple[str, ...] = ()) -> dict[Path, int]:
        sizes = link(source, target, skipped)
        audit.append(state / "studies/s" / backup.JOURNAL, "weights")
        return sizes

    monkeypatch.setattr(backup, "_link", while_a_round_ends)
    monkeypatch.setattr(backup, "_PAUSE", 0)
    with pytest.raises(FednnunetError) as caught:
        backup.write(state, tmp_path / "b.tar")
    assert caught.value.code is Code.BACKUP_RESTLESS
    assert not (tmp_path / "b.tar").exists()
    assert not (state / backup.FOLDER).exists()
