"""Optimizers at the orchestrator: the mean of the sites' weights is a direction, and the global weights step along it.

With the direction ``d = mean - base`` (the negative of the pseudo-gradient), element by element:

- fedavgm (Hsu et al. 2019, arXiv 1909.06335): ``m = momentum * m + d``; ``new = base + step * m``.
- fedadagrad, fedyogi, fedadam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2):
  ``m = beta_1 * m + (1 - beta_1) * d``; ``new = base + step * m / (sqrt(v) + tau)``, with
  ``v = v + d^2`` (fedadagrad), ``v = v - (1 - beta_2) * d^2 * sign(v - d^2)`` (fedyogi),
  ``v = beta_2 * v + (1 - beta_2) * d^2`` (fedadam).

Where the papers leave a choice, or Flower (1.41, `flwr.serverapp.strategy`) made another, we compute what Flower does:

- m and v start at zero. Algorithm 2 wants ``v >= tau^2`` at the start; with zero, tau alone bounds the first step.
- fedadam's step is corrected for that start as in Kingma and Ba 2015 (arXiv 1412.6980, section 2), which algorithm 2
  does not do: ``step * sqrt(1 - beta_2^t) / (1 - beta_1^t)``. Flower takes ``t = round + 1`` where Kingma and Ba take
  ``t = round``, so Flower's first step is shorter. Our t counts the steps of a tensor, not the rounds: a round that
  failed, or whose sites did not hold the tensor, does not age its moments.
- fedadagrad has no first moment: ``beta_1 = 0``, as in Flower and in the experiments of Reddi et al.

Rules:

- Running statistics of batch normalisation are observed, not learned: their next value is the weighted mean. Flower
  steps along them too, which can make a variance negative.
- Means, steps and moments are one pass: every file is read once. Means and steps are float64; moments are float32.
- The state file is written whole or not at all, after the store. The same inputs give the same bytes of both, so a
  round that broke off is computed again from `base` and `before`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from federation.errors import Code, FednnunetError
from federation.files import replacing
from federation.layers import is_statistic
from federation.study import Aggregation
from federation.weights import SINGLE, Spec, TensorFile, TensorWriter
from orchestrator.aggregation.mean import mean_kernel, mean_step
from orchestrator.aggregation.sources import (
    Array,
    Inputs,
    Piece,
    Source,
    Update,
    pieces,
    scratch,
    write_store,
)

PIECE = 2**14  # elements: the six float64 arrays of a step stay in the cache
MOMENTUM, FIRST, SECOND, STEPS = "momentum", "first_moment", "second_moment", "steps"
_COUNT = np.dtype("<i8")


def optimizer_step(
    rule: Aggregation, updates: Mapping[str, Update], base: Path, out: Path, before: Path, after: Path
) -> str:
    """Step from the global weights along the weighted mean of the updates.

    Parameters
    ----------
    rule : Aggregation
        The method (`fedavgm`, `fedadagrad`, `fedyogi` or `fedadam`) and its numbers.
    updates : Mapping[str, Update]
        By site name.
    base : Path
        The round's global weights.
    out : Path
        Where the next global weights go.
    before, after : Path
        The optimizer's state of the round before (not there: the first round) and of this one. Raises FNU-404 when
        `before` belongs to another method or other weights.

    Returns
    -------
    str
        SHA-256 of `out`.
    """
    with Inputs(updates, base) as inputs, replacing(after) as temporary:
        learned = [key for key in inputs.keys if inputs.is_floating(key) and not is_statistic(key)]
        state = _State(rule, inputs.base.file, learned, before, temporary)
        try:

            def kernel(piece: Piece) -> Array:
                if is_statistic(piece.key):
                    return mean_kernel(inputs, piece)
                return _step(rule, inputs, state, piece)

            digest = write_store(inputs, out, kernel, PIECE)
            for key in learned:
                state.count(key, stepped=bool(inputs.holders(key)))
        finally:
            state.close()
    return digest


def _step(rule: Aggregation, inputs: Inputs, state: _State, piece: Piece) -> Array:
    """The next weights of a piece, float32; its moments go to the state."""
    base = inputs.base_piece(piece)
    direction = mean_step(inputs.parts(piece), base)
    if rule.method == "fedavgm":
        momentum = rule.server_momentum * state.read(MOMENTUM, piece) + direction
        state.write(MOMENTUM, piece, momentum)
        change = rule.step * momentum
    else:
        beta_1 = 0.0 if rule.method == "fedadagrad" else rule.beta_1
        first = beta_1 * state.read(FIRST, piece) + (1 - beta_1) * direction
        second = _second_moment(rule, state.read(SECOND, piece), np.square(direction, out=direction))
        state.write(FIRST, piece, first)
        state.write(SECOND, piece, second)
        change = _corrected_step(rule, state.steps(piece.key)) * first / (np.sqrt(second) + rule.tau)
    new: Array = (base + change).astype(SINGLE)
    return new


def _second_moment(rule: Aggregation, second: Array, squares: Array) -> Array:
    """The next second moment from the last one and the squares of the direction."""
    result: Array
    if rule.method == "fedadagrad":
        result = second + squares
    elif rule.method == "fedyogi":
        result = second - (1 - rule.beta_2) * squares * np.sign(second - squares)
    else:
        result = rule.beta_2 * second + (1 - rule.beta_2) * squares
    return result


def _corrected_step(rule: Aggregation, steps: int) -> float:
    """The learning rate after `steps` earlier steps of a tensor."""
    if rule.method != "fedadam":
        return rule.step
    exponent = steps + 2  # Flower's round + 1, whose first round is 1
    return rule.step * math.sqrt(1 - rule.beta_2**exponent) / (1 - rule.beta_1**exponent)


class _State:
    """The optimizer's moments: those of the round before are read, the next are written, piece by piece.

    A tensor of the state is called ``KEY~MOMENT``; ``KEY~steps`` counts the steps of a key, which fedadam needs.
    What is not written is what it was before: a key without a step in this round keeps its moments.
    """

    def __init__(self, rule: Aggregation, base: TensorFile, keys: list[str], before: Path, after: Path) -> None:
        self._moments = (MOMENTUM,) if rule.method == "fedavgm" else (FIRST, SECOND)
        self._counts = rule.method == "fedadam"
        self._base = base
        specs = {f"{key}~{moment}": Spec(SINGLE, base.spec(key).shape) for key in keys for moment in self._moments}
        if self._counts:
            specs |= {f"{key}~{STEPS}": Spec(_COUNT, ()) for key in keys}
        old = TensorFile(before) if before.exists() else None
        if old is not None and old.specs != specs:
            raise FednnunetError(
                Code.WEIGHTS_DO_NOT_FIT, f"{before}: the state of another optimizer or of other weights"
            )
        with open(after, "wb") as stream:
            TensorWriter(stream, specs)  # the header
            stream.truncate(stream.tell() + sum(spec.nbytes for spec in specs.values()))
        self._file = TensorFile(after)
        self._steps = {key: int(old.read(f"{key}~{STEPS}")) if old and self._counts else 0 for key in keys}
        self._old = Source(old) if old is not None else None
        self._descriptor = os.open(after, os.O_WRONLY)

    def read(self, moment: str, piece: Piece) -> Array:
        """A moment's piece before this round, until this thread reads another one."""
        if self._old is None:
            return np.zeros(piece.size, SINGLE)
        return self._old.read(f"{piece.key}~{moment}", piece.start, piece.size, scratch("moment", piece.size))

    def write(self, moment: str, piece: Piece, values: Array) -> None:
        """A moment's piece after this round. Threads may write different pieces at the same time."""
        self._put(f"{piece.key}~{moment}", piece.start, values.astype(SINGLE))

    def steps(self, key: str) -> int:
        """How many steps a key has taken before this round."""
        return self._steps[key]

    def count(self, key: str, stepped: bool) -> None:
        """Close a key's round: count its step, or carry its moments over."""
        if not stepped and self._old is not None:
            for piece in pieces(self._base, [key], PIECE):
                for moment in self._moments:
                    self.write(moment, piece, self.read(moment, piece))
        if self._counts:
            self._put(f"{key}~{STEPS}", 0, np.asarray([self._steps[key] + stepped], _COUNT))

    def _put(self, name: str, start: int, values: Array) -> None:
        data, position = memoryview(values.view(np.uint8)), self._file.offset(name) + start * values.itemsize
        while data:
            written = os.pwrite(self._descriptor, data, position)
            data, position = data[written:], position + written

    def close(self) -> None:
        """Close both files."""
        os.close(self._descriptor)
        if self._old is not None:
            self._old.close()
