"""Train: nnU-Net's own trainer, kept warm between rounds, one fold at a time.

Rules:

- The trainer is a subclass of the study's trainer class under the same name, made once for a fold; nothing of
  nnU-Net is patched. A round is the study's number of epochs through nnU-Net's own callbacks.
- `current_epoch` follows the round in the task, never a count of calls: so does the learning rate.
- The network begins each round with the global weights: with all tensors, or with those that the site shares
  (`keep_local`, AsymFedAvg). The others begin as nnU-Net makes them from the study's seed, and stay here.
- Gradient scaler and log are the site's own, and so is the momentum, unless the study resets it in each round.
- A round is a function of (global weights, state before the round, seed): the generators of random numbers are
  seeded from (study, site, fold, round). With `augmentation_processes = 0` and `threads = 1` on a CPU, bit for bit.
- What the next round needs is written as `after-ROUND` before the answer leaves; the newest one is written last and
  the last two are kept. A repeated round starts from the newest state before it. Nothing is unpickled.
- A warm trainer that is not exactly at that state (a round was cut short, or is asked for again) is thrown away.

Worked example: killed after the answer to round 1, the worker is asked for round 2: it builds the trainer, loads
`after-0001`, and sends the bytes that it would have sent had it lived.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import math
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from appliance.settings import Settings
from appliance.worker.workspace import Control, Workspace
from federation import files, native, tasks, weights
from federation.errors import Code, FednnunetError
from federation.layers import kept_local
from federation.plans import check_plans
from federation.weights import TensorFile


class RoundLogger(MetaLogger):
    """nnU-Net's log, which also bears rounds that this site has missed, and draws when asked alone."""

    def begin(self, epoch: int) -> None:
        """Make the next entry that of `epoch`: later entries go, missed ones are empty."""
        classes = max((len(item) for item in self.entries["dice_per_class_or_region"]), default=0)
        for key, values in self.entries.items():
            del values[epoch:]
            empty: Any = [math.nan] * classes if key == "dice_per_class_or_region" else math.nan
            values.extend([empty] * (epoch - len(values)))

    @property
    def entries(self) -> dict[str, list[Any]]:
        """All that was logged, one entry for each epoch."""
        entries: dict[str, list[Any]] = self.local_logger.my_fantastic_logging
        return entries

    def log(self, key: str, value: Any, step: int) -> None:
        """As nnU-Net's; the moving average goes on from its last known value."""
        self.local_logger.log(key, value, step)
        if key == "mean_fg_dice":
            known = [item for item in self.entries["ema_fg_dice"][:step] if not math.isnan(item)]
            self.local_logger.log("ema_fg_dice", known[-1] * 0.9 + 0.1 * value if known else value, step)

    def plot_progress_png(self, output_folder: str) -> None:
        """Nothing: a drawing costs more than a short epoch."""

    def draw(self, folder: Path) -> None:
        """Write progress.png."""
        self.local_logger.plot_progress_png(str(folder))


class FederatedTraining:
    """What a federated trainer does otherwise than nnU-Net's; mixed in before nnU-Net's class."""

    log_file: str
    control = Control()
    predicting = ""
    predicted = 0

    def predicts(self, control: Control, what: str) -> None:
        """A validation follows: it may end at every case, and says how many it has begun, after `what`."""
        self.control, self.predicting, self.predicted = control, what, 0

    def save_checkpoint(self, filename: str) -> None:
        """Nothing: the state between rounds is `after-ROUND`, the model is written by Finish."""

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Into nnU-Net's log alone: it names cases, and what a container prints may be carried elsewhere.

        A disk that is full is an error at once; nnU-Net tries for seconds, line after line, and goes on.
        """
        stamp = [f"{datetime.now().astimezone().isoformat(timespec='milliseconds')}:"] if add_timestamp else []
        with open(self.log_file, "a", encoding="utf-8") as stream:
            print(*stamp, *args, file=stream)
        if args and str(args[0]).startswith("predicting "):  # nnU-Net's validation names each case that it begins
            self.control.check()
            self.predicted += 1
            self.control.phase(f"{self.predicting} {self.predicted}")

    def plot_network_architecture(self) -> None:
        """Nothing: it needs a package that is not there."""

    def _save_debug_information(self) -> None:
        """Nothing: debug.json names the host and its paths, and nnU-Net's model export would take it along."""


def federated(base: Any) -> Any:
    """A subclass of a trainer class of nnU-Net, under the same name (which names folders and checkpoints)."""
    return type(base.__name__, (FederatedTraining, base), {"__module__": __name__})


def seed_of(study_seed: int, site: str, fold: str, round_number: int) -> int:
    """64 bits from SHA-256 over what names a round."""
    text = f"{study_seed}/{site}/{fold}/{round_number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class ProximalPull:
    """FedProx (Li et al. 2020, equation 2): mu / 2 times the squared distance to the round's global weights.

    Its gradient, mu times (weights - global weights), is added just before the optimizer's step: after nnU-Net has
    clipped its own gradients, and without a trace in the loss that is logged. Only what the site shares is pulled.

    Parameters
    ----------
    network : torch.nn.Module
        Its weights are the round's global ones now.
    shared : Collection[str]
        The tensors that have a global value.
    mu : float
        The strength.
    """

    def __init__(self, network: Any, shared: Collection[str], mu: float) -> None:
        parameters = dict(native.plain_network(network).named_parameters())
        chosen = [parameters[name] for name in shared if name in parameters]
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in chosen]
        self._mu = mu

    @contextlib.contextmanager
    def on(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Pull at each step of an optimizer."""
        handle = optimizer.register_step_pre_hook(self._pull)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _pull(self, *_: Any) -> None:
        for parameter, reference in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - reference, alpha=self._mu)


class FoldTrainer:
    """One fold's trainer: network, optimizer and, from the first round on, loaders.

    Parameters
    ----------
    workspace : Workspace
        The study's folders, prepared.
    settings : Settings
        Device and name of the site.
    fold : str
        `0` to `4` or `all`.
    plans_sha256 : str
        The plans asked for; raises FNU-302 when the site has prepared others.
    step : float
        The learning rate, as a part of the trainer's own.
    trained : bool
        The network goes on from trained weights: a trainer that warms up begins with the epoch after its warm-up.
    """

    def __init__(
        self,
        workspace: Workspace,
        settings: Settings,
        fold: str,
        plans_sha256: str | None,
        step: float = 1.0,
        trained: bool = False,
    ) -> None:
        started = time.perf_counter()
        self.workspace, self.settings, self.fold = workspace, settings, fold
        self.plans_sha256 = plans_sha256
        self.study = study = workspace.study
        self.plans = workspace.plans(plans_sha256)
        self.dataset_json = workspace.dataset_json()
        check_plans(self.plans, study)
        workspace.enter()
        native.use_threads(torch, settings.device, settings.threads)
        device = torch.device(settings.device.partition(":")[0])
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.trainer = federated(native.trainer_class(study.trainer))(
            {**self.plans, "continue_training": False},
            study.configuration,
            native.fold_of(fold),
            self.dataset_json,
            device,
        )
        trainer = self.trainer
        trainer.logger = RoundLogger(trainer.output_folder, False)
        self.warmed_up = getattr(trainer, "warmup_duration_whole_net", 0) if trained else 0
        trainer.num_epochs = self.warmed_up + study.rounds * study.epochs_per_round
        trainer.num_iterations_per_epoch = study.iterations_per_epoch
        trainer.num_val_iterations_per_epoch = study.validation_iterations_per_epoch
        trainer.initial_lr *= step
        trainer._best_ema = math.inf
        seed_everything(study.seed)  # as the orchestrator makes the first weights
        trainer.configuration_manager.configuration.pop("next_stage", None)  # no cascade: nothing to predict for it
        trainer.initialize()
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()  # sets the mirroring axes
        self.round = 0
        self.shared: list[str] = []
        self.cases = len(trainer.do_split()[0])
        self.start_seconds = time.perf_counter() - started

    # state between rounds

    def _states(self) -> list[tuple[int, Path]]:
        folder = self.workspace.state(self.fold)
        return sorted((int(path.stem.removeprefix("after-")), path) for path in folder.glob("after-*.pt"))

    def newest_state(self, before: int) -> int:
        """The last round before `before` whose state is kept; 0 when there is none."""
        return max((number for number, _ in self._states() if number < before), default=0)

    def first_epoch(self, number: int) -> int:
        """The epoch, from 0, that a round begins with, as the trainer counts."""
        return self.warmed_up + (number - 1) * self.study.epochs_per_round

    def carry(self, number: int) -> Path:
        """What the rounding of updates had taken away after a round (wire: half, int8)."""
        return self.workspace.state(self.fold) / f"after-{number:04d}.carry.safetensors"

    def resume(self, before: int) -> None:
        """Take up the newest state before a round, where there is one; for a trainer that is still fresh."""
        number = self.newest_state(before)
        if number == 0:
            return
        path = self.workspace.state(self.fold) / f"after-{number:04d}.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["plans_sha256"] != self.plans_sha256:
            return
        trainer = self.trainer
        trainer.current_epoch = self.first_epoch(number + 1)
        trainer.optimizer.load_state_dict(state["optimizer"])
        if trainer.grad_scaler is not None and state["grad_scaler"] is not None:
            trainer.grad_scaler.load_state_dict(state["grad_scaler"])
        trainer.logger.load_checkpoint(state["logging"])
        tensors = native.unique_tensors(trainer.network)
        for name, value in state["local"].items():
            tensors[name].copy_(value)
        self.round = number

    def _write_state(self, number: int) -> None:
        trainer = self.trainer
        state = {
            "round": number,
            "plans_sha256": self.plans_sha256,
            "optimizer": trainer.optimizer.state_dict(),
            "grad_scaler": trainer.grad_scaler.state_dict() if trainer.grad_scaler is not None else None,
            "logging": native.plain(trainer.logger.get_checkpoint()),
            "local": {
                name: tensor.cpu()
                for name, tensor in native.unique_tensors(trainer.network).items()
                if name not in self.shared
            },
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        folder = self.workspace.state(self.fold)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(folder / f"after-{number:04d}.pt", buffer.getvalue())
        keep = {number, self.newest_state(number)}
        for other, path in self._states():
            if other not in keep:
                path.unlink()
                self.carry(other).unlink(missing_ok=True)

    # a round

    def take(self, global_weights: Path) -> None:
        """Put the global weights into the network; what the site does not share stays as it is.

        Raises FNU-404 when a tensor is missing, is not the network's, or must not be shared.
        """
        names = set(native.unique_tensors(self.trainer.network))
        may_be_shared = names - kept_local(names, self.study.keep_local)
        if self.study.mode == "asymfedavg":
            may_be_shared &= set(TensorFile(global_weights).specs)
        native.load_weights(self.trainer.network, global_weights, torch.from_numpy, may_be_shared)
        self.shared = sorted(may_be_shared)

    def start(self) -> None:
        """Start the loaders, unless they run."""
        if self.trainer.dataloader_train is None:
            clock = time.perf_counter()
            self.trainer.on_train_start()
            self.start_seconds += time.perf_counter() - clock

    def train(
        self, number: int, global_weights: Path, digest: str, out: Path, control: Control
    ) -> tuple[tasks.Training, tasks.Weights]:
        """Train one round.

        Parameters
        ----------
        number : int
            The round, from 1.
        global_weights : Path
            Float32 weights file with this `digest`.
        out : Path
            Where the update goes.
        control : Control
            Asked between two iterations.

        Returns
        -------
        tuple
            The report and what describes `out`. Raises FNU-404, FNU-407 and whatever torch raises.
        """
        trainer, study = self.trainer, self.study
        before, self.round = self.round, -1  # at no state until the round is done
        control.phase(f"round {number}: starting")
        self.start()
        seconds = {"start": self.start_seconds, "train": 0.0, "validation": 0.0}
        self.start_seconds = 0.0

        trainer.current_epoch = first = self.first_epoch(number)
        warmup = getattr(trainer, "warmup_duration_whole_net", None)
        if warmup is not None and first > warmup:  # nnUNetTrainer_warmup ends it in one epoch, which a site may miss
            trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers("train")
        trainer.logger.begin(first)
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        self.take(global_weights)
        if study.momentum == "reset":
            trainer.optimizer.state.clear()
        pull = ProximalPull(trainer.network, self.shared, study.proximal_mu) if study.proximal_mu else None
        seed_everything(seed_of(study.seed, self.settings.name, self.fold, number))
        for epoch in range(first, first + study.epochs_per_round):
            self._epoch(epoch, number, seconds, control, pull)

        clock = time.perf_counter()
        control.phase(f"round {number}: writing the update")
        header = self._write_update(before, number, global_weights, digest, out)
        self._write_state(number)
        self.round = number
        seconds["checkpoint"] = time.perf_counter() - clock
        log = trainer.logger.entries
        span = slice(first, first + study.epochs_per_round)
        return (
            tasks.Training(
                plans_sha256=str(self.plans_sha256),
                cases=self.cases,
                epochs=study.epochs_per_round,
                learning_rate=[float(value) for value in log["lrs"][span]],
                train_loss=[float(value) for value in log["train_losses"][span]],
                val_loss=[float(value) for value in log["val_losses"][span]],
                pseudo_dice=[
                    [None if math.isnan(value) else float(value) for value in classes]
                    for classes in log["dice_per_class_or_region"][span]
                ],
                seconds={key: round(value, 4) for key, value in seconds.items()},
            ),
            header,
        )

    def _epoch(
        self, epoch: int, number: int, seconds: dict[str, float], control: Control, pull: ProximalPull | None
    ) -> None:
        """One epoch, as in `nnUNetTrainer.run_training`."""
        trainer = self.trainer
        clock = time.perf_counter()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        name = f"round {number}, epoch {epoch + 1 - self.warmed_up} of {trainer.num_epochs - self.warmed_up}"
        steps = trainer.num_iterations_per_epoch
        with pull.on(trainer.optimizer) if pull else contextlib.nullcontext():
            outputs = self._steps(trainer.train_step, trainer.dataloader_train, steps, name, control)
        trainer.on_train_epoch_end(outputs)
        seconds["train"] += time.perf_counter() - clock
        clock = time.perf_counter()
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            steps = trainer.num_val_iterations_per_epoch
            trainer.on_validation_epoch_end(
                self._steps(trainer.validation_step, trainer.dataloader_val, steps, f"{name}, validation", control)
            )
        trainer.on_epoch_end()
        seconds["validation"] += time.perf_counter() - clock

    @staticmethod
    def _steps(step: Callable[[Any], Any], loader: Any, count: int, name: str, control: Control) -> list[Any]:
        outputs = []
        for iteration in range(count):
            control.check()
            control.phase(f"{name}, iteration {iteration + 1} of {count}")
            outputs.append(step(next(loader)))
            if not np.isfinite(outputs[-1]["loss"]).all():
                raise FednnunetError(Code.LOSS_NOT_FINITE, f"{name}, iteration {iteration + 1}")
        return outputs

    def _write_update(self, before: int, number: int, global_weights: Path, digest: str, out: Path) -> tasks.Weights:
        wire = self.study.wire
        if wire == "full":
            return weights.describe_full(out, native.save_weights(self.trainer.network, out, self.shared))
        whole = out.with_name(f"{out.name}.whole")
        carry = self.carry(before) if before > 0 else None
        try:
            native.save_weights(self.trainer.network, whole, self.shared)
            weights.encode_difference(whole, global_weights, carry, out, self.carry(number), wire)
            arrives = weights.apply_difference(global_weights, out, whole)
        finally:
            whole.unlink(missing_ok=True)
        return weights.describe_difference(out, digest, arrives)

    # the end

    def blank_optimizer_state(self) -> dict[str, Any]:
        """State of an optimizer that has not made a step."""
        return {"state": {}, "param_groups": self.trainer.optimizer.state_dict()["param_groups"]}

    def close(self) -> None:
        """End the loaders and free the device."""
        for loader in (self.trainer.dataloader_train, self.trainer.dataloader_val):
            if hasattr(loader, "_finish"):
                with _quiet_end(loader.results_loop_thread):
                    loader._finish()
        self.trainer = None
        release_memory()


@contextlib.contextmanager
def _quiet_end(thread: threading.Thread | None) -> Iterator[None]:
    """Let a loader's thread end without a traceback where a process that is ending takes a batch away from it.

    batchgenerators tells its processes and this thread to end at the same moment: the thread may be fetching a batch.
    """
    before = threading.excepthook

    def hook(ended: threading.ExceptHookArgs) -> None:
        if ended.thread is not thread or not issubclass(ended.exc_type, OSError | EOFError):
            before(ended)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def release_memory() -> None:
    """Give back what is no longer used, on the device too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_globals(folder: Path, digest: str, file: Path) -> Path:
    """Keep the global weights by their digest, and the last two alone; returns where they lie now."""
    target = folder / f"{digest}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    if file != target and not target.exists():
        try:
            os.link(file, target)
        except OSError:  # another file system
            with files.replacing(target) as temporary:
                shutil.copyfile(file, temporary)
    target.touch()
    newest = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for old in newest[2:]:
        old.unlink()
    return target
