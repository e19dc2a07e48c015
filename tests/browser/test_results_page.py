"""The owner's results page in a real browser: fits the screen, needs no script and no network, and is accessible."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect
from starlette.applications import Starlette
from starlette.routing import Mount
from test_results import example_service, space_module

SERIOUS = ("serious", "critical")
WAIT_MS = 90_000  # a loaded machine is slow, not wrong


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("results")
    service = example_service(folder, comment="Granules too coarse; " + "a_very_long_word_without_any_break" * 4)
    page = space_module("grade/results").results_page(service, candidates=lambda: service.images, samples=50)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=[Mount("/results", page)]), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/results"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_the_page_fits_the_screen_and_has_no_serious_accessibility_fault(
    browser: Browser, address: str, width: int, scheme: str
):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shown = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)")
    assert len(shown) >= 5
    assert all(shown)
    found = Axe().run(page).response["violations"]
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in SERIOUS] == []
    small = page.evaluate(
        "[...document.querySelectorAll('a')].filter(a => a.getBoundingClientRect().height < 44).map(a => a.innerText)"
    )
    assert small == []
    page.close()


def test_the_page_works_without_script_and_asks_nothing_else_of_the_network(browser: Browser, address: str):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_load_state("networkidle")
    assert [url for url in requests if not url.startswith("data:")] == [address, f"{address}/"]
    assert "never for diagnosis" in page.inner_text("body").lower()
    assert page.inner_text("h1") == "Results: White cells, round 2 <script>alert(1)</script>"
    with page.expect_download() as download:
        page.get_by_role("link", name="CSV").click()
    assert download.value.suggested_filename == "feedback-csv.zip"
    assert Path(download.value.path()).stat().st_size > 1000
    context.close()


def test_tables_that_are_wider_than_a_phone_scroll_by_keyboard(browser: Browser, address: str):
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.set_default_timeout(WAIT_MS)
    page.goto(address)
    region = page.get_by_role("region", name="Graders and pace").locator(".wide")
    region.focus()
    page.keyboard.press("ArrowRight")
    # The page's policy forbids `eval`, by which `wait_for_function` would look a second time.
    expect(region).not_to_have_js_property("scrollLeft", 0)
    page.close()
