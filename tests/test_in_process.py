"""A study in one process, from three datasets to one model; only the network is simulated (tests/in_process.py)."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import phantom_study
from in_process import Federation, Outcome, predict
from rich.console import Console

from federation import files
from federation.errors import Code, FednnunetError
from federation.study import parse
from federation.tasks import Kind, Task
from orchestrator.admin.phantom import TINY_SITES, make_phantom_sites
from orchestrator.admin.progress import print_end
from orchestrator.history import load
from orchestrator.report import write

pytestmark = pytest.mark.slow

SITES = ["hospital_a", "hospital_b", "hospital_c"]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, tiny_phantom_sites: dict[str, Path]) -> Federation:
    return Federation(tmp_path_factory.mktemp("federation"), tiny_phantom_sites)


@pytest.fixture(scope="module")
def outcome(federation: Federation) -> Outcome:
    return federation.run(parse(phantom_study(SITES, iterations_per_epoch=2)))


def test_a_study_ends_in_one_model_that_nnunet_predicts_with(
    federation: Federation, outcome: Outcome, tiny_phantom_sites: dict[str, Path], tmp_path: Path
) -> None:
    assert [line["participants"] for line in outcome.events("closed")] == [SITES, SITES]
    assert outcome.lines[-1]["event"] == "done"
    assert all(outcome.scores(site).test_cases == 2 for site in SITES)
    written = predict(outcome.zip, tiny_phantom_sites["hospital_b"] / "imagesTs", tmp_path)
    assert len(written) == 2


def test_every_site_has_the_same_weights_in_its_own_model(federation: Federation, outcome: Outcome) -> None:
    digest = outcome.exported["weights"]["all"]
    assert files.sha256_of(outcome.weights(2)) == digest
    first, *others = [
        torch.load(
            federation.model_at_site(site, outcome.study) / "fold_all" / "checkpoint_final.pth", weights_only=True
        )["network_weights"]
        for site in SITES
    ]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_study_run_again_goes_on_from_its_journal(federation: Federation, outcome: Outcome) -> None:
    asked = len(outcome.events("asked"))
    assert len(federation.run(outcome.study).events("asked")) == asked


def test_a_round_goes_on_without_a_silent_site_where_the_quorum_allows(federation: Federation) -> None:
    def silent(site: str, task: Task) -> bool:
        return site == "hospital_b" and task.kind is Kind.TRAIN and task.round == 1

    study = phantom_study(SITES, iterations_per_epoch=2, validation_iterations_per_epoch=1, quorum=2)
    outcome = federation.run(parse(study), silent)
    first, second = outcome.events("closed")
    assert first["participants"] == ["hospital_a", "hospital_c"]
    assert first["missing"] == {"hospital_b": "no answer (simulated)"}
    assert second["participants"] == SITES


def test_the_site_with_the_most_cases_that_is_always_late_is_told_of_wherever_the_study_is(
    tmp_path: Path, tiny_phantom_sites: dict[str, Path]
) -> None:
    """With a quorum each round goes on without it: the model must not look like everybody's."""
    large = make_phantom_sites(tmp_path / "large", {"hospital_c": replace(TINY_SITES["hospital_c"], training_cases=8)})
    federation = Federation(tmp_path / "federation", {**tiny_phantom_sites, **large})
    study = parse(phantom_study(SITES, iterations_per_epoch=1, validation_iterations_per_epoch=1, quorum=2))
    outcome = federation.run(study, lambda site, task: site == "hospital_c" and task.kind is Kind.TRAIN)
    assert [line["participants"] for line in outcome.events("closed")] == [["hospital_a", "hospital_b"]] * 2
    history = load(outcome.folder)
    (one,) = history.left_out
    cases = {site: sum(found.cases.values()) for site, found in history.sites.items()}
    assert cases["hospital_c"] == 8
    assert (one.site, one.missed, one.rounds) == ("hospital_c", 2, 2)
    assert one.share == pytest.approx(8 / sum(cases.values()))
    said = io.StringIO()
    print_end(Console(file=said, width=200), history, outcome.folder)
    for text in (said.getvalue(), write(outcome.folder, tmp_path / "report.html").read_text()):
        assert one.text in html.unescape(text)


def test_without_the_quorum_the_study_fails(federation: Federation) -> None:
    study = parse(phantom_study(SITES, rounds=1, iterations_per_epoch=1))
    with pytest.raises(FednnunetError) as caught:
        federation.run(study, lambda site, task: site == "hospital_c" and task.kind is Kind.TRAIN)
    assert caught.value.code is Code.QUORUM_NOT_MET
    assert federation.journal_lines(study)[-1]["event"] != "done"


def test_a_step_that_ended_without_a_site_is_not_asked_for_again(federation: Federation) -> None:
    """A coordinator that starts again would otherwise wait a whole deadline for it, for each fold that is done."""
    study = parse(phantom_study(SITES, iterations_per_epoch=1, rounds=1, quorum=2, seed=5))

    def silent(site: str, task: Task) -> bool:
        return site == SITES[0] and task.kind in (Kind.VALIDATE, Kind.FINISH)

    outcome = federation.run(study, silent)
    asked = len(outcome.events("asked"))
    assert set(outcome.exported["validation"]["all"]["missing"]) == {SITES[0]}
    assert set(outcome.exported["unfinished"]) == {SITES[0]}
    again = federation.run(study)
    assert len(again.events("asked")) == asked
    assert set(again.exported["unfinished"]) == {SITES[0]}


def test_a_hospital_whose_answers_are_beyond_all_reason_is_refused_and_asked_again(
    federation: Federation, tmp_path: Path
) -> None:
    """Each of these was recorded first and broke a step after it, for ever: what is recorded is not asked again."""
    liar = "hospital_b"
    lies: dict[Kind, Callable[[dict[str, Any]], None]] = {
        Kind.FINGERPRINT: lambda answer: _all_cases(answer["fingerprint"], 10**6),
        Kind.PREPARE: lambda answer: answer["preparation"].update(training_cases={"0": 5}),
        Kind.TRAIN: lambda answer: answer["training"].update(train_loss=[1e308]),
        Kind.VALIDATE: lambda answer: answer["validation"]["test"]["organ"].update(mean=1e200),
    }
    told: list[Kind] = []

    def lie(task: Task, body: str, weights: Path) -> str:
        if task.site != liar or task.kind not in lies or task.kind in told:
            return body
        told.append(task.kind)
        answer = json.loads(body)
        lies[task.kind](answer)
        return json.dumps(answer)

    study = phantom_study(SITES[:2], iterations_per_epoch=1, validation_iterations_per_epoch=1, rounds=1)
    for kind in lies:
        with pytest.raises(FednnunetError) as caught:
            federation.run(parse(study), lie=lie)
        assert caught.value.code in (Code.SITE_FAILED, Code.QUORUM_NOT_MET)
        assert liar in caught.value.found
        assert told[-1] is kind
    outcome = federation.run(parse(study), lie=lie)
    assert [line["site"] for line in outcome.events("refused")] == [liar] * len(lies)
    assert len(predict(outcome.zip, federation.settings[liar].data / "imagesTs", tmp_path)) == 2


def _all_cases(fingerprint: dict[str, Any], number: int) -> None:
    """A fingerprint that adds up, of `number` cases that are all the same and have no foreground."""
    fingerprint.update(n_cases=number, n_cases_with_foreground=0)
    for part in ("geometry", "relative_sizes"):
        fingerprint[part] = [{**fingerprint[part][0], "count": number}]
    for channel in fingerprint["channels"]:
        channel.update(sum_of_means="0/2^0", sum_of_squares="0/2^0", histogram=[])
