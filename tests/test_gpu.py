"""Facts about the worker on a CUDA device: mixed precision, compiled network, memory, and what goes wrong only there.

`make test-gpu`, on a machine with a GPU and a C compiler; every test is skipped elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
from commands import wait_for
from worker_site import Site, initial_weights, make_settings, make_study, prepared_site, shared_site

from appliance.worker.training import FoldTrainer
from appliance.worker.workspace import Workspace
from federation import native, tasks
from federation.errors import Code
from federation.weights import TensorFile

REPOSITORY = Path(__file__).parents[1]
TRAIN = tasks.Kind.TRAIN
CUDA = {"device": "cuda", "augmentation_processes": 2, "threads": None, "compile": False}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def prepared(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Makes sites that have answered Prepare; their loaders end with the test."""
    before, made = dict(os.environ), []

    def make(changes: dict[str, Any] | None = None, **study: Any) -> Site:
        made.append(prepared_site(tmp_path, CUDA | (changes or {}), **study))
        return made[-1]

    yield make
    for site in made:
        site.worker._close()
    os.environ.clear()
    os.environ.update(before)


def codes(result: tasks.Result) -> list[int]:
    return [problem.code for problem in result.failure.problems] if result.failure else []


def test_a_round_is_mixed_precision_and_compiled_and_sends_plain_float32(
    prepared: Callable[..., Site],
) -> None:
    site = prepared({"compile": True})
    result = site.ask(site.task(TRAIN, 1), initial_weights())
    assert result.failure is None
    trainer = site.worker.trainer.trainer
    assert isinstance(trainer.network, torch._dynamo.OptimizedModule)
    assert trainer.grad_scaler is not None
    assert next(trainer.network.parameters()).is_cuda
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert site.ask(site.task(TRAIN, 2), initial_weights()).failure is None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # nothing is compiled again
    update = TensorFile(site.update(site.task(TRAIN, 1)))
    assert set(update.names) == set(TensorFile(initial_weights()).names)
    assert {spec.dtype for spec in update.specs.values()} == {np.dtype(np.float32)}


def test_restarted_between_rounds_the_worker_goes_on_with_momentum_and_scale(prepared: Callable[..., Site]) -> None:
    site = prepared()
    site.ask(site.task(TRAIN, 1), initial_weights())
    before = site.worker.trainer.trainer
    momentum = [state["momentum_buffer"].cpu() for state in before.optimizer.state.values()]
    scale = before.grad_scaler.get_scale()
    site.worker._close()
    site.restart()
    fold = FoldTrainer(Workspace(site.settings.work, site.study), site.settings, "0", site.plans_sha256)
    fold.resume(2)
    after = fold.trainer
    assert fold.round == 1
    assert after.grad_scaler.get_scale() == scale
    again = [state["momentum_buffer"] for state in after.optimizer.state.values()]
    assert all(tensor.is_cuda for tensor in again)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(momentum, again, strict=True))
    fold.close()
    assert site.ask(site.task(TRAIN, 2), initial_weights()).failure is None


def test_memory_on_the_device_does_not_grow_with_the_rounds_and_is_given_back(prepared: Callable[..., Site]) -> None:
    site = prepared(rounds=12)
    used = []
    for number in range(1, 13):
        assert site.ask(site.task(TRAIN, number), initial_weights()).failure is None
        used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert used[2] == used[-1]
    parameters = sum(tensor.nbytes for tensor in native.unique_tensors(site.worker.trainer.trainer.network).values())
    assert used[-1][0] > 2 * parameters  # weights and momentum
    site.worker._close()
    assert torch.cuda.memory_allocated() < parameters


def test_out_of_memory_is_told_frees_the_device_and_the_next_task_is_done(prepared: Callable[..., Site]) -> None:
    site = prepared()
    assert site.ask(site.task(TRAIN, 1), initial_weights()).failure is None
    used, total = torch.cuda.memory_allocated(), torch.cuda.get_device_properties(0).total_memory
    others = []  # somebody else's memory: all that is left
    try:
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        for size in (2**20, 2**16, 2**9):
            with contextlib.suppress(torch.OutOfMemoryError):
                while True:
                    others.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        assert codes(site.ask(site.task(TRAIN, 2), initial_weights())) == [Code.OUT_OF_MEMORY.number]
    finally:
        others.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert site.worker.trainer is None
    assert torch.cuda.memory_allocated() < used
    assert site.ask(site.task(TRAIN, 2, attempt=2), initial_weights()).failure is None


def test_the_model_is_validated_and_finished_on_the_device(prepared: Callable[..., Site]) -> None:
    site = prepared(rounds=1)
    site.ask(site.task(TRAIN, 1), initial_weights())
    result = site.ask(site.task(tasks.Kind.VALIDATE), initial_weights())
    assert result.validation is not None
    assert result.validation.test_cases == 2
    assert site.ask(site.task(tasks.Kind.FINISH), initial_weights()).failure is None


def worker(site: Site) -> subprocess.Popen[bytes]:
    values = {f"FEDNNUNET_{key.upper()}": str(value) for key, value in site.settings if value is not None}
    log = (site.settings.state / "worker.log").open("ab")
    return subprocess.Popen(
        [sys.executable, "-m", "appliance.worker"],
        env={**os.environ, **values, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        stdout=log,
        stderr=log,
    )


def answered(site: Site, task: tasks.Task, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "the worker has ended"
    return site.spool.result(task) is not None


def test_a_device_that_is_lost_ends_the_process_and_the_next_process_goes_on(tmp_path: Path) -> None:
    """A label that no class has makes CUDA's own check fail, after which nothing works in that process any more."""
    data, plans = shared_site()
    site = Site(make_settings(data, tmp_path, **CUDA), make_study(), plans)
    site.put(site.prepare_task())
    process = worker(site)
    try:
        wait_for(lambda: answered(site, site.prepare_task(), process), 120, "prepared")
        whole = {}
        for path in site.settings.work.rglob("*_seg.b2nd"):
            whole[path.resolve()] = path.read_bytes()
        assert whole
        for path in whole:
            label = np.full_like(blosc2.open(urlpath=str(path), mode="r")[:], 100)
            path.chmod(0o600)
            path.unlink()
            blosc2.asarray(label, urlpath=str(path))
        site.put(site.task(TRAIN, 1), initial_weights())
        assert process.wait(120) == 1
        result = site.spool.result(site.task(TRAIN, 1))
        assert result is not None
        assert codes(result) == [Code.TRAINING_FAILED.number]
        assert "device-side assert" in (site.settings.state / "worker.log").read_text()

        for path, content in whole.items():
            path.write_bytes(content)
        again = site.task(TRAIN, 1, attempt=2)
        site.put(again, initial_weights())
        process = worker(site)
        wait_for(lambda: answered(site, again, process), 120, "the next process goes on")
        assert site.spool.result(again).failure is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        process.wait(20)
