"""Which answers may count: checked before a line of the journal speaks of them.

Rules:

- An answer names the task it answers, and the plans it was trained with.
- Cases are above zero and as many as the site declared when it prepared.
- An update has exactly the expected names, shapes and types; every number is finite; its distance from the global
  weights is plausible (`aggregation.max_update_ratio` times their norm).
- What fails is FNU-505 or FNU-507 with the reason; the caller puts it into quarantine and the round goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from federation.errors import Code, FednnunetError
from federation.files import sha256_of
from federation.plans import check_plans
from federation.tasks import Kind, Preparation, Result, Task
from federation.weights import TensorFile, difference_specs, exponents


@dataclass(frozen=True)
class Admitted:
    """What is known of an update that may count."""

    cases: int
    norm: float
    digest: str
    nbytes: int


def check_answer(task: Task, result: Result, has_weights: bool) -> None:
    """Refuse an answer that does not belong to the task, or lacks its report or its weights file; raises FNU-507.

    Parameters
    ----------
    task, result : Task, Result
        What was asked, and the answer.
    has_weights : bool
        Whether a weights file has come with it.
    """
    if not result.answers(task):
        raise FednnunetError(Code.RESULT_REFUSED, f"{task.site}: an answer to another task than {task.key}")
    if result.failure is not None:
        return
    report = {
        Kind.DESCRIBE: result.description,
        Kind.FINGERPRINT: result.fingerprint,
        Kind.PREPARE: result.preparation,
        Kind.TRAIN: result.training,
        Kind.VALIDATE: result.validation,
        Kind.FINISH: result.finished,
        Kind.COMPARE: result.comparison,
    }[task.kind]
    if report is None:
        raise FednnunetError(Code.RESULT_REFUSED, f"{task.site}: {task.key} was answered without its report")
    if (result.weights is not None) != (task.kind is Kind.TRAIN) or has_weights != (task.kind is Kind.TRAIN):
        raise FednnunetError(Code.RESULT_REFUSED, f"{task.site}: weights missing from or added to {task.key}")
    if result.preparation is not None:
        _check_preparation(task, result.preparation)
    scored = [result.validation] if result.validation is not None else []
    if result.comparison is not None:
        scored = [result.comparison.local, result.comparison.personalised]
    labels = set(task.study.label_keys)
    if any(not labels.issuperset((*report.validation, *report.test)) for report in scored):
        raise FednnunetError(Code.RESULT_REFUSED, f"{task.site}: {task.key} scores a label that the study lacks")


def _check_preparation(task: Task, answer: Preparation) -> None:
    """With FFE a site prepares for the plans it was given; with AsymFedAvg it tells the network of its own."""
    if set(answer.training_cases) != set(task.study.folds):
        raise FednnunetError(Code.RESULT_REFUSED, f"{task.site} declared its cases for other folds than the study's")
    if task.study.mode == "ffe":
        if answer.plans_sha256 != task.plans_sha256:
            raise FednnunetError(Code.RESULT_REFUSED, f"{task.site}: prepared for other plans")
        return
    if answer.network is None:
        raise FednnunetError(Code.RESULT_REFUSED, f"{task.site}: prepared without telling its network")
    try:
        check_plans(answer.network.plans(task.study), task.study)
    except FednnunetError as error:
        raise FednnunetError(Code.RESULT_REFUSED, f"{task.site}: {error}") from error


def admit(task: Task, result: Result, update: Path, base: Path, declared_cases: int) -> Admitted:
    """Check an update; raises FNU-505 with the reason.

    Parameters
    ----------
    task, result : Task, Result
        The round's task and the site's answer.
    update : Path
        The file that arrived.
    base : Path
        The global weights that the round started from (float32).
    declared_cases : int
        Training cases that the site declared when it prepared.
    """

    def refuse(why: str) -> FednnunetError:
        return FednnunetError(Code.UPDATE_REFUSED, f"{task.site}, {task.key}: {why}")

    training, header = result.training, result.weights
    if training is None or header is None:
        raise refuse("no report or no weights")
    if training.plans_sha256 != task.plans_sha256:
        raise refuse("trained with other plans")
    if training.cases != declared_cases or training.cases <= 0:
        raise refuse(f"{training.cases} cases, but {declared_cases} were declared")
    if training.epochs != task.study.epochs_per_round:
        raise refuse(f"{training.epochs} epochs instead of {task.study.epochs_per_round}")
    if not all(map(math.isfinite, (*training.train_loss, *training.val_loss))):
        raise refuse("the loss is not finite")
    digest = sha256_of(update)
    if header.file_sha256 != digest or header.nbytes != update.stat().st_size:
        raise refuse("the weights file is not the one that the answer describes")
    wire = task.study.wire
    if header.encoding != ("full" if wire == "full" else "difference"):
        raise refuse(f"encoding {header.encoding}, but the study says wire: {wire}")
    if wire != "full" and (task.weights is None or header.base != task.weights.digest):
        raise refuse("a difference to other weights than this round's")
    try:
        update_file, base_file = TensorFile(update), TensorFile(base)
    except FednnunetError as error:
        raise refuse(error.found) from error
    expected = base_file.specs if wire == "full" else difference_specs(base_file.specs, wire)
    if set(update_file.specs) != set(expected):
        extra, missing = set(update_file.specs) - set(expected), set(expected) - set(update_file.specs)
        raise refuse(f"{len(missing)} tensors missing, {len(extra)} unknown")
    for name in update_file.names:
        if update_file.spec(name) != expected[name]:
            raise refuse(f"tensor {name} has another shape or type")
    try:
        scales = {} if wire == "full" else exponents(update_file)
    except FednnunetError as error:
        raise refuse(error.found) from error
    distance = norm = 0.0
    for name in base_file.names:
        value, reference = update_file.read(name), base_file.read(name)
        if not np.issubdtype(reference.dtype, np.floating):
            continue
        if not np.isfinite(value).all():
            raise refuse(f"tensor {name} holds NaN or infinite numbers")
        if name.endswith("running_var") and (value < 0).any():
            raise refuse(f"tensor {name} holds a negative variance")
        flat = reference.reshape(-1)
        norm += float(np.dot(flat, flat))
        whole = value.dtype == reference.dtype
        moved = (value - reference if whole else np.ldexp(value.astype(np.float32), scales[name])).reshape(-1)
        with np.errstate(over="ignore"):
            distance += float(np.dot(moved, moved))
    ratio = task.study.aggregation.max_update_ratio
    if not math.sqrt(distance) <= ratio * max(math.sqrt(norm), 1e-6):
        raise refuse(
            f"its distance from the global weights, {math.sqrt(distance):.3g}, is more than {ratio:g} times their "
            f"norm, {math.sqrt(norm):.3g}"
        )
    return Admitted(training.cases, math.sqrt(distance), digest, header.nbytes)
