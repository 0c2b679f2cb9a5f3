"""What lies in a dataset's folders: dataset.json and its contract, cases, and files that have no business there.

Rules:

- Only names, sizes and headers are looked at; no image is decoded.
- Cases are put together as nnU-Net puts them together, so that none is left out here that it would train on.
- Paths in findings are relative to the dataset.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from federation.errors import Code, FednnunetError
from federation.study import Study

FOLDERS = ("imagesTr", "labelsTr", "imagesTs", "labelsTs")
REQUIRED_KEYS = ("channel_names", "labels", "numTraining", "file_ending")
LFS_HEADER = b"version https://git-lfs.github.com/spec/"
LARGEST_GAP = 1.5
"""A gap between two slices of more than this many times the usual one is a missing slice."""
_SYSTEM_FILES = ("._", ".DS_Store", "Thumbs.db", "desktop.ini")


@dataclass(frozen=True)
class Problem:
    """One finding: its number, the file (relative to the dataset), and what was found there."""

    code: Code
    file: str
    detail: str


@dataclass(frozen=True)
class Case:
    """The files of one case: images in the order of the channels, and the label where there is one."""

    images: tuple[Path, ...]
    label: Path | None


def dataset_json_of(folder: Path) -> dict[str, Any]:
    """dataset.json as plain data; raises FNU-201 or FNU-202."""
    path = folder / "dataset.json"
    if not path.is_file():
        raise FednnunetError(Code.DATASET_JSON_MISSING, f"not in {folder}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FednnunetError(Code.DATASET_JSON_INVALID, f"it cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise FednnunetError(Code.DATASET_JSON_INVALID, "it holds no keys and values")
    return value


def contract_problems(dataset_json: dict[str, Any], study: Study) -> list[Problem]:
    """Differences between dataset.json and the contract."""
    problems = []
    missing = [key for key in REQUIRED_KEYS if key not in dataset_json]
    if missing:
        hint = "; `modality` is the old name of channel_names" if "modality" in dataset_json else ""
        detail = f"it lacks {', '.join(missing)}{hint}"
        problems.append(Problem(Code.DATASET_JSON_INVALID, "dataset.json", detail))
    problems += [
        Problem(Code.DATASET_JSON_INVALID, "dataset.json", f"{key} is not a table of names")
        for key in ("channel_names", "labels")
        if key in dataset_json and not isinstance(dataset_json[key], dict)
    ]
    if "dataset" in dataset_json and not _is_case_list(dataset_json["dataset"]):
        detail = "`dataset` is not a table of cases with `images` and `label`"
        problems.append(Problem(Code.DATASET_JSON_INVALID, "dataset.json", detail))
    contract: tuple[tuple[str, Code, Any], ...] = (
        ("channel_names", Code.CHANNELS_DIFFER, study.channel_names),
        ("labels", Code.LABELS_DIFFER, study.labels),
        ("file_ending", Code.FILE_ENDING_DIFFERS, study.file_ending),
    )
    if study.regions_class_order is not None:
        contract += (("regions_class_order", Code.LABELS_DIFFER, study.regions_class_order),)
    for key, code, wanted in contract:
        if key in dataset_json and dataset_json[key] != wanted:
            detail = f"{key} is {_plain(dataset_json[key])}, the study has {_plain(wanted)}"
            problems.append(Problem(code, "dataset.json", detail))
        elif key == "regions_class_order" and key not in dataset_json:
            problems.append(Problem(code, "dataset.json", f"it lacks {key}, the study has {_plain(wanted)}"))
    return problems


def _plain(value: Any) -> str:
    return json.dumps(value)[:300]


def _is_case_list(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(case, dict)
        and isinstance(case.get("label"), str)
        and isinstance(case.get("images"), list)
        and all(isinstance(image, str) for image in case["images"])
        for case in value.values()
    )


def listed_cases(folder: Path, dataset_json: dict[str, Any]) -> dict[str, Case]:
    """The cases that dataset.json lists, read as ``get_filenames_of_train_images_and_targets`` of nnU-Net does."""
    listed = dataset_json.get("dataset", {})
    if not _is_case_list(listed):
        return {}

    def resolved(name: str) -> Path:
        return Path(os.path.abspath(folder / os.path.expandvars(name)))

    return {
        str(name): Case(tuple(resolved(image) for image in case["images"]), resolved(case["label"]))
        for name, case in listed.items()
    }


def all_files(folder: Path) -> Iterator[Path]:
    """dataset.json and every file below the four folders, in order."""
    if (folder / "dataset.json").is_file():
        yield folder / "dataset.json"
    for name in FOLDERS:
        for parent, folders, names in os.walk(folder / name):
            folders.sort()
            for file in sorted(names):
                path = Path(parent, file)
                if path.exists():
                    yield path


def relative(path: Path, folder: Path) -> str:
    """The path as a finding names it."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


class Scan:
    """Put the files of a folder of images and one of labels together to cases."""

    def __init__(self, folder: Path, ending: str, problems: list[Problem]) -> None:
        self.folder = folder
        self.ending = ending
        self.problems = problems
        self.pattern = re.compile(r"(?P<case>.+)_(?P<channel>[0-9]{4})" + re.escape(ending))

    def training(self, dataset_json: dict[str, Any] | None) -> dict[str, Case]:
        """Training cases by nnU-Net's identifier; a label or an image alone is a problem."""
        if dataset_json is not None and "dataset" in dataset_json:
            return self._listed(dataset_json)
        images, labels = self._images("imagesTr"), self._labels("labelsTr")
        cases = {}
        for name in sorted(images):
            label = labels.pop(name, None)
            if label is None:
                self._add(Code.IMAGE_WITHOUT_LABEL, images[name][0], f"no labelsTr/{name}{self.ending}")
            cases[name] = Case(images[name], label)
        for path in labels.values():
            self._add(Code.LABEL_WITHOUT_IMAGE, path, "no image of this name in imagesTr")
        return cases

    def test(self) -> dict[str, Case]:
        """Images of imagesTs, with their label where labelsTs has one; a label alone is a problem."""
        images, labels = self._images("imagesTs"), self._labels("labelsTs")
        cases = {name: Case(images[name], labels.pop(name, None)) for name in sorted(images)}
        for path in labels.values():
            self._add(Code.LABEL_WITHOUT_IMAGE, path, "no image of this name in imagesTs")
        return cases

    def _listed(self, dataset_json: dict[str, Any]) -> dict[str, Case]:
        cases = {}
        for name, case in sorted(listed_cases(self.folder, dataset_json).items()):
            present = tuple(path for path in case.images if path.is_file())
            label = case.label if case.label is not None and case.label.is_file() else None
            for path in case.images:
                if not path.is_file():
                    self._add(Code.CHANNEL_MISSING, path, f"dataset.json lists it for case {name}; it is not there")
            if label is None and case.label is not None:
                self._add(
                    Code.IMAGE_WITHOUT_LABEL, case.label, f"dataset.json lists it for case {name}; it is not there"
                )
            cases[name] = Case(present if len(present) == len(case.images) else (), label)
        return cases

    def _files(self, name: str) -> list[Path]:
        folder = self.folder / name
        if not folder.is_dir():
            return []
        return sorted(path for path in folder.iterdir() if path.name.endswith(self.ending) and not path.is_dir())

    def _images(self, name: str) -> dict[str, tuple[Path, ...]]:
        found: dict[str, dict[int, Path]] = {}
        for path in self._files(name):
            match = self.pattern.fullmatch(path.name)
            if match is None:
                self._add(Code.CHANNEL_MISSING, path, f"its name lacks the channel's number (_0000{self.ending})")
            else:
                found.setdefault(match["case"], {})[int(match["channel"])] = path
        for case, channels in found.items():
            for gap in sorted(set(range(max(channels) + 1)) - set(channels)):
                missing = self.folder / name / f"{case}_{gap:04d}{self.ending}"
                self._add(Code.CHANNEL_MISSING, missing, "not there, though a later channel is")
        return {case: tuple(channels[index] for index in sorted(channels)) for case, channels in found.items()}

    def _labels(self, name: str) -> dict[str, Path]:
        return {path.name[: -len(self.ending)]: path for path in self._files(name)}

    def _add(self, code: Code, path: Path, detail: str) -> None:
        self.problems.append(Problem(code, relative(path, self.folder), detail))


def other_files(folder: Path, ending: str) -> tuple[list[Problem], list[Problem]]:
    """Problems (DICOM, missing slices, Git LFS pointers) and warnings (stray files) among the images and labels."""
    problems: list[Problem] = []
    warnings: list[Problem] = []
    series: dict[Path, list[Path]] = {}
    for path in all_files(folder):
        if path.parent == folder or (path.name.endswith(ending) and path.parent.parent == folder):
            continue
        name = relative(path, folder)
        if path.name.startswith(_SYSTEM_FILES):
            warnings.append(Problem(Code.STRAY_FILE, name, "a file of the operating system"))
        elif is_lfs_pointer(path):
            problems.append(Problem(Code.LFS_POINTER, name, f"{path.stat().st_size} bytes of text"))
        elif is_dicom(path):
            series.setdefault(path.parent, []).append(path)
        elif not (ending.startswith(".tif") and path.suffix == ".json"):  # spacing beside a TIFF is nnU-Net's own
            detail = "it lies in a folder below" if path.name.endswith(ending) else f"it does not end in {ending}"
            warnings.append(Problem(Code.STRAY_FILE, name, detail))
    for parent, paths in series.items():
        names = f"{paths[0].name}" if len(paths) == 1 else f"{paths[0].name} to {paths[-1].name}"
        detail = f"{len(paths)} DICOM files ({names})"
        problems.append(Problem(Code.DICOM_FOUND, relative(parent, folder), detail))
        problems += _slice_gaps(paths, folder)
    return problems, warnings


def _starts_with(path: Path, length: int) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(length)
    except OSError:
        return b""


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the text that Git LFS leaves in place of a file it has not fetched."""
    return _starts_with(path, len(LFS_HEADER)) == LFS_HEADER


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM, whatever its name."""
    return _starts_with(path, 132)[128:] == b"DICM"


def simple_itk() -> Any:
    """SimpleITK, whose functions carry no types."""
    return importlib.import_module("SimpleITK")


def _slice_gaps(paths: list[Path], folder: Path) -> list[Problem]:
    """Gaps between the slice positions of each DICOM series, from ImagePositionPatient along the slices' normal."""
    SimpleITK = simple_itk()
    stacks: dict[tuple[str, tuple[float, ...]], list[tuple[float, Path]]] = {}
    for path in paths:
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            reader.ReadImageInformation()
            position = [float(part) for part in reader.GetMetaData("0020|0032").split("\\")]
            direction = [float(part) for part in reader.GetMetaData("0020|0037").split("\\")]
            series = reader.GetMetaData("0020|000e")
        except (RuntimeError, ValueError):  # no image, or no slice of a stack: a segmentation, a structure set
            continue
        normal = np.cross(direction[:3], direction[3:])
        key = series, tuple(round(part, 3) for part in direction)
        stacks.setdefault(key, []).append((float(np.dot(position, normal)), path))
    problems = []
    for stack in stacks.values():
        stack.sort()
        steps = [
            (after[0] - before[0], before[1], after[1])
            for before, after in itertools.pairwise(stack)
            if after[0] - before[0] > 1e-3
        ]
        if len(steps) < 2:
            continue
        usual = float(np.median([step for step, _, _ in steps]))
        for step, before, after in steps:
            if step > LARGEST_GAP * usual:
                first, second = sorted((before, after))
                detail = (
                    f"{step:.2f} mm to {second.name} where slices lie {usual:.2f} mm apart: "
                    f"about {round(step / usual) - 1} missing between {first.name} and {second.name}"
                )
                problems.append(Problem(Code.DICOM_SLICE_MISSING, relative(first, folder), detail))
    return problems
