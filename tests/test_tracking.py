"""A study's curves as TensorBoard event files."""

from __future__ import annotations

import struct
import threading
from pathlib import Path

import pytest
from commands import fednnunet, good, refused
from journals import Written, validation
from tensorboardX.proto.event_pb2 import Event

from federation.processes import free_port
from orchestrator.admin.tracking import MLflow, TensorBoard, track
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

    found = Found(written.folder, written.study)
    track(found, [TensorBoard(found, tmp_path / "tb")], True, go_on)
    folder = tmp_path / "tb" / f"small-{written.study.id[:12]}"
    assert [step for step, _ in scalars(folder / "north")["fold_all/train_loss"]] == [1, 2]


def test_mlflow_holds_each_curve_once_however_often_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # in the place of a server: the same calls, no process
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    written = Written(tmp_path)
    written.write("opened", run=1)
    written.round(1)
    found, uri = Found(written.folder, written.study), (tmp_path / "runs").as_uri()
    track(found, [MLflow(found, uri, "liver")], False, lambda: None)
    written.round(2)
    written.write("answered", site="north", key="validate-fold_all", nbytes=90, validation=validation(0.9))
    (written.folder / "report.html").write_text("<p>")
    written.write("done")
    for _ in range(2):
        track(found, [MLflow(found, uri, "liver")], False, lambda: None)

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("liver")
    assert experiment is not None
    runs = {run.data.tags["fednnunet.site"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"-", "north", "south", "all_sites"}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs["-"].data.params["rounds"] == "3"
    assert runs["north"].data.tags["mlflow.parentRunId"] == runs["-"].info.run_id
    loss = client.get_metric_history(runs["south"].info.run_id, "fold_all/train_loss")
    assert [(one.step, one.value) for one in loss] == [(1, 2.0), (2, 1.5)]
    assert runs["north"].data.metrics["fold_all/test_dice/organ"] == 0.9
    assert [one.path for one in client.list_artifacts(runs["-"].info.run_id)] == ["report.html"]


def test_nowhere_to_write_to_and_a_server_that_is_not_there_are_told(tmp_path: Path, whole: Written) -> None:
    base = ("study", "track", "small", "--state", tmp_path)
    bare = fednnunet(*base, cwd=tmp_path)
    assert bare.status == 2
    assert "--mlflow" in bare.err
    port = free_port()
    away = fednnunet(*base, "--mlflow", f"http://127.0.0.1:{port}", cwd=tmp_path, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    refused(away, 163, str(port))
