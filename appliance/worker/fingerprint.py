"""From one case's voxels to a few numbers, and from a site's cases to its fingerprint.

Rules:

- A case is reduced to numbers while it is in memory; what is kept of a case does not grow with its voxels.
- `SiteStatistics` folds case after case and forgets each one's histogram: its memory does not grow with the cases but
  for one line of geometry each. The order of the cases does not matter, to the last bit.
- Foreground is nnU-Net's: label > 0 within the box that holds the nonzero voxels of any channel.
- Names of cases and files are not known here, so they cannot leave by this way.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from federation.errors import Code, FednnunetError
from federation.fingerprint import (
    DYADIC_BITS,
    MASS,
    RELATIVE_SIZE_CELLS,
    TRIMMED,
    Channel,
    Geometry,
    RelativeSize,
    SiteFingerprint,
    Triple,
    dyadic_from_text,
    dyadic_to_text,
    grid_of,
    round_dyadic,
)

FINEST_EXPONENT = -160
"""Finest cell: float32's smallest step over 2048."""


@dataclass(frozen=True)
class Histogram:
    """Winsorised intensities on a dyadic grid: `masses[i]` lies in [(start + i), (start + i + 1)) * 2**exponent."""

    exponent: int
    start: int
    masses: NDArray[np.int64]
    lowest: float
    highest: float

    def coarsened(self, exponent: int) -> Histogram:
        """The same masses in cells of 2**`exponent`, not finer than now; exact, because dyadic grids nest."""
        steps = exponent - self.exponent
        if steps == 0:
            return self
        start = self.start >> steps
        place = ((self.start + np.arange(len(self.masses))) >> steps) - start
        masses = np.zeros(int(place[-1]) + 1, dtype=np.int64)
        np.add.at(masses, place, self.masses)
        return Histogram(exponent, start, masses, self.lowest, self.highest)


@dataclass(frozen=True)
class ChannelStatistics:
    """One case's foreground in one channel: mean and variance (float64) and its histogram of MASS in all.

    `cut` is the mass at either end that the histogram counts further inside than it lies, rounded up.
    """

    mean: float
    variance: float
    histogram: Histogram
    cut: int


@dataclass(frozen=True)
class CaseStatistics:
    """What the fingerprint needs of one case.

    `spacing` in mm and `shape` in voxels after cropping, both in the order of the array's axes; `channels` is empty
    where the case has no foreground.
    """

    spacing: Triple
    shape: tuple[int, int, int]
    relative_size: float
    channels: tuple[ChannelStatistics, ...]


def nonzero_box(images: NDArray[Any]) -> tuple[slice, slice, slice]:
    """The smallest box that holds every voxel which is not zero in all channels.

    Equal to the box of ``crop_to_nonzero`` of nnU-Net, which fills holes first: filling a hole never moves the box.
    An image of zeros alone gives the whole image, as there.

    Parameters
    ----------
    images : ndarray, shape (c, x, y, z)

    Returns
    -------
    three slices
    """
    nonzero = images[0] != 0
    for channel in images[1:]:
        nonzero |= channel != 0
    plane = nonzero.any(axis=0)
    box = []
    for present in (nonzero.any(axis=(1, 2)), plane.any(axis=1), plane.any(axis=0)):
        places = np.flatnonzero(present)
        box.append(slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, len(present)))
    return box[0], box[1], box[2]


def case_statistics(images: NDArray[Any], segmentation: NDArray[Any], spacing: Sequence[float]) -> CaseStatistics:
    """Reduce one case to the numbers that the fingerprint needs.

    Agrees with ``DatasetFingerprintExtractor.analyze_case`` of nnU-Net on shape, spacing, relative size and foreground;
    all foreground voxels are used where nnU-Net draws a sample of them.

    Parameters
    ----------
    images : ndarray, shape (c, x, y, z), finite
    segmentation : ndarray, shape (1, x, y, z)
    spacing : three floats, mm

    Returns
    -------
    CaseStatistics
    """
    box = nonzero_box(images)
    cropped = images[(slice(None), *box)]
    foreground = segmentation[0][box] > 0
    shape = cropped.shape[1:]
    channels: tuple[ChannelStatistics, ...] = ()
    if foreground.any():
        channels = tuple(channel_statistics(channel[foreground]) for channel in cropped)
    first, second, third = (float(value) for value in spacing)
    return CaseStatistics(
        spacing=(first, second, third),
        shape=(int(shape[0]), int(shape[1]), int(shape[2])),
        relative_size=float(np.prod(shape) / np.prod(images.shape[1:])),
        channels=channels,
    )


def channel_statistics(values: NDArray[Any]) -> ChannelStatistics:
    """Mean, variance and histogram of a case's foreground intensities in one channel.

    Parameters
    ----------
    values : ndarray, shape (n,), n >= 1, finite

    Notes
    -----
    The max(1, n // TRIMMED) outermost values at either end are counted at the value next to them before they are
    binned, so that the histogram's ends are no voxel's extreme. Where that would be all of them, every value is
    counted at the median.
    """
    exact = values.astype(np.float64, copy=False)
    mean = float(exact.mean())
    deviation = exact - mean
    variance = float(np.dot(deviation, deviation) / len(exact))
    trimmed = max(1, len(exact) // TRIMMED)
    if 2 * trimmed >= len(exact):
        lowest = highest = float(np.median(exact))
    else:
        ends = np.partition(exact, (trimmed, len(exact) - 1 - trimmed))
        lowest, highest = float(ends[trimmed]), float(ends[len(exact) - 1 - trimmed])
    cut = -(-min(trimmed, len(exact) // 2) * MASS // len(exact))
    return ChannelStatistics(mean, variance, _histogram(exact, lowest, highest), cut)


def _exponent(lowest: float, highest: float) -> int:
    """Width of a cell, as a power of two, such that the range holds 2048 to 4096 of them."""
    if highest > lowest:
        return max(math.frexp(highest - lowest)[1] - 12, FINEST_EXPONENT)
    return max(math.frexp(lowest)[1] - 24, FINEST_EXPONENT) if lowest else FINEST_EXPONENT


def _histogram(values: NDArray[np.float64], lowest: float, highest: float) -> Histogram:
    exponent = _exponent(lowest, highest)
    start = math.floor(math.ldexp(lowest, -exponent))
    cell = np.floor(np.ldexp(np.clip(values, lowest, highest), -exponent)).astype(np.int64) - start
    counts = np.bincount(cell)
    occupied = np.flatnonzero(counts)
    masses = np.zeros(len(counts), dtype=np.int64)
    masses[occupied] = _shares([int(count) for count in counts[occupied]])
    return Histogram(exponent, start, masses, lowest, highest)


def _shares(counts: list[int]) -> list[int]:
    """Whole numbers in proportion to `counts` that add up to MASS: largest remainders, the first of equals first."""
    total = sum(counts)
    shares = [count * MASS // total for count in counts]
    remainders = [count * MASS % total for count in counts]
    order = sorted(range(len(counts)), key=lambda place: -remainders[place])
    for place in order[: MASS - sum(shares)]:
        shares[place] += 1
    return shares


@dataclass
class ChannelSums:
    """One channel's sums over a site's cases.

    `contributors` holds for each cell the first `limit` cases with a part in it (empty where the limit is 1): enough
    to know whether a piece stands for `limit` cases.
    """

    means: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    cut: int = 0
    histogram: Histogram | None = None
    contributors: list[set[int]] = field(default_factory=list)

    def add(self, case: int, statistics: ChannelStatistics, limit: int) -> None:
        """Add one case."""
        mean = round_dyadic(Fraction(statistics.mean), DYADIC_BITS // 2)  # so that its square is exact, too
        self.means += mean
        self.squares += mean * mean + round_dyadic(Fraction(statistics.variance))
        self.cut += statistics.cut
        new = statistics.histogram
        if self.histogram is None:
            old = Histogram(new.exponent, new.start, np.zeros(len(new.masses), np.int64), new.lowest, new.highest)
            self.contributors = [set() for _ in new.masses] if limit > 1 else []
        else:
            old = self.histogram
        lowest, highest = min(old.lowest, new.lowest), max(old.highest, new.highest)
        exponent = max(old.exponent, new.exponent, _exponent(lowest, highest) if highest > lowest else FINEST_EXPONENT)
        if limit > 1:
            self._coarsen_contributors(old, exponent, limit)
        old, new = old.coarsened(exponent), new.coarsened(exponent)
        start = min(old.start, new.start)
        end = max(old.start + len(old.masses), new.start + len(new.masses))
        masses = np.zeros(end - start, dtype=np.int64)
        masses[old.start - start : old.start - start + len(old.masses)] += old.masses
        masses[new.start - start : new.start - start + len(new.masses)] += new.masses
        if limit > 1:
            before, after = old.start - start, end - old.start - len(old.masses)
            self.contributors = [set() for _ in range(before)] + self.contributors + [set() for _ in range(after)]
            for place in np.flatnonzero(new.masses):
                cell = self.contributors[int(place) + new.start - start]
                if len(cell) < limit:
                    cell.add(case)
        self.histogram = Histogram(exponent, start, masses, lowest, highest)

    def _coarsen_contributors(self, old: Histogram, exponent: int, limit: int) -> None:
        steps = exponent - old.exponent
        if steps == 0:
            return
        start = old.start >> steps
        coarse: list[set[int]] = [set() for _ in range(((old.start + len(old.masses) - 1) >> steps) - start + 1)]
        for place, cases in enumerate(self.contributors):
            coarse[((old.start + place) >> steps) - start] |= cases
        self.contributors = [set(sorted(cases)[:limit]) for cases in coarse]


class SiteStatistics:
    """A site's cases, folded.

    Parameters
    ----------
    channels : int
        Number of channels.
    limit : int
        The largest `min_cases` that a fingerprint will be asked for.
    """

    def __init__(self, channels: int, limit: int = 1) -> None:
        self.limit = limit
        self.geometry: list[tuple[Triple, tuple[int, int, int]]] = []
        self.relative_sizes: Counter[int] = Counter()
        self.with_foreground = 0
        self.channels = [ChannelSums() for _ in range(channels)]

    @property
    def n_cases(self) -> int:
        """Number of cases added."""
        return len(self.geometry)

    def add(self, case: CaseStatistics) -> None:
        """Add one case; its histograms are not kept."""
        number = len(self.geometry)
        self.geometry.append((case.spacing, case.shape))
        self.relative_sizes[math.floor(case.relative_size * RELATIVE_SIZE_CELLS)] += 1
        if case.channels:
            self.with_foreground += 1
            for sums, statistics in zip(self.channels, case.channels, strict=True):
                sums.add(number, statistics, self.limit)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a cache at the site; `from_json` reads it."""
        channels = []
        for sums in self.channels:
            histogram = sums.histogram
            channels.append(
                {
                    "means": dyadic_to_text(sums.means),
                    "squares": dyadic_to_text(sums.squares),
                    "cut": sums.cut,
                    "contributors": [sorted(cases) for cases in sums.contributors],
                    "histogram": None
                    if histogram is None
                    else {
                        "exponent": histogram.exponent,
                        "start": histogram.start,
                        "masses": histogram.masses.tolist(),
                        "lowest": histogram.lowest,
                        "highest": histogram.highest,
                    },
                }
            )
        return {
            "limit": self.limit,
            "geometry": [[list(spacing), list(shape)] for spacing, shape in self.geometry],
            "relative_sizes": sorted(self.relative_sizes.items()),
            "with_foreground": self.with_foreground,
            "channels": channels,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> SiteStatistics:
        """Read what `to_json` gave; KeyError where an older version has written less."""
        result = cls(len(value["channels"]), value["limit"])
        result.geometry = [((s[0], s[1], s[2]), (n[0], n[1], n[2])) for s, n in value["geometry"]]
        result.relative_sizes = Counter(dict(value["relative_sizes"]))
        result.with_foreground = value["with_foreground"]
        for sums, stored in zip(result.channels, value["channels"], strict=True):
            sums.means = dyadic_from_text(stored["means"])
            sums.squares = dyadic_from_text(stored["squares"])
            sums.cut = stored["cut"]
            sums.contributors = [set(cases) for cases in stored["contributors"]]
            histogram = stored["histogram"]
            if histogram is not None:
                masses = np.array(histogram["masses"], dtype=np.int64)
                sums.histogram = Histogram(
                    histogram["exponent"], histogram["start"], masses, histogram["lowest"], histogram["highest"]
                )
        return result


def site_fingerprint(statistics: SiteStatistics | Iterable[CaseStatistics], min_cases: int) -> SiteFingerprint:
    """What the site sends.

    Parameters
    ----------
    statistics : SiteStatistics or iterable of CaseStatistics
        The site's training cases.
    min_cases : int
        The study's `fingerprint_min_cases`.

    Raises
    ------
    FednnunetError
        FNU-221: no case. FNU-223: fewer cases (or fewer with foreground) than `min_cases`.
    ValueError
        The statistics were folded for a smaller `min_cases`.
    """
    if not isinstance(statistics, SiteStatistics):
        cases = list(statistics)
        number = max((len(case.channels) for case in cases), default=0)
        statistics = SiteStatistics(max(number, 1), min_cases)
        for case in cases:
            statistics.add(case)
    if statistics.n_cases == 0:
        raise FednnunetError(Code.NO_CASES, "nothing to make a fingerprint of")
    if min_cases > statistics.limit:
        raise ValueError(f"statistics were folded for groups of at most {statistics.limit} cases")
    for count, what in ((statistics.n_cases, "cases"), (statistics.with_foreground, "cases with foreground")):
        if count < min_cases and (count or what == "cases"):
            raise FednnunetError(
                Code.TOO_FEW_CASES_TO_SHARE, f"{count} {what}, the study asks for groups of {min_cases}"
            )
    geometry, spacing_distance, shape_distance = _group_geometry(statistics.geometry, min_cases)
    return SiteFingerprint(
        min_cases=min_cases,
        n_cases=statistics.n_cases,
        n_cases_with_foreground=statistics.with_foreground,
        geometry=geometry,
        spacing_distance=spacing_distance,
        shape_distance=shape_distance,
        relative_sizes=_group_sizes(statistics.relative_sizes, min_cases),
        channels=tuple(_channel(sums, statistics.with_foreground, min_cases) for sums in statistics.channels),
    )


def _channel(sums: ChannelSums, cases: int, min_cases: int) -> Channel:
    grids = () if sums.histogram is None else (grid_of(sums.histogram.exponent, _pieces(sums, min_cases)),)
    return Channel(
        sum_of_means=dyadic_to_text(sums.means),
        sum_of_squares=dyadic_to_text(sums.squares),
        histogram=grids,
        cut=min(_mass_rounded_up(sums.cut), cases * MASS // 2),
    )


def _mass_rounded_up(mass: int) -> int:
    """1 or 1.5 times a power of two, as `_rounded_up`: a bound that tells no case's number of voxels."""
    power = 1 << (mass - 1).bit_length() if mass else 0
    return power * 3 // 4 if mass <= power * 3 // 4 else power


def _pieces(sums: ChannelSums, min_cases: int) -> dict[tuple[int, int], int]:
    """Cells, joined with their neighbours until each piece stands for `min_cases` cases; a rest joins the last one.

    Their ends are rounded outwards (`_widened`).
    """
    histogram = sums.histogram
    assert histogram is not None
    occupied = [int(place) for place in np.flatnonzero(histogram.masses)]
    if min_cases == 1:
        return {(histogram.start + place, 1): int(histogram.masses[place]) for place in occupied}
    pieces: list[tuple[int, int, int]] = []  # first cell, last cell, mass
    first, mass, cases = None, 0, set[int]()
    for place in occupied:
        first = place if first is None else first
        mass += int(histogram.masses[place])
        cases |= sums.contributors[place]
        if len(cases) >= min_cases:
            pieces.append((first, place, mass))
            first, mass, cases = None, 0, set()
    if first is not None:
        before, _, weight = pieces.pop()
        pieces.append((before, occupied[-1], weight + mass))
    return _widened((histogram.start + first, histogram.start + last, mass) for first, last, mass in pieces)


def _group_sizes(sizes: Counter[int], min_cases: int) -> tuple[RelativeSize, ...]:
    """Cells, joined with their neighbours until each group stands for `min_cases` cases; a rest joins the last one.

    Their ends are rounded outwards (`_widened`).
    """
    groups: list[tuple[int, int, int]] = []  # first cell, last cell, cases
    first, count = None, 0
    for cell in sorted(sizes):
        first = cell if first is None else first
        count += sizes[cell]
        if count >= min_cases:
            groups.append((first, cell, count))
            first, count = None, 0
    if count:
        before, _, others = groups.pop()
        groups.append((before, max(sizes), others + count))
    found = _widened(groups, RELATIVE_SIZE_CELLS + 1)
    return tuple(RelativeSize(start=start, cells=cells, count=count) for (start, cells), count in sorted(found.items()))


def _widened(runs: Iterable[tuple[int, int, int]], end: int | None = None) -> Counter[tuple[int, int]]:
    """Runs of cells by (start, cells), their ends moved outwards to multiples of a quarter of the length or more.

    The first and the last cell of a run are values of one case each: they are told no finer than that, nor than four
    cells. A run of one cell stays as it is: all its cases lie there.

    Parameters
    ----------
    runs : iterable of (first cell, last cell, amount)
    end : int, optional
        The cell that no run reaches.
    """
    found: Counter[tuple[int, int]] = Counter()
    for first, last, amount in runs:
        start, stop = first, last + 1
        if first != last:
            step = max(4, (1 << (last - first).bit_length()) // 4)
            start, stop = first // step * step, -(-stop // step) * step
        found[start, (stop if end is None else min(stop, end)) - start] += amount
    return found


def _group_geometry(
    cases: list[tuple[Triple, tuple[int, int, int]]], min_cases: int
) -> tuple[tuple[Geometry, ...], Triple, Triple]:
    """Microaggregation: sorted cases in groups of at least `min_cases`, each shown by its component-wise median.

    The distances of cases to their group's median are rounded up to 1 or 1.5 times a power of two, so that they bound
    every case and tell none.
    """
    rows = np.array(sorted([*spacing, *map(float, shape)] for spacing, shape in cases))
    found: Counter[tuple[float, ...]] = Counter()
    distances = np.zeros(6)
    bounds = list(range(0, len(rows) - len(rows) % min_cases, min_cases)) if min_cases > 1 else list(range(len(rows)))
    for number, begin in enumerate(bounds):
        group = rows[begin : bounds[number + 1] if number + 1 < len(bounds) else len(rows)]
        median = np.median(group, axis=0)
        distances = np.maximum(distances, np.abs(group - median).max(axis=0))
        found[tuple(median.tolist())] += len(group)
    off = [_rounded_up(float(distance)) for distance in distances]
    geometry = tuple(
        Geometry(spacing=(row[0], row[1], row[2]), shape=(row[3], row[4], row[5]), count=count)
        for row, count in sorted(found.items())
    )
    return geometry, (off[0], off[1], off[2]), (off[3], off[4], off[5])


def _rounded_up(distance: float) -> float:
    if distance == 0:
        return 0.0
    mantissa, exponent = math.frexp(distance)
    return math.ldexp(0.75 if 0.5 < mantissa <= 0.75 else 0.5 if mantissa == 0.5 else 1.0, exponent)
