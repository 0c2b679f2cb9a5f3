"""Facts about a site's training: real nnU-Net, a small synthetic dataset, the worker in this process."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from worker_site import Site, initial_weights, make_settings, make_study, prepared_site, shared_site, write_site

from appliance.worker import loop, training
from appliance.worker.workspace import Workspace
from federation import files, native, tasks, weights
from federation.errors import Code, FednnunetError

TRAIN = tasks.Kind.TRAIN


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def codes(result: tasks.Result) -> list[int]:
    assert result.failure is not None
    return [problem.code for problem in result.failure.problems]


def next_global(site: Site, task: tasks.Task, base: Path, out: Path) -> Path:
    """With one site, the next global weights are what its update decodes to."""
    header = site.spool.result(task).weights
    return weights.open_weights(header, site.update(task), lambda _: base, out)


@pytest.mark.parametrize("wire", ["full", "half"])
def test_killed_after_round_1_and_restarted_the_worker_sends_the_same_bytes(tmp_path: Path, wire: str) -> None:
    sent = []
    for name, killed in (("warm", False), ("killed", True)):
        site = prepared_site(tmp_path / name, wire=wire)
        current = initial_weights()
        for number in (1, 2):
            task = site.task(TRAIN, number)
            result = site.ask(task, current)
            assert result.failure is None
            sent.append((result.weights, files.sha256_of(site.update(task))))
            current = next_global(site, task, current, tmp_path / f"{name}-{number}")
            if killed:
                site.restart()
    assert sent[:2] == sent[2:]
    assert sent[0] != sent[1]


def test_a_round_cut_short_and_done_again_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = prepared_site(tmp_path)
    first, second = site.task(TRAIN, 1), site.task(TRAIN, 2)
    site.ask(first, initial_weights())
    site.ask(second, initial_weights())
    expected = files.sha256_of(site.update(second))

    shutil.rmtree(site.spool.result_parcel(second).folder)
    shutil.rmtree(site.spool.task_parcel(second).folder)
    site.put(second, initial_weights())
    with monkeypatch.context() as patch:
        patch.setattr(
            site.worker.status, "phase", lambda text: site.spool.cancel(second) if "iteration 1 of 2" in text else None
        )
        (waiting,) = site.spool.waiting()
        assert site.worker.handle(waiting)
    assert site.spool.result(second) is None  # cancelled: no answer
    assert site.spool.waiting() == []

    site.ask(second, initial_weights())  # the same task again takes the cancellation back
    assert files.sha256_of(site.update(second)) == expected


def test_a_validation_that_is_cancelled_ends_at_the_next_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, phases = prepared_site(tmp_path), list[str]()
    first, validate = site.task(TRAIN, 1), site.task(tasks.Kind.VALIDATE)
    site.ask(first, initial_weights())
    site.put(validate, site.update(first))

    def phase(text: str) -> None:
        phases.append(text)
        if text == "validating fold 0: held-out case 1":
            site.spool.cancel(validate)

    with monkeypatch.context() as patch:
        patch.setattr(site.worker.status, "phase", phase)
        (waiting,) = site.spool.waiting()
        assert site.worker.handle(waiting)
    assert [text for text in phases if "held-out" in text] == ["validating fold 0: held-out case 1"]
    assert site.spool.result(validate) is None
    again = site.ask(validate, site.update(first))
    assert again.validation is not None
    assert again.validation.validation_cases == 2


def test_a_warm_round_builds_nothing(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    first = site.ask(site.task(TRAIN, 1), initial_weights())
    kept = site.worker.trainer
    parts = (kept.trainer, kept.trainer.network, kept.trainer.dataloader_train, kept.trainer.dataloader_val)
    second = site.ask(site.task(TRAIN, 2), initial_weights())
    assert first.training.seconds["start"] > 0
    assert second.training.seconds["start"] == 0
    assert site.worker.trainer is kept
    now = (kept.trainer, kept.trainer.network, kept.trainer.dataloader_train, kept.trainer.dataloader_val)
    assert all(one is other for one, other in zip(parts, now, strict=True))


def test_after_prepare_an_idle_worker_starts_the_first_folds_trainer(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    site.worker._use_the_time()
    site.worker._use_the_time()
    assert site.worker.trainer.trainer.dataloader_train is not None
    result = site.ask(site.task(TRAIN, 1), initial_weights())
    assert result.training.seconds["start"] == 0


def test_the_learning_rate_follows_the_round_in_the_task_also_after_missed_rounds(tmp_path: Path) -> None:
    site = prepared_site(tmp_path, rounds=10, epochs_per_round=2)
    rates = {}
    for number in (1, 4, 5):
        rates[number] = site.ask(site.task(TRAIN, number), initial_weights()).training.learning_rate
    for number, found in rates.items():
        epochs = [2 * (number - 1), 2 * (number - 1) + 1]
        assert found == pytest.approx([0.01 * (1 - epoch / 20) ** 0.9 for epoch in epochs])


def test_an_update_names_every_tensor_once_as_float32(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    task = site.task(TRAIN, 1)
    site.ask(task, initial_weights())
    update = weights.TensorFile(site.update(task))
    network = site.worker.trainer.trainer.network
    assert update.names == sorted(dict(network.named_parameters()))
    assert len(update.names) < len(network.state_dict())
    assert {spec.dtype for spec in update.specs.values()} == {np.dtype("<f4")}
    assert update.specs == weights.TensorFile(initial_weights()).specs


def test_asked_twice_a_task_is_answered_from_the_outbox(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    task = site.task(TRAIN, 1)
    site.ask(task, initial_weights())
    body = site.spool.result_parcel(task).body
    written = body.stat().st_mtime_ns
    site.put(task, initial_weights())
    assert site.spool.waiting() == []
    assert body.stat().st_mtime_ns == written


def test_only_the_state_of_the_last_two_rounds_and_two_globals_are_kept(tmp_path: Path) -> None:
    site = prepared_site(tmp_path, wire="half")
    current = initial_weights()
    for number in (1, 2, 3):
        task = site.task(TRAIN, number)
        site.ask(task, current)
        current = next_global(site, task, current, tmp_path / f"global-{number}")
    kept = {path.name for path in (site.settings.work / site.study.id / "state" / "fold_0").iterdir()}
    assert kept == {f"after-{number:04d}.{kind}" for number in (2, 3) for kind in ("pt", "carry.safetensors")}
    assert len(list((site.settings.work / site.study.id / "globals" / "fold_0").iterdir())) == 2


def test_state_between_rounds_is_read_without_unpickling(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    site.ask(site.task(TRAIN, 1), initial_weights())
    path = site.settings.work / site.study.id / "state" / "fold_0" / "after-0001.pt"
    state = torch.load(path, weights_only=True)
    assert state["round"] == 1
    assert state["optimizer"]["state"]


@pytest.mark.parametrize("trainer", ["nnUNetTrainerNoMirroring", "nnUNetTrainerCosAnneal", "nnUNetTrainerBN"])
def test_a_variant_trainer_trains_with_its_own_name(tmp_path: Path, trainer: str) -> None:
    from orchestrator import model

    site = prepared_site(tmp_path, trainer=trainer)
    start = tmp_path / "initial.safetensors"
    native.save_weights(model.build_network(site.plans, site.study.dataset_json(8), site.study), start)
    result = site.ask(site.task(TRAIN, 1), start)
    assert result.failure is None
    folder = site.settings.work / site.study.id / "nnUNet_results" / site.study.dataset
    assert [path.name for path in folder.iterdir()] == [f"{trainer}__nnUNetPlans__3d_fullres"]


def test_another_fold_ends_the_first_folds_trainer_and_its_loaders(tmp_path: Path) -> None:
    site = prepared_site(tmp_path, {"augmentation_processes": 1}, fold="0-4")
    site.ask(site.task(TRAIN, 1, fold="0"), initial_weights())
    loaders = site.worker.trainer.trainer.dataloader_train._processes
    assert all(process.is_alive() for process in loaders)
    result = site.ask(site.task(TRAIN, 1, fold="1"), initial_weights())
    assert result.training.seconds["start"] > 0
    assert site.worker.trainer.fold == "1"
    assert not any(process.is_alive() for process in loaders)
    site.worker._close()


def test_restarted_before_finish_the_worker_still_writes_the_whole_log(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    for number in (1, 2, 3):
        site.ask(site.task(TRAIN, number), initial_weights())
    site.restart()
    assert site.ask(site.task(tasks.Kind.FINISH), initial_weights()).finished is not None
    (path,) = site.settings.work.rglob("checkpoint_final.pth")
    log = torch.load(path, weights_only=True)["logging"]
    assert [len(values) for values in log.values()] == [3] * len(log)
    assert np.isfinite(log["train_losses"]).all()


# failures


def test_a_failure_is_numbers_alone_and_its_traceback_stays_at_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = prepared_site(tmp_path)

    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot read {site.settings.data}/imagesTr/case_03_0000.nii.gz")

    monkeypatch.setattr(training.FoldTrainer, "train", fail)
    task = site.task(TRAIN, 1)
    assert codes(site.ask(task, initial_weights())) == [Code.TRAINING_FAILED.number]
    body = site.spool.result_parcel(task).body.read_text()
    assert "case_03" not in body
    assert str(site.settings.data) not in body
    assert "Traceback" not in body
    log = site.settings.work / site.study.id / "log" / "train-fold_0-0001-attempt-1.txt"
    assert "case_03" in log.read_text()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Code.OUT_OF_MEMORY),
        (MemoryError(), Code.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Code.OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), Code.DISK_FULL),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), Code.DISK_FULL),
    ],
)
def test_what_the_machine_lacks_is_its_own_code_and_the_next_attempt_begins_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: Code
) -> None:
    site = prepared_site(tmp_path)
    site.ask(site.task(TRAIN, 1), initial_weights())

    def exhausted(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(site.worker.trainer.trainer, "train_step", exhausted)
        assert codes(site.ask(site.task(TRAIN, 2), initial_weights())) == [code.number]
    assert site.worker.trainer is None
    again = site.ask(site.task(TRAIN, 2, attempt=2), initial_weights())
    assert again.failure is None
    assert again.attempt == 2


def test_a_lost_device_is_answered_before_anything_that_it_has_touched_is_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch aborts the process where a pinned tensor of a lost device is freed: seen on an H200 (tests/test_gpu.py)."""
    site = prepared_site(tmp_path)
    task, freed = site.task(TRAIN, 1), []

    class Batch:
        def __del__(self) -> None:
            freed.append(site.spool.result(task))

    def lost(*_: object) -> None:
        batch = Batch()
        raise RuntimeError(f"CUDA error: device-side assert triggered, {batch is None}")

    monkeypatch.setattr(loop, "LOST", [])
    monkeypatch.setattr(training.FoldTrainer, "_steps", lost)
    site.put(task, initial_weights())
    assert not site.worker.handle(site.spool.waiting()[0])
    assert freed == []
    assert site.worker.trainer in loop.LOST
    result = site.spool.result(task)
    assert result is not None
    assert codes(result) == [Code.TRAINING_FAILED.number]
    site.worker._close()


def test_a_loss_that_is_not_finite_is_a_failure_not_an_update(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    source = weights.TensorFile(initial_weights())
    broken = tmp_path / "nan.safetensors"
    weights.save(broken, {name: np.full_like(source.read(name), np.nan) for name in source.names})
    task = site.task(TRAIN, 1)
    assert codes(site.ask(task, broken)) == [Code.LOSS_NOT_FINITE.number]
    assert site.spool.result_parcel(task).weights is None


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    source = weights.TensorFile(initial_weights())
    tensors = {name: source.read(name) for name in source.names}
    other = tmp_path / "other.safetensors"
    weights.save(other, {**tensors, source.names[0]: np.zeros((3, 3), np.float32)})
    assert codes(site.ask(site.task(TRAIN, 1), other)) == [Code.WEIGHTS_DO_NOT_FIT.number]
    weights.save(other, {**tensors, "one.more": np.zeros(3, np.float32)})
    assert codes(site.ask(site.task(TRAIN, 2), other)) == [Code.WEIGHTS_DO_NOT_FIT.number]


def test_a_difference_to_weights_that_the_site_lacks_asks_for_them_in_full(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    difference = site.settings.spool / "difference.safetensors"
    weights.encode_difference(initial_weights(), initial_weights(), None, difference, tmp_path / "carry", "half")
    header = weights.describe_difference(difference, "0" * 64, files.sha256_of(initial_weights()))
    task = site.task(TRAIN, 1, weights=header)
    site.spool.put_task(task, difference)
    (waiting,) = site.spool.waiting()
    site.worker.handle(waiting)
    result = site.spool.result(task)
    assert codes(result) == [Code.BASE_MISSING.number]
    assert result.failure.retry


@pytest.mark.parametrize("wire", ["half", "int8"])
def test_a_downlink_difference_to_the_last_global_gives_the_same_round(tmp_path: Path, wire: str) -> None:
    full, small = prepared_site(tmp_path / "full", wire=wire), prepared_site(tmp_path / "small", wire=wire)
    for site in (full, small):
        site.ask(site.task(TRAIN, 1), initial_weights())
    task = full.task(TRAIN, 1)
    second = next_global(full, task, initial_weights(), tmp_path / "second.safetensors")
    full.ask(full.task(TRAIN, 2), second)

    difference = small.settings.spool / "difference.safetensors"
    weights.encode_difference(second, initial_weights(), None, difference, tmp_path / "carry", wire)
    header = weights.describe_difference(difference, files.sha256_of(initial_weights()), files.sha256_of(second))
    task = small.task(TRAIN, 2, weights=header)
    small.spool.put_task(task, difference)
    small.worker.handle(small.spool.waiting()[0])
    assert small.spool.result(task).failure is None
    assert files.sha256_of(small.update(task)) == files.sha256_of(full.update(full.task(TRAIN, 2)))


# prepare


def test_a_second_prepare_with_the_same_plans_does_nothing(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)

    def times() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in site.settings.work.rglob("*") if path.name != "status.json"}

    before = times()
    assert site.ask(site.prepare_task(attempt=2)).preparation is not None
    site.restart()
    shutil.rmtree(site.spool.result_parcel(site.prepare_task()).folder)
    assert site.ask(site.prepare_task(attempt=3)).preparation.training_cases == {"0": 6}
    assert times() == before


def test_studies_with_the_same_plans_and_data_share_preprocessed_cases(tmp_path: Path) -> None:
    one = prepared_site(tmp_path)
    two = prepared_site(tmp_path, rounds=7)
    assert one.study.id != two.study.id
    assert len(list((one.settings.work / "preprocessed").iterdir())) == 1
    assert two.ask(two.task(TRAIN, 1), initial_weights()).failure is None


def test_plans_other_than_the_signed_ones_are_refused(tmp_path: Path) -> None:
    data, plans = shared_site()
    site = Site(make_settings(data, tmp_path), make_study(), plans)
    task = site.prepare_task()
    wrong = task.plan.model_copy(update={"plans_sha256": "0" * 64})
    assert codes(site.ask(site.prepare_task(plan=wrong))) == [Code.PLANS_HASH.number]
    unprepared = site.ask(site.task(TRAIN, 1), initial_weights())
    assert codes(unprepared) == [Code.PLANS_HASH.number]


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"background": 0, "organ": 1, "lesion": 1}},
        {"channel_names": {"0": "noNorm"}},
        {"file_ending": "/../../../../outside.nii.gz"},
        {"overwrite_image_reader_writer": "NibabelIOWithReorient"},
        {"dataset": {"case_00": {"images": ["/etc/hostname"], "label": "/etc/hostname"}}},
        {"numTraining": "8"},
    ],
)
def test_a_dataset_json_beside_the_plans_that_is_not_the_studys_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """The hospital has approved the study's labels and channels; no digest is over what travels beside the plans."""
    data, plans = shared_site()
    site = Site(make_settings(data, tmp_path), make_study(), plans)
    plan = site.prepare_task().plan
    other = plan.model_copy(update={"dataset_json": {**plan.dataset_json, **change}})
    assert codes(site.ask(site.prepare_task(plan=other))) == [Code.PLANS_REFUSED.number]


def in_old_words(configuration: dict[str, Any]) -> None:
    """A network of any size, in the words of old plans, which nnU-Net still reads."""
    del configuration["architecture"]
    configuration |= {"UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 10**9}
    configuration |= {"unet_max_num_features": 10**9, "n_conv_per_stage_encoder": [1, 1, 1]}
    configuration |= {"n_conv_per_stage_decoder": [1, 1], "num_pool_per_axis": [2, 2, 2]}
    configuration |= {"pool_op_kernel_sizes": [[1, 1, 1], [2, 2, 2], [2, 2, 2]], "conv_kernel_sizes": [[3, 3, 3]] * 3}


def network(plans: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plans["configurations"]["3d_fullres"]["architecture"]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda plans: plans.update(plans_name="../../escape"),
        lambda plans: plans.update(dataset_name="Dataset778_Other"),
        lambda plans: plans["configurations"]["3d_fullres"].update(data_identifier="../escape"),
        lambda plans: plans["configurations"]["3d_fullres"]["architecture"].update(network_class_name="os.system"),
        lambda plans: network(plans).update(network_class_name="dynamic_network_architectures.architectures.os.system"),
        lambda plans: network(plans)["arch_kwargs"].update(norm_op="os.system"),
        lambda plans: network(plans)["arch_kwargs"].update(
            nonlin="torch.nn.modules.module.torch.os.system", nonlin_kwargs={"command": "touch pwned"}
        ),
        lambda plans: network(plans)["arch_kwargs"].update(nonlin_kwargs={"command": "touch pwned"}),
        lambda plans: network(plans)["arch_kwargs"].update(init="torch.nn.Linear"),
        lambda plans: network(plans)["arch_kwargs"].update(features_per_stage=[10**6] * 3),
        lambda plans: network(plans)["_kw_requires_import"].append("norm_op_kwargs"),
        lambda plans: in_old_words(plans["configurations"]["3d_fullres"]),
        lambda plans: plans["configurations"]["3d_fullres"].update(patch_size=[10**5] * 3),
        lambda plans: plans["configurations"]["3d_fullres"].update(resampling_fn_data="os"),
        lambda plans: plans["configurations"]["3d_fullres"].update(preprocessor_name="subprocess"),
    ],
)
def test_plans_that_name_anything_but_nnunets_own_are_refused(tmp_path: Path, change: Any) -> None:
    import copy

    data, plans = shared_site()
    hostile = copy.deepcopy(plans)
    change(hostile)
    site = Site(make_settings(data, tmp_path), make_study(), hostile)
    assert codes(site.ask(site.prepare_task())) == [Code.PLANS_REFUSED.number]


def test_a_site_with_too_few_cases_for_folds_says_so_and_trains_fold_all(tmp_path: Path) -> None:
    _, plans = shared_site()
    data = write_site(tmp_path / "data", cases=4, test_cases=0)
    site = Site(make_settings(data, tmp_path / "one"), make_study(), plans)
    assert codes(site.ask(site.prepare_task())) == [Code.TOO_FEW_CASES_FOR_FOLDS.number]
    site = Site(make_settings(data, tmp_path / "two"), make_study(fold="all"), plans)
    assert site.ask(site.prepare_task()).preparation.training_cases == {"all": 4}
    assert site.ask(site.task(TRAIN, 1), initial_weights()).training.cases == 4


def test_the_fingerprint_in_the_model_is_the_sites_own_and_the_data_is_only_linked(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    root = site.settings.work / site.study.id
    own = files.read_json(root / "nnUNet_preprocessed" / site.study.dataset / "dataset_fingerprint.json")
    assert len(own["spacings"]) == 8
    assert (root / "nnUNet_raw" / site.study.dataset / "imagesTr").is_symlink()
    assert not any(path.is_file() and path.suffix == ".gz" for path in root.rglob("*") if not path.is_symlink())


def test_preprocessing_in_several_processes_gives_the_same_files(tmp_path: Path) -> None:
    one = prepared_site(tmp_path / "one")
    two = prepared_site(tmp_path / "two", {"preprocessing_processes": 2})
    found = []
    for site in (one, two):
        (folder,) = (site.settings.work / "preprocessed").iterdir()
        found.append({path.name: blosc2.open(str(path), mode="r")[:] for path in folder.glob("*.b2nd")})
    assert len(found[0]) == 16
    assert found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_a_trainer_is_found_without_importing_the_others() -> None:
    assert native.trainer_module("nnUNetTrainer") == "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"
    assert native.trainer_module("nnUNetTrainerBN").endswith("network_architecture.nnUNetTrainerBN")


def test_a_trainer_that_nnunet_does_not_ship_is_refused() -> None:
    with pytest.raises(FednnunetError) as error:
        native.trainer_class("nnUNetTrainerOfMyOwn")
    assert error.value.code is Code.TRAINER_UNKNOWN
    with pytest.raises(FednnunetError):  # so no task can name it
        make_study(trainer="nnUNetTrainerOfMyOwn")


def test_a_task_for_another_site_is_refused(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    stranger = site.task(TRAIN, 1, site="hospital_b")
    assert codes(site.ask(stranger, initial_weights())) == [Code.TASK_REFUSED.number]


def test_what_a_killed_worker_had_half_written_is_swept_at_the_next_start(tmp_path: Path) -> None:
    site = prepared_site(tmp_path)
    half = [
        site.settings.work / "preprocessed" / ".key.writing-7",
        site.spool.outbox / site.study.id / ".train-fold_0-0001.writing-7",
        site.worker.outgoing,
    ]
    for folder in half:
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(b"half")
    whole = sorted(path for path in (site.settings.work / site.study.id).rglob("*"))
    site.worker.stop.set()
    assert site.worker.run() == 0
    assert not any(folder.exists() for folder in half)
    assert sorted(path for path in (site.settings.work / site.study.id).rglob("*")) == whole


def test_case_names_go_to_nnunets_log_file_not_to_the_console(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    site = prepared_site(tmp_path)
    site.ask(site.task(TRAIN, 1), initial_weights())
    site.worker.trainer.trainer.print_to_log_file("predicting case_03")
    assert "case_03" not in "".join(capfd.readouterr())
    (log,) = site.settings.work.rglob("training_log_*.txt")
    assert "predicting case_03" in log.read_text()


def test_a_loader_that_loses_a_batch_at_its_end_is_quiet_and_other_faults_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from appliance.worker.training import _quiet_end

    told: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda ended: told.append(ended.exc_type))

    def end_with(error: Exception) -> None:
        def fail() -> None:
            raise error

        thread = threading.Thread(target=fail)
        with _quiet_end(thread):
            thread.start()
            thread.join()

    end_with(ConnectionResetError(104, "Connection reset by peer"))
    assert told == []
    end_with(ValueError("a fault of ours"))
    assert told == [ValueError]


def test_beside_a_gpu_torch_has_one_thread_where_none_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nnUNetv2_train: the cores belong to the processes that augment."""
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for device, threads in (("cuda:1", None), ("cuda", 4), ("cpu", None), ("cpu", 2)):
        native.use_threads(torch, device, threads)
    assert asked == [1, 4, 2]


def test_preprocessed_cases_are_shared_by_studies_of_the_same_labels_alone(tmp_path: Path) -> None:
    """Where which label lies is kept with each case, and the plans do not say what the labels are."""
    shared, plans = shared_site()
    data = tmp_path / "data"
    shutil.copytree(shared, data)

    def prepared(**changes: Any) -> int:
        study = make_study(**changes)
        files.write_json(data / "dataset.json", study.dataset_json(8))
        site = Site(make_settings(data, tmp_path / "state"), study, plans)
        assert site.ask(site.prepare_task()).failure is None
        return len(list(Workspace(site.settings.work, study).cache.iterdir()))

    regions = {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]}
    assert [prepared(), prepared(seed=1), prepared(**regions), prepared(**regions, seed=1)] == [1, 1, 2, 2]
