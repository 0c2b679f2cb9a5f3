"""Every method of aggregation gives what Flower's own strategy gives for the same updates, within 1e-6.

Flower's strategies run here as they are, on real messages. Where its arithmetic is float32 and would itself be wrong by
more than 1e-6, it is given the same numbers as float64: its formulas are the reference, not its rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    MultiKrum,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import weights
from federation.study import Aggregation
from federation.weights import TensorFile
from orchestrator.aggregation.robust import ROWS, select
from orchestrator.aggregation.rules import Update, aggregate
from orchestrator.aggregation.sources import PIECE

SMALL: dict[str, tuple[int, ...]] = {"conv.weight": (5, 4, 3), "conv.bias": (5,), "scalar": ()}
SHAPES = SMALL | {"large": (PIECE + 17,)}
Model = dict[str, np.ndarray]


def step(random: np.random.Generator, start: Model, size: float) -> Model:
    """Weights near others."""
    return {
        name: (value + size * random.standard_normal(value.shape)).astype(np.float32) for name, value in start.items()
    }


def record(model: Model, dtype: type) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value, dtype)) for name, value in model.items()})


def replies(models: list[Model], cases: list[int], dtype: type) -> list[Message]:
    """The sites' answers to Flower's server."""
    answers = []
    for number, (model, count) in enumerate(zip(models, cases, strict=True), 1):
        content = RecordDict({"arrays": record(model, dtype), "metrics": MetricRecord({"num-examples": count})})
        about = Metadata(
            run_id=1,
            message_id="",
            src_node_id=number,
            dst_node_id=0,
            reply_to_message_id="",
            group_id="",
            created_at=0.0,
            ttl=60.0,
            message_type="train",
        )
        answers.append(Message(content, metadata=about))
    return answers


def flowers(strategy: FedAvg, number: int, base: Model, answers: list[Message], dtype: type) -> Model:
    """What a strategy makes of a round's answers; `base` is set as its configure_train would."""
    if isinstance(strategy, FedAvgM):
        strategy.current_arrays = strategy.current_arrays or record(base, dtype)
    elif hasattr(strategy, "current_arrays"):
        strategy.current_arrays = {name: array.numpy() for name, array in record(base, dtype).items()}
    arrays, _ = strategy.aggregate_train(number, answers)
    assert arrays is not None
    return {name: array.numpy() for name, array in arrays.items()}


@dataclass
class Sites:
    """Simulated sites: files of updates in a folder, and the same updates in memory."""

    folder: Path
    cases: list[int]
    random: np.random.Generator
    half: bool = False
    shapes: dict[str, tuple[int, ...]] = field(default_factory=lambda: SHAPES)

    def __post_init__(self) -> None:
        zeros = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        weights.save(self.folder / "base", step(self.random, zeros, 1.0))
        self.base, self.state, self.number = self.folder / "base", self.folder / "none", 0

    def models(self, size: float = 0.02) -> tuple[list[Model], dict[str, Update]]:
        """This round's updates; with `half`, every second travels as a difference, in turn in 8 and in 16 bits."""
        models, updates = [], {}
        for number, count in enumerate(self.cases):
            model = step(self.random, self.current(), size)
            path = self.folder / f"update-{number}"
            weights.save(path, model)
            if self.half and number % 2 == 0:
                difference, carry = self.folder / "difference", self.folder / "carry"
                weights.encode_difference(path, self.base, None, difference, carry, "half" if number % 4 else "int8")
                weights.apply_difference(self.base, difference, path)
                model = read(path)
                difference.replace(path)
            models.append(model)
            updates[f"site_{number:02d}"] = Update(path, float(count))
        return models, updates

    def current(self) -> Model:
        return read(self.base)

    def aggregate(self, rule: Aggregation, updates: dict[str, Update]) -> Model:
        """Our next weights, which the next round starts from."""
        self.number += 1
        out, after = self.folder / f"global-{self.number}", self.folder / f"state-{self.number}"
        digest = aggregate(rule, updates, self.base, out, self.state, after)
        assert digest == TensorFile(out).digest
        self.base, self.state = out, after
        return self.current()


def read(path: Path) -> Model:
    file = TensorFile(path)
    return {name: file.read(name) for name in file.names}


def assert_close(ours: Model, theirs: Model) -> None:
    assert set(ours) == set(theirs)
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name].reshape(values.shape), rtol=1e-6, atol=1e-6, err_msg=name)


def optimizer(rule: Aggregation) -> FedAvg:
    """Flower's strategy with the numbers of a rule."""
    if rule.method == "fedavgm":
        return FedAvgM(server_learning_rate=rule.step, server_momentum=rule.server_momentum)
    if rule.method == "fedadagrad":
        return FedAdagrad(eta=rule.step, tau=rule.tau)
    kind = FedYogi if rule.method == "fedyogi" else FedAdam
    return kind(eta=rule.step, beta_1=rule.beta_1, beta_2=rule.beta_2, tau=rule.tau)


CASES = st.lists(st.integers(1, 5000), min_size=1, max_size=6)
SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=6, deadline=None)
@given(CASES, SEEDS, st.booleans())
def test_the_mean_is_flowers_fedavg(
    tmp_path_factory: pytest.TempPathFactory, cases: list[int], seed: int, half: bool
) -> None:
    sites = Sites(tmp_path_factory.mktemp("mean"), cases, np.random.default_rng(seed), half)
    models, updates = sites.models()
    theirs = flowers(FedAvg(), 1, {}, replies(models, cases, np.float64), np.float64)
    assert_close(sites.aggregate(Aggregation(), updates), theirs)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("fedavgm", np.float32),
        ("fedadam", np.float32),
        # without a first moment the first step, d / (|d| + tau), multiplies what Flower's float32 mean has rounded off
        ("fedadagrad", np.float64),
        # the sign in Yogi's formula, and so its step, is decided by rounding where v and d^2 are all but equal
        ("fedyogi", np.float64),
    ],
)
def test_five_rounds_of_an_optimizer_with_its_defaults_are_flowers(tmp_path: Path, method: str, dtype: type) -> None:
    rule = Aggregation(method=method)  # type: ignore[arg-type]
    sites, strategy = Sites(tmp_path, [40, 3, 17], np.random.default_rng(0)), optimizer(rule)
    theirs = sites.current()
    for number in range(1, 6):
        models, updates = sites.models()
        theirs = flowers(strategy, number, theirs, replies(models, sites.cases, dtype), dtype)
        assert_close(sites.aggregate(rule, updates), theirs)


@pytest.mark.parametrize("method", ["fedavgm", "fedadagrad", "fedyogi", "fedadam"])
@pytest.mark.parametrize("half", [False, True])
@settings(max_examples=3, deadline=None)
@given(
    cases=CASES,
    seed=SEEDS,
    numbers=st.fixed_dictionaries(
        {
            "server_learning_rate": st.none() | st.floats(1e-3, 0.1),
            "server_momentum": st.floats(0, 0.99),
            "beta_1": st.floats(0, 0.99),
            "beta_2": st.floats(0, 0.999),
            "tau": st.floats(1e-3, 1.0),
        }
    ),
)
def test_rounds_of_an_optimizer_with_any_numbers_are_flowers(
    tmp_path_factory: pytest.TempPathFactory,
    method: str,
    cases: list[int],
    seed: int,
    half: bool,
    numbers: dict[str, float],
) -> None:
    rule = Aggregation(method=method, **numbers)  # type: ignore[arg-type]
    sites = Sites(tmp_path_factory.mktemp(method), cases, np.random.default_rng(seed), half, SMALL)
    strategy = optimizer(rule)
    for number in range(1, 4):
        base = sites.current()
        models, updates = sites.models()
        theirs = flowers(strategy, number, base, replies(models, cases, np.float64), np.float64)
        assert_close(sites.aggregate(rule, updates), theirs)


@settings(max_examples=8, deadline=None)
@given(CASES | st.integers(ROWS // PIECE + 1, 17).map(lambda count: [3] * count), SEEDS, st.booleans())
def test_the_median_is_flowers_whatever_the_sites_say_of_their_cases(
    tmp_path_factory: pytest.TempPathFactory, cases: list[int], seed: int, half: bool
) -> None:
    sites = Sites(tmp_path_factory.mktemp("median"), cases, np.random.default_rng(seed), half)
    models, updates = sites.models()
    theirs = flowers(FedMedian(), 1, {}, replies(models, cases, np.float32), np.float32)
    assert_close(sites.aggregate(Aggregation(method="median"), updates), theirs)


@settings(max_examples=8, deadline=None)
@given(CASES | st.just([3] * 20), st.floats(0, 0.5, exclude_max=True), SEEDS, st.booleans())
def test_the_trimmed_mean_is_flowers_whatever_the_sites_say_of_their_cases(
    tmp_path_factory: pytest.TempPathFactory, cases: list[int], trim: float, seed: int, half: bool
) -> None:
    sites = Sites(tmp_path_factory.mktemp("trimmed"), cases, np.random.default_rng(seed), half)
    models, updates = sites.models()
    theirs = flowers(FedTrimmedAvg(beta=trim), 1, {}, replies(models, cases, np.float32), np.float32)
    assert_close(sites.aggregate(Aggregation(method="trimmed_mean", trim=trim), updates), theirs)


@settings(max_examples=8, deadline=None)
@given(st.data(), SEEDS, st.booleans())
def test_krum_and_multi_krum_are_flowers_when_all_sites_say_the_same_of_their_cases(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int, half: bool
) -> None:
    faulty = data.draw(st.integers(0, 3))
    count = data.draw(st.integers(2 * faulty + 3, 12))
    selected = data.draw(st.integers(1, count - faulty))
    sites = Sites(tmp_path_factory.mktemp("krum"), [7] * count, np.random.default_rng(seed), half)
    models, updates = sites.models()
    for rule, strategy in (
        (Aggregation(method="krum", faulty_sites=faulty), Krum(num_malicious_nodes=faulty)),
        (
            Aggregation(method="multi_krum", faulty_sites=faulty, selected_sites=selected),
            MultiKrum(num_malicious_nodes=faulty, num_nodes_to_select=selected),
        ),
    ):
        theirs = flowers(strategy, 1, {}, replies(models, sites.cases, np.float64), np.float64)
        out = sites.folder / rule.method
        digest = aggregate(rule, updates, sites.base, out, sites.state, sites.state)
        assert_close(read(out), theirs)
        told = select(rule, updates, sites.base)
        assert len(told) == (1 if rule.method == "krum" else selected)
        assert aggregate(rule, updates, sites.base, out, sites.state, sites.state, told) == digest
