"""A report as data, and the one HTML file that it becomes.

Rules:

- The file needs nothing else: no network, no script, no font, no picture beside it.
- Every word in it is escaped; only figures, which our own code draws, go in as they are.
- Each figure has its numbers beneath it, to be opened: what a picture shows can be read and copied too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` is plain, good, warn or bad."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table; columns after the first are numbers unless `words` names their place."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = ()


@dataclass(frozen=True)
class Figure:
    """A figure: SVG, what it shows, and its numbers."""

    svg: str
    caption: str
    table: Table | None = None


@dataclass(frozen=True)
class Picture:
    """A picture: a data URL, and what it shows."""

    url: str
    caption: str


@dataclass(frozen=True)
class Folded:
    """Parts that are opened on demand."""

    title: str
    parts: Sequence[Any]


@dataclass
class Section:
    """A heading and what stands beneath it."""

    title: str
    parts: list[Any] = field(default_factory=list)


@dataclass
class Page:
    """A report.

    Attributes
    ----------
    title, subtitle : str
        The head.
    sections : list of Section
        In order.
    foot : str
        The last line.
    """

    title: str
    subtitle: str
    sections: list[Section]
    foot: str = ""


def render(page: Page) -> str:
    """The HTML file of a report."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["drawing"] = Markup
    environment.tests["kind"] = lambda part, name: type(part).__name__ == name
    style = Markup((_HERE / "report.css").read_text(encoding="utf-8"))  # noqa: S704 - our own file
    return environment.get_template("report.html").render(page=page, style=style) + "\n"
