"""What Prometheus scrapes: how studies, sites and journals stand, read from the journals and the SuperLink's database.

Rules:

- Nothing is counted anywhere but in the journals: a scrape after a restart says the same as before it.
- A scrape reads what was added to each journal since the last one. Nothing is written, and no site is asked.
- Site names, study names and numbers: nothing of a case or of a patient is known here.
- Plain HTTP on a port of its own: who may scrape is the network policy's matter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from federation.readable import moment
from orchestrator.books import Books
from orchestrator.registered import online_until


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
        self._books, self._database = Books(state, database), database
        self._one = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        with self._one:
            yield from self._metrics()
        yield from self._sites()

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
        spent = counter(
            "fednnunet_phase_seconds", "Time in each phase while a coordinator ran.", labels=["study", "phase"]
        )
        memory = gauge(
            "fednnunet_aggregation_peak_memory_bytes",
            "Peak resident memory of the coordinator at its last aggregation.",
            labels=["study"],
        )
        lines = counter("fednnunet_journal_lines", "Lines of a study's journal.", labels=["study"])
        last = gauge("fednnunet_journal_last_line_timestamp_seconds", "Time of the last line.", labels=["study"])
        site = ["study", "site"]
        sent = counter("fednnunet_sent_bytes", "Bytes of tasks and weights sent to a site.", labels=site)
        received = counter("fednnunet_received_bytes", "Bytes of answers and updates that counted.", labels=site)
        answered = gauge("fednnunet_site_answered_timestamp_seconds", "Time of a site's last answer.", labels=site)
        failed = counter("fednnunet_site_failures", "Answers that told a failure.", labels=site)
        missing = counter("fednnunet_site_missed_rounds", "Rounds that went on without a site.", labels=site)
        loss = gauge("fednnunet_site_train_loss", "Training loss of a site's last epoch.", labels=site)
        dice = gauge("fednnunet_site_pseudo_dice", "nnU-Net's online Dice of a site's last epoch, mean.", labels=site)
        refused = counter("fednnunet_refused", "Answers that were refused, by error number.", labels=[*site, "number"])
        for folder, history in sorted(self._books.by_folder().items()):
            key = folder[:16]
            phase.add_metric([key, history.study.name, history.standing], 1)
            planned.add_metric([key], history.study.rounds)
            lines.add_metric([key], history.lines)
            last.add_metric([key], moment(history.last) if history.last else 0)
            for fold, (number, _) in sorted(history.weights.items()):
                done.add_metric([key, fold], number)
            seconds.add_metric([key, "exchange"], sum(one.seconds for one in history.rounds))
            seconds.add_metric([key, "aggregate"], sum(history.aggregation))
            for name, took in history.spent().items():
                spent.add_metric([key, name], took)
            if history.memory:
                memory.add_metric([key], history.memory)
            for name, told in sorted(history.sites.items()):
                sent.add_metric([key, name], told.sent)
                received.add_metric([key, name], told.received)
                failed.add_metric([key, name], told.failures)
                missing.add_metric([key, name], told.missed)
                if told.answered:
                    answered.add_metric([key, name], told.answered)
                if told.epochs:
                    loss.add_metric([key, name], told.epochs[-1].train_loss)
                    if (mean := told.epochs[-1].mean_dice) is not None:
                        dice.add_metric([key, name], mean)
                for code, times in sorted(told.refused.items()):
                    refused.add_metric([key, name, code], times)
        yield from (phase, planned, done, seconds, spent, memory, lines, last)
        yield from (sent, received, answered, failed, missing, loss, dice, refused)

    def _sites(self) -> Iterator[Metric]:
        """From the database, without Flower: until when each registered site's last sign of life holds."""
        until = GaugeMetricFamily(
            "fednnunet_site_online_until_timestamp_seconds",
            "Until when a site's last sign of life holds: in the past, the site is offline.",
            labels=["site"],
        )
        for name, known in online_until(self._database).items():
            until.add_metric([name], known)
        yield until
        info = GaugeMetricFamily("fednnunet_info", "1 for the version that runs.", labels=["version"])
        info.add_metric([version("fednnunet")], 1)
        yield info
