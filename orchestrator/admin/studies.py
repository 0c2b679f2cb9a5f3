"""`fednnunet study`: check a study file before any site is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write and check studies.", no_args_is_help=True)


@app.callback()
def _several() -> None:
    """Keep `check` a command of its own."""


@app.command()
def check(file: Annotated[Path, typer.Argument(help="The study, YAML.")]) -> None:
    """Check a study and print every field with its value, its default and what it means."""
    from rich.console import Console
    from rich.table import Table

    from federation.study import Aggregation, load

    study = load(file)
    console = Console()
    console.print(f"[green]{file}: a valid study[/green], id {study.id[:16]}")
    table = Table(show_lines=False)
    for column in ("field", "value", "meaning"):
        table.add_column(column, overflow="fold")
    for owner, model, prefix in ((study, type(study), ""), (study.aggregation, Aggregation, "aggregation.")):
        for name, field in model.model_fields.items():
            if name == "aggregation":
                continue
            value = getattr(owner, name)
            default = not field.is_required() and value == field.get_default(call_default_factory=True)
            table.add_row(prefix + name, f"{value}" + (" (default)" if default else ""), field.description or "")
    console.print(table)
    if study.fold == "all":
        console.print("fold all: every case trains, so nnU-Net holds none out; imagesTs with labelsTs are scored.")
    epochs = study.rounds * study.epochs_per_round
    console.print(
        f"each site trains {epochs} epochs of {study.iterations_per_epoch} iterations"
        + (f" for each of {len(study.folds)} folds" if len(study.folds) > 1 else "")
    )
