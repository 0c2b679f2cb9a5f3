"""What one hostile site of five can do: each attack refused with its number, or its harm in Dice under each method.

    python benchmarks/adversaries.py [--rounds 6] [--output adversaries.json]

Five phantom hospitals train for real (in one process: real coordinator, journal, admission, aggregation and workers, no
network; tests/in_process.py). The fifth one's answers are changed on their way to the orchestrator.

- First table: attacks that can be seen. One study with a quorum of four; in each round the hostile site tries another.
- Second table: attacks that look like an update. A study for each attack and method; the figure is the mean
  Dice of the four honest sites' held-out cases (imagesTs), and its loss against the clean study by the plain mean.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from in_process import Federation, Outcome

from federation.errors import FednnunetError
from federation.study import Study, parse
from federation.tasks import Kind, Task
from federation.weights import Spec, TensorFile, write_tensors
from orchestrator.admin.phantom import SITES, make_phantom_sites, phantom_study

HOSTILE = "hospital_e"
METHODS = ("mean", "median", "trimmed_mean", "krum", "multi_krum")
Change = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], dict[str, np.ndarray]]
Words = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Attack:
    """What becomes of the hostile site's answer: of its weights, given those it started from, or of its words."""

    weights: Change | None = None
    words: Words | None = None


def everywhere(value: float) -> Change:
    """Every number of every tensor."""
    return lambda update, base: {name: np.full_like(tensor, value) for name, tensor in update.items()}


def one(value: float) -> Change:
    """One number of one tensor."""

    def change(update: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = max(update, key=lambda key: update[key].size)
        update[name].reshape(-1)[0] = value
        return update

    return change


def moved(factor: float) -> Change:
    """The site's own step, times a factor: -1 turns it round."""
    return lambda update, base: {
        name: (base[name] + factor * (update[name] - base[name])).astype(np.float32) for name in update
    }


def noise(update: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Chance of the size of the weights in the place of a step."""
    random = np.random.default_rng(0)
    return {
        name: (tensor + np.std(tensor) * random.standard_normal(tensor.shape)).astype(np.float32)
        for name, tensor in update.items()
    }


def renamed(update: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One tensor under another name."""
    first = min(update)
    return {("x" + name if name == first else name): tensor for name, tensor in update.items()}


def reshaped(update: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One tensor in another shape."""
    first = max(update, key=lambda key: update[key].size)
    return update | {first: update[first].reshape(-1)}


def doubled(update: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One tensor in float64."""
    first = min(update)
    return update | {first: update[first].astype(np.float64)}


def said(**fields: Any) -> Words:
    """Other words in the report of the round."""
    return lambda body: body["training"].update(fields)


def of_round(number: int) -> Words:
    """An answer that names another round."""
    return lambda body: body.update(round=number)


SEEN: dict[str, Attack] = {
    "NaN in one number": Attack(weights=one(float("nan"))),
    "Inf in one number": Attack(weights=one(float("inf"))),
    "every number 1e30": Attack(weights=everywhere(1e30)),
    "its step times 1e6": Attack(weights=moved(1e6)),
    "a tensor in another shape": Attack(weights=reshaped),
    "a tensor in float64": Attack(weights=doubled),
    "a tensor under another name": Attack(weights=renamed),
    "0 cases": Attack(words=said(cases=0)),
    "-1 cases": Attack(words=said(cases=-1)),
    "1e12 cases": Attack(words=said(cases=10**12)),
    "more cases than it declared": Attack(words=said(cases=5000)),
    "the answer to round 1 again": Attack(words=of_round(1)),
    "trained with another plan": Attack(words=said(plans_sha256="0" * 64)),
}
UNSEEN: dict[str, Attack] = {
    "zeros": Attack(weights=everywhere(0.0)),
    "its step turned round": Attack(weights=moved(-1.0)),
    "its step turned round, times 10": Attack(weights=moved(-10.0)),
    "its step times 10": Attack(weights=moved(10.0)),
    "noise as large as the weights": Attack(weights=noise),
}


class Liar:
    """Changes the hostile site's answers to Train.

    Parameters
    ----------
    federation : Federation
        Where the round's weights lie.
    attack : callable
        Which attack a round gets; None: none.
    """

    def __init__(self, federation: Federation, attack: Callable[[int], Attack | None]) -> None:
        self._federation, self._attack = federation, attack

    def __call__(self, task: Task, body: str, weights: Path) -> str:
        """The answer as the orchestrator gets it."""
        if task.site != HOSTILE or task.kind is not Kind.TRAIN or task.round is None:
            return body
        attack = self._attack(task.round)
        if attack is None:
            return body
        answer = json.loads(body)
        if attack.words is not None:
            attack.words(answer)
        if attack.weights is None:
            return json.dumps(answer)
        before = self._federation.study_folder(task.study) / "rounds" / f"fold_{task.fold}" / f"{task.round - 1:04d}"
        update, base = TensorFile(weights), TensorFile(before / "global.safetensors")
        changed = attack.weights(
            {name: update.read(name) for name in update.names}, {name: base.read(name) for name in base.names}
        )
        specs = {name: Spec(tensor.dtype, tensor.shape) for name, tensor in changed.items()}
        digest = write_tensors(weights, specs, lambda name: changed[name])
        answer["weights"] |= {"file_sha256": digest, "digest": digest, "nbytes": weights.stat().st_size}
        return json.dumps(answer)


def study_of(name: str, rounds: int, sites: list[str], **changes: Any) -> Study:
    """A study over the five phantom hospitals."""
    return parse(phantom_study(sites, rounds, 15) | {"name": name, "seed": 1, **changes})


def dice(outcome: Outcome, sites: list[str]) -> float:
    """Mean over sites and labels of the final model's Dice on imagesTs."""
    scores = [score.mean or 0.0 for site in sites for score in outcome.scores(site).test.values()]
    return float(np.mean(scores))


def refusals(federation: Federation, sites: list[str]) -> list[dict[str, Any]]:
    """First table: what becomes of each attack that can be seen."""
    names = list(SEEN)
    study = study_of("seen", len(names) + 1, sites, quorum=4, iterations_per_epoch=2)
    outcome = federation.run(
        study, lie=Liar(federation, lambda number: SEEN[names[number - 2]] if number > 1 else None)
    )
    rows = []
    for number, name in enumerate(names, 2):
        key = f"train-fold_all-{number:04d}"
        (closed,) = [line for line in outcome.events("closed") if line["round"] == number]
        refused = [line["reason"] for line in outcome.events("refused") if line["key"] == key]
        assert HOSTILE not in closed["participants"], name
        assert len(closed["participants"]) == 4, name
        rows.append({"attack": name, "refused": refused[0]})
    return rows


def main() -> None:
    """Run the attacks and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        kinds = list(SITES.values())
        chosen = {
            f"hospital_{letter}": replace(kinds[number % len(kinds)], dataset=f"Dataset{301 + number}_Phantom")
            for number, letter in enumerate("abcde")
        }
        data = make_phantom_sites(Path(name) / "hospitals", chosen)
        sites, honest = sorted(data), [site for site in sorted(data) if site != HOSTILE]
        federation = Federation(Path(name) / "federation", data)
        seen = refusals(federation, sites)
        table = Table(title="Attacks that are seen: refused, the round goes on with the other four")
        table.add_column("one site sends")
        table.add_column("the journal says")
        for row in seen:
            table.add_row(row["attack"], row["refused"].partition(": ")[2][:80] or row["refused"][:80])
        console.print(table)
        rows = []
        attacks: dict[str, Attack | None] = {"nothing (clean)": None, **UNSEEN}
        for title, attack in attacks.items():
            row: dict[str, Any] = {"attack": title}
            for method in METHODS:
                study = study_of(f"{method}-{len(rows)}", arguments.rounds, sites, aggregation={"method": method})
                try:
                    row[method] = dice(
                        federation.run(study, lie=Liar(federation, lambda number, what=attack: what)), honest
                    )
                except FednnunetError as error:  # a model of no use may fail to validate
                    row[method] = None
                    row.setdefault("failed", {})[method] = str(error)
            rows.append(row)
            print(json.dumps(row), flush=True)
    table = Table(title=f"Attacks that look like an update: Dice of the other four, {arguments.rounds} rounds")
    table.add_column("one site of five sends")
    for method in METHODS:
        table.add_column(method, justify="right")
    for row in rows:
        table.add_row(row["attack"], *("failed" if row[method] is None else f"{row[method]:.3f}" for method in METHODS))
    console.print(table)
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"rounds": arguments.rounds, "seen": seen, "unseen": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
