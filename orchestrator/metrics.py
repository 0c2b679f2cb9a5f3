"""What Prometheus scrapes: how studies, sites and journals stand, read from the journals and the SuperLink's database.

Rules:

- Nothing is counted anywhere but in the journals: a scrape after a restart says the same as before it.
- A scrape reads what was added to each journal since the last one. Nothing is written, and no site is asked.
- Site names, study names and numbers: nothing of a case or of a patient is known here.
- Plain HTTP on a port of its own: who may scrape is the network policy's matter.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from federation.errors import Code, FednnunetError

log = logging.getLogger("fednnunet.metrics")


@dataclass
class _Study:
    """One study's journal, added up."""

    name: str
    rounds: int
    read: int = 0
    lines: int = 0
    last: float = 0.0
    phase: str = "new"
    done: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    answered: dict[str, float] = field(default_factory=dict)

    def take(self, line: dict[str, Any]) -> None:
        """Add one line."""
        self.lines += 1
        self.last = dt.datetime.fromisoformat(line["at"]).timestamp()
        site = line.get("site", "")
        match line["event"]:
            case "opened":
                self.phase = "opened" if self.phase in ("done", "failed") else self.phase
            case "phase":
                self.phase = line["phase"]
            case "done" | "failed":
                self.phase = line["event"]
            case "asked":
                self.sent[site] += line.get("nbytes", 0)
            case "answered":
                self.received[site] += line.get("nbytes", 0)
                self.answered[site] = self.last
            case "failed_answer":
                self.failed[site] += 1
            case "refused":
                number = re.search(r"FNU-(\d{3})", line.get("reason", ""))
                self.refused[site, number[1] if number else ""] += 1
            case "closed":
                self.seconds["exchange"] += line["seconds"]
                self.missing.update(list(line["missing"]))
            case "weights" if line["round"]:
                self.seconds["aggregate"] += line.get("seconds", 0.0)
                self.done[line["fold"]] = line["round"]


class Journals(Collector):
    """Metrics of every study and site below an orchestrator's state folder.

    Parameters
    ----------
    state : Path
        The state folder.
    database : Path
        The SuperLink's database.
    """

    def __init__(self, state: Path, database: Path) -> None:
        self._studies, self._database = state / "studies", database
        self._known: dict[str, _Study] = {}
        self._one = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        with self._one:
            for journal in sorted(self._studies.glob("*/journal.jsonl")):
                self._read(journal)
            yield from self._metrics()
        yield from self._sites()

    def _read(self, journal: Path) -> None:
        """Take in the lines that were added; a last line without its end waits for the next scrape."""
        study = self._known.get(journal.parent.name)
        if study is None:
            try:
                told = json.loads((journal.parent / "study.json").read_bytes())
                study = _Study(told["name"], told["rounds"])
            except (OSError, ValueError, KeyError):
                return
            self._known[journal.parent.name] = study
        with open(journal, "rb") as stream:
            stream.seek(study.read)
            added = stream.read().rpartition(b"\n")[0]
        for raw in added.splitlines():
            study.read += len(raw) + 1
            with contextlib.suppress(ValueError, KeyError, TypeError):  # `health --ready` names a damaged journal
                study.take(json.loads(raw))

    def _metrics(self) -> Iterator[Metric]:
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        phase = gauge("fednnunet_study_phase", "1 for the phase that a study is in.", labels=["study", "name", "phase"])
        planned = gauge("fednnunet_study_rounds", "Rounds that a study has for each fold.", labels=["study"])
        done = gauge("fednnunet_study_rounds_done", "Rounds whose weights are on the disk.", labels=["study", "fold"])
        seconds = counter(
            "fednnunet_rounds_seconds",
            "Time of the rounds: exchange with the sites, aggregate.",
            labels=["study", "part"],
        )
        lines = counter("fednnunet_journal_lines", "Lines of a study's journal.", labels=["study"])
        last = gauge("fednnunet_journal_last_line_timestamp_seconds", "Time of the last line.", labels=["study"])
        site = ["study", "site"]
        sent = counter("fednnunet_sent_bytes", "Bytes of tasks and weights sent to a site.", labels=site)
        received = counter("fednnunet_received_bytes", "Bytes of answers and updates that counted.", labels=site)
        answered = gauge("fednnunet_site_answered_timestamp_seconds", "Time of a site's last answer.", labels=site)
        failed = counter("fednnunet_site_failures", "Answers that told a failure.", labels=site)
        missing = counter("fednnunet_site_missed_rounds", "Rounds that went on without a site.", labels=site)
        refused = counter("fednnunet_refused", "Answers that were refused, by error number.", labels=[*site, "number"])
        for key, study in sorted(self._known.items()):
            key = key[:16]
            phase.add_metric([key, study.name, study.phase], 1)
            planned.add_metric([key], study.rounds)
            lines.add_metric([key], study.lines)
            last.add_metric([key], study.last)
            for fold, number in sorted(study.done.items()):
                done.add_metric([key, fold], number)
            for part, took in sorted(study.seconds.items()):
                seconds.add_metric([key, part], took)
            for metric, by_site in (
                (sent, study.sent),
                (received, study.received),
                (answered, study.answered),
                (failed, study.failed),
                (missing, study.missing),
            ):
                for name, value in sorted(by_site.items()):
                    metric.add_metric([key, name], value)
            for (name, code), times in sorted(study.refused.items()):
                refused.add_metric([key, name, code], times)
        yield from (phase, planned, done, seconds, lines, last)
        yield from (sent, received, answered, failed, missing, refused)

    def _sites(self) -> Iterator[Metric]:
        """From the database, without Flower: until when each registered site's last sign of life holds."""
        until = GaugeMetricFamily(
            "fednnunet_site_online_until_timestamp_seconds",
            "Until when a site's last sign of life holds: in the past, the site is offline.",
            labels=["site"],
        )
        uri = f"{self._database.resolve().as_uri()}?mode=ro"
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as opened,
        ):
            asked = "SELECT name, online_until FROM node WHERE status != 'unregistered' ORDER BY name"
            for name, moment in opened.execute(asked):
                until.add_metric([name], moment or 0.0)
        yield until
        info = GaugeMetricFamily("fednnunet_info", "1 for the version that runs.", labels=["version"])
        info.add_metric([version("fednnunet")], 1)
        yield info


def serve(state: Path, database: Path, host: str, port: int) -> None:
    """Serve /metrics until the process ends; raises FNU-701 when nothing can listen there."""
    REGISTRY.register(Journals(state, database))
    try:
        _, thread = start_http_server(port, host)
    except OSError as error:
        raise FednnunetError(Code.PORT_IN_USE, f"{host}:{port}: {error.strerror}") from error
    log.info("metrics at http://%s:%d/metrics, version %s", host, port, version("fednnunet"))
    thread.join()
