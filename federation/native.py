"""nnU-Net's native layout of a trained model, as both sides need it; imports neither torch nor nnunetv2 by itself.

Rules:

- A network's tensors are its `named_parameters()` and `named_buffers()`: each once, under the first of its names.
  nnU-Net's `state_dict()` lists an encoder's tensor up to four times.
- A trainer class is found by reading nnU-Net's files, not by its own look-up by name, which imports every trainer
  with whatever that one needs.
- A checkpoint has exactly the keys that nnU-Net writes, and holds tensors and plain types alone: it loads with
  `weights_only=True`. It carries no momentum: that is a sum of one site's gradients, and people pass models on.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from federation.errors import Code, FednnunetError
from federation.study import Study
from federation.weights import Spec, TensorFile, write_tensors

CHECKPOINT = "checkpoint_final.pth"


def model_name(study: Study, plans: Mapping[str, Any]) -> str:
    """nnU-Net's name of a model's folder: `nnUNetTrainer__nnUNetPlans__3d_fullres`."""
    return f"{study.trainer}__{plans['plans_name']}__{study.configuration}"


def fold_of(fold: str) -> int | str:
    """A fold as nnU-Net's trainers take it: a number, or `all`."""
    return fold if fold == "all" else int(fold)


def use_threads(torch: Any, device: str, threads: int | None) -> None:
    """Let torch use so many CPU threads in this process; None: one beside a GPU, as nnU-Net has it, else torch's own.

    Beside a GPU the cores belong to the processes that augment: copies in as many threads take turns with them.
    """
    if threads is None and device.partition(":")[0] == "cuda":
        threads = 1
    if threads is not None:
        torch.set_num_threads(threads)


def trainer_module(name: str) -> str:
    """The dotted module of nnU-Net that defines the trainer class `name`; raises FNU-403."""
    package = importlib.util.find_spec("nnunetv2")
    if package is None or package.origin is None:
        raise FednnunetError(Code.EXTRA_MISSING, "nnunetv2 is not installed")
    root = Path(package.origin).parent
    definition = re.compile(rf"^class {re.escape(name)}\s*[(:]", re.MULTILINE)
    for path in sorted((root / "training" / "nnUNetTrainer").rglob("*.py")):
        if definition.search(path.read_text(encoding="utf-8")):
            return ".".join(["nnunetv2", *path.relative_to(root).with_suffix("").parts])
    raise FednnunetError(Code.TRAINER_UNKNOWN, name)


def trainer_class(name: str) -> Any:
    """nnU-Net's trainer class of this name; imports the module that defines it alone. Raises FNU-403."""
    module = trainer_module(name)
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, RuntimeError) as error:
        raise FednnunetError(Code.TRAINER_UNKNOWN, f"{name} cannot be imported: {error}") from error


def build_network(trainer: Any, manager: Any, configuration: Any, channels: int, heads: int, deep: bool) -> Any:
    """A trainer class's network (`nnUNetTrainer.initialize`, `nnUNetPredictor.initialize_from_trained_model_folder`).

    Parameters
    ----------
    trainer : type
        The trainer's class.
    manager, configuration : PlansManager, ConfigurationManager
        nnU-Net's view of the plans.
    channels, heads : int
        Channels of the input, and of the output.
    deep : bool
        With the heads of deep supervision: for training.
    """
    build = trainer.build_network_architecture
    if "plans_manager" in inspect.signature(build).parameters:
        return build(manager, configuration, channels, heads, enable_deep_supervision=deep)
    return build(  # a trainer that nnU-Net 2.8 still takes with the older signature
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        channels,
        heads,
        enable_deep_supervision=deep,
    )


def plain_network(network: Any) -> Any:
    """The network itself, where `torch.compile` has wrapped it."""
    return getattr(network, "_orig_mod", network)


def unique_tensors(network: Any) -> dict[str, Any]:
    """Parameters and buffers of a network by name, each once, detached: writing to one changes the network."""
    module = plain_network(network)
    tensors = dict(module.named_parameters())
    tensors.update(module.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors.items()}


def load_weights(
    network: Any, file: Path, as_tensor: Callable[[Any], Any], names: Collection[str] | None = None
) -> None:
    """Copy a weights file into a network, each tensor once.

    Parameters
    ----------
    network : torch.nn.Module
        The network.
    file : Path
        Its tensors must have the network's names and shapes; raises FNU-404.
    as_tensor : Callable
        `torch.from_numpy`.
    names : collection of str, optional
        The tensors that the file must hold; the others of the network stay as they are. Left out: all.
    """
    source = TensorFile(file)
    tensors = unique_tensors(network)
    wanted = set(tensors) if names is None else set(names) & set(tensors)
    if wanted != set(source.names):
        different = sorted(wanted ^ set(source.names))
        raise FednnunetError(Code.WEIGHTS_DO_NOT_FIT, f"{len(different)} names differ, as {different[0]}")
    for name in source.names:
        tensor = tensors[name]
        if tuple(tensor.shape) != source.spec(name).shape:
            found = f"{name}: {source.spec(name).shape} for {tuple(tensor.shape)}"
            raise FednnunetError(Code.WEIGHTS_DO_NOT_FIT, found)
        tensor.copy_(as_tensor(source.read(name)))


def save_weights(network: Any, file: Path, names: Collection[str] | None = None) -> str:
    """Write a network's tensors, or those named, each once; returns the digest of the file.

    Floating point becomes float32, whatever the network computes with; integers (the counters of batch normalisation)
    stay int64.
    """
    tensors = unique_tensors(network)
    if names is not None:
        tensors = {name: tensors[name] for name in names}
    specs = {name: Spec(_stored(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}

    def read(name: str) -> Any:
        tensor = tensors[name].cpu()
        plain = tensor.float() if tensor.is_floating_point() else tensor
        return plain.numpy().astype(specs[name].dtype, copy=False)

    return write_tensors(file, specs, read)


def _stored(tensor: Any) -> np.dtype[Any]:
    """The type of a tensor in a weights file."""
    return np.dtype("<f4") if tensor.is_floating_point() else np.dtype("<i8")


def checkpoint(
    network: Any,
    *,
    study: Study,
    fold: str,
    plans: Mapping[str, Any],
    dataset_json: Mapping[str, Any],
    device: str,
    mirroring_axes: tuple[int, ...] | None,
    logging: Mapping[str, list[Any]],
    optimizer_state: Mapping[str, Any],
    grad_scaler_state: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The contents of `checkpoint_final.pth`, as nnU-Net's `nnUNetTrainer.save_checkpoint` writes them.

    Parameters
    ----------
    network : torch.nn.Module
        The network with the weights to write. Its `state_dict()` is written with all its aliases.
    optimizer_state, grad_scaler_state : Mapping
        State of a fresh optimizer: nnU-Net wants the keys when it resumes.

    Returns
    -------
    dict
        For `torch.save`; tensors (on the CPU, aliases share their storage) and plain types.
    """
    copies: dict[int, Any] = {}
    weights = {}
    for name, tensor in plain_network(network).state_dict().items():
        if tensor.data_ptr() not in copies or copies[tensor.data_ptr()].shape != tensor.shape:
            copies[tensor.data_ptr()] = tensor.detach().cpu()
        weights[name] = copies[tensor.data_ptr()]
    return {
        "network_weights": weights,
        "optimizer_state": dict(optimizer_state),
        "grad_scaler_state": dict(grad_scaler_state) if grad_scaler_state is not None else None,
        "logging": dict(logging),
        "_best_ema": None,
        "current_epoch": study.rounds * study.epochs_per_round,
        "init_args": {
            "plans": dict(plans),
            "configuration": study.configuration,
            "fold": fold_of(fold),
            "dataset_json": dict(dataset_json),
            "device": device,
        },
        "trainer_name": study.trainer,
        "inference_allowed_mirroring_axes": mirroring_axes,
    }


BAD_CHECKPOINT = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)
"""What `load_checkpoint` raises for a file that is none, is cut off, or names code."""


def load_checkpoint(torch: Any, path: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net's or of ours, on the CPU: tensors, plain types and NumPy's numbers, and no code.

    NumPy's numbers, under two names of NumPy's, are what nnU-Net keeps in `logging`. `torch` is the module. Raises
    `BAD_CHECKPOINT`.
    """
    number = np.float64(0).__reduce__()[0]
    harmless: list[Any] = [number, (number, "numpy.core.multiarray.scalar"), np.dtype]
    harmless += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    with torch.serialization.safe_globals(harmless):
        loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def plain(value: Any) -> Any:
    """Numpy scalars and arrays within lists and dicts as plain Python values."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
