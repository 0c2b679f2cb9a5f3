"""Which tasks the link believes: signed by the coordinator, new, for this site, and not of the past.

Rules:

- A task's signature must fit one of the keys in `coordinator.pub`, which came with the invitation.
- A task that is sent again is signed again, with another nonce. A nonce that was met before is a replay (FNU-621).
- Rounds of a fold only go forward: a task of an earlier round than the newest is of the past (FNU-621), whoever kept it
  back. What follows the training of a fold ends it: a round after that would be trained, and would leave, once more.
- After the orchestrator was restored from a backup a person here lets the study go back, once (`appliance rewind`).
- What arrived and what was decided is a line of the hash chain `arrivals.jsonl`, on the disk before the task goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from federation import files, keypairs, signing
from federation.audit import Chain
from federation.errors import Code, FednnunetError
from federation.tasks import Kind, Task, parse_task

COORDINATOR = "coordinator"
TRAINED = 1_000_000
"""Stands for a round behind every round: the fold's training is over."""


class Trust:
    """The link's judgement of what arrives.

    Parameters
    ----------
    site : str
        This site's name.
    keys : sequence of keypairs.PublicKey
        The coordinator's.
    arrivals : Path
        The chain of what arrived.
    """

    def __init__(self, site: str, keys: Sequence[keypairs.PublicKey], arrivals: Path) -> None:
        self._site, self._keys = site, keys
        self._chain = Chain(arrivals)
        self._nonces: set[str] = set()
        self._newest: dict[tuple[str, str], int] = {}
        for line in self._chain:
            if line["event"] == "rewound":
                self._newest = {key: number for key, number in self._newest.items() if key[0] != line["study"]}
            if line["event"] == "accepted":
                self._nonces.add(line["nonce"])
                self._remember(line["study"], line["fold"], line["round"])

    def open(self, text: str) -> tuple[Task, str]:
        """The task in a message, and the nonce that its answer must name; raises FNU-602, 605, 620 or 621."""
        try:
            opened = signing.open_message(text, "task", COORDINATOR, self._keys)
            task = parse_task(opened.body)
            if task.site != self._site:
                raise FednnunetError(Code.TASK_REFUSED, f"a task for {task.site} reached {self._site}")
            self._check_new(task, opened.nonce)
        except FednnunetError as error:
            self._chain.append("refused", number=error.code.number, found=error.found[:500])
            raise
        self._chain.append(
            "accepted",
            study=task.study.id,
            kind=str(task.kind),
            fold=task.fold,
            round=task.round,
            attempt=task.attempt,
            nonce=opened.nonce,
            body_sha256=hashlib.sha256(opened.body.encode()).hexdigest(),
            weights_sha256=task.weights.file_sha256 if task.weights else None,
        )
        self._nonces.add(opened.nonce)
        self._remember(task.study.id, task.fold, task.round)
        return task, opened.nonce

    def refuse(self, task: Task, error: FednnunetError) -> None:
        """Write down that a believed task was refused all the same (by the site's policy)."""
        self._chain.append(
            "refused", number=error.code.number, found=error.found[:500], study=task.study.id, kind=str(task.kind)
        )

    def _check_new(self, task: Task, nonce: str) -> None:
        if nonce in self._nonces:
            raise FednnunetError(Code.TASK_REPLAYED, f"{task.key} with a nonce that was used")
        newest = self._newest.get((task.study.id, task.fold or ""), 0)
        if task.kind is Kind.TRAIN and task.round is not None and task.round < newest:
            if self._rewound(task.study.id):
                return
            after = "its training" if newest == TRAINED else f"round {newest}"
            raise FednnunetError(Code.TASK_REPLAYED, f"round {task.round} of fold {task.fold}, after {after}")

    def _rewound(self, study: str) -> bool:
        """Whether a person here has allowed the study to go back; it holds for once."""
        allowed = _rewind_file(self._chain.path, study)
        if not allowed.exists():
            return False
        self._chain.append("rewound", study=study)
        self._newest = {key: number for key, number in self._newest.items() if key[0] != study}
        allowed.unlink()
        return True

    def _remember(self, study: str, fold: str | None, number: int | None) -> None:
        if fold is not None:  # without a round it is a task that follows the training
            newest = TRAINED if number is None else number
            self._newest[study, fold] = max(self._newest.get((study, fold), 0), newest)


def allow_rewind(arrivals: Path, study: str) -> None:
    """Let a study go back to an earlier round, once."""
    files.write_bytes(_rewind_file(arrivals, study), b"")


def _rewind_file(arrivals: Path, study: str) -> Path:
    return arrivals.parent / "rewind" / study
