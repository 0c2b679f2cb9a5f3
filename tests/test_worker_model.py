"""The models that sites and the orchestrator end with: nnU-Net's own commands take them untouched."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import appliance, good, refused
from worker_site import NAME, Site, initial_weights, make_study, prepared_site, shared_site

from federation import files, tasks, weights
from federation.errors import Code, FednnunetError
from orchestrator import model

MODEL = Path(NAME) / "nnUNetTrainer__nnUNetPlans__3d_fullres"


def command(name: str, results: Path, *arguments: object) -> None:
    """Run one of nnU-Net's commands as people do."""
    folders = {key: str(results) for key in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    done = subprocess.run(
        [Path(sys.executable).with_name(name), *map(str, arguments)],
        env={**os.environ, **folders, "nnUNet_def_n_proc": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def predict(results: Path, out: Path) -> dict[str, str]:
    data, _ = shared_site()
    arguments = ["-d", "777", "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-npp", "0", "-nps", "0"]
    command("nnUNetv2_predict", results, "-i", data / "imagesTs", "-o", out, "--disable_tta", *arguments)
    return {path.name: files.sha256_of(path) for path in out.glob("*.nii.gz")}


@pytest.fixture(scope="module")
def predictions(finished: tuple[Site, Path, tasks.Validation], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nnUNetv2_predict writes with the site's model."""
    out = tmp_path_factory.mktemp("predictions")
    predict(results_of(finished[0]), out)
    return out


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, Path, tasks.Validation]]:
    """A site that has trained three rounds, validated and finished; the last global weights."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("finished")
    site = prepared_site(folder / "state", iterations_per_epoch=10)
    current = initial_weights()
    for number in (1, 2, 3):
        task = site.task(tasks.Kind.TRAIN, number)
        assert site.ask(task, current).failure is None
        current = site.update(task)
    kept = folder / "global.safetensors"
    kept.write_bytes(current.read_bytes())
    validation = site.ask(site.task(tasks.Kind.VALIDATE), kept).validation
    result = site.ask(site.task(tasks.Kind.FINISH), kept)
    assert result.finished is not None
    assert result.finished.model_sha256 == files.sha256_of(kept)
    yield site, kept, validation
    os.environ.clear()
    os.environ.update(before)


def results_of(site: Site) -> Path:
    return site.settings.work / site.study.id / "nnUNet_results"


def test_validation_tells_means_for_each_label_and_nothing_of_a_case(
    finished: tuple[Site, Path, tasks.Validation],
) -> None:
    site, _, validation = finished
    assert (validation.validation_cases, validation.test_cases) == (2, 2)
    assert set(validation.validation) == set(validation.test) == {"outer", "inner"}
    assert validation.test["outer"].cases == 2
    assert validation.test["outer"].mean > 0.5
    assert "case_" not in validation.model_dump_json()
    summary = files.read_json(results_of(site) / MODEL / "fold_0" / "validation" / "summary.json")
    dice = [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]]
    assert validation.validation["outer"].mean == pytest.approx(np.mean(dice))


def test_the_checkpoint_holds_nnunets_keys_in_tensors_and_plain_types_and_no_momentum(
    finished: tuple[Site, Path, tasks.Validation],
) -> None:
    site, last, _ = finished
    checkpoint = torch.load(results_of(site) / MODEL / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert set(checkpoint) == {
        "network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch",
        "init_args", "trainer_name", "inference_allowed_mirroring_axes",
    }  # fmt: skip
    assert checkpoint["optimizer_state"]["state"] == {}
    assert checkpoint["current_epoch"] == 3
    assert len(checkpoint["logging"]["train_losses"]) == 3
    source = weights.TensorFile(last)
    assert len(checkpoint["network_weights"]) > len(source.names)  # with all aliases
    for name in source.names:
        assert np.array_equal(checkpoint["network_weights"][name].numpy(), source.read(name))


def test_a_model_folder_names_no_host_and_no_path(finished: tuple[Site, Path, tasks.Validation]) -> None:
    site, _, _ = finished
    folder = results_of(site) / MODEL
    assert not list(folder.rglob("debug.json"))
    for name in ("plans.json", "dataset.json", "dataset_fingerprint.json"):
        text = (folder / name).read_text()
        assert str(site.settings.state) not in text
        assert "case_" not in text


def test_nnunet_resumes_from_the_checkpoint(finished: tuple[Site, Path, tasks.Validation]) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    site, _, _ = finished
    root = site.settings.work / site.study.id
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(root / name)
    plans = {**site.plans, "continue_training": True}
    trainer = nnUNetTrainer(plans, "3d_fullres", 0, site.study.dataset_json(8), torch.device("cpu"))
    trainer.load_checkpoint(str(results_of(site) / MODEL / "fold_0" / "checkpoint_final.pth"))
    assert trainer.current_epoch == 3


@pytest.mark.long
def test_nnunets_commands_take_the_sites_model(
    finished: tuple[Site, Path, tasks.Validation], predictions: Path, tmp_path: Path
) -> None:
    site, _, validation = finished
    data, _ = shared_site()
    results = results_of(site)
    assert len(list(predictions.glob("*.nii.gz"))) == 2

    files_of = results / MODEL
    evaluation = ["-djfile", files_of / "dataset.json", "-pfile", files_of / "plans.json", "-np", "1"]
    command("nnUNetv2_evaluate_folder", results, data / "labelsTs", predictions, *evaluation)
    score = files.read_json(predictions / "summary.json")["mean"]["1"]["Dice"]
    assert score == pytest.approx(validation.test["outer"].mean, abs=0.1)  # there with mirroring, here without

    zipped = tmp_path / "model.zip"
    command("nnUNetv2_export_model_to_zip", results, "-d", "777", "-o", zipped, "-c", "3d_fullres", "-f", "0")
    (tmp_path / "installed").mkdir()
    command("nnUNetv2_install_pretrained_model_from_zip", tmp_path / "installed", zipped)
    checkpoint = MODEL / "fold_0" / "checkpoint_final.pth"
    assert files.sha256_of(tmp_path / "installed" / checkpoint) == files.sha256_of(results / checkpoint)


def test_the_orchestrators_zip_installs_and_predicts_as_the_sites_model_does(
    finished: tuple[Site, Path, tasks.Validation], predictions: Path, tmp_path: Path
) -> None:
    site, last, validation = finished
    progress = {"0": {"train_losses": [0.3, 0.1], "val_losses": [0.2, 0.1], "mean_fg_dice": [0.4, 0.5]}}
    fingerprint = files.read_json(results_of(site) / MODEL / "dataset_fingerprint.json")
    zipped = tmp_path / "global.zip"
    arguments = (tmp_path / "results", site.plans, site.study.dataset_json(8), fingerprint, site.study)
    folder = model.export(*arguments, {"0": last}, {"0": {"hospital_a": validation}}, zipped, progress)
    assert folder == tmp_path / "results" / MODEL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global.zip", "results"]

    installed = tmp_path / "installed"
    installed.mkdir()
    command("nnUNetv2_install_pretrained_model_from_zip", installed, zipped)
    assert (installed / MODEL / "fold_0" / "progress.png").stat().st_size > 1000
    summary = files.read_json(installed / MODEL / "fold_0" / "validation" / "summary.json")
    assert summary["mean"]["1"]["Dice"] == pytest.approx(validation.validation["outer"].mean)
    with zipfile.ZipFile(zipped) as archive:
        assert not any(
            b"hospital_a" in archive.read(name) or b"case_0" in archive.read(name) for name in archive.namelist()
        )
    torch.load(installed / MODEL / "fold_0" / "checkpoint_final.pth", weights_only=True)
    expected = {path.name: files.sha256_of(path) for path in predictions.glob("*.nii.gz")}
    assert predict(installed, tmp_path / "global") == expected


def first_weights(tmp_path: Path, pretrained: Path | None = None, **study: object) -> Path:
    """What the child process does for `initial_weights`, here in this one."""
    out = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    _, plans = shared_site()
    request = {"plans": plans, "dataset_json": make_study().dataset_json(8), "out": str(out)}
    model._initial(tmp_path, {**request, "pretrained": str(pretrained) if pretrained else None}, make_study(**study))
    return out


def test_first_weights_follow_the_seed_alone(tmp_path: Path) -> None:
    assert files.sha256_of(first_weights(tmp_path)) == files.sha256_of(initial_weights())
    assert files.sha256_of(first_weights(tmp_path, seed=1)) != files.sha256_of(initial_weights())


def test_pretrained_weights_are_taken_but_for_the_segmentation_heads(tmp_path: Path) -> None:
    """From a checkpoint as nnU-Net's own trainer writes it, with NumPy's numbers in its log."""
    _, plans = shared_site()
    study = make_study()
    network = model.build_network(plans, study.dataset_json(8), study)
    checkpoint = {"network_weights": network.state_dict(), "logging": {"mean_fg_dice": [np.float64(0.5)]}}
    torch.save(checkpoint, tmp_path / "checkpoint_final.pth")
    out = first_weights(tmp_path, tmp_path / "checkpoint_final.pth")
    taken, fresh = weights.TensorFile(out), weights.TensorFile(initial_weights())
    for name in taken.names:
        expected = fresh.read(name) if ".seg_layers." in name else dict(network.named_parameters())[name].detach()
        assert np.array_equal(taken.read(name), np.asarray(expected))


class _Hostile:
    made = Path()

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.made),))


@pytest.mark.parametrize("content", [{"network_weights": {}}, {"other": 1}])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, content: dict[str, object]) -> None:
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(FednnunetError) as caught:
        first_weights(tmp_path, tmp_path / "bad.pth")
    assert caught.value.code is Code.PRETRAINED_UNREADABLE


def test_a_checkpoint_that_would_run_code_is_refused_and_the_childs_error_arrives(tmp_path: Path) -> None:
    _, plans = shared_site()
    study = make_study()
    _Hostile.made = tmp_path / "made"
    torch.save({"network_weights": {}, "x": _Hostile()}, tmp_path / "bad.pth")
    with pytest.raises(FednnunetError) as caught:
        model.initial_weights(plans, study.dataset_json(8), study, tmp_path / "out", tmp_path / "bad.pth")
    assert caught.value.code is Code.PRETRAINED_UNREADABLE
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pth"]


def test_scores_of_sites_are_pooled_as_if_their_cases_lay_together() -> None:
    first, second = [0.5, 0.7, 0.9], [0.1]
    scores = [
        tasks.LabelScore(mean=float(np.mean(v)), std=float(np.std(v)), minimum=min(v), cases=len(v))
        for v in (first, second)
    ]
    pooled = model.pool_scores([*scores, tasks.LabelScore(mean=None, std=None, minimum=None, cases=0)])
    assert pooled.mean == pytest.approx(np.mean(first + second))
    assert pooled.std == pytest.approx(np.std(first + second))
    assert (pooled.minimum, pooled.cases) == (0.1, 4)


def test_the_pooled_summary_has_nnunets_keys_for_labels_and_regions() -> None:
    score = tasks.LabelScore(mean=0.5, std=0.0, minimum=0.5, cases=2)
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    study = make_study(labels=labels, regions_class_order=[1, 2])
    report = tasks.Validation(test={"whole": score, "core": score}, test_cases=2, seconds=1.0)
    pooled = model.summary(study, [report, report])
    assert set(pooled["mean"]) == {"(1, 2)", "(2,)"}
    assert pooled["mean"]["(1, 2)"]["cases"] == 4
    assert pooled["cases_of"] == "test"
    assert pooled["metric_per_case"] == []


def test_the_coordinator_needs_no_torch_for_models() -> None:
    code = "import sys, orchestrator.model; sys.exit('torch' in sys.modules or 'nnunetv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0


def test_the_sites_own_report_scores_its_cases_shows_the_worst_and_stays_there(
    finished: tuple[Site, Path, tasks.Validation],
) -> None:
    site, _, validation = finished
    file = site.settings.work / site.study.id / "report.html"
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text(encoding="utf-8")
    assert "Done: the final model lies here" in text
    assert "Every one of our cases of imagesTs, the worst first" in text
    assert "Every one of our held-out training cases of fold 0, the worst first" in text
    shape = " x ".join(map(str, site.plans["original_median_shape_after_transp"]))
    assert re.search(rf"plan(&#39;|')s median shape, whole voxels.{{,80}}{shape}", text, re.DOTALL), shape
    assert f"{validation.test['outer'].mean:.3f}" in text
    summary = files.read_json(results_of(site) / MODEL / "fold_0" / "test" / "summary.json")
    lowest = {
        Path(case["prediction_file"]).name.removesuffix(".nii.gz"): min(
            case["metrics"][label]["Dice"] for label in ("1", "2")
        )
        for case in summary["metric_per_case"]
    }
    worst, better = sorted(lowest, key=lambda name: lowest[name])
    pictures = text[text.index("The worst cases</h2>") :]
    assert pictures.index(worst) < pictures.index(better)
    assert pictures.count("data:image/png;base64,") == 2
    assert "https://" not in text.replace("https://www.w3.org", "").replace("http://www.w3.org", "")
    outbox = site.spool.outbox / site.study.id
    assert not [path for path in outbox.rglob("*") if path.is_file() and b"case_0" in path.read_bytes()]


def test_appliance_report_writes_it_again_and_says_which_studies_there_are(
    finished: tuple[Site, Path, tasks.Validation], tmp_path: Path
) -> None:
    site = finished[0]
    settings = tmp_path / "site.toml"
    values = site.settings.model_dump(mode="json", exclude_none=True)
    kept = ("name", "orchestrator", "data", "state", "device")
    settings.write_text("".join(f'{key} = "{values[key]}"\n' for key in kept))
    written = []
    for name in ("again.html", "once_more.html"):
        good(appliance("report", "blobs", "--config", settings, "--output", tmp_path / name, cwd=tmp_path))
        written.append((tmp_path / name).read_bytes())
    assert written[0] == written[1]
    assert b'<th scope="row">finish</th>' in written[0], "what left, the last answer too"
    refused(appliance("report", "other", "--config", settings, cwd=tmp_path), 120, "blobs")


def test_an_interval_of_few_cases_holds_the_mean_as_often_as_it_says() -> None:
    """A bootstrap's percentiles hold it in about four of five draws of four values."""
    from appliance.worker.site_report import interval

    random, draws = np.random.default_rng(0), 1000
    for cases in (4, 10):
        found = [interval(list(random.normal(0.01, 0.02, cases))) for _ in range(draws)]
        assert 0.93 < sum(low <= 0.01 <= high for low, high in found) / draws < 0.97


def test_an_interval_is_the_same_each_time_and_wide_where_cases_are_few() -> None:
    from appliance.worker.site_report import interval

    values = [0.5, 0.7, 0.8, 0.9, 0.95, 0.6]
    low, high = interval(values)
    assert 0.5 < low < float(np.mean(values)) < high < 0.95
    assert interval(values) == (low, high)
    assert interval([0.001, 0.006, 0.005, -0.001])[0] < 0 < interval([0.001, 0.006, 0.005, -0.001])[1]
    assert interval([0.7]) == (0.7, 0.7)
    assert interval([0.7, 0.7]) == (0.7, 0.7)
