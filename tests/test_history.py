"""What is read from a study's journal, and how it is shown: live, in lists, in files that are taken out."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import select
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import FEDNNUNET, begin, end, fednnunet, good, refused, wait_for, write_study
from journals import SITES, Written
from rich.console import Console

from appliance.worker.fingerprint import CaseStatistics, channel_statistics, site_fingerprint
from federation import files
from federation.audit import Tail
from federation.fingerprint import plan_tolerance
from orchestrator.admin.overview import ABSENT, PRESENT
from orchestrator.admin.progress import plain, scores_table, screen, sparkline
from orchestrator.doubts import NO_Z_SCORE
from orchestrator.history import MOST_WARNINGS, History, load, studies


@pytest.fixture
def whole(tmp_path: Path) -> Written:
    written = Written(tmp_path)
    written.to_the_end()
    return written


def shown(renderable: object, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_history_adds_up_sites_rounds_phases_and_warnings(whole: Written) -> None:
    history = load(whole.folder)
    assert (history.standing, history.done_rounds, history.all_rounds) == ("done", 3, 3)
    north, south = (history.sites[name] for name in SITES)
    assert (north.sent, north.received, north.missed) == (3000, 1590, 0)
    assert (south.sent, south.missed, dict(south.refused)) == (3000, 1, {"505": 1})
    assert [epoch.epoch for epoch in south.epochs] == [1, 3]
    assert history.pooled_curve("all", "train_loss")[0] == (1, 1.5)
    assert history.pooled_curve("all", "mean_dice")[1] == (2, pytest.approx(0.7)), "of the site that took part"
    assert list(history.spent())[-1] == "validating"
    assert [one.site for one in history.warnings] == ["south", "south"]
    assert north.scores["all"]["test"]["organ"]["mean"] == 0.9
    assert history.memory == 10**8


def small_lesions(voxels: int) -> dict[str, Any]:
    """The record of a study over cases with so many voxels of foreground."""
    random = np.random.default_rng(0)
    channels = [channel_statistics(random.normal(40, 90, voxels).astype(np.float32)) for _ in range(40)]
    cases = [CaseStatistics((1.0, 1.0, 1.0), (64, 64, 64), 1.0, (channel,)) for channel in channels]
    return plan_tolerance(site_fingerprint(cases, 1))


def of_the_plan(written: Written) -> list[str]:
    """The warnings that no site has caused."""
    return [one.text for one in load(written.folder).warnings if not one.site]


@pytest.mark.parametrize(
    ("channel", "voxels", "warned"), [("CT", 100, True), ("ct", 12, True), ("CT", 5000, False), ("T1", 12, False)]
)
def test_who_plans_for_ct_by_small_lesions_is_told_that_its_clipping_can_be_off(
    tmp_path: Path, channel: str, voxels: int, warned: bool
) -> None:
    written = Written(tmp_path, channel_names={0: channel})
    written.write("pooled", sha256="f" * 64, tolerance=json.loads(json.dumps(small_lesions(voxels))))
    assert len(of_the_plan(written)) == warned
    if warned:
        (text,) = of_the_plan(written)
        assert text.startswith("channel 0 (CT) may be clipped elsewhere than with the same data in one place")
        assert re.search(r"here -\d+(\.\d+)? \(there anything up to -\d+(\.\d+)?\) and \d", text), text
        history = load(written.folder)
        assert "channel 0 (CT) may be clipped elsewhere" in shown(screen(history), 120)
        assert plain(history, list(Tail(written.folder / "journal.jsonl").lines())[-1]) == text
        for number in range(3 * MOST_WARNINGS):
            history.warn("2026-01-01T10:00:00+00:00", "north", f"newer {number}")
        assert len(history.warnings) == MOST_WARNINGS
        assert [one.text for one in history.warnings][:2] == [text, f"newer {2 * MOST_WARNINGS + 1}"]


@pytest.mark.parametrize(
    ("channels", "sizes", "k", "said"),
    [
        (["T1"], [0.7499, 0.7504], 1, "Here it does; there it may not. It is so for channel 0 (T1)."),
        (["T1", "CT", "zscore"], [0.7, 0.82], 2, "Here it does not; there it may. It is so for channels 0 (T1), 2 (zs"),
        (["T1"], [0.7, 0.72], 1, None),
        (["CT", "noNorm"], [0.7499, 0.7504], 1, None),
    ],
)
def test_a_nonzero_mask_that_can_turn_is_told_where_something_is_z_scored(
    tmp_path: Path, channels: list[str], sizes: list[float], k: int, said: str | None
) -> None:
    written = Written(tmp_path, channel_names=dict(enumerate(channels)))
    cases = [CaseStatistics((1.0, 1.0, 1.0), (9, 9, 9), size, ()) for size in sizes]
    written.write("pooled", sha256="f" * 64, tolerance=plan_tolerance(site_fingerprint(cases, k)))
    if said is None:
        assert of_the_plan(written) == []
    else:
        (text,) = of_the_plan(written)
        assert text.startswith("the nonzero mask may be used otherwise than with the same data in one place")
        assert said in text


def test_what_is_z_scored_is_what_nnunet_z_scores() -> None:
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import (
        channel_name_to_normalization_mapping,
    )

    masked = {
        name: scheme.leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true
        for name, scheme in channel_name_to_normalization_mapping.items()
    }
    assert sorted(name for name, used in masked.items() if not used) == sorted(NO_Z_SCORE)


def test_a_record_of_an_older_version_and_one_without_foreground_are_read(tmp_path: Path) -> None:
    written = Written(tmp_path, channel_names={0: "CT"})
    record = small_lesions(12)
    for name in ("percentiles_can_move", "intensity", "intensity_cut"):
        del record[name]
    written.write("pooled", sha256="f" * 64, tolerance=record)
    written.write("pooled", sha256="f" * 64)
    empty = site_fingerprint([CaseStatistics((1.0, 1.0, 1.0), (9, 9, 9), 1.0, ())], 1)
    written.write("pooled", sha256="f" * 64, tolerance=plan_tolerance(empty))
    assert of_the_plan(written) == []


def test_the_warning_says_what_is_not_known(tmp_path: Path) -> None:
    written = Written(tmp_path, channel_names={0: "CT"})
    record = {**small_lesions(12), "intensity_cut": {"0": None}, "min_cases": 5}
    written.write("pooled", sha256="f" * 64, tolerance=record)
    (text,) = of_the_plan(written)
    assert "an unknown share at either end" in text
    assert "nothing finer than 5 cases leaves a site" in text


def test_the_time_in_which_no_coordinator_ran_is_nobodys(tmp_path: Path) -> None:
    history = History(Written(tmp_path).study)
    for event, at, fields in (
        ("opened", "2026-01-01T10:00:00+00:00", {}),
        ("phase", "2026-01-01T10:00:00+00:00", {"phase": "training"}),
        ("online", "2026-01-01T10:00:30+00:00", {"site": "north"}),
        ("opened", "2026-01-01T18:00:00+00:00", {}),
        ("online", "2026-01-01T18:00:10+00:00", {"site": "north"}),
    ):
        history.take({"event": event, "at": at, **fields})
    assert history.spent() == {"starting": 0.0, "training": 40.0}


def test_an_epoch_is_counted_over_all_rounds(tmp_path: Path) -> None:
    written = Written(tmp_path, epochs_per_round=2)
    written.write("opened", run=1)
    told = {name: value * 2 if isinstance(value, list) else value for name, value in _training().items()}
    written.write("answered", site="north", key="train-fold_all-0002", nbytes=1, cases=3, training=told)
    assert [epoch.epoch for epoch in load(written.folder).sites["north"].epochs] == [3, 4]


def _training() -> dict[str, object]:
    from journals import training

    return training(0.1, 0.5)


def test_a_tail_waits_for_a_whole_line_and_passes_over_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_bytes(b'{"a":1}\nnot json\n{"a":2')
    assert tail.lines() == [{"a": 1}]
    with open(path, "ab") as stream:
        stream.write(b"}\n")
    assert tail.lines() == [{"a": 2}]


def test_the_live_screen_fits_into_80_columns_with_long_names_and_reasons(tmp_path: Path) -> None:
    sites = ("a" * 40, "universitaetsklinikum_nord")
    written = Written(tmp_path, sites=sites)
    written.to_the_end()
    lines = shown(screen(load(written.folder))).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "all sites" in text
    assert "6.0 kB" in text
    assert "2.7 kB" in text
    assert "FNU-505" in text, "the newest warnings"
    assert sparkline([0.5, 0.6, 0.7]) == "▁▅█"


def test_a_sparkline_keeps_its_width_and_its_ends() -> None:
    assert sparkline([]) == ""
    assert sparkline([None, 0.3]) == "▁"
    many = sparkline([value / 1000 for value in range(1000)])
    assert (len(many), many[0], many[-1]) == (8, "▁", "█")


def test_plain_lines_tell_what_a_person_wants_to_know(whole: Written) -> None:
    history = History(whole.study)
    told = []
    for line in Tail(whole.folder / "journal.jsonl").lines():
        history.take(line)
        told.append(plain(history, line))
    text = "\n".join(line for line in told if line)
    assert "fold all, round 2 of 3: loss 0.500, pseudo-Dice 0.700, 1 of 2 sites, missing: south, 2.5 s" in text
    assert "south: train-fold_all-0002: FNU-505" in text
    assert "north is online" in text


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "-c 3d_fullres -f all -p nnUNetSmallPlans"),
        (
            {"fold": "0-4", "configuration": "2d", "trainer": "nnUNetTrainer_250epochs", "rounds": 250},
            "-c 2d -f 0 1 2 3 4 -tr nnUNetTrainer_250epochs -p nnUNetSmallPlans",
        ),
    ],
)
def test_a_study_ends_with_the_command_that_predicts_with_its_model(
    tmp_path: Path, changes: dict[str, object], command: str
) -> None:
    written = Written(tmp_path, **changes)
    written.to_the_end()
    files.write_json(written.folder / "plan.json", {"plans": {"plans_name": "nnUNetSmallPlans"}})
    lines = good(fednnunet("study", "watch", "--state", tmp_path, cwd=tmp_path)).out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("install it with: "))
    assert lines[at + 1] == (
        f"predict with: nnUNetv2_predict -i IMAGES -o OUT -d Dataset300_PhantomFederation {command}"
    )


def test_list_show_and_export_by_name_by_id_and_with_nothing_there(tmp_path: Path, whole: Written) -> None:
    other = Written(tmp_path, "other")
    other.write("opened", run=2)
    other.write("phase", phase="training")
    state = ("--state", tmp_path)
    listed = good(fednnunet("study", "list", *state, cwd=tmp_path)).out
    assert re.search(r"small .* done +3 of 3", listed)
    assert re.search(r"other .* training +0 of 3", listed)

    told = good(fednnunet("study", "show", whole.study.id[:8], *state, cwd=tmp_path)).out
    assert re.search(rf"south +{PRESENT}{ABSENT}{PRESENT}", told)
    assert re.search(r"south .*0\.700", told), "its Dice"
    assert "FNU-505" in told

    out = tmp_path / "out"
    good(fednnunet("study", "export", "small", *state, "--output", out, cwd=tmp_path))
    names = {"Dataset300.zip", "SHA256SUMS", "curves.csv", "journal.jsonl", "report.html", "study.yaml"}
    assert {path.name for path in out.iterdir()} == names
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert files.sha256_of(out / name) == digest
    rows = list(csv.DictReader(io.StringIO((out / "curves.csv").read_text())))
    assert [(row["site"], row["epoch"]) for row in rows] == [("north", n) for n in "123"] + [("south", n) for n in "13"]
    good(fednnunet("study", "check", out / "study.yaml", cwd=tmp_path))

    refused(fednnunet("study", "export", "small", *state, "--output", out, cwd=tmp_path), 129, "out")
    refused(fednnunet("study", "show", "unknown", *state, cwd=tmp_path), 120, "small", "other")
    (tmp_path / "empty" / "authority").mkdir(parents=True)  # as `federation init` makes it
    assert "no study yet" in good(fednnunet("study", "list", "--state", tmp_path / "empty", cwd=tmp_path)).out
    refused(fednnunet("study", "watch", "--state", tmp_path / "empty", cwd=tmp_path), 120)


@pytest.mark.parametrize("command", ["list", "watch", "show small", "best small"])
def test_a_folder_that_is_no_orchestrators_state_is_said_and_the_one_below_is_named(
    tmp_path: Path, command: str
) -> None:
    words = ("study", *command.split(), "--state")
    refused(fednnunet(*words, "nowhere", cwd=tmp_path), 113, f"{tmp_path / 'nowhere'} is not an orchestrator's state")
    right = tmp_path / "fednnunet-state" / "small" / "orchestrator"
    Written(right)
    for wrong in (right.parent, right.parent.parent):
        refused(fednnunet(*words, wrong, cwd=tmp_path), 113, f"did you mean --state {right}?")
    assert not (right.parent / "best").exists()


def test_a_stop_that_no_coordinator_hears_is_said_and_done_when_one_looks(tmp_path: Path) -> None:
    from orchestrator.coordinator import CoordinatorSettings, unfinished
    from orchestrator.journal import Journal, request_stop

    written = Written(tmp_path)
    written.write("opened", run=1)
    request_stop(written.folder, "ada")
    assert unfinished(CoordinatorSettings(tmp_path, "127.0.0.1:1", 1.0)) == []
    history = load(written.folder)
    assert (history.ended, history.stopped_by) == ("stopped", "ada")
    journal = Journal(written.folder, written.study)
    journal.check()  # the request is withdrawn
    journal.close()


def test_the_newest_study_is_the_one_that_began_last_also_in_a_copied_state(tmp_path: Path) -> None:
    names = ["b", "a", "c"]
    written = [Written(tmp_path, name) for name in names]
    for number, one in enumerate(written[:2]):
        one.write("opened", run=1)
        os.utime(one.folder / "study.json", (9 - number, 9 - number))  # a copy's times say nothing
        time.sleep(0.05)  # a line of a journal says its time in milliseconds, and a clock may have coarser ticks
    assert [one.study.name for one in studies(tmp_path / "studies")] == names, "the last one has no line yet"


def test_a_label_in_brackets_is_shown_as_it_is_called(tmp_path: Path) -> None:
    labels = {"background": 0, "[/red]": 1}
    study = Written(tmp_path, labels=labels).study
    score = {"mean": 0.5, "std": 0.05, "minimum": 0.4, "cases": 4}
    scores = {"validation": {}, "validation_cases": 0, "test": {"[/red]": score}, "test_cases": 4, "seconds": 1.0}
    assert "[/red]" in shown(scores_table(study, "all", {"north": scores}))


def test_watch_without_a_terminal_says_first_how_the_study_stands(tmp_path: Path) -> None:
    written = Written(tmp_path)
    written.write("opened", run=1)
    written.write("phase", phase="training")
    written.round(1)
    process = begin(FEDNNUNET, "study", "watch", "--state", tmp_path, cwd=tmp_path)
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 120)[0], "silent while nothing more happens"
        first = process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
    assert re.fullmatch(r"study small: training, round 1 of 3, since \d{4}-\d\d-\d\d [\d:]{8} UTC\n", first)
    assert end(process).status == 130


@pytest.mark.parametrize("stop_after", ["finish", "prepare"])
def test_a_done_study_asked_for_again_says_last_that_nothing_was_run_and_where_it_ended(
    tmp_path: Path, stop_after: str
) -> None:
    sites = [part for site in SITES for part in ("--site", f"{site}={site}")]
    for site in SITES:
        (tmp_path / site).mkdir()
    written = Written(tmp_path / "state" / "orchestrator", stop_after=stop_after)
    if stop_after == "finish":
        written.to_the_end()
    else:
        written.write("done")
    file = write_study(tmp_path / "study.yaml", written.study.model_dump(mode="json", exclude_defaults=True))
    for command in (
        ("simulate", "run", file, *sites, "--state", "state"),
        ("study", "submit", file, "--state", "state/orchestrator"),
        ("study", "submit", file, "--state", "state/orchestrator", "--no-wait"),
    ):
        lines = good(fednnunet(*command, cwd=tmp_path)).out.splitlines()
        assert re.fullmatch(r"nothing was run: study small is done already, since [-\d]{10} [:\d]{8} UTC", lines[-1])
        ended = f"study small ended after prepare, as its stop_after says: {written.folder}"
        assert (ended in lines) == (stop_after == "prepare" and "--no-wait" not in command)


@pytest.mark.parametrize("simulated", [False, True])
def test_a_stopped_study_says_what_lets_it_go_on_there(tmp_path: Path, simulated: bool) -> None:
    state = tmp_path / "my state" / "orchestrator"
    written = Written(state)
    written.write("opened", run=1)
    written.round(1)
    if simulated:
        files.write_bytes(tmp_path / "my state" / "sites" / "north" / "config" / "site.toml", b"")
    go_on = (
        "the same `fednnunet simulate` command again"
        if simulated
        else "fednnunet study resume small --state 'my state/orchestrator'"
    )
    process = begin(FEDNNUNET, "study", "stop", "small", "--state", "my state/orchestrator", cwd=tmp_path)
    wait_for((written.folder / "stop.json").exists, 120, "the request")
    written.write("stopped", by="ada")
    assert good(end(process)).out == f"study small is stopped after 1 of 3 rounds; to go on: {go_on}\n"
    watched = fednnunet("study", "watch", "--state", "my state/orchestrator", cwd=tmp_path)
    refused(watched, 509, "stopped by ada after 1 of 3 rounds", f"To go on: {go_on}")
