"""Rules of a study that change what a site does in its rounds: FedProx, layers that stay, momentum that is reset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from worker_site import Site, initial_weights, make_study, prepared_site

from appliance.worker.training import ProximalPull
from federation import files, tasks, weights
from federation.errors import Code, FednnunetError
from federation.layers import kept_local
from federation.weights import TensorFile

TRAIN = tasks.Kind.TRAIN


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def round_of(site: Site, number: int, given: Path) -> Path:
    """Let a site train a round on full weights; returns its update."""
    task = site.task(TRAIN, number)
    result = site.ask(task, given)
    assert result.failure is None, result.failure
    return site.update(task)


def distance(first: Path, second: Path) -> float:
    one, other = TensorFile(first), TensorFile(second)
    return float(np.sqrt(sum(np.square(one.read(name) - other.read(name)).sum() for name in one.names)))


# FedProx


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_the_pull_is_the_gradient_of_the_proximal_term(optimizer: Any) -> None:
    """Against autograd on loss + mu / 2 * squared distance (Li et al. 2020, equation 2), over several steps."""
    mu = 0.3
    trained = []
    for by_hook in (True, False):
        torch.manual_seed(0)
        network = torch.nn.Linear(4, 3)
        steps = optimizer(network.parameters(), lr=0.1)
        reference = [parameter.detach().clone() for parameter in network.parameters()]
        pull = ProximalPull(network, ["weight", "bias"], mu)
        with pull.on(steps):
            for _ in range(5):
                steps.zero_grad()
                loss = network(torch.ones(2, 4)).square().sum()
                if by_hook:
                    loss.backward()
                    steps.step()
                    continue
                far = sum((p - r).square().sum() for p, r in zip(network.parameters(), reference, strict=True))
                with torch.no_grad():
                    pull._pairs = []
                (loss + mu / 2 * far).backward()
                steps.step()
        trained.append(network.weight.detach().numpy().copy())
    np.testing.assert_allclose(trained[0], trained[1], rtol=0, atol=1e-6)


def test_the_stronger_the_pull_the_nearer_the_update_stays_and_the_first_step_is_free(tmp_path: Path) -> None:
    far = []
    for mu in (0.0, 1.0, 10.0):
        site = prepared_site(tmp_path / f"{mu}", proximal_mu=mu, iterations_per_epoch=6)
        far.append(distance(round_of(site, 1, initial_weights()), initial_weights()))
    assert far[0] > far[1] > far[2] > 0
    first = []
    for mu in (0.0, 1.0):
        site = prepared_site(tmp_path / f"one-{mu}", proximal_mu=mu, iterations_per_epoch=1)
        first.append(files.sha256_of(round_of(site, 1, initial_weights())))
    assert first[0] == first[1], "at the global weights the pull is zero"


def test_the_logged_loss_is_nnunets_own_and_the_hook_ends_with_the_round(tmp_path: Path) -> None:
    site = prepared_site(tmp_path, proximal_mu=5.0, iterations_per_epoch=1)
    plain = prepared_site(tmp_path / "plain", iterations_per_epoch=1)
    losses = [one.ask(one.task(TRAIN, 1), initial_weights()).training.train_loss for one in (site, plain)]
    assert losses[0] == losses[1]
    assert not site.worker.trainer.trainer.optimizer._optimizer_step_pre_hooks


# layers that stay


def local_of(site: Site, patterns: list[str]) -> set[str]:
    return kept_local(TensorFile(initial_weights()).names, patterns)


def without(file: Path, names: set[str], out: Path) -> Path:
    """The shared part of a weights file, as the orchestrator's views make it."""
    shared = {name: name for name in TensorFile(file).names if name not in names}
    weights.select(file, shared, out)
    return out


@pytest.mark.parametrize("patterns", [["norm"], ["seg_head"], ["decoder.*"], ["norm", "seg_head"]])
def test_layers_that_stay_are_not_in_the_update(tmp_path: Path, patterns: list[str]) -> None:
    site = prepared_site(tmp_path, keep_local=patterns, iterations_per_epoch=1)
    local = local_of(site, patterns)
    assert local
    update = TensorFile(round_of(site, 1, without(initial_weights(), local, tmp_path / "sent")))
    assert set(update.names) == set(TensorFile(initial_weights()).names) - local


def test_layers_that_stay_begin_as_the_orchestrator_would_begin_them(tmp_path: Path) -> None:
    """So a study with `keep_local` begins at every site where one without it begins."""
    study = {"keep_local": ["norm", "seg_head"], "iterations_per_epoch": 1, "seed": make_study().seed}
    kept, plain = prepared_site(tmp_path / "kept", **study), prepared_site(tmp_path / "plain", iterations_per_epoch=1)
    local = local_of(kept, ["norm", "seg_head"])
    update = TensorFile(round_of(kept, 1, without(initial_weights(), local, tmp_path / "sent")))
    whole = TensorFile(round_of(plain, 1, initial_weights()))
    for name in update.names:
        np.testing.assert_array_equal(update.read(name), whole.read(name))


def test_layers_that_stay_go_on_from_round_to_round_also_in_a_new_worker(tmp_path: Path) -> None:
    sent = []
    for name, killed in (("warm", False), ("killed", True)):
        site = prepared_site(tmp_path / name, keep_local=["norm"], momentum="reset")
        shared = without(initial_weights(), local_of(site, ["norm"]), tmp_path / "sent")
        first = files.sha256_of(round_of(site, 1, shared))
        if killed:
            site.restart()
        sent.append((first, files.sha256_of(round_of(site, 2, shared))))
    assert sent[0] == sent[1]
    fresh = prepared_site(tmp_path / "fresh", keep_local=["norm"], momentum="reset")
    assert files.sha256_of(round_of(fresh, 2, shared)) != sent[0][1], "the layers that stayed have been trained"


def test_the_sites_model_is_the_global_layers_and_its_own(tmp_path: Path) -> None:
    site = prepared_site(tmp_path, keep_local=["norm"])
    local = local_of(site, ["norm"])
    shared = without(initial_weights(), local, tmp_path / "sent")
    round_of(site, 1, shared)
    site.restart()
    assert site.ask(site.task(tasks.Kind.VALIDATE), shared).failure is None
    assert site.ask(site.task(tasks.Kind.FINISH), shared).failure is None
    (checkpoint,) = site.settings.work.rglob("checkpoint_final.pth")
    model = torch.load(checkpoint, weights_only=True)["network_weights"]
    first = TensorFile(initial_weights())
    for name in first.names:
        same = np.array_equal(model[name].numpy(), first.read(name))
        assert same == (name not in local), name


def test_an_orchestrator_that_sends_layers_which_stay_is_refused(tmp_path: Path) -> None:
    """What the study keeps at the site cannot be asked for by sending it: an update has the names that came."""
    site = prepared_site(tmp_path, keep_local=["seg_head"])
    result = site.ask(site.task(TRAIN, 1), initial_weights())
    assert result.failure is not None
    assert [problem.code for problem in result.failure.problems] == [Code.WEIGHTS_DO_NOT_FIT.number]


def test_finish_whose_answer_could_not_be_written_is_done_again_with_the_sites_own_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.worker.loop.PAUSE", 0.0)
    site = prepared_site(tmp_path, keep_local=["norm"])
    shared = without(initial_weights(), local_of(site, ["norm"]), tmp_path / "sent")
    round_of(site, 1, shared)
    task = site.task(tasks.Kind.FINISH)
    site.put(task, shared)
    (waiting,) = site.spool.waiting()

    def full(*_: object) -> None:
        raise FednnunetError(Code.DISK_FULL, "simulated")

    with monkeypatch.context() as patch:
        patch.setattr(site.worker.spool, "put_result", full)
        site.worker.handle(waiting)
    (checkpoint,) = site.settings.work.rglob("checkpoint_final.pth")
    before = torch.load(checkpoint, weights_only=True)["network_weights"]
    site.restart()
    (waiting,) = site.spool.waiting()
    assert site.worker.handle(waiting)
    result = site.spool.result(task)
    assert result is not None
    assert result.failure is None
    after = torch.load(checkpoint, weights_only=True)["network_weights"]
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not list(site.settings.work.rglob("after-*.pt")), "the state goes once the answer is there"


# momentum


def test_momentum_that_is_reset_leaves_nothing_of_the_round_before(tmp_path: Path) -> None:
    updates = {}
    for momentum in ("reset", "keep"):
        site = prepared_site(tmp_path / momentum, momentum=momentum)
        round_of(site, 1, initial_weights())
        updates[momentum] = files.sha256_of(round_of(site, 2, initial_weights()))
    fresh = prepared_site(tmp_path / "fresh", momentum="reset")
    assert updates["reset"] == files.sha256_of(round_of(fresh, 2, initial_weights()))
    assert updates["keep"] != updates["reset"]
