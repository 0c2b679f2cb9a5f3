"""`orchestrator`: start the SuperLink and the coordinator on this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from federation import console, processes

app = typer.Typer(
    help="Run a federation's orchestrator: a SuperLink with two listeners and a coordinator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _several() -> None:
    """Keep `start` a command of its own."""


@app.command()
def start(
    state: Annotated[Path, typer.Option(help="Folder made by `fednnunet federation init`.")],
    fleet_host: Annotated[str, typer.Option(help="Address of the hospitals' listener.")] = "127.0.0.1",
    fleet_port: Annotated[int, typer.Option(help="Port of the hospitals' listener.")] = 8443,
    control_host: Annotated[str, typer.Option(help="Address of the control listener; keep it private.")] = "127.0.0.1",
    control_port: Annotated[int, typer.Option(help="Port of the control listener.")] = 8100,
    poll: Annotated[float, typer.Option(help="Seconds between two looks of the coordinator.")] = 0.5,
    end_with_parent: Annotated[bool, typer.Option(hidden=True, help="End when the starting process ends.")] = False,
) -> None:
    """Start both processes and keep them alive until Ctrl-C or SIGTERM. A study that was under way goes on."""
    from orchestrator.server import Server

    console.require("orchestrator", "flwr", "nnunetv2", "torch")
    if end_with_parent:
        processes.end_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    server = Server(state.resolve(), fleet_host, fleet_port, control_host, control_port, poll)
    typer.echo(f"hospitals' listener {fleet_host}:{fleet_port}, control listener {control_host}:{control_port}")
    typer.echo(f"logs: {server.state / 'logs'}")
    server.run()


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


if __name__ == "__main__":
    main()
