"""Numbers and texts as people read them: on screens, in reports, on the web page."""

from __future__ import annotations

import datetime as dt
import time


def number(value: float | None) -> str:
    """Three digits, or - for what is not known."""
    return "-" if value is None else f"{value:.3f}"


def printable(text: str, most: int = 400) -> str:
    """A text that somebody else has sent, cut, with `?` for each character that a terminal might obey."""
    return "".join(character if character.isprintable() else "?" for character in text[:most])


def size(nbytes: float) -> str:
    """A number of bytes (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000 or unit == "GB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    raise AssertionError


def clock(seconds: float) -> str:
    """`3:05`, or `1:02:03` from an hour on."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def moment(at: str) -> float:
    """Seconds since 1970 of a time in ISO 8601."""
    return dt.datetime.fromisoformat(at).timestamp()


def ago(at: str | None, now: float | None = None) -> str:
    """How long ago a time in ISO 8601 was, in four characters at most: `12s`, `5m`, `3h`, `2d`."""
    if at is None:
        return "-"
    seconds = max(0.0, (time.time() if now is None else now) - moment(at))
    for limit, unit, sign in ((60, 1, "s"), (3600, 60, "m"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit:.0f}{sign}"
    return f"{seconds // 86400:.0f}d"


def timestamp(at: str | None) -> str:
    """`2026-11-25 21:53:39 UTC` of a time in ISO 8601."""
    return f"{at[:10]} {at[11:19]} UTC" if at else "-"
