"""Figures of a report: SVG whose colours follow the page, light, dark or on paper.

Rules:

- matplotlib draws; every colour it is given is a stand-in, replaced by a variable of the page's style sheet.
- The same numbers give the same bytes: no date, no random id.
- Text stays text, so that it can be searched, selected and read aloud.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

INK, FAINT = "#010101", "#020202"
SERIES = 8
HATCHES = (None, "//", "..")
MANY = 8
"""More sites than this are drawn thin and grey, with the worst few named: nobody reads a legend of 30 lines."""
BAND = 40
"""More sites than this are a band from the lowest to the highest, with the worst few named."""
NAMED = 3
POINTS = 250
"""A curve of more points than this is drawn as means of neighbours: a report stays small after 1000 rounds."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.4,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "savefig.transparent": True,
}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Our style over matplotlib's own defaults: in a worker nnU-Net's drawings have changed the defaults for all."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@dataclass(frozen=True)
class Score:
    """A mean with its spread, at one site.

    Attributes
    ----------
    name : str
        The site.
    mean, std, minimum : float
        Over its cases.
    """

    name: str
    mean: float
    std: float = 0.0
    minimum: float | None = None


@dataclass
class Curves:
    """Curves of one measure.

    Attributes
    ----------
    title : str
        What is measured.
    sites : Mapping
        (epoch, value) by site.
    pooled : sequence
        (epoch, value) over all sites.
    low_is_good : bool
        Whether the worst site is the highest.
    """

    title: str
    sites: Mapping[str, Sequence[tuple[int, float]]]
    pooled: Sequence[tuple[int, float]] = field(default_factory=list)
    low_is_good: bool = False


def curves(panels: Sequence[Curves]) -> str:
    """Panels side by side, one curve for each site and one for all."""
    with _style():
        canvas = Canvas(figsize=(4.0 * len(panels), 2.9), layout="constrained")
        for place, panel in enumerate(panels):
            axes = canvas.add_subplot(1, len(panels), place + 1)
            _curves(axes, panel)
        alike = len({tuple(sorted(panel.sites)) for panel in panels}) == 1 and len(panels[0].sites) <= MANY
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        if labels and alike:
            canvas.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)))
        elif labels:  # the worst differ from panel to panel
            for axes in canvas.axes:
                axes.legend(loc="best")
        return _svg(canvas, "-".join(panel.title for panel in panels))


def _curves(axes: Axes, panel: Curves) -> None:
    sites = {name: points for name, points in panel.sites.items() if points}
    worst = sorted(sites, key=lambda name: (sites[name][-1][1], name), reverse=panel.low_is_good)[:NAMED]
    named = list(sites) if len(sites) <= MANY else worst
    if len(sites) > BAND:
        by_epoch: dict[int, list[float]] = {}
        for points in sites.values():
            for epoch, value in points:
                by_epoch.setdefault(epoch, []).append(value)
        epochs = sorted(by_epoch)
        lows = thin([(epoch, min(by_epoch[epoch])) for epoch in epochs])
        highs = thin([(epoch, max(by_epoch[epoch])) for epoch in epochs])
        span = [epoch for epoch, _ in lows]
        axes.fill_between(span, [low for _, low in lows], [high for _, high in highs], color=FAINT, linewidth=0)
    else:
        for name in sites.keys() - set(named):
            axes.plot(*zip(*thin(sites[name]), strict=True), color=FAINT, linewidth=0.6)
    for place, name in enumerate(named):
        marker = "." if len(sites[name]) == 1 else None
        axes.plot(*zip(*thin(sites[name]), strict=True), color=colour(place), label=name, marker=marker)
    if panel.pooled and len(panel.sites) > 1:
        axes.plot(*zip(*thin(panel.pooled), strict=True), color=INK, linewidth=2.0, label="all sites")
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def thin(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """A curve of at most `most` points: means of neighbours, the last point as it is."""
    if len(points) <= most:
        return list(points)
    step = -(-len(points) // most)
    parts = [points[begin : begin + step] for begin in range(0, len(points), step)]
    means = [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
    return [*means[:-1], points[-1]]


def scores(
    by_label: Mapping[str, Sequence[Score]], unit: str = "Dice", limits: tuple[float, float] | None = (0, 1)
) -> str:
    """One panel for each label: mean, standard deviation (bar) and the worst case (tick) of each site."""
    rows = max(len(entries) for entries in by_label.values())
    with _style():
        columns = min(3, len(by_label))
        lines = -(-len(by_label) // columns)
        canvas = Canvas(figsize=(4.0 * columns, lines * (1.3 + 0.26 * rows)), layout="constrained")
        for place, (label, entries) in enumerate(by_label.items()):
            axes = canvas.add_subplot(lines, columns, place + 1)
            names = [entry.name for entry in entries]
            for row, entry in enumerate(entries):
                axes.errorbar(entry.mean, row, xerr=entry.std, fmt="o", color=colour(0), capsize=3, markersize=5)
                if entry.minimum is not None:
                    axes.plot(entry.minimum, row, "|", color=INK, markersize=9)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            if limits:
                axes.set_xlim(*limits)
            axes.set_title(label, loc="left")
            axes.set_xlabel(unit)
        return _svg(canvas, "scores-" + "-".join(by_label))


def bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """Horizontal bars, one for each row, stacked from its parts."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    with _style():
        canvas = Canvas(figsize=(8.0, 1.7 + 0.3 * len(rows)), layout="constrained")
        axes = canvas.add_subplot()
        left = dict.fromkeys(rows, 0.0)
        for place, part in enumerate(parts):
            values = [row.get(part, 0.0) for row in rows.values()]
            axes.barh(
                list(rows),
                values,
                left=list(left.values()),
                color=colour(place),
                height=0.62,
                label=part,
                hatch=HATCHES[place // SERIES % 3],
                edgecolor=FAINT,
            )
            left = {name: left[name] + value for name, value in zip(rows, values, strict=True)}
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        if len(parts) > 1:
            canvas.legend(loc="outside lower center", ncols=min(5, len(parts)))
        return _svg(canvas, f"bars-{unit}-" + "-".join(rows))


def distributions(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Intensities, one panel for each channel and one row for each dataset: percentiles 0.5 to 99.5, mean and median.

    Each dataset is nnU-Net's intensity properties: `mean`, `median`, `std`, `percentile_00_5`, `percentile_99_5`.
    """
    rows = max(len(entries) for entries in panels.values())
    with _style():
        canvas = Canvas(
            figsize=(4.0 * min(2, len(panels)), -(-len(panels) // 2) * (1.4 + 0.3 * rows)), layout="constrained"
        )
        for place, (channel, entries) in enumerate(panels.items()):
            axes = canvas.add_subplot(-(-len(panels) // 2), min(2, len(panels)), place + 1)
            for row, one in enumerate(entries.values()):
                axes.plot([one["percentile_00_5"], one["percentile_99_5"]], [row, row], color=colour(row), linewidth=2)
                low, high = one["mean"] - one["std"], one["mean"] + one["std"]
                axes.plot([low, high], [row, row], color=colour(row), linewidth=7, alpha=0.4, solid_capstyle="butt")
                axes.plot(one["mean"], row, "o", color=colour(row))
                axes.plot(one["median"], row, "|", color=INK, markersize=12)
            axes.set_yticks(range(len(entries)), list(entries))
            axes.set_ylim(len(entries) - 0.5, -0.5)
            axes.set_title(channel, loc="left")
        return _svg(canvas, "intensities-" + "-".join(panels))


def overlay(image: NDArray[np.floating[Any]], masks: Sequence[NDArray[np.bool_]], aspect: float) -> str:
    """One slice with the outlines of the reference and of up to two predictions, as a data URL (PNG).

    Parameters
    ----------
    image : ndarray
        Shape (rows, columns); shown from its 1st to its 99th percentile.
    masks : sequence of ndarray
        The reference, then the predictions: same shape, True inside.
    aspect : float
        Height of a row over width of a column, in mm.
    """
    with _style():
        low, high = np.percentile(image, [1, 99])
        canvas = Canvas(figsize=(2.6, 2.6), dpi=100, layout="constrained", facecolor="black")
        axes = canvas.add_subplot()
        axes.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect, interpolation="nearest")
        outlines = (("#56b4e9", "solid"), ("#e69f00", "dashed"), ("#e377c2", "dotted"))
        for mask, (shade, style) in zip(masks, outlines, strict=False):
            if mask.any() and not mask.all():
                axes.contour(mask.astype(float), [0.5], colors=[shade], linewidths=1.4, linestyles=style)
        axes.set_axis_off()
        stream = io.BytesIO()
        canvas.savefig(stream, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def participation(sites: Sequence[str], rounds: Sequence[Mapping[str, str]], names: Sequence[str]) -> str:
    """A grid of sites and rounds, drawn as plain SVG so that each square tells by its title who was missing and why.

    Parameters
    ----------
    sites : sequence of str
        Rows.
    rounds : sequence of Mapping
        For each round why a site was missing, by site; a site that took part does not stand in it.
    names : sequence of str
        What each round is called.
    """
    most = 120
    step = max(1, -(-len(rounds) // most))
    columns = [range(begin, min(begin + step, len(rounds))) for begin in range(0, len(rounds), step)]
    cell, gap = max(6.0, min(18.0, 640 / max(1, len(columns)))), 1.5
    left, height = 12 + 7 * max(len(site) for site in sites), cell if cell > 12 else 12.0
    width = left + len(columns) * cell + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {len(sites) * height + 4:.0f}" '
        f'width="{width:.0f}" height="{len(sites) * height + 4:.0f}">'
    ]
    for row, site in enumerate(sites):
        top = row * height + 2
        parts.append(f'<text x="0" y="{top + height * 0.72:.1f}" class="axis">{_escape(site)}</text>')
        told = f"took part in {sum(site not in one for one in rounds)} of {len(rounds)}"
        parts.append(
            f'<rect x="{left}" y="{top:.1f}" width="{len(columns) * cell - gap:.1f}" height="{height - gap:.1f}" '
            f'class="present"><title>{_escape(site)} {told}</title></rect>'
        )
        for column, numbers in enumerate(columns):
            absent = [number for number in numbers if site in rounds[number]]
            if not absent:
                continue
            told = "; ".join(f"{names[number]}: {rounds[number][site]}" for number in absent[:3])
            many = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
            parts.append(
                f'<rect x="{left + column * cell:.1f}" y="{top:.1f}" width="{cell - gap:.1f}" '
                f'height="{height - gap:.1f}" class="absent">'
                f"<title>{_escape(f'{site} was missing in {told}{many}')}</title></rect>"
            )
    return "".join([*parts, "</svg>"])


def colour(number: int) -> str:
    """The stand-in for the colour of a series."""
    return f"#0301{number % SERIES:02d}"


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _svg(canvas: Canvas, salt: str) -> str:
    """The drawing, for a page: no prologue, variables for colours."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        canvas.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return re.sub(r"#0301(\d\d)", lambda found: f"var(--series-{int(found[1])})", text).strip()
