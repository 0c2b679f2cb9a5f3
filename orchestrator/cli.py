"""`orchestrator`: start the SuperLink and the coordinator on this machine."""

from __future__ import annotations

import logging
import sys
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
FleetHost = Annotated[str, typer.Option(help="Address of the hospitals' listener.", envvar="FEDNNUNET_FLEET_HOST")]
FleetPort = Annotated[int, typer.Option(help="Port of the hospitals' listener.", envvar="FEDNNUNET_FLEET_PORT")]
ControlHost = Annotated[
    str, typer.Option(help="Address of the control listener; keep it private.", envvar="FEDNNUNET_CONTROL_HOST")
]
ControlPort = Annotated[int, typer.Option(help="Port of the control listener.", envvar="FEDNNUNET_CONTROL_PORT")]
WhichRole = Annotated[
    Role, typer.Option(help="all, or one of the two where each has a container.", envvar="FEDNNUNET_ROLE")
]
_LOOPBACK, _FLEET, _CONTROL = "127.0.0.1", 8443, 8100


@app.command()
def start(
    state: State,
    fleet_host: FleetHost = _LOOPBACK,
    fleet_port: FleetPort = _FLEET,
    control_host: ControlHost = _LOOPBACK,
    control_port: ControlPort = _CONTROL,
    poll: Annotated[
        float, typer.Option(help="Seconds between two looks of the coordinator.", envvar="FEDNNUNET_POLL")
    ] = 0.5,
    role: WhichRole = Role.ALL,
    metrics_host: Annotated[
        str, typer.Option(help="Address of the metrics for Prometheus.", envvar="FEDNNUNET_METRICS_HOST")
    ] = _LOOPBACK,
    metrics_port: Annotated[
        int, typer.Option(help="Their port, beside the coordinator; 0: none.", envvar="FEDNNUNET_METRICS_PORT")
    ] = 0,
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
    if metrics_port:
        console.require("orchestrator", "prometheus_client")
    listeners = (fleet_host, fleet_port, control_host, control_port)
    server = Server(state.resolve(), *listeners, poll, role.value, metrics_host, metrics_port)
    logging.getLogger("fednnunet.orchestrator").info(
        "hospitals' listener %s:%d, control listener %s:%d, logs %s",
        *(*listeners, server.state / "logs"),
    )
    server.run(screen.show if follow else None)


@app.command()
def health(
    state: State,
    role: WhichRole = Role.ALL,
    ready: Annotated[
        bool, typer.Option("--ready", help="Also: do the listeners answer, do database and journals read.")
    ] = False,
    fleet_host: FleetHost = _LOOPBACK,
    fleet_port: FleetPort = _FLEET,
    control_host: ControlHost = _LOOPBACK,
    control_port: ControlPort = _CONTROL,
) -> None:
    """Say how the processes are, TAB between: name, pid, restarts, since. Exit status 17 when not all of them run."""
    from federation.health import ask, table
    from orchestrator.server import Server

    server = Server(state, fleet_host, fleet_port, control_host, control_port, role=role.value)
    found = ask(server.supervisors)
    if role is not Role.ALL:  # one supervisor may run both
        found = [process for process in found if process.name not in set(Role) - {role}]
    if ready:
        from orchestrator import readiness

        readiness.check(server)
    for line in table(found):
        typer.echo(line)


@app.command()
def backup(
    state: State,
    output: Annotated[
        Path, typer.Option(allow_dash=True, help="The tar to write, which must not be there yet; - is the output here.")
    ],
) -> None:
    """Archive the state as it is at this moment, while studies run. Keep it safe: it holds the authority's keys."""
    from orchestrator import backup as backups

    piped = str(output) == "-"
    if piped and (sys.stdout is None or sys.stdout.isatty()):
        raise typer.BadParameter("an archive needs a file or a pipe: add > FILE", param_hint="--output")
    written = backups.stream_to(state.resolve(), sys.stdout.buffer) if piped else backups.write(state.resolve(), output)
    typer.echo(
        f"backup: {output}, {written.number} files, {written.size / 1e6:.1f} MB, sha256 {written.sha256}", err=piped
    )


@app.command()
def selftest(
    fleet: Annotated[str, typer.Option(help="HOST:PORT at which hospitals reach their listener.")],
    control: Annotated[str, typer.Option(help="HOST:PORT of the control listener.")],
    ca: Annotated[Path, typer.Option(help="The authority's ca.crt.")],
    token: Annotated[Path, typer.Option(help="The file control.token.")],
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the round.")] = 120,
) -> None:
    """Ask a running orchestrator to do a round that asks no site, over its network; nothing stays of it."""
    from orchestrator import selftest as test

    console.require("orchestrator", "flwr")
    for line in test.run(fleet, control, ca, token, timeout):
        typer.echo(line)


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


if __name__ == "__main__":
    main()
