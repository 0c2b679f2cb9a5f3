"""What the processes log, as events."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from federation import logs

FIRST = "2026-01-02T03:04:05.678Z INFO fednnunet.worker: begins\n"


def follow(path: Path, text: str) -> list[logs.Event]:
    follower = logs.Follower(path, "worker")
    path.write_text(text)
    return list(follower.read(last=True))


def test_a_traceback_belongs_to_its_event(tmp_path: Path) -> None:
    text = FIRST.replace("INFO", "ERROR") + 'Traceback (most recent call last):\n  File "a.py"\nValueError: no\n'
    found = follow(tmp_path / "log", text + FIRST)
    assert [event.level for event in found] == ["ERROR", "INFO"]
    assert found[0].message.endswith("ValueError: no")


def test_what_nnunet_prints_is_an_event_and_a_numbered_error_is_one(tmp_path: Path) -> None:
    found = follow(tmp_path / "log", "Epoch 3\nFNU-702 The disk\n/state\nWhat to do: Free space.\nEpoch 4\n")
    assert [event.message.splitlines()[0] for event in found] == ["Epoch 3", "FNU-702 The disk", "Epoch 4"]
    assert found[1].fields == {"code": 702}
    assert found[1].level == "ERROR"


def test_half_a_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = logs.Follower(path, "worker")
    path.write_text(FIRST[:30])
    assert list(follower.read()) == []
    path.write_text(FIRST)
    assert [event.message for event in [*follower.read(), *follower.read()]] == ["begins"]


def test_each_event_is_one_line_of_json(tmp_path: Path) -> None:
    stream = io.StringIO()
    logs.Screen("json", stream).show(logs.Event(logs.now(), "ERROR", "link", "a.b", "one\ntwo"))
    assert stream.getvalue().count("\n") == 1
    value = json.loads(stream.getvalue())
    assert value["message"] == "one\ntwo"
    assert value["time"].endswith("Z")


def test_no_terminal_means_no_colour_and_no_wrapping() -> None:
    stream = io.StringIO()
    logs.Screen("rich", stream).show(logs.Event(logs.now(), "WARNING", "link", "a.b", "word " * 100))
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_what_another_side_has_sent_is_obeyed_by_no_terminal() -> None:
    """Before its signature is looked at, a message's own words stand in the error that it is refused with."""
    stream = io.StringIO()
    message = "unexpected \x1b[2J\x1b[8mhidden\u202e\n\tsecond line"
    logs.Screen("rich", stream).show(logs.Event(logs.now(), "WARNING", "link", "a.b", message))
    shown = stream.getvalue()
    assert "unexpected ?[2J?[8mhidden?\n        second line" in shown
    assert shown.replace("\n", "").isprintable()


def test_a_log_does_not_grow_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LIMIT", 100)
    path = tmp_path / "log"
    follower = logs.Follower(path, "worker")
    with open(path, "ab", buffering=0) as writer:
        writer.write(FIRST.encode() * 3)
        assert len(list(follower.read(last=True))) == 3
        assert path.stat().st_size == 0
        writer.write(FIRST.encode())
        assert len(list(follower.read(last=True))) == 1
    assert path.with_name("log.1").read_text() == FIRST * 3


def test_a_chained_traceback_after_a_plain_line_is_one_error(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    follower = logs.Follower(log, "worker")
    log.write_text(
        "2026-11-25T12:00:00.000Z INFO fednnunet.worker: all is well\n"
        "Traceback (most recent call last):\n"
        '  File "a.py", line 1, in <module>\n'
        "KeyError: 'a'\n\n"
        "The above exception was the direct cause of the following exception:\n\n"
        "Traceback (most recent call last):\n"
        '  File "b.py", line 1, in <module>\n'
        "ValueError: b\n"
    )
    well, error = follower.read(last=True)
    assert (well.level, well.message) == ("INFO", "all is well")
    assert error.level == "ERROR"
    assert error.message.startswith("Traceback")
    assert error.message.endswith("ValueError: b")


@pytest.mark.parametrize("form", ["rich", "json"])
def test_a_screen_that_has_gone_or_cannot_spell_ends_nobody(form: logs.Format) -> None:
    event = logs.Event(logs.now(), "INFO", "worker", "output", "100%|██████████| \ufffd")
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "w", encoding="utf-8") as gone:
        screen = logs.Screen(form, gone)
        for _ in range(3):
            screen.show(event)
    raw = io.BytesIO()
    latin = io.TextIOWrapper(raw, encoding="latin-1", write_through=True)
    logs.Screen(form, latin).show(event)
    assert b"100%" in raw.getvalue()


def test_a_log_that_has_grown_is_kept_once_and_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LIMIT", 100)
    log = tmp_path / "worker.log"
    follower = logs.Follower(log, "worker")
    log.write_text("line\n" * 40)
    assert len(list(follower.read())) == 40
    assert (log.stat().st_size, (tmp_path / "worker.log.1").stat().st_size) == (0, 200)
    with open(log, "a") as stream:
        stream.write("more\n")
    assert [event.message for event in follower.read()] == ["more"]


@pytest.mark.parametrize("form", ["rich", "json"])
def test_a_supervisor_says_its_own_lines_and_errors_as_it_shows_its_childrens(form: str) -> None:
    program = (
        "import logging; from federation import console, logs; from federation.errors import Code, FednnunetError\n"
        f"logs.lead({form!r}); log = logging.getLogger('fednnunet.appliance'); log.info('dials %s', 'x:1')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('no')\n"
        "console.show(FednnunetError(Code.DISK_FULL, '/state'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    if form == "json":
        info, error = map(json.loads, done.stdout.splitlines())
        assert (info["message"], info["process"], info["logger"]) == ("dials x:1", "supervisor", "fednnunet.appliance")
        assert error["message"].startswith("no\nTraceback")
        told = json.loads(done.stderr)
        assert (told["code"], told["message"][:7], told["found"]) == (702, "FNU-702", "/state")
    else:
        assert done.stdout.splitlines()[0][8:] == " supervisor  INFO    dials x:1"
        assert "ZeroDivisionError" in done.stdout
        assert done.stderr.startswith("FNU-702 ")


def test_a_line_says_which_study_site_and_round_it_is_about(tmp_path: Path) -> None:
    program = (
        "import logging; from federation import logs\n"
        "logs.configure(); log = logging.getLogger('fednnunet.link'); log.info('ready')\n"
        "log.info(''); logging.getLogger('alembic.runtime').info('Running upgrade')\n"
        "with logs.about(study='0123456789ab', site='north'):\n"
        "    with logs.about(task='train-fold_0-0003', fold='0', round=3): log.warning('two\\nlines: {a=b}: c')\n"
        "    with logs.about(round=None): log.info('after')\n"
        "log.info('at rest')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    ready, two, _, after, rest = follow(tmp_path / "log", done.stderr)
    assert json.loads(two.as_json())["round"] == 3
    about = {"study": "0123456789ab", "site": "north"}
    assert two.fields == {**about, "task": "train-fold_0-0003", "fold": "0", "round": 3}
    assert (two.message, after.fields, ready.fields, rest.fields) == ("two", about, {}, {})
    stream = io.StringIO()
    logs.Screen("rich", stream).show(two)
    assert stream.getvalue().endswith("two  north train-fold_0-0003\n")


def test_a_childs_lines_are_read_back_as_they_were_said(tmp_path: Path) -> None:
    program = (
        "import logging; from federation import logs\n"
        "logs.configure(); log = logging.getLogger('fednnunet.worker'); log.warning('round %d', 3)\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('no')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True)
    warning, error = follow(tmp_path / "log", done.stderr)
    assert (warning.level, warning.logger, warning.message) == ("WARNING", "fednnunet.worker", "round 3")
    assert error.message.startswith("no\nTraceback")
    assert error.message.endswith("ZeroDivisionError: division by zero")
