"""The orchestrator's status page: read-only, live, behind the token, and clicked through in a real browser."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from commands import phantom_study
from journals import Written
from starlette.testclient import TestClient

from federation.study import parse
from orchestrator import report
from orchestrator.books import Books
from orchestrator.web.app import Pages
from orchestrator.web.drawing import curves, grid


@pytest.fixture
def whole(tmp_path: Path) -> Written:
    written = Written(tmp_path)
    written.to_the_end()
    return written


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return TestClient(Pages(Books(tmp_path, tmp_path / "superlink.db")).app)


def test_studies_and_one_study_with_what_went_wrong(client: TestClient, whole: Written) -> None:
    overview = client.get("/")
    assert overview.url.path == "/status/"
    assert f'href="/status/studies/{whole.study.id}/"' in overview.text
    assert "3 of 3" in overview.text
    page = client.get(f"/status/studies/{whole.study.id}/").text
    assert "round 2: FNU-505" in page, "why a site was missing"
    assert "holds &lt;NaN&gt;" in page
    assert "<NaN>" not in page
    assert "The report" not in page, "there is none yet"
    assert client.get("/status/status.css").headers["content-type"].startswith("text/css")


def test_report_and_model_are_fetched_and_nothing_else_of_the_folder(client: TestClient, whole: Written) -> None:
    address = f"/status/studies/{whole.study.id}"
    assert client.get(f"{address}/report.html").status_code == 404
    report.write(whole.folder)
    assert "Study small" in client.get(f"{address}/report.html").text
    model = client.get(f"{address}/model.zip")
    assert model.content == b"PK"
    assert "Dataset300.zip" in model.headers["content-disposition"]
    for other in ("journal.jsonl", "study.json", "..%2Fstudy.json", "%2e%2e%2f%2e%2e%2fauthority%2Fcontrol.token"):
        assert client.get(f"{address}/{other}").status_code == 404
    assert client.get(f"/status/studies/{'0' * 64}/").status_code == 404
    climbing = client.get("/status/studies/..%2f..%2f/")
    assert (climbing.status_code, climbing.url.path) in {(404, "/status/studies/..%2f..%2f/"), (200, "/status/")}


def test_nothing_can_be_changed_and_no_other_page_may_frame_or_read_it(client: TestClient, whole: Written) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/status/").status_code == 405
    headers = client.get("/status/").headers
    policy = headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "script-src 'self'" in policy
    assert headers["cache-control"] == "no-store"


def test_a_change_of_the_journal_is_sent_and_what_stays_is_not(tmp_path: Path) -> None:
    import asyncio

    written = Written(tmp_path)
    written.write("opened", run=1)
    pages = Pages(Books(tmp_path, tmp_path / "none.db"))

    async def follow() -> list[str]:
        changes = pages._changes(written.study.id)
        first = await anext(changes)
        written.write("phase", phase="training")
        second = await asyncio.wait_for(anext(changes), 60)
        await changes.aclose()
        return [first, second]

    first, second = asyncio.run(follow())
    assert first.endswith("\n\n")
    assert all(line.startswith("data: ") for line in first.splitlines() if line)
    assert "<strong>training</strong>" not in first
    assert "<strong>training</strong>" in second


def test_drawings_hold_odd_names_and_single_points() -> None:
    svg = curves("loss", {"<b>": [(1, 0.5)], "c": []}, [(1, 0.5)])
    assert "&lt;b&gt;" in svg
    assert "nan" not in svg
    assert curves("loss", {"a": []}, []) == ""
    many = grid(["a"], [{}] * 500 + [{"a": "offline"}], 1000)
    assert many.count("<rect") == 51
    assert many.count('class="absent"') == 1


@pytest.mark.browser
def test_a_study_is_watched_in_a_browser_from_its_start_to_its_report(
    tmp_path: Path, tiny_phantom_sites: dict[str, Path], no_process_left: None
) -> None:
    import io

    from browser import browser, picture
    from rich.console import Console

    from orchestrator.admin.simulate import Simulation, SiteOptions

    sites = ["hospital_a", "hospital_b"]
    told = phantom_study(sites, rounds=3, iterations_per_epoch=60)  # the page looks once a second
    study = parse(json.loads(json.dumps({**told, "name": "watched"})))
    simulation = Simulation(tmp_path / "f", {name: tiny_phantom_sites[name] for name in sites}, SiteOptions(threads=1))
    with simulation.running():
        token = (simulation.orchestrator / "authority" / "control.token").read_text().strip()
        root = f"https://{simulation.control_address}"
        failure: list[BaseException] = []

        def run() -> None:
            try:
                simulation.conduct(study, Console(file=io.StringIO()))
            except BaseException as error:  # noqa: BLE001 - raised in the test's own thread
                failure.append(error)

        credentials: Any = {"username": "anybody", "password": token}
        with browser(ignore_https_errors=True, http_credentials=credentials) as page:
            page.goto(root)
            page.get_by_text("No study yet").wait_for()
            page.locator("tr", has_text="hospital_a").get_by_text("online").wait_for(timeout=60_000)
            thread = threading.Thread(target=run)
            thread.start()
            page.get_by_role("link", name="watched").click(timeout=60_000)  # it appears by itself
            page.get_by_text("round 1 of 3").wait_for(timeout=120_000)
            assert page.locator("polyline").count() >= 3
            picture(page, "status-training")
            page.get_by_role("link", name="The report").wait_for(timeout=120_000)
            thread.join()
            assert not failure
            page.get_by_text("done, round 3 of 3").first.wait_for()
            picture(page, "status-done")
            with page.expect_download() as download:
                page.get_by_role("link", name="The model").click()
            assert download.value.suggested_filename == "Dataset300_PhantomFederation.zip"
            page.get_by_role("link", name="The report").click()
            page.get_by_role("heading", name="How good the model is, by site").wait_for()
            picture(page, "report-of-a-real-study")
            page.go_back()
            page.get_by_role("link", name="All studies and sites").click()
            page.get_by_role("heading", name="Studies", exact=True).wait_for()
            picture(page, "status-overview")


def test_a_page_is_rendered_anew_only_where_something_has_changed(tmp_path: Path, whole: Written) -> None:
    pages = Pages(Books(tmp_path, tmp_path / "none.db"))
    first = pages._content(whole.study.id)
    assert pages._content(whole.study.id) is first
    report.write(whole.folder)
    assert "The report" in pages._content(whole.study.id)
    whole.write("opened", run=2)
    assert "The report" in pages._content(whole.study.id)
    assert "<strong>done</strong>" not in pages._content(whole.study.id)
    assert pages._content("f" * 64) == "<p>The study is gone.</p>"


def test_a_long_curve_is_drawn_with_few_points_and_ends_where_it_ends() -> None:
    curve = [(number, 1.0 / number) for number in range(1, 5001)]
    points = curves("loss", {"a": curve}, []).split('points="')[1].split('"')[0].split()
    assert len(points) <= 210
    assert points[-1].startswith("414.0,"), "the last epoch at the right edge"
