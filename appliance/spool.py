"""The spool: the wall between the link (network, no data) and the worker (data, no network).

Layout, under one folder::

    inbox/STUDY/KEY/task.json            what is asked       (written by the link)
    inbox/STUDY/KEY/weights.safetensors  the weights it carries, if any
    inbox/STUDY/KEY/cancel               "stop this"          (written by the link)
    release                              "free the device"    (written by the link, taken away by the worker)
    outbox/STUDY/KEY/result.json         the answer           (written by the worker)
    outbox/STUDY/KEY/weights.safetensors the update, if any

Rules:

- A folder appears whole, by one rename, or not at all.
- KEY names the task (federation.tasks.Task.key): the same task lies there once, whoever asked and how often.
- A task with an answer in the outbox is done. Only a failed answer to an earlier attempt is taken away and done again.
- What this version does not understand, of a later one that was here before, is no task and no answer. A study that is
  under way is asked for again under the same KEY: what is asked now takes its place.
- Whatever leaves the hospital lay in the outbox first.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from federation import files, tasks
from federation.errors import FednnunetError

log = logging.getLogger("fednnunet.spool")

WEIGHTS = "weights.safetensors"
RELEASE = "release"
Body = TypeVar("Body", tasks.Task, tasks.Result)


@dataclass(frozen=True)
class Parcel:
    """A task or an answer as it lies in the spool: its body and, perhaps, a weights file."""

    folder: Path
    body: Path

    @property
    def weights(self) -> Path | None:
        """The weights file, or None."""
        path = self.folder / WEIGHTS
        return path if path.exists() else None


def unanswered(root: Path) -> Iterator[Path]:
    """The bodies of tasks below a spool that have no answer and are not cancelled, in no order."""
    for body in (root / "inbox").glob("*/*/task.json"):
        folder = body.parent
        if folder.name.startswith(".") or (folder / "cancel").exists():
            continue
        if not (root / "outbox" / folder.parent.name / folder.name / "result.json").exists():
            yield body


class Spool:
    """The two boxes below `root`; the link and the worker each hold one of these."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inbox = root / "inbox"
        self.outbox = root / "outbox"
        self._left = set[Path]()
        with files.disk_errors(root):
            self.inbox.mkdir(parents=True, exist_ok=True)
            self.outbox.mkdir(parents=True, exist_ok=True)

    # the link's side

    def announce(self, bundle: str) -> None:
        """Tell the worker which app bundle the link accepts, for the site's answer to Describe."""
        files.write_bytes(self.root / "bundle", bundle.encode())

    def put_task(self, task: tasks.Task, weights: Path | None) -> None:
        """Lay a task into the inbox, unless the same task lies there already.

        An answer is taken away, so that the worker does the task again, when it is a failure of an earlier attempt,
        when its weights have been freed since, or when this version does not understand it. The weights file is moved,
        not copied: it must lie on the same file system.
        """
        folder, answer = self._folder(self.inbox, task), self.result_parcel(task)
        lay_there = answer.body.exists()  # asked before it is read: the worker may answer at any time
        answered = self.result(task)
        if answered is not None:
            failed_before = answered.failure is not None and answered.attempt < task.attempt
            freed = answered.weights is not None and answer.weights is None
            if not failed_before and not freed:
                return
            files.remove_directory(answer.folder)
        else:
            if lay_there:
                files.remove_directory(answer.folder)  # with it the worker would take the task for done
            there = self._understood(folder / "task.json", tasks.parse_task)
            same_form = (weights is None) == (self.task_parcel(task).weights is None)
            if there is not None and there.attempt >= task.attempt and same_form:
                (folder / "cancel").unlink(missing_ok=True)
                return
        with files.new_directory(folder) as new:
            (new / "task.json").write_bytes(task.model_dump_json(indent=1).encode())
            if weights is not None:
                os.replace(weights, new / WEIGHTS)

    def cancel(self, task: tasks.Task) -> None:
        """Ask the worker to stop this task soon; it stays in the inbox, unanswered."""
        folder = self._folder(self.inbox, task)
        if folder.exists():
            with contextlib.suppress(FileNotFoundError):
                (folder / "cancel").touch()

    def release(self) -> None:
        """Tell the worker that no study runs now: it frees its device."""
        files.write_bytes(self.root / RELEASE, b"")

    def result(self, task: tasks.Task) -> tasks.Result | None:
        """The answer to a task, or None when there is none yet that this version understands."""
        return self._understood(self.result_parcel(task).body, tasks.parse_result)

    def result_parcel(self, task: tasks.Task) -> Parcel:
        """Where the answer lies."""
        folder = self._folder(self.outbox, task)
        return Parcel(folder, folder / "result.json")

    # the worker's side

    def waiting(self) -> list[tasks.Task]:
        """Tasks without an answer that are not cancelled, oldest first.

        One that this version does not understand is left where it lies: it holds up no other.
        """
        found = []
        for body in unanswered(self.root):
            with contextlib.suppress(FileNotFoundError):
                since = body.stat().st_mtime_ns
                if (task := self._understood(body, tasks.parse_task)) is not None:
                    found.append((since, task))
        return [task for _, task in sorted(found, key=lambda item: (item[0], item[1].key))]

    def take_release(self) -> bool:
        """Whether the link has said since the last call that no study runs."""
        try:
            (self.root / RELEASE).unlink()
        except FileNotFoundError:
            return False
        return True

    def task_parcel(self, task: tasks.Task) -> Parcel:
        """Where a task lies."""
        folder = self._folder(self.inbox, task)
        return Parcel(folder, folder / "task.json")

    def cancelled(self, task: tasks.Task) -> bool:
        """Whether the link has asked to stop this task."""
        return (self._folder(self.inbox, task) / "cancel").exists()

    def put_result(self, task: tasks.Task, result: tasks.Result, weights: Path | None = None) -> None:
        """Lay the answer into the outbox, whole; a weights file is moved there."""
        with files.new_directory(self._folder(self.outbox, task)) as new:
            (new / "result.json").write_bytes(result.model_dump_json(indent=1).encode())
            if weights is not None:
                os.replace(weights, new / WEIGHTS)

    def announced(self) -> str | None:
        """The app bundle that the link accepts; None before a link was here."""
        path = self.root / "bundle"
        return path.read_text(encoding="utf-8") if path.exists() else None

    # both

    def forget_rounds(self, study_id: str, fold: str, before: int) -> None:
        """Free the weights of a fold's rounds that nobody can ask for again; bodies stay as a record."""
        for box in (self.inbox, self.outbox):
            for path in (box / study_id).glob(f"train-fold_{fold}-*/{WEIGHTS}"):
                if int(path.parent.name.rpartition("-")[2]) < before:
                    path.unlink(missing_ok=True)

    def _understood(self, body: Path, parse: Callable[[bytes], Body]) -> Body | None:
        """A task or an answer; None where it is not there, or where this version does not understand it: named once."""
        try:
            return parse(body.read_bytes())
        except FileNotFoundError:
            return None
        except FednnunetError as error:
            if body not in self._left:
                self._left.add(body)
                log.warning("%s is left out: %s", body, error)
            return None

    def _folder(self, box: Path, task: tasks.Task) -> Path:
        return box / task.study.id / task.key
