"""The report as people open it: in a real browser, on a phone and on a desk, without a network."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser
from test_report import example_exhibits, example_metrics, render


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    render(folder, example_metrics(), example_exhibits())
    return folder / "report.html"


@pytest.mark.parametrize("width", [390, 820, 1440])
def test_the_report_fits_the_screen_shows_all_pictures_and_asks_nothing_of_the_network(
    browser: Browser, page_file: Path, width: int
):
    page = browser.new_page(viewport={"width": width, "height": 900})
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert len(shown) >= 5
    assert all(shown)
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert "never for diagnosis" in page.inner_text("body").lower()
    page.close()
