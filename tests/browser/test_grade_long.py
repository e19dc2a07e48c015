"""A whole sitting: 200 images by keyboard alone, with doubts and a break, and on with it in another browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from grading_site import Site, make_site, settle, shown, visit, wait_for_other
from playwright.sync_api import Browser

from pathalign.grades import current_grades
from pathalign.schema import Grade

pytestmark = pytest.mark.slow
IMAGES = 200


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path / "study", per_class=40)
    yield made.start()
    made.stop()


def test_two_hundred_images_by_keyboard_alone_then_another_browser_goes_on_at_the_right_image(
    browser: Browser, site: Site
):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = visit(context, site)
    image, seen, undone, skipped = shown(page), [], 0, []
    while len(seen) < IMAGES:
        number = len(seen)
        if number % 29 == 28 and len(skipped) <= number // 29:
            skipped.append(image)
            page.keyboard.press("s")
            image = wait_for_other(page, image)
            continue
        if number % 17 == 16 and undone <= number // 17:
            page.keyboard.press("z")
            assert shown(page) == seen[-1]
            page.keyboard.press("u")
            undone += 1
            assert shown(page) == image
        if number == 100:  # a break, with the page closed
            settle(page, "recorded")
            page.close()
            page = visit(context, site)
            assert shown(page) in (image, *skipped)  # what was skipped is still open, and older
            image = shown(page)
            skipped = [item for item in skipped if item != image]
        seen.append(image)
        for key in ("i", "1", "Enter") if number % 7 == 6 else ("p",):
            page.keyboard.press(key)
        image = wait_for_other(page, image)
    settle(page, "recorded")
    assert len(set(seen)) == IMAGES
    rows = [Grade.from_mapping(row) for row in site.rows()]
    standing = current_grades(rows)
    assert (len(standing.grades), standing.superseded) == (IMAGES, undone)
    assert undone > 5
    front = shown(page)
    context.close()

    other = visit(browser.new_context(), site)
    assert shown(other) in (front, *skipped)
    assert other.inner_text(".count").startswith("200 of ")
    assert shown(other) not in seen
    other.keyboard.press("p")
    settle(other, "recorded")
    assert len(site.rows()) == IMAGES + undone + 1
