"""Which of nnU-Net's trainer classes a study may name, and why the others may not.

Rules:

- A trainer is allowed when a federated round of it is what its name says: the loss, the augmentation, the optimizer,
  the schedule or the network changes, and rounds, state between rounds and averaging stay sound.
- A trainer that fixes the number of epochs is allowed when the study asks for that many: nothing is silently another.
- BatchNorm (nnUNetTrainerBN): running means and variances are averaged like weights (the orchestrator's
  optimizers do not step along them; median, trimmed mean and Krum treat them as weights), counters take the largest
  value. `keep_local: [norm]` keeps them at each site (FedBN, Li et al. 2021).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

ALLOWED: Mapping[str, str] = {
    "nnUNetTrainer": "nnU-Net's own: Dice and cross entropy, SGD with momentum, polynomial schedule",
    # losses
    "nnUNetTrainerDiceLoss": "loss: Dice alone",
    "nnUNetTrainerDiceCELoss_noSmooth": "loss: Dice without smoothing, and cross entropy",
    "nnUNetTrainerCELoss": "loss: cross entropy alone",
    "nnUNetTrainerTopk10Loss": "loss: cross entropy of the worst 10 % of the voxels",
    "nnUNetTrainerTopk10LossLS01": "the same with label smoothing 0.1",
    "nnUNetTrainerDiceTopK10Loss": "loss: Dice and cross entropy of the worst 10 %",
    # augmentation
    "nnUNetTrainerDA5": "augmentation: the stronger DA5",
    "nnUNetTrainerDA5ord0": "DA5, resampling with order 0",
    "nnUNetTrainerDA5Segord0": "DA5, labels resampled with order 0",
    "nnUNetTrainerNoDA": "augmentation: none",
    "nnUNetTrainer_DASegOrd0": "augmentation: labels resampled with order 0",
    "nnUNetTrainer_DASegOrd0_NoMirroring": "the same without mirroring",
    "nnUNetTrainer_noDummy2DDA": "augmentation: no slice-wise rotation of anisotropic images",
    "nnUNetTrainerNoMirroring": "augmentation: no mirroring, also not in prediction",
    "nnUNetTrainer_onlyMirror01": "augmentation: mirroring along the first two axes",
    "nnUNetTrainer_onlyMirror01_DASegOrd0": "the same, labels resampled with order 0",
    "nnUNetTrainer_onlyMirror01_DA5": "the same with DA5",
    # sampling
    "nnUNetTrainer_probabilisticOversampling": "sampling: foreground by chance, a third of the patches",
    "nnUNetTrainer_probabilisticOversampling_033": "the same, 33 %",
    "nnUNetTrainer_probabilisticOversampling_010": "the same, 10 %",
    # schedule and optimizer
    "nnUNetTrainer_warmup": "schedule: 50 epochs of warm-up, polynomial after that",
    "nnUNetTrainerCosAnneal": "schedule: cosine annealing",
    "nnUNetTrainerAdam": "optimizer: AdamW with AMSGrad",
    "nnUNetTrainerAdam1en3": "the same, learning rate 1e-3",
    "nnUNetTrainerAdam3en4": "the same, learning rate 3e-4",
    "nnUNetTrainerVanillaAdam": "optimizer: Adam",
    "nnUNetTrainerVanillaAdam1en3": "the same, learning rate 1e-3",
    "nnUNetTrainerVanillaAdam3en4": "the same, learning rate 3e-4",
    # network
    "nnUNetTrainerBN": "network: batch normalisation",
    "nnUNetTrainerNoDeepSupervision": "network: one output, no deep supervision",
    # epochs
    "nnUNetTrainer_1epoch": "1 epoch",
    "nnUNetTrainer_5epochs": "5 epochs",
    "nnUNetTrainer_10epochs": "10 epochs",
    "nnUNetTrainer_20epochs": "20 epochs",
    "nnUNetTrainer_50epochs": "50 epochs",
    "nnUNetTrainer_100epochs": "100 epochs",
    "nnUNetTrainer_250epochs": "250 epochs",
    "nnUNetTrainer_500epochs": "500 epochs",
    "nnUNetTrainer_750epochs": "750 epochs",
    "nnUNetTrainer_2000epochs": "2000 epochs",
    "nnUNetTrainer_4000epochs": "4000 epochs",
    "nnUNetTrainer_8000epochs": "8000 epochs",
    "nnUNetTrainer_250epochs_NoMirroring": "250 epochs, no mirroring",
    "nnUNetTrainer_2000epochs_NoMirroring": "2000 epochs, no mirroring",
    "nnUNetTrainer_4000epochs_NoMirroring": "4000 epochs, no mirroring",
    "nnUNetTrainer_8000epochs_NoMirroring": "8000 epochs, no mirroring",
}
"""Name of the class, and what it changes."""

REFUSED: Mapping[str, str] = {
    r"nnUNetTrainerBenchmark_.*": "it measures nnU-Net's speed and trains nothing of use",
    r"nnUNetTrainerAdan.*": "it needs the package adan_pytorch, which is not part of the appliance",
    r"nnUNetTrainer_onlyMirror01_1500ep": "it fixes 1500 epochs: use nnUNetTrainer_onlyMirror01 with rounds: 1500",
    r"nnUNetTrainerDA5_10epochs": "it fixes 10 epochs: use nnUNetTrainerDA5 with rounds: 10",
    r"nnUNetTrainerCELoss_5epochs": "it fixes 5 epochs: use nnUNetTrainerCELoss with rounds: 5",
    r".*Primus.*": "a transformer of nnU-Net's experiments: it needs torchvision and a patch divisible by 8, which the "
    "planner does not see to, and its layers have names of their own",
    r"nnUNet_Trainer_BS8": "its batch is always 8, not the plan's: nnU-Net keeps it for comparisons with Primus",
}
"""Pattern of names, and the reason."""

WITHOUT_REGIONS = frozenset(
    {
        "nnUNetTrainerCELoss",
        "nnUNetTrainerTopk10Loss",
        "nnUNetTrainerTopk10LossLS01",
        "nnUNetTrainerDiceTopK10Loss",
    }
)
"""Their losses know labels alone, no regions."""


def fault(name: str, epochs: int) -> str | None:
    """Why a study of so many epochs may not use this trainer; None when it may."""
    if name not in ALLOWED:
        for pattern, reason in REFUSED.items():
            if re.fullmatch(pattern, name):
                return f"{name}: {reason}"
        return f"{name} is not one of nnU-Net's trainers that can be federated (docs: reference/nnunet-breadth)"
    fixed = re.search(r"_(\d+)epochs?(_|$)", name)
    if fixed and int(fixed[1]) != epochs:
        return f"{name} trains {fixed[1]} epochs, but rounds x epochs_per_round is {epochs}"
    return None
