"""`fednnunet study`: check a study file before any site is asked, submit it, see it through."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Write and check studies.", no_args_is_help=True)


@app.command()
def check(file: Annotated[Path, typer.Argument(help="The study, YAML.")]) -> None:
    """Check a study and print every field with its value, its default and what it means."""
    from rich.console import Console
    from rich.table import Table

    from federation.study import Aggregation, load

    study = load(file)
    console = Console()
    console.print(f"[green]{file}: a valid study[/green], id {study.id}", soft_wrap=True)
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


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(help="The study, YAML.")],
    state: Annotated[Path, typer.Option(help="The orchestrator's state folder, on this machine.")],
    control_address: Annotated[str, typer.Option("--control", help="HOST:PORT of the control listener.")] = (
        "127.0.0.1:8100"
    ),
    wait: Annotated[bool, typer.Option(help="Stay and show the study until it ends.")] = True,
) -> None:
    """Give a study to a running orchestrator. One that was interrupted goes on; one that failed is tried again."""
    from rich.console import Console

    from federation.console import require
    from federation.processes import check_room
    from federation.study import load
    from orchestrator.admin.progress import StudyView, Tail, print_end, report_at_site, watch
    from orchestrator.admin.reach import control, reaching
    from orchestrator.enrollment.record import recorded

    require("orchestrator", "flwr")
    study = load(file)
    console = Console()
    folder = state.resolve() / "studies" / study.id
    tail, view = Tail(folder / "journal.jsonl"), StudyView(study)
    for line in tail.lines():
        view.take(line)
    if tail.path.exists() and view.ended is None:
        console.print(f"study {study.name} is under way: {view.phase}, round {view.done_rounds}")
    elif view.ended != "done":
        with recorded(state, "study submit", study=study.id, name=study.name), reaching(control_address):
            control(state, control_address).start(study.model_dump_json())
        view.ended = None
        console.print(f"study {study.name} is submitted, id {study.id[:16]}")
    if wait:
        watch(view, tail, console, lambda: check_room(state))
        faulty = re.search(r"FNU-(109|2\d\d)", view.reason)
        report = f"site report, in the site's own state folder: {report_at_site(study)}\n" if faulty else ""
        view.raise_failure(f"{report}journal: {folder}")
        print_end(console, view, folder)


@app.command()
def best(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Names of finished studies, or their ids.")],
    state: Annotated[Path, typer.Option(help="The orchestrator's state folder, on this machine.")],
) -> None:
    """Compare cross-validations (fold 0-4) over all sites and say which configuration is best, and how to run it.

    nnUNetv2_find_best_configuration for single configurations, from the sums that the sites have reported. Of equals
    the first given is the best.
    """
    from rich.console import Console

    from federation.console import require

    require("orchestrator", "numpy")
    from orchestrator.admin.best import show
    from orchestrator.finished import find

    folder = state.resolve()
    found = [find(folder / "studies", given) for given in studies]
    show(found, folder / "best" / found[0].study.dataset, Console())
