"""Order of versions: 0.9.0 before 0.10.0, a release candidate before its release. Nothing more than that is needed."""

from __future__ import annotations

import re

_VERSION = re.compile(
    r"v?(?P<release>\d{1,9}(?:\.\d{1,9}){0,5})"
    r"(?:[-_.]?(?P<kind>dev|a|alpha|b|beta|c|rc|post)[-_.]?(?P<number>\d{0,9}))?"
    r"(?:\+[a-zA-Z0-9.]{1,40})?"
)
_ORDER = {"dev": -4, "a": -3, "alpha": -3, "b": -2, "beta": -2, "c": -1, "rc": -1, "": 0, "post": 1}
Key = tuple[tuple[int, ...], int, int]


def version_key(text: str) -> Key | None:
    """What to sort a version by (`1.2.0`, `1.2.0rc1`, `v1.2-beta.3`, `1.2.0+local`); None: not a version."""
    match = _VERSION.fullmatch(text)
    if match is None:
        return None
    release = [int(part) for part in match["release"].split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    return tuple(release), _ORDER[match["kind"] or ""], int(match["number"] or 0)
