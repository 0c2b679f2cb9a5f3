"""The hospital's own say: `policy.toml`, evaluated at the site, in the link.

Rules:

- It is asked before a task goes on to the worker, and again before an answer leaves.
- What the policy does not allow is refused with a number (FNU-622, 623 or 624); what exactly stays in the house.
- A study waits until a person has read it and approved it, unless the policy allows every study of the coordinator or
  names this one. An approval is of an id, which is the digest of the whole study: a changed study is another one.
- Outside the hours a task waits; it is not refused.
- A key that is not known is an error at start, never ignored. Without a file the default holds: each study is approved.
"""

from __future__ import annotations

import datetime as dt
import logging
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from federation import files
from federation.errors import Code, FednnunetError
from federation.faults import faults
from federation.study import PATTERNS, SHA256, Study
from federation.tasks import Kind, Result, Task, kinds_of

log = logging.getLogger("fednnunet.policy")

StudyId = Annotated[str, Field(pattern=SHA256)]
_HOURS = re.compile(r"^([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)$")

DEFAULT = """\
# What this hospital allows. It is checked here, by the link, for every task that arrives and every answer that leaves.

# "approve": each study waits until somebody here has run `appliance approve STUDY`.
# "any": every study that the coordinator has signed. Or a list of study ids: ["3f0c...", "..."].
studies = "approve"

# The tasks that may be asked. Without "fingerprint" a site can take part in studies of mode asymfedavg alone.
tasks = ["describe", "fingerprint", "prepare", "train", "validate", "finish", "compare"]

# Local time in which a task may begin, such as "19:00-06:30". Outside of it tasks wait.
hours = "any"

# The most rounds that a study may ask for, over all its folds.
max_rounds = 10000

# The least number of cases that a group in a fingerprint must stand for (the study's fingerprint_min_cases).
fingerprint_min_cases = 1

# The most megabytes of weights that one answer may carry.
max_weights_mb = 2000

# Scores (Dice for each label, and how many cases) may leave after Validate and Compare. The online Dice of Train does.
scores_may_leave = true
"""


class Policy(BaseModel):
    """What a hospital allows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    studies: Literal["approve", "any"] | list[StudyId] = Field(
        "approve",
        description="`approve`: each study waits for `appliance approve`; `any`: every study that the coordinator has "
        "signed; or a list of study ids.",
    )
    tasks: list[Kind] = Field(list(Kind), description="The tasks that may be asked.")
    hours: str = Field("any", description="Local time in which a task may begin, `19:00-06:30`, or `any`.")
    max_rounds: int = Field(10000, ge=1, description="The most rounds of a study, over all its folds.")
    fingerprint_min_cases: int = Field(
        1, ge=1, description="The least number of cases that a group in a fingerprint must stand for."
    )
    max_weights_mb: float = Field(2000, gt=0, description="The most megabytes of weights in one answer.")
    scores_may_leave: bool = Field(True, description="Whether Dice may leave after Validate and Compare.")

    @field_validator("hours")
    @classmethod
    def _hours_are_times(cls, value: str) -> str:
        if value != "any" and not _HOURS.match(value):
            raise ValueError('must be "any", or two times such as "19:00-06:30"')
        return value

    def is_open(self, now: dt.time) -> bool:
        """Whether a task may begin at this local time; a span may go over midnight."""
        if self.hours == "any":
            return True
        begin, end = (dt.time.fromisoformat(part) for part in self.hours.split("-"))
        return begin <= now < end if begin <= end else now >= begin or now < end

    def check_task(self, task: Task, approval: str | None) -> None:
        """Refuse a task; raises FNU-622, 623 or 624.

        Parameters
        ----------
        approval : str or None
            `approved` or `denied`: what a person here has said of the study.
        """
        study = task.study
        if approval == "denied":
            raise FednnunetError(Code.STUDY_DENIED, study.id)
        by_name = isinstance(self.studies, list) and study.id in self.studies
        if self.studies != "any" and not by_name and approval != "approved":
            raise FednnunetError(Code.STUDY_NOT_APPROVED, f"{study.name} ({study.id})")
        if task.site not in study.sites:
            raise _refused(f"the study does not name {task.site}: {', '.join(study.sites)}")
        if task.kind not in kinds_of(study):  # what was approved is the study as it is written
            raise _refused(
                f"task {task.kind} is no part of the study (mode {study.mode}, stop_after {study.stop_after})"
            )
        if task.kind not in self.tasks:
            raise _refused(f"task {task.kind} is not in tasks")
        rounds = study.rounds * len(study.folds)
        if rounds > self.max_rounds:
            raise _refused(f"{rounds} rounds, max_rounds is {self.max_rounds}")
        if task.kind is Kind.FINGERPRINT and study.fingerprint_min_cases < self.fingerprint_min_cases:
            raise _refused(
                f"fingerprint_min_cases {study.fingerprint_min_cases}, the policy wants {self.fingerprint_min_cases}"
            )
        if task.kind in (Kind.VALIDATE, Kind.COMPARE) and not self.scores_may_leave:
            raise _refused(f"{task.kind}, and scores_may_leave is false")

    def check_answer(self, result: Result) -> None:
        """Refuse an answer that is about to leave; raises FNU-624."""
        if result.weights is not None and result.weights.nbytes > self.max_weights_mb * 1e6:
            raise _refused(
                f"{result.weights.nbytes / 1e6:.1f} MB of weights, max_weights_mb is {self.max_weights_mb:g}"
            )
        if result.kind not in self.tasks:
            raise _refused(f"an answer to {result.kind}, which is not in tasks")
        if (result.validation is not None or result.comparison is not None) and not self.scores_may_leave:
            raise _refused("scores, and scores_may_leave is false")


def _refused(why: str) -> FednnunetError:
    return FednnunetError(Code.POLICY_REFUSED, why)


def load(path: Path) -> Policy:
    """The policy of a file, the default where there is none; raises FNU-112 that names each fault."""
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return Policy()
    except PermissionError as error:
        raise FednnunetError(Code.MOUNT_UNREADABLE, f"policy {path}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FednnunetError(Code.SETTINGS_INVALID, f"{path}: {error}") from error
    except ValidationError as error:
        found = "; ".join(faults(error, Policy, {SHA256: PATTERNS[SHA256]}))
        raise FednnunetError(Code.SETTINGS_INVALID, f"{path}: {found}") from error


def write_default(path: Path) -> None:
    """Lay the explained default beside the site's settings, unless there is a policy."""
    if not path.exists():
        files.write_bytes(path, DEFAULT.encode())


class Approvals:
    """Studies that have been asked for here, and what a person has said of them: one file for each.

    Parameters
    ----------
    folder : Path
        Holds `ID.json`: the study, and `approved`, `denied` or nothing yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def meet(self, study: Study) -> str | None:
        """What has been said of a study; one that is new is written down as waiting.

        One that a later version has written down is written anew, so that a person can see and approve it here.
        """
        path = self._path(study.id)
        if not path.exists():
            self._write(study, None)
            return None
        entry = files.read_json(path)
        said: str | None = entry["said"]
        try:
            Study.model_validate(entry["study"])
        except ValidationError:
            self._write(study, said)
        return said

    def say(self, study: Study, said: Literal["approved", "denied"]) -> None:
        """Approve or deny a study."""
        self._write(study, said)

    def all(self) -> list[tuple[Study, str | None]]:
        """Every study that has been asked for here, by name; one of a later version is left out, and said."""
        found: list[tuple[Study, str | None]] = []
        for path in sorted(self.folder.glob("*.json")):
            entry = files.read_json(path)
            try:
                found.append((Study.model_validate(entry["study"]), entry["said"]))
            except ValidationError:
                log.warning("%s is left out: it holds no study that this version understands", path)
        return sorted(found, key=lambda item: item[0].name)

    def find(self, given: str) -> Study:
        """The one study that is called so; raises FNU-130."""
        fitting = [study for study, _ in self.all() if study.is_called(given)]
        if len(fitting) != 1:
            known = ", ".join(f"{study.name} ({study.id[:12]})" for study, _ in self.all()) or "none"
            raise FednnunetError(Code.STUDY_UNKNOWN_HERE, f"{given} fits {len(fitting)} studies; known here: {known}")
        return fitting[0]

    def _path(self, study_id: str) -> Path:
        return self.folder / f"{study_id}.json"

    def _write(self, study: Study, said: str | None) -> None:
        value = {"study": study.model_dump(mode="json"), "said": said, "at": dt.datetime.now(dt.UTC).isoformat()}
        files.write_json(self._path(study.id), value)
