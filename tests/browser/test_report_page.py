"""The report as people open it: in a real browser, on a phone and on a desk, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser
from test_report import example_exhibits, example_metrics, render

SERIOUS = ("serious", "critical")


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_has_no_serious_accessibility_fault_and_shows_the_charts_of_its_scheme(
    browser: Browser, page_file: Path, scheme: Literal["light", "dark"]
):
    page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme=scheme)
    page.goto(page_file.as_uri())
    found = Axe().run(page).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in SERIOUS] == []
    charts = page.evaluate(
        "[...document.querySelectorAll('.chart img')].filter(i => i.offsetParent).map(i => i.className)"
    )
    assert len(charts) == 5 and set(charts) == {scheme}
    page.close()


def test_the_printed_report_is_light_shows_link_targets_and_cuts_no_figure(browser: Browser, page_file: Path):
    page = browser.new_page(viewport={"width": 718, "height": 1000}, color_scheme="dark")
    page.goto(page_file.as_uri())
    page.emulate_media(media="print", color_scheme="dark")  # as somebody prints who reads in the dark
    charts = page.evaluate(
        "[...document.querySelectorAll('.chart img')].filter(i => i.offsetParent).map(i => i.className)"
    )
    assert set(charts) == {"light"}
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert (
        page.evaluate("getComputedStyle(document.querySelector('.files a'), '::after').content").count("figures/") == 1
    )
    kept = "[...document.querySelectorAll('figure, tr, .pairs > li')].map(e => getComputedStyle(e).breakInside)"
    assert set(page.evaluate(kept)) == {"avoid"}
    assert page.evaluate("document.documentElement.scrollWidth") <= 718
    assert not page.get_by_role("navigation").is_visible()
    page.close()
