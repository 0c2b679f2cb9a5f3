"""`appliance`: what hospital IT runs."""

from __future__ import annotations

import logging
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from appliance import config_commands, enroll_commands, ledger_commands, predict_command, study_commands
from federation import console, logs, processes

app = typer.Typer(
    help="Run a hospital's part of a federation: supernode, link and worker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Role(StrEnum):
    """Which of the three processes to run here."""

    ALL = "all"
    LINK = "link"
    WORKER = "worker"


Config = Annotated[Path, typer.Option(help="The site's settings.", envvar="FEDNNUNET_CONFIG")]


@app.command()
def init(
    name: Annotated[str, typer.Option(help="The site's name in the federation, such as hospital_a.")],
    orchestrator: Annotated[str, typer.Option(help="HOST:PORT of the orchestrator's listener for hospitals.")],
    data: Annotated[Path, typer.Option(help="The dataset in nnU-Net's raw format.")],
    config: Annotated[Path, typer.Option(help="Folder to write site.toml and the site's keys to.")] = Path("/config"),
    state: Annotated[Path, typer.Option(help="Folder for everything the appliance writes.")] = Path("/state"),
    device: Annotated[str, typer.Option(help="cuda, cuda:N, mps or cpu.")] = "cuda",
) -> None:
    """Write site.toml and make the site's key pair. The private key stays here; send site.pub to the coordinator."""
    from appliance import identity
    from appliance.link import policy
    from federation import enrollment

    public = identity.create(
        config.resolve(),
        name=name,
        orchestrator=orchestrator,
        data=data.resolve(),
        state=state.resolve(),
        device=device,
    )
    policy.write_default(config / "policy.toml")
    typer.echo(f"wrote {config / 'site.toml'} and {config / 'policy.toml'}")
    typer.echo(f"send {public} to the coordinator, and put the ca.crt and coordinator.pub you get back into {config}")
    words = enrollment.fingerprint(public.read_bytes())
    typer.echo(f"key fingerprint, to compare over the phone: {words} ({identity.fingerprint(public)})")


@app.command()
def start(
    config: Config = Path("/config/site.toml"),
    role: Annotated[
        Role,
        typer.Option(help="all: one process tree. link, worker: the two halves.", envvar="FEDNNUNET_ROLE"),
    ] = Role.ALL,
    log_format: Annotated[
        logs.Format | None, typer.Option(help="Lines for people, or one line of JSON for each event.")
    ] = None,
    follow: Annotated[bool, typer.Option(help="Show here what the processes log; it lies in state/logs too.")] = True,
    end_with_parent: Annotated[bool, typer.Option(hidden=True, help="End when the starting process ends.")] = False,
) -> None:
    """Start the processes and keep them alive until Ctrl-C or SIGTERM."""
    from appliance import settings, supervisor

    logs.errors_as(log_format or os.environ.get("FEDNNUNET_LOG_FORMAT", ""))
    console.require("appliance", "flwr", "nnunetv2", "torch")
    if end_with_parent:
        processes.end_with_parent()
    loaded = settings.load(config, log_format=log_format)
    screen = logs.lead(loaded.log_format)
    logging.getLogger("fednnunet.appliance").info(
        "%s dials %s, data %s, logs %s", loaded.name, loaded.orchestrator, loaded.data, loaded.state / "logs"
    )
    here = config.resolve() if config.exists() else None
    supervisor.run(loaded, here, role.value, screen.show if follow else None)


@app.command()
def health(config: Config = Path("/config/site.toml")) -> None:
    """Say how the processes are, TAB between: name, pid, restarts, since. Exit status 17 when not all of them run."""
    from appliance import settings
    from federation.health import ask, table

    state = settings.load(config).state
    for line in table(ask([state / f"role-{role.value}" for role in Role])):
        typer.echo(line)


app.add_typer(ledger_commands.app, name="ledger")
app.add_typer(config_commands.app, name="config")
app.command()(predict_command.predict)
enroll_commands.register(app)
study_commands.register(app)


@app.command()
def doctor(
    config: Config = Path("/config/site.toml"),
    study: Annotated[Path | None, typer.Option(help="A study file: the dataset and the GPU are held to it.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Run these alone: checks or network, machine, data.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Leave these checks or groups out.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, without anything private.")] = False,
    private: Annotated[bool, typer.Option("--private", help="With --json: hosts, paths and files too.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write a page to mail to the coordinator, without them.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="A warning ends with exit status 1.")] = False,
) -> None:
    """Look for what would keep this site out of a study: network, machine, dataset; and say what to do."""
    from appliance.doctor import command

    command.run(config, study, only or [], skip or [], json=json, private=private, page=report, strict=strict)


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


if __name__ == "__main__":
    main()
