"""`fednnunet federation` and `fednnunet site`: make a federation, let sites in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

federation = typer.Typer(help="Make a federation.", no_args_is_help=True)
site = typer.Typer(help="Let sites into a federation.", no_args_is_help=True)

State = Annotated[Path, typer.Option(help="The orchestrator's state folder.")]
Control = Annotated[str, typer.Option("--control", help="HOST:PORT of the control listener.")]


@federation.callback()
def _several() -> None:
    """Keep `init` a command of its own."""


@federation.command()
def init(
    state: Annotated[Path, typer.Argument(help="The orchestrator's state folder; it is made.")],
    name: Annotated[list[str], typer.Option(help="A name or address that hospitals dial; give it again for several.")],
) -> None:
    """Make the authority: CA, server certificate, control token, runner's secret. Private files get mode 0600."""
    from orchestrator.enrollment.authority import create

    authority = create(state / "authority", [*name, *(["127.0.0.1"] if "127.0.0.1" not in name else [])])
    typer.echo(f"wrote {authority.folder}")
    typer.echo(f"give {authority.ca} to every site; keep the rest")


@site.command()
def add(
    name: Annotated[str, typer.Argument(help="The site's name, as in its site.toml.")],
    public_key: Annotated[Path, typer.Argument(help="The site's site.pub. Compare its fingerprint over the phone.")],
    state: State,
    control_address: Control = "127.0.0.1:8100",
) -> None:
    """Register a site's public key under its name."""
    import re

    from federation.errors import Code, FednnunetError
    from federation.study import SITE_NAME

    if not re.match(SITE_NAME, name):
        raise FednnunetError(Code.SETTINGS_INVALID, f"site name {name!r}: lower case, digits, - and _")
    try:
        key = public_key.read_bytes()
    except OSError as error:
        raise FednnunetError(Code.SETTINGS_INVALID, f"{public_key}: {error.strerror}") from error
    from orchestrator.admin.reach import control, reaching

    with reaching(control_address):
        control(state, control_address).register(key, name)
    typer.echo(f"{name} is registered")


@site.command("list")
def show(
    state: State,
    control_address: Control = "127.0.0.1:8100",
) -> None:
    """Registered sites and whether they are online."""
    from orchestrator.admin.reach import control, reaching

    with reaching(control_address):
        nodes = control(state, control_address).nodes()
    for name, (_, status) in sorted(nodes.items()):
        typer.echo(f"{name}\t{status}")
