"""The command `appliance doctor`: settings and options in, findings and an exit status out."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from appliance import settings as site_settings
from appliance.doctor import report
from appliance.doctor.context import Context
from appliance.doctor.run import choose, examine, exit_status
from federation import files
from federation import study as studies


def run(
    config: Path,
    study: Path | None,
    only: list[str],
    skip: list[str],
    *,
    json: bool,
    private: bool,
    page: Path | None,
    strict: bool,
) -> None:
    """Examine the site; ends the process where the exit status is not 0.

    Raises FNU-112 for settings or names that are not known, FNU-101 or FNU-102 for the study file, FNU-702 where the
    page cannot be written.
    """
    checks = choose(only, skip)
    context = Context(
        site_settings.load(config),
        config if config.exists() else None,
        None if study is None else studies.load(study),
    )
    with _progress() as on_check:
        examination = examine(context, checks, on_check)
    if page is not None:
        files.write_bytes(page, report.as_html(examination).encode())
    if json:
        sys.stdout.write(report.as_json(examination, strict, private) + "\n")
    else:
        report.show(examination, strict)
    status = exit_status(examination.findings, strict)
    if status or any(finding.code is not None and finding.code.number == 719 for finding in examination.findings):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a check that hangs is left behind


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Say on a terminal which check runs."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda name: None
        return
    with console.status("doctor") as line:
        yield lambda name: line.update(f"doctor: {name}")
