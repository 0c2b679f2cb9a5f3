"""Where the plan may differ from that of the same data in one place, in words for people.

Rules:

- From the record of federation.fingerprint.plan_tolerance alone, as the journal holds it; of a record that an older
  version has written only what it says.
- A number that nothing in the study reads is no doubt: nnU-Net clips at the percentiles of CT alone, and uses the
  nonzero mask for z-scores alone.
"""

from __future__ import annotations

from typing import Any

from federation.fingerprint import NONZERO_MASK_BELOW
from federation.study import Study

NO_Z_SCORE = ("ct", "nonorm", "rescale_to_0_1", "rgb_to_0_1")
"""Channel names that nnU-Net normalises otherwise than by z-scores; each other name it does not know is z-scored."""


def doubts(study: Study, tolerance: dict[str, Any]) -> list[str]:
    """What a person should know before the plan is relied on.

    Parameters
    ----------
    study : Study
        Its channel names say how nnU-Net normalises.
    tolerance : dict
        The record.
    """
    names = {index: name.casefold() for index, name in study.channel_names.items()}  # as nnU-Net compares them
    found = [_clipping(index, tolerance) for index in tolerance.get("percentiles_can_move", ()) if names[index] == "ct"]
    z_scored = [index for index, name in names.items() if name not in NO_Z_SCORE]
    if tolerance.get("nonzero_mask_decision_can_turn") and z_scored:
        found.append(_mask([f"{index} ({study.channel_names[index]})" for index in z_scored], tolerance))
    return found


def _mask(channels: list[str], tolerance: dict[str, Any]) -> str:
    relative, off = tolerance["median_relative_size"], tolerance["median_relative_size_moves_at_most"]
    within = relative < NONZERO_MASK_BELOW
    return (
        f"the nonzero mask may be used otherwise than with the same data in one place: the median size after cropping "
        f"is {relative:.4f} of that before, known to within {off:.4f}, and below {NONZERO_MASK_BELOW} nnU-Net "
        f"normalises within the nonzero voxels alone. Here it {'does' if within else 'does not'}; there it "
        f"{'may not' if within else 'may'}. It is so for channel{'s' * (len(channels) > 1)} {', '.join(channels)}."
    )


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
