"""`orchestrator`: start the SuperLink and the coordinator on this machine."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from federation import console, logs, processes

app = typer.Typer(
    help="Run a federation's orchestrator: a SuperLink with two listeners and a coordinator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Role(StrEnum):
    """Which of the two processes to run here."""

    ALL = "all"
    SUPERLINK = "superlink"
    COORDINATOR = "coordinator"


State = Annotated[Path, typer.Option(help="Folder made by `fednnunet federation init`.", envvar="FEDNNUNET_STATE")]


@app.command()
def start(
    state: State,
    fleet_host: Annotated[
        str, typer.Option(help="Address of the hospitals' listener.", envvar="FEDNNUNET_FLEET_HOST")
    ] = "127.0.0.1",
    fleet_port: Annotated[
        int, typer.Option(help="Port of the hospitals' listener.", envvar="FEDNNUNET_FLEET_PORT")
    ] = 8443,
    control_host: Annotated[
        str, typer.Option(help="Address of the control listener; keep it private.", envvar="FEDNNUNET_CONTROL_HOST")
    ] = "127.0.0.1",
    control_port: Annotated[
        int, typer.Option(help="Port of the control listener.", envvar="FEDNNUNET_CONTROL_PORT")
    ] = 8100,
    poll: Annotated[
        float, typer.Option(help="Seconds between two looks of the coordinator.", envvar="FEDNNUNET_POLL")
    ] = 0.5,
    role: Annotated[
        Role,
        typer.Option(help="all, or one of the two where each has a container.", envvar="FEDNNUNET_ROLE"),
    ] = Role.ALL,
    log_format: Annotated[
        logs.Format,
        typer.Option(help="Lines for people, or one line of JSON for each event.", envvar="FEDNNUNET_LOG_FORMAT"),
    ] = "rich",
    follow: Annotated[bool, typer.Option(help="Show here what the processes log; it lies in state/logs too.")] = True,
    end_with_parent: Annotated[bool, typer.Option(hidden=True, help="End when the starting process ends.")] = False,
) -> None:
    """Start both processes and keep them alive until Ctrl-C or SIGTERM. A study that was under way goes on."""
    from orchestrator.server import Server

    screen = logs.lead(log_format)
    console.require("orchestrator", "flwr", "nnunetv2", "torch")
    if end_with_parent:
        processes.end_with_parent()
    server = Server(state.resolve(), fleet_host, fleet_port, control_host, control_port, poll, role.value)
    logging.getLogger("fednnunet.orchestrator").info(
        "hospitals' listener %s:%d, control listener %s:%d, logs %s",
        *(fleet_host, fleet_port, control_host, control_port, server.state / "logs"),
    )
    server.run(screen.show if follow else None)


@app.command()
def health(state: State) -> None:
    """Say how the processes are, TAB between: name, pid, restarts, since. Exit status 17 when not all of them run."""
    from federation.health import ask, table

    for line in table(ask([state, *(state / f"role-{role.value}" for role in Role)])):
        typer.echo(line)


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


if __name__ == "__main__":
    main()
