"""The report of a study: one file that needs nothing else, tells the bad first, and can be read by anybody."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from commands import fednnunet, good, phantom_study
from journals import Written, training, validation

from appliance.worker.fingerprint import CaseStatistics, channel_statistics, site_fingerprint
from federation.fingerprint import plan_tolerance
from federation.report.page import Figure, render
from federation.study import parse
from orchestrator import report
from orchestrator.history import REPORT, History, load


@pytest.fixture
def whole(tmp_path: Path) -> Written:
    written = Written(tmp_path)
    written.to_the_end()
    return written


def test_the_file_needs_nothing_else_and_is_the_same_each_time(tmp_path: Path, whole: Written) -> None:
    good(fednnunet("study", "report", "small", "--state", tmp_path, cwd=tmp_path))
    first = (whole.folder / REPORT).read_bytes()
    text = first.decode()
    links = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert {link for link in links if "www.w3.org" not in link} == set(), "names of SVG's formats alone"
    assert "<script" not in text
    assert "src=" not in text
    good(fednnunet("study", "report", "small", "--state", tmp_path, "--output", tmp_path / "again.html", cwd=tmp_path))
    assert (tmp_path / "again.html").read_bytes() == first


def test_it_says_what_went_badly_and_escapes_what_others_wrote(whole: Written) -> None:
    text = render(report.report(load(whole.folder), whole.folder))
    assert "1 of 3 rounds went on without some site" in text
    assert "Answers refused, which lie in quarantine: 1." in text
    assert "holds &lt;NaN&gt;" in text
    assert "<NaN>" not in text
    scores = text[text.index("The global model on each site") :]
    assert scores.index("south") < scores.index("north"), "the worst site first"
    assert "0.700" in scores
    assert "south was missing in round 2: FNU-505" in text


def test_what_the_plan_may_be_off_by_stands_among_the_warnings(tmp_path: Path) -> None:
    written = Written(tmp_path, channel_names={0: "CT"})
    random = np.random.default_rng(0)
    lesions = [(channel_statistics(random.normal(40, 90, 30).astype(np.float32)),) for _ in range(9)]
    cases = [CaseStatistics((1.0, 1.0, 1.0), (64, 64, 64), 1.0, channels) for channels in lesions]
    written.write("pooled", sha256="f" * 64, tolerance=plan_tolerance(site_fingerprint(cases, 1)))
    text = render(report.report(load(written.folder), written.folder))
    assert "channel 0 (CT) may be clipped elsewhere" in text[text.index("Warnings") :]


def test_a_score_stands_beside_the_cases_that_it_is_over_not_beside_all_of_the_site(tmp_path: Path) -> None:
    """The tumour occurs, or was predicted, in one of the twenty cases."""
    written = Written(tmp_path)
    organ = {"mean": 0.9, "std": 0.02, "minimum": 0.8, "cases": 20}
    tumour = {"mean": 0.95, "std": 0.0, "minimum": 0.95, "cases": 1}
    told = {"validation": {}, "test": {"organ": organ, "tumour": tumour}, "test_cases": 20, "seconds": 1.0}
    written.write("answered", site="north", key="validate-fold_all", nbytes=90, validation=told)
    (figure,) = [part for part in report._scores(load(written.folder)) if isinstance(part, Figure)]
    assert figure.table is not None
    assert figure.table.rows == [
        ["north", "organ", "20", "0.900", "0.020", "0.800"],
        ["north", "tumour", "1", "0.950", "-", "0.950"],
    ]


def test_a_study_that_failed_runs_or_was_stopped_has_a_report_too(tmp_path: Path) -> None:
    failed = Written(tmp_path, "failed")
    failed.write("opened", run=1)
    failed.write("failed", number=501, reason="FNU-501 A site did not appear: south", advice="Start it.")
    text = render(report.report(load(failed.folder), failed.folder))
    assert "Failed: FNU-501" in text
    assert "What to do: Start it." in text
    running = Written(tmp_path, "running")
    running.write("opened", run=1)
    running.write("phase", phase="training")
    assert "Under way: training, round 0 of 3" in render(report.report(load(running.folder), running.folder))
    running.write("stopped", by="ada")
    assert "Stopped by ada after 0 rounds" in render(report.report(load(running.folder), running.folder))


def test_a_thousand_rounds_and_many_sites_stay_under_three_megabytes(tmp_path: Path) -> None:
    sites = [f"hospital_{number:03d}" for number in range(64)]
    study = parse({**phantom_study(sites, rounds=1000), "quorum": 1})
    history = History(study)
    at = "2026-01-01T10:00:00+00:00"
    for number in range(1, 1001):
        absent = {sites[number % 64]: "no answer before the deadline"}
        for place, site in enumerate(sites):
            if site not in absent:
                told = training(1 / number + place / 100, 0.9 - 0.8 / number)
                key = f"train-fold_all-{number:04d}"
                history.take(
                    {"event": "answered", "at": at, "site": site, "key": key, "nbytes": 1, "cases": 9}
                    | {"training": told}
                )
        took_part = [site for site in sites if site not in absent]
        history.take(
            {"event": "closed", "at": at, "fold": "all", "round": number, "participants": took_part}
            | {"missing": absent, "seconds": 1.0}
        )
    for site in sites:
        history.take(
            {"event": "answered", "at": at, "site": site, "key": "validate-fold_all", "nbytes": 1}
            | {"validation": validation(0.8)}
        )
    text = render(report.report(history, tmp_path))
    assert len(text.encode()) < 3_000_000
    assert "hospital_063" in text


def test_a_label_that_is_no_formula_does_not_end_the_report() -> None:
    """A study's labels are the coordinator's words: of `$...$` matplotlib makes a formula, or an error."""
    from federation.report.figures import Score, scores

    drawn = scores({r"$\frac$ <b>": [Score("a", 0.5, 0.1, 0.2)]})
    assert r"$\frac$ &lt;b&gt;" in drawn


def test_figures_do_not_depend_on_what_others_have_done_to_matplotlib() -> None:
    import matplotlib

    from federation.report.figures import Score, scores

    def drawn() -> str:
        return scores({"organ": [Score("north", 0.9, 0.1, 0.7)]})

    before = drawn()
    with matplotlib.rc_context({"font.size": 40, "axes.labelsize": 50, "axes.facecolor": "red"}):
        assert drawn() == before
        assert matplotlib.rcParams["font.size"] == 40, "and leave theirs as it is"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_reads_well_in_a_browser_by_mouse_and_by_keyboard(tmp_path: Path, whole: Written, scheme: str) -> None:
    from browser import browser, picture

    file = report.write(whole.folder)
    with browser(color_scheme=scheme) as page:
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        assert asked == [file.as_uri()], "nothing else is asked for"
        assert page.title() == "Study small"
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
        curve = page.evaluate("getComputedStyle(document.querySelector('figure svg path[style*=series]')).stroke")
        assert curve.startswith("rgb("), "colours of figures follow the page"
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        picture(page, f"report-{scheme}")

        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        summary = page.locator("summary", has_text="Every setting")
        assert not page.get_by_text("iterations_per_epoch", exact=True).is_visible()
        summary.focus()
        page.keyboard.press("Enter")
        assert page.get_by_text("iterations_per_epoch", exact=True).is_visible()

        page.set_viewport_size({"width": 360, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "a telephone shows it whole"
        page.emulate_media(media="print", color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("nav").is_visible()


@pytest.mark.browser
def test_every_figure_and_table_has_a_name_for_those_who_hear_it(whole: Written) -> None:
    from browser import browser

    file = report.write(whole.folder)
    with browser() as page:
        page.goto(file.as_uri())
        for drawing in page.locator("[role=img]").all():
            assert (drawing.get_attribute("aria-label") or "").strip()
        assert page.locator("table").count() > 3
        for table in page.locator("table").all():
            assert table.locator("th[scope=col]").count() > 1
        levels = [int(name[1]) for name in page.evaluate("[...document.querySelectorAll('h1,h2')].map(h => h.tagName)")]
        assert levels[0] == 1
        assert set(levels[1:]) == {2}
