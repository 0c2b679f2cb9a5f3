"""A real browser for tests: Chromium by Playwright, on pages of this machine; pictures stay in build/screenshots."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).resolve().parents[1] / "build" / "screenshots"


@contextlib.contextmanager
def browser(**context: Any) -> Iterator[Page]:
    """A page in a new browser; fails afterwards where the page logged an error or asked for something that failed."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    assert program, "no browser here: apt-get install chromium"
    faults: list[str] = []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        try:
            page = started.new_context(viewport={"width": 1200, "height": 900}, **context).new_page()
            page.on("console", lambda told: faults.append(told.text) if told.type == "error" else None)
            page.on("pageerror", lambda error: faults.append(str(error)))
            page.on("requestfailed", lambda asked: faults.append(f"{asked.failure}: {asked.url}"))
            yield page
        finally:
            started.close()
    assert not [fault for fault in faults if "ERR_ABORTED" not in fault], "a stream or a page that was left is none"


def picture(page: Page, name: str) -> Path:
    """Keep what the page looks like now, the whole of it."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    path = PICTURES / f"{name}.png"
    page.screenshot(path=path, full_page=True)
    return path
