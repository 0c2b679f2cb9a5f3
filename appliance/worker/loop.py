"""The worker's loop: a task from the inbox, its answer to the outbox, one at a time.

Rules:

- Every task ends in an answer, but for one that is cancelled or cut short by the worker's end: it has none, and is
  done from its beginning when it is met again.
- A failure is an answer too: numbers of the catalogue and counts. Its traceback lies at the site, in
  `work/STUDY/log`, and goes to stderr.
- A device that is lost to the process (a CUDA error that is not about memory) ends the process, after the answer.
- A task that has killed so many workers in a row (the kernel does, when memory runs out) is answered with FNU-412,
  instead of killing the next one for ever. `work/lives.json` counts.
- The trainer lives from round to round. It ends with its fold, with a failure, when another fold is asked for, and
  when no study runs any more: a device is held for nobody.
- While nothing is asked, the worker imports what training needs, and after Prepare it starts the first fold's
  trainer, so that round 1 does not wait for that.
- With the last Finish it writes the site's own report, which stays here.
- `work/status.json` says what the worker is doing, for people and for the supervisor.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from appliance import devices
from appliance.settings import Settings
from appliance.spool import Spool
from appliance.worker import dataset
from appliance.worker.workspace import Control, Interrupted, Workspace
from federation import files, logs, tasks, weights
from federation.errors import Code, FednnunetError
from federation.processes import settle

if TYPE_CHECKING:
    from appliance.worker.training import FoldTrainer

log = logging.getLogger("fednnunet.worker")

FAILED = {
    tasks.Kind.PREPARE: Code.PREPROCESSING_FAILED,
    tasks.Kind.TRAIN: Code.TRAINING_FAILED,
    tasks.Kind.VALIDATE: Code.VALIDATION_FAILED,
    tasks.Kind.COMPARE: Code.TRAINING_FAILED,
}
RETRY = {Code.BASE_MISSING, Code.WEIGHTS_DAMAGED}
PAUSE = 5.0
"""Seconds before a worker that cannot write its answer tries again."""
LOST: list[object] = []
"""What a lost device has touched, until the process ends: torch aborts the process where such a tensor is freed."""
LIVES = 3
"""Workers that may die at one attempt at a task."""
Answer = tuple[tasks.Result, Path | None]


class Status:
    """`status.json`: process, task, phase and since when; written at most once a second, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._task: str | None = None
        self._since = time.time()
        self._written = 0.0

    def task(self, key: str | None, phase: str) -> None:
        """Another task begins, or none."""
        self._task, self._since, self._written = key, time.time(), 0.0
        self.phase(phase)

    def phase(self, text: str) -> None:
        """What is being done."""
        now = time.monotonic()
        if now - self._written < 1.0:
            return
        self._written = now
        value = {"pid": os.getpid(), "task": self._task, "phase": text, "since": self._since, "at": time.time()}
        temporary = self._path.with_name(".status.json.new")
        try:
            temporary.write_bytes(files.canonical_json(value))
            os.replace(temporary, self._path)
        except OSError:  # a full disk shows where it matters
            temporary.unlink(missing_ok=True)


class Worker:
    """One site's worker.

    Parameters
    ----------
    settings : Settings
        The site's settings.
    stop : threading.Event
        Set when the worker has to end.
    """

    def __init__(self, settings: Settings, stop: threading.Event) -> None:
        self.settings = settings
        self.stop = stop
        self.spool = Spool(settings.spool)
        settings.work.mkdir(parents=True, exist_ok=True)
        self.status = Status(settings.work / "status.json")
        self.trainer: FoldTrainer | None = None
        self.next: tuple[Workspace, str, str] | None = None
        self._imported = False

    def run(self) -> int:
        """Work until asked to end; returns the exit status: 0, or 1 when only a new process can go on."""
        self.status.task(None, "waiting")
        self._sweep()
        while not self.stop.is_set():
            waiting = self.spool.waiting()
            if not waiting:
                self._use_the_time()
                self.stop.wait(self.settings.poll)
            elif not self.handle(waiting[0]):
                return 1
        return 0

    def _sweep(self) -> None:
        """Take away what a killed worker had half written."""
        shutil.rmtree(self.outgoing, ignore_errors=True)
        for root in (self.settings.work, self.spool.outbox):
            for pattern in files.UNFINISHED:
                for path in list(root.rglob(pattern)):
                    if path.is_dir() and not path.is_symlink():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)

    @property
    def outgoing(self) -> Path:
        """Where updates are written, on the spool's file system, before they are moved to the outbox."""
        return self.spool.root / "outgoing"

    def handle(self, task: tasks.Task) -> bool:
        """Do one task and lay its answer into the outbox; False when the device is lost to this process."""
        with logs.about(**task.subject):
            return self._do(task)

    def _do(self, task: tasks.Task) -> bool:
        began = time.monotonic()
        self.status.task(task.key, "starting")
        log.info("begins, attempt %d", task.attempt)
        usable = True
        try:
            self._count_lives(task)
            result, update = self._answer(task, self._control(task))
        except Interrupted:
            self._lived()
            if not self.stop.is_set():  # cancelled: whatever asks next finds the state of the round before
                self._close()
            self.status.task(None, "waiting")
            log.info("stopped after %.1f s", time.monotonic() - began)
            return True
        except Exception as error:  # noqa: BLE001 - every failure is an answer, and is logged
            usable = not self._after_failure(error, task)
            result, update = tasks.Result.answering(task, failure=self._failure(error, task)), None
        try:
            self.spool.put_result(task, result, update)
            log.info(
                "%s after %.1f s", result.failure.describe() if result.failure else "done", time.monotonic() - began
            )
            if result.failure is None:
                self._forget_what_no_task_needs(task)
        except FednnunetError as error:
            self._report(error, task)
            self.stop.wait(PAUSE)
        self._lived()
        self.status.task(None, "waiting")
        return usable

    @property
    def _lives(self) -> Path:
        return self.settings.work / "lives.json"

    def _lived(self) -> None:
        with contextlib.suppress(OSError):
            self._lives.unlink(missing_ok=True)

    def _count_lives(self, task: tasks.Task) -> None:
        """One more worker begins this attempt at a task; raises FNU-412 when too many have died at it."""
        name = f"{task.study.id} {task.key} {task.attempt}"
        try:
            known = files.read_json(self._lives)
        except (OSError, ValueError):
            known = {}
        lives = known["lives"] + 1 if known.get("task") == name else 1
        if lives > LIVES:
            raise FednnunetError(Code.WORKER_DIED, f"{task.key}: {LIVES} workers have died at it")
        with contextlib.suppress(FednnunetError):  # a full disk shows where it matters
            files.write_json(self._lives, {"task": name, "lives": lives})

    def _forget_what_no_task_needs(self, task: tasks.Task) -> None:
        """After an answer lies in the outbox: its weights, and after Finish the state of the fold.

        Not before: Finish that is cut short is done again, and needs the layers that are this site's own.
        """
        if (sent := self.spool.task_parcel(task).weights) is not None:
            sent.unlink(missing_ok=True)
        if task.kind is tasks.Kind.FINISH and task.fold is not None:
            workspace = Workspace(self.settings.work, task.study)
            for folder in (workspace.state(task.fold), workspace.globals(task.fold)):
                shutil.rmtree(folder, ignore_errors=True)

    # the tasks

    def _answer(self, task: tasks.Task, control: Control) -> Answer:
        if task.site != self.settings.name:
            raise FednnunetError(Code.TASK_REFUSED, f"for {task.site}, this is {self.settings.name}")
        if task.fold is not None and task.fold not in task.study.folds:
            raise FednnunetError(Code.ENVELOPE_INVALID, f"fold {task.fold}")
        workspace = Workspace(self.settings.work, task.study)
        workspace.enter()
        if task.kind is tasks.Kind.DESCRIBE:
            return self._describe(task, workspace, control), None
        if task.kind is tasks.Kind.FINGERPRINT:
            return self._fingerprint(task, workspace, control), None
        if task.kind is tasks.Kind.PREPARE:
            return self._prepare(task, workspace, control), None
        assert task.fold is not None  # tasks.Task sees to it
        if task.kind is tasks.Kind.TRAIN:
            return self._train(task, task.fold, workspace, control)
        if task.kind is tasks.Kind.VALIDATE:
            return self._validate(task, task.fold, workspace, control), None
        if task.kind is tasks.Kind.COMPARE:
            return self._compare(task, task.fold, workspace, control), None
        return self._finish(task, task.fold, workspace, control), None

    def _examine(self, task: tasks.Task, workspace: Workspace, control: Control) -> dataset.Examination:
        """The site's dataset, read once for each state of its files and each contract, whichever study asks."""

        def progress(done: int, cases: int) -> None:
            control.check()
            control.phase(f"reading case {done} of {cases}")

        folder = dataset.find_dataset(self.settings.data)
        return dataset.examine_once(
            folder,
            task.study,
            self.settings.fingerprint_processes,
            workspace.examination,
            progress,
            workspace.other_examinations(),
        )

    def _describe(self, task: tasks.Task, workspace: Workspace, control: Control) -> tasks.Result:
        examination = self._examine(task, workspace, control)
        if not examination.good:
            print(examination.report(), file=sys.stderr, flush=True)
            return tasks.Result.answering(task, failure=examination.failure())
        description = examination.description()
        if (bundle := self.spool.announced()) is not None:
            versions = {**description.versions, "bundle": bundle}
            description = description.model_copy(update={"versions": versions})
        return tasks.Result.answering(task, description=description)

    def _fingerprint(self, task: tasks.Task, workspace: Workspace, control: Control) -> tasks.Result:
        examination = self._examine(task, workspace, control)
        fingerprint = examination.fingerprint(task.study.fingerprint_min_cases)
        return tasks.Result.answering(task, fingerprint=fingerprint)

    def _prepare(self, task: tasks.Task, workspace: Workspace, control: Control) -> tasks.Result:
        from appliance.worker import preparation

        examination = self._examine(task, workspace, control)
        report = preparation.prepare(task, self.settings, workspace, examination, control)
        if task.study.stop_after == "finish":
            self.next = (workspace, task.study.folds[0], report.plans_sha256)
        return tasks.Result.answering(task, preparation=report)

    def _train(self, task: tasks.Task, fold: str, workspace: Workspace, control: Control) -> Answer:
        assert task.round is not None  # tasks.Task sees to it
        if task.round > task.study.rounds:
            raise FednnunetError(Code.ENVELOPE_INVALID, f"round {task.round}")
        global_weights, digest = self._weights(task, fold, workspace)
        trainer = self._open(task, fold, workspace, control)
        if trainer.round != trainer.newest_state(task.round):
            if trainer.round != 0:
                self._close()
                trainer = self._open(task, fold, workspace, control)
            trainer.resume(task.round)
        self.outgoing.mkdir(exist_ok=True)
        update = self.outgoing / f"{task.study.id[:16]}-{task.key}.safetensors"
        training, header = trainer.train(task.round, global_weights, digest, update, control)
        return tasks.Result.answering(task, training=training, weights=header), update

    def _validate(self, task: tasks.Task, fold: str, workspace: Workspace, control: Control) -> tasks.Result:
        from appliance.worker import validation

        global_weights, _ = self._weights(task, fold, workspace)
        trainer = self._at_the_end(task, fold, workspace, control)
        cases = self._examine(task, workspace, control).test_cases
        report = validation.validate(trainer, global_weights, cases, control)
        return tasks.Result.answering(task, validation=report)

    def _finish(self, task: tasks.Task, fold: str, workspace: Workspace, control: Control) -> tasks.Result:
        from appliance.worker import validation

        global_weights, digest = self._weights(task, fold, workspace)
        trainer = self._at_the_end(task, fold, workspace, control)
        validation.finish(trainer, global_weights, control)
        self._close()
        if fold == task.study.folds[-1]:
            self._write_report(task, control)
        return tasks.Result.answering(task, finished=tasks.Finished(model_sha256=digest))

    def _compare(self, task: tasks.Task, fold: str, workspace: Workspace, control: Control) -> tasks.Result:
        from appliance.worker import comparison

        self._close()
        cases = self._examine(task, workspace, control).test_cases
        report = comparison.compare(workspace, self.settings, fold, task.plans_sha256, cases, control)
        if fold == task.study.folds[-1]:
            self._write_report(task, control)
        return tasks.Result.answering(task, comparison=report)

    def _write_report(self, task: tasks.Task, control: Control) -> None:
        """The site's own report; one that cannot be written changes nothing (`appliance report` writes it again)."""
        from appliance.worker import site_report

        control.phase("writing the report")
        try:
            site_report.write(self.spool, self.settings.work, task.study.id)
        except Exception as error:  # noqa: BLE001 - the model is what the study is for
            self._report(error, task)

    # the trainer

    def _weights(self, task: tasks.Task, fold: str, workspace: Workspace) -> tuple[Path, str]:
        """The global weights of a task, kept for later differences, and their digest."""
        from appliance.worker import training

        sent = self.spool.task_parcel(task).weights
        if task.weights is None:
            raise FednnunetError(Code.WEIGHTS_DAMAGED, f"{task.key} came without weights")
        folder, digest = workspace.globals(fold), task.weights.digest
        folder.mkdir(parents=True, exist_ok=True)

        def base(wanted: str) -> Path | None:
            path = folder / f"{wanted}.safetensors"
            return path if path.exists() else None

        opened = weights.open_weights(task.weights, sent, base, folder / f"{digest}.safetensors")
        return training.keep_globals(folder, digest, opened), digest

    def _open(self, task: tasks.Task, fold: str, workspace: Workspace, control: Control) -> FoldTrainer:
        """The trainer of a fold: the warm one, or a new one."""
        from appliance.worker.training import FoldTrainer

        wanted = (task.study.id, fold, task.plans_sha256)
        if self.trainer is not None:
            if (self.trainer.study.id, self.trainer.fold, self.trainer.plans_sha256) == wanted:
                return self.trainer
            self._close()
        control.phase("building the trainer")
        self.trainer = FoldTrainer(workspace, self.settings, fold, task.plans_sha256)
        return self.trainer

    def _at_the_end(self, task: tasks.Task, fold: str, workspace: Workspace, control: Control) -> FoldTrainer:
        """The trainer of a fold as its last round here has left it."""
        if self.trainer is not None and self.trainer.round < 0:  # a round was cut short: nothing of it is sound
            self._close()
        trainer = self._open(task, fold, workspace, control)
        if trainer.round == 0:
            trainer.resume(task.study.rounds + 1)
        return trainer

    def _close(self) -> None:
        trainer, self.trainer = self.trainer, None
        if trainer is not None:
            trainer.close()

    def _use_the_time(self) -> None:
        """Do one thing that a later task would have to wait for."""
        if not self._imported:
            self._imported = True
            self.status.task(None, "loading nnU-Net")
            from appliance.worker import training, validation  # noqa: F401

            if self.trainer is None:  # a trainer must be found again when it is thrown away
                settle()
            self.status.task(None, "waiting")
        elif self.spool.take_release():
            self.next = None
            if self.trainer is not None:
                self._close()
        elif self.next is not None:
            (workspace, fold, plans_sha256), self.next = self.next, None
            self.status.task(None, "starting the trainer")
            try:
                from appliance.worker.training import FoldTrainer

                self._close()
                self.trainer = FoldTrainer(workspace, self.settings, fold, plans_sha256)
                self.trainer.start()
                self.trainer.start_seconds = 0.0
            except Exception as error:  # noqa: BLE001 - the first round meets it again, and answers with it
                self._report(error, None)
                self._close()
            self.status.task(None, "waiting")

    # failures

    def _control(self, task: tasks.Task) -> Control:
        def check() -> None:
            if self.stop.is_set() or self.spool.cancelled(task):
                raise Interrupted(task.key)

        return Control(check=check, phase=self.status.phase)

    def _failure(self, error: Exception, task: tasks.Task) -> tasks.Failure:
        """The failure that may leave the site."""
        code = FAILED.get(task.kind, Code.TASK_FAILED)
        if isinstance(error, FednnunetError):
            code = error.code
        elif files.says_disk(error):
            code = Code.DISK_FULL
        elif devices.is_out_of_memory(error):
            code = Code.OUT_OF_MEMORY
        return tasks.Failure(problems=[tasks.Count(code=code.number, count=1)], retry=code in RETRY)

    def _after_failure(self, error: Exception, task: tasks.Task) -> bool:
        """Keep the traceback, throw the trainer away; True when the device is lost to this process."""
        self._report(error, task)
        if devices.is_lost(error):
            LOST.extend((error, self.trainer))
            return True
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        with contextlib.suppress(Exception):  # loaders that are dead already
            self._close()
        if "torch" in sys.modules:
            from appliance.worker.training import release_memory

            release_memory()
        return False

    def _report(self, error: Exception, task: tasks.Task | None) -> None:
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr, flush=True)
        if task is None:
            return
        path = self.settings.work / task.study.id / "log" / f"{task.key}-attempt-{task.attempt}.txt"
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
