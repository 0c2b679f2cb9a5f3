"""`fednnunet study`: check a study, submit it, watch it, stop it, see what came of it."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from federation.audit import Tail
    from orchestrator.history import Found, History

app = typer.Typer(help="Write, run and watch studies.", no_args_is_help=True)

State = Annotated[
    Path, typer.Option(help="The orchestrator's state folder, on this machine.", envvar="FEDNNUNET_STATE")
]
ControlAddress = Annotated[
    str, typer.Option("--control", help="HOST:PORT of the control listener.", envvar="FEDNNUNET_CONTROL")
]
Wait = Annotated[bool, typer.Option(help="Stay and show the study until it ends.")]
Which = Annotated[str, typer.Argument(metavar="STUDY", help="Its name, or the beginning of its id.")]
_CONTROL = "127.0.0.1:8100"
STOP_TIMEOUT = 30.0
"""Seconds to wait for the coordinator to say that a study is stopped."""


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
    state: State,
    control_address: ControlAddress = _CONTROL,
    wait: Wait = True,
) -> None:
    """Give a study to a running orchestrator. One that was interrupted goes on; one that failed is tried again."""
    from rich.console import Console

    from federation.console import require
    from federation.study import load
    from orchestrator.history import Found

    require("orchestrator", "flwr")
    study = load(file)
    found = Found(state.resolve() / "studies" / study.id, study)
    _begin(state, control_address, found, "study submit", wait, Console())


@app.command()
def resume(which: Which, state: State, control_address: ControlAddress = _CONTROL, wait: Wait = True) -> None:
    """Let a study go on that was stopped or has failed: from its last whole round, with the same bytes."""
    from rich.console import Console

    _begin(state, control_address, _find(state, which), "study resume", wait, Console())


def _begin(state: Path, address: str, found: Found, event: str, wait: bool, console: Console) -> None:
    """Start a study, unless it is under way or done, and show it until it ends where `wait` says so."""
    from orchestrator.admin.progress import print_was_done
    from orchestrator.admin.reach import control, reaching
    from orchestrator.enrollment.record import recorded
    from orchestrator.history import so_far
    from orchestrator.journal import withdraw_stop

    study = found.study
    history, tail = so_far(found.study, found.folder)
    was_done = history.ended == "done"
    if tail.path.exists() and history.ended is None:
        console.print(f"study {study.name} is under way: {history.phase}, round {history.done_rounds}")
    elif not was_done:
        with recorded(state, event, study=study.id, name=study.name), reaching(address):
            withdraw_stop(found.folder)
            control(state, address).start(study.model_dump_json())
        history.ended = None
        console.print(f"study {study.name} is submitted, id {study.id[:16]}")
    if wait:
        _see_through(state, found, history, tail, console)
    if was_done:
        print_was_done(console, history)


def _find(state: Path, which: str) -> Found:
    """One study of a state folder; raises FNU-113 or FNU-120."""
    from orchestrator.history import choose, studies

    folder = _studies_folder(state)
    return choose(which, studies(folder), f"studies in {folder}")


def _studies_folder(state: Path) -> Path:
    """Folder of the studies of an orchestrator; raises FNU-113, naming one below, where `state` is none's."""
    from federation.errors import Code, FednnunetError

    def is_one(folder: Path) -> bool:
        return any((folder / name).is_dir() for name in ("authority", "studies"))

    folder = state.resolve()
    if not is_one(folder):
        below = [*folder.glob("orchestrator"), *sorted(folder.glob("*/orchestrator"))]
        meant = " or ".join(f"--state {one}" for one in below if is_one(one))
        raise FednnunetError(
            Code.STATE_NOT_READY,
            f"{folder} is not an orchestrator's state folder" + (f"; did you mean {meant}?" if meant else ""),
            "Give the folder of `fednnunet federation init`; of a simulation, the folder `orchestrator` in its own.",
        )
    return folder / "studies"


def _see_through(state: Path, found: Found, history: History, tail: Tail, console: Console) -> None:
    """Show a study until it ends, and what came of it; raises what made it fail."""
    from federation.processes import check_room
    from orchestrator.admin.progress import print_end, raise_failure, report_at_site, watch

    watch(history, tail, console, lambda: check_room(state))
    faulty = re.search(r"FNU-(109|2\d\d)", history.reason)
    report = f"site report, in the site's own state folder: {report_at_site(found.study)}\n" if faulty else ""
    raise_failure(history, f"{report}journal: {found.folder}", _go_on(state, found.study.name))
    print_end(console, history, found.folder)


@app.command()
def watch(
    state: State,
    which: Annotated[
        str, typer.Argument(metavar="[STUDY]", help="Its name, or the beginning of its id; the newest.")
    ] = "",
) -> None:
    """Show a study until it ends. Ctrl-C ends the showing, not the study."""
    from rich.console import Console

    from federation.errors import Code, FednnunetError
    from orchestrator.admin.progress import standing
    from orchestrator.history import so_far, studies

    if which:
        found = _find(state, which)
    else:
        folder = _studies_folder(state)
        known = studies(folder)
        if not known:
            raise FednnunetError(Code.STUDY_NOT_FOUND, f"{folder} has none")
        found = known[-1]
    console = Console()
    history, tail = so_far(found.study, found.folder)
    if history.ended is None and not console.is_terminal:  # there the live screen says it
        console.print(f"study {standing(history)}", soft_wrap=True, highlight=False)
    _see_through(state, found, history, tail, console)


@app.command(name="list")
def list_(state: State) -> None:
    """Every study of this orchestrator, the newest last."""
    from rich.console import Console

    from orchestrator.admin.overview import studies_table
    from orchestrator.history import load, studies

    console = Console()
    known = studies(_studies_folder(state))
    if known:
        console.print(studies_table([(found, load(found.folder)) for found in known]))
    else:
        console.print("no study yet: fednnunet study submit STUDY.yaml")


@app.command()
def show(which: Which, state: State) -> None:
    """One study: how it stands, who took part in which round and why not, time, bytes, scores, warnings."""
    from rich.console import Console

    from orchestrator.admin.overview import overview
    from orchestrator.history import so_far

    found = _find(state, which)
    history, _ = so_far(found.study, found.folder)
    overview(history, found.folder, Console())


@app.command()
def stop(which: Which, state: State) -> None:
    """Stop a study: sites end what they do within seconds and free their GPUs. `study resume` goes on."""
    from rich.console import Console

    from orchestrator.enrollment.record import recorded, user
    from orchestrator.history import so_far
    from orchestrator.journal import request_stop

    console, found = Console(), _find(state, which)
    history, tail = so_far(found.study, found.folder)
    if history.ended is not None:
        console.print(f"study {found.study.name} is {history.ended} already")
        return
    with recorded(state, "study stop", study=found.study.id, name=found.study.name):
        request_stop(found.folder, user())
    console.print(_stopped(history, tail, _go_on(state, found.study.name)), soft_wrap=True, highlight=False)


def _go_on(state: Path, name: str) -> str:
    """What lets a stopped study go on, for people."""
    from orchestrator.admin.simulate import AGAIN, is_simulated

    return AGAIN if is_simulated(state) else f"fednnunet study resume {name} --state {shlex.quote(str(state))}"


def _stopped(history: History, tail: Tail, go_on: str) -> str:
    """Wait until a study has ended, or `STOP_TIMEOUT`; what to tell a person, with what lets it `go_on`."""
    end = time.monotonic() + STOP_TIMEOUT
    while history.ended is None and time.monotonic() < end:
        time.sleep(0.2)
        for line in tail.lines():
            history.take(line)
    name = history.study.name
    match history.ended:
        case "stopped":
            done = f"{history.done_rounds} of {history.all_rounds} rounds"
            return f"study {name} is stopped after {done}; to go on: {go_on}"
        case None:
            return "asked for; the coordinator stops it as soon as it looks (is `orchestrator health` well?)"
        case ended:
            return f"study {name} was {ended} before it could be stopped"


@app.command()
def export(
    which: Which,
    state: State,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
) -> None:
    """Copy what a study leaves behind into a new folder: model, report, curves, study file, journal, checksums."""
    from rich.console import Console

    from federation.console import require
    from federation.processes import use_cache

    require("orchestrator", "matplotlib", "jinja2")
    use_cache(state.resolve())
    from orchestrator.admin.take_out import take_out

    found = _find(state, which)
    for path in take_out(found, output):
        Console().print(str(path), soft_wrap=True, highlight=False)


@app.command()
def report(
    which: Which,
    state: State,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write.", show_default="(report.html in the study's folder)"),
    ] = None,
) -> None:
    """Write the study's report anew, at any time: one HTML file that needs no network."""
    from rich.console import Console

    from federation.console import require
    from federation.processes import use_cache

    require("orchestrator", "matplotlib", "jinja2")
    use_cache(state.resolve())
    from orchestrator.report import write

    found = _find(state, which)
    Console().print(str(write(found.folder, output)), soft_wrap=True, highlight=False)


@app.command()
def track(
    which: Which,
    state: State,
    tensorboard: Annotated[
        Path | None, typer.Option(help="TensorBoard's folder; the study's own folder in it is replaced.")
    ] = None,
    mlflow: Annotated[
        str | None, typer.Option(help="MLflow's tracking server (http://...).", envvar="MLFLOW_TRACKING_URI")
    ] = None,
    experiment: Annotated[str, typer.Option(help="MLflow's experiment.")] = "fednnunet",
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the study ends.")] = False,
) -> None:
    """Write a study's curves as TensorBoard event files, or as runs of an MLflow server."""
    from rich.console import Console

    from federation.console import require

    if tensorboard is None and mlflow is None:
        raise typer.BadParameter("nowhere to write to: add --tensorboard FOLDER or --mlflow URI")
    require("tracking", *(["tensorboardX"] if tensorboard else []), *(["mlflow"] if mlflow else []))
    from orchestrator.admin import tracking

    found = _find(state, which)
    sinks: list[tracking.Sink] = []
    if tensorboard is not None:
        sinks.append(tracking.TensorBoard(found, tensorboard))
    if mlflow is not None:
        sinks.append(tracking.MLflow(found, mlflow, experiment))
    tracking.track(found, sinks, follow, lambda: time.sleep(1.0))
    for sink in sinks:
        Console().print(sink.where, soft_wrap=True, highlight=False)


@app.command()
def best(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Names of finished studies, or their ids.")],
    state: State,
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

    folder = _studies_folder(state)
    found = [find(folder, given) for given in studies]
    show(found, folder.parent / "best" / found[0].study.dataset, Console())
