"""`fednnunet`: manage studies and sites, and run whole federations on one machine."""

from __future__ import annotations

import typer

from federation import console
from orchestrator.admin import audit, authorities, image_commands, predictions, simulation_commands, sites, studies

app = typer.Typer(
    help="Federated nnU-Net: run a study across hospitals, or a whole federation on this machine.",
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


def main() -> None:
    """Entry point of the console script."""
    console.run(app)


if __name__ == "__main__":
    main()
