"""A study's curves as TensorBoard event files."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import pytest
from commands import fednnunet, good
from journals import Written
from tensorboardX.proto.event_pb2 import Event

from orchestrator.admin.tracking import track
from orchestrator.history import Found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by name, read from the one event file of a folder as TensorBoard reads it."""
    (path,) = folder.glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += length + 16
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, round(value.simple_value, 3)))
    return found


@pytest.fixture
def whole(tmp_path: Path) -> Written:
    written = Written(tmp_path)
    written.to_the_end()
    return written


def test_every_site_has_its_curves_and_written_again_nothing_stands_there_twice(tmp_path: Path, whole: Written) -> None:
    for _ in range(2):
        done = good(
            fednnunet("study", "track", "small", "--state", tmp_path, "--tensorboard", tmp_path / "tb", cwd=tmp_path)
        )
    assert f"--logdir {tmp_path / 'tb'}" in done.out
    folder = tmp_path / "tb" / f"small-{whole.study.id[:12]}"
    south = scalars(folder / "south")
    assert south["fold_all/pseudo_dice"] == [(1, 0.55), (3, 0.75)]
    assert south["fold_all/learning_rate"] == [(1, 0.01), (3, 0.01)]
    together = scalars(folder / "all_sites")
    assert together["fold_all/sites"] == [(1, 2.0), (2, 1.0), (3, 2.0)]
    assert together["fold_all/train_loss"][0] == (1, 1.5)


def test_it_follows_a_study_until_it_ends(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.write("opened", run=1)
    written.round(1)
    looked = threading.Event()

    def go_on() -> None:
        if not looked.is_set():
            looked.set()
            written.round(2)
            written.write("done")

    folder = track(Found(written.folder, written.study), tmp_path / "tb", True, go_on)
    assert [step for step, _ in scalars(folder / "north")["fold_all/train_loss"]] == [1, 2]
