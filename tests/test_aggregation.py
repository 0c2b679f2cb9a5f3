"""Aggregation over update files: exact, independent of order, in bounded memory, refusing what may not count.

That the methods compute what Flower's strategies compute is in test_aggregation_flower.py.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import weights
from federation.errors import Code, FednnunetError
from federation.study import Aggregation, Study, parse
from federation.tasks import Description, Kind, Result, Task, Training
from federation.weights import TensorFile
from orchestrator.admission import admit, check_answer
from orchestrator.aggregation import sources
from orchestrator.aggregation.mean import Update, weighted_mean
from orchestrator.aggregation.robust import select
from orchestrator.aggregation.rules import aggregate
from orchestrator.aggregation.sources import PIECE

METHODS = ("mean", "fedavgm", "fedadagrad", "fedyogi", "fedadam", "median", "trimmed_mean", "krum", "multi_krum")
OPTIMIZERS = METHODS[1:5]
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


@pytest.mark.parametrize(("wire", "error"), [("half", 4e-3), ("int8", 2.0**-5)])
def test_the_mean_of_differences_is_the_base_plus_their_mean(tmp_path: Path, wire: weights.Wire, error: float) -> None:
    weights.save(tmp_path / "base", model(0))
    updates = {}
    for number in (1, 2, 3):
        weights.save(tmp_path / "new", model(number))
        weights.encode_difference(
            tmp_path / "new", tmp_path / "base", None, tmp_path / f"d{number}", tmp_path / "carry", wire
        )
        updates[f"s{number}"] = Update(tmp_path / f"d{number}", float(number))
    weighted_mean(updates, tmp_path / "base", tmp_path / "out")
    for name in SHAPES:
        expected = np.average(
            [model(number)[name].astype(np.float64) for number in (1, 2, 3)], axis=0, weights=(1, 2, 3)
        )
        np.testing.assert_allclose(TensorFile(tmp_path / "out").read(name), expected, rtol=0, atol=error)


def test_counters_of_batch_norm_take_the_largest_value(tmp_path: Path) -> None:
    for number in (3, 9, 5):
        weights.save(tmp_path / str(number), {"w": np.ones(2, np.float32), "n": np.asarray(number)})
    updates = {str(number): Update(tmp_path / str(number), 1.0) for number in (3, 9, 5)}
    weighted_mean(updates, tmp_path / "3", tmp_path / "out")
    assert TensorFile(tmp_path / "out").read("n") == 9


# ---- every method -------------------------------------------------------------------------------------------------


def aggregated(
    folder: Path, method: str, updates: dict[str, Update], rounds: int = 1, **numbers: object
) -> tuple[TensorFile, TensorFile | None]:
    """The store, and the optimizer's state, after some rounds from `base` in which the same updates arrive."""
    base, before = folder / "base", folder / "none"
    for number in range(rounds):
        out, after = folder / f"{method}-{number}", folder / f"{method}-{number}.state"
        aggregate(Aggregation(method=method, **numbers), updates, base, out, before, after)
        base, before = out, after
    return TensorFile(base), TensorFile(before) if before.exists() else None


def saved(folder: Path, models: list[dict[str, np.ndarray]]) -> dict[str, Update]:
    """Updates of sites s0, s1, ... that count 1, 2, ..."""
    updates = {}
    for number, tensors in enumerate(models):
        weights.save(folder / f"update-{number}", tensors)
        updates[f"s{number}"] = Update(folder / f"update-{number}", float(number + 1))
    return updates


@pytest.mark.parametrize("method", METHODS)
def test_the_same_updates_give_the_same_bytes_in_any_order_with_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    weights.save(tmp_path / "base", model(99))
    updates = saved(tmp_path, [model(number) for number in range(6)])
    store, state = aggregated(tmp_path, method, updates, rounds=2)
    digests = store.digest, state and state.digest
    assert (state is not None) == (method in OPTIMIZERS)
    monkeypatch.setattr(sources, "THREADS", 1)
    store, state = aggregated(tmp_path, method, dict(reversed(updates.items())), rounds=2)
    assert (store.digest, state and state.digest) == digests
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", METHODS)
def test_counters_take_the_largest_value_in_every_method(tmp_path: Path, method: str) -> None:
    counters = (3, 9, 5, 8)
    weights.save(tmp_path / "base", {"w": np.ones(2, np.float32), "n": np.asarray(2)})
    updates = saved(tmp_path, [{"w": np.ones(2, np.float32), "n": np.asarray(n)} for n in counters])
    store, state = aggregated(tmp_path, method, updates, faulty_sites=0)
    chosen = select(Aggregation(method=method, faulty_sites=0), updates, tmp_path / "base")
    counted = [counters[int(site[1:])] for site in chosen] if "krum" in method else counters
    assert store.read("n") == max(counted)
    assert state is None or not any(name.startswith("n~") for name in state.names)


@pytest.mark.parametrize("wire", ["half", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros_whatever_their_exponent(tmp_path: Path, method: str, wire: weights.Wire) -> None:
    """Zero times an infinite factor would be NaN at every site."""
    base = {"w": np.ones((3, 2), np.float32)}
    weights.save(tmp_path / "base", base)
    updates = {}
    for number in range(4):
        weights.encode_difference(tmp_path / "base", tmp_path / "base", None, tmp_path / "d", tmp_path / "carry", wire)
        sent = TensorFile(tmp_path / "d")
        parts = {"w": sent.read("w"), weights.EXPONENTS: np.asarray([weights.LARGEST_EXPONENT], np.int32)}
        weights.save(tmp_path / f"{number}", parts)
        updates[f"s{number}"] = Update(tmp_path / f"{number}", 1e6)
    store, _ = aggregated(tmp_path, method, updates, faulty_sites=0)
    np.testing.assert_array_equal(store.read("w"), base["w"])


@pytest.mark.parametrize("suffix", ["", "@4"])
@pytest.mark.parametrize("method", OPTIMIZERS)
def test_an_optimizer_does_not_step_along_running_statistics(tmp_path: Path, method: str, suffix: str) -> None:
    names = [f"a.norm.{part}{suffix}" for part in ("weight", "running_mean", "running_var")]

    def layer(seed: int) -> dict[str, np.ndarray]:
        return {name: np.random.default_rng(seed).random(4, np.float32) for name in names}

    weights.save(tmp_path / "base", layer(9))
    store, state = aggregated(tmp_path, method, saved(tmp_path, [layer(0), layer(1)]), rounds=2)
    mean = np.average([layer(0)[names[0]], layer(1)[names[0]]], axis=0, weights=(1, 2))
    for name in names[1:]:
        np.testing.assert_allclose(store.read(name), mean, rtol=0, atol=1e-7)
    assert np.abs(store.read(names[0]) - mean).max() > 1e-3
    assert state is not None
    assert {name.split("~")[0] for name in state.names} == {names[0]}


def partly_held(
    folder: Path, half: bool
) -> tuple[dict[str, np.ndarray], dict[str, Update], list[dict[str, np.ndarray]]]:
    """A store of which "both@4" is at every site, "two@4" at two under other names, "none@4" at no site."""
    random = np.random.default_rng(4)
    base = {name: random.standard_normal(4).astype(np.float32) for name in ("both@4", "two@4", "none@4")}
    weights.save(folder / "base", base)
    layouts = [{"both@4": "both"}, {"both@4": "both", "two@4": "here"}, {"both@4": "there", "two@4": "both"}]
    updates, held = {}, []
    for number, layout in enumerate(layouts):
        tensors = {name: random.standard_normal(4).astype(np.float32) for name in [*layout.values(), "not sent on"]}
        path = folder / f"update-{number}"
        weights.save(path, tensors)
        if half:
            own = {name: np.zeros(4, np.float32) for name in tensors} | {layout[key]: base[key] for key in layout}
            weights.save(folder / "own", own)
            weights.encode_difference(path, folder / "own", None, folder / "difference", folder / "carry", "half")
            weights.apply_difference(folder / "own", folder / "difference", path)
            tensors = {name: TensorFile(path).read(name) for name in tensors}
            (folder / "difference").replace(path)
        updates[f"s{number}"] = Update(path, float(number + 1), layout)
        held.append({key: tensors[name] for key, name in layout.items()})
    return base, updates, held


@pytest.mark.parametrize("half", [False, True])
def test_a_tensor_counts_among_its_holders_alone_under_their_names_for_it(tmp_path: Path, half: bool) -> None:
    base, updates, held = partly_held(tmp_path, half)
    updates["nothing"] = Update(updates["s0"].file, 1000.0, {})
    expected: dict[str, Callable[[str], np.ndarray]] = {
        "both@4": lambda method: (
            np.average([site["both@4"] for site in held], axis=0, weights=(1, 2, 3))
            if method == "mean"
            else np.median([site["both@4"] for site in held], axis=0)
        ),
        "two@4": lambda method: np.average(
            [site["two@4"] for site in held[1:]], axis=0, weights=(2, 3) if method == "mean" else (1, 1)
        ),
    }
    for method in ("mean", "median", "trimmed_mean"):
        store, _ = aggregated(tmp_path, method, updates, trim=0.34)
        for key, value in expected.items():
            np.testing.assert_allclose(store.read(key), value(method), rtol=0, atol=5e-7)
        assert store.read("none@4").tobytes() == base["none@4"].tobytes()
    for method in OPTIMIZERS:
        store, _ = aggregated(tmp_path, method, updates)
        towards = [np.sign(value("mean") - base[key]) for key, value in expected.items()]
        assert [np.sign(store.read(key) - base[key]).tolist() for key in expected] == [t.tolist() for t in towards]
        assert store.read("none@4").tobytes() == base["none@4"].tobytes()
        if method == "fedavgm":  # whose first step, of length 1, ends at the mean
            for key, value in expected.items():
                np.testing.assert_allclose(store.read(key), value("mean"), rtol=0, atol=5e-7)


@pytest.mark.parametrize("half", [False, True])
def test_krum_compares_what_all_sites_hold_and_averages_the_chosen_among_holders(tmp_path: Path, half: bool) -> None:
    base, updates, held = partly_held(tmp_path, half)
    rule = Aggregation(method="multi_krum", faulty_sites=0, selected_sites=2)
    chosen = [int(site[1:]) for site in select(rule, updates, tmp_path / "base")]
    values = [site["both@4"].astype(np.float64) for site in held]
    closest = [min(np.square(values[i] - values[j]).sum() for j in range(3) if j != i) for i in range(3)]
    assert chosen == np.argsort(closest, kind="stable")[:2].tolist()
    aggregate(rule, updates, tmp_path / "base", tmp_path / "out", tmp_path / "none", tmp_path / "none")
    store = TensorFile(tmp_path / "out")
    for key in ("both@4", "two@4"):
        expected = np.mean([held[site][key] for site in chosen if key in held[site]], axis=0)
        np.testing.assert_allclose(store.read(key), expected, rtol=0, atol=5e-7)
    assert store.read("none@4").tobytes() == base["none@4"].tobytes()


def test_krum_refuses_updates_that_share_no_tensor(tmp_path: Path) -> None:
    _, updates, _ = partly_held(tmp_path, half=False)
    updates["nothing"] = Update(updates["s0"].file, 1.0, {})
    with pytest.raises(ValueError, match="there is none"):
        aggregated(tmp_path, "krum", updates, faulty_sites=0)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_tensor_that_no_site_holds_keeps_its_moments_and_takes_no_step(tmp_path: Path, method: str) -> None:
    weights.save(tmp_path / "base", {key: np.zeros(3, np.float32) for key in ("a", "b")})
    weights.save(tmp_path / "update", {key: np.ones(3, np.float32) for key in ("a", "b")})
    rule = Aggregation(method=method)
    held = {"s": Update(tmp_path / "update", 1.0)}
    partly = {"s": Update(tmp_path / "update", 1.0, {"a": "a"})}
    base, before = tmp_path / "base", tmp_path / "none"
    states = []
    for number, updates in enumerate([held, partly, held]):
        out, after = tmp_path / f"{number}", tmp_path / f"{number}.state"
        aggregate(rule, updates, base, out, before, after)
        base, before = out, after
        states.append({name: TensorFile(after).read(name) for name in TensorFile(after).names})
    of_b = [{name: array.tobytes() for name, array in state.items() if name.startswith("b~")} for state in states]
    assert of_b[0] == of_b[1]
    assert TensorFile(tmp_path / "1").read("b").tobytes() == TensorFile(tmp_path / "0").read("b").tobytes()
    twice, _ = aggregated(tmp_path, method, held, rounds=2)  # b has taken two steps, in rounds 1 and 3
    assert TensorFile(base).read("b").tobytes() == twice.read("b").tobytes()
    if method == "fedadam":
        assert (states[-1]["a~steps"], states[-1]["b~steps"]) == (3, 2)


def test_a_state_of_another_optimizer_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    weights.save(tmp_path / "base", model(9))
    updates = saved(tmp_path, [model(0)])
    aggregated(tmp_path, "fedavgm", updates)
    out, after = tmp_path / "out", tmp_path / "after"
    with pytest.raises(FednnunetError) as caught:
        aggregate(Aggregation(method="fedadam"), updates, tmp_path / "base", out, tmp_path / "fedavgm-0.state", after)
    assert caught.value.code is Code.WEIGHTS_DO_NOT_FIT
    assert not out.exists()
    assert not after.exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("method", METHODS)
def test_an_update_of_other_shapes_is_refused_before_anything_is_written(tmp_path: Path, method: str) -> None:
    weights.save(tmp_path / "base", {"w": np.ones((2, 3), np.float32)})
    updates = saved(tmp_path, [{"w": np.ones((2, 3), np.float32)}] * 5)
    for tensors in ({"w": np.ones((3, 2), np.float32)}, {"w": np.ones((2, 3), np.float64)}, {"v": np.ones(6)}):
        weights.save(tmp_path / "other", tensors)
        with pytest.raises(FednnunetError) as caught:
            aggregated(tmp_path, method, updates | {"s1": Update(tmp_path / "other", 1.0)})
        assert caught.value.code is Code.WEIGHTS_DO_NOT_FIT
        assert not list(tmp_path.glob(f"{method}*"))


# ---- a few faulty sites -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ["flipped", "same point", "one number"])
def test_one_faulty_site_of_five_moves_the_mean_but_not_the_robust_methods(tmp_path: Path, attack: str) -> None:
    base = model(9)
    weights.save(tmp_path / "base", base)
    random = np.random.default_rng(1)
    honest = [
        {name: value + 0.01 * random.standard_normal(value.shape).astype(np.float32) for name, value in base.items()}
        for _ in range(4)
    ]
    faulty = {
        "flipped": {name: -10 * value for name, value in base.items()},
        "same point": {name: np.full_like(value, 5.0) for name, value in base.items()},
        "one number": base | {"conv.bias": base["conv.bias"] + np.float32(300.0)},
    }[attack]
    updates = saved(tmp_path, [*honest, faulty])  # s4 counts 5, more than any other

    def farthest(method: str) -> float:
        store, _ = aggregated(tmp_path, method, updates)
        means = {name: np.mean([site[name] for site in honest], axis=0) for name in base}
        return max(float(np.abs(store.read(name) - means[name]).max()) for name in base)

    assert farthest("mean") > 1.0
    for method in ("median", "trimmed_mean", "krum", "multi_krum"):
        assert farthest(method) < 0.06
        if "krum" in method:
            assert "s4" not in select(Aggregation(method=method), updates, tmp_path / "base")


def test_krum_sees_a_small_distance_between_large_weights(tmp_path: Path) -> None:
    base = {"w": np.full(1000, 300.0, np.float32)}
    weights.save(tmp_path / "base", base)
    random = np.random.default_rng(0)
    models = [{"w": base["w"] + (1e-3 * random.standard_normal(1000)).astype(np.float32)} for _ in range(4)]
    models.append({"w": base["w"] + np.float32(0.01)})  # norms and products in float32 are wrong by more than this
    chosen = select(Aggregation(method="multi_krum"), saved(tmp_path, models), tmp_path / "base")
    assert sorted(chosen) == ["s0", "s1", "s2", "s3"]


def test_equal_scores_of_krum_are_decided_by_the_names(tmp_path: Path) -> None:
    weights.save(tmp_path / "base", model(9))
    updates = saved(tmp_path, [model(5), model(0), model(5), model(5), model(0)])
    rule = Aggregation(method="multi_krum")
    assert select(rule, updates, tmp_path / "base") == ["s0", "s2", "s3", "s1"]
    assert select(rule, dict(reversed(updates.items())), tmp_path / "base") == ["s0", "s2", "s3", "s1"]
    assert select(Aggregation(method="krum"), updates, tmp_path / "base") == ["s0"]


def test_krum_refuses_fewer_sites_than_it_can_promise_anything_for(tmp_path: Path) -> None:
    weights.save(tmp_path / "base", model(9))
    with pytest.raises(ValueError, match="needs 5 updates, not 4"):
        aggregated(tmp_path, "krum", saved(tmp_path, [model(number) for number in range(4)]))


# ---- memory -------------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
from federation.study import Aggregation
from orchestrator.aggregation.rules import Update, aggregate

folder, method = Path(sys.argv[1]), sys.argv[2]

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def run(count):
    updates = {f"s{number:02d}": Update(folder / f"update-{number % 4}", 1.0) for number in range(count)}
    Path("/proc/self/clear_refs").write_text("5")
    idle = memory("VmRSS")
    aggregate(Aggregation(method=method, faulty_sites=0), updates, folder / "base", folder / f"out-{method}",
              folder / "none", folder / f"state-{method}")
    return memory("VmHWM") - idle

run(4)
print(json.dumps([run(4), run(16)]))
"""


@pytest.fixture(scope="module")
def large_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and four updates of 24 MB."""
    folder, random = tmp_path_factory.mktemp("large"), np.random.default_rng(0)
    for name in ("base", *(f"update-{number}" for number in range(4))):
        weights.save(folder / name, {"w": random.standard_normal(6_000_000, np.float32)})
    return folder


@pytest.mark.parametrize("method", ["mean", "fedadam", "trimmed_mean", "multi_krum"])
def test_memory_grows_neither_with_the_number_of_sites_nor_to_the_size_of_a_model(
    large_models: Path, method: str
) -> None:
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_models), method],
        check=True,
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    ).stdout
    few, many = json.loads(output)
    assert many < few + 4e6  # twelve more of these models would be 288 MB
    assert many < 20e6


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
    check_answer(task, result, True)
    admitted = admit(task, result, update, tmp_path / "base", 12)
    assert admitted.cases == 12
    assert admitted.norm == pytest.approx(0.01 * math.sqrt(sum(math.prod(s) for s in SHAPES.values())), rel=1e-3)


LISTS = ("learning_rate", "train_loss", "val_loss")
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
        (perturbed(), {"cases": 10**6}, "declared"),
        (perturbed(), {"plans_sha256": "cd" * 32}, "other plans"),
        (perturbed(), {"epochs": 2, **{key: [0.1, 0.1] for key in LISTS}, "pseudo_dice": [[0.5], [0.5]]}, "epochs"),
    ],
)
def test_an_update_that_may_not_count_is_refused_with_its_reason(
    tmp_path: Path, update: dict[str, np.ndarray], changes: dict[str, object], why: str
) -> None:
    task, result, file = answered(tmp_path, update, **changes)
    with pytest.raises(FednnunetError, match=why) as caught:
        admit(task, result, file, tmp_path / "base", 12)
    assert caught.value.code is Code.UPDATE_REFUSED


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"conv.weight": lambda value: value.astype(np.float32)}, "type"),
        ({"conv.weight": lambda value: value.astype(np.uint8 if value.dtype == np.int8 else np.int8)}, "type"),
        ({"norm.bias": lambda value: np.full_like(value, np.nan)}, "NaN"),
        ({"norm.bias": lambda value: np.full_like(value, np.inf)}, "NaN or infinite"),
        ({"a.norm.running_var": lambda value: -value}, "negative variance"),
        ({weights.EXPONENTS: lambda value: value + np.asarray([0, 60, 60], np.int32)}, "distance"),
        ({weights.EXPONENTS: lambda value: value + np.asarray([0, 10**6, 0], np.int32)}, "exponent of conv.weight"),
        ({weights.EXPONENTS: lambda value: value + np.asarray([60, 0, 0], np.int32)}, "exponent of a.norm.running_var"),
        (
            {"conv.weight": np.zeros_like, weights.EXPONENTS: lambda value: np.asarray([0, 101, 0], np.int32)},
            "exponent of conv.weight",
        ),
        ({weights.EXPONENTS: lambda value: value[1:]}, "shape"),
    ],
)
@pytest.mark.parametrize("wire", ["half", "int8"])
def test_a_difference_is_held_to_the_same_rules(
    tmp_path: Path, wire: weights.Wire, change: dict[str, Callable[[np.ndarray], np.ndarray]], why: str | None
) -> None:
    random, shapes = np.random.default_rng(0), {"conv.weight": (4, 3, 3), "norm.bias": (4,), "a.norm.running_var": (4,)}
    base, new = ({name: random.random(shape, np.float32) for name, shape in shapes.items()} for _ in range(2))
    digest = weights.save(tmp_path / "base", base)
    weights.save(tmp_path / "new", new)
    weights.encode_difference(tmp_path / "new", tmp_path / "base", None, tmp_path / "d", tmp_path / "carry", wire)
    sent = TensorFile(tmp_path / "d")
    assert np.array_equal(sent.read("a.norm.running_var"), new["a.norm.running_var"]), "it travels as it is"
    parts = {name: sent.read(name) for name in sent.names}
    weights.save(tmp_path / "d", parts | {name: changed(parts[name]) for name, changed in change.items()})
    task, result, _ = answered(tmp_path / "full", perturbed())
    header = weights.describe_difference(tmp_path / "d", digest, digest)
    asked = weights.describe_full(tmp_path / "base", digest)
    task = task.model_copy(update={"study": a_study(wire=wire), "weights": asked})
    result = result.model_copy(update={"weights": header})
    if why is None:
        admitted = admit(task, result, tmp_path / "d", tmp_path / "base", 12)
        distance = math.sqrt(sum(float(((new[name] - base[name]) ** 2).sum()) for name in shapes))
        assert admitted.norm == pytest.approx(distance, rel=0.01)
        updates = {"a": Update(tmp_path / "d", 1.0), "b": Update(tmp_path / "d", 3.0)}
        weighted_mean(updates, tmp_path / "base", tmp_path / "out")
        for name in shapes:
            np.testing.assert_allclose(TensorFile(tmp_path / "out").read(name), new[name], rtol=0, atol=2.0**-7)
        return
    with pytest.raises(FednnunetError, match=why) as caught:
        admit(task, result, tmp_path / "d", tmp_path / "base", 12)
    assert caught.value.code is Code.UPDATE_REFUSED


def test_cases_of_zero_or_less_or_beyond_all_reason_cannot_even_be_said(tmp_path: Path) -> None:
    for cases in (0, -1):
        with pytest.raises(ValueError, match="greater than or equal to 1"):
            answered(tmp_path, perturbed(), cases=cases)
    with pytest.raises(ValueError, match="less than or equal to 1000000"):
        answered(tmp_path, perturbed(), cases=10**12)


def test_another_rounds_or_another_sites_answer_is_refused(tmp_path: Path) -> None:
    task, result, _ = answered(tmp_path, perturbed())
    for other in (task.model_copy(update={"round": 3}), task.model_copy(update={"site": "b"})):
        with pytest.raises(FednnunetError) as caught:
            check_answer(other, result, True)
        assert caught.value.code is Code.RESULT_REFUSED


def test_a_report_whose_weights_did_not_come_or_weights_nobody_asked_for_are_refused(tmp_path: Path) -> None:
    task, trained, _ = answered(tmp_path, perturbed())
    describe = Task(study=task.study, site=task.site, kind=Kind.DESCRIBE)
    described = Result.answering(describe, description=Description(training_cases=5, test_cases=0))
    for asked, result, has_weights in ((task, trained, False), (describe, described, True)):
        with pytest.raises(FednnunetError, match="weights missing from or added to") as caught:
            check_answer(asked, result, has_weights)
        assert caught.value.code is Code.RESULT_REFUSED


def test_a_file_that_is_not_the_one_described_is_refused(tmp_path: Path) -> None:
    task, result, file = answered(tmp_path, perturbed())
    weights.save(file, model(7))
    with pytest.raises(FednnunetError, match="not the one"):
        admit(task, result, file, tmp_path / "base", 12)
