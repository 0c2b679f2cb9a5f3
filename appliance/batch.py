"""A folder of images and the folder of their predictions: shards, what is whole, and the summary. Imports no torch.

Layout of an output folder; the first three lines are what `nnUNetv2_predict` writes::

    CASE.nii.gz                         a prediction (the model's file ending)
    CASE.npz, CASE.pkl                  probabilities and properties, where asked for
    dataset.json, plans.json            the model's: nnU-Net's evaluation and postprocessing ask for them
    .predict/settings.json              what all of it was predicted with
    .predict/shard-0002-of-0004/        report.json, lock, partial/ (files that are being written),
                                        written.jsonl (name and SHA-256 of what it has put into the folder)
    .predict/summary.json

Rules:

- Shard I of N has the cases I, I+N, I+2N, ... of nnU-Net's sorted list, as its own -part_id has.
- A file is written in `partial`, fsynced, renamed; of a case the segmentation is renamed last. A prediction that is
  there is whole: a restart skips it and removes what lies in its own `partial`.
- All predictions of a folder were made with the same settings and the same weights, or are refused (FNU-158).
- Removed is what this command has made and nobody has changed since: a file is noted with its SHA-256 before it gets
  its name, so a kill leaves no prediction that is not noted. nnU-Net's own predictions are known by the file of
  arguments that it writes beside them. Where anything else of their kind is there, nothing is removed (FNU-158).
- The summary does not depend on who writes it: every shard that ends compares all inputs with all outputs and gathers
  all reports; it looks again after writing, so that no older summary stays over a newer one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from federation import files
from federation.errors import Code, FednnunetError

OWN = ".predict"
NNUNET_ARGUMENTS = "predict_from_raw_data_args.json"
"""What nnU-Net writes into the folder of its predictions (nnunetv2 2.8.1, `nnUNetPredictor.predict_from_files`)."""
_BESIDE = (".npz", ".pkl")
"""Endings of what lies beside a prediction where probabilities are asked for."""


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise FednnunetError(
                Code.SETTINGS_INVALID,
                f"shard {self.index} of {self.count}",
                "Shards are counted from 0: of 4 there are 0/4, 1/4, 2/4 and 3/4.",
            )

    @property
    def name(self) -> str:
        """Its folder's name."""
        return f"shard-{self.index:04d}-of-{self.count:04d}"


def shard(given: str | None, environment: Mapping[str, str] = os.environ) -> Shard:
    """The shard of `--shard I/N`, or of an Indexed Job's pod; all of it where neither says one. Raises FNU-112.

    Parameters
    ----------
    given : str or None
        `I/N`.
    environment : Mapping
        JOB_COMPLETION_INDEX is set by Kubernetes, FEDNNUNET_PREDICT_SHARDS by the chart.
    """
    where = "--shard"
    if given is None:
        index = environment.get("JOB_COMPLETION_INDEX")
        if index is None:
            return Shard(0, 1)
        where, given = "JOB_COMPLETION_INDEX/FEDNNUNET_PREDICT_SHARDS", index
        given += "/" + environment.get("FEDNNUNET_PREDICT_SHARDS", "")
    if not (match := re.fullmatch(r"(\d{1,6})/(\d{1,6})", given)):
        raise FednnunetError(Code.SETTINGS_INVALID, f"{where} {given!r}", "Write I/N, counted from 0, such as 0/4.")
    return Shard(int(match[1]), int(match[2]))


@dataclass(frozen=True)
class Case:
    """One case: its name, and its files in the order of their channels."""

    name: str
    images: tuple[Path, ...]


def cases(folder: Path, file_ending: str) -> list[Case]:
    """The cases of a folder, as nnU-Net's `create_lists_from_splitted_dataset_folder` finds them.

    Raises FNU-157 (no folder, no image) and FNU-224 (a file without a channel's number: nnU-Net would take a part of
    its name for a case).
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except OSError as error:
        raise FednnunetError(Code.NOTHING_TO_PREDICT, f"{folder}: {error.strerror}") from error
    found: dict[str, list[Path]] = {}
    pattern = re.compile(rf"(.+)_\d{{4}}{re.escape(file_ending)}", re.DOTALL)
    for name in names:
        if not name.endswith(file_ending):
            continue
        if not (match := pattern.fullmatch(name)):
            raise FednnunetError(
                Code.STRAY_FILE,
                f"{folder / name}",
                f"Name it after its channel: {name.removesuffix(file_ending)}_0000{file_ending}",
            )
        found.setdefault(match[1], []).append(folder / name)
    if not found:
        raise FednnunetError(Code.NOTHING_TO_PREDICT, f"no file *{file_ending} in {folder}")
    return [Case(name, tuple(images)) for name, images in sorted(found.items())]


class PredictionSettings(BaseModel):
    """What the predictions of one output folder have in common."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """SHA-256 over plans, dataset.json and the checkpoints of the folds that are used."""
    name: str
    """TRAINER__PLANS__CONFIGURATION."""
    folds: tuple[str, ...]
    checkpoint: str
    mirroring: bool
    step_size: float
    probabilities: bool
    previous_stage: str | None
    channels: int
    file_ending: str
    nnunetv2: str


class Failure(BaseModel):
    """A case that could not be predicted, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    case: str
    code: int
    reason: str


class Report(BaseModel):
    """What one shard did in its last life.

    Attributes
    ----------
    index, count : int
        The shard.
    predicted, skipped : int
        Cases that it predicted, and that were whole before.
    failures : tuple of Failure
        Cases that it could not predict.
    seconds : dict
        `start` (imports, model), `preprocess`, `predict`, `export` (sums over cases), `total`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    index: int
    count: int
    predicted: int
    skipped: int
    failures: tuple[Failure, ...]
    seconds: dict[str, float]


class Summary(BaseModel):
    """How a whole batch stands.

    Attributes
    ----------
    complete : bool
        Every input has an output.
    cases, whole : int
        Inputs, and those with an output.
    missing : tuple of str
        Cases without an output.
    failures : tuple of Failure
        Of these, the ones whose reason a shard has told.
    shards : tuple of Report
        What the shards told, in their order.
    silent_shards : tuple of int
        Those that have told nothing yet.
    seconds : dict
        Sums over the shards.
    settings : PredictionSettings
        What all was predicted with.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    complete: bool
    cases: int
    whole: int
    missing: tuple[str, ...]
    failures: tuple[Failure, ...]
    shards: tuple[Report, ...]
    silent_shards: tuple[int, ...]
    seconds: dict[str, float]
    settings: PredictionSettings


class Outputs:
    """An output folder.

    Parameters
    ----------
    folder : Path
        Where the predictions go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.own = folder, folder / OWN

    def shard(self, part: Shard) -> Path:
        """A shard's folder."""
        return self.own / part.name

    def partial(self, part: Shard) -> Path:
        """Where a shard's files are written."""
        return self.shard(part) / "partial"

    def whole(self, case: str, settings: PredictionSettings) -> bool:
        """Whether a case's prediction is there."""
        return (self.folder / f"{case}{settings.file_ending}").is_file()

    def settings(self) -> PredictionSettings:
        """What the folder was predicted with; raises FNU-157 where nothing was begun."""
        try:
            return PredictionSettings.model_validate_json((self.own / "settings.json").read_bytes())
        except (OSError, ValidationError) as error:
            raise FednnunetError(
                Code.NOTHING_TO_PREDICT,
                f"{self.folder} is not an output folder of `appliance predict`",
                "Give the --output of a prediction that has begun.",
            ) from error

    def agree(
        self, settings: PredictionSettings, overwrite: bool, model: Mapping[str, bytes], names: Collection[str]
    ) -> None:
        """Make the folder one of these settings; raises FNU-158 where it holds predictions made otherwise.

        Parameters
        ----------
        settings : PredictionSettings
            What the folder is to be predicted with.
        overwrite : bool
            Remove what this command has predicted otherwise, and what `nnUNetv2_predict` has predicted of the cases.
            Where any other file of that kind is there, nothing is removed.
        model : Mapping
            The files that nnU-Net's evaluation asks for, by name.
        names : Collection of str
            The cases.
        """
        path = self.own / "settings.json"
        if not self.own.exists() and not self._by_nnunet:
            self._refuse_other(model)
        with files.disk_errors(self.folder):
            self.own.mkdir(parents=True, exist_ok=True)
        with files.locked(self.own / "settings.lock"):
            kinds = {settings.file_ending}
            if path.is_file():
                there = self.settings()
                if there == settings:
                    return
                different = [name for name, value in settings if value != getattr(there, name)]
                if not overwrite:
                    raise FednnunetError(Code.PREDICTED_OTHERWISE, f"{self.folder}: other {', '.join(different)}")
                kinds.add(there.file_ending)
            predicted = self._predicted(kinds, settings.probabilities, names)
            if predicted and not overwrite:
                raise FednnunetError(Code.PREDICTED_OTHERWISE, f"{predicted[0]} was not made with these settings")
            self._clear(predicted)
            for name, data in model.items():
                files.write_bytes(self.folder / name, data)
            files.write_bytes(path, settings.model_dump_json(indent=1).encode())

    @property
    def _by_nnunet(self) -> bool:
        """Whether nnU-Net's own prediction has written into the folder."""
        return (self.folder / NNUNET_ARGUMENTS).is_file()

    def _refuse_other(self, model: Mapping[str, bytes]) -> None:
        """Raise FNU-158 where a file of the model would take the place of another: that of a raw dataset."""
        for name, data in model.items():
            path = self.folder / name
            if os.path.lexists(path) and not (path.is_file() and path.read_bytes() == data):
                raise FednnunetError(
                    Code.PREDICTED_OTHERWISE,
                    f"{path} is not the model's: it describes something else",
                    "Give a folder of its own.",
                )

    def _predicted(self, kinds: Collection[str], probabilities: bool, names: Collection[str]) -> list[Path]:
        """Every prediction in the folder, nnU-Net's arguments last; raises FNU-158 where a file of the kind is none.

        Parameters
        ----------
        kinds : Collection of str
            The predictions' file endings.
        probabilities : bool
            Whether files of probabilities are to be written.
        names : Collection of str
            The cases.
        """
        noted, by_nnunet = self._noted(), self._by_nnunet
        of_cases = {f"{name}{ending}" for name in names for ending in (*kinds, *_BESIDE)}
        found = {path for kind in kinds for path in self.folder.glob(f"*{kind}")}
        found |= {path for name in noted if os.path.lexists(path := self.folder / name)}
        if probabilities or by_nnunet:
            found |= {path for name in of_cases if os.path.lexists(path := self.folder / name)}
        for path in sorted(found):
            whole = path.is_file() and not path.is_symlink()
            unchanged = whole and path.name in noted and files.sha256_of(path) in noted[path.name]
            if unchanged or (whole and by_nnunet and path.name in of_cases):
                continue
            if path.name in noted:
                why = "was changed since `appliance predict` made it"
            elif path.name in of_cases:
                why = "is not noted as made by `appliance predict`"
            else:
                why = "is of no case of the input, and not noted as made by `appliance predict`"
            raise FednnunetError(
                Code.PREDICTED_OTHERWISE,
                f"{path} {why}",
                "Give another folder, or move it elsewhere: it may be somebody's work, and is not removed.",
            )
        return sorted(found) + [self.folder / NNUNET_ARGUMENTS] * by_nnunet

    def _clear(self, predicted: Sequence[Path]) -> None:
        """Remove predictions, then what says whose they are: cut off in between, the next start goes on with it."""
        with files.disk_errors(self.folder):
            for path in predicted:
                path.unlink(missing_ok=True)
            files.sync_directory(self.folder)
            (self.own / "settings.json").unlink(missing_ok=True)
            for path in self.own.glob("shard-*"):
                shutil.rmtree(path)
            (self.own / "summary.json").unlink(missing_ok=True)

    def _noted(self) -> dict[str, set[str]]:
        """The files that all shards have put into the folder, by name, with the SHA-256 of each of their states."""
        found = defaultdict[str, set[str]](set)
        for path in self.own.glob("shard-*/written.jsonl"):
            for line in path.read_bytes().splitlines():
                try:
                    note = json.loads(line)
                except ValueError:  # a kill or a full disk cut the line off: its file never got its name
                    continue
                found[note["name"]].add(note["sha256"])
        return found

    def _note(self, part: Shard, written: Collection[Path]) -> None:
        """Write down durably what is about to be put into the folder."""
        lines = [json.dumps({"name": path.name, "sha256": files.sha256_of(path)}) for path in written]
        path = self.shard(part) / "written.jsonl"
        with files.disk_errors(path), open(path, "ab") as stream:
            stream.write(b"\n" + "\n".join(lines).encode() + b"\n")  # first: the line before may be cut off
            stream.flush()
            os.fsync(stream.fileno())
            files.sync_directory(path.parent)

    def keep(self, part: Shard, case: str, settings: PredictionSettings) -> None:
        """Put a case's finished files into the folder: fsynced, noted, renamed, the segmentation last."""
        endings = [*(_BESIDE if settings.probabilities else ()), settings.file_ending]
        written = [self.partial(part) / f"{case}{ending}" for ending in endings]
        with files.disk_errors(self.folder):
            for path in written:
                files.sync_file(path)
            self._note(part, written)
            for path in written:
                os.replace(path, self.folder / path.name)
                files.sync_directory(self.folder)

    def report(self, report: Report) -> None:
        """Write a shard's report."""
        path = self.shard(Shard(report.index, report.count)) / "report.json"
        files.write_bytes(path, report.model_dump_json(indent=1).encode())

    def summarise(self, inputs: Path, part: Shard) -> Summary:
        """Compare inputs with outputs, gather the reports of all shards, write the summary."""
        settings = self.settings()
        own = self.shard(part) / "summary.json"  # process numbers are the same in several pods, names of shards are not
        while True:
            told = self._told(part.count)
            summary = self._add_up(inputs, settings, told, part.count)
            files.write_bytes(own, summary.model_dump_json(indent=1).encode())
            with files.disk_errors(self.own):
                os.replace(own, self.own / "summary.json")
            if self._told(part.count) == told:
                return summary

    def look(self, inputs: Path) -> Summary:
        """The same without writing, for the shards that reported last."""
        settings = self.settings()
        reports = sorted(self.own.glob("shard-*/report.json"), key=lambda path: path.stat().st_mtime_ns)
        count = int(reports[-1].parent.name.rpartition("-")[2]) if reports else 1
        return self._add_up(inputs, settings, self._told(count), count)

    def _told(self, count: int) -> dict[int, bytes]:
        found = {}
        for index in range(count):
            try:
                found[index] = (self.shard(Shard(index, count)) / "report.json").read_bytes()
            except FileNotFoundError:
                continue
        return found

    def _add_up(self, inputs: Path, settings: PredictionSettings, told: dict[int, bytes], count: int) -> Summary:
        reports = [Report.model_validate_json(data) for _, data in sorted(told.items())]
        names = [case.name for case in cases(inputs, settings.file_ending)]
        missing = tuple(name for name in names if not self.whole(name, settings))
        keys = sorted({key for report in reports for key in report.seconds})
        return Summary(
            complete=not missing,
            cases=len(names),
            whole=len(names) - len(missing),
            missing=missing,
            failures=tuple(each for report in reports for each in report.failures if each.case in missing),
            shards=tuple(reports),
            silent_shards=tuple(index for index in range(count) if index not in told),
            seconds={key: round(sum(report.seconds.get(key, 0.0) for report in reports), 3) for key in keys},
            settings=settings,
        )


def table(summary: Summary) -> list[str]:
    """A summary for people: TAB between."""
    count = len(summary.shards) + len(summary.silent_shards)
    lines = ["shard\tpredicted\tskipped\tfailed\tseconds\tof these start-up"]
    for each in summary.shards:
        took = each.seconds
        row = (f"{each.index}/{each.count}", each.predicted, each.skipped, len(each.failures))
        lines.append("\t".join((*map(str, row), f"{took.get('total', 0):.1f}", f"{took.get('start', 0):.1f}")))
    lines += [f"{index}/{count}\t-\t-\t-\tnot ended yet\t-" for index in summary.silent_shards]
    lines += [f"failed\t{each.case}\tFNU-{each.code}\t{each.reason}" for each in summary.failures]
    unexplained = sorted(set(summary.missing) - {each.case for each in summary.failures})
    lines += [f"missing\t{name}" for name in unexplained[:20]]
    if len(unexplained) > 20:
        lines.append(f"missing\tand {len(unexplained) - 20} more")
    lines.append(f"{summary.whole} of {summary.cases} cases have a prediction")
    return lines


def require_complete(summary: Summary) -> None:
    """Raise FNU-411 unless every input has an output."""
    if not summary.complete:
        shown = ", ".join(summary.missing[:5]) + (", ..." if len(summary.missing) > 5 else "")
        raise FednnunetError(Code.NOT_ALL_PREDICTED, f"{len(summary.missing)} of {summary.cases}: {shown}")


def mine(everything: Sequence[Case], part: Shard) -> list[Case]:
    """A shard's cases."""
    return list(everything[part.index :: part.count])
