"""The phantom hospitals: synthetic, the same every time, and what the demo says they are."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from orchestrator.admin.phantom import LABELS, SITES, TINY_SITES, PhantomSite, make_phantom_sites, phantom_case


def digest(folder: Path) -> str:
    result = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        result.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return result.hexdigest()


def read(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    image = sitk.ReadImage(str(path))
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]


def test_same_seed_gives_the_same_bytes_also_in_another_process(tmp_path: Path, repository: Path) -> None:
    make_phantom_sites(tmp_path / "one", TINY_SITES, seed=3)
    time.sleep(1.1)  # a time stamp in a gzip header would differ now
    program = (
        "import sys, pathlib; from orchestrator.admin.phantom import *; "
        "make_phantom_sites(pathlib.Path(sys.argv[1]), TINY_SITES, seed=3)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "two")], check=True, cwd=repository)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_another_seed_gives_other_patients(tmp_path: Path) -> None:
    make_phantom_sites(tmp_path / "one", TINY_SITES, seed=3)
    make_phantom_sites(tmp_path / "two", TINY_SITES, seed=4)
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


def test_no_case_occurs_twice(phantom_sites: dict[str, Path]) -> None:
    files = [path for folder in phantom_sites.values() for path in folder.glob("images*/*.nii.gz")]
    assert len({hashlib.sha256(path.read_bytes()).digest() for path in files}) == len(files) == 12 + 10 + 14 + 3 * 4


@pytest.mark.parametrize("name", SITES)
def test_hospital_is_a_sound_nnunet_dataset(phantom_sites: dict[str, Path], name: str) -> None:
    folder, site = phantom_sites[name], SITES[name]
    assert folder.name == site.dataset
    dataset = json.loads((folder / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "organ": 1, "lesion": 2}
    assert dataset["channel_names"] == {"0": "synthetic"}
    assert "Synthetic" in dataset["description"]
    for part, cases in (("Tr", site.training_cases), ("Ts", site.test_cases)):
        images = sorted((folder / f"images{part}").iterdir())
        labels = sorted((folder / f"labels{part}").iterdir())
        assert len(images) == len(labels) == cases
        for image_path, label_path in zip(images, labels, strict=True):
            assert image_path.name == label_path.name.replace(".nii.gz", "_0000.nii.gz")
            (image, spacing), (label, label_spacing) = read(image_path), read(label_path)
            assert image.shape == label.shape
            assert all(30 <= size <= 42 for size in image.shape)
            assert spacing == label_spacing == pytest.approx(site.spacing)
            assert image.dtype == np.float32
            assert np.isfinite(image).all()
            assert set(np.unique(label)) == set(LABELS.values())


def test_hospitals_differ_in_spacing_and_intensity_but_agree_on_the_contract(phantom_sites: dict[str, Path]) -> None:
    contracts, spacings, medians = set(), set(), []
    for folder in phantom_sites.values():
        dataset = json.loads((folder / "dataset.json").read_text())
        contracts.add(json.dumps([dataset["labels"], dataset["channel_names"], dataset["file_ending"]]))
        image, spacing = read(min((folder / "imagesTr").iterdir()))
        label, _ = read(min((folder / "labelsTr").iterdir()))
        spacings.add(spacing)
        medians.append(float(np.median(image[label > 0])))
    assert len(contracts) == 1
    assert len(spacings) == 3
    low, middle, high = sorted(medians)
    assert low < -500 < 150 < middle < 300 < 1000 < high


def test_lesion_lies_inside_the_organ() -> None:
    site = SITES["hospital_a"]
    for seed in range(20):
        _, label = phantom_case(site, np.random.default_rng(seed))
        lesion = np.argwhere(label == LABELS["lesion"])
        organ = np.argwhere(label > 0)
        assert 50 < len(lesion) < len(organ) / 5
        assert (lesion.min(0) >= organ.min(0)).all()
        assert (lesion.max(0) <= organ.max(0)).all()
        edges = np.concatenate([label.take(index, axis).ravel() for axis in range(3) for index in (0, -1)])
        assert not edges.any(), "the organ touches the edge of the image"


def test_two_hospitals_with_one_dataset_name_are_refused(tmp_path: Path) -> None:
    site = PhantomSite("Dataset301_Phantom", 1)
    with pytest.raises(ValueError, match="of its own"):
        make_phantom_sites(tmp_path, {"a": site, "b": site})
    assert not any(tmp_path.iterdir())


def test_all_three_are_made_in_five_seconds_of_cpu(tmp_path: Path) -> None:
    before = os.times()
    make_phantom_sites(tmp_path)
    after = os.times()
    assert after.user + after.system - before.user - before.system < 5


def test_importing_the_module_loads_neither_numpy_nor_simpleitk(repository: Path) -> None:
    program = "import sys, orchestrator.admin.phantom; print({'numpy', 'SimpleITK', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=repository, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip() == "set()"
