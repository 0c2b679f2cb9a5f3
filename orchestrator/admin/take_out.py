"""`fednnunet study export`: what a study leaves behind, in a folder that can be handed on.

Rules:

- The folder appears whole or not at all.
- Model, report, curves as CSV, the study file, plan and pooled fingerprint, the journal, and SHA256SUMS over them.
"""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import yaml

from federation import files
from federation.errors import Code, FednnunetError
from orchestrator import report
from orchestrator.history import REPORT, Found, History, load

CURVES = ("fold", "round", "epoch", "site", "train_loss", "val_loss", "learning_rate", "mean_pseudo_dice")
KEPT = ("plan.json", "fingerprint.json", "layers.json", "journal.jsonl")


def take_out(found: Found, output: Path) -> list[Path]:
    """Copy everything into a new folder; returns its files. Raises FNU-702, and FNU-124 when the folder is there."""
    if output.exists():
        raise FednnunetError(Code.OUTPUT_EXISTS, str(output))
    history = load(found.folder)
    with files.new_directory(output) as folder:
        report.write(found.folder, folder / REPORT)
        (folder / "curves.csv").write_text(curves(history), encoding="utf-8")
        told = found.study.model_dump(mode="json", exclude_defaults=True)
        (folder / "study.yaml").write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
        for name in (*KEPT, history.exported["path"] if history.exported else ""):
            if name and (found.folder / name).is_file():
                shutil.copyfile(found.folder / name, folder / name)
        sums = [f"{files.sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
        (folder / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    return sorted(output.iterdir())


def curves(history: History) -> str:
    """Every epoch of every site as CSV, with a header."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CURVES)
    for name, site in history.sites.items():
        for epoch in site.epochs:
            dice = "" if epoch.mean_dice is None else epoch.mean_dice
            losses = (epoch.train_loss, epoch.val_loss, epoch.learning_rate)
            writer.writerow([epoch.fold, epoch.round, epoch.epoch, name, *losses, dice])
    return stream.getvalue()
