"""`appliance config`: what the settings are, and where each came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at the site's settings.", no_args_is_help=True)


@app.callback()
def _several() -> None:
    """Keep `show` a command of its own."""


@app.command()
def show(
    config: Annotated[Path, typer.Option(help="The site's settings.", envvar="FEDNNUNET_CONFIG")] = Path(
        "/config/site.toml"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print every setting, its effective value, and where it came from: default, the file, or the variable."""
    from rich.console import Console
    from rich.table import Table

    from appliance import settings

    resolved = settings.resolve(config)
    values = resolved.settings.model_dump(mode="json")
    if json:
        from rich import print_json

        print_json(data={key: {"value": value, "source": resolved.sources[key]} for key, value in values.items()})
        return
    table = Table()
    for name in ("setting", "value", "source"):
        table.add_column(name, overflow="fold")
    for key, value in values.items():
        shown = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        table.add_row(key, shown, resolved.sources[key])
    Console().print(table)
