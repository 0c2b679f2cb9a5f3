"""What a coordinator that was killed finds at its next start: which studies go on, and which runs begin and end."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, cast

import pytest
from commands import phantom_study
from journals import Written

from federation import audit
from federation.flower import clients
from federation.flower.clients import UnderWay
from federation.flower.runner import Run, Stop
from federation.patience import SLOWEST, pause
from federation.study import Study, parse
from orchestrator import coordinator, selftest
from orchestrator.coordinator import CoordinatorSettings
from orchestrator.journal import Journal, under_way
from orchestrator.workshop import Workshop


class Control:
    """Flower's control listener: says which runs are under way, and writes down what is asked of it."""

    def __init__(self, *runs: UnderWay) -> None:
        self._runs = list(runs)
        self.calls: list[tuple[Any, ...]] = []

    def under_way(self) -> list[UnderWay]:
        return self._runs

    def start(self, study_json: str, submission: str | None = None) -> int:
        self.calls.append(("start", study_json, submission))
        return 99

    def stop(self, run_id: int) -> None:
        self.calls.append(("stop", run_id))


def carried_on(state: Path, *runs: UnderWay) -> list[tuple[Any, ...]]:
    """What a coordinator asks of Flower at its start."""

    class Settings:
        studies = state / "studies"

    control = Control(*runs)
    coordinator._carry_on(cast(CoordinatorSettings, Settings()), cast(clients.Control, control))
    return control.calls


def test_a_study_without_a_first_line_goes_on_as_the_same_submission_before_its_old_run_ends(tmp_path: Path) -> None:
    study = parse(phantom_study(["north", "south"]))
    calls = carried_on(tmp_path, UnderWay(7, study.model_dump_json(), "once"))
    assert calls == [("start", study.model_dump_json(), "once"), ("stop", 7)]


def test_a_study_that_was_cut_off_goes_on_once_whatever_runs_are_left_of_it(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.write("opened", run=7, submission="once")
    text = written.study.model_dump_json()
    calls = carried_on(tmp_path, UnderWay(7, text, "once"), UnderWay(8, text, "twice"))
    assert [call[0] for call in calls] == ["start", "stop", "stop"]


def test_what_has_ended_is_only_put_away_and_a_failed_study_that_was_submitted_again_is_tried(tmp_path: Path) -> None:
    done = Written(tmp_path, name="done")
    done.to_the_end()
    failed = Written(tmp_path, name="failed")
    failed.write("opened", run=1, submission="first")
    failed.write("failed", number=503, reason="FNU-503", advice="")
    assert carried_on(tmp_path, UnderWay(3, done.study.model_dump_json(), "x")) == [("stop", 3)]
    assert carried_on(tmp_path, UnderWay(4, failed.study.model_dump_json(), "first")) == [("stop", 4)]
    again = carried_on(tmp_path, UnderWay(5, failed.study.model_dump_json(), "second"))
    assert [call[0] for call in again] == ["start", "stop"]


def test_a_self_test_goes_on_and_what_cannot_be_read_is_put_away(tmp_path: Path) -> None:
    assert carried_on(tmp_path, UnderWay(1, selftest.STUDY, "s"))[0] == ("start", selftest.STUDY, "s")
    assert carried_on(tmp_path, UnderWay(2, "{}", "s")) == [("stop", 2)]
    assert carried_on(tmp_path) == []


def test_who_has_waited_for_long_looks_less_often_and_never_much_too_late() -> None:
    assert pause(0.5, 0.0, 0.02) == 0.5
    assert pause(0.5, 100.0, 0.02) == 2.0
    assert pause(0.5, 1e6, 0.02) == SLOWEST
    assert pause(10.0, 1e6, 0.02) == SLOWEST


@pytest.mark.parametrize(
    ("name", "content"), [("journal.jsonl", b"{}\n{}\n"), ("study.json", b'{"of": "another version"}')]
)
def test_a_damaged_study_is_said_and_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, content: bytes
) -> None:
    damaged, sound = Written(tmp_path, "damaged"), Written(tmp_path, "sound")
    for written in (damaged, sound):
        written.write("opened", run=7, submission=written.study.name)
    (damaged.folder / name).write_bytes(content)
    run = UnderWay(7, damaged.study.model_dump_json(), "other")
    calls = carried_on(tmp_path, run)
    assert [call[0] for call in calls] == ["start", "stop"], "a study whose record is damaged does not go on"
    assert Study.model_validate_json(calls[0][1]).id == sound.study.id
    assert damaged.study.id[:12] in caplog.text
    assert "FNU-504" in caplog.text

    class Settings:
        studies = tmp_path / "studies"

    assert coordinator._progress(cast(CoordinatorSettings, Settings()))


def test_a_disk_that_does_not_take_the_journal_is_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = parse(phantom_study(["north"]))
    fsync, left = os.fsync, [3]

    def full(descriptor: int) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    class Run:
        def check(self) -> None:
            """The run goes on."""

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(coordinator, "DISK_PAUSE", 0.0)
    journal = coordinator._open(tmp_path / "studies" / study.id, study, cast(coordinator.Run, Run()))
    journal.write("opened", run=1, submission="s")
    journal.close()
    assert caplog.text.count("FNU-702") == 3


@pytest.mark.parametrize("last", ["done", "phase"])
def test_a_shutdown_while_a_line_is_written_is_said_only_of_a_study_that_has_not_ended(
    last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Conductor:
        """Is told to stop while its last line goes to the disk."""

        def __init__(self, run: Run, journal: Journal, *_: Any) -> None:
            self._journal = journal

        def conduct(self) -> None:
            self._journal._chain.append(last, **({"phase": "training"} if last == "phase" else {}))
            raise Stop(0)

    reports: list[Path] = []
    monkeypatch.setattr(coordinator, "Conductor", Conductor)
    monkeypatch.setattr(coordinator, "_write_report", reports.append)
    settings = coordinator.CoordinatorSettings(tmp_path, "", 0.01)
    monkeypatch.setattr(coordinator.CoordinatorSettings, "signatures", None)
    study = parse(phantom_study(["north", "south"]))
    run = cast(Run, UnderWay(7, study.model_dump_json(), "s"))
    with pytest.raises(Stop):
        coordinator._drive(settings, run, study, cast(Workshop, None))
    folder = settings.studies / study.id
    events = [line["event"] for line in audit.read(folder / "journal.jsonl")]
    assert events == (["opened", "done"] if last == "done" else ["opened", "phase", "interrupted"])
    assert reports == ([folder] if last == "done" else [])
    assert list(under_way(settings.studies)) == ([] if last == "done" else [folder / "journal.jsonl"])


def test_a_study_that_has_ended_on_a_long_line_is_not_under_way(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.write("opened", run=1)
    written.write("failed", number=503, reason="x" * 300_000, advice="")
    assert list(under_way(tmp_path / "studies")) == []
