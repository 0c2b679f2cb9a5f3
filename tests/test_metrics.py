"""What Prometheus is told, from a journal and a database as they lie after rounds with a silent and a faulty site."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, phantom_study
from prometheus_client import CollectorRegistry

from federation import audit, files
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
