"""The findings as a table for the house, as JSON for machines, and as a page to mail to the coordinator.

Rules:

- The table is for the house: it names hosts, paths and files.
- JSON has nothing private; with ``private=True`` each finding has it under the key `private`, and nowhere else.
- The page never has anything private. It is one file that loads nothing.
"""

from __future__ import annotations

import datetime as dt
import html
import io
import json
import sys
from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from appliance.doctor.finding import Finding, Status
from appliance.doctor.run import Examination, exit_status

FORMAT = 1
_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIPPED: "dim"}
WIDTH = 80


def summary(findings: list[Finding]) -> str:
    """`12 ok, 1 warn, 1 fail`."""
    counts = Counter(finding.status for finding in findings)
    return ", ".join(f"{counts[status]} {status}" for status in Status if counts[status]) or "nothing was checked"


def number(finding: Finding) -> str:
    """`FNU-606`, or nothing."""
    return f"FNU-{finding.code.number}" if finding.code is not None else ""


def show(examination: Examination, strict: bool) -> None:
    """Print the table, as the house may read it: as wide as the terminal, or 80 columns where there is none."""
    console = Console(highlight=False)
    if console.is_terminal:
        _print(console, examination, strict)
        return
    text = io.StringIO()
    _print(Console(file=text, highlight=False, width=WIDTH), examination, strict)
    sys.stdout.writelines(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())


def _print(console: Console, examination: Examination, strict: bool) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, expand=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    last = ""
    for finding in examination.findings:
        text = Text(finding.text("found", house=True))
        if finding.code is not None:
            text = Text.assemble((f"{number(finding)} ", _STYLES[finding.status]), text)
        if finding.advice:
            text.append_text(Text.assemble(("\nWhat to do: ", "bold"), finding.text("advice", house=True)))
        table.add_row(
            Text(finding.status.value, style=_STYLES[finding.status]),
            Text("" if finding.name == last else finding.name),
            text,
        )
        last = finding.name
    console.print(table)
    status = exit_status(examination.findings, strict)
    console.print(f"\n{summary(examination.findings)} in {examination.seconds:.0f} s; exit status {status}")


def as_json(examination: Examination, strict: bool, private: bool = False) -> str:
    """The findings for machines; `private` adds what must not leave the house."""
    value: dict[str, Any] = {
        "format": FORMAT,
        "at": _time(examination),
        "seconds": round(examination.seconds, 1),
        "summary": dict(Counter(finding.status.value for finding in examination.findings)),
        "exit_status": exit_status(examination.findings, strict),
        "findings": [_entry(finding, private) for finding in examination.findings],
    }
    return json.dumps(value, indent=1, allow_nan=False)


def _entry(finding: Finding, private: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "check": finding.name,
        "status": finding.status.value,
        "code": number(finding) or None,
        "found": finding.text("found", house=False),
        "what_to_do": finding.text("advice", house=False),
        "measured": dict(finding.measured),
    }
    if private:
        entry["private"] = {name: secret.value for name, secret in finding.private.items()}
    return entry


def _time(examination: Examination) -> str:
    return dt.datetime.fromtimestamp(examination.at, dt.UTC).isoformat(timespec="seconds")


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>appliance doctor</title>
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ border-top: 1px solid #ccc; padding: .4em .6em; text-align: left; vertical-align: top }}
.ok {{ color: #18723a }} .warn {{ color: #8a5a00 }} .fail {{ color: #b00020; font-weight: bold }}
.skipped {{ color: #666 }} .todo {{ color: #444 }}
</style>
</head>
<body>
<h1>appliance doctor</h1>
<p>{summary}. Examined on {at} (UTC by the site's own clock), in {seconds:.0f} s.</p>
<p>This page names no host, path, file, case or person of the hospital: it may be mailed to the coordinator.</p>
<table>
<tr><th>Status</th><th>Check</th><th>What was found, and what to do</th></tr>
{rows}
</table>
</body>
</html>
"""


def as_html(examination: Examination) -> str:
    """One page without anything private."""
    rows = []
    for finding in examination.findings:
        found = " ".join(part for part in (number(finding), finding.text("found", house=False)) if part)
        advice = finding.text("advice", house=False)
        todo = f'<br><span class="todo">What to do: {html.escape(advice)}</span>' if advice else ""
        rows.append(
            f'<tr><td class="{finding.status.value}">{finding.status.value}</td><td>{html.escape(finding.name)}</td>'
            f"<td>{html.escape(found)}{todo}</td></tr>"
        )
    return _PAGE.format(
        summary=html.escape(summary(examination.findings)),
        at=_time(examination),
        seconds=examination.seconds,
        rows="\n".join(rows),
    )
