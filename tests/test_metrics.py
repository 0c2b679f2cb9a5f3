"""What Prometheus is told, from a journal and a database as they lie after rounds with a silent and a faulty site."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, phantom_study
from prometheus_client import CollectorRegistry

from appliance.link.metrics import Appliance
from federation import audit, files
from federation.study import Study
from federation.tasks import Result, Task
from orchestrator.metrics import Journals


@pytest.fixture
def state(tmp_path: Path) -> Path:
    files.write_json(tmp_path / "studies" / ("a" * 64) / "study.json", phantom_study(["north", "south"], rounds=3))
    with sqlite3.connect(tmp_path / "superlink.db") as database:
        database.execute("CREATE TABLE node (name TEXT, online_until REAL, status TEXT)")
        rows = [("north", 1e9, "online"), ("south", None, "registered"), ("gone", 5.0, "unregistered")]
        database.executemany("INSERT INTO node VALUES (?, ?, ?)", rows)
    database.close()
    return tmp_path


def test_a_scrape_adds_up_the_journal_and_goes_on_where_it_was(state: Path) -> None:
    registry = CollectorRegistry()
    registry.register(Journals(state, state / "superlink.db"))
    journal = state / "studies" / ("a" * 64) / "journal.jsonl"

    def write(event: str, **fields: Any) -> dict[str, Any]:
        return audit.append(journal, event, **fields)

    def value(metric: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"fednnunet_{metric}", labels)

    study = {"study": "a" * 16}
    write("opened", run=1)
    write("phase", phase="training")
    write("asked", site="north", key="k", nbytes=100)
    write("answered", site="north", key="k", nbytes=40)
    write("refused", site="south", key="k", reason="FNU-505 A site's update was refused: nan")
    write("closed", fold="all", round=1, participants=["north"], missing={"south": "refused"}, seconds=2.5)
    write("weights", fold="all", round=1, digest="d", seconds=0.5)
    assert value("study_phase", **study, name="small", phase="training") == 1
    assert value("study_rounds_done", **study, fold="all") == 1
    assert value("rounds_seconds_total", **study, part="exchange") == 2.5
    assert value("rounds_seconds_total", **study, part="aggregate") == 0.5
    assert value("sent_bytes_total", **study, site="north") == 100
    assert value("received_bytes_total", **study, site="north") == 40
    assert value("refused_total", **study, site="south", number="505") == 1
    assert value("site_missed_rounds_total", **study, site="south") == 1
    assert value("site_answered_timestamp_seconds", **study, site="south") is None

    with open(journal, "ab") as stream:  # the beginning of a line, as a scrape may find it
        stream.write(b'{"at":"2026-')
    assert value("journal_lines_total", **study) == 7
    write("failed_answer", site="south", key="k", reason="FNU-402")
    write("done")
    assert value("journal_lines_total", **study) == 9
    assert value("site_failures_total", **study, site="south") == 1
    assert value("study_phase", **study, name="small", phase="done") == 1
    assert value("study_phase", **study, name="small", phase="training") is None

    again = CollectorRegistry()
    again.register(Journals(state, state / "superlink.db"))
    assert again.get_sample_value("fednnunet_received_bytes_total", {**study, "site": "north"}) == 40


def test_sites_come_from_the_database_and_without_one_the_rest_is_told(state: Path) -> None:
    registry = CollectorRegistry()
    registry.register(Journals(state, state / "superlink.db"))
    until = "fednnunet_site_online_until_timestamp_seconds"
    assert registry.get_sample_value(until, {"site": "north"}) == 1e9
    assert registry.get_sample_value(until, {"site": "south"}) == 0
    assert registry.get_sample_value(until, {"site": "gone"}) is None
    (state / "superlink.db").unlink()
    assert registry.get_sample_value(until, {"site": "north"}) is None
    assert [metric.name for metric in registry.collect()][-1] == "fednnunet_info"


def test_dashboard_and_alerts_ask_for_metrics_that_are_told(state: Path) -> None:
    registry = CollectorRegistry()
    registry.register(Journals(state, state / "superlink.db"))
    audit.append(state / "studies" / ("a" * 64) / "journal.jsonl", "opened", run=1)
    told = {f"{metric.name}_total" if metric.type == "counter" else metric.name for metric in registry.collect()}
    chart = REPOSITORY / "helm" / "orchestrator"
    for file in ("files/dashboard.json", "templates/orchestrator/prometheusrule.yaml"):
        asked = set(re.findall(r"\bfednnunet_\w+", (chart / file).read_text(encoding="utf-8")))
        assert len(asked) > 3, file
        assert asked <= told, f"{file} asks for what no scrape tells"


def test_a_hospital_is_told_what_came_and_what_left_and_nothing_of_a_case(tmp_path: Path) -> None:
    link, outbox, inbox = (tmp_path / name for name in ("link", "spool/outbox", "spool/inbox"))
    study, key = "b" * 64, {"study": "b" * 16}
    leaving = {"study": study, "fold": "all", "failure": None, "body_bytes": 100}
    audit.append(_made(link / "ledger.jsonl"), "leaving", kind="train", weights_bytes=900, **leaving)
    audit.append(link / "ledger.jsonl", "leaving", kind="train", weights_bytes=0, **{**leaving, "failure": "FNU-402"})
    audit.append(_made(link / "arrivals.jsonl"), "accepted", study=study)
    audit.append(link / "arrivals.jsonl", "refused", number=622, found="x")
    for number, loss in ((9, 0.5), (10, 0.25)):
        task = Task(
            study=Study.model_validate(phantom_study(["north"])), site="north", kind="train", fold="all", round=number
        )
        told = {
            "plans_sha256": "0" * 64, "cases": 3, "epochs": 1, "learning_rate": [0.01], "train_loss": [loss],
            "val_loss": [1.0], "pseudo_dice": [[0.5, None, 0.7]], "seconds": {},
        }  # fmt: skip
        answer = Result.answering(task, training=told)
        files.write_bytes(outbox / study / task.key / "result.json", answer.model_dump_json().encode())
    files.write_bytes(inbox / study / "train-fold_all-0010" / "task.json", b"answered")
    files.write_bytes(inbox / study / "train-fold_all-0011" / "task.json", b"waits")
    state = {"name": "worker", "pid": None, "restarts": 2, "since": 0}
    files.write_json(tmp_path / "role-all" / "status.json", {"processes": [state]})
    registry = CollectorRegistry()
    registry.register(Appliance(tmp_path))

    def value(metric: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"fednnunet_appliance_{metric}", labels)

    assert value("left_bytes_total", **key, kind="train") == 1100
    assert value("answers_total", **key, kind="train") == 2
    assert value("failures_total", **key, kind="train") == 1
    assert value("tasks_total", **key) == 1
    assert value("refused_total", number="622") == 1
    assert value("round", **key, fold="all") == 10
    assert value("train_loss", **key, fold="all") == 0.25
    assert value("pseudo_dice", **key, fold="all") == pytest.approx(0.6)
    assert value("task_since_timestamp_seconds", **key, task="train-fold_all-0010") is None
    assert value("task_since_timestamp_seconds", **key, task="train-fold_all-0011")
    assert value("process_up", process="worker") == 0
    assert value("process_restarts_total", process="worker") == 2


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    return path
