"""Names of a network's layers: which stay at a site (`keep_local`), and which names nnU-Net's networks can have at all.

Rules:

- A pattern of `keep_local` is `norm` (the normalisation layers: FedBN, Li et al. 2021), `seg_head` (the last layers of
  the decoder: FedPer, Arivazhagan et al. 2019) or a shell pattern over whole tensor names, such as `decoder.*`.
- A pattern that fits no layer of any network that the study's planner can make is a fault of the study, found before
  any site is asked. Names are those of `dynamic_network_architectures`; nothing of torch is needed to know them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

ALIASES = {"norm": "*.norm.*", "seg_head": "decoder.seg_layers.*"}
MOST_STAGES = 10
MOST_BLOCKS = 12  # nnUNetPlannerResEncXL has up to 6 in a stage of 3D networks; nnU-Net's planner plans at most 10
_CONVOLUTION = ("conv.weight", "conv.bias", "norm.weight", "norm.bias")
_RUNNING = (".running_mean", ".running_var", ".num_batches_tracked")


def is_statistic(name: str) -> bool:
    """Whether a tensor, or a store's key ``NAME@SHAPE``, is a running statistic of batch normalisation: not learned."""
    return name.partition("@")[0].endswith(_RUNNING)


def kept_local(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that stay at a site.

    Parameters
    ----------
    names : iterable of str
        A network's tensors.
    patterns : sequence of str
        The study's `keep_local`.
    """
    shell = [ALIASES.get(pattern, pattern) for pattern in patterns]
    return {name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in shell)}


def possible_names(residual_encoder: bool) -> list[str]:
    """Every tensor name that a network of nnU-Net's planners may have.

    Parameters
    ----------
    residual_encoder : bool
        True for the ResEnc planners, False for the plain U-Net.
    """
    names = []
    block = (*_CONVOLUTION, *(f"norm{part}" for part in _RUNNING))
    for stage in range(MOST_STAGES):
        if residual_encoder:
            names += [f"encoder.stem.convs.0.{part}" for part in block] if stage == 0 else []
            for number in range(MOST_BLOCKS):
                convolutions = ("conv1", "conv2", "skip.0", "skip.1")
                names += [f"encoder.stages.{stage}.blocks.{number}.{c}.{part}" for c in convolutions for part in block]
        else:
            names += [f"encoder.stages.{stage}.0.convs.{c}.{part}" for c in range(MOST_BLOCKS) for part in block]
        names += [f"decoder.stages.{stage}.convs.{c}.{part}" for c in range(MOST_BLOCKS) for part in block]
        names += [
            f"decoder.{kind}.{stage}.{part}" for kind in ("transpconvs", "seg_layers") for part in ("weight", "bias")
        ]
    return names


def unknown_patterns(patterns: Sequence[str], residual_encoder: bool) -> list[str]:
    """The patterns that fit no layer."""
    names = possible_names(residual_encoder)
    return [pattern for pattern in patterns if not kept_local(names, [pattern])]
