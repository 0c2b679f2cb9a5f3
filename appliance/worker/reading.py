"""One pass over a dataset's cases: each is read once, by nnU-Net's own reader, checked, and reduced to small numbers.

Rules:

- A file that cannot be read or does not fit is a finding, not the end: the next one is read.
- Of a case only findings, digests of its images and the fingerprint's statistics leave the pass.
- A case with a finding gives no statistics; its dataset takes no part, so nothing is pooled without it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import multiprocessing
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.worker import nifti
from appliance.worker.contents import Case, Problem, is_lfs_pointer, relative, simple_itk
from appliance.worker.fingerprint import CaseStatistics, case_statistics
from federation.errors import Code
from federation.study import READER_2D, Study, readers_of

BYTES_PER_PROCESS = 200_000_000
"""A further process pays its imports (a few seconds) back on this many bytes of image files."""
SHOWN_VALUES = 12


@dataclass(frozen=True)
class Job:
    """One case to read; `channels` and `study` are the contract it is read against."""

    folder: Path
    name: str
    case: Case
    training: bool
    channels: int
    study: Study

    @property
    def nbytes(self) -> int:
        """Size of its image files."""
        return sum(path.stat().st_size for path in self.case.images if path.is_file())


@dataclass
class Found:
    """What one case gave. `foreground` is None where it cannot be said whether the label holds any."""

    name: str
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    digests: list[tuple[str, str]] = field(default_factory=list)
    statistics: CaseStatistics | None = None
    foreground: bool | None = None


def read_cases(jobs: list[Job], reader: str, processes: int) -> Iterator[Found]:
    """What each case gave, in the order of the jobs; in this process, or in as many spawned ones as pay."""
    useful = min(processes, len(jobs), 1 + sum(job.nbytes for job in jobs) // BYTES_PER_PROCESS)
    read = functools.partial(_read_case, reader=reader)
    if useful <= 1:
        yield from map(read, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(useful, mp_context=context) as pool:
        try:
            ahead = [pool.submit(read, job) for job in jobs]
            while ahead:  # a result is let go as soon as it is folded
                yield ahead.pop(0).result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def reader_name(ending: str, images: list[Path]) -> str | None:
    """Name of nnU-Net's reader for an ending: the first in its list, as in the federation's plan.

    For an ending that stands for images in two and in three dimensions it is the first that reads these.
    """
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

    fitting = readers_of(ending)
    if fitting[:1] == [READER_2D]:
        for example in [path for path in images if path.is_file() and not is_lfs_pointer(path)][:3]:
            with contextlib.suppress(RuntimeError), _silence():
                return str(determine_reader_writer_from_file_ending(ending, str(example), verbose=False).__name__)
    return fitting[0] if fitting else None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """nnU-Net's readers print what they raise; the report says it once."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@functools.cache
def _reader_instance(name: str) -> Any:
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    simple_itk().ProcessObject.GlobalWarningDisplayOff()
    return recursive_find_reader_writer_by_name(name)()


def _read_case(job: Job, reader: str) -> Found:
    """Read one case: every check on its files, and its statistics where they can be had."""
    found = Found(job.name)
    instance = _reader_instance(reader)
    images: list[NDArray[Any]] = []
    properties: list[dict[str, Any]] = []
    for path in job.case.images:
        read = _read(path, instance.read_images, job.folder, found)
        if read is not None:
            images.append(read[0])
            properties.append(read[1])
            _check_image(path, read[0], job.folder, found)
    complete = len(images) == len(job.case.images) and bool(images)
    if complete:
        complete = _check_channels(job, images, properties, found)
    label = None
    if job.case.label is not None:
        read = _read(job.case.label, functools.partial(_read_label, instance), job.folder, found)
        if read is not None:
            label = read[0]
            found.foreground = _check_label(job, reader, label, found)
            if images:
                complete &= _check_geometry(job, images[0], properties[0], label, read[1], found)
    if complete and label is not None and job.training and not found.problems:
        stacked = images[0] if len(images) == 1 else np.concatenate(images)
        images.clear()
        found.statistics = case_statistics(stacked, label, properties[0]["spacing"])
    return found


def _read_label(reader: Any, paths: list[str]) -> tuple[NDArray[Any], dict[str, Any]]:
    array, properties = reader.read_seg(paths[0])
    return array, properties


def _read(
    path: Path, read: Callable[[list[str]], tuple[NDArray[Any], dict[str, Any]]], folder: Path, found: Found
) -> tuple[NDArray[Any], dict[str, Any]] | None:
    """Read one file with nnU-Net's reader; what it cannot read is a problem."""
    name = relative(path, folder)
    if is_lfs_pointer(path):
        found.problems.append(Problem(Code.LFS_POINTER, name, f"{path.stat().st_size} bytes of text"))
        return None
    try:
        with _silence():
            array, properties = read([str(path)])
    except Exception as error:  # noqa: BLE001 - whatever a reader raises on a damaged file is the finding
        reason = " ".join(str(error).split()) or type(error).__name__
        found.problems.append(Problem(Code.FILE_UNREADABLE, name, reason[-300:]))
        return None
    if path.name.endswith((".nii", ".nii.gz")):
        try:
            not_finite = nifti.count_not_finite(path)
        except nifti.DamagedFile as error:
            found.problems.append(Problem(Code.FILE_UNREADABLE, name, str(error)))
            return None
        if not_finite:
            detail = f"{not_finite} voxels are stored as NaN or infinite"
            found.problems.append(Problem(Code.IMAGE_NOT_FINITE, name, detail))
            return None
    if array.ndim != 4 or 0 in array.shape:
        found.problems.append(Problem(Code.FILE_UNREADABLE, name, f"it holds an array of shape {array.shape}"))
        return None
    return array, properties


def _check_image(path: Path, image: NDArray[Any], folder: Path, found: Found) -> None:
    """Finite voxels, and a digest to find the same image under another name (constant images are no evidence)."""
    name = relative(path, folder)
    lowest, highest = float(image.min()), float(image.max())
    if not np.isfinite(lowest) or not np.isfinite(highest):
        bad = ~np.isfinite(image)
        detail = f"{int(bad.sum())} of {image.size} voxels are NaN or infinite"
        found.problems.append(Problem(Code.IMAGE_NOT_FINITE, name, detail))
    elif highest > lowest:
        digest = hashlib.blake2b(repr((image.shape, str(image.dtype))).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(image).data)
        found.digests.append((name, digest.hexdigest()))


def _check_channels(job: Job, images: list[NDArray[Any]], properties: list[dict[str, Any]], found: Found) -> bool:
    """Number of channels, and the same shape and spacing in all of them (as nnU-Net's readers ask: numpy.allclose)."""
    names = [relative(path, job.folder) for path in job.case.images]
    number = sum(image.shape[0] for image in images)
    before = len(found.problems)
    if number < job.channels:
        if len(images) == number:
            for channel in range(number, job.channels):
                missing = re.sub(r"_[0-9]{4}(?=\.[^/]*$)", f"_{channel:04d}", names[0])
                found.problems.append(
                    Problem(Code.CHANNEL_MISSING, missing, f"not there; the study has {job.channels} channels")
                )
        else:
            detail = f"{number} channels where the study has {job.channels}"
            found.problems.append(Problem(Code.CHANNEL_MISSING, names[0], detail))
    elif number > job.channels:
        detail = f"case {job.name} has {number} channels, the study has {job.channels}"
        found.problems.append(Problem(Code.CHANNELS_DIFFER, names[-1], detail))
    for name, image, other in zip(names[1:], images[1:], properties[1:], strict=True):
        if image.shape[1:] != images[0].shape[1:]:
            detail = f"shape {image.shape[1:]}, but {names[0]} has {images[0].shape[1:]}"
            found.problems.append(Problem(Code.SHAPES_DIFFER, name, detail))
        if not np.allclose(properties[0]["spacing"], other["spacing"]):
            detail = f"spacing {_numbers(other['spacing'])}, but {names[0]} has {_numbers(properties[0]['spacing'])}"
            found.problems.append(Problem(Code.SPACINGS_DIFFER, name, detail))
    spacing = np.array(properties[0]["spacing"], dtype=np.float64)
    if spacing.shape != (3,) or not np.all((spacing >= 1e-6) & (spacing <= 1e6)):
        detail = f"a spacing of {_numbers(properties[0]['spacing'])} mm cannot be"
        found.problems.append(Problem(Code.SPACINGS_DIFFER, names[0], detail))
    return len(found.problems) == before


def _check_geometry(
    job: Job,
    image: NDArray[Any],
    image_properties: dict[str, Any],
    label: NDArray[Any],
    label_properties: dict[str, Any],
    found: Found,
) -> bool:
    """Image and label on the same grid, as ``check_cases`` of nnU-Net's verify_dataset_integrity asks."""
    assert job.case.label is not None
    name, other = relative(job.case.label, job.folder), relative(job.case.images[0], job.folder)
    before = len(found.problems)
    if label.shape[0] != 1:
        detail = f"{label.shape[0]} channels; a label has one"
        found.problems.append(Problem(Code.SHAPES_DIFFER, name, detail))
    if label.shape[1:] != image.shape[1:]:
        detail = f"shape {label.shape[1:]}, but {other} has {image.shape[1:]}"
        found.problems.append(Problem(Code.SHAPES_DIFFER, name, detail))
    if not np.allclose(label_properties["spacing"], image_properties["spacing"]):
        detail = (
            f"spacing {_numbers(label_properties['spacing'])}, but {other} has {_numbers(image_properties['spacing'])}"
        )
        found.problems.append(Problem(Code.SPACINGS_DIFFER, name, detail))
    if len(found.problems) == before:
        for group, keys in (("sitk_stuff", ("origin", "direction")), ("nibabel_stuff", ("original_affine",))):
            for key in keys:
                if group in image_properties and not np.allclose(
                    image_properties[group][key], label_properties[group][key]
                ):
                    detail = f"another {key.replace('_', ' ')} than {other}"
                    found.warnings.append(Problem(Code.POSITION_DIFFERS, name, detail))
    return len(found.problems) == before


def _check_label(job: Job, reader: str, label: NDArray[Any], found: Found) -> bool | None:
    """Values and storage of a label. Returns whether it holds foreground; None where that cannot be said."""
    assert job.case.label is not None
    name = relative(job.case.label, job.folder)
    if not np.isfinite(label).all():
        found.problems.append(Problem(Code.IMAGE_NOT_FINITE, name, "the label holds NaN or infinite values"))
        return None
    values = _distinct(label)
    allowed = job.study.label_values()
    unknown = [value for value in values.tolist() if value not in allowed]
    whole = bool(np.all(values == np.rint(values)))
    if unknown:
        shown = ", ".join(f"{value:g}" for value in unknown[:SHOWN_VALUES])
        more = f" and {len(unknown) - SHOWN_VALUES} more" if len(unknown) > SHOWN_VALUES else ""
        if len(values) > 2 * len(allowed) + 12:
            detail = f"{len(values)} distinct values between {values[0]:g} and {values[-1]:g}"
            found.problems.append(Problem(Code.LABEL_INTERPOLATED, name, detail))
        else:
            detail = f"values {shown}{more}; the study knows {', '.join(map(str, sorted(allowed)))}"
            found.problems.append(Problem(Code.LABEL_VALUES, name, detail))
    stored = _stored_type(job.case.label, reader)
    if stored is not None and "float" in stored:
        finding = Problem(Code.LABEL_FLOAT, name, f"stored as {stored}")
        (found.warnings if whole and job.study.accept_float_labels else found.problems).append(finding)
    return bool(values[-1] > 0)


def _distinct(label: NDArray[Any]) -> NDArray[np.float64]:
    """The sorted distinct values of a label."""
    lowest, highest = float(label.min()), float(label.max())
    if lowest >= 0 and highest < 65536:
        whole = label.astype(np.uint16)
        if np.array_equal(whole, label):
            return np.flatnonzero(np.bincount(whole.ravel())).astype(np.float64)
    return np.unique(label).astype(np.float64)


def _stored_type(path: Path, reader: str) -> str | None:
    """How a label's voxels are stored, from its header alone; None where its format knows whole numbers only."""
    if reader.startswith("Nibabel"):
        import nibabel

        return str(nibabel.load(path).get_data_dtype())  # type: ignore[attr-defined]
    if reader == "SimpleITKIO":
        SimpleITK = simple_itk()
        header = SimpleITK.ImageFileReader()
        header.SetFileName(str(path))
        header.ReadImageInformation()
        return str(SimpleITK.GetPixelIDValueAsString(header.GetPixelID()))
    if path.suffix.lower() in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(path) as image:
            return str(image.series[0].dtype)
    return None


def _numbers(values: Sequence[float]) -> str:
    return "x".join(f"{float(value):g}" for value in values)
