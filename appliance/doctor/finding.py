"""What a check found: one text, rendered in two ways, for the house and for what may leave it.

Rules:

- A marker such as ``[issuer]`` in `found` or `advice` stands for something private. In the house it is replaced by its
  value, outside by words that say what kind of thing stood there.
- So nothing private may be formatted into `found`, `advice` or `measured`: only numbers, versions and our own words.

Worked example: found ``signed by [issuer]`` with ``issuer=Private("another authority", "CN=Proxy of St. Elsewhere")``
reads "signed by CN=Proxy of St. Elsewhere" in the table, and "signed by another authority" in the report.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from federation.errors import Code, FednnunetError

_MARKER = re.compile(r"\[([a-z_]+)\]")
Number = int | float | str | bool | None


class Status(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIPPED = "skipped"


class Private(NamedTuple):
    """Something that stays in the house."""

    instead: str
    """Words for outside."""
    value: str


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes
    ----------
    status : Status
        How bad it is.
    found : str
        What was found; may hold markers.
    advice : str
        What to do about it; may hold markers. Empty where there is nothing to do.
    code : Code, optional
        The number of the catalogue; every failure has one.
    private : Mapping[str, Private]
        What the markers stand for.
    measured : Mapping
        Numbers and versions for machines.
    name : str
        The check; the runner fills it in.
    """

    status: Status
    found: str
    advice: str = ""
    code: Code | None = None
    private: Mapping[str, Private] = field(default_factory=dict)
    measured: Mapping[str, Number] = field(default_factory=dict)
    name: str = ""

    def __post_init__(self) -> None:
        assert self.status is not Status.FAIL or self.code is not None, f"a failure without a number: {self.found}"

    def text(self, which: str, house: bool) -> str:
        """`found` or `advice`, with what is private (`house`) or without."""
        template: str = getattr(self, which)

        def put(match: re.Match[str]) -> str:
            secret = self.private.get(match[1])
            if secret is None:
                return match[0]
            return secret.value if house else secret.instead

        return _MARKER.sub(put, template).strip()


def ok(
    found: str, *, private: Mapping[str, Private] | None = None, measured: Mapping[str, Number] | None = None
) -> Finding:
    """All is well."""
    return Finding(Status.OK, found, private=private or {}, measured=measured or {})


def skipped(found: str, advice: str = "") -> Finding:
    """It was not looked at, and why."""
    return Finding(Status.SKIPPED, found, advice)


def warn(
    found: str,
    advice: str,
    code: Code | None = None,
    *,
    private: Mapping[str, Private] | None = None,
    measured: Mapping[str, Number] | None = None,
) -> Finding:
    """It works, and is worth a look."""
    return Finding(Status.WARN, found, advice, code, private or {}, measured or {})


def fail(
    code: Code,
    found: str,
    advice: str = "",
    *,
    private: Mapping[str, Private] | None = None,
    measured: Mapping[str, Number] | None = None,
) -> Finding:
    """It does not work; without an advice of its own it has the catalogue's."""
    return Finding(Status.FAIL, found, advice or code.advice, code, private or {}, measured or {})


def of_error(error: FednnunetError) -> Finding:
    """A numbered error as a failure: its title may leave the house, what was found stays."""
    where = {"where": Private("", f" ({error.found})" if error.found else "")}
    own = error.advice != error.code.advice
    return Finding(
        Status.FAIL,
        f"{error.code.title}[where]",
        "[advice]" if own else error.code.advice,
        error.code,
        {**where, **({"advice": Private(error.code.advice, error.advice)} if own else {})},
    )
