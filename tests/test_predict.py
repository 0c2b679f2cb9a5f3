"""`appliance predict`: the bytes of nnUNetv2_predict in shards, kills, faulty images, other settings, hostile models.

Real: nnU-Net's predictor and commands, models as the orchestrator exports them, processes with JOB_COMPLETION_INDEX as
an Indexed Job's pods have it. The networks are not trained: their noise shows a difference sooner than a smooth organ.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import APPLIANCE, Done, begin, command, end, good, refused, wait_for
from worker_site import NAME, make_study, shared_site, write_site

from appliance import batch, inference
from federation import files
from federation.errors import Code, FednnunetError
from federation.processes import Lock
from orchestrator import model

MODEL = Path(NAME) / "nnUNetTrainer__nnUNetPlans__3d_fullres"
CASES, LARGE = 7, 3  # the last ones take more than one window


@dataclass(frozen=True)
class Batch:
    """Images, and a model of two folds in its two forms."""

    images: Path
    results: Path
    zipped: Path

    @property
    def model(self) -> Path:
        return self.results / MODEL

    def reference(self, out: Path, *arguments: object) -> dict[str, str]:
        """What nnUNetv2_predict writes."""
        folders = {key: str(self.results) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("nnUNetv2_predict"), "-i", str(self.images), "-o", str(out)),
                *("-d", "777", "-c", "3d_fullres", "-f", "0", "1", "-device", "cpu", "-npp", "1", "-nps", "1"),
                *map(str, arguments),
            ],
            env={**os.environ, **folders, "nnUNet_def_n_proc": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return written(out)

    def arguments(self, out: Path, *more: object, model: Path | None = None) -> tuple[object, ...]:
        return (
            *("predict", "--input", self.images, "--output", out, "--model", model or self.model),
            *("--device", "cpu", "--threads", "1", *more),
        )

    def predict(self, out: Path, images: Path | None = None, **options: Any) -> batch.Summary:
        """In this process."""
        given = {"model": self.model, "device": "cpu", "threads": 1, **options}
        return inference.predict(inference.Options(images or self.images, out, **given), time.perf_counter())


def with_a_long_last_case(whole: Batch, folder: Path) -> Batch:
    """The last image is another one, of hundreds of windows: time for a test to come between."""
    images = shutil.copytree(whole.images, folder / "slow")
    (longer,) = (write_site(folder / "long", cases=1, test_cases=1, size=56) / "imagesTs").iterdir()
    shutil.copyfile(longer, images / f"case_{CASES:02d}_0000.nii.gz")
    return replace(whole, images=images)


def written(folder: Path) -> dict[str, str]:
    """Digest of every file that belongs to a case; of probabilities what they hold, since a zip knows more."""
    found = {path.name: files.sha256_of(path) for path in folder.glob("*.nii.gz")}
    for path in folder.glob("*.npz"):
        with np.load(path) as content:
            found[path.name] = str(
                {name: (value.dtype, value.shape, value.tobytes()) for name, value in content.items()}
            )
    return found | {path.name: files.sha256_of(path) for path in folder.glob("*.pkl")}


def summary(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = files.read_json(out / ".predict" / "summary.json")
    return value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("batch")
    images = write_site(folder / "data", cases=1, test_cases=CASES, size=16) / "imagesTs"
    for larger in sorted(
        (write_site(folder / "large", cases=CASES - LARGE + 1, test_cases=LARGE, size=22) / "imagesTs").iterdir()
    ):
        shutil.copyfile(larger, images / larger.name)
    _, plans = shared_site()
    weights = {}
    for fold in ("0", "1"):
        study = make_study(fold="0-4", seed=int(fold))
        weights[fold] = folder / f"{fold}.safetensors"
        model.initial_weights(plans, study.dataset_json(8), study, weights[fold])
    fingerprint = {"spacings": [[1, 1, 1]], "shapes_after_crop": [[22, 22, 22]]}
    study, zipped = make_study(fold="0-4"), folder / "model.zip"
    model.export(folder / "results", plans, study.dataset_json(8), fingerprint, study, weights, {}, zipped)
    return Batch(images, folder / "results", zipped)


@pytest.fixture(scope="module")
def by_nnunet(whole: Batch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that nnUNetv2_predict leaves."""
    out = tmp_path_factory.mktemp("expected")
    whole.reference(out, "--save_probabilities")
    return out


@pytest.fixture(scope="module")
def with_probabilities(by_nnunet: Path) -> dict[str, str]:
    return written(by_nnunet)


@pytest.fixture(scope="module")
def expected(with_probabilities: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in with_probabilities.items() if name.endswith(".nii.gz")}


def test_one_process_writes_the_bytes_of_nnunetv2_predict_with_probabilities_and_mirroring(
    whole: Batch, with_probabilities: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = good(command(APPLIANCE, *whole.arguments(out, "--save-probabilities"), cwd=tmp_path)).out
    assert written(out) == with_probabilities
    assert len(with_probabilities) == 3 * CASES
    assert said.splitlines()[-1] == f"{CASES} of {CASES} cases have a prediction"
    for name in ("dataset.json", "plans.json"):
        assert files.read_json(out / name) == files.read_json(whole.model / name)
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith("case_")) == [
        ".predict",
        "dataset.json",
        "plans.json",
    ]


@pytest.mark.long
def test_shards_as_an_indexed_job_runs_them_one_killed_and_started_again(
    whole: Batch, expected: dict[str, str], tmp_path: Path, no_process_left: None
) -> None:
    out = tmp_path / "out"

    def start(index: int, given: Batch = whole) -> subprocess.Popen[str]:
        """With processes of its own before and after, as on a GPU."""
        more = ("--preprocessing-processes", 1, "--export-processes", 1, "--log-format", "json")
        return begin(
            APPLIANCE,
            *given.arguments(out, *more, model=whole.zipped),
            cwd=tmp_path,
            JOB_COMPLETION_INDEX=str(index),
            FEDNNUNET_PREDICT_SHARDS="3",
            TMPDIR=str(tmp_path),
        )

    killed = start(0, with_a_long_last_case(whole, tmp_path))
    wait_for(lambda: list(out.glob("*.nii.gz")), 300, "a first prediction of shard 0")
    killed.send_signal(signal.SIGKILL)
    killed.wait(30)
    killed.communicate()
    left = len(list(out.glob("*.nii.gz")))
    assert left < 3, "killed too late"
    (out / ".predict" / "shard-0000-of-0003" / "partial" / "case_99.nii.gz").write_bytes(b"half")

    others = [start(1), start(2)]
    for process in others:
        done = good(end(process))
        events = [json.loads(line) for line in done.out.splitlines()]
        assert events[-1]["cases"] == CASES
        assert all(event["process"] == "predict" for event in events[:-1])
    so_far = summary(out)
    assert not so_far["complete"]
    assert so_far["silent_shards"] == [0]
    assert sorted(so_far["missing"]) == sorted({"case_01", "case_04", "case_07"} - set(names(out)))
    check = ("predict", "--check", "--input", whole.images, "--output", out)
    refused(command(APPLIANCE, *check, cwd=tmp_path), 411, so_far["missing"][0])

    good(end(start(0)))
    assert written(out) == expected
    told = summary(out)
    assert told["complete"]
    assert (told["shards"][0]["skipped"], told["shards"][0]["predicted"]) == (left, 3 - left)
    assert [report["index"] for report in told["shards"]] == [0, 1, 2]
    assert told["seconds"]["predict"] == pytest.approx(
        sum(each["seconds"]["predict"] for each in told["shards"]), abs=0.01
    )
    assert not list(out.glob(".predict/*/partial")), "nothing half is left"
    assert not list(tmp_path.glob("fednnunet-model-*/*/*")) or left, "unpacked models are removed"
    assert good(command(APPLIANCE, *check, cwd=tmp_path)).out.splitlines()[-1].startswith(f"{CASES} of {CASES}")


def names(out: Path) -> list[str]:
    return [path.name.removesuffix(".nii.gz") for path in out.glob("*.nii.gz")]


def test_faulty_images_are_failures_with_their_reasons_and_the_others_are_predicted(
    whole: Batch, expected: dict[str, str], tmp_path: Path
) -> None:
    images = shutil.copytree(whole.images, tmp_path / "images")
    (images / "case_02_0000.nii.gz").write_bytes(b"no image")
    shutil.copyfile(images / "case_03_0000.nii.gz", images / "case_03_0001.nii.gz")
    cut = (images / "case_05_0000.nii.gz").read_bytes()
    (images / "case_05_0000.nii.gz").write_bytes(cut[: len(cut) // 2])
    out = tmp_path / "out"
    told = whole.predict(out, images)
    failures = {each.case: each for each in told.failures}
    assert {name: failures[name].code for name in failures} == {"case_02": 410, "case_03": 209, "case_05": 210}
    assert failures["case_03"].reason == "2 files, 1 channels"
    assert "failed\tcase_03\tFNU-209\t2 files, 1 channels" in batch.table(told)
    assert written(out) == {name: digest for name, digest in expected.items() if name[:7] not in failures}
    with pytest.raises(FednnunetError, match="FNU-411"):
        batch.require_complete(told)

    shutil.copytree(whole.images, images, dirs_exist_ok=True)
    (images / "case_03_0001.nii.gz").unlink()
    told = whole.predict(out, images)
    assert written(out) == expected
    assert told.complete
    assert told.failures == ()
    assert told.shards[0].skipped == CASES - 3


def test_sigterm_ends_a_shard_soon_and_a_start_goes_on(whole: Batch, expected: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begin(APPLIANCE, *with_a_long_last_case(whole, tmp_path).arguments(out), cwd=tmp_path)
    wait_for(lambda: list(out.glob("*.nii.gz")), 300, "a first prediction")
    process.send_signal(signal.SIGTERM)
    done = end(process)
    assert done.status == 143
    assert "ended by SIGTERM" in done.out
    assert len(names(out)) < CASES
    whole.predict(out)
    assert written(out) == expected


def numbered(code: Code, *named: str) -> Any:
    return pytest.raises(FednnunetError, match=f"(?s)FNU-{code.number}.*{'.*'.join(named)}")


def test_predictions_made_otherwise_are_refused_unless_they_are_to_be_removed(
    whole: Batch, expected: dict[str, str], tmp_path: Path
) -> None:
    out, images = tmp_path / "out", shutil.copytree(whole.images, tmp_path / "few")
    for path in sorted(images.iterdir())[2:]:
        path.unlink()
    whole.predict(out, images, folds=("0",), probabilities=True)
    before = written(out)
    with numbered(Code.PREDICTED_OTHERWISE, "folds", "probabilities"):
        whole.predict(out, images)
    assert written(out) == before
    whole.predict(out, images, overwrite=True)
    assert written(out) == {name: expected[name] for name in sorted(expected)[:2]}
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    whole.predict(out, images, overwrite=True)  # a pod that starts again has the same command
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")} == stamps


def few(whole: Batch, tmp_path: Path) -> Path:
    """The images of case_01 and case_02."""
    images = shutil.copytree(whole.images, tmp_path / "few")
    for path in sorted(images.iterdir())[2:]:
        path.unlink()
    return images


def everything(folder: Path) -> dict[str, bytes]:
    """What lies in a folder, but for what is this command's own."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != batch.OWN}


def test_what_nnunet_has_predicted_of_the_same_cases_is_removed_when_asked_for(
    whole: Batch, by_nnunet: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    images, out = few(whole, tmp_path), shutil.copytree(by_nnunet, tmp_path / "out")
    before = everything(out)
    with numbered(Code.PREDICTED_OTHERWISE, "case_03", "of no case of the input"):
        whole.predict(out, images, overwrite=True)
    assert everything(out) == before
    for path in [*out.glob("case_0[3-9].*")]:
        path.unlink()
    before = everything(out)
    with numbered(Code.PREDICTED_OTHERWISE, "case_01", "was not made with these settings"):
        whole.predict(out, images)
    assert everything(out) == before
    whole.predict(out, images, overwrite=True)
    assert written(out) == {name: expected[name] for name in sorted(expected)[:2]}
    assert not (out / batch.NNUNET_ARGUMENTS).exists(), "it would pass off as nnU-Net's what somebody draws here"


def test_overwriting_removes_nothing_but_predictions(whole: Batch, tmp_path: Path) -> None:
    images = shutil.copytree(whole.images, tmp_path / "images")
    (tmp_path / "link").symlink_to(images)
    before = written(images)
    for name, named in (("case_01", "not noted as made"), ("of_somebody", "of no case of the input")):
        labels = tmp_path / f"labels-{name}"
        labels.mkdir()
        (labels / f"{name}.nii.gz").write_bytes(b"drawn by hand")
        for overwrite in (True, False):
            with numbered(Code.PREDICTED_OTHERWISE, name, named):
                whole.predict(labels, images, overwrite=overwrite)
        with numbered(Code.SETTINGS_INVALID, "--output is the folder of"):
            whole.predict(labels, images, overwrite=True, previous_stage=labels)
        assert everything(labels) == {f"{name}.nii.gz": b"drawn by hand"}
    for out in (images, tmp_path / "link"):
        with numbered(Code.SETTINGS_INVALID, "--output is the folder of"):
            whole.predict(out, images, overwrite=True)
    assert written(images) == before


def test_overwriting_a_folder_of_our_own_keeps_what_somebody_has_drawn_there(
    whole: Batch, expected: dict[str, str], tmp_path: Path
) -> None:
    images, out = few(whole, tmp_path), tmp_path / "out"
    whole.predict(out, images, folds=("0",))
    corrected, predicted = out / "case_01_corrected_by_radiologist.nii.gz", (out / "case_02.nii.gz").read_bytes()
    for path, named in ((corrected, "not noted"), (out / "case_02.nii.gz", "was changed since")):
        path.write_bytes(b"drawn by hand")
        before = everything(out)
        with numbered(Code.PREDICTED_OTHERWISE, path.name, named):
            whole.predict(out, images, overwrite=True)
        assert everything(out) == before
        path.unlink()
    (out / "case_02.nii.gz").write_bytes(predicted)
    whole.predict(out, images, overwrite=True)
    assert written(out) == {name: expected[name] for name in sorted(expected)[:2]}


def test_the_description_of_a_dataset_is_not_replaced_by_the_models(whole: Batch, tmp_path: Path) -> None:
    dataset = tmp_path / "Dataset001_Liver"
    images = shutil.copytree(whole.images, dataset / "imagesTs")
    (dataset / "dataset.json").write_text('{"numTraining": 131}')
    before = {path.name for path in dataset.iterdir()}
    for overwrite in (False, True):
        with numbered(Code.PREDICTED_OTHERWISE, "dataset.json is not the model's"):
            whole.predict(dataset, images, overwrite=overwrite)
    assert (dataset / "dataset.json").read_text() == '{"numTraining": 131}'
    assert {path.name for path in dataset.iterdir()} == before


SETTINGS = batch.PredictionSettings(
    model="m",
    name="n",
    folds=("0",),
    checkpoint="c",
    mirroring=True,
    step_size=0.5,
    probabilities=True,
    previous_stage=None,
    channels=1,
    file_ending=".nii.gz",
    nnunetv2="2",
)
OTHER = SETTINGS.model_copy(update={"model": "other"})


def begun(folder: Path) -> batch.Outputs:
    """A folder in which shard 0 has kept case a."""
    out = batch.Outputs(folder)
    out.agree(SETTINGS, False, {}, ["a", "b"])
    keep(out, "a", b"1")
    return out


def keep(out: batch.Outputs, case: str, content: bytes) -> None:
    """As a shard does with what it has written."""
    part = batch.Shard(0, 1)
    out.partial(part).mkdir(parents=True, exist_ok=True)
    for ending in (".npz", ".pkl", ".nii.gz"):
        (out.partial(part) / f"{case}{ending}").write_bytes(content)
    out.keep(part, case, SETTINGS)


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_prediction_that_a_kill_cut_off_while_it_got_its_name_is_known_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    out, left, real = begun(tmp_path), [renamed], os.replace

    def killed(source: Any, target: Any) -> None:
        if not left[0]:
            raise SystemExit(137)
        left[0] -= 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            keep(out, "b", b"of one life")
    drawn = tmp_path / "b.nii.gz"
    drawn.write_bytes(b"drawn by hand")  # under the name that was noted
    before = everything(tmp_path)
    with numbered(Code.PREDICTED_OTHERWISE, "b.nii.gz", "was changed since"):
        out.agree(OTHER, True, {}, ["a", "b"])
    assert everything(tmp_path) == before
    drawn.unlink()
    with open(tmp_path / ".predict" / "shard-0000-of-0001" / "written.jsonl", "ab") as stream:
        stream.write(b'{"name": "b.nii')  # and the next life is killed while it notes
    if renamed == 1:
        keep(out, "b", b"of the next life")
    out.agree(OTHER, True, {}, ["a", "b"])
    assert everything(tmp_path) == {}


def test_overwriting_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, left = begun(tmp_path), Path.unlink, [2]

    def killed(path: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise SystemExit(137)
        left[0] -= 1
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(SystemExit):
            out.agree(OTHER, True, {}, ["a"])
    assert len(everything(tmp_path)) == 1
    out.agree(OTHER, True, {}, ["a"])
    assert everything(tmp_path) == {}
    assert out.settings() == OTHER


def test_what_a_version_without_notes_has_predicted_is_gone_on_with_and_not_removed(tmp_path: Path) -> None:
    out = begun(tmp_path)
    (tmp_path / ".predict" / "shard-0000-of-0001" / "written.jsonl").unlink()
    before = everything(tmp_path)
    out.agree(SETTINGS, True, {}, ["a", "b"])
    with numbered(Code.PREDICTED_OTHERWISE, "a.nii.gz", "not noted"):
        out.agree(OTHER, True, {}, ["a", "b"])
    assert everything(tmp_path) == before
    assert out.settings() == SETTINGS


def test_bad_input_is_refused_before_anything_is_written(whole: Batch, tmp_path: Path) -> None:
    out, empty, stray, two = (tmp_path / name for name in ("out", "empty", "stray", "two"))
    empty.mkdir()
    stray.mkdir()
    (stray / "liver.nii.gz").write_bytes(b"")
    for name in ("a__b__c", "a__b__d"):
        (two / "Dataset001_A" / name).mkdir(parents=True)
        (two / "Dataset001_A" / name / "plans.json").write_text("{}")
    for code, named, options in (
        (Code.NOTHING_TO_PREDICT, "empty", {"images": empty}),
        (Code.NOTHING_TO_PREDICT, "nowhere", {"images": tmp_path / "nowhere"}),
        (Code.STRAY_FILE, "liver", {"images": stray}),
        (Code.NOTHING_TO_PREDICT, "nowhere", {"previous_stage": tmp_path / "nowhere"}),
        (Code.MODEL_UNUSABLE, "nowhere", {"model": tmp_path / "nowhere"}),
        (Code.MODEL_UNUSABLE, "0 models", {"model": empty}),
        (Code.MODEL_UNUSABLE, "a__b__c.*a__b__d", {"model": two}),
        (Code.MODEL_UNUSABLE, "wanted: 4", {"folds": ("4",)}),
        (Code.MODEL_UNUSABLE, "checkpoint_best", {"checkpoint": "checkpoint_best.pth"}),
    ):
        with numbered(code, named):
            whole.predict(out, **options)
    if not torch.cuda.is_available():
        with numbered(Code.DEVICE_MISSING):
            whole.predict(out, device="cuda")
    with pytest.raises(FednnunetError) as unknown:
        whole.predict(out, folds=("4",))
    assert unknown.value.advice == "Leave --folds out, or give some of those that are there: 0, 1."
    with pytest.raises(FednnunetError) as unknown:
        whole.predict(out, checkpoint="checkpoint_best.pth")
    assert "--checkpoint" in unknown.value.advice

    def at(*more: object, **environment: str) -> Done:
        return command(APPLIANCE, *whole.arguments(out, *more), cwd=tmp_path, **environment)

    refused(at("--shard", "3/3"), 112, "counted from 0")
    refused(at("--device", "cuda:x"), 112, "cuda:N")
    refused(at("--shard", "one"), 112, "I/N")
    refused(at(JOB_COMPLETION_INDEX="1"), 112, "FEDNNUNET_PREDICT_SHARDS")
    refused(at("--device", "tpu"), 112, "tpu")
    refused(command(APPLIANCE, "predict", "--check", "--input", empty, "--output", empty, cwd=tmp_path), 157)
    refused(command(APPLIANCE, "predict", "--input", empty, "--output", out, cwd=tmp_path), 112, "--model")
    assert not out.exists()


class Evil:
    """What a hostile checkpoint would do when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/evil",)


@pytest.mark.parametrize("attack", ["pickle", "plans", "outside", "bomb", "cut"])
def test_a_hostile_model_runs_no_code_and_writes_nothing_outside(
    attack: str, whole: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    given = tmp_path / "model.zip"
    if attack in ("pickle", "plans"):
        given = shutil.copytree(whole.results, tmp_path / "results") / MODEL
        if attack == "pickle":
            torch.save({"network_weights": {}, "trainer_name": Evil()}, given / "fold_0" / "checkpoint_final.pth")
        else:
            plans = files.read_json(given / "plans.json")
            architecture = plans["configurations"]["3d_fullres"]["architecture"]
            architecture["arch_kwargs"]["conv_op"] = "torch.nn.modules.module.torch.os.system"
            files.write_json(given / "plans.json", plans)
    elif attack == "cut":
        given.write_bytes(whole.zipped.read_bytes()[:-4000])
    else:
        with zipfile.ZipFile(given, "w", zipfile.ZIP_DEFLATED) as content:
            if attack == "outside":
                content.writestr(f"{MODEL}/../../../plans.json", "{}")
            else:
                with content.open(f"{MODEL}/fold_0/checkpoint_final.pth", "w", force_zip64=True) as sink:
                    sink.write(bytes(2**20))
                info = content.infolist()[0]
                info.file_size = 2**50  # what it says that it becomes
    before = sorted(path for path in tmp_path.rglob("*"))
    codes = {"plans": Code.PLANS_REFUSED, "bomb": Code.DISK_FULL}
    with numbered(codes.get(attack, Code.MODEL_UNUSABLE)):
        whole.predict(tmp_path / "out", model=given)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert not Path("/tmp/evil").exists()


def test_a_checkpoint_as_nnunet_itself_writes_it_is_taken(
    whole: Batch, expected: dict[str, str], tmp_path: Path
) -> None:
    """Stock checkpoints hold NumPy's numbers in `logging`."""
    own = shutil.copytree(whole.results, tmp_path / "results")
    for fold in ("0", "1"):
        path = own / MODEL / f"fold_{fold}" / "checkpoint_final.pth"
        content = torch.load(path, weights_only=True)
        content["logging"] = {"mean_fg_dice": [np.float64(0.5)], "train_losses": [np.float32(1)], "lrs": [1e-2]}
        torch.save(content, path)
    Batch(whole.images, own, whole.zipped).predict(tmp_path / "out")
    assert written(tmp_path / "out") == expected


def test_cases_are_those_of_nnunet_and_shards_part_them(tmp_path: Path) -> None:
    from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

    for name in ("b_0001", "b_0000", "a-1_0000", "a_1_0000", "B_0000", "c.d_0000"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "a_0000.nrrd").touch()
    found = batch.cases(tmp_path, ".nii.gz")
    assert [list(map(str, case.images)) for case in found] == create_lists_from_splitted_dataset_folder(
        str(tmp_path), ".nii.gz", num_processes=1
    )
    for count in (1, 2, 3, 7):
        parts = [batch.mine(found, batch.Shard(index, count)) for index in range(count)]
        assert sorted(case.name for part in parts for case in part) == sorted(case.name for case in found)


def test_of_two_shards_that_end_at_once_the_newer_summary_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other shard reports while this one writes what it has seen before."""
    images, out = tmp_path / "images", batch.Outputs(tmp_path / "out")
    images.mkdir()
    for name in ("a", "b"):
        (images / f"{name}_0000.nii.gz").touch()
    out.agree(SETTINGS, False, {}, ["a", "b"])
    for index in (0, 1):
        out.shard(batch.Shard(index, 2)).mkdir()

    def report(index: int) -> None:
        (out.folder / f"{'ab'[index]}.nii.gz").touch()
        out.report(batch.Report(index=index, count=2, predicted=1, skipped=0, failures=(), seconds={}))

    report(0)
    real, times = os.replace, []

    def late(source: Any, target: Any) -> None:
        if not times and Path(target).name == "summary.json" and Path(target).parent.name == ".predict":
            times.append(1)
            report(1)
            out.summarise(images, batch.Shard(1, 2))
        real(source, target)

    monkeypatch.setattr(os, "replace", late)
    assert out.summarise(images, batch.Shard(0, 2)).complete
    assert summary(out.folder)["complete"]
    assert summary(out.folder)["silent_shards"] == []


def test_two_processes_on_one_shard_are_not_let_in(whole: Batch, tmp_path: Path) -> None:
    part = batch.Shard(0, 7)
    whole.predict(tmp_path / "out", shard=part)
    lock = Lock(tmp_path / "out" / ".predict" / part.name)
    with numbered(Code.ALREADY_RUNNING):
        whole.predict(tmp_path / "out", shard=part)
    lock.release()
