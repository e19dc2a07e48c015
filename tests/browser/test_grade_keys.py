"""Grading by keyboard and mouse in a real browser: what is pressed once is stored once, as it was meant."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest
from grading_site import SLOW_LINK, Site, accept, make_site, settle, shown, visit
from playwright.sync_api import Browser, Page, Route


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    graders = tuple("ada bea cid dan eve fay gil hal ida jon kim lea may noa ola pat".split())
    made = make_site(tmp_path_factory.mktemp("keys") / "study", graders=graders, graders_per_image=16)
    yield made.start()
    made.stop()


@pytest.fixture
def open_page(browser: Browser, site: Site) -> Iterator[Callable[..., Page]]:
    contexts = []

    def opened(name: str, link: dict[str, float] | None = None) -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        return visit(contexts[-1], site, name, link)

    yield opened
    for context in contexts:
        context.close()


def rows_of(site: Site, page: Page, kind: str = "grade") -> list[dict]:
    settle(page, "recorded")
    grader = page.evaluate("document.querySelector('.me').textContent")
    return [row for row in site.rows(kind) if row["grader"] == grader]


def test_eight_quick_keys_over_a_slow_link_store_eight_grades_of_eight_images(open_page, site: Site):
    page = open_page("ada", link=SLOW_LINK)
    for _ in range(8):
        page.keyboard.press("p")
        page.wait_for_timeout(300)
    rows = rows_of(site, page)
    assert [row["verdict"] for row in rows] == ["plausible"] * 8
    assert len({row["grade_id"] for row in rows}) == 8
    assert len({row["image_id"] for row in rows}) >= 7  # a hidden repeat may be among them


@pytest.mark.parametrize(("name", "last"), [("noa", "next_items"), ("ola", "submit_rows")])
def test_the_count_neither_goes_back_nor_ahead_whichever_answer_comes_last(open_page, site: Site, name: str, last: str):
    page = open_page(name)
    accept(page, 2)
    settle(page, "recorded")
    held: dict[str, Route] = {}

    def hold(route: Route) -> None:
        asked = json.loads(route.request.post_data)["fn_name"]
        if asked in held or asked not in ("next_items", "submit_rows"):
            route.continue_()
        else:
            held[asked] = route

    page.route("**/component_server/**", hold)
    page.evaluate("""() => {
        const count = document.querySelector('.count');
        window.counts = [parseInt(count.textContent)];
        new MutationObserver(() => window.counts.push(parseInt(count.textContent))).observe(count, { childList: true });
    }""")
    page.keyboard.press("p")  # five images are left: more are asked for at once
    while len(held) < 2:
        page.wait_for_timeout(20)
    (first,) = held.keys() - {last}
    early = held[last].fetch()  # the server answers this one first, but its answer arrives last
    held[first].continue_()
    arrived = {
        "next_items": "Number(document.querySelector('.page').dataset.ready) >= 8",
        "submit_rows": "document.querySelector('.status').dataset.unsent === '0'",
    }
    page.wait_for_function(arrived[first])
    held[last].fulfill(response=early)
    page.wait_for_function(arrived[last])
    counts = page.evaluate("window.counts")
    assert counts == sorted(counts)
    assert {*counts} == {2, 3}


def test_a_held_key_stores_one_grade(open_page, site: Site):
    page = open_page("bea")
    for _ in range(12):  # without `up` these are repeats, as when a key is held
        page.keyboard.down("u")
        page.wait_for_timeout(30)
    page.keyboard.up("u")
    assert [row["verdict"] for row in rows_of(site, page)] == ["unsure"]


def test_a_click_then_space_and_enter_store_one_grade(open_page, site: Site):
    page = open_page("cid")
    page.click("[data-verdict=plausible]")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    assert [row["verdict"] for row in rows_of(site, page)] == ["plausible"]


def test_a_double_click_stores_one_grade(open_page, site: Site):
    page = open_page("lea")
    page.dblclick("[data-verdict=unsure]")
    page.wait_for_timeout(300)
    assert [row["verdict"] for row in rows_of(site, page)] == ["unsure"]


def test_keys_do_nothing_while_typing_or_with_modifiers_and_escape_leaves_the_field(open_page, site: Site):
    page = open_page("dan")
    before = shown(page)
    page.keyboard.press("c")
    page.keyboard.type("pius <b>not bold</b>")
    assert shown(page) == before
    page.keyboard.press("Escape")
    for chord in ("Control+p", "Alt+p", "Meta+p", "Shift+p"):
        page.keyboard.press(chord)
    assert shown(page) == before
    page.keyboard.press("i")
    assert shown(page) != before
    (row,) = rows_of(site, page)
    assert (row["verdict"], row["comment"]) == ("implausible", "pius <b>not bold</b>")


def test_an_implausible_image_needs_a_reason_and_takes_everything_that_was_said(open_page, site: Site):
    page = open_page("eve")
    before = shown(page)
    page.keyboard.press("i")
    assert page.is_visible(".ask")
    page.keyboard.press("Enter")
    assert shown(page) == before
    for key in ("2", "6", "e", "Enter"):
        page.keyboard.press(key)
    assert shown(page) != before
    assert not page.is_visible(".ask")
    (row,) = rows_of(site, page)
    assert row["failed_criteria"] == ["nucleus_shape", "granules"]
    assert (row["verdict"], row["confidence"], row["mode"]) == ("implausible", 1.0, "single")
    assert page.evaluate("document.querySelectorAll('.criteria :checked, .confidence :checked').length") == 0


def test_undo_goes_back_step_by_step_and_a_new_answer_replaces_the_old_one(open_page, site: Site):
    page = open_page("fay")
    images = accept(page, 24)
    front = shown(page)
    for image in reversed(images[2:]):
        page.keyboard.press("z")
        assert shown(page) == image
    assert "you said plausible" in page.inner_text(".single .past")
    page.keyboard.press("u")
    assert shown(page) == front
    rows = rows_of(site, page)
    assert len(rows) == 25
    assert (rows[-1]["verdict"], rows[-1]["supersedes"]) == ("unsure", rows[2]["grade_id"])
    assert rows[-1]["image_id"] == rows[2]["image_id"]


def test_undo_reaches_grades_given_in_another_browser(open_page, site: Site):
    first = open_page("gil")
    images = accept(first, 3)
    old = rows_of(site, first)
    second = open_page("gil")
    assert shown(second) == shown(first)
    second.keyboard.press("z")
    second.wait_for_selector(".single .past:not([hidden])")
    assert shown(second) == images[-1]
    second.keyboard.press("u")
    rows = rows_of(site, second)
    assert (len(rows), rows[-1]["supersedes"]) == (4, old[-1]["grade_id"])


def test_images_that_arrive_while_an_earlier_answer_is_changed_leave_what_was_marked(open_page, site: Site):
    page = open_page("pat")
    held: list[Route] = []

    def hold(route: Route) -> None:
        asked = json.loads(route.request.post_data)["fn_name"]
        held.append(route) if asked == "next_items" else route.continue_()

    page.route("**/component_server/**", hold)
    accept(page, 3)  # five images are left: more are asked for
    while not held:
        page.wait_for_timeout(20)
    page.keyboard.press("z")
    page.keyboard.press("2")
    held.pop().continue_()
    page.wait_for_function("Number(document.querySelector('.page').dataset.ready) >= 8")
    page.keyboard.press("i")
    rows = rows_of(site, page)
    assert (rows[-1]["verdict"], rows[-1]["failed_criteria"]) == ("implausible", ["nucleus_shape"])
    assert rows[-1]["supersedes"] == rows[2]["grade_id"]


def test_what_is_skipped_comes_back_at_the_end_and_undo_brings_it_back_at_once(open_page, site: Site):
    page = open_page("hal")
    first = shown(page)
    page.keyboard.press("s")
    assert shown(page) != first
    page.keyboard.press("z")
    assert shown(page) == first
    page.keyboard.press("p")
    (row,) = rows_of(site, page)
    assert row["supersedes"] is None


def test_one_submit_of_a_grid_is_a_row_for_each_image(open_page, site: Site):
    page = open_page("ida")
    page.click(".modes [data-mode=grid]")
    page.wait_for_selector(".grid .tile")
    count = page.locator(".tile").count()
    assert count > 4
    page.keyboard.press("2")
    page.locator(".tile").nth(3).click()
    page.locator(".tile").nth(3).click()
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('.status').dataset.unsent === '0'")
    rows = rows_of(site, page)
    expected = ["plausible"] * count
    expected[1], expected[3] = "implausible", "unsure"
    assert [row["verdict"] for row in rows] == expected
    assert {row["mode"] for row in rows} == {"grid"}
    assert len({row["class_label"] for row in rows}) == 1
    page.keyboard.press("z")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    rows = rows_of(site, page)
    assert len(rows) == count + 1
    assert (rows[-1]["verdict"], rows[-1]["supersedes"]) == ("implausible", rows[0]["grade_id"])


def test_pairs_store_left_right_tie_and_both_bad(open_page, site: Site):
    page = open_page("jon")
    page.click(".modes [data-mode=pairwise]")
    page.wait_for_selector(".pairwise .side img")
    for key in ("ArrowLeft", "ArrowRight", "t", "b"):
        page.wait_for_timeout(200)
        page.keyboard.press(key)
    rows = rows_of(site, page, "preference")
    assert [row["choice"] for row in rows] == ["left", "right", "tie", "both_bad"]
    assert all(row["left_image_id"] != row["right_image_id"] for row in rows)


def test_active_and_hidden_time_are_kept_apart_and_the_screen_note_is_in_the_session(browser: Browser, site: Site):
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.link("kim"))
    page.wait_for_selector("dialog.screen[open]")
    page.check("text=Calibrated within six months")
    page.fill("dialog.screen input[type=text]", "reading room")
    page.click("[data-do=start]")
    page.wait_for_selector(".single .stage img")
    page.wait_for_timeout(400)
    # another tab in front hides nothing in a headless browser, so the event is made
    hide = """value => {
        Object.defineProperty(document, 'hidden', { value, configurable: true });
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    page.evaluate(hide, True)
    time.sleep(0.6)
    page.evaluate(hide, False)
    page.keyboard.press("p")
    (row,) = rows_of(site, page)
    (session,) = rows_of(site, page, "session")
    assert 500 <= row["hidden_ms"] < 5000
    assert 300 <= row["active_ms"] < 10_000
    assert row["idle_ms"] == 0
    assert row["session"] == session["session_id"]
    assert session["colour_note"] == "calibrated within six months; reading room"
    page.reload()
    page.wait_for_selector(".single .stage img")
    assert page.locator("dialog[open]").count() == 0  # asked once in a session
    context.close()


def test_after_thirty_seconds_without_input_time_counts_as_idle(browser: Browser, site: Site):
    context = browser.new_context()
    context.clock.install()
    page = visit(context, site, "may")
    page.keyboard.press("p")
    page.clock.fast_forward(75_000)
    page.keyboard.press("p")
    row = rows_of(site, page)[-1]
    assert 30_000 <= row["active_ms"] < 31_000
    assert 45_000 <= row["idle_ms"] < 60_000
    context.close()
