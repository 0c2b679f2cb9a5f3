"""Small live curves as SVG text: nothing is imported for them, since they are drawn in the SuperLink's process."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 170, 44, 20
SERIES = 8
NAMED = 8


def curves(
    title: str, sites: Mapping[str, Sequence[tuple[float, float]]], pooled: Sequence[tuple[float, float]]
) -> str:
    """One curve for each site and a thick one for all; "" where there is nothing yet.

    Parameters
    ----------
    title : str
        What is drawn.
    sites : Mapping
        (epoch, value) by site.
    pooled : sequence
        (epoch, value) over all sites.
    """
    sites, pooled = {name: thin(curve) for name, curve in sites.items()}, thin(pooled)
    points = [point for curve in (*sites.values(), pooled) for point in curve]
    if not points:
        return ""
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    tall, wide = (high - low) or 1.0, (last - first) or 1.0

    def line(name: str, kind: str, curve: Sequence[tuple[float, float]]) -> str:
        places = [
            (
                f"{LEFT + (x - first) / wide * (WIDTH - LEFT - 6):.1f}",
                f"{HEIGHT - BOTTOM - (y - low) / tall * (HEIGHT - BOTTOM - 10):.1f}",
            )
            for x, y in curve
        ]
        if not places:
            return ""
        x, y = places[-1]
        return (
            f'<g class="curve {kind}"><title>{html.escape(name)}</title>'
            f'<polyline points="{" ".join(map(",".join, places))}"/><circle cx="{x}" cy="{y}" r="2.5"/></g>'
        )

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">',
        f'<text class="axis" x="0" y="14">{high:.3g}</text>',
        f'<text class="axis" x="0" y="{HEIGHT - BOTTOM}">{low:.3g}</text>',
        f'<text class="axis" x="{LEFT}" y="{HEIGHT - 4}">epoch {first:g}</text>',
        f'<text class="axis" x="{WIDTH - 30}" y="{HEIGHT - 4}" text-anchor="end">{last:g}</text>',
    ]
    for place, (name, curve) in enumerate(sites.items()):
        kind = f"series-{place % SERIES}" if len(sites) <= NAMED else "faint"
        parts.append(line(name, kind, curve))
    if len(sites) > 1:
        parts.append(line("all sites", "pooled", pooled))
    return "".join([*parts, "</svg>"])


def thin(curve: Sequence[tuple[float, float]], most: int = 200) -> Sequence[tuple[float, float]]:
    """Every so many points of a long curve, and its last."""
    step = -(-len(curve) // most) if len(curve) > most else 1
    return curve if step == 1 else [*curve[:-1:step], curve[-1]]


def grid(sites: Sequence[str], rounds: Sequence[Mapping[str, str]], total: int, most: int = 100) -> str:
    """Participation: a row for each site, a column for each round (or several); red where it was missing."""
    step = max(1, -(-total // most))
    columns = max(1, -(-total // step))
    cell = min(14.0, 700 / columns)
    parts = [
        f'<svg viewBox="0 0 {160 + columns * cell:.0f} {len(sites) * 16 + 2}" width="{160 + columns * cell:.0f}" '
        f'height="{len(sites) * 16 + 2}" role="img" aria-label="Who took part in which round">'
    ]
    for row, site in enumerate(sites):
        parts.append(f'<text class="axis" x="0" y="{row * 16 + 12}">{html.escape(site[:22])}</text>')
        for column, begin in enumerate(range(0, len(rounds), step)):
            why = [
                f"round {n + 1}: {rounds[n][site]}"
                for n in range(begin, min(begin + step, len(rounds)))
                if site in rounds[n]
            ]
            told = f"missing in {'; '.join(why[:3])}" if why else f"took part in round {begin + 1}"
            parts.append(
                f'<rect x="{160 + column * cell:.1f}" y="{row * 16 + 1}" width="{cell - 1:.1f}" height="14" '
                f'class="{"absent" if why else "present"}"><title>{html.escape(f"{site} {told}")}</title></rect>'
            )
    return "".join([*parts, "</svg>"])
