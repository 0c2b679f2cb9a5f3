"""How far a long copy is: a bar with bytes, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_EVERY = 10.0
"""Seconds between two plain lines."""


@contextlib.contextmanager
def transfer(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show the progress of one copy: the bar on stderr, the lines on stdout, where stderr is left to errors.

    Parameters
    ----------
    what : str
        What is being done.
    total : int, optional
        Bytes that there will be; None where nobody knows.

    Yields
    ------
    callable
        To be called with the number of bytes that have just passed.
    """
    shown = _bar(what, total) if sys.stderr.isatty() else _lines(what, total)
    with shown as advance:
        yield advance


@contextlib.contextmanager
def _bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


@contextlib.contextmanager
def _lines(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    began = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, said
        done += count
        now = time.monotonic()
        if now - said >= _EVERY:
            said = now
            left = max(0, (total or 0) - done) / max(1, done) * (now - began)
            of = f" of {megabytes(total)}, about {left:.0f} s left" if total else ""
            print(f"{what}: {megabytes(done)}{of}", flush=True)

    yield advance
    print(f"{what}: {megabytes(done)} in {time.monotonic() - began:.1f} s", flush=True)


def megabytes(count: int) -> str:
    """A number of bytes in megabytes."""
    return f"{count / 1e6:.1f} MB"
