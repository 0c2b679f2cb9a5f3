"""The federated fingerprint: exact sums, no extremes, and what a hostile or curious peer gets from it."""

from __future__ import annotations

import itertools
import json
import math
import random
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from appliance.worker.fingerprint import (
    CaseStatistics,
    SiteStatistics,
    case_statistics,
    channel_statistics,
    nonzero_box,
    site_fingerprint,
)
from federation.errors import Code, FednnunetError
from federation.fingerprint import (
    MASS,
    MAX_SITE_CASES,
    SiteFingerprint,
    check,
    dyadic_from_text,
    dyadic_to_text,
    merge,
    moments,
    percentiles,
    plan_tolerance,
    to_nnunet,
)


def ct_case(seed: int, offset: float, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """One synthetic CT-like case: images (1, x, y, z) float32, label (1, x, y, z), spacing in mm."""
    random = np.random.default_rng(seed)
    shape = tuple(int(size) for size in random.integers(18, 30, 3))
    image = random.normal(-200, 150, shape)
    label = np.zeros(shape)
    label[4:14, 4:14, 4:14] = 1
    label[6:10, 6:10, 6:10] = 2
    image[label > 0] = random.normal(offset, 30 + seed % 7, int((label > 0).sum()))
    spacing = (float(random.choice([1.0, 1.5, 2.5])), 0.8, 0.8)
    return np.round(image * scale, 3)[None].astype(np.float32), label[None], spacing


SITES = {"a": (40.0, 1.0), "b": (300.0, 1.0), "c": (90.0, 1000.0)}


def three_sites(cases: int = 6) -> dict[str, list[tuple[np.ndarray, np.ndarray, tuple[float, float, float]]]]:
    """Three shifted sites, one of them scaled by 1000 as in the real hippocampus data."""
    return {
        name: [ct_case(100 * number + case, *shift) for case in range(cases + number)]
        for number, (name, shift) in enumerate(SITES.items())
    }


def fingerprint_of(cases: list[Any], min_cases: int = 1) -> SiteFingerprint:
    return site_fingerprint([case_statistics(*case) for case in cases], min_cases)


def statistics_of(*values: list[float]) -> list[CaseStatistics]:
    """Cases with these foreground intensities."""
    return [
        CaseStatistics(
            (1.0, 1.0, 1.0 + place % 3), (10 + place, 10, 10), 1.0, (channel_statistics(np.array(case, np.float32)),)
        )
        for place, case in enumerate(values)
    ]


def weighted_truth(cases: list[Any]) -> dict[str, float]:
    """Mean, std and percentiles of the mixture in which each case weighs the same: nnU-Net's target."""
    values, weights = [], []
    for images, label, _ in cases:
        foreground = images[0][label[0] > 0].astype(np.float64)
        values.append(foreground)
        weights.append(np.full(len(foreground), 1 / len(foreground) / len(cases)))
    value, weight = np.concatenate(values), np.concatenate(weights)
    mean = float((value * weight).sum())
    order = np.argsort(value)
    heights = np.cumsum(weight[order])
    result = {"mean": mean, "std": float(np.sqrt((weight * (value - mean) ** 2).sum()))}
    for name, q in (("percentile_00_5", 0.005), ("median", 0.5), ("percentile_99_5", 0.995)):
        result[name] = float(value[order][np.searchsorted(heights, q)])
    result["range"] = float(value.max() - value.min())
    return result


# accuracy


def test_merged_sites_give_the_statistics_of_the_pooled_cases() -> None:
    sites = three_sites()
    pooled = to_nnunet(merge([fingerprint_of(cases) for cases in sites.values()]))
    everything = list(itertools.chain(*sites.values()))
    truth = weighted_truth(everything)
    found = pooled["foreground_intensity_properties_per_channel"]["0"]
    for name in ("mean", "std"):
        assert found[name] == pytest.approx(truth[name], rel=1e-6)
    for name in ("percentile_00_5", "percentile_99_5"):
        assert abs(found[name] - truth[name]) <= 0.002 * truth["range"]
    assert np.array_equal(np.median(pooled["spacings"], 0), np.median([case[2] for case in everything], 0))
    shapes = [case[0].shape[1:] for case in everything]
    assert np.array_equal(np.median(pooled["shapes_after_crop"], 0), np.median(shapes, 0))
    assert sorted(map(tuple, pooled["shapes_after_crop"])) == sorted(shapes)


def test_a_small_site_keeps_its_percentiles_beside_one_a_thousand_times_as_large() -> None:
    sites = three_sites()
    small, large = fingerprint_of(sites["a"] * 9), fingerprint_of(sites["c"][:1])
    low = percentiles(merge([small, large]), 0, [0.5])[0]
    assert low == pytest.approx(weighted_truth(sites["a"] * 9 + sites["c"][:1])["percentile_00_5"], abs=0.5)


def test_a_large_offset_costs_no_digits_of_the_deviation() -> None:
    values = (np.float32(1e6) + np.arange(64, dtype=np.float32) / 16).tolist()
    pooled = site_fingerprint(statistics_of(values, values), 1)
    mean, std = moments(pooled, 0)
    assert mean == pytest.approx(np.mean(values), rel=1e-15)
    assert std == pytest.approx(np.std(np.array(values, np.float64)), rel=1e-12)


def test_constant_foreground_gives_its_value() -> None:
    pooled = site_fingerprint(statistics_of([7.25] * 50, [7.25] * 9), 1)
    assert percentiles(pooled, 0, [0.5, 50, 99.5]) == pytest.approx([7.25] * 3, rel=1e-6)
    assert moments(pooled, 0) == (7.25, 0.0)


@pytest.mark.parametrize("constant", [0.0, -1024.0, 3.4e38])
def test_constant_beside_ordinary_cases_is_pooled(constant: float) -> None:
    pooled = site_fingerprint(statistics_of([constant] * 5, [1.0, 2.0, 3.0, 4.0]), 1)
    assert pooled.channels[0].mass == 2 * MASS


def test_foreground_box_is_that_of_nnunet() -> None:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    random = np.random.default_rng(0)
    shell = np.zeros((2, 12, 14, 16), np.float32)
    shell[0, 2:9, 3:10, 4:12] = 5
    shell[0, 4:6, 5:7, 6:8] = 0  # a hole
    shell[1, 1:3, 5:7, 5:7] = 1  # the other channel reaches further
    sparse = (random.random((1, 9, 9, 9)) > 0.99).astype(np.float32)
    for images in (shell, sparse, np.zeros((1, 5, 6, 7), np.float32), np.ones((1, 1, 8, 8), np.float32)):
        label = np.ones((1, *images.shape[1:]), np.float32)
        cropped, _, box = crop_to_nonzero(images, label.copy())
        assert [[part.start, part.stop] for part in nonzero_box(images)] == box
        assert case_statistics(images, label, (1, 1, 1)).shape == cropped.shape[1:]


# merging

values = st.floats(-1e6, 1e6, width=32)
case_lists = st.lists(st.lists(values, min_size=1, max_size=12), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(case_lists, min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_merging_does_not_depend_on_order_or_grouping(sites: list[list[list[float]]], chance: random.Random) -> None:
    fingerprints = [site_fingerprint(statistics_of(*cases), 1) for cases in sites]
    whole = merge(fingerprints).model_dump_json()
    shuffled = list(fingerprints)
    chance.shuffle(shuffled)
    assert merge(shuffled).model_dump_json() == whole
    grouped = shuffled[0]
    for fingerprint in shuffled[1:]:
        grouped = merge([fingerprint, grouped])
    assert grouped.model_dump_json() == whole


@settings(max_examples=40, deadline=None)
@given(case_lists, st.sampled_from([1, 2]), st.randoms(use_true_random=False))
def test_a_sites_fingerprint_does_not_depend_on_the_order_of_its_cases(
    cases: list[list[float]], min_cases: int, chance: random.Random
) -> None:
    statistics = statistics_of(*(cases if len(cases) >= min_cases else cases * 2))
    shuffled = list(statistics)
    chance.shuffle(shuffled)
    expected = site_fingerprint(statistics, min_cases).model_dump_json()
    assert site_fingerprint(shuffled, min_cases).model_dump_json() == expected


@settings(max_examples=40, deadline=None)
@given(case_lists)
def test_every_percentile_lies_within_a_cell_of_the_winsorised_truth(cases: list[list[float]]) -> None:
    statistics = statistics_of(*cases)
    pooled = site_fingerprint(statistics, 1)
    width = math.ldexp(1.0, pooled.channels[0].histogram[0].exponent)
    values, weights = [], []
    for case, reduced in zip(cases, statistics, strict=True):
        histogram = reduced.channels[0].histogram
        values += np.clip(np.array(case, np.float32), histogram.lowest, histogram.highest).tolist()
        weights += [1 / len(case) / len(cases)] * len(case)
    order = np.argsort(values, kind="stable")
    heights = np.cumsum(np.array(weights)[order])
    for q, found in zip((0.5, 50.0, 99.5), percentiles(pooled, 0, (0.5, 50.0, 99.5)), strict=True):
        lowest = np.array(values)[order][min(np.searchsorted(heights, q / 100 - 1e-9), len(values) - 1)]
        highest = np.array(values)[order][min(np.searchsorted(heights, q / 100 + 1e-9), len(values) - 1)]
        assert lowest - 1e-9 - width <= found <= highest + 1e-9 + width


@given(st.integers(-(2**200), 2**200), st.integers(0, 320))
def test_exact_numbers_survive_being_written(numerator: int, exponent: int) -> None:
    value = Fraction(numerator, 1 << exponent)
    assert dyadic_from_text(dyadic_to_text(value)) == value


def test_merging_other_channels_is_refused() -> None:
    one = fingerprint_of(three_sites(2)["a"])
    two = SiteFingerprint.model_validate({**one.model_dump(), "channels": one.model_dump()["channels"] * 2})
    with pytest.raises(FednnunetError) as error:
        merge([one, two])
    assert error.value.code is Code.CONTRACTS_DIFFER


# what leaves


def test_minimum_and_maximum_of_a_case_do_not_leave() -> None:
    ordinary = np.random.default_rng(1).normal(100, 20, 5000).astype(np.float32)
    histograms = []
    for extreme in (1e3, 1e6):
        values = ordinary.copy()
        values[17], values[4711] = extreme, -extreme
        statistics = statistics_of(values.tolist())
        channel = site_fingerprint(statistics, 1).channels[0]
        histograms.append(channel.histogram)
        lower, upper, _ = channel.columns()
        assert lower.min() > -extreme / 4
        assert upper.max() < extreme / 4
    assert histograms[0] == histograms[1]


@pytest.mark.parametrize(("case", "counted"), [([5.0], 5.0), ([1.0, 9.0], 5.0), ([1.0, 3.0, 9.0], 3.0)])
def test_a_case_of_a_few_voxels_is_counted_inside_its_extremes(case: list[float], counted: float) -> None:
    lower, upper, _ = site_fingerprint(statistics_of(case), 1).channels[0].columns()
    assert len(lower) == 1
    assert lower[0] <= counted <= upper[0]


def test_nothing_but_sums_and_counts_is_in_the_message() -> None:
    message = json.loads(fingerprint_of(three_sites(2)["a"]).model_dump_json())
    assert set(message) == {
        "min_cases",
        "n_cases",
        "n_cases_with_foreground",
        "geometry",
        "spacing_distance",
        "shape_distance",
        "relative_sizes",
        "channels",
    }
    assert set(message["channels"][0]) == {"sum_of_means", "sum_of_squares", "histogram", "cut"}


def test_the_cut_mass_bounds_every_case_and_tells_the_voxels_of_none() -> None:
    told = {}
    for voxels in (90, 100, 120, 127, 20_000):
        channel = site_fingerprint(statistics_of(list(range(voxels))), 1).channels[0]
        assert channel.cut is not None
        told[voxels] = channel.cut / MASS
        assert max(1, voxels // 10_000) / voxels <= told[voxels] <= 1.5 * max(1, voxels // 10_000) / voxels
    assert told[90] == told[100] == told[120] == told[127]
    assert site_fingerprint(statistics_of([5.0], [7.0]), 1).channels[0].cut == 0, "nothing lies further inside"
    for cases in (1, 5):  # five halves would be rounded up to three, more than there can be
        assert site_fingerprint(statistics_of(*[[1.0, 9.0]] * cases), 1).channels[0].cut == cases * MASS // 2


def test_a_channel_of_continuous_intensities_stays_small() -> None:
    random = np.random.default_rng(0)
    cases = statistics_of(*[random.normal(shift, 300, 40_000).tolist() for shift in (0, 500, 2000)])
    message = site_fingerprint(cases, 1).model_dump_json()
    assert len(message) < 200_000


@pytest.mark.parametrize("min_cases", [2, 3, 5])
def test_groups_and_pieces_stand_for_at_least_k_cases(min_cases: int) -> None:
    cases = three_sites(8)["b"]
    fingerprint = fingerprint_of(cases, min_cases)
    assert min(entry.count for entry in fingerprint.geometry) >= min_cases
    assert min(entry.count for entry in fingerprint.relative_sizes) >= min_cases
    lower, upper, _ = fingerprint.channels[0].columns()
    winsorised = [case_statistics(*case).channels[0].histogram for case in cases]
    for low, high in zip(lower, upper, strict=True):
        contributors = 0
        for histogram in winsorised:
            cells = (histogram.start + np.flatnonzero(histogram.masses)) * 2.0**histogram.exponent
            contributors += bool(np.any((cells >= low) & (cells < high)))
        assert contributors >= min_cases


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.3, 6), st.floats(0.3, 2), st.integers(10, 600), st.integers(64, 512)),
        min_size=4,
        max_size=25,
    ),
    st.integers(2, 4),
)
def test_the_record_bounds_how_far_grouping_moves_the_medians(rows: list[Any], min_cases: int) -> None:
    histogram = (channel_statistics(np.array([1, 2, 3, 4], np.float32)),)
    cases = [
        CaseStatistics((depth, plane, plane), (slices, size, size), 1.0, histogram)
        for depth, plane, slices, size in rows
    ]
    record = plan_tolerance(site_fingerprint(cases, min_cases))
    spacings, shapes = np.array([case.spacing for case in cases]), np.array([case.shape for case in cases])
    off = np.abs(np.median(spacings, 0) - record["median_spacing"])
    assert np.all(off <= np.array(record["median_spacing_moves_at_most"]) + 1e-9)
    off = np.abs(np.median(shapes, 0) - record["median_shape"])
    assert np.all(off <= np.array(record["median_shape_moves_at_most"]) + 1e-9)
    resampled = np.median(np.rint(spacings / np.median(spacings, 0) * shapes), axis=0)
    low, high = record["median_resampled_shape_between"]
    assert all(size >= least - 1e-6 for size, least in zip(resampled, low, strict=True))
    assert all(most is None or size <= most + 1e-6 for size, most in zip(resampled, high, strict=True))


PERCENTILES = {"percentile_00_5": 0.5, "median": 50.0, "percentile_99_5": 99.5}


def holds(between: list[float | None], value: float) -> bool:
    low, high = between
    return (low is None or low <= value) and (high is None or value <= high)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(
            st.lists(st.one_of(values, st.integers(-3, 3).map(float)), min_size=1, max_size=30), min_size=3, max_size=9
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 3),
)
def test_the_record_bounds_the_percentiles_of_the_voxels_as_they_were(
    sites: list[list[list[float]]], min_cases: int
) -> None:
    pooled = merge([site_fingerprint(statistics_of(*cases), min_cases) for cases in sites])
    record = plan_tolerance(pooled)
    cases = [[float(np.float32(value)) for value in case] for case in itertools.chain(*sites)]
    weighted = sorted((value, Fraction(1, len(case) * len(cases))) for case in cases for value in case)
    heights = list(itertools.accumulate(weight for _, weight in weighted))
    for (name, q), ours in zip(PERCENTILES.items(), percentiles(pooled, 0, list(PERCENTILES.values())), strict=True):
        between = record["intensity_between"]["0"][name]
        wanted = Fraction(q) / 100
        first = next(value for (value, _), height in zip(weighted, heights, strict=True) if height >= wanted)
        last = next(value for (value, _), height in zip(weighted, heights, strict=True) if height > wanted)
        assert record["intensity"]["0"][name] == ours
        assert holds(between, ours), "our own"
        assert holds(between, first), "that of the voxels as they were"
        assert holds(between, last), "and the other end of a flat part"


@pytest.mark.parametrize(("voxels", "moves"), [(6, True), (12, True), (30, True), (100, True), (5000, False)])
def test_the_record_tells_where_small_lesions_move_the_percentiles(voxels: int, moves: bool) -> None:
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    random = np.random.default_rng(0)
    cases, centrally = [], []
    for _ in range(40):
        image, label = np.full((1, 1, 80, 80), -800, np.float32), np.zeros((1, 1, 80, 80), np.uint8)
        label.reshape(-1)[:voxels] = 1
        image.reshape(-1)[:voxels] = random.normal(40 + random.normal(0, 20), 90, voxels).round()
        cases.append((image, label, (1.0, 1.0, 1.0)))
        collect = DatasetFingerprintExtractor.collect_foreground_intensities
        centrally.append(collect(label, image, num_samples=50_000)[0][0])
    pooled = fingerprint_of(cases)
    record = plan_tolerance(pooled)
    told = to_nnunet(pooled)["foreground_intensity_properties_per_channel"]["0"]
    for name, q in PERCENTILES.items():
        assert holds(record["intensity_between"]["0"][name], told[name])
        assert holds(record["intensity_between"]["0"][name], float(np.percentile(np.concatenate(centrally), q)))
    assert record["percentiles_can_move"] == (["0"] if moves else [])
    json.dumps(record, allow_nan=False)


def test_the_record_holds_both_ends_of_a_flat_part_and_our_middle_between_them() -> None:
    pooled = site_fingerprint(statistics_of([-5.0], *[[0.0]] * 198, [5.0]), 1)  # one case in 200 is 0.5 %
    between = plan_tolerance(pooled)["intensity_between"]["0"]
    ours = percentiles(pooled, 0, (0.5, 99.5))
    assert ours == pytest.approx([-2.5, 2.5], abs=0.01)
    assert all(holds(between["percentile_00_5"], value) for value in (-5.0, ours[0], 0.0))
    assert all(holds(between["percentile_99_5"], value) for value in (0.0, ours[1], 5.0))


def test_a_constant_channel_does_not_move() -> None:
    record = plan_tolerance(site_fingerprint(statistics_of([7.25] * 5, [7.25] * 9), 1))
    assert record["percentiles_can_move"] == []


def test_a_fingerprint_that_does_not_say_what_was_cut_leaves_the_percentiles_open() -> None:
    """From a site of an older version: a study that was under way when the orchestrator was changed."""
    new = fingerprint_of(three_sites(3)["b"])
    message = json.loads(fingerprint_of(three_sites(3)["a"]).model_dump_json())
    del message["channels"][0]["cut"]
    old = SiteFingerprint.model_validate_json(json.dumps(message))
    assert merge([new, new]).channels[0].cut == 2 * (new.channels[0].cut or 0) > 0
    record = plan_tolerance(merge([new, old]))
    assert record["intensity_cut"] == {"0": None}
    assert record["intensity_between"]["0"]["percentile_00_5"][0] is None
    assert record["intensity_between"]["0"]["percentile_99_5"][1] is None
    assert record["percentiles_can_move"] == ["0"]


def of_sizes(sizes: list[float], min_cases: int = 1) -> SiteFingerprint:
    foreground = (channel_statistics(np.array([1, 2, 3, 4], np.float32)),)
    cases = [CaseStatistics((1.0, 1.0, 1.0), (9, 9, 9), size, foreground) for size in sizes]
    return site_fingerprint(cases, min_cases)


def test_with_k_cases_no_end_of_a_group_or_a_piece_is_the_value_of_one_case() -> None:
    """Of two cases in a group its first and last cell were both sizes; a histogram's end was one patient's voxel."""
    told = of_sizes([0.3, 0.5], 2).relative_sizes
    assert told == of_sizes([0.27, 0.51], 2).relative_sizes == of_sizes([0.31, 0.55], 2).relative_sizes
    assert [(size.start, size.cells, size.count) for size in told] == [(256, 320, 2)]
    assert [(size.start, size.cells) for size in of_sizes([0.3, 0.3, 1.0, 1.0], 2).relative_sizes] == [
        (307, 1),
        (1024, 1),
    ]
    random = np.random.default_rng(0)
    cases = [random.normal(mean, 100, 3000) for mean in (0, 40, 80, 120, 160, 200)]
    for min_cases in (2, 3, 5):
        statistics = SiteStatistics(1, min_cases)
        for case in cases:
            statistics.add(CaseStatistics((1.0, 1.0, 1.0), (9, 9, 9), 1.0, (channel_statistics(case),)))
        (grid,) = site_fingerprint(statistics, min_cases).channels[0].histogram
        lowest = min(float(np.partition(case, 1)[1]) for case in cases)
        assert grid.start[0] < math.floor(math.ldexp(lowest, -grid.exponent))
        wide = [(start, cells) for start, cells in zip(grid.start, grid.cells, strict=True) if cells > 1]
        assert wide
        assert all(start % 4 == 0 == cells % 4 for start, cells in wide)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.one_of(st.floats(0.01, 1), st.floats(0.74, 0.76)), min_size=3, max_size=20), min_size=1),
    st.integers(1, 3),
)
def test_a_nonzero_mask_that_turns_is_in_the_record(sites: list[list[float]], min_cases: int) -> None:
    pooled = merge([of_sizes(sizes, min_cases) for sizes in sites])
    record, truth = plan_tolerance(pooled), float(np.median(list(itertools.chain(*sites))))
    ours = to_nnunet(pooled)["median_relative_size_after_cropping"]
    assert abs(truth - ours) <= record["median_relative_size_moves_at_most"] + 1e-12
    assert record["nonzero_mask_decision_can_turn"] or (truth < 0.75) == (ours < 0.75)


@pytest.mark.parametrize(
    ("sizes", "min_cases", "turns"),
    [
        ([0.7499, 0.7504], 1, True),  # 0.75015, and 0.7495 by the cells
        ([0.62, 0.64, 0.66, 0.68, 0.72, 0.74, 0.78, 0.98, 0.99, 1.0], 5, True),  # 0.73, and 0.77 by the groups
        ([0.1, 0.2, 0.3, 0.4, 0.69, *[1.0] * 15], 5, False),  # no group near the median is wide
        ([0.75, 0.75], 1, False),  # the lower edge of its cell
        ([0.7499, 0.7499], 1, False),  # all of its cell lies below
    ],
)
def test_the_nonzero_mask_can_turn_where_the_median_lies_about_three_quarters(
    sizes: list[float], min_cases: int, turns: bool
) -> None:
    assert plan_tolerance(of_sizes(sizes, min_cases))["nonzero_mask_decision_can_turn"] is turns


def test_the_record_of_an_exact_fingerprint_says_that_nothing_moves() -> None:
    record = plan_tolerance(merge([fingerprint_of(cases) for cases in three_sites(3).values()]))
    assert record["exact_geometry"]
    assert record["median_spacing_moves_at_most"] == record["median_shape_moves_at_most"] == [0.0, 0.0, 0.0]
    assert not record["nonzero_mask_decision_can_turn"]
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("min_cases", [7, 100])
def test_a_site_with_fewer_than_k_cases_sends_nothing(min_cases: int) -> None:
    with pytest.raises(FednnunetError) as error:
        fingerprint_of(three_sites(6)["a"], min_cases)
    assert error.value.code is Code.TOO_FEW_CASES_TO_SHARE


def test_fewer_than_k_cases_with_foreground_send_nothing() -> None:
    cases = three_sites(6)["a"]
    empty = [(images, np.zeros_like(label), spacing) for images, label, spacing in cases[1:]]
    with pytest.raises(FednnunetError) as error:
        fingerprint_of([cases[0], *empty], 3)
    assert error.value.code is Code.TOO_FEW_CASES_TO_SHARE


def test_cases_without_foreground_count_for_geometry_alone() -> None:
    cases = three_sites(3)["a"]
    without = [*cases, (cases[0][0], np.zeros_like(cases[0][1]), (9.0, 9.0, 9.0))]
    pooled = fingerprint_of(without)
    assert (pooled.n_cases, pooled.n_cases_with_foreground) == (4, 3)
    assert moments(pooled, 0) == moments(fingerprint_of(cases), 0)
    only = fingerprint_of(without[3:])
    with pytest.raises(FednnunetError) as error:
        to_nnunet(only)
    assert error.value.code is Code.NO_FOREGROUND


def test_cached_statistics_give_the_same_fingerprint() -> None:
    statistics = SiteStatistics(1, 3)
    for case in three_sites(8)["b"]:
        statistics.add(case_statistics(*case))
    restored = SiteStatistics.from_json(json.loads(json.dumps(statistics.to_json())))
    for min_cases in (1, 2, 3):
        assert site_fingerprint(restored, min_cases) == site_fingerprint(statistics, min_cases)


# a hostile peer


def altered(change: Any) -> str:
    message = json.loads(fingerprint_of(three_sites(3)["a"]).model_dump_json())
    change(message)
    return json.dumps(message)


def set_at(*path: Any, to: Any) -> Any:
    def change(message: Any) -> None:
        for key in path[:-1]:
            message = message[key]
        message[path[-1]] = to

    return change


HOSTILE = {
    "unknown field": set_at("note", to="x"),
    "no cases": set_at("n_cases", to=0),
    "more cases than counted": set_at("n_cases", to=4),
    "absurd number of cases": set_at("n_cases", to=10**30),
    "more with foreground than there are": set_at("n_cases_with_foreground", to=4),
    "k above n": set_at("min_cases", to=9),
    "negative count": set_at("geometry", 0, "count", to=-1),
    "spacing not a number": set_at("geometry", 0, "spacing", 0, to=float("nan")),
    "spacing infinite": set_at("geometry", 0, "spacing", 0, to=float("inf")),
    "spacing zero": set_at("geometry", 0, "spacing", 0, to=0.0),
    "shape absurd": set_at("geometry", 0, "shape", 0, to=1e300),
    "no geometry": set_at("geometry", to=[]),
    "relative size beyond 1": set_at("relative_sizes", 0, "start", to=2000),
    "exponent absurd": set_at("channels", 0, "histogram", 0, "exponent", to=10**9),
    "exponent puts pieces beyond float32": set_at("channels", 0, "histogram", 0, "exponent", to=120),
    "start absurd": set_at("channels", 0, "histogram", 0, "start", 0, to=-(10**40)),
    "cells zero": set_at("channels", 0, "histogram", 0, "cells", 0, to=0),
    "mass negative": set_at("channels", 0, "histogram", 0, "mass", 0, to=-5),
    "mass does not add up": set_at("channels", 0, "histogram", 0, "mass", 0, to=5),
    "columns of other lengths": set_at("channels", 0, "histogram", 0, "start", to=[1]),
    "pieces not sorted": lambda message: message["channels"][0]["histogram"][0]["start"].reverse(),
    "grid twice": lambda message: message["channels"][0]["histogram"].append(message["channels"][0]["histogram"][0]),
    "no channels": set_at("channels", to=[]),
    "endless number": set_at("channels", 0, "sum_of_means", to="1" * 5000 + "/2^0"),
    "absurd power": set_at("channels", 0, "sum_of_means", to="1/2^999999999"),
    "power out of range": set_at("channels", 0, "sum_of_means", to="1/2^900"),
    "other spelling": set_at("channels", 0, "sum_of_means", to="2/2^1"),
    "ordinary fraction": set_at("channels", 0, "sum_of_means", to="1/3"),
    "cut negative": set_at("channels", 0, "cut", to=-1),
    "cut absurd": set_at("channels", 0, "cut", to=10**40),
    "cut more than half": set_at("channels", 0, "cut", to=3 * MASS // 2 + 1),
    "moments no image can have": set_at("channels", 0, "sum_of_squares", to="0/2^0"),
    "moments beyond float32": set_at("channels", 0, "sum_of_squares", to="1" * 210 + "/2^0"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_fingerprint_is_refused(change: Any) -> None:
    with pytest.raises(ValidationError):
        SiteFingerprint.model_validate_json(altered(change))


@pytest.mark.parametrize("what", ["cases", "groups", "pieces"])
def test_what_one_site_may_send_is_bounded_and_the_sum_of_many_is_not(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = fingerprint_of(three_sites(5)["a"])
    numbers = {
        "cases": honest.n_cases,
        "groups": len(honest.geometry),
        "pieces": max(channel.pieces for channel in honest.channels),
    }
    limit = f"federation.fingerprint.MAX_SITE_{what.upper()}"
    monkeypatch.setattr(limit, numbers[what])
    check(honest, 1, 1)
    monkeypatch.setattr(limit, numbers[what] - 1)
    with pytest.raises(FednnunetError) as error:
        check(honest, 1, 1)
    assert error.value.code is Code.RESULT_REFUSED


def test_fingerprints_of_the_largest_sites_can_be_merged() -> None:
    def change(message: Any) -> None:
        message.update(n_cases=MAX_SITE_CASES, n_cases_with_foreground=0)
        for part in ("geometry", "relative_sizes"):
            message[part] = [{**message[part][0], "count": MAX_SITE_CASES}]
        message["channels"][0].update(sum_of_means="0/2^0", sum_of_squares="0/2^0", histogram=[], cut=0)

    largest = SiteFingerprint.model_validate_json(altered(change))
    check(largest, 1, 1)
    pooled = merge([largest, largest, fingerprint_of(three_sites(3)["b"])])
    assert pooled.n_cases > 2 * MAX_SITE_CASES
    assert merge([pooled] * 500).n_cases == 500 * pooled.n_cases


def test_a_fingerprint_survives_the_wire() -> None:
    fingerprint = merge([fingerprint_of(cases) for cases in three_sites(3).values()])
    assert SiteFingerprint.model_validate_json(fingerprint.model_dump_json()) == fingerprint


@pytest.mark.parametrize(("channels", "min_cases"), [(2, 1), (1, 4)])
def test_an_answer_to_another_question_is_refused(channels: int, min_cases: int) -> None:
    fingerprint = fingerprint_of(three_sites(5)["a"])
    check(fingerprint, 1, 1)
    with pytest.raises(FednnunetError) as error:
        check(fingerprint, channels, min_cases)
    assert error.value.code is Code.RESULT_REFUSED


def test_a_channel_that_is_0_everywhere_takes_nothing_from_the_others() -> None:
    """A modality that one site lacks and has filled with zeros, beside values around 0 elsewhere (z-scores)."""
    numbers = np.random.default_rng(0)
    values = [numbers.normal(0, 20, 5000).astype(np.float32).tolist() for _ in range(20)]
    zeros = [[0.0] * 5000] * 5
    pooled = merge([site_fingerprint(statistics_of(*values), 1), site_fingerprint(statistics_of(*zeros), 1)])
    q = (0.5, 10, 30, 50, 80, 99.5)
    truth = np.percentile(np.concatenate([np.concatenate(values), np.concatenate(zeros)]), q)
    np.testing.assert_allclose(percentiles(pooled, 0, q), truth, atol=0.1)
