"""Examine a site's dataset before anything leaves, so that none takes part that is broken or does not fit the study.

Rules:

- Every problem is collected, with its number, its file and what was found; a dataset with a problem takes no part.
  There is no silent subset.
- Each case is read once. Checks and the fingerprint's statistics come from the same pass, and of a case only small
  numbers are kept.
- File names stand in the report and in the examination, which stay at the site. What may leave is a count of each
  number of the catalogue.
- Nothing is written into the dataset; it may be mounted read-only.
- An examination is worth as long as its digest (names, sizes and times of the files, and the contract) is that of the
  dataset; then the fingerprint is served from it without reading a case again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from appliance.worker import contents, reading
from appliance.worker.contents import Case, Problem
from appliance.worker.fingerprint import SiteStatistics, site_fingerprint
from federation import files, tasks
from federation.errors import Code, FednnunetError
from federation.fingerprint import SiteFingerprint
from federation.study import Study

__all__ = [
    "Case",
    "Examination",
    "Problem",
    "dataset_digest",
    "examine",
    "examine_once",
    "find_dataset",
    "load",
]

FORMAT = 1
"""Changes when an older examination must not be used any more."""
FILE = "examination.json"
REPORT = "examination.txt"
_PACKAGES = ("fednnunet", "nnunetv2", "torch", "numpy", "SimpleITK", "batchgenerators")


@dataclass
class Examination:
    """What was found in a dataset. It stays at the site."""

    folder: Path
    digest: str
    reader: str = ""
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    cases: dict[str, Case] = field(default_factory=dict)
    test_cases: dict[str, Case] = field(default_factory=dict)
    statistics: SiteStatistics = field(default_factory=lambda: SiteStatistics(1))

    @property
    def good(self) -> bool:
        """Whether the dataset may take part."""
        return not self.problems

    def require_good(self) -> None:
        """Raise the first problem, with the report as what was found."""
        if self.problems:
            raise FednnunetError(self.problems[0].code, self.report())

    def fingerprint(self, min_cases: int) -> SiteFingerprint:
        """The site's fingerprint, without reading a case again; raises the first problem, FNU-221 or FNU-223."""
        self.require_good()
        return site_fingerprint(self.statistics, min_cases)

    def failure(self) -> tasks.Failure:
        """The problems as they may leave the site: numbers and counts."""
        return tasks.Failure(problems=_counts(self.problems))

    def description(self) -> tasks.Description:
        """The answer to Describe for a good dataset; raises the first problem."""
        self.require_good()
        versions = {}
        for package in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        return tasks.Description(
            training_cases=len(self.cases),
            test_cases=len(self.test_cases),
            warnings=_counts(self.warnings),
            versions=versions,
        )

    def report(self) -> str:
        """The findings for people at the site, with file names."""
        lines = [
            f"Dataset {self.folder}",
            f"{len(self.cases)} training cases, {len(self.test_cases)} test cases with a label; "
            f"{len(self.problems)} problems, {len(self.warnings)} warnings",
        ]
        for title, findings in (("PROBLEMS", self.problems), ("WARNINGS", self.warnings)):
            if findings:
                lines += ["", title]
            for code in sorted({finding.code for finding in findings}, key=lambda code: code.number):
                lines.append(f"FNU-{code.number} {code.title}. {code.advice}")
                lines += [f"    {item.file}: {item.detail}" for item in findings if item.code is code]
        if not self.problems:
            lines += ["", "The dataset fits the study."]
        return "\n".join(lines) + "\n"

    def save(self, folder: Path) -> None:
        """Write the examination and its report into `folder`, each whole or not at all."""
        files.write_bytes(folder / REPORT, self.report().encode())
        files.write_json(
            folder / FILE,
            {
                "format": FORMAT,
                "folder": str(self.folder),
                "digest": self.digest,
                "reader": self.reader,
                "problems": [[item.code.number, item.file, item.detail] for item in self.problems],
                "warnings": [[item.code.number, item.file, item.detail] for item in self.warnings],
                "cases": _cases_to_json(self.cases),
                "test_cases": _cases_to_json(self.test_cases),
                "statistics": self.statistics.to_json(),
            },
        )


def load(folder: Path) -> Examination | None:
    """The examination saved in `folder`, or None where there is none that this version can read.

    Whether it still holds is for the caller to ask: compare its `digest` with `dataset_digest`.
    """
    try:
        value = files.read_json(folder / FILE)
        if value["format"] != FORMAT:
            return None
        return Examination(
            folder=Path(value["folder"]),
            digest=value["digest"],
            reader=value["reader"],
            problems=[Problem(Code.of(number), file, detail) for number, file, detail in value["problems"]],
            warnings=[Problem(Code.of(number), file, detail) for number, file, detail in value["warnings"]],
            cases=_cases_from_json(value["cases"]),
            test_cases=_cases_from_json(value["test_cases"]),
            statistics=SiteStatistics.from_json(value["statistics"]),
        )
    except (FileNotFoundError, KeyError, ValueError, TypeError, IndexError):
        return None


def examine_once(
    folder: Path,
    study: Study,
    processes: int,
    cache: Path,
    on_progress: Callable[[int, int], None] | None = None,
    others: Iterable[Path] = (),
) -> Examination:
    """`examine`, or what it found before where neither the dataset nor the contract has changed since.

    Parameters
    ----------
    cache : Path
        Folder for the examination and its report.
    others : iterable of Path
        Folders of other studies' examinations, which may be of the same dataset and contract.
    """
    digest = dataset_digest(folder, study)
    for place in (cache, *others):
        stored = load(place)
        if stored is not None and (stored.digest, stored.folder) == (digest, folder):
            if place != cache:
                stored.save(cache)
            return stored
    examination = examine(folder, study, processes, on_progress)
    examination.save(cache)
    return examination


def find_dataset(data: Path) -> Path:
    """The folder that holds dataset.json: `data` itself, or the only DatasetNNN_Name in it.

    Raises
    ------
    FednnunetError
        FNU-201: there is none, or more than one.
    """
    if (data / "dataset.json").is_file():
        return data
    if not data.is_dir():
        raise FednnunetError(Code.DATASET_JSON_MISSING, f"there is no folder {data}")
    inside = sorted(path for path in data.glob("Dataset[0-9][0-9][0-9]_*") if path.is_dir())
    if len(inside) == 1:
        return inside[0]
    if inside:
        names = ", ".join(path.name for path in inside)
        raise FednnunetError(
            Code.DATASET_JSON_MISSING, f"{data} holds more than one dataset: {names}; mount one of them"
        )
    hint = ""
    if any(contents.is_dicom(path) for path in sorted(data.iterdir())[:20] if path.is_file()):
        hint = "; it holds DICOM files, which have to be converted first"
    raise FednnunetError(
        Code.DATASET_JSON_MISSING, f"neither dataset.json nor a folder DatasetNNN_Name in {data}{hint}"
    )


def dataset_digest(folder: Path, study: Study) -> str:
    """SHA-256 over names, sizes and times of the dataset's files, the study's contract and nnU-Net's version."""
    entries = []
    for path in contents.all_files(folder):
        status = path.stat()
        entries.append([str(path.relative_to(folder)), status.st_size, status.st_mtime_ns])
    with contextlib.suppress(FednnunetError, OSError):
        for case in contents.listed_cases(folder, contents.dataset_json_of(folder)).values():
            for path in (*case.images, *([case.label] if case.label else [])):
                if path.is_file():
                    status = path.stat()
                    entries.append([str(path), status.st_size, status.st_mtime_ns])
    return files.sha256_json(
        {
            "format": FORMAT,
            "files": entries,
            "channel_names": study.channel_names,
            "labels": study.labels,
            "regions_class_order": study.regions_class_order,
            "file_ending": study.file_ending,
            "reader": study.overwrite_image_reader_writer,
            "accept_float_labels": study.accept_float_labels,
            "fingerprint_min_cases": study.fingerprint_min_cases,
            "five_folds": _needs_five_folds(study),
            "nnunetv2": importlib.metadata.version("nnunetv2"),
        }
    )


def examine(
    folder: Path,
    study: Study,
    processes: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> Examination:
    """Read a dataset in nnU-Net's raw format and collect every problem and the fingerprint's statistics.

    Parameters
    ----------
    folder : Path
        The folder that holds dataset.json, imagesTr, labelsTr and perhaps imagesTs and labelsTs.
    study : Study
        Its contract: channels, labels, file ending.
    processes : int
        At most this many; 1 reads in this process. Further processes are spawned only where they pay.
    on_progress : callable, optional
        Called with (cases read, cases in all) in this process. What it raises ends the examination.

    Returns
    -------
    Examination
        `cases` holds every training case, `test_cases` those of imagesTs with a label in labelsTs. Case keys are
        nnU-Net's identifiers.
    """
    examination = Examination(folder=folder, digest=dataset_digest(folder, study))
    problems = examination.problems
    channels = len(study.channel_names)
    examination.statistics = SiteStatistics(channels, study.fingerprint_min_cases)
    dataset_json: dict[str, Any] | None = None
    try:
        dataset_json = contents.dataset_json_of(folder)
    except FednnunetError as error:
        problems.append(Problem(error.code, "dataset.json", error.found))
    ending = study.file_ending
    if dataset_json is not None:
        problems += contents.contract_problems(dataset_json, study)
        if isinstance(dataset_json.get("file_ending"), str) and dataset_json["file_ending"]:
            ending = dataset_json["file_ending"]

    scan = contents.Scan(folder, ending, problems)
    training = scan.training(dataset_json)
    test = scan.test()
    other_problems, other_warnings = contents.other_files(folder, ending)
    problems += other_problems
    examination.warnings += other_warnings

    number = None if dataset_json is None else dataset_json.get("numTraining")
    if dataset_json is not None and number != len(training):
        detail = f"numTraining is {number!r}, found {len(training)} training cases"
        problems.append(Problem(Code.CASE_COUNT_DIFFERS, "dataset.json", detail))
    if not training:
        problems.append(Problem(Code.NO_CASES, "imagesTr", f"no image that ends in _0000{ending}"))
    elif len(training) < 5 and _needs_five_folds(study):
        detail = f"{len(training)} training cases, the study trains fold {study.fold}"
        problems.append(Problem(Code.TOO_FEW_CASES_FOR_FOLDS, "imagesTr", detail))
    if 0 < len(training) < study.fingerprint_min_cases:
        detail = f"{len(training)} training cases, the study asks for groups of {study.fingerprint_min_cases}"
        problems.append(Problem(Code.TOO_FEW_CASES_TO_SHARE, "imagesTr", detail))
    examination.cases = training
    examination.test_cases = {name: case for name, case in test.items() if case.label is not None}

    jobs = [
        reading.Job(folder, name, case, training=trains, channels=channels, study=study)
        for trains, cases in ((True, training), (False, test))
        for name, case in cases.items()
        if case.images or case.label
    ]
    if jobs:
        images = [path for job in jobs for path in job.case.images]
        reader = study.overwrite_image_reader_writer or reading.reader_name(ending, images)
        asked = (dataset_json or {}).get("overwrite_image_reader_writer", reader)
        if reader is None:
            detail = f"nnU-Net has no reader for {ending}"
            problems.append(Problem(Code.DATASET_JSON_INVALID, "dataset.json", detail))
        elif asked != reader:
            detail = f"overwrite_image_reader_writer is {json.dumps(asked)[:60]}, the study reads by {reader}"
            problems.append(Problem(Code.READER_DIFFERS, "dataset.json", detail))
        else:
            examination.reader = reader
            _fold(jobs, reader, processes, examination, on_progress)
    _order(problems)
    _order(examination.warnings)
    return examination


def _fold(
    jobs: list[reading.Job],
    reader: str,
    processes: int,
    examination: Examination,
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Read the cases and fold what each gave into the examination."""
    first_seen: dict[str, tuple[reading.Job, str]] = {}
    foreground: list[bool | None] = []
    for done, (job, found) in enumerate(zip(jobs, reading.read_cases(jobs, reader, processes), strict=True), start=1):
        examination.problems += found.problems
        examination.warnings += found.warnings
        for file, digest in found.digests:
            other_job, other_file = first_seen.setdefault(digest, (job, file))
            if other_job is not job:
                detail = f"the same voxels as {other_file}"
                examination.problems.append(Problem(Code.DUPLICATE_IMAGE, file, detail))
        if job.training:
            foreground.append(found.foreground)
            if found.statistics is not None:
                examination.statistics.add(found.statistics)
        if on_progress is not None:
            on_progress(done, len(jobs))
    with_foreground, groups = examination.statistics.with_foreground, examination.statistics.limit
    if foreground and all(answer is False for answer in foreground):
        detail = f"none of the {len(foreground)} labels holds anything but background"
        examination.problems.append(Problem(Code.NO_FOREGROUND, "labelsTr", detail))
    elif with_foreground < groups and not examination.problems:
        detail = f"{with_foreground} cases with foreground, the study asks for groups of {groups}"
        examination.problems.append(Problem(Code.TOO_FEW_CASES_TO_SHARE, "labelsTr", detail))


def _needs_five_folds(study: Study) -> bool:
    return study.fold != "all" and study.stop_after == "finish"


def _order(findings: list[Problem]) -> None:
    findings[:] = sorted(set(findings), key=lambda item: (item.code.number, item.file, item.detail))


def _counts(findings: Sequence[Problem]) -> list[tasks.Count]:
    counts = Counter(finding.code.number for finding in findings)
    return [tasks.Count(code=number, count=count) for number, count in sorted(counts.items())]


def _cases_to_json(cases: dict[str, Case]) -> dict[str, Any]:
    return {
        name: [[str(path) for path in case.images], None if case.label is None else str(case.label)]
        for name, case in cases.items()
    }


def _cases_from_json(value: dict[str, Any]) -> dict[str, Case]:
    return {
        name: Case(tuple(Path(image) for image in images), None if label is None else Path(label))
        for name, (images, label) in value.items()
    }
