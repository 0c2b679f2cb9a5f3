"""The orchestrator's report of a study: what its journal and its folder hold, as one HTML file for people.

Rules:

- Nothing is in it that the orchestrator does not know anyway: sums, counts and names of sites. No case, no picture.
- It can be written at any time, also of a study that runs or has failed; the same journal gives the same bytes.
- What went badly comes first: the worst sites, the rounds without somebody, the refused answers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from federation import files
from federation.fingerprint import SiteFingerprint, to_nnunet
from federation.readable import clock, number, size, timestamp
from federation.report.figures import Curves, Score, bars, curves, participation, scores
from federation.report.page import Facts, Figure, Folded, Page, Section, Table, Text, render
from federation.report.parts import by_axis, intensities, medians, plan_facts
from federation.tasks import LabelScore, Validation
from orchestrator.history import REPORT, History, load

MOST_ROWS = 400
CURVES = {
    "train_loss": "training loss",
    "mean_dice": "pseudo-Dice (nnU-Net's online validation)",
    "learning_rate": "learning rate",
}


def write(folder: Path, output: Path | None = None) -> Path:
    """Write the report of the study in a folder; returns the file.

    Parameters
    ----------
    folder : Path
        The study's folder at the orchestrator.
    output : Path, optional
        The file; `report.html` in the folder.
    """
    target = output or folder / REPORT
    files.write_bytes(target, render(report(load(folder), folder)).encode())
    return target


def report(history: History, folder: Path) -> Page:
    """The report as data."""
    study = history.study
    sections = [
        Section("In short", _short(history)),
        Section("How good the model is, by site", _scores(history)),
        Section("Did it help each site?", _comparisons(history)),
        Section("Training", _curves(history)),
        Section("Who took part", _participation(history)),
        Section("Warnings", _warnings(history)),
        Section("The data, pooled", _fingerprint(folder)),
        Section("The plan", _plan(history, folder)),
        Section("Time and bytes", _costs(history)),
        Section("Versions, hashes, settings", _record(history, folder)),
    ]
    return Page(
        title=f"Study {study.name}",
        subtitle=f"{study.dataset}, {study.configuration}, fold {study.fold}, {len(study.sites)} sites, id {study.id}",
        sections=[section for section in sections if section.parts],
        foot="Written by the orchestrator from the study's journal. It holds sums, counts and names of sites; no case "
        "and no patient is known here. Research software: not a medical device, not for diagnosis.",
    )


def _short(history: History) -> list[Any]:
    study = history.study
    parts: list[Any] = []
    match history.ended:
        case "done":
            parts.append(Text(f"Done: {history.done_rounds} rounds over {len(study.sites)} sites.", "good"))
        case "failed":
            parts.append(Text(f"Failed: {history.reason}", "bad"))
            parts.append(Text(f"What to do: {history.advice}"))
        case "stopped":
            parts.append(Text(f"Stopped by {history.stopped_by} after {history.done_rounds} rounds.", "warn"))
        case _:
            parts.append(
                Text(f"Under way: {history.phase}, round {history.done_rounds} of {history.all_rounds}.", "warn")
            )
    incomplete = [one for one in history.rounds if one.missing]
    if incomplete:
        parts.append(Text(f"{len(incomplete)} of {len(history.rounds)} rounds went on without some site.", "warn"))
    parts += [Text(one.text, "warn") for one in history.left_out]
    refused = sum(sum(site.refused.values()) for site in history.sites.values())
    if refused:
        parts.append(Text(f"Answers refused, which lie in quarantine: {refused}.", "warn"))
    cases = {name: max(site.cases.values()) for name, site in history.sites.items() if site.cases}
    facts = [
        ("began", timestamp(history.began)),
        ("last line", timestamp(history.last)),
        ("training cases", ", ".join(f"{name} {count}" for name, count in cases.items()) or "-"),
        ("method", f"{study.mode}, {study.aggregation.method}"),
        ("rounds", f"{history.done_rounds} of {history.all_rounds}"),
        ("epochs in a round", str(study.epochs_per_round)),
    ]
    if history.exported is not None:
        facts.append(("exported", f"{history.exported['path']} ({size(history.exported['nbytes'])})"))
        facts.append(("its SHA-256", history.exported["sha256"]))
    return [*parts, Facts(facts)]


def _scores(history: History) -> list[Any]:
    study = history.study
    parts: list[Any] = []
    judged = "The global model" if study.one_model else "Each site's own model"
    for fold in study.folds:
        told = {
            name: Validation.model_validate(site.scores[fold])
            for name, site in history.sites.items()
            if fold in site.scores
        }
        for kind, what in (("test", "cases of imagesTs"), ("validation", f"held-out training cases of fold {fold}")):
            entries = {name: getattr(value, kind) for name, value in told.items() if getattr(value, f"{kind}_cases")}
            if entries:
                parts.append(_score_figure(f"{judged} on each site's {what}", entries))
    if parts:
        parts.insert(
            0,
            Text(
                "The worst sites come first. Dots are means, bars standard deviations over cases, ticks the "
                "worst case. A mean over few cases says little; the sites' own reports say more."
            ),
        )
    return parts


def _score_figure(caption: str, entries: Mapping[str, Mapping[str, LabelScore]]) -> Figure:
    """Dice by site and label; `cases` are those that the mean is over: where the label occurs or was predicted."""
    labels = list(dict.fromkeys(label for value in entries.values() for label in value))
    by_label: dict[str, list[Score]] = {}
    rows = []
    for label in labels:
        told = {name: value[label] for name, value in entries.items() if label in value}
        known = [
            Score(name, score.mean, score.std or 0.0, score.minimum)
            for name, score in told.items()
            if score.mean is not None
        ]
        known.sort(key=lambda score: (score.mean, score.name))
        if known:
            by_label[label] = known
        for score in known:
            cases = told[score.name].cases
            spread = number(score.std) if cases > 1 else "-"
            rows.append([score.name, label, str(cases), number(score.mean), spread, number(score.minimum)])
    table = Table(["site", "label", "cases", "mean Dice", "std", "worst case"], rows, words=(1,))
    return Figure(scores(by_label) if by_label else "", f"{caption}: Dice.", table)


def _comparisons(history: History) -> list[Any]:
    """Each site's own training beside the global model and the personalised one: means, as the sites told them."""
    parts: list[Any] = []
    rows, worse = [], []
    for fold in history.study.folds:
        for name, site in history.sites.items():
            if fold not in site.comparisons or fold not in site.scores:
                continue
            told = {
                "local": Validation.model_validate(site.comparisons[fold]["local"]),
                "federated": Validation.model_validate(site.scores[fold]),
                "personalised": Validation.model_validate(site.comparisons[fold]["personalised"]),
            }
            kind = "test" if told["federated"].test_cases else "validation"
            for label in getattr(told["federated"], kind):
                scores_of = {model: getattr(value, kind).get(label) for model, value in told.items()}
                means = {model: score.mean if score else None for model, score in scores_of.items()}
                local, federated = means["local"], means["federated"]
                difference = None if local is None or federated is None else federated - local
                if difference is not None and difference < 0:
                    worse.append(f"{label} at {name}")
                shown = "-" if difference is None else f"{difference:+.3f}"
                rows.append([name, label, fold, *(number(value) for value in means.values()), shown])
    if not rows:
        return []
    if worse:
        told_worse = f"The federated model has a lower mean Dice than the site's own training for: {', '.join(worse)}."
        parts.append(Text(told_worse, "bad"))
    else:
        parts.append(
            Text("Nowhere is the federated model's mean Dice lower than that of a site's own training.", "good")
        )
    rows.sort(key=lambda row: (float(row[-1]) if row[-1] != "-" else 0.0, row[0]))
    header = ["site", "label", "fold", "local", "federated", "personalised", "federated - local"]
    parts.append(Table(header, rows, words=(1, 2)))
    parts.append(
        Text(
            "Means over each site's held-out cases, as nnU-Net takes them: a case without the label counts for the "
            "models that predicted it there, and not for the others. Whether a difference is more than chance, over "
            "the same cases for all three, the site's own report says, which has the single cases."
        )
    )
    return parts


def _curves(history: History) -> list[Any]:
    parts: list[Any] = []
    for fold in dict.fromkeys(one.fold for one in history.rounds):
        panels = []
        for name, title in CURVES.items():
            sites = {
                site: [
                    (epoch.epoch, value)
                    for epoch in told.epochs
                    if epoch.fold == fold and (value := getattr(epoch, name)) is not None
                ]
                for site, told in history.sites.items()
            }
            panels.append(Curves(title, sites, history.pooled_curve(fold, name), name == "train_loss"))
        header = ["epoch", *(f"{title}" for title in ("training loss", "pseudo-Dice", "learning rate"))]
        columns = [dict(panel.pooled) for panel in panels]
        epochs = sorted(set().union(*columns))
        step = max(1, -(-len(epochs) // MOST_ROWS))
        rows = [
            [
                str(epoch),
                number(columns[0].get(epoch)),
                number(columns[1].get(epoch)),
                f"{columns[2].get(epoch, 0):.2e}",
            ]
            for epoch in epochs[::step]
        ]
        parts.append(Figure(curves(panels), f"Fold {fold}: every site and the mean over sites.", Table(header, rows)))
    return parts


def _participation(history: History) -> list[Any]:
    if not history.rounds:
        return []
    several = len(history.study.folds) > 1
    names = [f"round {one.round}" + (f" of fold {one.fold}" if several else "") for one in history.rounds]
    missed = [
        [site, names[place], timestamp(one.at), why]
        for place, one in enumerate(history.rounds)
        for site, why in one.missing.items()
    ]
    drawn = participation(list(history.sites), [one.missing for one in history.rounds], names)
    table = Table(["site", "round", "closed", "why it was missing"], missed[:MOST_ROWS], words=(1, 2, 3))
    caption = "Sites and rounds: filled where a site took part, red where the round went on without it."
    parts: list[Any] = [Figure(drawn, caption, table if missed else None)]
    if not missed:
        parts.append(Text("Every site took part in every round.", "good"))
    return parts


def _warnings(history: History) -> list[Any]:
    if not history.warnings:
        return []
    rows = [[timestamp(one.at), one.site or "orchestrator", one.text] for one in reversed(history.warnings)]
    return [Table(["when", "where", "what"], rows, words=(1, 2))]


def _fingerprint(folder: Path) -> list[Any]:
    path = folder / "fingerprint.json"
    if not path.exists():
        return []
    pooled = SiteFingerprint.model_validate_json(path.read_bytes())
    told = to_nnunet(pooled)
    channels = {"all sites": told["foreground_intensity_properties_per_channel"]}
    return [
        Facts(
            [
                ("training cases", str(pooled.n_cases)),
                ("cases with foreground", str(pooled.n_cases_with_foreground)),
                ("median spacing, mm", by_axis(medians(told["spacings"]))),
                ("median shape, voxels", by_axis(medians(told["shapes_after_crop"]))),
            ]
        ),
        intensities(channels, "over all sites"),
        Text("Only the pooled figures are known here; each site's report compares them with its own."),
    ]


def _plan(history: History, folder: Path) -> list[Any]:
    path = folder / "plan.json"
    if path.exists():
        return [plan_facts(json.loads(path.read_bytes())["plans"], history.study.configuration)]
    if history.layers is None:
        return []
    rows = [[site, str(shared), str(total)] for site, (shared, total) in history.layers["shared"].items()]
    return [
        Text("Each site has a plan of its own; what they share is averaged."),
        Table(["site", "parameters shared", "of"], rows),
    ]


def _costs(history: History) -> list[Any]:
    spent = history.spent()
    table = Table(["phase", "time"], [[phase, clock(seconds)] for phase, seconds in spent.items()])
    parts: list[Any] = []
    if spent:
        parts.append(
            Figure(bars({"study": spent}, "seconds"), "Where the study's time went, while a coordinator ran.", table)
        )
    work = {name: site.seconds for name, site in history.sites.items() if site.seconds}
    if work:
        exchange, aggregate = sum(one.seconds for one in history.rounds), sum(history.aggregation)
        names = list(dict.fromkeys(part for row in work.values() for part in row))
        rows = [[name, *(f"{row.get(part, 0.0):.1f}" for part in names)] for name, row in work.items()]
        caption = (
            f"Seconds of work at each site over all rounds. The rounds took {exchange:.1f} s from question to last "
            f"answer, aggregation {aggregate:.1f} s more: what a bar lacks is transfer and waiting for the others."
        )
        parts.append(Figure(bars(work, "seconds"), caption, Table(["site", *names], rows)))
    traffic = [[name, size(site.sent), size(site.received)] for name, site in history.sites.items()]
    return [*parts, Table(["site", "bytes to it", "bytes from it"], traffic)]


def _record(history: History, folder: Path) -> list[Any]:
    study = history.study
    versions: dict[str, dict[str, str]] = {}
    for path in sorted((folder / "answers" / "describe").glob("*.json")):
        versions[path.stem] = json.loads(path.read_bytes())["description"]["versions"]
    names = list(dict.fromkeys(name for one in versions.values() for name in one))
    parts: list[Any] = []
    if versions:
        rows = [[site, *(one.get(name, "-")[:16] for name in names)] for site, one in versions.items()]
        parts.append(Table(["site", *names], rows, words=range(1, len(names) + 1)))
    facts = [("study", study.id), ("plans", history.plans_sha256 or "-")]
    facts += [(f"weights, fold {fold}, round {done}", digest) for fold, (done, digest) in history.weights.items()]
    facts += [("lines of the journal", str(history.lines)), ("starts of the study", str(history.starts))]
    settings = [[name, json.dumps(value, ensure_ascii=False)] for name, value in study.model_dump(mode="json").items()]
    return [*parts, Facts(facts), Folded("Every setting", [Table(["setting", "value"], settings, words=(1,))])]


if __name__ == "__main__":  # a process of its own, since matplotlib is large
    write(Path(sys.argv[1]))
