"""Which sites are registered and until when their last sign of life holds, from the SuperLink's database alone."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


def online_until(database: Path) -> dict[str, float]:
    """Seconds since 1970, by site: in the past, the site is offline; 0: it never came. Empty without a database."""
    uri = f"{database.resolve().as_uri()}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(uri, uri=True, timeout=5)) as opened,
    ):
        asked = "SELECT name, online_until FROM node WHERE status != 'unregistered' ORDER BY name"
        return {name: known or 0.0 for name, known in opened.execute(asked)}
    return {}
