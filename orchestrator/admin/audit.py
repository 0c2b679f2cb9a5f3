"""`fednnunet audit`: the orchestrator's own hash chain of commands, approvals and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Who did what at this orchestrator.", no_args_is_help=True)

State = Annotated[Path, typer.Option(help="The orchestrator's state folder.")]
_OWN = ("seq", "at", "by", "event", "prev", "hash")


@app.command()
def show(
    state: State,
    last: Annotated[int, typer.Option(help="So many of the newest lines; 0: all.")] = 0,
) -> None:
    """Print the chain: number, when, who, what. It is verified first (FNU-504)."""
    from federation.audit import read
    from federation.files import canonical_json
    from orchestrator.enrollment.record import FILE

    for line in read(state / FILE)[-last:]:
        rest = {key: value for key, value in line.items() if key not in _OWN}
        typer.echo(
            "\t".join((str(line["seq"]), line["at"], str(line.get("by", "-")), line["event"]))
            + (f"\t{canonical_json(rest).decode()}" if rest else "")
        )


@app.command()
def verify(
    state: State,
) -> None:
    """Verify the chain and print its length and last hash: note them elsewhere, and a cut-off end is found too."""
    from federation.audit import read
    from orchestrator.enrollment.record import FILE

    lines = read(state / FILE)
    typer.echo(f"{len(lines)} lines hold; last hash {lines[-1]['hash'] if lines else '-'}")
