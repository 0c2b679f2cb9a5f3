"""Parts of reports that both sides write: a plan in short, intensities beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from federation.report.figures import distributions
from federation.report.page import Facts, Figure, Table

PROPERTIES = ("mean", "std", "percentile_00_5", "median", "percentile_99_5")


def plan_facts(plans: Mapping[str, Any], configuration: str) -> Facts:
    """What people ask about a plan."""
    given = plans["configurations"]
    own = dict(given[configuration])
    while (parent := own.get("inherits_from")) is not None:
        own = {**given[parent], **{key: value for key, value in own.items() if key != "inherits_from"}}
        if given[parent].get("inherits_from") is not None:
            own["inherits_from"] = given[parent]["inherits_from"]
    kwargs = own["architecture"]["arch_kwargs"]
    return Facts(
        [
            ("plans", str(plans["plans_name"])),
            ("network", own["architecture"]["network_class_name"].rpartition(".")[2]),
            ("patch size, voxels", by_axis(own["patch_size"])),
            ("batch size", str(own["batch_size"])),
            ("spacing, mm", by_axis(own["spacing"])),
            ("stages", str(kwargs["n_stages"])),
            ("features", ", ".join(map(str, kwargs["features_per_stage"]))),
            ("normalization", ", ".join(own["normalization_schemes"])),
        ]
    )


def intensities(datasets: Mapping[str, Mapping[str, Mapping[str, float]]], whose: str) -> Figure:
    """Foreground intensities of one or more datasets.

    Parameters
    ----------
    datasets : Mapping
        By name of the dataset: nnU-Net's `foreground_intensity_properties_per_channel`.
    whose : str
        Ends the caption's first words: "over all sites".
    """
    channels = list(next(iter(datasets.values())))
    panels = {f"channel {name}": {who: told[name] for who, told in datasets.items()} for name in channels}
    rows = [
        [f"{channel}, {who}" if len(datasets) > 1 else channel, *(f"{one[key]:.5g}" for key in PROPERTIES)]
        for channel, entries in panels.items()
        for who, one in entries.items()
    ]
    caption = (
        f"Foreground intensities {whose}: line from the 0.5th to the 99.5th percentile, band one standard deviation "
        "around the mean (dot), tick at the median."
    )
    return Figure(distributions(panels), caption, Table(["", "mean", "std", "0.5 %", "median", "99.5 %"], rows))


def medians(values: Sequence[Sequence[float]]) -> list[float]:
    """Median of each axis."""
    columns = [sorted(column) for column in zip(*values, strict=True)]
    return [(column[(len(column) - 1) // 2] + column[len(column) // 2]) / 2 for column in columns]


def by_axis(values: Sequence[float]) -> str:
    """`128 x 128 x 96`."""
    return " x ".join(f"{value:g}" for value in values)
