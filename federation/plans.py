"""Which plans are believed: nnU-Net imports and calls what plans name, and joins names in them to paths.

Rules:

- Plans from a peer, and the network that a site tells of (AsymFedAvg), may name exactly what nnU-Net's planners write:
  two networks, their operations, their arguments. A prefix is not enough: `torch.nn.modules.module.torch.os.system`
  begins with `torch.nn.` and runs commands.
- Arguments are numbers of a plausible size: a network is built before anybody has seen it.
- What becomes part of a path is a plain name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from federation.errors import Code, FednnunetError
from federation.study import Study

NETWORKS = {
    f"dynamic_network_architectures.architectures.unet.{name}" for name in ("PlainConvUNet", "ResidualEncoderUNet")
}
OPERATIONS = {
    "conv_op": {"torch.nn.modules.conv.Conv2d", "torch.nn.modules.conv.Conv3d"},
    "norm_op": {
        f"torch.nn.modules.{kind}Norm{dimensions}d"
        for kind in ("instancenorm.Instance", "batchnorm.Batch")
        for dimensions in (2, 3)
    },
    "dropout_op": set[str](),
    "nonlin": {"torch.nn.LeakyReLU", "torch.nn.modules.activation.LeakyReLU", "torch.nn.ReLU"},
}
OPTIONS = {
    "norm_op_kwargs": {"eps", "affine"},
    "dropout_op_kwargs": {"p", "inplace"},
    "nonlin_kwargs": {"inplace", "negative_slope"},
}
NUMBERS = {
    **dict.fromkeys(("n_stages", "n_conv_per_stage", "n_conv_per_stage_decoder", "n_blocks_per_stage"), 16),
    "features_per_stage": 1024,
    "kernel_sizes": 7,
    "strides": 4,
    "conv_bias": 1,
}
"""Arguments that hold whole numbers, or lists of them, and the largest that is plausible."""
MOST_VOXELS, MOST_BATCH = 2**28, 4096
_PLAIN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
_LOOKED_UP = {
    "preprocessor_name": re.compile(r"^[A-Za-z0-9]+Preprocessor[A-Za-z0-9]*$"),
    "normalization_schemes": re.compile(r"^[A-Za-z0-9]+Normalization$"),
    "resampling_fn_data": re.compile(r"^resample_[a-z_0-9]+$"),
    "resampling_fn_seg": re.compile(r"^resample_[a-z_0-9]+$"),
    "resampling_fn_probabilities": re.compile(r"^resample_[a-z_0-9]+$"),
    "image_reader_writer": re.compile(r"^[A-Za-z0-9]+IO$|^NibabelIOWithReorient$|^SimpleITKIOWithReorient$"),
    "label_manager": re.compile(r"^LabelManager$"),
}
"""What nnU-Net looks up by name in its own modules."""


def check_plans(plans: Mapping[str, Any], study: Study) -> None:
    """Refuse plans that name anything but nnU-Net's own, or another dataset than the study's.

    Raises FNU-303 when the configuration is missing and FNU-305 when something in them is not acceptable.
    """
    check_names(plans, study.configuration)
    for entry in plans["configurations"].values():
        if "UNet_class_name" in entry:  # a network in the words of old plans, which nothing here bounds
            raise _refused("UNet_class_name", entry["UNet_class_name"])
    if plans.get("dataset_name") != study.dataset:
        raise _refused("dataset_name", plans.get("dataset_name"))


def check_names(plans: Mapping[str, Any], configuration: str) -> None:
    """Refuse plans of any dataset that name anything but nnU-Net's own; raises as `check_plans`."""
    configurations = plans.get("configurations")
    if not isinstance(configurations, Mapping) or not all(isinstance(e, Mapping) for e in configurations.values()):
        raise _refused("configurations", configurations)
    if configuration not in configurations:
        raise FednnunetError(Code.CONFIGURATION_MISSING, f"{configuration}; planned: {', '.join(configurations)}")
    names = [plans.get("plans_name")]
    names += [entry["data_identifier"] for entry in configurations.values() if "data_identifier" in entry]
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise _refused("name", name)
    for entry in (plans, *configurations.values()):
        for key, pattern in _LOOKED_UP.items():
            given = entry.get(key, [])
            for value in given if isinstance(given, list) else [given]:
                if not isinstance(value, str) or not pattern.fullmatch(value):
                    raise _refused(key, value)
    for entry in configurations.values():
        for stage in (entry.get("previous_stage"), entry.get("next_stage"), entry.get("inherits_from")):
            if stage is not None and not (isinstance(stage, str) and stage in configurations):  # parts of paths
                raise _refused("stage", stage)
        _check_size(entry)
        if "architecture" in entry:
            _check_network(entry["architecture"])


def _refused(what: str, value: object) -> FednnunetError:
    return FednnunetError(Code.PLANS_REFUSED, f"{what} {str(value)[:200]!r}")


def _check_size(entry: Mapping[str, Any]) -> None:
    patch, batch = entry.get("patch_size", []), entry.get("batch_size", 1)
    voxels = 1
    for extent in patch if isinstance(patch, list | tuple) else [patch]:
        if type(extent) is not int or extent < 1:
            raise _refused("patch_size", patch)
        voxels *= extent
    if type(batch) is not int or not 1 <= batch <= MOST_BATCH or voxels > MOST_VOXELS:
        raise _refused("patch_size and batch_size", f"{patch}, {batch}")


def _check_network(network: object) -> None:
    if not isinstance(network, Mapping) or set(network) != {"network_class_name", "arch_kwargs", "_kw_requires_import"}:
        raise _refused("architecture", network)
    if str(network["network_class_name"]) not in NETWORKS:
        raise _refused("network", network["network_class_name"])
    required, arguments = network["_kw_requires_import"], network["arch_kwargs"]
    if not isinstance(required, list | tuple) or not set(map(str, required)) <= set(OPERATIONS):
        raise _refused("_kw_requires_import", required)
    if not isinstance(arguments, Mapping):
        raise _refused("arch_kwargs", arguments)
    for name, value in arguments.items():
        if name in OPERATIONS:
            good = value is None or (isinstance(value, str) and value in OPERATIONS[name] and name in required)
        elif name in OPTIONS:
            good = value is None or (
                isinstance(value, Mapping)
                and set(value) <= OPTIONS[name]
                and all(isinstance(option, bool | int | float) for option in value.values())
            )
        else:
            good = name in NUMBERS and _whole_numbers(value, NUMBERS[name])
        if not good:
            raise _refused(str(name), value)


def _whole_numbers(value: object, largest: int, depth: int = 0) -> bool:
    """Whether a value is a whole number, or a list of lists of them, none above the largest."""
    if isinstance(value, list | tuple):
        return depth < 2 and len(value) <= 16 and all(_whole_numbers(item, largest, depth + 1) for item in value)
    return isinstance(value, int) and 0 <= value <= largest
