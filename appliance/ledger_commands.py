"""`appliance ledger`: what has left this hospital."""

from __future__ import annotations

import csv
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(help="What has left this hospital: show it, verify it, export it.", no_args_is_help=True)

Config = Annotated[Path, typer.Option(help="The site's settings.", envvar="FEDNNUNET_CONFIG")]
_DEFAULT = Path("/config/site.toml")
FIELDS = (
    *("seq", "at", "study", "kind", "fold", "round", "to", "tensors", "body_bytes", "body_sha256"),
    *("weights_bytes", "weights_sha256", "failure", "hash"),
)


class Format(StrEnum):
    """What to export."""

    CSV = "csv"
    JSON = "json"


def _path(config: Path) -> Path:
    from appliance import settings

    return settings.load(config).state / "link" / "ledger.jsonl"


def _lines(config: Path, study: str | None = None) -> list[dict[str, Any]]:
    """The ledger's lines, of one study where it is given; raises FNU-130 for one that is not known here."""
    from appliance.link.policy import Approvals
    from federation.audit import read

    path = _path(config)
    lines = read(path)
    if study is None:
        return lines
    whole = any(line["study"] == study for line in lines)  # what has left is shown, whatever became of the study
    chosen = study if whole else Approvals(path.parent / "studies").find(study).id
    return [line for line in lines if line["study"] == chosen]


@app.command()
def show(
    config: Config = _DEFAULT,
    study: Annotated[str | None, typer.Option(help="Only this study: its name, or the beginning of its id.")] = None,
    last: Annotated[int, typer.Option(help="How many lines, the newest.")] = 40,
) -> None:
    """Show what left, when, for which study and round, to whom, and how many bytes."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    lines = _lines(config, study)
    recipients = sorted({line["to"] for line in lines})
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("when (UTC)", "study", "what"):
        table.add_column(name, no_wrap=True)
    if len(recipients) > 1:
        table.add_column("to", overflow="fold")
    for name in ("tensors", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("SHA-256", no_wrap=True)
    for line in lines[-last:]:
        what = line["kind"] + (f", fold {line['fold']}" if line["fold"] else "")
        what += f", round {line['round']}" if line["round"] else ""
        what += f": {line['failure']}" if line["failure"] else ""
        to = [line["to"]] if len(recipients) > 1 else []
        size = f"{line['body_bytes'] + line['weights_bytes']:,}"
        digest = (line["weights_sha256"] or line["body_sha256"])[:8]
        when = line["at"][:19].replace("T", " ")
        table.add_row(when, line["study"][:8], what, *to, str(line["tensors"]), size, digest)
    if len(recipients) == 1:
        typer.echo(f"to {recipients[0]}")
    Console().print(table)
    total = sum(line["body_bytes"] + line["weights_bytes"] for line in lines)
    typer.echo(f"{len(lines)} answers, {total:,} bytes in all" + (f"; {last} shown" if len(lines) > last else ""))


@app.command()
def verify(config: Config = _DEFAULT) -> None:
    """Check the chain: no line was changed, taken out or put elsewhere. Keep the last hash in another place."""
    from federation.audit import GENESIS, read

    path = _path(config)
    lines = read(path)
    typer.echo(f"{path}: {len(lines)} lines, the chain holds; last hash {lines[-1]['hash'] if lines else GENESIS}")


@app.command()
def export(
    config: Config = _DEFAULT,
    output_format: Annotated[Format, typer.Option("--format", help="csv or json.")] = Format.CSV,
    study: Annotated[str | None, typer.Option(help="Only this study: its name, or the beginning of its id.")] = None,
) -> None:
    """Write the ledger to standard output."""
    lines = _lines(config, study)
    if output_format is Format.JSON:
        typer.echo(json.dumps(lines, indent=1))
        return
    writer = csv.DictWriter(sys.stdout, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
