"""What the orchestrator keeps of a study whose sites have models of their own: the shared layers, and who shares them.

No whole model is made of it: the layers that stayed at the sites are not here. The archive says so itself, and holds

    README.txt                    what this is, and what it is not
    layers.json                   for each site the layers that it shares
    study.json, scores.json       the study, and what each site's own model reached there
    fold_K/shared.safetensors     the shared layers after the last round
    plans.json, dataset.json      where all sites have one plan (FFE with `keep_local`)
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federation import files
from federation.study import Study
from federation.tasks import Plan, Validation

README = """\
{name}: the layers that its sites share, after {rounds} rounds (mode {mode}{local}).

This is not a model: the other layers stayed at their sites, each of which has a whole model of its own in nnU-Net's
layout. A tensor of fold_K/shared.safetensors is named in layers.json, which also says which sites share it and what
its name is there.
"""
_DATE = (1980, 1, 1, 0, 0, 0)  # the same study gives the same bytes


def export(
    archive: Path,
    study: Study,
    layers: Path,
    stores: Mapping[str, Path],
    scores: Mapping[str, Mapping[str, Validation]],
    plan: Plan | None,
) -> None:
    """Write the archive, whole or not at all.

    Parameters
    ----------
    archive : Path
        The zip.
    layers : Path
        layers.json.
    stores : Mapping[str, Path]
        The shared layers of each fold after the last round.
    scores : Mapping[str, Mapping[str, Validation]]
        For each fold what each site reported of its own model.
    plan : Plan or None
        The plan that all sites have, where there is one.
    """
    local = f", keep_local: {', '.join(study.keep_local)}" if study.keep_local else ""
    texts: dict[str, str] = {
        "README.txt": README.format(name=study.name, rounds=study.rounds, mode=study.mode, local=local),
        "layers.json": layers.read_text(encoding="utf-8"),
        "study.json": _json(study.model_dump(mode="json")),
        "scores.json": _json(
            {fold: {site: score.model_dump(mode="json") for site, score in of.items()} for fold, of in scores.items()}
        ),
    }
    if plan is not None:
        texts |= {"plans.json": _json(plan.plans), "dataset.json": _json(plan.dataset_json)}
    with files.replacing(archive) as temporary, zipfile.ZipFile(temporary, "w") as target:
        for name, text in texts.items():
            target.writestr(zipfile.ZipInfo(name, _DATE), text, zipfile.ZIP_DEFLATED)
        for fold, store in stores.items():
            entry = zipfile.ZipInfo(f"fold_{fold}/shared.safetensors", _DATE)
            entry.file_size = store.stat().st_size
            with target.open(entry, "w") as stream, open(store, "rb") as source:
                shutil.copyfileobj(source, stream, 2**20)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1)
