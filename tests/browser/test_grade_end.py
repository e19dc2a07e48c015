"""The end of a study for one grader: what was skipped comes back, and when nothing is left the page says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from grading_site import Site, accept, make_site, settle, shown, visit, wait_for_other
from playwright.sync_api import Browser, Page

from pathalign.images import ImageSet

pytestmark = pytest.mark.slow
IMAGES = 20


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path / "study", per_class=4, real_control_share=0, repeat_share=0)
    yield made.start()
    made.stop()


def skip(page: Page) -> str:
    image = shown(page)
    page.keyboard.press("s")
    wait_for_other(page, image)
    return image


def wait_for_done(page: Page) -> None:
    page.get_by_role("heading", name="All done. Thank you!").wait_for()
    assert page.locator(".stage img").locator("visible=true").count() == 0


def test_skipped_images_come_back_when_all_others_are_graded_and_then_the_page_says_that_all_is_done(
    browser: Browser, site: Site
):
    context = browser.new_context()
    page = visit(context, site)
    graded = accept(page, 2)
    skipped = [skip(page)]
    graded += accept(page, 3)
    skipped.append(skip(page))
    graded += accept(page, IMAGES - 2 - len(graded))
    assert len({*graded, *skipped}) == IMAGES
    assert shown(page) == skipped[0]
    page.keyboard.press("u")
    assert wait_for_other(page, skipped[0]) == skipped[1]
    page.keyboard.press("u")
    wait_for_done(page)
    settle(page, "recorded")
    assert page.inner_text(".count").startswith(f"{IMAGES} of {IMAGES} ")
    rows = site.rows()
    assert [row["verdict"] for row in rows] == ["plausible"] * (IMAGES - 2) + ["unsure"] * 2
    assert {row["image_id"] for row in rows} == set(ImageSet.load(site.folder / "candidates").image_ids)
    page.keyboard.press("z")
    assert wait_for_other(page, "") == skipped[1]
    page.keyboard.press("x")
    wait_for_done(page)
    page.reload()
    wait_for_done(page)
    context.close()
