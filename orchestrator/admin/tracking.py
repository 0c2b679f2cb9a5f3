"""`fednnunet study track`: a study's curves in TensorBoard or MLflow, for those who look at all their runs there.

Rules:

- Read from the journal, each curve once: TensorBoard's files are written anew each time, and of an MLflow run only what
  it does not hold yet.
- A run for each site and one for all together (`all_sites`); a step is an epoch of a fold, in `sites` and
  `round_seconds` a round.
- Names of sites and sums; nothing of a case.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from federation.audit import Tail
from federation.errors import Code, FednnunetError
from federation.readable import moment
from orchestrator.history import REPORT, Found, History

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

ALL = "all_sites"


@dataclass(frozen=True)
class Point:
    """One value of a curve: whose, its name (`fold_0/train_loss`), value, step, and when (seconds since 1970)."""

    site: str
    name: str
    value: float
    step: int
    at: float


class Sink(Protocol):
    """Where curves go."""

    where: str

    def write(self, points: list[Point]) -> None:
        """Take points, in the order of the journal."""

    def close(self, history: History) -> None:
        """All has been written that the journal holds now."""


class TensorBoard:
    """Event files: `FOLDER/NAME-ID/SITE/events...`.

    Parameters
    ----------
    found : Found
        The study.
    folder : Path
        TensorBoard's folder (`--logdir`); what lies there of this study is replaced.
    """

    def __init__(self, found: Found, folder: Path) -> None:
        self._folder = folder / f"{found.study.name}-{found.study.id[:12]}"
        self.where = f"tensorboard --logdir {folder}"
        shutil.rmtree(self._folder, ignore_errors=True)
        self._writers: dict[str, SummaryWriter] = {}

    def write(self, points: list[Point]) -> None:
        """Into the site's file."""
        from tensorboardX import SummaryWriter

        for point in points:
            if point.site not in self._writers:
                self._writers[point.site] = SummaryWriter(str(self._folder / point.site), write_to_disk=True)
            self._writers[point.site].add_scalar(point.name, point.value, point.step, walltime=point.at)
        for writer in self._writers.values():
            writer.flush()

    def close(self, history: History) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


@contextlib.contextmanager
def _told(uri: str) -> Iterator[None]:
    """What the server, or the way to it, does not like, as FNU-163."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FednnunetError(Code.TRACKER_REFUSED, f"{uri}: {reason[:300]}") from error


class MLflow:
    """Runs at an MLflow server: one for the study, below it one for each site and one for all together.

    Raises FNU-163 when the server does not take something.

    Parameters
    ----------
    found : Found
        The study: its fields are the parameters of its run.
    uri : str
        The tracking server, as MLFLOW_TRACKING_URI names it.
    experiment : str
        The experiment; made where there is none of this name.
    """

    BATCH = 1000

    def __init__(self, found: Found, uri: str, experiment: str) -> None:
        from mlflow.tracking import MlflowClient

        self._found, self._uri, self.where = found, uri, f"MLflow at {uri}, experiment {experiment}"
        self._runs: dict[str, str] = {}
        self._last: dict[tuple[str, str], int] = {}
        with _told(uri):
            self._client = MlflowClient(tracking_uri=uri)
            known = self._client.get_experiment_by_name(experiment)
            self._experiment = known.experiment_id if known else self._client.create_experiment(experiment)
            self._study = self._run("")

    def _run(self, site: str) -> str:
        """The id of the run of a site, or "" for the study's own; made once, found again later."""
        if site in self._runs:
            return self._runs[site]
        study = self._found.study
        tags = {"fednnunet.study": study.id, "fednnunet.site": site or "-"}
        said = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        known = self._client.search_runs([self._experiment], said, max_results=1)
        if known:
            run = known[0]
        else:
            name = f"{study.name}, {site}" if site else study.name
            more = {"mlflow.parentRunId": self._study} if site else {}
            run = self._client.create_run(self._experiment, tags={**tags, **more}, run_name=name)
            if not site:
                for key, value in study.model_dump(mode="json").items():
                    self._client.log_param(run.info.run_id, key, str(value)[:6000])
        for key in run.data.metrics:
            self._last[site, key] = max(one.step for one in self._client.get_metric_history(run.info.run_id, key))
        self._runs[site] = run.info.run_id
        return self._runs[site]

    def write(self, points: list[Point]) -> None:
        """What the runs do not hold yet; raises FNU-163."""
        with _told(self._uri):
            self._write(points)

    def _write(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        waiting: dict[str, list[Any]] = {}
        for point in points:
            run = self._run(point.site)
            if point.step > self._last.get((point.site, point.name), -1):
                self._last[point.site, point.name] = point.step
                waiting.setdefault(run, []).append(Metric(point.name, point.value, int(point.at * 1000), point.step))
        for run, metrics in waiting.items():
            for begin in range(0, len(metrics), self.BATCH):
                self._client.log_batch(run, metrics[begin : begin + self.BATCH])

    def close(self, history: History) -> None:
        """End the runs of a study that has ended, with its report."""
        if history.ended is None:
            return
        with _told(self._uri):
            if (report := self._found.folder / REPORT).exists():
                self._client.log_artifact(self._study, str(report))
            for run in self._runs.values():
                self._client.set_terminated(run, "FINISHED" if history.ended == "done" else "FAILED")


class Tracked:
    """The curves of one study, as far as its journal has been read."""

    def __init__(self, found: Found) -> None:
        self.history, self._tail = History(found.study), Tail(found.folder / "journal.jsonl")

    def read_on(self) -> list[Point]:
        """What was added to the journal, as points."""
        points: list[Point] = []
        for line in self._tail.lines():
            before = {name: len(site.epochs) for name, site in self.history.sites.items()}
            scored = {name: set(site.scores) for name, site in self.history.sites.items()}
            self.history.take(line)
            at = moment(line["at"])
            for name, site in self.history.sites.items():
                for epoch in site.epochs[before[name] :]:
                    fold, step = f"fold_{epoch.fold}", epoch.epoch
                    points.append(Point(name, f"{fold}/train_loss", epoch.train_loss, step, at))
                    points.append(Point(name, f"{fold}/val_loss", epoch.val_loss, step, at))
                    points.append(Point(name, f"{fold}/learning_rate", epoch.learning_rate, step, at))
                    if epoch.mean_dice is not None:
                        points.append(Point(name, f"{fold}/pseudo_dice", epoch.mean_dice, step, at))
                for fold in set(site.scores) - scored[name]:
                    points += self._scores(name, fold, site.scores[fold], at)
            if line["event"] == "closed":
                points += self._round(line["fold"], line["round"], at)
        return points

    def _scores(self, site: str, fold: str, told: dict[str, Any], at: float) -> Iterator[Point]:
        """The global model's mean Dice on a site's held-out cases, for each label; the step is the last round."""
        for where in ("validation", "test"):
            for label, score in told[where].items():
                if score["mean"] is not None:
                    name = "".join(letter if letter.isalnum() or letter in "-_. " else "_" for letter in label)
                    yield Point(site, f"fold_{fold}/{where}_dice/{name}", score["mean"], self.history.study.rounds, at)

    def _round(self, fold: str, number: int, at: float) -> Iterator[Point]:
        """What all sites together did in a round."""
        done = self.history.rounds[-1]
        yield Point(ALL, f"fold_{fold}/sites", len(done.participants), number, at)
        yield Point(ALL, f"fold_{fold}/round_seconds", done.seconds, number, at)
        for name in ("train_loss", "val_loss", "mean_dice"):
            curve = self.history.pooled_curve(fold, name)
            if curve:
                epoch, value = curve[-1]
                shown = "pseudo_dice" if name == "mean_dice" else name
                yield Point(ALL, f"fold_{fold}/{shown}", value, epoch, at)


def track(found: Found, sinks: list[Sink], follow: bool, pause: Callable[[], None]) -> None:
    """Write the curves to each sink, and with `follow` go on until the study ends."""
    tracked = Tracked(found)
    try:
        while True:
            points = tracked.read_on()
            for sink in sinks:
                sink.write(points)
            if not follow or tracked.history.ended is not None:
                return
            pause()
    finally:
        for sink in sinks:
            sink.close(tracked.history)
