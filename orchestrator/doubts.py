"""Where the plan may differ from that of the same data in one place, in words for people.

Rules:

- From the record of federation.fingerprint.plan_tolerance alone, as the journal holds it; of a record that an older
  version has written only what it says.
- A number that nothing in the study reads is no doubt: nnU-Net clips at the percentiles of CT alone.
"""

from __future__ import annotations

from typing import Any

from federation.study import Study


def doubts(study: Study, tolerance: dict[str, Any]) -> list[str]:
    """What a person should know before the plan is relied on.

    Parameters
    ----------
    study : Study
        Its channel names say how nnU-Net normalises.
    tolerance : dict
        The record.
    """
    return [
        _clipping(index, tolerance)
        for index in tolerance.get("percentiles_can_move", ())
        if study.channel_names[index].casefold() == "ct"  # as get_normalization_scheme of nnU-Net compares
    ]


def _clipping(index: str, tolerance: dict[str, Any]) -> str:
    found, between = tolerance["intensity"][index], tolerance["intensity_between"][index]
    cut, k = tolerance["intensity_cut"][index], tolerance["min_cases"]
    ends = " and ".join(
        f"{found[name]:.4g} ({_between(*between[name])})" for name in ("percentile_00_5", "percentile_99_5")
    )
    share = "an unknown share" if cut is None else f"up to {cut:.2%} of all"
    grouped = f", and nothing finer than {k} cases leaves a site" if k > 1 else ""
    return (
        f"channel {index} (CT) may be clipped elsewhere than with the same data in one place: at percentiles 0.5 and "
        f"99.5 of the foreground, here {ends}. So that no extreme leaves a site, of the foreground of each case "
        f"the outermost voxels, {share} at either end, are counted at their neighbours{grouped}. In small structures "
        "that moves these percentiles."
    )


def _between(low: float | None, high: float | None) -> str:
    if low is None:
        return "there anything" if high is None else f"there anything up to {high:.4g}"
    return f"there {low:.4g} or more" if high is None else f"there {low:.4g} to {high:.4g}"
