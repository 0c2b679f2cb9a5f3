"""The weighted mean over update files: exact, independent of order, refusing what may not count."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import weights
from federation.errors import Code, FednnunetError
from federation.study import Study, parse
from federation.tasks import Kind, Result, Task, Training
from federation.weights import TensorFile
from orchestrator.admission import admit, check_answer
from orchestrator.aggregation.mean import PIECE, Update, weighted_mean

SHAPES = {"conv.weight": (5, 4, 3), "conv.bias": (5,), "large": (PIECE + 17,)}


def model(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=20), st.randoms())
def test_the_mean_is_the_weighted_mean_whoever_answered_first(
    tmp_path_factory: pytest.TempPathFactory, cases: list[int], random: object
) -> None:
    folder = tmp_path_factory.mktemp("mean")
    models = [model(number) for number in range(len(cases))]
    updates = {}
    for number, tensors in enumerate(models):
        weights.save(folder / f"{number}", tensors)
        updates[f"site_{number:02d}"] = Update(folder / f"{number}", float(cases[number]))
    shuffled = list(updates.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first = weighted_mean(updates, folder / "0", folder / "out")
    assert weighted_mean(dict(shuffled), folder / "0", folder / "out2") == first
    out = TensorFile(folder / "out")
    for name in SHAPES:
        expected = np.average([tensors[name].astype(np.float64) for tensors in models], axis=0, weights=cases)
        np.testing.assert_allclose(out.read(name), expected, rtol=0, atol=1e-6)


def test_equal_updates_of_any_weight_give_themselves_bit_for_bit(tmp_path: Path) -> None:
    digest = weights.save(tmp_path / "same", model(0))
    updates = {f"s{number}": Update(tmp_path / "same", weight) for number, weight in enumerate((16.0, 16.0, 32.0))}
    assert weighted_mean(updates, tmp_path / "same", tmp_path / "out") == digest


def test_the_mean_of_half_differences_is_the_base_plus_their_mean(tmp_path: Path) -> None:
    weights.save(tmp_path / "base", model(0))
    updates = {}
    for number in (1, 2, 3):
        weights.save(tmp_path / "new", model(number))
        weights.encode_difference(
            tmp_path / "new", tmp_path / "base", None, tmp_path / f"d{number}", tmp_path / "carry"
        )
        updates[f"s{number}"] = Update(tmp_path / f"d{number}", float(number))
    weighted_mean(updates, tmp_path / "base", tmp_path / "out")
    for name in SHAPES:
        expected = np.average(
            [model(number)[name].astype(np.float64) for number in (1, 2, 3)], axis=0, weights=(1, 2, 3)
        )
        np.testing.assert_allclose(TensorFile(tmp_path / "out").read(name), expected, rtol=0, atol=4e-3)


def test_counters_of_batch_norm_take_the_largest_value(tmp_path: Path) -> None:
    for number in (3, 9, 5):
        weights.save(tmp_path / str(number), {"w": np.ones(2, np.float32), "n": np.asarray(number)})
    updates = {str(number): Update(tmp_path / str(number), 1.0) for number in (3, 9, 5)}
    weighted_mean(updates, tmp_path / "3", tmp_path / "out")
    assert TensorFile(tmp_path / "out").read("n") == 9


# ---- admission ----------------------------------------------------------------------------------------------------


def a_study(**changes: object) -> Study:
    return parse(
        {
            "name": "t",
            "dataset": "Dataset001_T",
            "sites": ["a", "b"],
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "x": 1},
            **changes,
        }
    )


PLANS = "ab" * 32


def answered(folder: Path, update: dict[str, np.ndarray], **changes: object) -> tuple[Task, Result, Path]:
    """A round's task, an answer to it, and the update file."""
    weights.save(folder / "base", model(0))
    digest = weights.save(folder / "update", update)
    task = Task(study=a_study(), site="a", kind=Kind.TRAIN, fold="0", round=2, plans_sha256=PLANS)
    report = {
        "plans_sha256": PLANS,
        "cases": 12,
        "epochs": 1,
        "learning_rate": [0.01],
        "train_loss": [-0.5],
        "val_loss": [-0.4],
        "pseudo_dice": [[0.5]],
        "seconds": {},
        **changes,
    }
    header = weights.describe_full(folder / "update", digest)
    return task, Result.answering(task, training=Training.model_validate(report), weights=header), folder / "update"


def perturbed(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value + np.float32(0.01) for name, value in model(0).items()} | changes


def test_a_good_update_is_admitted_with_its_distance(tmp_path: Path) -> None:
    task, result, update = answered(tmp_path, perturbed())
    check_answer(task, result)
    admitted = admit(task, result, update, tmp_path / "base", 12)
    assert admitted.cases == 12
    assert admitted.norm == pytest.approx(0.01 * math.sqrt(sum(math.prod(s) for s in SHAPES.values())), rel=1e-3)


NAN = np.full((5,), np.nan, np.float32)


@pytest.mark.parametrize(
    ("update", "changes", "why"),
    [
        (perturbed(**{"conv.bias": NAN}), {}, "NaN"),
        (perturbed(**{"conv.bias": NAN + np.inf}), {}, "NaN or infinite"),
        (perturbed(**{"conv.bias": np.full((5,), np.inf, np.float32)}), {}, "NaN or infinite"),
        (perturbed(**{"conv.bias": np.full((5,), 1e9, np.float32)}), {}, "distance"),
        (perturbed(**{"conv.bias": np.full((5,), 3e38, np.float32)}), {}, "distance"),
        (perturbed(**{"conv.bias": np.zeros((6,), np.float32)}), {}, "shape"),
        (perturbed(**{"conv.bias": np.zeros((5,), np.float64)}), {}, "type"),
        (perturbed(extra=np.zeros((5,), np.float32)), {}, "unknown"),
        ({"conv.bias": model(0)["conv.bias"]}, {}, "missing"),
        (perturbed(), {"cases": 13}, "declared"),
        (perturbed(), {"cases": 10**12}, "declared"),
        (perturbed(), {"plans_sha256": "cd" * 32}, "other plans"),
        (perturbed(), {"epochs": 2}, "epochs"),
    ],
)
def test_an_update_that_may_not_count_is_refused_with_its_reason(
    tmp_path: Path, update: dict[str, np.ndarray], changes: dict[str, object], why: str
) -> None:
    task, result, file = answered(tmp_path, update, **changes)
    with pytest.raises(FednnunetError, match=why) as caught:
        admit(task, result, file, tmp_path / "base", 12)
    assert caught.value.code is Code.UPDATE_REFUSED


def test_cases_of_zero_or_less_cannot_even_be_said(tmp_path: Path) -> None:
    for cases in (0, -1):
        with pytest.raises(ValueError, match="greater than or equal to 1"):
            answered(tmp_path, perturbed(), cases=cases)


def test_another_rounds_or_another_sites_answer_is_refused(tmp_path: Path) -> None:
    task, result, _ = answered(tmp_path, perturbed())
    for other in (task.model_copy(update={"round": 3}), task.model_copy(update={"site": "b"})):
        with pytest.raises(FednnunetError) as caught:
            check_answer(other, result)
        assert caught.value.code is Code.RESULT_REFUSED


def test_a_file_that_is_not_the_one_described_is_refused(tmp_path: Path) -> None:
    task, result, file = answered(tmp_path, perturbed())
    weights.save(file, model(7))
    with pytest.raises(FednnunetError, match="not the one"):
        admit(task, result, file, tmp_path / "base", 12)
