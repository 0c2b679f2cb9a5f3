"""A site's own report of a study: what its patients get from the federation. It stays at the site.

Rules:

- It names cases and shows pictures, so it is written below the worker's folder, is sent nowhere, and says so.
- It can be written at any time from what lies at the site: the spool's answers, nnU-Net's own files, the dataset.
- The worst cases come first.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from appliance.spool import Spool
from appliance.worker import comparison, dataset
from appliance.worker.contents import Case
from appliance.worker.workspace import Workspace
from federation import files, native, tasks
from federation.errors import Code, FednnunetError
from federation.readable import number, size
from federation.report.figures import Curves, Score, bars, curves, overlay, scores
from federation.report.page import Facts, Figure, Folded, Page, Picture, Section, Table, Text, render
from federation.report.parts import by_axis, intensities, medians, plan_facts
from federation.study import Study

FILE = "report.html"
WORST = 6
MOST_CASES = 200
FEDERATED = "federated"
MODELS = (comparison.LOCAL, FEDERATED, comparison.PERSONALISED)
ALIKE = 6
"""So many equal differences decide: the least number for which a two-sided sign test has p < 0.05."""
CURVES = {"train_loss": "training loss", "val_loss": "validation loss", "pseudo_dice": "pseudo-Dice"}


@dataclass(frozen=True)
class CaseScore:
    """One case of one model.

    Attributes
    ----------
    name : str
        The case.
    dice : dict
        Dice by label; None where the label neither occurs nor was predicted.
    present, predicted : dict
        Whether the reference has the label, and whether the prediction has it.
    prediction, reference : Path
        Its files.
    """

    name: str
    dice: dict[str, float | None]
    present: dict[str, bool]
    predicted: dict[str, bool]
    prediction: Path
    reference: Path

    @property
    def worst(self) -> float:
        """The lowest Dice of its labels."""
        return min((value for value in self.dice.values() if value is not None), default=1.0)


class SiteStudy:
    """What lies at this site of one study.

    Parameters
    ----------
    spool : Spool
        The spool.
    work : Path
        The worker's folder.
    study_id : str
        The study's id; raises FNU-120 where this site has had no task of it that this version understands.
    """

    def __init__(self, spool: Spool, work: Path, study_id: str) -> None:
        self._spool = spool
        task = _any_task(spool.inbox / study_id)
        if task is None:
            raise FednnunetError(Code.STUDY_NOT_FOUND, f"no task of {study_id[:16]} has come here")
        self.study, self.site = task.study, task.site
        self.workspace = Workspace(work, task.study)
        self.results: list[tasks.Result] = []
        for path in sorted((spool.outbox / study_id).glob("*/result.json")):
            with contextlib.suppress(FednnunetError):  # of a later version that was here before
                self.results.append(tasks.parse_result(path.read_bytes()))
        self.asked_rounds = {
            fold: len(list((spool.inbox / study_id).glob(f"train-fold_{fold}-*"))) for fold in task.study.folds
        }

    def trained(self, fold: str) -> list[tuple[int, tasks.Training]]:
        """(round, report) of each round that this site has trained."""
        found = [
            (result.round, result.training)
            for result in self.results
            if result.training is not None and result.fold == fold and result.round is not None
        ]
        return sorted(found, key=lambda pair: pair[0])

    def plans(self) -> dict[str, Any] | None:
        """The plans prepared here."""
        prepared = self.workspace.preprocessed / "prepared.json"
        if not prepared.exists():
            return None
        name = files.read_json(prepared)["plans_name"]
        plans: dict[str, Any] = files.read_json(self.workspace.preprocessed / f"{name}.json")
        return plans

    def finished(self) -> bool:
        """Whether the final model of the last fold lies here."""
        plans = self.plans()
        folder = self.workspace.model(plans) / f"fold_{self.study.folds[-1]}" if plans else None
        return folder is not None and (folder / native.CHECKPOINT).exists()

    def fingerprint(self) -> dict[str, Any] | None:
        """nnU-Net's fingerprint of this site's own cases."""
        path = self.workspace.preprocessed / "dataset_fingerprint.json"
        return files.read_json(path) if path.exists() else None

    def cases(self, plans: dict[str, Any], fold: str, kind: str, workspace: Workspace | None = None) -> list[CaseScore]:
        """Scores of single cases from nnU-Net's summary, the worst first.

        `kind` is `test` or `validation`, `workspace` that of the study or of a variant that it is compared with.
        """
        folder = (workspace or self.workspace).model(plans) / f"fold_{fold}" / kind
        if not (folder / "summary.json").exists():
            return []
        labels = self.study.label_keys
        found = []
        for entry in files.read_json(folder / "summary.json")["metric_per_case"]:
            path = Path(entry["prediction_file"])
            metrics = {name: entry["metrics"][key] for name, key in labels.items()}
            dice = {name: None if math.isnan(of["Dice"]) else float(of["Dice"]) for name, of in metrics.items()}
            present = {name: of["n_ref"] > 0 for name, of in metrics.items()}
            predicted = {name: of["n_pred"] > 0 for name, of in metrics.items()}
            stem = path.name.removesuffix(self.study.file_ending)
            reference = Path(entry["reference_file"])
            found.append(CaseScore(stem, dice, present, predicted, folder / path.name, reference))
        return sorted(found, key=lambda case: (case.worst, case.name))

    def images(self) -> dict[str, Case]:
        """The dataset's cases with their files, as the examination found them."""
        examined = dataset.load(self.workspace.examination)
        return {} if examined is None else {**examined.cases, **examined.test_cases}


def _any_task(folder: Path) -> tasks.Task | None:
    """One of the tasks of a study, the first that this version understands; None where there is none."""
    for body in sorted(folder.glob("*/task.json")):
        with contextlib.suppress(FednnunetError):
            return tasks.parse_task(body.read_bytes())
    return None


def studies(spool: Spool) -> list[Study]:
    """Every study that has asked this site something, by its name; none that this version does not understand."""
    found = [task.study for folder in spool.inbox.iterdir() if (task := _any_task(folder)) is not None]
    return sorted(found, key=lambda study: (study.name, study.id))


def write(spool: Spool, work: Path, study_id: str, output: Path | None = None) -> Path:
    """Write the report of one study; returns the file, `report.html` in the study's folder unless given."""
    told = SiteStudy(spool, work, study_id)
    target = output or told.workspace.root / FILE
    files.write_bytes(target, render(report(told)).encode(), 0o600)
    return target


def report(told: SiteStudy) -> Page:
    """The report as data."""
    plans = told.plans()
    sections = [
        Section("In short", _short(told)),
        Section("How good the model is on our cases", _scores(told, plans) if plans else []),
        Section("Did it help us?", _comparison(told, plans) if plans else []),
        Section("The worst cases", _pictures(told, plans) if plans else []),
        Section("Our training", _curves(told)),
        Section("Our data beside the federation's", _data(told, plans) if plans else []),
        Section("The plan", [plan_facts(plans, told.study.configuration)] if plans else []),
        Section("Time", _time(told)),
        Section("What left this site", _left(told)),
        Section("Versions and settings", _record(told)),
    ]
    return Page(
        title=f"{told.site} in study {told.study.name}",
        subtitle=f"{told.study.dataset}, {told.study.configuration}, fold {told.study.fold}, id {told.study.id}",
        sections=[section for section in sections if section.parts],
        foot="Written by this hospital's appliance and kept here. It names cases and shows images: it is not meant to "
        "leave the hospital. Research software: not a medical device, not for diagnosis.",
    )


def _short(told: SiteStudy) -> list[Any]:
    parts: list[Any] = []
    if told.finished():
        parts.append(Text("Done: the final model lies here, in nnU-Net's own layout.", "good"))
    else:
        parts.append(Text("The study has not ended here: there is no final model yet.", "warn"))
    failures = [result for result in told.results if result.failure is not None]
    for result in failures[:5]:
        assert result.failure is not None
        parts.append(Text(f"{result.kind}: {result.failure.describe()}", "bad"))
    rounds = {fold: len(told.trained(fold)) for fold in told.study.folds}
    facts = [
        (
            "rounds trained here",
            ", ".join(f"{done} of {told.study.rounds} (fold {fold})" for fold, done in rounds.items()),
        ),
        ("sites in the study", str(len(told.study.sites))),
    ]
    description = next((result.description for result in told.results if result.description), None)
    if description is not None:
        facts += [("training cases", str(description.training_cases)), ("test cases", str(description.test_cases))]
    return [*parts, Facts(facts)]


def _scores(told: SiteStudy, plans: dict[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for fold in told.study.folds:
        for kind, what in (("test", "cases of imagesTs"), ("validation", f"held-out training cases of fold {fold}")):
            cases = told.cases(plans, fold, kind)
            if not cases:
                continue
            means, rows = [], []
            for label in cases[0].dice:
                values = [value for case in cases if (value := case.dice[label]) is not None]
                if values:
                    low, high = np.clip(interval(values), 0.0, 1.0)
                    means.append(Score(label, float(np.mean(values)), float(np.std(values)), min(values)))
                    between = f"{number(low)} to {number(high)}" if len(values) > 1 else "-"
                    rows.append([label, str(len(values)), number(means[-1].mean), between, number(min(values))])
            header = ["label", "cases", "mean Dice", "95 % interval", "worst case"]
            caption = (
                f"Dice of the final model on our {len(cases)} {what}: mean, standard deviation (bar), worst (tick)."
            )
            parts.append(Figure(scores({"our cases": means}), caption, Table(header, rows)))
            single = [[case.name, *(number(value) for value in case.dice.values())] for case in cases[:MOST_CASES]]
            parts.append(Folded(f"Every one of our {what}, the worst first", [Table(["case", *cases[0].dice], single)]))
    if parts:
        parts.append(
            Text(
                "The interval is Student's over cases: with few cases it is wide, and it says nothing about other "
                "hospitals' patients."
            )
        )
    return parts


@dataclass(frozen=True)
class Compared:
    """One label over the same cases for all three models: Dice of each, and what federated is better by.

    A case counts where the reference has the label, or where at least one of the three predicted it. Its Dice is
    nnU-Net's; where the reference lacks the label this is 0 for a model that predicted it, and a model that rightly
    predicted nothing, for which nnU-Net has no number, gets 1. A case in which the label neither is nor was predicted
    by anybody tells nothing of it and is left out: many of them would bring every mean close to 1.

    So a model pays for a lesion that it makes up as it does for one that it misses, and each mean is over the same
    patients. nnU-Net's own mean leaves a case out for the models that predicted nothing alone.

    Attributes
    ----------
    label : str
        The label.
    cases : list of str
        The names of the cases that count.
    present : list of bool
        Whether the reference has the label, in the order of `cases`.
    without : int
        All cases without the label in the reference, those that do not count too.
    dice : dict
        By `local`, `federated`, `personalised`, in the order of `cases`.
    difference : tuple
        Mean of federated - local, and its 95 % interval (Student, over the cases' differences).
    """

    label: str
    cases: list[str]
    present: list[bool]
    without: int
    dice: dict[str, list[float]]
    difference: tuple[float, float, float]

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no clear difference`: whether the interval lies on one side of 0.

        Differences that are all the same (a model that makes a lesion up in each case) have an interval without
        width: then at least `ALIKE` cases are asked for, as a sign test does.
        """
        _, low, high = self.difference
        if len(self.cases) < (ALIKE if low == high else 2) or low <= 0 <= high:
            return "no clear difference"
        return "better" if low > 0 else "worse"

    def made_up(self, model: str) -> int:
        """In how many cases without the label the model predicted it."""
        return self._zeros(model, present=False)

    def missed(self, model: str) -> int:
        """Of how many cases with the label the model found not one voxel."""
        return self._zeros(model, present=True)

    def _zeros(self, model: str, present: bool) -> int:
        pairs = zip(self.present, self.dice[model], strict=True)
        return sum(there == present and dice == 0 for there, dice in pairs)


def compared(told: SiteStudy, plans: dict[str, Any], fold: str, kind: str) -> list[Compared]:
    """The three models over the same cases, label by label; empty where nothing was compared."""
    models = _by_model(told, plans, fold, kind)
    names = sorted(set.intersection(*(set(cases) for cases in models.values())))
    reference = models[FEDERATED]
    found = []
    for label in told.study.label_keys:
        there = {name: reference[name].present[label] for name in names}
        counts = [name for name in names if any(cases[name].dice[label] is not None for cases in models.values())]
        if not counts:
            continue
        dice = {model: [_dice_or_1(cases[name].dice[label]) for name in counts] for model, cases in models.items()}
        gains = [a - b for a, b in zip(dice[FEDERATED], dice[comparison.LOCAL], strict=True)]
        difference = (float(np.mean(gains)), *interval(gains))
        present = [there[name] for name in counts]
        found.append(Compared(label, counts, present, len(names) - sum(there.values()), dice, difference))
    return found


def _by_model(told: SiteStudy, plans: dict[str, Any], fold: str, kind: str) -> dict[str, dict[str, CaseScore]]:
    """The scores of cases by model and name."""
    workspaces = {FEDERATED: told.workspace, **{one.name: one for one in comparison.variants(told.workspace)}}
    return {
        name: {case.name: case for case in told.cases(plans, fold, kind, workspace)}
        for name, workspace in workspaces.items()
    }


def _dice_or_1(dice: float | None) -> float:
    """nnU-Net has no Dice where the label neither is nor was predicted: that is right."""
    return 1.0 if dice is None else dice


def _comparison(told: SiteStudy, plans: dict[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for fold in told.study.folds:
        for kind, what in (("test", "cases of imagesTs"), ("validation", f"held-out training cases of fold {fold}")):
            entries = compared(told, plans, fold, kind)
            if entries:
                parts += _judged(entries, what, distances(told, plans, fold, kind))
    if parts:
        parts.append(
            Text(
                "How it is counted: a case counts for a label where the reference has it or one of the three models "
                "predicted it, and then for all three. Where the reference lacks it, Dice is 0 for a model that "
                "predicted it and 1 for one that rightly predicted nothing. A case in which it neither is nor was "
                "predicted by any of them is left out. Missed altogether: not one voxel of it was found. HD95 is the "
                "median over the cases in which the reference and all three have the label (the first "
                f"{MOST_CASES} by name, where there are more): a model that misses the hard cases is not judged by the "
                "easy ones alone."
            )
        )
        parts.append(
            Text(
                "Local: trained here alone, from the same first weights, for as many epochs as the federation. "
                f"Personalised: the federated model after {told.study.personalise_epochs} more epochs on our cases. "
                "The interval is Student's over our cases' differences (one training of each, so chance in training is "
                "not in it); with several labels one may look better or worse by chance."
            )
        )
    return parts


def _judged(entries: Sequence[Compared], what: str, far: Mapping[str, Distances]) -> list[Any]:
    parts: list[Any] = []
    for verdict, kind, words in (
        ("worse", "bad", "the federated model is worse than our own training alone"),
        ("better", "good", "the federated model is better than our own training alone"),
        ("no clear difference", "warn", "no clear difference between the federated model and our own training alone"),
    ):
        labels = [f"{one.label} ({len(one.cases)} cases)" for one in entries if one.verdict == verdict]
        if labels:
            parts.append(Text(f"On our {what}, for {', '.join(labels)}: {words}.", kind))
    parts.append(_mistakes(entries))
    rows = []
    for one in entries:
        mean, low, high = one.difference
        gain = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
        means = [number(float(np.mean(one.dice[name]))) for name in MODELS]
        distance = far.get(one.label, Distances([], 0, {}))
        hd = [_millimetres(distance.of.get(name, [])) for name in MODELS]
        rows.append([one.label, str(len(one.cases)), *means, gain, *hd, distance.counted])
    header = ["label", "cases", *(f"Dice {name}" for name in MODELS), "federated - local (95 %)"]
    table = Table([*header, *(f"HD95 {name}, mm" for name in MODELS), "cases of HD95"], rows)
    drawn = scores(
        {
            one.label: [
                Score(name, float(np.mean(one.dice[name])), float(np.std(one.dice[name])), min(one.dice[name]))
                for name in MODELS
            ]
            for one in entries
        }
    )
    caption = f"Dice on our {what}: mean, standard deviation (bar), worst case (tick)."
    single = [
        [case, one.label, "yes" if one.present[place] else "no", *(number(one.dice[name][place]) for name in MODELS)]
        for one in entries
        for place, case in enumerate(one.cases)
    ]
    single.sort(key=lambda row: float(row[4]) - float(row[3]))
    columns = ["case", "label", "in the reference", *MODELS]
    folded = Folded("Every case, where federated lost most first", [Table(columns, single[:MOST_CASES], (1, 2))])
    return [*parts, Figure(drawn, caption), table, folded]


def _mistakes(entries: Sequence[Compared]) -> Table:
    """How often each model predicted a label where there is none, and missed it altogether where there is one."""
    rows = [
        [
            one.label,
            *(f"{one.made_up(name)} of {one.without}" for name in MODELS),
            *(f"{one.missed(name)} of {sum(one.present)}" for name in MODELS),
        ]
        for one in entries
    ]
    made_up = (f"{name}: predicted where there is none" for name in MODELS)
    return Table(["label", *made_up, *(f"{name}: missed altogether" for name in MODELS)], rows)


def _millimetres(values: Sequence[float]) -> str:
    return f"{float(np.median(values)):.1f}" if values else "-"


@dataclass(frozen=True)
class Distances:
    """HD95 of one label in mm, over the same cases for all three models.

    Those are the cases in which the reference and all three have the label: there is no distance to a surface that is
    not there, and a model that misses the hard cases must not look better for it (`Compared.missed` counts them).

    Attributes
    ----------
    cases : list of str
        The names of the cases, `MOST_CASES` at most: the first by name, whatever their scores.
    among : int
        How many cases there were to choose from.
    of : dict
        By `local`, `federated`, `personalised`, in the order of `cases`.
    """

    cases: list[str]
    among: int
    of: dict[str, list[float]]

    @property
    def counted(self) -> str:
        """How many cases, for people."""
        return str(len(self.cases)) if len(self.cases) == self.among else f"{len(self.cases)} of {self.among}"


def distances(told: SiteStudy, plans: dict[str, Any], fold: str, kind: str) -> dict[str, Distances]:
    """HD95 by label; computed once for the scores that lie here, and kept."""
    models = _by_model(told, plans, fold, kind)
    summaries = [
        files.sha256_of(workspace.model(plans) / f"fold_{fold}" / kind / "summary.json")
        for workspace in (told.workspace, *comparison.variants(told.workspace))
    ]
    ignored = told.study.labels.get("ignore")
    kept = told.workspace.root / "comparison" / f"hd95-fold_{fold}-{kind}.json"
    if kept.exists():
        found = files.read_json(kept)
        if (found["summaries"], found.get("ignored")) == (summaries, ignored):
            return {label: Distances(of["cases"], of["among"], of["of"]) for label, of in found["labels"].items()}
    measured = _measured(told.study, plans, models)
    labels = {label: asdict(one) for label, one in measured.items()}
    files.write_json(kept, {"summaries": summaries, "ignored": ignored, "labels": labels})
    return measured


def _measured(
    study: Study, plans: dict[str, Any], models: Mapping[str, Mapping[str, CaseScore]]
) -> dict[str, Distances]:
    """HD95 by label from the files; each file is read once. A case whose files one model lacks counts for none."""
    among = {label: _with_surfaces(models, label) for label in study.label_keys}
    chosen = {label: names[:MOST_CASES] for label, names in among.items()}
    values = _label_values(study)
    rows: dict[str, dict[str, list[float]]] = {label: {} for label in among}
    for name in sorted(set().union(*chosen.values())):
        labels = {label: values[label] for label, names in chosen.items() if name in names}
        found = [_distances_of(plans, cases[name], labels, study.labels.get("ignore")) for cases in models.values()]
        for label in labels:
            known = [value for of in found if (value := of.get(label)) is not None]
            if len(known) == len(models):
                rows[label][name] = known
    return {
        label: Distances(
            list(row),
            len(among[label]),
            {model: [of[place] for of in row.values()] for place, model in enumerate(models)},
        )
        for label, row in rows.items()
    }


def _with_surfaces(models: Mapping[str, Mapping[str, CaseScore]], label: str) -> list[str]:
    """The cases, by name, in which the reference and every model have a label."""
    having = (
        {case.name for case in cases.values() if case.present[label] and case.predicted[label]}
        for cases in models.values()
    )
    return sorted(set.intersection(*having))


def _distances_of(
    plans: dict[str, Any], case: CaseScore, labels: Mapping[str, list[int]], ignored: Any
) -> dict[str, float | None]:
    """HD95 by label; nothing is predicted where the reference says `ignore`, as in nnU-Net's scores."""
    if not case.prediction.exists() or not case.reference.exists():
        return {}
    reader = _reader(plans)
    reference, properties = reader.read_seg(str(case.reference))
    prediction, _ = reader.read_seg(str(case.prediction))
    if reference.shape != prediction.shape:
        return {}
    spacing = tuple(float(extent) for extent in properties["spacing"])
    judged = np.True_ if ignored is None else reference[0] != ignored
    return {
        label: comparison.hd95(np.isin(reference[0], values), np.isin(prediction[0], values) & judged, spacing)
        for label, values in labels.items()
    }


def _label_values(study: Study) -> dict[str, list[int]]:
    """The numbers of each foreground label or region."""
    return {
        name: value if isinstance(value, list) else [value]
        for name, value in study.labels.items()
        if name in study.label_keys
    }


def _reader(plans: dict[str, Any]) -> Any:
    """nnU-Net's reader of the plans."""
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    return recursive_find_reader_writer_by_name(plans["image_reader_writer"])()


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean (Student's t).

    A bootstrap's percentiles are too narrow for the few cases that a site has.
    """
    if len(values) < 2 or min(values) == max(values):
        return float(min(values)), float(max(values))
    from scipy.stats import sem, t

    low, high = t.interval(0.95, len(values) - 1, np.mean(values), sem(values))
    return float(low), float(high)


def _pictures(told: SiteStudy, plans: dict[str, Any]) -> list[Any]:
    fold = told.study.folds[-1]
    cases = told.cases(plans, fold, "test") or told.cases(plans, fold, "validation")
    images, labels = told.images(), _label_values(told.study)
    local, _ = comparison.variants(told.workspace)
    kind = "test" if told.cases(plans, fold, "test") else "validation"
    alone = {case.name: case.prediction for case in told.cases(plans, fold, kind, local)}
    parts: list[Any] = []
    for case in cases[:WORST]:
        found = images.get(case.name)
        if found is None or not case.prediction.exists() or not case.reference.exists():
            continue
        label = min(case.dice, key=lambda name: 1.0 if case.dice[name] is None else case.dice[name] or 0.0)
        drawn = _middle(plans, found, case, labels[label], alone.get(case.name))
        if drawn is not None:
            told_dice = ", ".join(f"{name} {number(value)}" for name, value in case.dice.items())
            parts.append(Picture(drawn, f"{case.name}, {label}; Dice {told_dice}"))
    if parts:
        parts.insert(
            0,
            Text(
                "The slice with the largest area of reference and prediction together, for the label that went worst. "
                "Blue: reference; orange, dashed: the federated model; pink, dotted: our own training alone, where "
                "there was one."
            ),
        )
    return parts


def _middle(
    plans: dict[str, Any], found: Case, case: CaseScore, values: Sequence[int], alone: Path | None
) -> str | None:
    """The overlay of the slice that shows most of a label; None where the files cannot be drawn."""
    reader = _reader(plans)
    image, properties = reader.read_images([str(path) for path in found.images])
    reference, _ = reader.read_seg(str(case.reference))
    prediction, _ = reader.read_seg(str(case.prediction))
    if not image.shape[1:] == reference.shape[1:] == prediction.shape[1:]:
        return None
    inside: list[NDArray[np.bool_]] = [np.isin(mask[0], values) for mask in (reference, prediction)]
    spacing = properties["spacing"]
    axis = int(np.argmax(spacing))
    both = (inside[0] | inside[1]).sum(axis=tuple(other for other in range(3) if other != axis))
    place = int(np.argmax(both))
    rows, columns = (float(spacing[other]) for other in range(3) if other != axis)
    if alone is not None and alone.exists():
        other, _ = reader.read_seg(str(alone))
        if other.shape == reference.shape:
            inside.append(np.isin(other[0], values))
    slices = [np.take(array, place, axis=axis) for array in (image[0], *inside)]
    return overlay(slices[0].astype(float), slices[1:], rows / columns)


def _curves(told: SiteStudy) -> list[Any]:
    parts: list[Any] = []
    for fold in told.study.folds:
        points: dict[str, list[tuple[int, float]]] = {name: [] for name in CURVES}
        for done, training in told.trained(fold):
            before = (done - 1) * told.study.epochs_per_round
            for place in range(training.epochs):
                epoch = before + place + 1
                points["train_loss"].append((epoch, training.train_loss[place]))
                points["val_loss"].append((epoch, training.val_loss[place]))
                known = [value for value in training.pseudo_dice[place] if value is not None]
                if known:
                    points["pseudo_dice"].append((epoch, sum(known) / len(known)))
        if points["train_loss"]:
            panels = [Curves(title, {told.site: points[name]}) for name, title in CURVES.items()]
            missed = told.study.rounds - len(told.trained(fold))
            caption = f"Fold {fold}: this site's own training." + (
                f" It missed {missed} rounds so far." if missed else ""
            )
            parts.append(Figure(curves(panels), caption))
    return parts


def _data(told: SiteStudy, plans: dict[str, Any]) -> list[Any]:
    own = told.fingerprint()
    if own is None:
        return []
    ours = own["foreground_intensity_properties_per_channel"]
    datasets = {told.site: ours}
    parts: list[Any] = [
        Facts(
            [
                ("our median spacing, mm", by_axis(medians(own["spacings"]))),
                ("our median shape, voxels", by_axis(medians(own["shapes_after_crop"]))),
            ]
        )
    ]
    if told.study.mode == "ffe":
        datasets = {"all sites": plans["foreground_intensity_properties_per_channel"], **datasets}
        parts[0] = Facts(
            [
                *parts[0].rows,
                ("all sites' median spacing, mm", by_axis(plans["original_median_spacing_after_transp"])),
                ("the plan's median shape, whole voxels", by_axis(plans["original_median_shape_after_transp"])),
            ]
        )
    return [*parts, intensities(datasets, "of our cases and of all sites" if len(datasets) > 1 else "of our cases")]


def _time(told: SiteStudy) -> list[Any]:
    rows: dict[str, dict[str, float]] = {}
    for fold in told.study.folds:
        row: dict[str, float] = {}
        for _, training in told.trained(fold):
            for part, seconds in training.seconds.items():
                row[part] = row.get(part, 0.0) + seconds
        if row:
            rows[f"fold {fold}"] = row
    if not rows:
        return []
    names = list(dict.fromkeys(part for row in rows.values() for part in row))
    table = Table(
        ["", *names], [[name, *(f"{row.get(part, 0.0):.1f}" for part in names)] for name, row in rows.items()]
    )
    return [Figure(bars(rows, "seconds"), "Seconds of work in the rounds, over all of them.", table)]


def _left(told: SiteStudy) -> list[Any]:
    counted: dict[str, list[float]] = {}
    for result in told.results:
        body = len(result.model_dump_json(indent=1).encode())
        weights = result.weights.nbytes if result.weights is not None else 0
        row = counted.setdefault(str(result.kind), [0, 0, 0])
        row[0] += 1
        row[1] += body
        row[2] += weights
    rows = [[kind, f"{count:.0f}", size(body), size(weights)] for kind, (count, body, weights) in counted.items()]
    if not rows:
        return []
    return [
        Table(["answers to", "number", "sums and counts", "weights"], rows),
        Text(
            "What was laid into the outbox. The ledger is the record of what was sent, with a SHA-256 for each answer: "
            "appliance ledger show."
        ),
    ]


def _record(told: SiteStudy) -> list[Any]:
    description = next((result.description for result in told.results if result.description), None)
    facts = [("study", told.study.id)]
    facts += list(description.versions.items()) if description is not None else []
    settings = [[name, str(value)] for name, value in told.study.model_dump(mode="json").items()]
    return [Facts(facts), Folded("Every setting of the study", [Table(["setting", "value"], settings, words=(1,))])]
