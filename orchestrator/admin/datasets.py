"""nnU-Net datasets given by their ids, as sites of a federation on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import files
from federation.errors import Code, FednnunetError


@dataclass(frozen=True)
class Datasets:
    """Datasets that fit together: one site for each, and the contract they share.

    Attributes
    ----------
    sites : dict
        Dataset folder by site name (`site_301`).
    contract : dict
        The fields of a Study that the datasets share.
    """

    sites: dict[str, Path]
    contract: dict[str, Any]


def find(ids: str, environment: Mapping[str, str] = os.environ) -> Datasets:
    """Find datasets by their ids, such as ``"301 302 303"``, under nnUNet_raw.

    Raises FNU-103 for an id that is not there, FNU-202 for a dataset.json that cannot be read, FNU-108 when the
    datasets do not agree on channels, labels or file ending.
    """
    raw = environment.get("nnUNet_raw")
    if not raw:
        raise FednnunetError(
            Code.DATASET_ID_UNKNOWN, "nnUNet_raw is not set", "Set nnUNet_raw, as nnU-Net's set-up says."
        )
    sites: dict[str, Path] = {}
    found: dict[str, dict[str, Any]] = {}
    for part in ids.replace(",", " ").split():
        if not part.isdigit() or not 0 < int(part) < 1000:
            raise FednnunetError(Code.DATASET_ID_UNKNOWN, f"{part!r} is not a number from 1 to 999")
        matches = sorted(Path(raw).glob(f"Dataset{int(part):03d}_*"))
        if len(matches) != 1:
            here = ", ".join(sorted(path.name for path in Path(raw).glob("Dataset*"))) or "no dataset"
            raise FednnunetError(
                Code.DATASET_ID_UNKNOWN,
                f"{part}: {len(matches)} folders Dataset{int(part):03d}_* in {raw}, which has {here}",
            )
        name = f"site_{int(part):03d}"
        if name in sites:
            raise FednnunetError(Code.DATASET_ID_UNKNOWN, f"{part} is given twice", "Give each dataset id once.")
        sites[name] = matches[0]
        try:
            found[name] = files.read_json(matches[0] / "dataset.json")
        except FileNotFoundError as error:
            raise FednnunetError(Code.DATASET_JSON_MISSING, str(matches[0] / "dataset.json")) from error
        except ValueError as error:
            raise FednnunetError(Code.DATASET_JSON_INVALID, f"{matches[0] / 'dataset.json'}: {error}") from error
    if not sites:
        raise FednnunetError(Code.DATASET_ID_UNKNOWN, "no id was given")
    keys = ("channel_names", "labels", "file_ending", "regions_class_order", "overwrite_image_reader_writer")
    first, *others = sites
    for other in others:
        for key in keys:
            if found[first].get(key) != found[other].get(key):
                raise FednnunetError(
                    Code.CONTRACTS_DIFFER,
                    f"{key}: {sites[first].name} has {found[first].get(key)}, {sites[other].name} has "
                    f"{found[other].get(key)}",
                )
    contract = {key: found[first][key] for key in keys if found[first].get(key) is not None}
    for name, dataset in found.items():
        if "channel_names" not in dataset or "labels" not in dataset or "file_ending" not in dataset:
            raise FednnunetError(
                Code.DATASET_JSON_INVALID,
                f"{sites[name] / 'dataset.json'}: channel_names, labels or file_ending missing",
            )
    return Datasets(sites, {**contract, "dataset": sites[first].name, "sites": list(sites)})
