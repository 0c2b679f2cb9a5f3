"""Study: the YAML a coordinator writes, checked in full before any site is asked.

Rules:

- A key the study does not know is an error, never ignored.
- The study's id is the SHA-256 of its canonical JSON: two files that mean the same have the same id,
  and no side can be made to run another study under a known id. Defaults are left out of it: a field that a later
  version adds, whose default is what was done before, does not make another study of one that is under way. So a
  default never changes.
- Everything here travels to every hospital: nothing secret, nothing about one site alone.
- Every text is short and printable: a person at a hospital approves what a terminal shows of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from federation import trainers
from federation.errors import Code, FednnunetError
from federation.faults import faults
from federation.files import sha256_json
from federation.layers import kept_local, possible_names, unknown_patterns

SITE_NAME = r"^[a-z0-9][a-z0-9_-]{0,62}$"
MOST_FAULTS = 12
MOST_LETTERS = 200
"""Of a text that another side has written and that a terminal shows: a label, the name of a GPU."""
NAME, PLANS_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$", r"^[A-Za-z0-9][A-Za-z0-9_]{0,62}$"
DATASET, FILE_ENDING = r"^Dataset[0-9]{3}_[A-Za-z0-9_-]{1,60}$", r"^\.[A-Za-z0-9.]{1,12}$"
TRAINER, SHA256 = r"^[A-Za-z][A-Za-z0-9_]{0,80}$", r"^[0-9a-f]{64}$"
PATTERNS = {
    SITE_NAME: "name in small letters, digits, `-` and `_`",
    NAME: "name in letters, digits, `-` and `_`",
    PLANS_NAME: "name in letters, digits and `_`",
    DATASET: "`DatasetNNN_Name`",
    FILE_ENDING: "file ending with its dot",
    TRAINER: "class name in letters, digits and `_`",
    SHA256: "SHA-256 in hex",
}
"""Patterns of text in words."""
SiteName = Annotated[str, Field(pattern=SITE_NAME)]
Fold = Literal["0", "1", "2", "3", "4", "0-4", "all"]
StopAfter = Literal["describe", "fingerprint", "plan", "prepare", "finish"]
Method = Literal["mean", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "median", "trimmed_mean", "krum", "multi_krum"]
ADAPTIVE = ("fedadagrad", "fedyogi", "fedadam")
KRUM = ("krum", "multi_krum")
CASCADE, LOWRES = "3d_cascade_fullres", "3d_lowres"
READERS = {
    "NaturalImage2DIO": (".png", ".bmp", ".tif"),
    "SimpleITKIO": (".nii.gz", ".nrrd", ".mha", ".gipl"),
    "Tiff3DIO": (".tif", ".tiff"),
    "NibabelIO": (".nii", ".nii.gz"),
    "NibabelIOWithReorient": (".nii", ".nii.gz"),
}
"""nnU-Net's readers and what they read (nnunetv2 2.8.1, `LIST_OF_IO_CLASSES`, in its order)."""
READER_2D = "NaturalImage2DIO"
PLANNERS = (
    "ExperimentPlanner",
    "nnUNetPlannerResEncM",
    "nnUNetPlannerResEncL",
    "nnUNetPlannerResEncXL",
    "SmallUNetPlanner",
)


class Aggregation(BaseModel):
    """How the sites' updates become the next global weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Method = Field(
        "mean",
        description="`mean`: the weighted mean (FedAvg). `fedavgm`, `fedadagrad`, `fedyogi`, `fedadam`: an optimizer "
        "at the orchestrator steps from the old global weights towards the mean. `median`, `trimmed_mean`, `krum`, "
        "`multi_krum`: bound what a few faulty sites can do; there every site counts the same.",
    )
    weighting: Literal["cases", "uniform"] = Field(
        "cases",
        description="`cases`: a site counts by its number of training cases. `uniform`: every site counts the same. "
        "The robust methods do not read it.",
    )
    max_update_ratio: float = Field(
        10.0,
        gt=0,
        description="An update whose distance from the global weights is more than this many times the norm of the "
        "global weights is refused as not plausible.",
    )
    server_learning_rate: float | None = Field(
        None,
        gt=0,
        description="Step of the optimizers at the orchestrator; empty: 1 for `fedavgm`, 0.01 for the adaptive ones.",
    )
    server_momentum: float = Field(0.9, ge=0, lt=1, description="`fedavgm`: the momentum.")
    beta_1: float = Field(0.9, ge=0, lt=1, description="`fedyogi`, `fedadam`: decay of the first moment.")
    beta_2: float = Field(0.99, ge=0, lt=1, description="`fedyogi`, `fedadam`: decay of the second moment.")
    tau: float = Field(1e-3, gt=0, description="`fedadagrad`, `fedyogi`, `fedadam`: how little they adapt.")
    trim: float = Field(
        0.2,
        ge=0,
        lt=0.5,
        description="`trimmed_mean`: this share of the sites is left out at each end, for each number of the weights.",
    )
    faulty_sites: int = Field(
        1, ge=0, description="`krum`, `multi_krum`: how many sites may be faulty; 2 x this + 3 sites are needed."
    )
    selected_sites: int | None = Field(
        None, ge=1, description="`multi_krum`: how many updates are averaged; empty: all but the faulty ones."
    )

    @property
    def step(self) -> float:
        """The learning rate of the orchestrator's optimizer."""
        if self.server_learning_rate is not None:
            return self.server_learning_rate
        return 0.01 if self.method in ADAPTIVE else 1.0


class Study(BaseModel):
    """One federated training, from the datasets' contract to the exported model."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    name: str = Field(pattern=NAME, examples=["liver-2026"], description="A short name for people.")
    dataset: str = Field(
        pattern=DATASET,
        examples=["Dataset401_Liver"],
        description="nnU-Net's name for the federated dataset, `DatasetNNN_Name`. It names the model, not the folders "
        "at the sites.",
    )
    sites: list[SiteName] = Field(
        min_length=1,
        examples=["[hospital_a, hospital_b]"],
        description="The sites that take part, by their enrolled names.",
    )
    mode: Literal["ffe", "asymfedavg"] = Field(
        "ffe",
        description="`ffe`: one plan from the pooled fingerprint, the same network everywhere. `asymfedavg`: each site "
        "plans from its own data, which no fingerprint leaves; layers with the same name and shape are averaged, the "
        "others stay at their site (FednnU-Net, arXiv 2503.02549).",
    )
    layers: Literal["groups", "common"] = Field(
        "groups",
        description="`asymfedavg`: `groups` averages a layer among all sites, two or more, that have it in this shape; "
        "`common` averages only layers that every site has (the paper's rule).",
    )
    channel_names: dict[str, str] = Field(
        min_length=1, examples=["{0: CT}"], description="The contract: nnU-Net's channel_names, such as `{0: CT}`."
    )
    labels: dict[str, int | list[int]] = Field(
        min_length=2,
        examples=["{background: 0, tumour: 1}"],
        description="The contract: nnU-Net's labels, such as `{background: 0, tumour: 1}`.",
    )
    regions_class_order: list[int] | None = Field(
        None,
        examples=["[1, 2]"],
        description="nnU-Net's regions_class_order; needed when a label is a list of several numbers.",
    )
    file_ending: str = Field(
        ".nii.gz", pattern=FILE_ENDING, examples=[".nii.gz"], description="The contract: the images' ending."
    )
    overwrite_image_reader_writer: (
        Literal["NaturalImage2DIO", "SimpleITKIO", "Tiff3DIO", "NibabelIO", "NibabelIOWithReorient"] | None
    ) = Field(
        None,
        description="The contract: nnU-Net's reader, by its key in dataset.json. `NibabelIOWithReorient` turns all "
        "images into one orientation. Empty: nnU-Net's own for the ending.",
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
        None,
        examples=["[1, 1, 1]"],
        description="Target spacing in mm instead of the planned one (-overwrite_target_spacing).",
    )
    plans_name: str | None = Field(
        None,
        pattern=PLANS_NAME,
        examples=["nnUNetPlans"],
        description="Name of the plans (-overwrite_plans_name, -p); empty: the planner's own.",
    )
    configuration: Literal["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"] = Field(
        "3d_fullres", description="nnU-Net's configuration to train."
    )
    previous_stage: str | None = Field(
        None,
        pattern=SHA256,
        description="`3d_cascade_fullres`: id of the finished study of 3d_lowres whose model predicts, at every site, "
        "what the cascade starts from.",
    )
    trainer: str = Field(
        "nnUNetTrainer",
        pattern=TRAINER,
        examples=["nnUNetTrainer"],
        description="nnU-Net's trainer class (-tr), one of those in reference/nnunet-breadth.",
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
    proximal_mu: float = Field(
        0.0,
        ge=0,
        description="FedProx: each step at a site is pulled back to the round's global weights with this strength "
        "(Li et al. 2020); 0: not.",
    )
    keep_local: list[str] = Field(
        [],
        examples=["[norm]"],
        description="Layers that stay at each site and are not averaged: `norm`, `seg_head`, or a pattern of tensor "
        "names such as `decoder.*`. Each site then has a model of its own.",
    )
    momentum: Literal["keep", "reset"] = Field(
        "keep",
        description="What a site's optimizer remembers of the round before: `keep` its momentum, or `reset` it.",
    )
    aggregation: Aggregation = Field(
        default_factory=Aggregation, examples=["{method: median}"], description="How updates are put together."
    )
    wire: Literal["full", "half", "int8"] = Field(
        "full",
        description="`full`: float32, lossless. `half`: float16 differences, half the bytes. `int8`: differences in 8 "
        "bits, a quarter of the bytes. What is rounded away is carried over to the next round.",
    )
    quorum: int | None = Field(
        None, ge=1, description="How many sites a round needs at its deadline; empty: all of them."
    )
    round_deadline: float = Field(
        86400.0, gt=0, description="Seconds after which a round goes on without the sites that have not answered."
    )
    step_deadline: float = Field(
        604800.0,
        gt=0,
        description="Seconds for a step that is no round: checks, fingerprint, preprocessing, validation, comparison.",
    )
    appear_deadline: float = Field(
        600.0, gt=0, description="Seconds within which every site must have appeared at the start."
    )
    seed: int = Field(
        12345, ge=0, lt=2**31, description="Seed of the initial weights and of the order of the training patches."
    )
    pretrained_weights: str | None = Field(
        None,
        pattern=SHA256,
        description="SHA-256 of a checkpoint in the orchestrator's folder `pretrained` that the first weights are "
        "taken from (-pretrained_weights).",
    )
    save_probabilities: bool = Field(
        False, description="Sites keep the softmax output of the final validation (--npz). It never leaves a site."
    )
    compare: Literal["none", "local"] = Field(
        "none",
        description="`local`: when the model is finished, each site trains alone as long as the federation did, "
        "personalises the global model, and says how the three do on its own held-out cases. It takes about as long "
        "again as the training.",
    )
    personalise_epochs: int = Field(
        10, ge=1, description="`compare: local`: epochs in which a site goes on from the global model on its own cases."
    )
    stop_after: StopAfter = Field(
        "finish", description="End the study after this phase: describe, fingerprint, plan, prepare or finish."
    )

    @field_validator("channel_names", mode="before")
    @classmethod
    def _channel_keys_are_numbers_in_order(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        named = {str(key): item for key, item in value.items()}
        if not all(key.isdecimal() for key in named):
            return named
        return {key: named[key] for key in sorted(named, key=int)}  # nnU-Net takes their order, not their numbers

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
        if empty := [name for name, value in self.labels.items() if value == []]:
            raise ValueError(f"labels.{empty[0]} is an empty list: give its number, or the numbers of a region")
        reader = self.overwrite_image_reader_writer
        if reader is not None and reader not in readers_of(self.file_ending):
            raise ValueError(f"overwrite_image_reader_writer: {reader} reads no {self.file_ending}")
        if self.has_regions and self.regions_class_order is None:
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
        for fault in (
            self._text_fault(),
            trainers.fault(self.trainer, self.rounds * self.epochs_per_round),
            self._aggregation_fault(),
            self._mode_fault(),
            self._local_fault(),
            self._cascade_fault(),
            self._comparison_fault(),
        ):
            if fault is not None:
                raise ValueError(fault)
        if self.has_regions and self.trainer in trainers.WITHOUT_REGIONS:
            raise ValueError(f"{self.trainer} knows no regions: use another trainer, or labels without regions")
        return self

    def _text_fault(self) -> str | None:
        texts = {"channel_names": self.channel_names.values(), "labels": self.labels, "keep_local": self.keep_local}
        for key, values in texts.items():
            for text in values:
                if not text.isprintable() or len(text) > MOST_LETTERS:
                    return f"{key}: {text[:40]!r} must be printable text of {MOST_LETTERS} letters at most"
        return None

    def _aggregation_fault(self) -> str | None:
        rule = self.aggregation
        if rule.method in KRUM:
            least = 2 * rule.faulty_sites + 3
            if self.needed < least:
                return (
                    f"aggregation.method {rule.method} with {rule.faulty_sites} faulty sites needs {least} sites in "
                    f"every round, but {'quorum' if self.quorum else 'sites'} is {self.needed}"
                )
            if rule.selected_sites is not None and rule.selected_sites > self.needed - rule.faulty_sites:
                return f"aggregation.selected_sites {rule.selected_sites} is more than all but the faulty sites"
            if self.mode == "asymfedavg" and self.layers == "groups":
                return f"aggregation.method {rule.method} compares whole updates: it needs layers: common"
        if rule.method == "trimmed_mean" and int(rule.trim * self.needed) == 0:
            return f"aggregation.trim {rule.trim:g} of {self.needed} sites leaves out none: raise it, or use median"
        return None

    def _mode_fault(self) -> str | None:
        if self.mode == "ffe":
            return "layers has a meaning with mode: asymfedavg alone" if self.layers == "common" else None
        if len(self.sites) < 2:
            return "mode asymfedavg needs two sites or more: one site shares its layers with nobody"
        if self.stop_after == "fingerprint":
            return "with mode asymfedavg no fingerprint leaves a site: stop_after cannot be fingerprint"
        if self.pretrained_weights is not None:
            return "pretrained_weights need mode ffe: with asymfedavg the networks differ from site to site"
        return None

    def _local_fault(self) -> str | None:
        residual = self.planner.startswith("nnUNetPlannerResEnc")
        unknown = unknown_patterns(self.keep_local, residual)
        if unknown:
            return f"keep_local: no layer of any network of {self.planner} is called {', '.join(unknown)}"
        possible = set(possible_names(residual))
        local = kept_local(possible, self.keep_local)
        if local == possible:
            return "keep_local keeps every layer: nothing would be averaged"
        if self.pretrained_weights is not None and local - kept_local(possible, ["seg_head"]):
            return "keep_local with pretrained_weights may keep the seg_head alone: the others would not be pretrained"
        return None

    def _cascade_fault(self) -> str | None:
        if (self.configuration == CASCADE) != (self.previous_stage is not None):
            return "previous_stage and configuration 3d_cascade_fullres need each other"
        if self.configuration == CASCADE and self.mode == "asymfedavg":
            return "3d_cascade_fullres needs mode ffe: its first stage is one model for all sites"
        return None

    def _comparison_fault(self) -> str | None:
        if self.compare == "none":
            return None
        if self.stop_after != "finish":
            return "compare needs a finished model: stop_after must be finish"
        if self.configuration == CASCADE:
            return "compare knows no cascade: compare its first stage, 3d_lowres"
        if self.pretrained_weights is not None:
            return "compare does not go with pretrained_weights: a site alone would begin without them"
        return None

    @property
    def has_regions(self) -> bool:
        """Whether a label is a region, of several numbers (nnU-Net's `LabelManager.has_regions`)."""
        return any(isinstance(value, list) and len(value) > 1 for value in self.labels.values())

    @property
    def label_keys(self) -> dict[str, str]:
        """The name of each foreground label or region, and nnU-Net's key for it in a summary.json.

        Source: nnunetv2 2.8.1, `LabelManager` and `label_or_region_to_key`.
        """
        found = {}
        for name, value in self.labels.items():
            numbers = value if isinstance(value, list) else [value]
            if name != "ignore" and set(numbers) != {0}:
                found[name] = str(tuple(numbers)) if self.has_regions and isinstance(value, list) else str(numbers[0])
        return found

    def label_values(self) -> set[int]:
        """Every number that may stand in a label file."""
        values: set[int] = set()
        for value in self.labels.values():
            values.update(value if isinstance(value, list) else [value])
        return values

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON of what differs from the defaults, in hex.

        With regions the order of the labels is part of the contract (`regions_class_order` counts by it), so labels in
        another order than that of their names are a list here.
        """
        told = self.model_dump(mode="json", exclude_defaults=True)
        if self.has_regions and list(self.labels) != sorted(self.labels):
            told["labels"] = list(self.labels.items())
        return sha256_json(told)

    def is_called(self, given: str) -> bool:
        """Whether a person means this study: by its name, or by at least the first four letters of its id."""
        return self.name == given or (len(given) >= 4 and self.id.startswith(given))

    @property
    def one_model(self) -> bool:
        """Whether all sites end with the same whole model, which the orchestrator has too."""
        return self.mode == "ffe" and not self.keep_local

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
        if self.overwrite_image_reader_writer is not None:
            result["overwrite_image_reader_writer"] = self.overwrite_image_reader_writer
        return result


def readers_of(file_ending: str) -> list[str]:
    """Names of nnU-Net's readers for images with this ending, in the order in which nnU-Net tries them."""
    return [name for name, endings in READERS.items() if file_ending.lower() in endings]


def parse(value: Any, where: str = "the study") -> Study:
    """Check a study given as plain data; raises FNU-102 that lists every fault with its field."""
    try:
        return Study.model_validate(value)
    except ValidationError as error:
        found = [f"  {line}" for line in faults(error, Study, PATTERNS)]
        if len(found) > MOST_FAULTS:
            found = [*found[:MOST_FAULTS], f"  and {len(found) - MOST_FAULTS} more"]
        raise FednnunetError(Code.STUDY_INVALID, f"{where}\n" + "\n".join(found)) from error


class _Reader(yaml.SafeLoader):
    """YAML's safe loader; it notes in `twice` each key that stands in a mapping again, where YAML takes the last.

    A value that is not what its `!!tag` says is an error with its line: PyYAML's own readers of values trip over some.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):  # 0 and "0" are one key to a study
                line = key.start_mark.line + 1
                if key.value in lines:
                    self.twice.append(f"  {key.value}: given twice, in line {lines[key.value]} and in line {line}")
                lines[key.value] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, LookupError) as error:
            said = f"this is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, said, node.start_mark) from error


def load(path: Path) -> Study:
    """Read a study file; raises FNU-101 or FNU-102."""
    try:
        reader = _Reader(path.read_text(encoding="utf-8"))
        value = reader.get_single_data()
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: bytes that are no text, 2026-13-01
        raise FednnunetError(Code.STUDY_UNREADABLE, f"{path}: {error}") from error
    except RecursionError as error:
        raise FednnunetError(Code.STUDY_UNREADABLE, f"{path}: lists or mappings in one another, too deep") from error
    if reader.twice:
        raise FednnunetError(Code.STUDY_INVALID, "\n".join([str(path), *reader.twice[:MOST_FAULTS]]))
    if not isinstance(value, dict):
        raise FednnunetError(Code.STUDY_UNREADABLE, f"{path}: it holds no keys and values")
    return parse(value, str(path))
