"""Light simulated sites: they answer every task at once with invented numbers, so that the rest can be measured.

A light site takes the worker's place behind a real link: real spool, real supernode, real network. It trains nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from appliance.spool import Spool
from appliance.worker.fingerprint import CaseStatistics, channel_statistics, site_fingerprint
from federation import tasks, weights
from federation.tasks import Kind, Result, Task

CASES = 40
CT_SPACING, CT_SHAPE = (2.5, 0.8, 0.8), (180, 512, 512)
"""A large CT: nnU-Net plans its default 31 M network for it."""


class LightSite(threading.Thread):
    """One simulated site that answers what lies in a spool.

    Parameters
    ----------
    state : Path
        The site's state folder, shared with its link.
    """

    def __init__(self, state: Path) -> None:
        super().__init__(daemon=True, name=f"light {state.parent.name}")
        self._spool, self._folder = Spool(state / "spool"), state / "light"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stopped = threading.Event()
        self._random = np.random.default_rng(sum(state.parent.name.encode()))

    def run(self) -> None:
        """Answer until stopped."""
        while not self._stopped.is_set():
            for task in self._spool.waiting():
                self._spool.put_result(task, *self._answer(task))
            time.sleep(0.02)

    def stop(self) -> None:
        """Answer nothing more; returns when the last answer is out."""
        self._stopped.set()
        self.join()

    def _answer(self, task: Task) -> tuple[Result, Path | None]:
        match task.kind:
            case Kind.DESCRIBE:
                return Result.answering(task, description=tasks.Description(training_cases=CASES, test_cases=0)), None
            case Kind.FINGERPRINT:
                channel = channel_statistics(self._random.normal(80.0, 120.0, 20_000).astype(np.float32))
                cases = [CaseStatistics(CT_SPACING, CT_SHAPE, 1.0, (channel,)) for _ in range(CASES)]
                return Result.answering(task, fingerprint=site_fingerprint(cases, 1)), None
            case Kind.PREPARE:
                assert task.plan is not None
                report = tasks.Preparation(
                    plans_sha256=task.plan.plans_sha256,
                    training_cases=dict.fromkeys(task.study.folds, CASES),
                    device="light simulated site",
                )
                return Result.answering(task, preparation=report), None
            case Kind.TRAIN:
                return self._train(task)
            case Kind.VALIDATE:
                self._open(task)
                return Result.answering(task, validation=tasks.Validation(seconds=0.0)), None
            case Kind.FINISH:
                assert task.weights is not None
                return Result.answering(task, finished=tasks.Finished(model_sha256=task.weights.digest)), None

    def _open(self, task: Task) -> Path:
        assert task.weights is not None
        target = self._folder / f"{task.weights.digest}.safetensors"

        def base(digest: str) -> Path | None:
            path = self._folder / f"{digest}.safetensors"
            return path if path.exists() else None

        opened = weights.open_weights(task.weights, self._spool.task_parcel(task).weights, base, target)
        if opened != target and not target.exists():
            target.hardlink_to(opened)
        for old in sorted(self._folder.glob("[0-9a-f]*.safetensors"), key=lambda path: path.stat().st_mtime)[:-2]:
            old.unlink()
        return target

    def _train(self, task: Task) -> tuple[Result, Path | None]:
        base = self._open(task)
        assert task.weights is not None
        assert task.plans_sha256 is not None
        file, new = weights.TensorFile(base), self._folder / "new"

        def moved(name: str) -> np.ndarray:
            value = file.read(name)
            value += np.float32(1e-3) * self._random.standard_normal(value.shape, np.float32)
            return value

        digest = weights.write_tensors(new, file.specs, moved)
        header = weights.describe_full(new, digest)
        if task.study.wire == "half":
            carry = self._folder / "carry"
            weights.encode_difference(new, base, carry, self._folder / "difference", carry)
            new = self._folder / "difference"
            header = weights.describe_difference(new, task.weights.digest, digest)
        epochs = task.study.epochs_per_round
        report = tasks.Training(
            plans_sha256=task.plans_sha256,
            cases=CASES,
            epochs=epochs,
            learning_rate=[0.01] * epochs,
            train_loss=[0.0] * epochs,
            val_loss=[0.0] * epochs,
            pseudo_dice=[[0.0]] * epochs,
            seconds={},
        )
        return Result.answering(task, training=report, weights=header), new


class CountingProxy:
    """A TCP proxy on loopback that counts the bytes of both directions, as they go over the socket (TLS included)."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.up = self.down = 0
        self.port = 0
        self._ready = threading.Event()
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True, name="proxy").start()
        self._ready.wait()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**20)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target, limit=2**20)
            await asyncio.gather(self._copy(reader, far_writer, "up"), self._copy(far_reader, writer, "down"))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(2**18):
                setattr(self, direction, getattr(self, direction) + len(data))
                writer.write(data)
                await writer.drain()
        with contextlib.suppress(OSError):
            writer.close()
