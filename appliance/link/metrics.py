"""What a hospital's own Prometheus is told of its appliance, read from ledger, arrivals, spool and supervisor.

Rules:

- It lives on the link's side of the wall: what it knows is what came and what left. No case, no path, no worker's file.
- Nothing is counted anywhere but in the two chains and the spool: a scrape after a restart says the same as before it.
- On loopback, until the hospital says otherwise (`metrics_host`); off, until it names a port (`metrics_port`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.spool import unanswered
from federation import files, tasks
from federation.audit import Tail
from federation.errors import FednnunetError
from federation.processes import STATUS
from federation.readable import moment


class Appliance(Collector):
    """Metrics of one site, below its state folder.

    Parameters
    ----------
    state : Path
        The site's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._state = state
        self._ledger, self._arrivals = (Tail(state / "link" / name) for name in ("ledger.jsonl", "arrivals.jsonl"))
        self._sums: dict[tuple[str, str], Counter[str]] = {}
        self._answered: dict[str, float] = {}
        self._tasks: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._epochs: dict[Path, tuple[int, float, float | None] | None] = {}
        self._one = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        with self._one:
            self._read_on()
            yield from self._metrics()

    def _read_on(self) -> None:
        """Add up what came and what left since the last scrape."""
        for line in self._ledger.lines():
            if line["event"] == "leaving":
                study = line["study"][:16]
                told = self._sums.setdefault((study, line["kind"]), Counter())
                told["bytes"] += line["body_bytes"] + line["weights_bytes"]
                told["answers"] += 1
                told["failures"] += line["failure"] is not None
                self._answered[study] = moment(line["at"])
        for line in self._arrivals.lines():
            if line["event"] == "accepted":
                self._tasks[line["study"][:16]] += 1
            elif line["event"] == "refused":
                self._refused[str(line["number"])] += 1

    def _metrics(self) -> Iterator[Metric]:
        yield from self._left()
        yield from self._arrived()
        yield from self._training()
        yield from self._waiting()
        yield from self._processes()

    def _left(self) -> Iterator[Metric]:
        labels = ["study", "kind"]
        nbytes = CounterMetricFamily("fednnunet_appliance_left_bytes", "Bytes that left the hospital.", labels=labels)
        answers = CounterMetricFamily("fednnunet_appliance_answers", "Answers that left the hospital.", labels=labels)
        failed = CounterMetricFamily("fednnunet_appliance_failures", "Answers that told a failure.", labels=labels)
        last = GaugeMetricFamily(
            "fednnunet_appliance_answered_timestamp_seconds", "Time of a study's last answer.", labels=["study"]
        )
        for key, told in sorted(self._sums.items()):
            nbytes.add_metric(key, told["bytes"])
            answers.add_metric(key, told["answers"])
            failed.add_metric(key, told["failures"])
        for study, at in sorted(self._answered.items()):
            last.add_metric([study], at)
        yield from (nbytes, answers, failed, last)

    def _arrived(self) -> Iterator[Metric]:
        arrived = CounterMetricFamily("fednnunet_appliance_tasks", "Tasks that were believed.", labels=["study"])
        refused = CounterMetricFamily(
            "fednnunet_appliance_refused", "Tasks that trust or policy refused, by error number.", labels=["number"]
        )
        for study, times in sorted(self._tasks.items()):
            arrived.add_metric([study], times)
        for number, times in sorted(self._refused.items()):
            refused.add_metric([number], times)
        yield from (arrived, refused)

    def _training(self) -> Iterator[Metric]:
        labels = ["study", "fold"]
        rounds = GaugeMetricFamily("fednnunet_appliance_round", "Last round that was answered.", labels=labels)
        loss = GaugeMetricFamily("fednnunet_appliance_train_loss", "Training loss of its last epoch.", labels=labels)
        dice = GaugeMetricFamily(
            "fednnunet_appliance_pseudo_dice", "nnU-Net's online Dice of its last epoch, mean.", labels=labels
        )
        newest: dict[tuple[str, str], Path] = {}
        for path in sorted((self._state / "spool" / "outbox").glob("*/train-fold_*/result.json")):
            fold = path.parent.name.removeprefix("train-fold_").rpartition("-")[0]
            newest[path.parent.parent.name[:16], fold] = path
        self._epochs = {path: self._epochs.get(path) or _last_epoch(path) for path in newest.values()}
        for key, path in newest.items():
            if (told := self._epochs[path]) is not None:
                rounds.add_metric(key, told[0])
                loss.add_metric(key, told[1])
                if told[2] is not None:
                    dice.add_metric(key, told[2])
        yield from (rounds, loss, dice)

    def _waiting(self) -> Iterator[Metric]:
        since = GaugeMetricFamily(
            "fednnunet_appliance_task_since_timestamp_seconds",
            "Since when the worker has a task that is not answered.",
            labels=["study", "task"],
        )
        for body in sorted(unanswered(self._state / "spool")):
            with contextlib.suppress(OSError):
                since.add_metric([body.parent.parent.name[:16], body.parent.name], body.stat().st_mtime)
        yield since

    def _processes(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("fednnunet_appliance_process_up", "1 while a process runs.", labels=["process"])
        restarts = CounterMetricFamily(
            "fednnunet_appliance_process_restarts", "Since its supervisor started.", labels=["process"]
        )
        for path in sorted(self._state.glob(f"role-*/{STATUS}")):
            with contextlib.suppress(OSError, ValueError, KeyError):
                for process in files.read_json(path)["processes"]:
                    up.add_metric([process["name"]], process["pid"] is not None)
                    restarts.add_metric([process["name"]], process["restarts"])
        info = GaugeMetricFamily("fednnunet_appliance_info", "1 for the version that runs.", labels=["version"])
        info.add_metric([version("fednnunet")], 1)
        yield from (up, restarts, info)


def _last_epoch(path: Path) -> tuple[int, float, float | None] | None:
    """Round, training loss and mean pseudo-Dice of an answer to Train; None for a failure."""
    try:
        result = tasks.parse_result(path.read_bytes())
    except (FednnunetError, OSError):
        return None
    if result.training is None or result.round is None:
        return None
    dice = [value for value in result.training.pseudo_dice[-1] if value is not None]
    return result.round, result.training.train_loss[-1], sum(dice) / len(dice) if dice else None
