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
from federation.errors import Code, FednnunetError


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
    if page is not None:
        _require_place(page)
    config = site_settings.site_toml(config)
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
    if page is not None:
        print(f"wrote {page.absolute()}: it may be mailed to the coordinator", file=sys.stderr if json else sys.stdout)
    status = exit_status(examination.findings, strict)
    if status or any(finding.code is not None and finding.code.number == 719 for finding in examination.findings):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # a check that hangs is left behind


def _require_place(page: Path) -> None:
    """Raise FNU-702 where the page cannot be written: told at once, not after an hour with the dataset."""
    folder = page.absolute().parent
    if not folder.is_dir():
        raise FednnunetError(
            Code.DISK_FULL, f"--report {page}: there is no folder {folder}", "Make it, or name another."
        )
    if page.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        why = "it is a folder" if page.is_dir() else f"{folder} cannot be written by uid {os.geteuid()}"
        raise FednnunetError(Code.DISK_FULL, f"--report {page}: {why}", "Name a file in a folder that can be written.")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Say on a terminal which check runs."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda name: None
        return
    with console.status("doctor") as line:
        yield lambda name: line.update(f"doctor: {name}")
