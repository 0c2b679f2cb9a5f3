"""What a site says about its dataset so that one plan can be made for all: sums, counts and histograms.

Rules:

- A fingerprint is a sum. `merge` adds: in any order and any grouping it gives the same bits, because every number
  that is added is exact (whole numbers, and dyadic rationals: a whole number over a power of two).
- The target is nnU-Net's own: each case that has foreground counts the same in the intensity statistics
  (DatasetFingerprintExtractor draws the same number of voxels from each).
- No minimum and no maximum leaves a site. The outermost voxels of each case (1 in 10,000 at either end, at least one)
  are counted at the value next to them before anything is binned. How much of all cases' mass that is (`cut`) goes
  with the sums, rounded up, so that the record can say how far it moves a percentile.
- Intensities lie on a dyadic grid: a piece covers `cells` cells of width 2**exponent from `start` on and carries a
  whole number of mass, MASS for each case. Histograms of different exponents stand side by side when merged.
- With `min_cases` k > 1 nothing finer than k cases leaves: cases are put into groups of at least k, each shown by its
  component-wise median, and pieces are joined until at least k cases have a part in each. Where such a run of cells
  begins and ends would be values of one case: its ends are rounded outwards.
- A fingerprint is decoded from a peer: whatever is not plausible is a ValidationError, before it costs anything.

Worked example: two cases of 1 mm and 2 mm at one site and one case of 1 mm at another merge to
``{1 mm: 2, 2 mm: 1}``, whose median, 1 mm, is the median over the three cases.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from federation.errors import Code, FednnunetError

MASS = 2**44
"""Whole-number mass of one case in one channel's histogram."""
RELATIVE_SIZE_CELLS = 1024
"""Relative sizes after cropping are counted in cells of 1/1024; 1 has a cell of its own."""
DYADIC_BITS = 320
"""Per-case moments are rounded to multiples of 2**-320: exact for any float32 image in practice."""
MIN_EXPONENT, MAX_EXPONENT = -170, 120
MAX_SITE_CASES, MAX_SITE_GROUPS, MAX_SITE_PIECES = 500_000, 200_000, 8192
"""What one site may send (`check`). Merged fingerprints may hold what the sum of a thousand and more sites does:"""
MAX_CASES, MAX_GROUPS, MAX_PIECES = 10**9, 10**9, 2**24
MAX_CHANNELS = 64
MAX_INTENSITY = 2.0**130
TRIMMED = 10_000
"""One voxel in this many is winsorised at either end of each case."""
ROUNDED = 2.0**-30
"""A case's masses are rounded to whole numbers: up to 4096 of them, each by less than 2**-44 of the case."""
NONZERO_MASK_BELOW = 0.75
"""nnU-Net's planner has z-scores taken within the nonzero voxels where the median relative size is below this."""
NOTICEABLE = 0.1
"""Standard deviations by which a percentile may be off before the record says that it can move."""

_DYADIC = r"^(0|-?[1-9][0-9]{0,219})/2\^(0|[1-9][0-9]{0,2})$"
_Dyadic = Annotated[str, Field(max_length=230, pattern=_DYADIC)]
_Positive = Annotated[float, Field(ge=1e-6, le=1e6, allow_inf_nan=False)]
_Size = Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)]
_Distance = Annotated[float, Field(ge=0, le=1e7, allow_inf_nan=False)]
_Cases = Annotated[int, Field(ge=1, le=MAX_CASES)]
_Start = Annotated[int, Field(ge=-(2**52), le=2**52)]
_Cells = Annotated[int, Field(ge=1, le=2**52)]
_Mass = Annotated[int, Field(ge=1, le=MASS * MAX_CASES)]
_Cut = Annotated[int, Field(ge=0, le=MASS * MAX_CASES)]
Triple = tuple[float, float, float]


def dyadic_to_text(value: Fraction) -> str:
    """Write an exact dyadic rational as ``numerator/2^exponent`` in lowest terms.

    Raises
    ------
    ValueError
        The denominator is not a power of two, or is finer than 2**-DYADIC_BITS.
    """
    exponent = value.denominator.bit_length() - 1
    if value.denominator != 1 << exponent or exponent > DYADIC_BITS:
        raise ValueError("not a dyadic rational of this grid")
    return f"{value.numerator}/2^{exponent}"


def dyadic_from_text(text: str) -> Fraction:
    """Read what `dyadic_to_text` wrote; raises ``ValueError`` for any other spelling."""
    match = re.fullmatch(_DYADIC, text) if len(text) <= 230 else None
    if match is None:
        raise ValueError("not a dyadic rational")
    exponent = int(match[2])
    value = Fraction(int(match[1]), 1 << exponent) if exponent <= DYADIC_BITS else Fraction(0)
    if exponent > DYADIC_BITS or dyadic_to_text(value) != text:
        raise ValueError("not a dyadic rational in lowest terms")
    return value


def round_dyadic(value: Fraction, bits: int = DYADIC_BITS) -> Fraction:
    """The nearest multiple of 2**-`bits`."""
    return Fraction(round(value * (1 << bits)), 1 << bits)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Geometry(_Part):
    """`count` cases of one spacing and shape (k = 1), or a group of cases shown by its median (k > 1)."""

    spacing: tuple[_Positive, _Positive, _Positive] = Field(description="mm, in the order of the array's axes.")
    shape: tuple[_Size, _Size, _Size] = Field(description="Voxels after cropping to nonzero; a median may be a half.")
    count: _Cases

    @property
    def key(self) -> tuple[Triple, Triple]:
        """What two entries share when they are one."""
        return self.spacing, self.shape


class RelativeSize(_Part):
    """`count` cases whose size after cropping, relative to that before, lies in `cells` cells of 1/1024."""

    start: int = Field(ge=0, le=RELATIVE_SIZE_CELLS)
    cells: int = Field(ge=1, le=RELATIVE_SIZE_CELLS + 1)
    count: _Cases

    @property
    def value(self) -> float:
        """The middle of the lower edges of its cells: exactly 1.0 for uncropped cases."""
        return (self.start + (self.cells - 1) / 2) / RELATIVE_SIZE_CELLS


class Grid(_Part):
    """Pieces of a histogram with cells of width 2**exponent, in columns, sorted by (start, cells)."""

    exponent: int = Field(ge=MIN_EXPONENT, le=MAX_EXPONENT)
    start: tuple[_Start, ...] = Field(min_length=1, max_length=MAX_PIECES)
    cells: tuple[_Cells, ...] = Field(min_length=1, max_length=MAX_PIECES)
    mass: tuple[_Mass, ...] = Field(min_length=1, max_length=MAX_PIECES)

    @model_validator(mode="after")
    def _is_sorted(self) -> Grid:
        if not len(self.start) == len(self.cells) == len(self.mass):
            raise ValueError("columns differ in length")
        places = list(zip(self.start, self.cells, strict=True))
        if any(first >= second for first, second in itertools.pairwise(places)):
            raise ValueError("pieces are not sorted, or one stands twice")
        highest = max(start + cells for start, cells in places)
        outermost = max(abs(places[0][0]), abs(highest))
        if outermost > 2**53 or math.ldexp(outermost, self.exponent) > MAX_INTENSITY:
            raise ValueError("a piece lies outside what an image can hold")
        return self


class Channel(_Part):
    """The foreground intensities of one channel, summed over the cases that have foreground."""

    sum_of_means: _Dyadic = Field(description="Sum over cases of the case's mean; exact.")
    sum_of_squares: _Dyadic = Field(description="Sum over cases of the case's mean of x**2; exact.")
    histogram: tuple[Grid, ...] = Field(max_length=MAX_EXPONENT - MIN_EXPONENT + 1)
    cut: _Cut | None = Field(
        None,
        description="Mass at either end, over all cases, that is counted further inside than it lies; rounded up. "
        "None: not known; a site of an older version did not say it.",
    )

    @field_validator("sum_of_means", "sum_of_squares")
    @classmethod
    def _is_canonical(cls, value: str) -> str:
        dyadic_from_text(value)
        return value

    @model_validator(mode="after")
    def _is_sorted(self) -> Channel:
        if any(first.exponent >= second.exponent for first, second in itertools.pairwise(self.histogram)):
            raise ValueError("grids are not sorted by exponent, or one stands twice")
        if self.pieces > MAX_PIECES:
            raise ValueError("too many pieces")
        return self

    @property
    def pieces(self) -> int:
        """Number of pieces of the histogram."""
        return sum(len(grid.start) for grid in self.histogram)

    @property
    def mass(self) -> int:
        """Sum of the pieces' masses."""
        return sum(sum(grid.mass) for grid in self.histogram)

    def columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Lower edges, upper edges (intensity units) and masses (fractions of 1) of all pieces."""
        lower, upper, mass = [], [], []
        for grid in self.histogram:
            start = np.array(grid.start, dtype=np.float64)
            lower.append(np.ldexp(start, grid.exponent))
            upper.append(np.ldexp(start + np.array(grid.cells, dtype=np.float64), grid.exponent))
            mass.append(np.array(grid.mass, dtype=np.float64))
        masses = np.concatenate(mass)
        return np.concatenate(lower), np.concatenate(upper), masses / float(self.mass)


class SiteFingerprint(_Part):
    """The fingerprint of one site's training cases, or of several sites' merged."""

    min_cases: int = Field(ge=1, le=MAX_CASES, description="k: no group and no piece stands for fewer cases.")
    n_cases: _Cases
    n_cases_with_foreground: int = Field(ge=0, le=MAX_CASES)
    geometry: tuple[Geometry, ...] = Field(min_length=1, max_length=MAX_GROUPS)
    spacing_distance: tuple[_Distance, _Distance, _Distance] = Field(
        (0.0, 0.0, 0.0), description="For each axis, how far (mm) a case's spacing may be from its group's."
    )
    shape_distance: tuple[_Distance, _Distance, _Distance] = Field(
        (0.0, 0.0, 0.0), description="For each axis, how far (voxels) a case's shape may be from its group's."
    )
    relative_sizes: tuple[RelativeSize, ...] = Field(min_length=1, max_length=RELATIVE_SIZE_CELLS**2)
    channels: tuple[Channel, ...] = Field(min_length=1, max_length=MAX_CHANNELS)

    @model_validator(mode="after")
    def _adds_up(self) -> SiteFingerprint:
        n, k = self.n_cases, self.min_cases
        foreground = self.n_cases_with_foreground
        if k > n or foreground > n or 0 < foreground < k:
            raise ValueError("fewer cases than min_cases, or more with foreground than there are")
        keys = [entry.key for entry in self.geometry]
        if any(first >= second for first, second in itertools.pairwise(keys)):
            raise ValueError("geometry is not sorted, or an entry stands twice")
        sizes = [(entry.start, entry.cells) for entry in self.relative_sizes]
        if any(first >= second for first, second in itertools.pairwise(sizes)):
            raise ValueError("relative sizes are not sorted, or one stands twice")
        if any(start + cells > RELATIVE_SIZE_CELLS + 1 for start, cells in sizes):
            raise ValueError("a relative size is more than 1")
        for counts in ([entry.count for entry in self.geometry], [entry.count for entry in self.relative_sizes]):
            if sum(counts) != n or min(counts) < k:
                raise ValueError("counts do not add up to n_cases, or a group is smaller than min_cases")
        for channel in self.channels:
            if channel.mass != foreground * MASS:
                raise ValueError("a histogram does not hold MASS for each case with foreground")
            if channel.cut is not None and 2 * channel.cut > channel.mass:
                raise ValueError("more than half of the mass is cut")
            first, second = dyadic_from_text(channel.sum_of_means), dyadic_from_text(channel.sum_of_squares)
            if abs(first) > foreground * Fraction(MAX_INTENSITY) or second * foreground < first * first:
                raise ValueError("moments that no image can have")
            if second > foreground * Fraction(MAX_INTENSITY) ** 2:
                raise ValueError("moments that no image can have")
        return self


def check(fingerprint: SiteFingerprint, channels: int, min_cases: int) -> None:
    """Whether one site's fingerprint is what the study asked for.

    Raises
    ------
    FednnunetError
        FNU-507: another number of channels, another k, or more cases, groups or pieces than a site may send.
    """
    if len(fingerprint.channels) != channels:
        found = f"a fingerprint with {len(fingerprint.channels)} channels where the study has {channels}"
        raise FednnunetError(Code.RESULT_REFUSED, found)
    if fingerprint.min_cases != min_cases:
        found = f"a fingerprint for groups of {fingerprint.min_cases} cases where the study asks for {min_cases}"
        raise FednnunetError(Code.RESULT_REFUSED, found)
    pieces = max(channel.pieces for channel in fingerprint.channels)
    for number, most, what in (
        (fingerprint.n_cases, MAX_SITE_CASES, "cases"),
        (len(fingerprint.geometry), MAX_SITE_GROUPS, "groups"),
        (pieces, MAX_SITE_PIECES, "pieces in a histogram"),
    ):
        if number > most:
            raise FednnunetError(Code.RESULT_REFUSED, f"a fingerprint of more than {most} {what}")


def merge(fingerprints: Sequence[SiteFingerprint]) -> SiteFingerprint:
    """Add fingerprints: associative and commutative, bit for bit.

    Parameters
    ----------
    fingerprints : sequence of SiteFingerprint
        At least one; of sites, or merged before.

    Returns
    -------
    SiteFingerprint
        Its `min_cases` is the smallest of theirs, its distances the largest.

    Raises
    ------
    FednnunetError
        FNU-108 where they differ in the number of channels.
    ValueError
        No fingerprint was given.
    """
    if not fingerprints:
        raise ValueError("no fingerprint to merge")
    if len({len(fingerprint.channels) for fingerprint in fingerprints}) != 1:
        raise FednnunetError(Code.CONTRACTS_DIFFER, "the fingerprints differ in the number of channels")
    geometry: Counter[tuple[Triple, Triple]] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    for fingerprint in fingerprints:
        for entry in fingerprint.geometry:
            geometry[entry.key] += entry.count
        for size in fingerprint.relative_sizes:
            sizes[size.start, size.cells] += size.count
    return SiteFingerprint(
        min_cases=min(fingerprint.min_cases for fingerprint in fingerprints),
        n_cases=sum(fingerprint.n_cases for fingerprint in fingerprints),
        n_cases_with_foreground=sum(fingerprint.n_cases_with_foreground for fingerprint in fingerprints),
        geometry=tuple(Geometry(spacing=key[0], shape=key[1], count=count) for key, count in sorted(geometry.items())),
        spacing_distance=_largest(fingerprint.spacing_distance for fingerprint in fingerprints),
        shape_distance=_largest(fingerprint.shape_distance for fingerprint in fingerprints),
        relative_sizes=tuple(
            RelativeSize(start=start, cells=cells, count=count) for (start, cells), count in sorted(sizes.items())
        ),
        channels=tuple(
            _merge_channels(channels)
            for channels in zip(*(fingerprint.channels for fingerprint in fingerprints), strict=True)
        ),
    )


def _largest(distances: Iterable[Triple]) -> Triple:
    first, second, third = (max(axis) for axis in zip(*distances, strict=True))
    return first, second, third


def _merge_channels(channels: Sequence[Channel]) -> Channel:
    means, squares = Fraction(0), Fraction(0)
    grids: dict[int, Counter[tuple[int, int]]] = {}
    for channel in channels:
        means += dyadic_from_text(channel.sum_of_means)
        squares += dyadic_from_text(channel.sum_of_squares)
        for grid in channel.histogram:
            pieces = grids.setdefault(grid.exponent, Counter())
            for start, cells, mass in zip(grid.start, grid.cells, grid.mass, strict=True):
                pieces[start, cells] += mass
    return Channel(
        sum_of_means=dyadic_to_text(means),
        sum_of_squares=dyadic_to_text(squares),
        histogram=tuple(grid_of(exponent, pieces) for exponent, pieces in sorted(grids.items())),
        cut=_sum_of_known([channel.cut for channel in channels]),
    )


def _sum_of_known(cuts: Sequence[int | None]) -> int | None:
    """Their sum; None where one of them is not known."""
    known = [cut for cut in cuts if cut is not None]
    return sum(known) if len(known) == len(cuts) else None


def grid_of(exponent: int, pieces: dict[tuple[int, int], int]) -> Grid:
    """A grid from ``{(start, cells): mass}``, in its canonical order."""
    ordered = sorted(pieces.items())
    return Grid(
        exponent=exponent,
        start=tuple(start for (start, _), _ in ordered),
        cells=tuple(cells for (_, cells), _ in ordered),
        mass=tuple(mass for _, mass in ordered),
    )


def moments(pooled: SiteFingerprint, channel: int) -> tuple[float, float]:
    """Mean and standard deviation of one channel's equal-weight-per-case mixture of foreground intensities.

    Worked out in exact arithmetic and rounded once, so that a large offset costs no digits of the deviation.
    Agrees with `numpy.mean` and `numpy.std` of DatasetFingerprintExtractor up to its sampling.
    """
    n = pooled.n_cases_with_foreground
    if n == 0:
        raise FednnunetError(Code.NO_FOREGROUND, "no case of any site has foreground")
    mean = dyadic_from_text(pooled.channels[channel].sum_of_means) / n
    variance = dyadic_from_text(pooled.channels[channel].sum_of_squares) / n - mean * mean
    return float(mean), math.sqrt(variance)


def percentiles(pooled: SiteFingerprint, channel: int, q: Sequence[float]) -> list[float]:
    """Percentiles of one channel's winsorised foreground intensities, from the pooled histogram.

    The pooled distribution function is the sum of the pieces' (each spread evenly over its cells), inverted. Where
    it is flat at the wanted height, the middle of the flat part is taken, as between two samples. How far they may be
    from those of the voxels as they were is the matter of `plan_tolerance`.

    Parameters
    ----------
    pooled : SiteFingerprint
        With at least one case that has foreground.
    channel : int
        Index of the channel.
    q : sequence of float
        Percentages, 0 to 100.

    Returns
    -------
    list of float
        Intensities, in the order of `q`.
    """
    if pooled.n_cases_with_foreground == 0:
        raise FednnunetError(Code.NO_FOREGROUND, "no case of any site has foreground")
    lower, upper, mass = pooled.channels[channel].columns()
    edges, place = np.unique(np.concatenate([lower, upper]), return_inverse=True)
    density = _density(mass / (upper - lower), place[: len(lower)], place[len(lower) :], len(edges))
    heights = np.concatenate([[0.0], np.cumsum(density * np.diff(edges))])
    heights /= heights[-1]
    result = []
    for percentage in q:
        wanted = percentage / 100
        first = int(np.searchsorted(heights, wanted - 1e-12, side="left"))
        last = int(np.searchsorted(heights, wanted + 1e-12, side="right")) - 1
        if last >= first:  # at an edge, or along a flat part
            result.append(float((edges[first] + edges[min(last, len(edges) - 1)]) / 2))
            continue
        below, above = heights[first - 1], heights[first]
        share = (wanted - below) / (above - below)
        result.append(float(edges[first - 1] + share * (edges[first] - edges[first - 1])))
    return result


def _density(slope: NDArray[np.float64], first: NDArray[Any], last: NDArray[Any], edges: int) -> NDArray[np.float64]:
    """The sum of the pieces' slopes between each edge and the next.

    Slopes are added where a piece begins and taken off where it ends, those of one size by themselves: beside a channel
    that is 0 everywhere (a missing modality), whose piece is 2**-160 wide, all others would be lost to rounding.

    Parameters
    ----------
    slope : array of float
        Mass over width, above zero.
    first, last : array of int
        The edges between which a piece lies.
    edges : int
        Number of edges.
    """
    density = np.zeros(edges - 1)
    sizes = np.frexp(slope)[1] // 4
    for size in np.unique(sizes):
        chosen = sizes == size
        change, open_pieces = np.zeros(edges), np.zeros(edges, dtype=np.int64)
        for place, sign in ((first[chosen], 1), (last[chosen], -1)):
            np.add.at(change, place, sign * slope[chosen])
            np.add.at(open_pieces, place, sign)
        covered = np.cumsum(open_pieces)[:-1] > 0
        density += np.where(covered, np.maximum(np.cumsum(change)[:-1], 0.0), 0.0)
    return density


def to_nnunet(pooled: SiteFingerprint) -> dict[str, Any]:
    """nnU-Net's dataset_fingerprint.json for a pooled fingerprint.

    The layout is that of ``DatasetFingerprintExtractor.run``. `min` and `max` are the outermost edges of the pooled
    histogram, thus of winsorised intensities: the planner copies them into the plans and nothing reads them.

    Parameters
    ----------
    pooled : SiteFingerprint
        Of one site or merged.

    Returns
    -------
    dict
        `spacings` and `shapes_after_crop` (one entry for each case), `median_relative_size_after_cropping`, and
        `foreground_intensity_properties_per_channel` with channel numbers as text.

    Raises
    ------
    FednnunetError
        FNU-222: no case has foreground.
    """
    spacings: list[list[float]] = []
    shapes: list[list[float]] = []
    for entry in pooled.geometry:
        shape = [int(size) if size == int(size) else size for size in entry.shape]
        spacings += [list(entry.spacing)] * entry.count
        shapes += [shape] * entry.count
    intensities = {}
    for index, channel in enumerate(pooled.channels):
        mean, std = moments(pooled, index)
        low, median, high = percentiles(pooled, index, (0.5, 50.0, 99.5))
        lower, upper, _ = channel.columns()
        intensities[str(index)] = {
            "max": float(upper.max()),
            "mean": mean,
            "median": median,
            "min": float(lower.min()),
            "percentile_00_5": low,
            "percentile_99_5": high,
            "std": std,
        }
    return {
        "foreground_intensity_properties_per_channel": intensities,
        "median_relative_size_after_cropping": _median_relative_size(pooled),
        "shapes_after_crop": shapes,
        "spacings": spacings,
    }


def _median_relative_size(pooled: SiteFingerprint) -> float:
    values = np.repeat([size.value for size in pooled.relative_sizes], [size.count for size in pooled.relative_sizes])
    return float(np.median(values))


def _relative_size_between(pooled: SiteFingerprint) -> tuple[float, float]:
    """The median relative size is at least the first and less than the second, or both are 1."""
    counts = [size.count for size in pooled.relative_sizes]
    lower = np.repeat([size.start for size in pooled.relative_sizes], counts)
    upper = np.repeat([size.start + size.cells for size in pooled.relative_sizes], counts)
    upper = np.minimum(upper, RELATIVE_SIZE_CELLS)
    return float(np.median(lower)) / RELATIVE_SIZE_CELLS, float(np.median(upper)) / RELATIVE_SIZE_CELLS


def plan_tolerance(pooled: SiteFingerprint) -> dict[str, Any]:
    """How far the plan's numbers can be from those of the same cases without grouping: the study's record.

    Each case's spacing and shape lies within `spacing_distance` and `shape_distance` of its group's median. A median
    (and any percentile) moves by no more than the largest move of one of its cases, axis by axis: it is 1-Lipschitz in
    the sup norm. So these distances bound the medians, for any k. The median shape after resampling to the target
    spacing is bounded by the medians of the smallest and the largest shape that each case can have had, the median
    relative size by those of the lower and of the upper edges of the cells. With k = 1 spacing and shape are exact.

    A percentile of the intensities is compared with that over all foreground voxels, each case weighing the same: what
    nnU-Net's sample estimates. Let F be that distribution and W the one of the winsorised voxels. A case's outermost
    voxels are moved inwards, a share c of all mass at either end and never more than half of a case, so that W(x) is
    at least F(x) - c and 2 F(x) - 1, and at most F(x) + c and 2 F(x). The percentile q therefore lies between those of
    W at max(q - c, 2 q - 1) and at min(q + c, 2 q). These are bounded by the pieces' lower and upper edges, and a flat
    part is taken with both its ends. Where W has no such percentile the end is open: None. In cases of many voxels c
    is about 1/10,000; in one of 12 it is 1/12, and its percentile 0.5 is open.

    Returns
    -------
    dict
        Plain data: `min_cases`, `groups`, for each axis the median and how far it can move, for each channel the cut
        mass' share (None: not known, taken as half), each percentile and its range (None: open), the channels of which
        percentile 0.5 or 99.5 can be off by more than NOTICEABLE standard deviations, the median relative size and
        how far it can move, and whether the decision on the nonzero mask (NONZERO_MASK_BELOW) can turn by that.
    """
    counts = [entry.count for entry in pooled.geometry]
    spacings = np.repeat(np.array([entry.spacing for entry in pooled.geometry]), counts, axis=0)
    shapes = np.repeat(np.array([entry.shape for entry in pooled.geometry]), counts, axis=0)
    off_spacing, off_shape = np.array(pooled.spacing_distance), np.array(pooled.shape_distance)
    target = np.median(spacings, axis=0)
    target_low, target_high = target - off_spacing, target + off_spacing
    smallest = np.maximum(spacings - off_spacing, 0) / target_high * np.maximum(shapes - off_shape, 1)
    with np.errstate(divide="ignore"):
        largest = (spacings + off_spacing) / np.maximum(target_low, 0) * (shapes + off_shape)
    # rounded as compute_new_shape of nnU-Net rounds; rounding keeps the order, so these stay bounds
    resampled = np.stack([np.median(np.rint(smallest), axis=0), np.median(np.rint(largest), axis=0)])
    relative, (least, most) = _median_relative_size(pooled), _relative_size_between(pooled)
    intensities = _intensity_tolerance(pooled) if pooled.n_cases_with_foreground else {}
    return {
        "min_cases": pooled.min_cases,
        "groups": len(pooled.geometry),
        "exact_geometry": not any(pooled.spacing_distance + pooled.shape_distance),
        "median_spacing": target.tolist(),
        "median_spacing_moves_at_most": off_spacing.tolist(),
        "median_shape": np.median(shapes, axis=0).tolist(),
        "median_shape_moves_at_most": off_shape.tolist(),
        "median_resampled_shape_between": [
            [value if math.isfinite(value) else None for value in row] for row in resampled.tolist()
        ],
        "median_relative_size": relative,
        "median_relative_size_moves_at_most": max(relative - least, most - relative),
        "nonzero_mask_decision_can_turn": least < NONZERO_MASK_BELOW < most,
        "intensity_cut": {index: channel.cut for index, channel in intensities.items()},
        "intensity": {index: channel.found for index, channel in intensities.items()},
        "intensity_between": {index: channel.between for index, channel in intensities.items()},
        "percentiles_can_move": [index for index, channel in intensities.items() if channel.can_move],
    }


@dataclass(frozen=True)
class _Intensities:
    """One channel's part of the record, by the name of the percentile."""

    cut: float | None
    found: dict[str, float]
    between: dict[str, list[float | None]]
    can_move: bool


def _intensity_tolerance(pooled: SiteFingerprint) -> dict[str, _Intensities]:
    names = {"percentile_00_5": 0.005, "median": 0.5, "percentile_99_5": 0.995}
    result = {}
    for index, channel in enumerate(pooled.channels):
        cut = None if channel.cut is None else channel.cut / channel.mass
        values = percentiles(pooled, index, [100 * q for q in names.values()])
        found = dict(zip(names, values, strict=True))
        columns = channel.columns()
        between = {name: _percentile_between(columns, q, cut, found[name]) for name, q in names.items()}
        _, std = moments(pooled, index)
        can_move = std > 0 and any(
            bound is None or abs(bound - found[name]) > NOTICEABLE * std
            for name in ("percentile_00_5", "percentile_99_5")
            for bound in between[name]
        )
        result[str(index)] = _Intensities(cut, found, between, can_move)
    return result


def _percentile_between(
    columns: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    q: float,
    cut: float | None,
    found: float,
) -> list[float | None]:
    """Bounds of the percentile at height `q` of the voxels as they were; `found`, ours, always lies within."""
    lower, upper, mass = columns
    share = 0.5 if cut is None else cut
    least, most = max(q - share, 2 * q - 1) - ROUNDED, min(q + share, 2 * q) + ROUNDED
    return [
        min(_weighted_quantile(lower, mass, least, "left"), found) if least > 0 else None,
        max(_weighted_quantile(upper, mass, most, "right"), found) if most < 1 else None,
    ]


def _weighted_quantile(
    values: NDArray[np.float64], mass: NDArray[np.float64], q: float, side: Literal["left", "right"]
) -> float:
    """The first value whose cumulated mass reaches (`left`) or exceeds (`right`) the share `q`."""
    order = np.argsort(values, kind="stable")
    heights = np.cumsum(mass[order])
    place = int(np.searchsorted(heights, q * heights[-1], side=side))
    return float(values[order][min(place, len(values) - 1)])
