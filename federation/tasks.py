"""What the orchestrator may ask of a site, and what a site may answer.

Rules:

- A task is keyed by (study, kind, fold, round). Asked twice, it is answered from the outbox, not done twice;
  only a failed answer to an earlier `attempt` is done again. Train has a fold and a round, what follows it a fold, what
  goes before neither: a study asks each of its questions once, under one key.
- An answer holds sums, counts and weights. No case name, no path, no traceback: a failure is a number of the
  catalogue and a count.
- Bodies are JSON. Weights travel as one safetensors file next to the body, described by `Weights`.
- Every number of an answer has bounds, within which no sum of the answers of all sites can overflow, and every text is
  short and printable: a site's words reach the coordinator's terminal.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from federation.errors import Code, FednnunetError
from federation.fingerprint import SiteFingerprint
from federation.study import MOST_LETTERS, SiteName, Study

PROTOCOL = 1
TrainedFold = Literal["0", "1", "2", "3", "4", "all"]
"""A fold as it is trained; it becomes part of a folder's name."""
Cases = Annotated[int, Field(ge=1, le=1_000_000)]
"""Training cases that a site may claim: they are its weight in the mean, so a claim beyond all reason is no answer."""
Counted = Annotated[int, Field(ge=0, le=1_000_000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Dice = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=-1e30, le=1e30)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]


def _is_printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("holds what cannot be printed")
    return text


Text = Annotated[str, Field(max_length=MOST_LETTERS), AfterValidator(_is_printable)]
"""What a site says in words, such as the name of its GPU."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Kind(StrEnum):
    """The tasks, in the order of a study."""

    DESCRIBE = "describe"
    FINGERPRINT = "fingerprint"
    PREPARE = "prepare"
    TRAIN = "train"
    VALIDATE = "validate"
    FINISH = "finish"
    COMPARE = "compare"


OF_A_FOLD = frozenset({Kind.TRAIN, Kind.VALIDATE, Kind.FINISH, Kind.COMPARE})


def kinds_of(study: Study) -> frozenset[Kind]:
    """The tasks that a study consists of: a hospital that has approved it is asked for nothing else."""
    if study.stop_after == "describe":
        return frozenset({Kind.DESCRIBE})
    found = {Kind.DESCRIBE, Kind.FINGERPRINT if study.mode == "ffe" else Kind.PREPARE}
    if study.stop_after in ("prepare", "finish"):
        found.add(Kind.PREPARE)
    if study.stop_after == "finish":
        found |= {Kind.TRAIN, Kind.VALIDATE, Kind.FINISH}
        if study.compare == "local":
            found.add(Kind.COMPARE)
    return frozenset(found)


class Weights(_Body):
    """Describes the safetensors file that travels next to a task or an answer.

    `encoding` "full": the file holds the weights themselves, float32.
    `encoding` "difference": the file holds differences to the weights whose digest is `base`, in fewer bits
    (see federation.weights); `digest` is that of the float32 weights that come out.
    `encoding` "held": no file travels, the receiver has the weights `digest` already.
    """

    encoding: Literal["full", "difference", "held"]
    file_sha256: Sha256 | None = Field(None, description="SHA-256 of the file that travels.")
    nbytes: int = Field(ge=0, description="Size of the file that travels, in bytes.")
    digest: Sha256 = Field(description="SHA-256 of the float32 file that comes out of it.")
    base: Sha256 | None = Field(None, description="Digest of the float32 weights that a difference refers to.")


class Plan(_Body):
    """What Prepare carries (FFE), or a site makes for itself (AsymFedAvg): nnU-Net's plans and their dataset.json."""

    plans: dict[str, Any]
    plans_sha256: Sha256 = Field(description="SHA-256 of the canonical JSON of `plans`; checked at every site.")
    dataset_json: dict[str, Any]


class Task(_Body):
    """One thing asked of one site."""

    protocol: int = PROTOCOL
    study: Study
    site: SiteName
    kind: Kind
    fold: TrainedFold | None = None
    round: int | None = Field(None, ge=1, le=999_999, description="Round of training, from 1.")
    attempt: int = Field(1, ge=1)
    plan: Plan | None = None
    plans_sha256: Sha256 | None = Field(None, description="The plans that train, validate and finish refer to.")
    weights: Weights | None = None

    @model_validator(mode="after")
    def _has_one_key(self) -> Task:
        if (self.fold is not None) != (self.kind in OF_A_FOLD):
            raise ValueError(f"{self.kind} with fold {self.fold}")
        if (self.round is not None) != (self.kind is Kind.TRAIN):
            raise ValueError(f"{self.kind} with round {self.round}")
        return self

    @property
    def key(self) -> str:
        """Name of this task within its study, also a folder name: `train-fold_0-0007`."""
        parts = [str(self.kind)]
        if self.fold is not None:
            parts.append(f"fold_{self.fold}")
        if self.round is not None:
            parts.append(f"{self.round:04d}")
        return "-".join(parts)

    @property
    def subject(self) -> dict[str, str | int | None]:
        """What a line of the log about this task is about (federation.logs.about)."""
        study = self.study.id[:12]
        return {"study": study, "site": self.site, "task": self.key, "fold": self.fold, "round": self.round}


class Count(_Body):
    """How often a site met one code of the catalogue (2xx): no file name leaves."""

    code: int = Field(ge=100, le=999)
    count: int = Field(ge=1, le=10**12)


class Description(_Body):
    """Answer to Describe: the dataset is complete and fits the contract."""

    training_cases: Cases
    test_cases: Counted = Field(description="Cases of imagesTs with a label in labelsTs, for scoring alone.")
    warnings: list[Count] = Field([], max_length=100)
    versions: dict[Text, Text] = Field(
        default_factory=dict, max_length=100, description="Versions of the packages that matter."
    )


class Network(_Body):
    """What a site that plans for itself tells of its plan (AsymFedAvg): its network, and what people compare.

    The plan itself, with its intensities and median shapes, stays at the site, and so does the fingerprint.
    """

    plans_name: Text
    architecture: dict[str, Any] = Field(description="nnU-Net's `architecture`: the network's class and arguments.")
    patch_size: list[Annotated[int, Field(ge=1, le=100_000)]] = Field(min_length=2, max_length=3)
    spacing: list[Annotated[float, Field(gt=0, le=1e6)]] = Field(max_length=3, description="Target spacing in mm.")
    batch_size: int = Field(ge=1, le=100_000)

    def plans(self, study: Study) -> dict[str, Any]:
        """As much of nnU-Net's plans as building the network takes."""
        configuration = self.model_dump(mode="json", exclude={"plans_name"})
        return {
            "dataset_name": study.dataset,
            "plans_name": self.plans_name,
            "label_manager": "LabelManager",
            "configurations": {study.configuration: configuration},
        }


class Preparation(_Body):
    """Answer to Prepare: the data is preprocessed for these plans."""

    plans_sha256: Sha256
    network: Network | None = Field(None, description="With mode asymfedavg: the network of the site's own plan.")
    training_cases: dict[str, Cases] = Field(description="Number of training cases for each fold.")
    device: Text


class Training(_Body):
    """Answer to Train: how one local round went. Lists have one entry for each epoch."""

    plans_sha256: Sha256
    cases: Cases = Field(description="Training cases, as declared by Prepare.")
    epochs: int = Field(ge=1)
    learning_rate: list[Annotated[float, Field(ge=0, le=1e30)]]
    train_loss: list[Loss]
    val_loss: list[Loss]
    pseudo_dice: list[list[Dice | None]] = Field(
        description="nnU-Net's online Dice for each epoch and foreground class; None where a class did not occur."
    )
    seconds: dict[Text, Seconds] = Field(
        max_length=100, description="Wall time: `train`, `validation`, `checkpoint`, `start` (cold)."
    )

    @model_validator(mode="after")
    def _one_entry_for_each_epoch(self) -> Training:
        for name in ("learning_rate", "train_loss", "val_loss", "pseudo_dice"):
            if len(getattr(self, name)) != self.epochs:
                raise ValueError(f"{name} has not one entry for each epoch")
        return self


class LabelScore(_Body):
    """Dice of one label over the cases of one site."""

    mean: Dice | None
    std: Dice | None
    minimum: Dice | None
    cases: int = Field(ge=0, description="Cases in which the label occurs or was predicted.")


class Validation(_Body):
    """Answer to Validate: the global model on the site's own cases.

    `validation`: the fold's held-out training cases (nnU-Net's own validation). `test`: imagesTs scored against
    labelsTs. Either is empty where the site has none.
    """

    validation: dict[str, LabelScore] = {}
    validation_cases: Counted = 0
    test: dict[str, LabelScore] = {}
    test_cases: Counted = 0
    seconds: Seconds

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> Validation:
        for scores, cases in ((self.validation, self.validation_cases), (self.test, self.test_cases)):
            if any(score.cases > cases for score in scores.values()):
                raise ValueError("a label with more cases than were scored")
        return self


class Finished(_Body):
    """Answer to Finish: the native model is in place at the site."""

    model_sha256: Sha256 = Field(description="Digest of the global weights the model was built from.")


class Comparison(_Body):
    """Answer to Compare: the site's own training, and the global model once personalised.

    Both on the very cases that Validate judged the global model on; sums only.
    """

    local: Validation
    personalised: Validation
    seconds: Seconds


class Failure(_Body):
    """A failed task: numbers of the catalogue alone."""

    problems: list[Count] = Field(min_length=1, max_length=100)
    retry: bool = Field(False, description="True where asking again (with full weights) may help.")

    def describe(self) -> str:
        """One line for people."""
        parts = []
        for problem in self.problems:
            try:
                title = Code.of(problem.code).title
            except KeyError:
                title = "unknown code"
            parts.append(f"FNU-{problem.code} {title}" + (f" (x{problem.count})" if problem.count > 1 else ""))
        return "; ".join(parts)


class Result(_Body):
    """One site's answer to one task; exactly one of the reports, or `failure`, is set."""

    protocol: int = PROTOCOL
    study_id: Sha256
    site: SiteName
    kind: Kind
    fold: TrainedFold | None = None
    round: int | None = None
    attempt: int = 1
    failure: Failure | None = None
    description: Description | None = None
    fingerprint: SiteFingerprint | None = None
    preparation: Preparation | None = None
    training: Training | None = None
    validation: Validation | None = None
    finished: Finished | None = None
    comparison: Comparison | None = None
    weights: Weights | None = None

    @classmethod
    def answering(cls, task: Task, **report: Any) -> Result:
        """A result with the task's key and the given report."""
        return cls(
            study_id=task.study.id,
            site=task.site,
            kind=task.kind,
            fold=task.fold,
            round=task.round,
            attempt=task.attempt,
            **report,
        )

    def answers(self, task: Task) -> bool:
        """Whether this is an answer to that task."""
        return (self.study_id, self.site, self.kind, self.fold, self.round) == (
            task.study.id,
            task.site,
            task.kind,
            task.fold,
            task.round,
        )


def parse_task(data: bytes | str) -> Task:
    """Decode a task from JSON; raises FNU-605."""
    try:
        return Task.model_validate_json(data)
    except ValidationError as error:
        raise FednnunetError(Code.ENVELOPE_INVALID, f"task: {error.error_count()} faults") from error


def parse_result(data: bytes | str) -> Result:
    """Decode an answer from JSON; raises FNU-605."""
    try:
        return Result.model_validate_json(data)
    except ValidationError as error:
        raise FednnunetError(Code.ENVELOPE_INVALID, f"answer: {error.error_count()} faults") from error
