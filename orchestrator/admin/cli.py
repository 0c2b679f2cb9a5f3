"""`fednnunet`: manage studies and sites, and run whole federations on one machine."""

from __future__ import annotations

from typing import Annotated

import typer

from federation import console
from orchestrator.admin import audit, authorities, image_commands, predictions, simulation_commands, sites, studies

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(simulation_commands.app, name="simulate")
app.add_typer(studies.app, name="study")
app.add_typer(authorities.federation, name="federation")
app.add_typer(sites.site, name="site")
app.add_typer(audit.app, name="audit")
app.add_typer(image_commands.image, name="image")
app.add_typer(predictions.app, name="predict")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"fednnunet {version('fednnunet')}")
        raise typer.Exit


@app.callback()
def fednnunet(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Federated nnU-Net: run a study across hospitals, or a whole federation on this machine."""


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


if __name__ == "__main__":
    main()
