"""`appliance ledger`: what has left this hospital."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
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
    """Show what left, when, for which study and round, to whom, and how many bytes.

    In a pipe a head and one line for each answer, TAB between, with everything whole; the sum goes to stderr.
    """
    lines, to_person = _lines(config, study), sys.stdout.isatty()
    chosen = lines[-last:] if last > 0 else []
    for row in in_columns(chosen) if to_person else in_full(chosen):
        typer.echo(row)
    total = f"{len(lines)} answers, {sum(map(_bytes, lines)):,} bytes in all"
    typer.echo(total + (f"; {last} shown" if len(lines) > last else ""), err=not to_person)


def in_full(lines: Sequence[dict[str, Any]]) -> list[str]:
    """A head and a row for each line of the ledger, TAB between; nothing is shortened."""
    rows = ["\t".join(("at", "study", "kind", "fold", "round", "to", "tensors", "bytes", "sha256", "failure"))]
    for line in lines:
        values = [line[name] for name in ("at", "study", "kind", "fold", "round", "to", "tensors")]
        values += [_bytes(line), line["weights_sha256"] or line["body_sha256"], line["failure"]]
        rows.append("\t".join("" if value is None else str(value) for value in values))
    return rows


def in_columns(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What fits 80 columns: to whom as a heading, a row for each line of the ledger, a failure below its row."""
    from federation.readable import size

    head = ("when (UTC)", "study", "answer", "fold", "round", "tensors", "bytes", "SHA-256")
    cells = [
        (
            line["at"][:16].replace("T", " "),
            line["study"][:8],
            line["kind"],
            line["fold"] or "",
            str(line["round"] or ""),
            str(line["tensors"]),
            size(_bytes(line)),
            (line["weights_sha256"] or line["body_sha256"])[:12],
        )
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]

    def row(values: Sequence[str]) -> str:
        aligned = (
            value.rjust(width) if name in ("round", "tensors", "bytes") else value.ljust(width)
            for name, value, width in zip(head, values, widths, strict=True)
        )
        return " ".join(aligned).rstrip()

    rows, recipient = [], None
    for line, values in zip(lines, cells, strict=True):
        if line["to"] != recipient:
            recipient = line["to"]
            rows += [f"to {recipient}", row(head)]
        rows.append(row(values))
        if line["failure"]:
            rows.append(f"  {line['failure']}")
    return rows


def _bytes(line: dict[str, Any]) -> int:
    return int(line["body_bytes"]) + int(line["weights_bytes"])


@app.command()
def verify(config: Config = _DEFAULT) -> None:
    """Check the chain: no line was changed, taken out or put elsewhere.

    Keep the last hash in another place: without it nobody sees that lines were taken off the end.
    """
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
