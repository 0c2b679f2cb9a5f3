"""A study in plain words, for the person at the hospital who has to approve it."""

from __future__ import annotations

from federation.study import Study

_RULES = {
    "mean": "their mean",
    "median": "their median, number by number",
    "trimmed_mean": "their mean without the extremes",
    "krum": "the one update that is nearest to the others",
    "multi_krum": "the mean of the updates that are nearest to the others",
}


def in_plain_words(study: Study, site: str) -> str:
    """What a study asks of a site, and what leaves it, in a few paragraphs.

    Parameters
    ----------
    study : Study
        The study.
    site : str
        This site's name.
    """
    others = [name for name in study.sites if name != site]
    channels = ", ".join(study.channel_names.values())
    labels = ", ".join(sorted(name for name in study.labels if name not in ("background", "ignore")))
    lines = [
        f"Study {study.name}",
        f"  id {study.id}",
        "",
        "What it is",
        f"  It trains a network (nnU-Net, {study.configuration}, {study.trainer}) that finds: {labels}.",
        f"  Images: {channels}, files {study.file_ending}. Dataset {study.dataset}.",
        f"  Takes part: {site} (here)" + (f", with {', '.join(others)}." if others else ", alone."),
        "",
        "What it asks of this hospital",
        *(_training(study) if study.stop_after == "finish" else ["  No training."]),
        "",
        "What leaves this hospital, to the orchestrator alone",
        "  The number of training and test cases, numbers of warnings about files.",
        "  Versions of packages, kind of device, how long a task took.",
        "  Where a task fails or is refused, the number of the error.",
    ]
    if study.stop_after == "describe":
        return "\n".join([*lines, "  Nothing else: the study ends after describe."])
    if study.mode == "ffe":
        groups = study.fingerprint_min_cases
        lines.append(
            "  A fingerprint: spacing and shape of the images, sums and histograms of intensities"
            + (f", nothing finer than {groups} cases." if groups > 1 else "; spacing and shape of each case, no name.")
        )
    else:
        lines.append(
            "  The network that fits this site's images: layers, target spacing, patch, batch size. No fingerprint."
        )
    if study.stop_after != "finish":
        return "\n".join([*lines, f"  Nothing else: the study ends after {study.stop_after}."])
    kept = f", without the layers {', '.join(study.keep_local)}" if study.keep_local else ""
    if study.mode == "asymfedavg":
        kept += ", of the layers that, as the orchestrator says, other sites have too"
    lines += [
        f"  In each round the network's weights{kept}, "
        + {"full": "float32", "half": "as float16 differences", "int8": "as differences in 8 bits"}[study.wire]
        + "; losses and online Dice of each epoch.",
        "  After the last round: Dice of each label (mean, deviation, minimum, number of cases)"
        + (
            " of the model, of this site's own training alone, and of the personalised model (the model, trained on "
            "here). No weights of these two trainings leave."
            if study.compare == "local"
            else "."
        ),
        "  No image, no label, no case's name, no prediction.",
        "",
        "What comes back",
        "  The sites' updates are put together as "
        + _RULES.get(study.aggregation.method, f"a step of {study.aggregation.method} along their mean")
        + ".",
        "  This hospital gets the finished model"
        + ("." if study.one_model else ": the shared layers, and its own.")
        + " Other hospitals get the shared weights, too: they are computed from all sites' patients.",
        *_seen_by_others(study),
    ]
    return "\n".join(lines)


def _training(study: Study) -> list[str]:
    rounds = study.rounds * len(study.folds)
    steps = rounds * study.epochs_per_round * study.iterations_per_epoch
    lines = [
        f"  {rounds} rounds of training, {steps} steps in all, on this site's own images"
        + (f" ({study.rounds} rounds for each of {len(study.folds)} folds)." if len(study.folds) > 1 else "."),
    ]
    if study.compare == "local":
        on = study.personalise_epochs
        lines.append(f"  The same training again on its images alone, then {on} epochs on from the model.")
    lines.append(
        f"  A round may take up to {_time(study.round_deadline)}; then the others go on without it"
        + (" (all sites are needed)." if study.quorum is None else f" ({study.quorum} sites are enough).")
    )
    return lines


def _seen_by_others(study: Study) -> list[str]:
    """Where the shared weights are one site's, or tell one site's to another."""
    lines = []
    if study.aggregation.method == "krum":
        lines.append("  They are one hospital's weights in each round, perhaps this one's.")
    if len(study.sites) > 1 and (study.needed <= 2 or (study.mode == "asymfedavg" and study.layers == "groups")):
        lines.append("  Where they come from two hospitals alone, each of the two can compute the other's.")
    return lines


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} seconds"
