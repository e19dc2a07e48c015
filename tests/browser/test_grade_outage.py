"""The server dies while somebody grades: nothing is lost, nothing is stored twice, and the page says what is true."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from grading_site import Site, make_site, settle, shown, visit
from playwright.sync_api import Browser, BrowserContext, Page

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    graders = ("ada", "bea", "cid", "dan", "eve", "fay")
    made = make_site(tmp_path_factory.mktemp("outage") / "study", graders=graders, graders_per_image=6)
    yield made.start()
    made.stop()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    made = browser.new_context()
    yield made
    made.close()


def rows_of(site: Site, page: Page) -> list[dict]:
    grader = page.evaluate("document.querySelector('.me').textContent")
    return [row for row in site.rows() if row["grader"] == grader]


def status(page: Page) -> str:
    return page.inner_text(".status")


def test_grades_given_while_the_server_is_dead_arrive_once_without_a_reload(context: BrowserContext, site: Site):
    page = visit(context, site)
    page.evaluate("window.neverReloaded = true")
    for _ in range(2):
        page.keyboard.press("p")
    settle(page, "recorded")
    assert status(page).startswith(("Recorded. 2 grades not yet saved", "All saved"))
    site.kill()
    images = []
    for key in ("u", "p", "u"):
        images.append(shown(page))
        page.keyboard.press(key)
    page.wait_for_function("document.querySelector('.status').dataset.state === 'away'")
    assert status(page) == "Server not reached. 3 grades kept in this browser"
    assert [row["verdict"] for row in rows_of(site, page)] == ["plausible"] * 2
    assert len(set(images)) == 3
    site.start()
    settle(page)
    assert status(page) == "All saved"
    assert page.evaluate("window.neverReloaded")
    rows = rows_of(site, page)
    assert [row["verdict"] for row in rows] == ["plausible", "plausible", "unsure", "plausible", "unsure"]
    assert len({row["grade_id"] for row in rows}) == 5
    assert page.evaluate("Object.keys(localStorage).filter(key => key.startsWith('pathalign/grader')).length") == 0
    page.keyboard.press("p")
    settle(page, "recorded")
    assert len(rows_of(site, page)) == 6


def test_a_tab_closed_while_the_server_is_dead_sends_its_grades_when_the_page_is_opened_again(
    context: BrowserContext, site: Site
):
    page = visit(context, site, "bea")
    site.kill()
    graded = shown(page)
    page.keyboard.press("p")
    page.wait_for_function("document.querySelector('.status').dataset.unsent === '1'")
    page.close()
    site.start()
    page = visit(context, site, "bea")
    settle(page, "recorded")
    assert [row["verdict"] for row in rows_of(site, page)] == ["plausible"]
    assert shown(page) != graded


def test_someone_who_is_signed_out_is_told_so_and_nothing_is_lost(context: BrowserContext, site: Site):
    page = visit(context, site, "cid")
    cookies = context.cookies()
    context.clear_cookies()
    page.keyboard.press("p")
    page.wait_for_selector(".notice:not([hidden])")
    assert "signed out" in page.inner_text(".notice")
    context.add_cookies(cookies)
    settle(page, "recorded")
    assert page.is_hidden(".notice")
    assert len(rows_of(site, page)) == 1


def test_grades_are_not_taken_for_those_of_somebody_who_signs_in_later_in_the_same_browser(
    context: BrowserContext, site: Site
):
    page = visit(context, site, "dan")
    other = context.new_page()
    other.goto(site.link("eve"))
    other.wait_for_selector("dialog.screen[open]")
    page.keyboard.press("p")
    page.wait_for_selector(".notice:not([hidden])")
    assert "Somebody else" in page.inner_text(".notice")
    assert rows_of(site, page) == []
    other.goto(site.link("dan"))
    settle(page, "recorded")
    assert len(rows_of(site, page)) == 1


def test_what_a_server_with_a_wiped_disk_has_forgotten_is_sent_again_without_a_reload(
    context: BrowserContext, site: Site
):
    page = visit(context, site, "fay")
    for _ in range(3):
        page.keyboard.press("p")
    settle(page, "recorded")
    before = rows_of(site, page)
    site.kill()
    for path in site.state.glob("outbox.sqlite*"):
        path.unlink()
    shutil.rmtree(site.folder / "grades", ignore_errors=True)  # as if it had not been sent there yet
    site.start()
    settle(page)
    assert status(page) == "All saved"
    assert [row["grade_id"] for row in rows_of(site, page)] == [row["grade_id"] for row in before]
