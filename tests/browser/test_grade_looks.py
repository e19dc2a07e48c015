"""The grading page as people see it: at three widths, by day and by night, for everyone, and without any other site."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from grading_site import Site, make_site, visit
from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = pytest.mark.slow
WIDTHS = (390, 820, 1440)
VIEWS = ("single", "grid", "pairwise")
SMALLEST_TARGET_PX = 44
SURROUND = "rgb(119, 119, 119)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    made = make_site(tmp_path_factory.mktemp("looks") / "study", owners=["olga"])
    yield made.start()
    made.stop()


@pytest.fixture(scope="module", params=["light", "dark"])
def context(browser: Browser, request: pytest.FixtureRequest) -> Iterator[BrowserContext]:
    made = browser.new_context(color_scheme=request.param, viewport={"width": 1440, "height": 900})
    yield made
    made.close()


@pytest.fixture(scope="module")
def page(context: BrowserContext, site: Site) -> Page:
    requests: list[str] = []
    context.on("request", lambda request: requests.append(request.url))
    opened = visit(context, site)
    opened.requested = requests  # type: ignore[attr-defined]
    return opened


def show(page: Page, view: str) -> None:
    page.click(f".modes [data-mode={view}]")
    page.wait_for_selector(f".page[data-view={view}]")
    if view == "single":
        page.keyboard.press("i")  # with the question for a reason


def serious(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    bad = [item for item in found if item["impact"] in ("serious", "critical")]
    return [f"{item['id']}: {item['nodes'][0]['html'][:200]}" for item in bad]


@pytest.mark.parametrize("view", VIEWS)
def test_axe_finds_no_serious_violation(page: Page, view: str):
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        show(page, view)
        assert serious(page) == []


def test_axe_finds_no_serious_violation_in_the_dialogs_and_at_the_door(page: Page, browser: Browser, site: Site):
    page.click(".open-help")
    assert serious(page) == []
    page.keyboard.press("Escape")
    stranger = browser.new_page()
    stranger.goto(site.url)
    assert "Nobody is signed in" in stranger.inner_text("main")
    assert serious(stranger) == []
    stranger.goto(site.link("ada"))
    stranger.wait_for_selector("dialog.screen[open]")
    assert serious(stranger) == []
    stranger.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_cut_off_and_everything_can_be_hit(page: Page, view: str, width: int):
    page.set_viewport_size({"width": width, "height": 900})
    show(page, view)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    targets = page.evaluate(
        """() => [...document.querySelectorAll('.page button, .page a, .page label:has(input), .page textarea')]
            .filter(item => item.checkVisibility() && !item.closest('dialog'))
            .map(item => [item.outerHTML.slice(0, 120), item.getBoundingClientRect()])
            .map(([html, box]) => [html, Math.round(box.width), Math.round(box.height)])"""
    )
    assert len(targets) >= 8
    assert [item for item in targets if min(item[1:]) < SMALLEST_TARGET_PX] == []
    cut = page.evaluate(
        """() => [...document.querySelectorAll('.page button, .page label, .page h2, .page p')]
            .filter(item => item.checkVisibility() && !item.matches('.tile, .side, .spoken'))
            .filter(item => item.scrollWidth > item.clientWidth + 1 && getComputedStyle(item).display !== 'inline')
            .map(item => item.outerHTML.slice(0, 120))"""
    )
    assert cut == []


def test_the_surround_of_images_is_the_same_grey_by_day_and_by_night(page: Page):
    for view, places in (("single", ".single .stage"), ("grid", ".tiles, .tile"), ("pairwise", ".side .stage")):
        show(page, view)
        colours = page.evaluate(
            "selector => [...document.querySelectorAll(selector)].map(item => getComputedStyle(item).backgroundColor)",
            places,
        )
        assert set(colours) == {SURROUND}


def test_zoom_contrast_and_scale_are_at_hand_and_can_be_reset(page: Page):
    page.set_viewport_size({"width": 1440, "height": 900})
    show(page, "single")
    page.keyboard.press("Escape")
    bar = ".single .scale"
    assert page.inner_text(bar).endswith("µm")
    length = page.evaluate("document.querySelector('.single .scale').clientWidth")
    microns = float(page.inner_text(bar).split()[0])
    image_px = page.evaluate("document.querySelector('.single .stage img').clientWidth")
    assert length == pytest.approx(microns / 0.6 / 32 * image_px, abs=2)  # 0.6 um a pixel, 32 pixels wide
    for key in ("+", "+", ".", "."):
        page.keyboard.press(key)
    assert page.inner_text("output.zoom") == "200 %"
    assert "contrast(120%)" in page.evaluate("getComputedStyle(document.querySelector('.stage img')).filter").replace(
        "1.2", "120%"
    )
    page.keyboard.press("0")
    assert page.inner_text("output.zoom") == "100 %"
    assert page.evaluate("document.querySelector('.contrast input').value") == "100"


def test_help_opens_on_a_question_mark_and_the_next_image_waits(page: Page):
    show(page, "single")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.is_visible("dialog.help")
    before = page.evaluate("document.querySelector('.single .stage img').src")
    page.keyboard.press("p")
    page.keyboard.press("Escape")
    assert page.is_hidden("dialog.help")
    assert page.evaluate("document.querySelector('.single .stage img').src") == before


def test_a_verdict_is_told_by_sign_and_word_not_by_colour_alone(page: Page):
    show(page, "single")
    texts = [page.inner_text(f"[data-verdict={name}]") for name in ("plausible", "implausible", "unsure")]
    assert [text.split()[:2] for text in texts] == [["✓", "Plausible"], ["✕", "Implausible"], ["?", "Unsure"]]
    assert page.get_attribute("[data-verdict=implausible]", "aria-pressed") == "true"


def test_no_request_leaves_the_machine(page: Page, site: Site):
    page.wait_for_load_state("networkidle")
    assert len(page.requested) > 10
    assert [url for url in page.requested if not url.startswith((site.url, "data:", "blob:"))] == []
