"""Did it help us? A site's own training and the personalised model beside the global one, exact and resumable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import phantom_study
from in_process import Federation, Outcome
from worker_site import Site, initial_weights, prepared_site

from appliance.worker import comparison, site_report
from appliance.worker.site_report import Compared, SiteStudy, compared
from appliance.worker.workspace import Workspace
from federation import files, tasks
from federation.errors import FednnunetError
from federation.report.page import render
from federation.study import parse
from federation.weights import TensorFile
from orchestrator import report
from orchestrator.history import load

COMPARE: dict[str, Any] = {"compare": "local", "personalise_epochs": 2, "iterations_per_epoch": 3, "rounds": 2}


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def federated(site: Site, first: Path) -> Path:
    """A federation of this site alone, from these weights to a finished model; returns the last global weights."""
    current = first
    for number in range(1, site.study.rounds + 1):
        task = site.task(tasks.Kind.TRAIN, number)
        assert site.ask(task, current).failure is None
        kept = site.settings.state / f"global-{number}.safetensors"
        kept.write_bytes(site.update(task).read_bytes())
        current = kept
    assert site.ask(site.task(tasks.Kind.VALIDATE), current).failure is None
    assert site.ask(site.task(tasks.Kind.FINISH), current).failure is None
    return current


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Site, tasks.Comparison]:
    """A site that has finished and compared; the federation had begun with other weights than a site alone does."""
    site = prepared_site(tmp_path_factory.mktemp("compared") / "state", **COMPARE)
    federated(site, initial_weights())
    result = site.ask(site.task(tasks.Kind.COMPARE))
    assert result.comparison is not None
    return site, result.comparison


def test_sums_of_both_leave_and_nothing_of_a_case(asked: tuple[Site, tasks.Comparison]) -> None:
    _, told = asked
    for variant in (told.local, told.personalised):
        assert (variant.validation_cases, variant.test_cases) == (2, 2)
        assert set(variant.test) == {"outer", "inner"}
    assert "case_" not in told.model_dump_json()


def test_what_is_compared_is_scored_on_the_same_cases_and_its_weights_are_freed(
    asked: tuple[Site, tasks.Comparison],
) -> None:
    site, told = asked
    workspace = Workspace(site.settings.work, site.study)
    for variant, scores in zip(comparison.variants(workspace), (told.local, told.personalised), strict=True):
        summary = files.read_json(variant.model(site.plans) / "fold_0" / "test" / "summary.json")
        dice = [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]]
        assert scores.test["outer"].mean == pytest.approx(np.mean(dice))
        assert not list(variant.own.rglob("*.safetensors"))
        assert not list(variant.own.rglob("*.pt"))
    again = comparison.compare(workspace, site.settings, "0", site.plans_sha256, {}, comparison.Control())
    assert (again.local, again.personalised) == (told.local, told.personalised), "what is done is not done again"


def test_training_alone_is_a_federation_of_one_site_bit_for_bit(tmp_path: Path) -> None:
    site = prepared_site(tmp_path / "state", **COMPARE)
    workspace = Workspace(site.settings.work, site.study)
    local, _ = comparison.variants(workspace)
    trainer = comparison.FoldTrainer(local, site.settings, "0", site.plans_sha256)
    control = comparison.Control()
    last = comparison._train(local, trainer, "0", control, None)
    trainer.close()
    workspace.enter()
    first = tmp_path / "first.safetensors"
    study = local.study
    assert study.rounds == 2
    fresh = comparison.FoldTrainer(local, site.settings, "0", site.plans_sha256)
    network = fresh.trainer.network
    comparison.native.save_weights(network, first, sorted(comparison.native.unique_tensors(network)))
    fresh.close()
    workspace.enter()
    together = federated(site, first)
    assert files.sha256_of(last) == files.sha256_of(together)
    names = TensorFile(last).names
    assert any(not np.array_equal(TensorFile(first).read(name), TensorFile(last).read(name)) for name in names)


def _poly(epoch: int, epochs: int) -> float:
    return (1 - epoch / epochs) ** 0.9


def _cosine(epoch: int, epochs: int) -> float:
    return (1 + math.cos(math.pi * epoch / epochs)) / 2


@pytest.mark.parametrize(
    ("trainer", "rate", "schedule"),
    [
        ("nnUNetTrainer", 1e-2, _poly),
        ("nnUNetTrainer_warmup", 1e-2, _poly),
        ("nnUNetTrainerCosAnneal", 1e-2, _cosine),
        ("nnUNetTrainerAdam3en4", 3e-4, _poly),
        ("nnUNetTrainerVanillaAdam1en3", 1e-3, _poly),
    ],
)
def test_personalising_begins_at_a_tenth_of_the_trainers_rate_and_falls_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: str, rate: float, schedule: Callable[[int, int], float]
) -> None:
    """Also where it was cut short after two of four epochs, and also for a trainer that would warm up for fifty."""
    rates: list[float] = []

    class Watched(comparison.FoldTrainer):
        def train(self, number: int, *rest: Any) -> Any:
            if number == 3 and len(runs) == 1:
                raise InterruptedError
            told = super().train(number, *rest)
            rates.extend(told[0].learning_rate)
            return told

    monkeypatch.setattr(comparison, "FoldTrainer", Watched)
    changes = {**COMPARE, "iterations_per_epoch": 1, "personalise_epochs": 4}
    site = prepared_site(tmp_path / "state", trainer=trainer, fold="all", **changes)
    _, personalised = comparison.variants(Workspace(site.settings.work, site.study))
    phases: list[str] = []
    control = comparison.Control(phase=phases.append)
    asked = (personalised, site.settings, "all", site.plans_sha256, {}, control, lambda _: None, 0.1)
    runs = [1]
    with pytest.raises(InterruptedError):
        comparison._variant(*asked)
    runs.append(2)
    comparison._variant(*asked)
    assert rates == pytest.approx([0.1 * rate * schedule(epoch, 4) for epoch in range(4)])
    assert "personalised: round 4, epoch 4 of 4, iteration 1 of 1" in phases


def test_scores_that_a_later_version_has_written_are_computed_anew(tmp_path: Path) -> None:
    site = prepared_site(tmp_path / "state", fold="all", **{**COMPARE, "personalise_epochs": 1})
    _, personalised = comparison.variants(Workspace(site.settings.work, site.study))
    phases: list[str] = []
    control = comparison.Control(phase=phases.append)

    def asked() -> dict[str, Any]:
        phases.clear()
        begin = (lambda _: None, 0.1)
        told = comparison._variant(personalised, site.settings, "all", site.plans_sha256, {}, control, *begin)
        return told.model_dump(exclude={"seconds"})

    first = asked()
    done = personalised.done("all")
    assert phases
    assert (asked(), phases) == (first, [])
    for content in (json.dumps({**files.read_json(done), "of_a_later_version": 1}), "{"):
        done.write_text(content)
        assert asked() == first
        assert phases, "trained again"
        assert (asked(), phases) == (first, []), "and known from then on"


@pytest.mark.long
def test_cut_short_in_the_middle_it_goes_on_to_the_same_scores(
    asked: tuple[Site, tasks.Comparison], tmp_path: Path
) -> None:
    site = prepared_site(tmp_path / "state", **COMPARE)
    federated(site, initial_weights())
    task = site.task(tasks.Kind.COMPARE)
    site.put(task)
    phases: list[str] = []

    def stop_in_the_second_epoch(text: str) -> None:
        phases.append(text)
        if text.startswith("local: round 2, epoch 2 of 2, iteration 2"):
            site.spool.cancel(task)

    site.worker.status.phase = stop_in_the_second_epoch  # type: ignore[method-assign]
    site.worker.handle(task)
    assert site.spool.result(task) is None
    assert "local: round 2, epoch 2 of 2, iteration 2 of 3" in phases
    assert "local: round 2, epoch 2 of 2, iteration 3 of 3" not in phases
    site.restart()
    phases.clear()
    site.worker.status.phase = phases.append  # type: ignore[method-assign]
    result = site.ask(task)
    assert not any(text.startswith("local: round 1,") for text in phases), "what was done is not done again"
    assert result.comparison is not None
    assert result.comparison.local.test == asked[1].local.test
    assert result.comparison.personalised.test == asked[1].personalised.test


def test_the_sites_report_says_plainly_where_federation_lost(asked: tuple[Site, tasks.Comparison]) -> None:
    site, _ = asked
    text = (site.settings.work / site.study.id / "report.html").read_text(encoding="utf-8")
    section = text[text.index("Did it help us?</h2>") :]
    told = SiteStudy(site.spool, site.settings.work, site.study.id)
    entries = compared(told, site.plans, "0", "test")
    assert {entry.label for entry in entries} == {"outer", "inner"}
    for entry in entries:
        mean, low, high = entry.difference
        assert low <= mean <= high
        assert f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" in section
    worse = Compared("x", ["a", "b"], [True, True], 0, {}, (-0.2, -0.3, -0.1))
    assert worse.verdict == "worse"
    dice = {name: [0.5, 0.6] for name in site_report.MODELS}
    parts = site_report._judged(
        [Compared("tumour", ["a", "b"], [True, True], 0, dice, (-0.2, -0.3, -0.1))], "2 cases", {}
    )
    assert parts[0].kind == "bad"
    assert "for tumour (2 cases): the federated model is worse than our own training alone" in parts[0].text
    assert Compared("x", ["a"], [True], 0, {}, (0.5, 0.5, 0.5)).verdict == "no clear difference", (
        "one case decides nothing"
    )
    assert "HD95 local, mm" in section
    assert section.count("data:image/png") == 2


def test_hd95_is_medpys() -> None:
    """Of two boxes, one moved by three voxels of 2 mm; and against all pairs of surface voxels."""
    from scipy.ndimage import binary_erosion

    reference = np.zeros((20, 20, 20), bool)
    reference[4:12, 5:12, 6:12] = True
    moved = np.roll(reference, 3, axis=0)
    spacing = (2.0, 1.0, 0.5)
    points = [np.argwhere(mask ^ binary_erosion(mask)) * spacing for mask in (reference, moved)]
    pairs = np.linalg.norm(points[0][:, None] - points[1][None], axis=2)
    expected = np.percentile(np.concatenate([pairs.min(axis=1), pairs.min(axis=0)]), 95)
    assert comparison.hd95(reference, moved, spacing) == pytest.approx(expected)
    assert comparison.hd95(reference, reference, spacing) == 0
    assert comparison.hd95(reference, np.zeros_like(reference), spacing) is None
    flat = reference[5:6]
    assert comparison.hd95(flat, np.roll(flat, 2, axis=1), (999.0, 1.0, 1.0)) == pytest.approx(2.0)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, tiny_phantom_sites: dict[str, Path]) -> Outcome:
    sites = {name: tiny_phantom_sites[name] for name in ("hospital_a", "hospital_b")}
    study = phantom_study(list(sites), rounds=1, iterations_per_epoch=2, compare="local", personalise_epochs=1)
    return Federation(tmp_path_factory.mktemp("compare"), sites).run(parse(study))


def test_a_study_compares_at_every_site_and_the_orchestrators_report_has_the_means(outcome: Outcome) -> None:
    history = load(outcome.folder)
    assert history.ended == "done"
    assert "comparing" in [phase for phase, _ in history.phases]
    assert all(site.comparisons["all"]["local"]["test_cases"] for site in history.sites.values())
    text = render(report.report(history, outcome.folder))
    section = text[text.index("Did it help each site?</h2>") :]
    assert section.index("hospital_a") > 0
    assert section.index("hospital_b") > 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stop_after": "prepare"}, "stop_after must be finish"),
        ({"pretrained_weights": "a" * 64}, "pretrained_weights"),
        ({"configuration": "3d_cascade_fullres", "previous_stage": "a" * 64}, "3d_lowres"),
    ],
)
def test_what_cannot_be_compared_is_said_before_a_site_is_asked(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(FednnunetError, match=named):
        parse({**phantom_study(["a", "b"]), "compare": "local", **changes})


def test_the_policy_holds_scores_back_and_plain_words_tell_of_the_time() -> None:
    from appliance.link.policy import Policy
    from appliance.plain_words import in_plain_words

    study = parse({**phantom_study(["a", "b"]), "compare": "local"})
    task = tasks.Task(study=study, site="a", kind=tasks.Kind.COMPARE, fold="all")
    Policy(studies="any").check_task(task, None)
    with pytest.raises(FednnunetError, match="scores_may_leave"):
        Policy(studies="any", scores_may_leave=False).check_task(task, None)
    words = in_plain_words(study, "a")
    assert "The same training again on its images alone, then 10 epochs on from the model." in words
    assert "of this site's own training alone, and of the personalised model" in words
    assert "No weights of these two trainings leave." in words
    assert "No weights of these" not in in_plain_words(parse(phantom_study(["a", "b"])), "a")
