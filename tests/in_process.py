"""A whole federation in one process: everything is real but the network.

Real: the Conductor over its Journal on the disk, the Exchange, the workshop (a child process, kept warm between
studies) that plans, makes the first weights and exports, and for each site a Spool on the disk and a Worker with
nnU-Net's own trainer.

Simulated: Flower, the link (with signatures and policy) and the processes. A task that is pushed lies in the site's
spool at once, and the site's worker does it before `push` returns, one site after the other; the answer's bytes are
copied as they lie in the outbox. A study's deadlines are therefore never met here, and a site never restarts;
tests/test_rounds.py and tests/faults are for that.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app.message.arraychunk import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_object_body
from unsigned import Unsigned

from appliance.settings import Settings
from appliance.spool import Spool
from federation import files, tasks
from federation.audit import read
from federation.errors import Code, FednnunetError
from federation.flower.runner import Node
from federation.flower.transfer import Received
from federation.study import Study
from federation.tasks import Task, kinds_of, parse_task
from orchestrator.conductor import Conductor
from orchestrator.journal import Journal
from orchestrator.workshop import Workshop

POLL = 0.01
NEVER_ANSWERED = 99
"""Not one of Flower's error codes after which a task is sent again."""
Silent = Callable[[str, Task], bool]
Lie = Callable[[Task, str, Path], str]
"""What a hostile site makes of its answer: takes task, body and weights file, changes the file, returns the body."""


@dataclass(frozen=True)
class Envelope:
    """An answer that waits; stands in for federation.flower.transfer.Ready."""

    message_id: str
    reply_to: str
    site: str
    task: Task
    answered: bool


@dataclass(frozen=True)
class Outcome:
    """A study that has come to its end."""

    study: Study
    folder: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The journal."""
        return read(self.folder / "journal.jsonl")

    def events(self, name: str) -> list[dict[str, Any]]:
        """The journal's lines of one kind."""
        return [line for line in self.lines if line["event"] == name]

    @property
    def exported(self) -> dict[str, Any]:
        """The journal's line of the exported model."""
        (line,) = self.events("exported")
        return line

    @property
    def zip(self) -> Path:
        """The exported model."""
        return self.folder / str(self.exported["path"])

    @property
    def plans(self) -> dict[str, Any]:
        """The plans."""
        plans: dict[str, Any] = files.read_json(self.folder / "plan.json")["plans"]
        return plans

    def weights(self, number: int, fold: str | None = None) -> Path:
        """Global weights after a round; the journal keeps the last two."""
        return self.folder / "rounds" / f"fold_{fold or self.study.folds[0]}" / f"{number:04d}" / "global.safetensors"

    def scores(self, site: str, fold: str | None = None) -> tasks.Validation:
        """What a site said of a fold's global weights."""
        return tasks.Validation.model_validate(
            self.exported["validation"][fold or self.study.folds[0]]["sites"][site]  # as `fednnunet` reads them
        )


@dataclass
class SimulatedNetwork:
    """A carrier (orchestrator.rounds.Carrier) that hands each task to the site's worker, in this thread."""

    workers: Mapping[str, Any]
    silent: Silent
    lie: Lie
    pushed: list[Task] = field(default_factory=list)
    _waiting: dict[str, Envelope] = field(default_factory=dict)

    def check(self) -> None:
        """The run is never over."""

    def nodes(self) -> dict[str, Node]:
        """Every site is online."""
        return {site: Node(number, True, "t0") for number, site in enumerate(self.workers)}

    def push(self, node: Node, group: str, body: str, weights: Any, ttl: float) -> str:
        """Lay the task into the site's spool and let the worker do it; a silent site never sees it."""
        task = parse_task(body)
        assert task.kind in kinds_of(task.study), "a hospital's link would refuse it"
        site = list(self.workers)[node.node_id]
        message_id = f"m{len(self.pushed)}"
        self.pushed.append(task)
        silent = self.silent(site, task)
        if not silent:
            self._deliver(self.workers[site], task, weights)
        self._waiting[message_id] = Envelope(f"r{message_id}", message_id, site, task, not silent)
        return message_id

    @staticmethod
    def _deliver(worker: Any, task: Task, weights: Any) -> None:
        arrived = None
        if weights is not None:
            arrived = worker.spool.root / "arriving.safetensors"
            with open(arrived, "wb") as stream:
                for _, chunk in weights._chunks:
                    stream.write(get_object_body(chunk.deflate(), ArrayChunk))
        worker.spool.put_task(task, arrived)
        for waiting in worker.spool.waiting():
            assert worker.handle(waiting), "the device is lost"

    def ready(self, message_ids: list[str]) -> list[Any]:
        """Each answer once."""
        return [self._waiting.pop(message_id) for message_id in message_ids if message_id in self._waiting]

    def take(self, ready: Any, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
        """Copy an answer out of the site's outbox."""
        assert isinstance(ready, Envelope)
        if not ready.answered:
            return Received("", False, NEVER_ANSWERED, "no answer (simulated)")
        spool: Spool = self.workers[ready.site].spool
        parcel = spool.result_parcel(ready.task)
        if parcel.weights is not None:
            if parcel.weights.stat().st_size > max_weights:
                raise FednnunetError(Code.WEIGHTS_DAMAGED, f"more than {max_weights} bytes")
            weights.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(parcel.weights, weights)
        body = self.lie(ready.task, parcel.body.read_text(encoding="utf-8"), weights)
        return Received(body, parcel.weights is not None)

    def withdraw(self, message_id: str) -> None:
        """Forget a task that nobody has answered."""
        self._waiting.pop(message_id, None)


@functools.cache
def warm_workshop() -> Workshop:
    """The real workshop, from study to study: its imports take five seconds."""
    workshop = Workshop()
    atexit.register(workshop.close)
    return workshop


def _answers(site: str, task: Task) -> bool:
    return False


def _honest(task: Task, body: str, weights: Path) -> str:
    return body


class Federation:
    """Sites that stay from study to study, and an orchestrator.

    Parameters
    ----------
    folder : Path
        Everything is written below it: `orchestrator` and `sites/NAME`.
    sites : Mapping[str, Path]
        Dataset folder of each site, by its name.
    **settings
        Other values for the sites' settings (appliance.settings.Settings).
    """

    def __init__(self, folder: Path, sites: Mapping[str, Path], **settings: Any) -> None:
        from appliance.worker.loop import Worker

        self.folder = folder
        self.pretrained = folder / "orchestrator" / "pretrained"
        self.settings = {name: _settings(name, data, folder / "sites" / name, settings) for name, data in sites.items()}
        warm_workshop().open()
        with _environment(self.settings.values()):  # some of it is read by nnU-Net when it is imported
            self.workers = {name: Worker(site, threading.Event()) for name, site in self.settings.items()}

    def run(self, study: Study, silent: Silent = _answers, lie: Lie = _honest) -> Outcome:
        """Conduct a study to its end; raises what it fails with.

        Parameters
        ----------
        study : Study
            Its sites are among the federation's. Run a second time, it goes on from where its journal stands.
        silent : callable
            ``silent(site, task)``: True where a site does not answer this task. Flower is simulated to say so at
            once, instead of at the deadline.
        lie : callable
            What becomes of each answer before the orchestrator sees it.
        """
        journal = Journal(self.study_folder(study), study)
        try:
            with _environment(self.settings.values()):
                network = SimulatedNetwork(self.workers, silent, lie)
                Conductor(network, journal, self.pretrained, Unsigned(), warm_workshop(), POLL).conduct()
        finally:
            journal.close()
        return Outcome(study, journal.folder)

    def study_folder(self, study: Study) -> Path:
        """The orchestrator's folder of a study."""
        return self.folder / "orchestrator" / "studies" / study.id

    def journal_lines(self, study: Study) -> list[dict[str, Any]]:
        """The journal of a study, also of one that failed."""
        return read(self.study_folder(study) / "journal.jsonl")

    def zip(self, study: Study) -> Path:
        """The exported model of a finished study."""
        return Outcome(study, self.study_folder(study)).zip

    def site_work(self, site: str) -> Path:
        """The folder of a site's worker."""
        return self.settings[site].work

    def model_at_site(self, site: str, study: Study) -> Path:
        """The native model that a site has of a finished study."""
        (folder,) = (self.site_work(site) / study.id / "nnUNet_results" / study.dataset).iterdir()
        return folder


def _settings(name: str, data: Path, state: Path, changes: Mapping[str, Any]) -> Settings:
    """A site on a CPU with one thread and no loader processes: exact arithmetic."""
    values: dict[str, Any] = {
        "name": name,
        "orchestrator": "localhost:1",
        "data": data,
        "state": state,
        "device": "cpu",
        "preprocessing_processes": 1,
        "fingerprint_processes": 1,
        "augmentation_processes": 0,
        "threads": 1,
        "poll": POLL,
    }
    return Settings(**{**values, **changes})


@contextmanager
def _environment(sites: Any) -> Iterator[None]:
    """The variables of the sites' workers; `Workspace.enter` points nnU-Net at one site's folders, task by task."""
    from appliance.worker.__main__ import environment

    before = dict(os.environ)
    for settings in sites:
        os.environ.update(environment(settings))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def predict(archive: Path, images: Path, out: Path, folds: Sequence[str] = ("all",)) -> list[Path]:
    """Predict a folder of images with an exported model, by nnU-Net's own predictor as it comes; the files it wrote.

    The zip is unpacked below `out`. Several folds are an ensemble: nnU-Net averages what they say.
    """
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    installed, written = out / "installed", out / "predictions"
    with zipfile.ZipFile(archive) as content:
        content.extractall(installed)
    (model,) = installed.glob("Dataset*/*")
    ending = files.read_json(model / "dataset.json")["file_ending"]
    _let_torchvision_load()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), tuple(folds))
    written.mkdir(parents=True)
    cases: dict[str, list[str]] = {}
    for path in sorted(images.glob(f"*{ending}")):
        cases.setdefault(path.name.removesuffix(ending)[:-5], []).append(str(path))
    predictor.predict_from_files_sequential(list(cases.values()), [str(written / name) for name in cases])
    return sorted(written.glob(f"*{ending}"))


def _let_torchvision_load() -> None:
    """nnU-Net looks a trainer up by importing all of them, and some need torchvision.

    A torchvision that was built for another torch than the CPU's (the one on PyPI) lacks its compiled operators and
    cannot be imported before they are declared. None of them is ever called here.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
    except ImportError:
        pass


_kept: list[Any] = []
