"""Study: the YAML a coordinator writes, checked in full before any site is asked.

Rules:

- A key the study does not know is an error, never ignored.
- The study's id is the SHA-256 of its canonical JSON: two files that mean the same have the same id,
  and no side can be made to run another study under a known id.
- Everything here travels to every hospital: nothing secret, nothing about one site alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from federation.errors import Code, FednnunetError
from federation.files import sha256_json

SITE_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"
MOST_FAULTS = 12
SiteName = Annotated[str, Field(pattern=SITE_NAME)]
Fold = Literal["0", "1", "2", "3", "4", "0-4", "all"]
StopAfter = Literal["describe", "fingerprint", "plan", "prepare", "finish"]
PLANNERS = (
    "ExperimentPlanner",
    "nnUNetPlannerResEncM",
    "nnUNetPlannerResEncL",
    "nnUNetPlannerResEncXL",
    "SmallUNetPlanner",
)


class Aggregation(BaseModel):
    """How the sites' updates become the next global weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["mean"] = Field("mean", description="`mean`: the weighted mean of the sites' weights (FedAvg).")
    weighting: Literal["cases", "uniform"] = Field(
        "cases",
        description="`cases`: a site counts by its number of training cases. `uniform`: every site counts the same.",
    )
    max_update_ratio: float = Field(
        10.0,
        gt=0,
        description="An update whose distance from the global weights is more than this many times the norm of the "
        "global weights is refused as not plausible.",
    )


class Study(BaseModel):
    """One federated training, from the datasets' contract to the exported model."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$", description="A short name for people.")
    dataset: str = Field(
        pattern=r"^Dataset[0-9]{3}_[A-Za-z0-9_-]{1,60}$",
        description="nnU-Net's name for the federated dataset, `DatasetNNN_Name`. It names the model, not the folders "
        "at the sites.",
    )
    sites: list[SiteName] = Field(min_length=1, description="The sites that take part, by their enrolled names.")
    channel_names: dict[str, str] = Field(
        min_length=1, description="The contract: nnU-Net's channel_names, such as `{0: CT}`."
    )
    labels: dict[str, int | list[int]] = Field(
        min_length=2, description="The contract: nnU-Net's labels, such as `{background: 0, tumour: 1}`."
    )
    regions_class_order: list[int] | None = Field(
        None, description="nnU-Net's regions_class_order; needed when a label is a list of numbers."
    )
    file_ending: str = Field(
        ".nii.gz", pattern=r"^\.[A-Za-z0-9.]{1,12}$", description="The contract: the images' ending."
    )
    accept_float_labels: bool = Field(
        False,
        description="Accept label files stored as floating point when all their values are whole numbers. "
        "nnU-Net reads them; other tools may not.",
    )
    fingerprint_min_cases: int = Field(
        1,
        ge=1,
        description="1 sends the multiset of (spacing, shape), as an exact plan needs. k > 1 sends groups of at least "
        "k cases each; the study's record says how far the plan can move by it.",
    )
    planner: Literal[
        "ExperimentPlanner", "nnUNetPlannerResEncM", "nnUNetPlannerResEncL", "nnUNetPlannerResEncXL", "SmallUNetPlanner"
    ] = Field(
        "ExperimentPlanner",
        description="nnU-Net's planner (-pl). `SmallUNetPlanner` is ours: a network for demonstrations and tests on a "
        "CPU, not for patients.",
    )
    gpu_memory_target: float | None = Field(
        None, gt=0, description="GPU memory in GB that the planner may fill (-gpu_memory_target); empty: the planner's."
    )
    overwrite_target_spacing: list[float] | None = Field(
        None, description="Target spacing in mm instead of the planned one (-overwrite_target_spacing)."
    )
    plans_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_]{0,62}$",
        description="Name of the plans (-overwrite_plans_name, -p); empty: the planner's own.",
    )
    configuration: Literal["2d", "3d_fullres", "3d_lowres"] = Field(
        "3d_fullres", description="nnU-Net's configuration to train."
    )
    trainer: str = Field(
        "nnUNetTrainer",
        pattern=r"^nnUNetTrainer[A-Za-z0-9_]{0,60}$",
        description="nnU-Net's trainer class (-tr).",
    )
    fold: Fold = Field(
        "0",
        description="`0` to `4`: one fold of nnU-Net's five-fold split, made at each site from its own cases. `0-4`: "
        "the five one after the other. `all`: every case trains, none is held out.",
    )
    rounds: int = Field(1000, ge=1, description="Rounds of training (for each fold).")
    epochs_per_round: int = Field(1, ge=1, description="Epochs that a site trains in one round.")
    iterations_per_epoch: int = Field(250, ge=1, description="Training iterations in an epoch (nnU-Net's own: 250).")
    validation_iterations_per_epoch: int = Field(
        50, ge=1, description="Iterations of the online validation in an epoch (nnU-Net's own: 50)."
    )
    aggregation: Aggregation = Field(default_factory=Aggregation, description="How updates are put together.")
    wire: Literal["full", "half"] = Field(
        "full",
        description="`full`: float32, lossless. `half`: float16 differences, half the bytes; the rounding is carried "
        "over to the next round.",
    )
    quorum: int | None = Field(
        None, ge=1, description="How many sites a round needs at its deadline; empty: all of them."
    )
    round_deadline: float = Field(
        86400.0, gt=0, description="Seconds after which a round goes on without the sites that have not answered."
    )
    appear_deadline: float = Field(
        600.0, gt=0, description="Seconds within which every site must have appeared at the start."
    )
    seed: int = Field(
        12345, ge=0, lt=2**31, description="Seed of the initial weights and of the order of the training patches."
    )
    pretrained_weights: str | None = Field(
        None,
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of a checkpoint in the orchestrator's folder `pretrained` that the first weights are "
        "taken from (-pretrained_weights).",
    )
    save_probabilities: bool = Field(
        False, description="Sites keep the softmax output of the final validation (--npz). It never leaves a site."
    )
    stop_after: StopAfter = Field(
        "finish", description="End the study after this phase: describe, fingerprint, plan, prepare or finish."
    )

    @field_validator("channel_names", mode="before")
    @classmethod
    def _channel_keys_are_text(cls, value: Any) -> Any:
        return {str(key): item for key, item in value.items()} if isinstance(value, dict) else value

    @field_validator("fold", mode="before")
    @classmethod
    def _fold_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _is_consistent(self) -> Study:
        if sorted(self.channel_names) != sorted(str(number) for number in range(len(self.channel_names))):
            raise ValueError("channel_names must be numbered 0, 1, 2, ... without a gap")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError("sites names a site twice")
        if self.quorum is not None and self.quorum > len(self.sites):
            raise ValueError(f"quorum {self.quorum} is more than the {len(self.sites)} sites")
        if self.labels.get("background") != 0:
            raise ValueError("labels must hold `background: 0`")
        regions = any(isinstance(value, list) for value in self.labels.values())
        if regions and self.regions_class_order is None:
            raise ValueError("labels hold regions: regions_class_order is needed")
        if "ignore" in self.labels and self.labels["ignore"] != max(self.label_values()):
            raise ValueError("the label `ignore` must have the highest number (nnU-Net's rule)")
        values = sorted(self.label_values())
        if values != list(range(len(values))):
            raise ValueError(f"label numbers must be consecutive from 0, found {values} (nnU-Net's rule)")
        if self.overwrite_target_spacing is not None and (
            len(self.overwrite_target_spacing) != 3 or min(self.overwrite_target_spacing) <= 0
        ):
            raise ValueError("overwrite_target_spacing needs three positive numbers")
        return self

    def label_values(self) -> set[int]:
        """Every number that may stand in a label file."""
        values: set[int] = set()
        for value in self.labels.values():
            values.update(value if isinstance(value, list) else [value])
        return values

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON, in hex."""
        return sha256_json(self.model_dump(mode="json"))

    @property
    def folds(self) -> list[str]:
        """The folds to train, in order."""
        return ["0", "1", "2", "3", "4"] if self.fold == "0-4" else [self.fold]

    @property
    def needed(self) -> int:
        """How many sites a round needs at its deadline."""
        return len(self.sites) if self.quorum is None else self.quorum

    def dataset_json(self, training_cases: int) -> dict[str, Any]:
        """nnU-Net's dataset.json of the federated dataset with `training_cases` cases."""
        result: dict[str, Any] = {
            "channel_names": self.channel_names,
            "labels": self.labels,
            "numTraining": training_cases,
            "file_ending": self.file_ending,
            "name": self.dataset,
        }
        if self.regions_class_order is not None:
            result["regions_class_order"] = self.regions_class_order
        return result


def parse(value: Any, where: str = "the study") -> Study:
    """Check a study given as plain data; raises FNU-102 that lists every fault with its field."""
    try:
        return Study.model_validate(value)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            place = ".".join(str(part) for part in fault["loc"]) or "study"
            message = re.sub(r"^Value error, ", "", fault["msg"])
            if fault["type"] == "extra_forbidden":
                message = "this key is not known"
            faults.append(f"  {place}: {message}")
        if len(faults) > MOST_FAULTS:
            faults = [*faults[:MOST_FAULTS], f"  and {len(faults) - MOST_FAULTS} more"]
        raise FednnunetError(Code.STUDY_INVALID, f"{where}\n" + "\n".join(faults)) from error


def load(path: Path) -> Study:
    """Read a study file; raises FNU-101 or FNU-102."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FednnunetError(Code.STUDY_UNREADABLE, f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise FednnunetError(Code.STUDY_UNREADABLE, f"{path}: it holds no keys and values")
    return parse(value, str(path))
