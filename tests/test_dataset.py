"""Examination of a site's dataset: every fault has its number and its file, and nothing is left out in silence."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io as skimage_io

from appliance.worker import dataset, reading
from federation import study as studies
from federation import tasks
from federation.errors import Code, FednnunetError
from federation.study import Study

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def make_study(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "name": "faults",
        "dataset": "Dataset501_Faults",
        "sites": ["here"],
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1, "tumour": 2},
        "fold": "all",
    }
    return studies.parse(values | changes)


def write(path: Path, array: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 2.0), **geometry: Any) -> None:
    """Write an array (z, y, x) as an image file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        skimage_io.imsave(path, array, check_contrast=False)
        return
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    if "origin" in geometry:
        image.SetOrigin(geometry["origin"])
    sitk.WriteImage(image, str(path))


def image_of(seed: int, shape: tuple[int, ...] = (6, 8, 10)) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def label_of(shape: tuple[int, ...] = (6, 8, 10), dtype: Any = np.uint8) -> np.ndarray:
    label = np.zeros(shape, dtype)
    label[..., 2:6, 2:6] = 1
    label[..., 3:4, 3:4] = 2
    return label


def write_dataset_json(folder: Path, study: Study, cases: int, **changes: Any) -> None:
    content: dict[str, Any] = {**study.dataset_json(cases), **changes}
    (folder / "dataset.json").write_text(json.dumps({key: value for key, value in content.items() if value != "-"}))


def make_dataset(folder: Path, study: Study | None = None, cases: int = 5) -> Path:
    """A good dataset: `cases` training cases (case_0 ...) and one test case with a label."""
    study = study or make_study()
    ending = study.file_ending
    for number in range(cases + 1):
        images, labels, name = (
            ("imagesTr", "labelsTr", f"case_{number}") if number < cases else ("imagesTs", "labelsTs", "test_0")
        )
        for channel in range(len(study.channel_names)):
            array = image_of(10 * number + channel)
            if ending == ".png":
                array = array[0].astype(np.uint8)
            write(folder / images / f"{name}_{channel:04d}{ending}", array)
        write(folder / labels / f"{name}{ending}", label_of()[0] if ending == ".png" else label_of())
    write_dataset_json(folder, study, cases)
    return folder


def test_all_sites_read_by_one_reader(folder: Path) -> None:
    """The order of the axes is the reader's: a fingerprint by another one than the plan's would turn the spacing."""
    turning = make_study(overwrite_image_reader_writer="NibabelIOWithReorient")
    assert dataset.examine(folder, turning, 1).reader == "NibabelIOWithReorient"
    assert dataset.dataset_digest(folder, turning) != dataset.dataset_digest(folder, make_study())
    write_dataset_json(folder, turning, 5)
    assert dataset.examine(folder, turning, 1).good
    (problem,) = dataset.examine(folder, make_study(), 1).problems
    assert (problem.code, problem.file) == (Code.READER_DIFFERS, "dataset.json")
    assert "NibabelIOWithReorient" in problem.detail
    write_dataset_json(folder, make_study(), 5, overwrite_image_reader_writer="SimpleITKIO")
    assert dataset.examine(folder, make_study(), 1).good, "what nnU-Net would take anyway"


def findings(examination: dataset.Examination) -> set[tuple[Code, str]]:
    return {(problem.code, problem.file) for problem in examination.problems}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good dataset to spoil."""
    return make_dataset(tmp_path / "Dataset501_Faults")


# good datasets


def test_a_good_dataset_has_no_finding_and_gives_a_fingerprint(folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    examination = dataset.examine(folder, make_study(), 1, lambda *step: steps.append(step))
    assert examination.problems == examination.warnings == []
    assert steps == [(number, 6) for number in range(1, 7)]
    assert (len(examination.cases), list(examination.test_cases)) == (5, ["test_0"])
    assert examination.reader == "SimpleITKIO"
    assert examination.fingerprint(1).n_cases == 5
    description = examination.description()
    assert (description.training_cases, description.test_cases) == (5, 1)
    assert description.versions["nnunetv2"]


def test_statistics_are_those_of_nnunets_own_reading(folder: Path) -> None:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    fingerprint = dataset.examine(folder, make_study(), 1).fingerprint(1)
    shapes, spacings, means = [], [], []
    for number in range(5):
        shape, spacing, _, intensities, _ = DatasetFingerprintExtractor.analyze_case(
            [str(folder / f"imagesTr/case_{number}_0000.nii.gz")],
            str(folder / f"labelsTr/case_{number}.nii.gz"),
            SimpleITKIO,
            100,
        )
        shapes.append(tuple(shape))
        spacings.append(tuple(spacing))
        means.append(intensities[0]["mean"])
    assert {entry.shape for entry in fingerprint.geometry} == set(shapes)
    assert {entry.spacing for entry in fingerprint.geometry} == set(spacings)
    from federation.fingerprint import moments

    assert moments(fingerprint, 0)[0] == pytest.approx(np.mean(means), rel=1e-6)


def test_spawned_processes_find_what_one_process_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BYTES_PER_PROCESS", 1)
    write(folder / "labelsTr/case_3.nii.gz", label_of() * 3)
    alone, together = (dataset.examine(folder, make_study(), processes) for processes in (1, 2))
    assert together.problems == alone.problems != []
    assert together.statistics.to_json() == alone.statistics.to_json()


def test_what_progress_raises_ends_the_examination(folder: Path) -> None:
    class Cancelled(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        dataset.examine(folder, make_study(), 1, stop)


def test_an_examination_is_served_from_its_cache_until_the_dataset_changes(folder: Path, tmp_path: Path) -> None:
    study, cache = make_study(), tmp_path / "cache"
    first = dataset.examine_once(folder, study, 1, cache)
    reads: list[int] = []
    again = dataset.examine_once(folder, study, 1, cache, lambda done, _: reads.append(done))
    assert reads == []
    assert again.fingerprint(1) == first.fingerprint(1)
    assert again.cases == first.cases
    assert again.test_cases == first.test_cases
    other = tmp_path / "other"  # of another study
    dataset.examine_once(folder, study, 1, other, lambda done, _: reads.append(done), [tmp_path / "none", cache])
    assert reads == []
    assert (other / dataset.REPORT).read_text() == (cache / dataset.REPORT).read_text()
    copied = shutil.copytree(folder, tmp_path / "copy")
    assert dataset.dataset_digest(copied, study) == dataset.dataset_digest(folder, study)
    dataset.examine_once(copied, study, 1, tmp_path / "third", lambda done, _: reads.append(done), [cache])
    assert reads != [], "its images lie elsewhere"
    reads.clear()
    (folder / "labelsTr/case_1.nii.gz").unlink()
    assert not dataset.examine_once(folder, study, 1, cache).good
    assert "labelsTr/case_1" in (cache / dataset.REPORT).read_text()
    os.utime(folder / "dataset.json", ns=(1, 1))
    dataset.examine_once(folder, study, 1, cache, lambda done, _: reads.append(done))
    assert reads != []


def test_another_contract_is_another_examination(folder: Path) -> None:
    digest = dataset.dataset_digest(folder, make_study())
    assert dataset.dataset_digest(folder, make_study(rounds=7)) == digest
    assert dataset.dataset_digest(folder, make_study(accept_float_labels=True)) != digest


def test_a_damaged_cache_is_no_cache(folder: Path, tmp_path: Path) -> None:
    dataset.examine_once(folder, make_study(), 1, tmp_path / "cache")
    (tmp_path / "cache" / dataset.FILE).write_text("{")
    assert dataset.load(tmp_path / "cache") is None


def test_a_cache_that_does_not_say_what_was_cut_is_read_anew(folder: Path, tmp_path: Path) -> None:
    """As an older version has written it: the percentiles' bounds would have to be taken for unknown."""
    first = dataset.examine_once(folder, make_study(), 1, tmp_path / "cache")
    stored = json.loads((tmp_path / "cache" / dataset.FILE).read_text())
    for channel in stored["statistics"]["channels"]:
        del channel["cut"]
    (tmp_path / "cache" / dataset.FILE).write_text(json.dumps(stored))
    reads: list[int] = []
    again = dataset.examine_once(folder, make_study(), 1, tmp_path / "cache", lambda done, _: reads.append(done))
    assert reads != []
    assert again.fingerprint(1) == first.fingerprint(1)


def test_two_channels_are_read_as_one_case(tmp_path: Path) -> None:
    study = make_study(channel_names={"0": "T1", "1": "T2"})
    examination = dataset.examine(make_dataset(tmp_path / "d", study), study, 1)
    assert examination.good
    assert len(examination.fingerprint(1).channels) == 2


def test_natural_images_are_read_with_their_own_reader(tmp_path: Path) -> None:
    study = make_study(file_ending=".png", channel_names={"0": "xray"})
    examination = dataset.examine(make_dataset(tmp_path / "d", study), study, 1)
    assert examination.problems == []
    assert examination.reader == "NaturalImage2DIO"
    assert examination.fingerprint(1).geometry[0].spacing == (999.0, 1.0, 1.0)


def test_three_colours_in_one_file_are_three_channels(tmp_path: Path) -> None:
    study = make_study(file_ending=".png", channel_names={"0": "R", "1": "G", "2": "B"})
    folder = make_dataset(tmp_path / "d", study)
    for path in [*folder.glob("images*/*_0001.png"), *folder.glob("images*/*_0002.png")]:
        path.unlink()
    for number, path in enumerate(sorted(folder.glob("images*/*.png"))):
        write(path, np.random.default_rng(number).integers(0, 255, (8, 10, 3)).astype(np.uint8))
    examination = dataset.examine(folder, study, 1)
    assert examination.problems == []
    assert len(examination.fingerprint(1).channels) == 3


def test_cases_that_dataset_json_lists_are_examined(folder: Path, tmp_path: Path) -> None:
    listed = {
        f"p{number}": {
            "images": [f"imagesTr/case_{number}_0000.nii.gz"],
            "label": str(folder / f"labelsTr/case_{number}.nii.gz"),
        }
        for number in range(5)
    }
    write_dataset_json(folder, make_study(), 5, dataset=listed)
    examination = dataset.examine(folder, make_study(), 1)
    assert examination.good
    assert sorted(examination.cases) == sorted(listed)
    listed["p1"]["label"] = "labelsTr/nobody.nii.gz"
    listed["p2"]["images"] = ["imagesTr/nobody_0000.nii.gz"]
    write_dataset_json(folder, make_study(), 5, dataset=listed)
    assert findings(dataset.examine(folder, make_study(), 1)) == {
        (Code.IMAGE_WITHOUT_LABEL, "labelsTr/nobody.nii.gz"),
        (Code.CHANNEL_MISSING, "imagesTr/nobody_0000.nii.gz"),
    }


def test_the_dataset_is_found_in_the_mount_point(folder: Path, tmp_path: Path) -> None:
    assert dataset.find_dataset(folder) == folder
    assert dataset.find_dataset(tmp_path) == folder
    (tmp_path / "Dataset502_Other").mkdir()
    for place in (tmp_path, tmp_path / "Dataset502_Other", tmp_path / "nowhere"):
        with pytest.raises(FednnunetError) as error:
            dataset.find_dataset(place)
        assert error.value.code is Code.DATASET_JSON_MISSING


# one fault each


def change(**keys: Any) -> Callable[[Path], None]:
    return lambda folder: write_dataset_json(folder, make_study(), 5, **keys)


def float_label(folder: Path) -> None:
    write(folder / "labelsTr/case_1.nii.gz", label_of(dtype=np.float32))


def not_finite(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        image = image_of(99)
        image[1, 2, 3] = value
        write(folder / "imagesTr/case_1_0000.nii.gz", image)

    return spoil


def interpolated(folder: Path) -> None:
    write(folder / "labelsTr/case_1.nii.gz", np.linspace(0, 255, 480).astype(np.uint8).reshape(6, 8, 10))


def truncated(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return spoil


def no_foreground(folder: Path) -> None:
    for path in folder.glob("labels*/*"):
        write(path, np.zeros((6, 8, 10), np.uint8))


def no_cases(folder: Path) -> None:
    for name in ("imagesTr", "labelsTr"):
        shutil.rmtree(folder / name)


def dicom(folder: Path) -> None:
    write_dicom_series(folder / "imagesTr" / "patient", range(6))


def dicom_with_a_gap(folder: Path) -> None:
    write_dicom_series(folder / "imagesTr" / "patient", (0, 1, 2, 4, 5, 6))


def write_dicom_series(folder: Path, slices: Any) -> None:
    """A real DICOM series, 3 mm between slices."""
    folder.mkdir(parents=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for number in slices:
        image = sitk.GetImageFromArray(np.full((1, 8, 8), number, np.int16))
        for key, value in {
            "0008|0060": "CT",
            "0020|000e": "1.2.826.0.1.3680043.2.1125.1",
            "0020|000d": "1.2.826.0.1.3680043.2.1125.2",
            "0008|0018": f"1.2.826.0.1.3680043.2.1125.3.{number}",
            "0020|0032": f"0\\0\\{3 * number}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0020|0013": str(number),
        }.items():
            image.SetMetaData(key, value)
        writer.SetFileName(str(folder / f"slice_{number:02d}.dcm"))
        writer.Execute(image)


FAULTS: dict[str, tuple[Callable[[Path], Any], set[tuple[Code, str]]]] = {
    "dataset.json is missing": (
        lambda folder: (folder / "dataset.json").unlink(),
        {(Code.DATASET_JSON_MISSING, "dataset.json")},
    ),
    "dataset.json is no JSON": (
        lambda folder: (folder / "dataset.json").write_text("{"),
        {(Code.DATASET_JSON_INVALID, "dataset.json")},
    ),
    "dataset.json lacks a key": (change(labels="-"), {(Code.DATASET_JSON_INVALID, "dataset.json")}),
    "other channel": (change(channel_names={"0": "CT"}), {(Code.CHANNELS_DIFFER, "dataset.json")}),
    "other labels": (change(labels={"background": 0, "organ": 1}), {(Code.LABELS_DIFFER, "dataset.json")}),
    "other numTraining": (change(numTraining=9), {(Code.CASE_COUNT_DIFFERS, "dataset.json")}),
    "other ending in dataset.json": (
        change(file_ending=".nrrd", numTraining=0),
        {(Code.FILE_ENDING_DIFFERS, "dataset.json"), (Code.NO_CASES, "imagesTr")},
    ),
    "image without label": (
        lambda folder: (folder / "labelsTr/case_1.nii.gz").unlink(),
        {(Code.IMAGE_WITHOUT_LABEL, "imagesTr/case_1_0000.nii.gz")},
    ),
    "label without image": (
        lambda folder: write(folder / "labelsTr/other.nii.gz", label_of()),
        {(Code.LABEL_WITHOUT_IMAGE, "labelsTr/other.nii.gz")},
    ),
    "test label without image": (
        lambda folder: (folder / "imagesTs/test_0_0000.nii.gz").unlink(),
        {(Code.LABEL_WITHOUT_IMAGE, "labelsTs/test_0.nii.gz")},
    ),
    "image without a channel number": (
        lambda folder: write(folder / "imagesTr/case_9.nii.gz", image_of(9)),
        {(Code.CHANNEL_MISSING, "imagesTr/case_9.nii.gz")},
    ),
    "one channel too many": (
        lambda folder: write(folder / "imagesTr/case_1_0001.nii.gz", image_of(77)),
        {(Code.CHANNELS_DIFFER, "imagesTr/case_1_0001.nii.gz")},
    ),
    "damaged image": (
        truncated("imagesTr/case_1_0000.nii.gz"),
        {(Code.FILE_UNREADABLE, "imagesTr/case_1_0000.nii.gz")},
    ),
    "damaged label": (truncated("labelsTr/case_1.nii.gz"), {(Code.FILE_UNREADABLE, "labelsTr/case_1.nii.gz")}),
    "damaged first image": (
        truncated("imagesTr/case_0_0000.nii.gz"),
        {(Code.FILE_UNREADABLE, "imagesTr/case_0_0000.nii.gz")},
    ),
    "empty file": (
        lambda folder: (folder / "imagesTr/case_1_0000.nii.gz").write_bytes(b""),
        {(Code.FILE_UNREADABLE, "imagesTr/case_1_0000.nii.gz")},
    ),
    "text under an image's name": (
        lambda folder: (folder / "imagesTr/case_1_0000.nii.gz").write_bytes(gzip.compress(b"not found")),
        {(Code.FILE_UNREADABLE, "imagesTr/case_1_0000.nii.gz")},
    ),
    "Git LFS pointer": (
        lambda folder: (folder / "imagesTr/case_1_0000.nii.gz").write_bytes(LFS_POINTER),
        {(Code.LFS_POINTER, "imagesTr/case_1_0000.nii.gz")},
    ),
    "Git LFS pointer of another format": (
        lambda folder: (folder / "imagesTr/case_1.mha").write_bytes(LFS_POINTER),
        {(Code.LFS_POINTER, "imagesTr/case_1.mha")},
    ),
    "label of another shape": (
        lambda folder: write(folder / "labelsTr/case_1.nii.gz", label_of((6, 8, 9))),
        {(Code.SHAPES_DIFFER, "labelsTr/case_1.nii.gz")},
    ),
    "label of another spacing": (
        lambda folder: write(folder / "labelsTr/case_1.nii.gz", label_of(), (1.0, 1.0, 2.01)),
        {(Code.SPACINGS_DIFFER, "labelsTr/case_1.nii.gz")},
    ),
    "unknown label values": (
        lambda folder: write(folder / "labelsTr/case_1.nii.gz", label_of() * 125),
        {(Code.LABEL_VALUES, "labelsTr/case_1.nii.gz")},
    ),
    "interpolated label": (interpolated, {(Code.LABEL_INTERPOLATED, "labelsTr/case_1.nii.gz")}),
    "float label": (float_label, {(Code.LABEL_FLOAT, "labelsTr/case_1.nii.gz")}),
    "float label between the values": (
        lambda folder: write(folder / "labelsTr/case_1.nii.gz", label_of(dtype=np.float32) / 2),
        {(Code.LABEL_FLOAT, "labelsTr/case_1.nii.gz"), (Code.LABEL_VALUES, "labelsTr/case_1.nii.gz")},
    ),
    "NaN in an image": (not_finite(np.nan), {(Code.IMAGE_NOT_FINITE, "imagesTr/case_1_0000.nii.gz")}),
    "infinite voxel in an image": (not_finite(np.inf), {(Code.IMAGE_NOT_FINITE, "imagesTr/case_1_0000.nii.gz")}),
    "same image twice": (
        lambda folder: write(folder / "imagesTr/case_1_0000.nii.gz", image_of(0)),
        {(Code.DUPLICATE_IMAGE, "imagesTr/case_1_0000.nii.gz")},
    ),
    "same image in test and training": (
        lambda folder: write(folder / "imagesTs/test_0_0000.nii.gz", image_of(0)),
        {(Code.DUPLICATE_IMAGE, "imagesTs/test_0_0000.nii.gz")},
    ),
    "DICOM series": (dicom, {(Code.DICOM_FOUND, "imagesTr/patient")}),
    "DICOM series with a gap": (
        dicom_with_a_gap,
        {(Code.DICOM_FOUND, "imagesTr/patient"), (Code.DICOM_SLICE_MISSING, "imagesTr/patient/slice_02.dcm")},
    ),
    "no cases": (no_cases, {(Code.NO_CASES, "imagesTr"), (Code.CASE_COUNT_DIFFERS, "dataset.json")}),
    "no foreground": (no_foreground, {(Code.NO_FOREGROUND, "labelsTr")}),
}


@pytest.mark.parametrize(("spoil", "expected"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_has_its_number_and_its_file(
    spoil: Callable[[Path], Any], expected: set[tuple[Code, str]], folder: Path
) -> None:
    spoil(folder)
    examination = dataset.examine(folder, make_study(), 1)
    assert findings(examination) == expected
    for _, file in expected:
        assert file in examination.report()
    with pytest.raises(FednnunetError):
        examination.fingerprint(1)


def test_all_faults_are_reported_at_once_and_only_their_numbers_leave(folder: Path) -> None:
    truncated("imagesTr/case_0_0000.nii.gz")(folder)
    not_finite(np.nan)(folder)
    write(folder / "labelsTr/case_2.nii.gz", label_of() * 9)
    write(folder / "labelsTr/case_3.nii.gz", label_of() * 9)
    examination = dataset.examine(folder, make_study(), 1)
    assert {problem.code for problem in examination.problems} == {
        Code.FILE_UNREADABLE,
        Code.IMAGE_NOT_FINITE,
        Code.LABEL_VALUES,
    }
    leaving = examination.failure()
    assert leaving.problems == [
        tasks.Count(code=210, count=1),
        tasks.Count(code=214, count=2),
        tasks.Count(code=217, count=1),
    ]
    assert "case" not in leaving.model_dump_json()


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("part", ["end", "middle"])
def test_what_itk_fills_with_zeros_in_silence_is_found(ending: str, part: str, tmp_path: Path) -> None:
    study = make_study(file_ending=ending)
    folder = make_dataset(tmp_path / "d", study)
    path = folder / f"imagesTr/case_1_0000{ending}"
    data = bytearray(path.read_bytes())
    if part == "end":
        del data[-40:]
    elif ending == ".nii.gz":  # an uncompressed file has no checksum
        data[1000:1004] = bytes(byte ^ 0x55 for byte in data[1000:1004])
    else:
        data[1000:1004] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    code = Code.IMAGE_NOT_FINITE if (part, ending) == ("middle", ".nii") else Code.FILE_UNREADABLE
    assert findings(dataset.examine(folder, study, 1)) == {(code, f"imagesTr/{path.name}")}


def test_gap_in_a_dicom_series_names_the_files_on_both_sides(folder: Path) -> None:
    dicom_with_a_gap(folder)
    report = dataset.examine(folder, make_study(), 1).report()
    assert "1 missing between slice_02.dcm and slice_04.dcm" in report


def test_unknown_label_values_are_named(folder: Path) -> None:
    write(folder / "labelsTr/case_1.nii.gz", label_of() * 125)
    assert "values 125, 250; the study knows 0, 1, 2" in dataset.examine(folder, make_study(), 1).report()


def test_missing_channel_file_is_named(tmp_path: Path) -> None:
    study = make_study(channel_names={"0": "T1", "1": "T2", "2": "FLAIR"})
    folder = make_dataset(tmp_path / "d", study)
    (folder / "imagesTr/case_1_0002.nii.gz").unlink()
    (folder / "imagesTr/case_2_0001.nii.gz").unlink()
    found = {item for item in findings(dataset.examine(folder, study, 1)) if item[0] is Code.CHANNEL_MISSING}
    assert (Code.CHANNEL_MISSING, "imagesTr/case_1_0002.nii.gz") in found
    assert (Code.CHANNEL_MISSING, "imagesTr/case_2_0001.nii.gz") in found


def test_channels_on_different_grids_are_found(tmp_path: Path) -> None:
    study = make_study(channel_names={"0": "T1", "1": "T2"})
    folder = make_dataset(tmp_path / "d", study)
    write(folder / "imagesTr/case_1_0001.nii.gz", image_of(81, (6, 8, 11)))
    write(folder / "imagesTr/case_2_0001.nii.gz", image_of(82), (1.0, 1.0, 3.0))
    assert findings(dataset.examine(folder, study, 1)) == {
        (Code.SHAPES_DIFFER, "imagesTr/case_1_0001.nii.gz"),
        (Code.SPACINGS_DIFFER, "imagesTr/case_2_0001.nii.gz"),
    }


def test_a_spacing_within_nnunets_tolerance_passes(folder: Path) -> None:
    write(folder / "labelsTr/case_1.nii.gz", label_of(), (1.0, 1.0, 2.000001))
    assert dataset.examine(folder, make_study(), 1).good


def test_whole_float_labels_are_a_warning_where_the_study_accepts_them(folder: Path) -> None:
    float_label(folder)
    examination = dataset.examine(folder, make_study(accept_float_labels=True), 1)
    assert examination.good
    assert [(warning.code, warning.file) for warning in examination.warnings] == [
        (Code.LABEL_FLOAT, "labelsTr/case_1.nii.gz")
    ]
    write(folder / "labelsTr/case_1.nii.gz", label_of(dtype=np.float32) / 2)
    assert not dataset.examine(folder, make_study(accept_float_labels=True), 1).good


def test_files_that_nnunet_ignores_are_warnings(folder: Path) -> None:
    (folder / "imagesTr/.DS_Store").write_bytes(b"x")
    (folder / "labelsTr/readme.txt").write_text("x")
    write(folder / "labelsTr/case_1.nii.gz", label_of(), origin=(5.0, 0.0, 0.0))
    examination = dataset.examine(folder, make_study(), 1)
    assert examination.good
    assert {(warning.code, warning.file) for warning in examination.warnings} == {
        (Code.STRAY_FILE, "imagesTr/.DS_Store"),
        (Code.STRAY_FILE, "labelsTr/readme.txt"),
        (Code.POSITION_DIFFERS, "labelsTr/case_1.nii.gz"),
    }


def test_test_images_without_a_label_are_no_fault(folder: Path) -> None:
    (folder / "labelsTs/test_0.nii.gz").unlink()
    examination = dataset.examine(folder, make_study(), 1)
    assert examination.good
    assert examination.test_cases == {}


@pytest.mark.parametrize(("fold", "enough"), [("0", False), ("0-4", False), ("all", True)])
def test_five_folds_need_five_cases(fold: str, enough: bool, tmp_path: Path) -> None:
    study = make_study(fold=fold)
    folder = make_dataset(tmp_path / "d", study, cases=4)
    examination = dataset.examine(folder, study, 1)
    assert findings(examination) == (set() if enough else {(Code.TOO_FEW_CASES_FOR_FOLDS, "imagesTr")})


def test_fewer_cases_than_the_study_groups_are_found_before_anything_leaves(folder: Path) -> None:
    examination = dataset.examine(folder, make_study(fingerprint_min_cases=6), 1)
    assert findings(examination) == {(Code.TOO_FEW_CASES_TO_SHARE, "imagesTr")}


def test_nothing_is_written_into_the_dataset(folder: Path) -> None:
    before = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*"))
    dataset.examine(folder, make_study(), 1)
    assert sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob("*")) == before


# real broken files, as found in the wild


def hippocampus_study(**changes: Any) -> Study:
    labels = {"background": 0, "anterior": 1, "posterior": 2}
    return make_study(labels=labels, **changes)


@pytest.fixture
def hippocampus(shared_data: Path, tmp_path: Path) -> Path:
    """Five real cases of hippocampus, copied so that they can be spoilt."""
    source = shared_data / "hippocampus/hippo_a/Dataset004_Hippocampus"
    folder = tmp_path / "Dataset004_Hippocampus"
    for image in sorted((source / "imagesTr").iterdir())[:5]:
        label = image.name.replace("_0000", "")
        for part, name in (("imagesTr", image.name), ("labelsTr", label)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(source / part / name, folder / part / name)
    write_dataset_json(folder, hippocampus_study(), 5)
    return folder


def place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def test_real_labels_without_images_are_named(hippocampus: Path, shared_data: Path) -> None:
    for name in ("hippocampus_010.nii.gz", "hippocampus_281.nii.gz"):
        place(shared_data / "bad/hippo_label_without_image" / name, hippocampus / "labelsTr" / name)
    assert findings(dataset.examine(hippocampus, hippocampus_study(), 1)) == {
        (Code.LABEL_WITHOUT_IMAGE, "labelsTr/hippocampus_010.nii.gz"),
        (Code.LABEL_WITHOUT_IMAGE, "labelsTr/hippocampus_281.nii.gz"),
    }


def test_real_label_of_another_organ_does_not_fit_its_image(hippocampus: Path, shared_data: Path) -> None:
    label = sorted((hippocampus / "labelsTr").iterdir())[0]
    place(shared_data / "bad/hippo_label_without_image/hippocampus_281.nii.gz", label)
    assert findings(dataset.examine(hippocampus, hippocampus_study(), 1)) == {
        (Code.SHAPES_DIFFER, f"labelsTr/{label.name}"),
        (Code.SPACINGS_DIFFER, f"labelsTr/{label.name}"),
    }


def test_real_image_without_label_and_stray_file_are_named(hippocampus: Path, shared_data: Path) -> None:
    bad = shared_data / "bad/hippo_image_without_label"
    place(bad / "hippocampus_118.nii.gz", hippocampus / "imagesTr/hippocampus_118_0000.nii.gz")
    place(bad / ".DS_Store", hippocampus / "imagesTr/.DS_Store")
    examination = dataset.examine(hippocampus, hippocampus_study(), 1)
    assert findings(examination) == {
        (Code.IMAGE_WITHOUT_LABEL, "imagesTr/hippocampus_118_0000.nii.gz"),
        (Code.CASE_COUNT_DIFFERS, "dataset.json"),
    }
    assert [(item.code, item.file) for item in examination.warnings] == [(Code.STRAY_FILE, "imagesTr/.DS_Store")]


def test_real_float_label_is_named(hippocampus: Path, shared_data: Path) -> None:
    bad = shared_data / "bad/hippo_float_label"
    place(bad / "hippocampus_003_image.nii.gz", hippocampus / "imagesTr/hippocampus_003_0000.nii.gz")
    place(bad / "hippocampus_003_label.nii.gz", hippocampus / "labelsTr/hippocampus_003.nii.gz")
    write_dataset_json(hippocampus, hippocampus_study(), 6)
    examination = dataset.examine(hippocampus, hippocampus_study(), 1)
    assert findings(examination) == {(Code.LABEL_FLOAT, "labelsTr/hippocampus_003.nii.gz")}
    assert dataset.examine(hippocampus, hippocampus_study(accept_float_labels=True), 1).good


def test_real_lfs_pointers_are_named(hippocampus: Path, shared_data: Path) -> None:
    bad = shared_data / "bad/lfs_pointers"
    image = sorted((hippocampus / "imagesTr").iterdir())[0]
    place(bad / "ProstateX-0000_07-07-2011.nii.gz", image)
    place(bad / "10699_1000715_adc.mha", hippocampus / "imagesTr/10699_1000715_adc.mha")
    assert findings(dataset.examine(hippocampus, hippocampus_study(), 1)) == {
        (Code.LFS_POINTER, f"imagesTr/{image.name}"),
        (Code.LFS_POINTER, "imagesTr/10699_1000715_adc.mha"),
    }


def test_real_grey_and_nonconsecutive_masks_are_named(shared_data: Path, tmp_path: Path) -> None:
    bad = shared_data / "bad/label_values"
    study = make_study(
        file_ending=".png",
        channel_names={"0": "xray"},
        labels={"background": 0, "lung": 1},
        dataset="Dataset101_LungCXR",
    )
    for case, image, label in (
        ("grey", "image_MCUCXR_0002_0.png", "grey_antialiased_mask_MCUCXR_0002_0.png"),
        ("gaps", "image_JPCLN001.png", "nonconsecutive_0_150_200_250_JPCLN001.png"),
    ):
        place(bad / image, tmp_path / f"d/imagesTr/{case}_0000.png")
        place(bad / label, tmp_path / f"d/labelsTr/{case}.png")
    write_dataset_json(tmp_path / "d", study, 2)
    examination = dataset.examine(tmp_path / "d", study, 1)
    assert findings(examination) == {
        (Code.LABEL_INTERPOLATED, "labelsTr/grey.png"),
        (Code.LABEL_VALUES, "labelsTr/gaps.png"),
    }
    assert "values 150, 200, 250; the study knows 0, 1" in examination.report()


def test_real_dicom_series_with_a_missing_slice_names_both_neighbours(hippocampus: Path, shared_data: Path) -> None:
    for path in (shared_data / "bad/dicom_missing_slice").glob("*.dcm"):
        place(path, hippocampus / "imagesTr/ProstateX-0000" / path.name)
    examination = dataset.examine(hippocampus, hippocampus_study(), 1)
    assert findings(examination) == {
        (Code.DICOM_FOUND, "imagesTr/ProstateX-0000"),
        (Code.DICOM_SLICE_MISSING, "imagesTr/ProstateX-0000/1-05.dcm"),
    }
    assert "1 missing between 1-05.dcm and 1-07.dcm" in examination.report()


def test_real_complete_dicom_series_lacks_nothing(hippocampus: Path, shared_data: Path) -> None:
    for path in (shared_data / "dicom/mr_prostatex0000_adc").glob("*.dcm"):
        place(path, hippocampus / "imagesTr/ProstateX-0000" / path.name)
    assert findings(dataset.examine(hippocampus, hippocampus_study(), 1)) == {
        (Code.DICOM_FOUND, "imagesTr/ProstateX-0000")
    }


@pytest.mark.parametrize("site", ["montgomery_us", "shenzhen_cn", "jsrt_jp"])
def test_real_hospitals_have_no_fault(site: str, shared_data: Path) -> None:
    folder = dataset.find_dataset(shared_data / "lung_xray" / site)
    channels = json.loads((folder / "dataset.json").read_text())["channel_names"]
    labels = {"background": 0, "lung": 1}
    study = make_study(file_ending=".png", channel_names=channels, labels=labels)
    examination = dataset.examine(folder, study, 1)
    assert examination.problems == []
    assert len(examination.test_cases) == 20
