"""What browsers send is checked value by value; whatever is wrong is refused with a reason, never an exception."""

from __future__ import annotations

import json
import math

import pytest

from pathalign.grading.submissions import RowError, check_row, session_row

MODES = ("single", "grid", "pairwise")
CRITERIA = ("size", "shape")
GOOD = {"grade_id": "g-1", "item_id": "i" * 32, "mode": "single", "verdict": "plausible"}
PAIR = {"grade_id": "g-1", "item_id": "i" * 32, "mode": "pairwise", "choice": "left"}


def check(row, modes=MODES, reason_for=("implausible",)):
    return check_row(row, modes, CRITERIA, reason_for)


def test_a_short_row_is_completed():
    assert check(GOOD) == {
        **GOOD,
        "supersedes": None,
        "session": None,
        "active_ms": None,
        "idle_ms": None,
        "hidden_ms": None,
        "failed_criteria": [],
        "subtype": None,
        "confidence": None,
        "comment": None,
    }


def test_only_a_single_image_needs_a_reason_since_a_grid_has_no_room_for_one():
    bad = {**GOOD, "verdict": "implausible"}
    assert check({**bad, "mode": "grid"})["failed_criteria"] == []
    with pytest.raises(RowError, match="needs a reason"):
        check(bad)


def test_a_full_row_is_kept_as_it_is_with_criteria_in_the_order_of_the_checklist():
    row = {**GOOD, "verdict": "implausible", "failed_criteria": ["shape", "size", "shape"], "confidence": 0}
    row |= {"comment": " <b>odd</b>\n", "subtype": "band", "active_ms": 0, "idle_ms": 5, "hidden_ms": 7}
    checked = check({**row, "supersedes": "g-0", "session": "s-1"})
    assert checked["failed_criteria"] == ["size", "shape"]
    assert (checked["comment"], checked["subtype"], checked["confidence"]) == ("<b>odd</b>", "band", 0)
    assert [checked[key] for key in ("active_ms", "idle_ms", "hidden_ms")] == [0, 5, 7]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"grade_id": None}, "`grade_id`"),
        ({"grade_id": "a" * 65}, "1 to 64"),
        ({"grade_id": "../x"}, "`grade_id`"),
        ({"item_id": ["i"]}, "`item_id`"),
        ({"mode": "pair"}, "`mode` must be one of single, grid, pairwise"),
        ({"mode": None}, "`mode`"),
        ({"verdict": "good"}, "plausible, implausible, unsure"),
        ({"verdict": ["plausible"]}, "verdict"),
        ({"verdict": "implausible"}, "needs a reason"),
        ({"verdict": "implausible", "comment": " \n"}, "needs a reason"),
        ({"failed_criteria": ["colour"]}, "names of this checklist: size, shape"),
        ({"failed_criteria": "size"}, "must be a list"),
        ({"failed_criteria": [["size"]]}, "must be a list"),
        ({"confidence": 1.01}, "from 0 to 1"),
        ({"confidence": -0.1}, "from 0 to 1"),
        ({"confidence": math.nan}, "from 0 to 1"),
        ({"confidence": 10**400}, "from 0 to 1"),
        ({"confidence": True}, "a number"),
        ({"confidence": "1"}, "a number"),
        ({"comment": "x" * 2001}, "has 2001 characters; it may have 2000"),
        ({"comment": 5}, "must be text"),
        ({"subtype": "x" * 81}, "it may have 80"),
        ({"active_ms": -1}, "`active_ms` must be a whole number"),
        ({"idle_ms": 1.5}, "`idle_ms`"),
        ({"hidden_ms": True}, "`hidden_ms`"),
        ({"hidden_ms": 10**5000}, "`hidden_ms`"),
        ({"supersedes": ""}, "`supersedes`"),
        ({"session": 3}, "`session`"),
        ({"grader": "somebody"}, "no place for 'grader'"),
        ({"\ud800": 1}, "no place for '\\\\ud800'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(change, reason):
    with pytest.raises(RowError, match=reason) as caught:
        check({**GOOD, **change})
    json.dumps(str(caught.value), ensure_ascii=False).encode()


@pytest.mark.parametrize("row", [None, 3, "text", [], [GOOD]])
def test_what_is_no_row_is_refused(row):
    with pytest.raises(RowError, match="must be an object"):
        check(row)


def test_a_reason_is_a_failed_criterion_or_a_comment():
    check({**GOOD, "verdict": "implausible", "failed_criteria": ["size"]})
    check({**GOOD, "verdict": "implausible", "comment": "no nucleus"})
    check({**GOOD, "verdict": "implausible"}, reason_for=())
    with pytest.raises(RowError, match="unsure needs a reason"):
        check({**GOOD, "verdict": "unsure"}, reason_for=("unsure",))


def test_pairs_have_a_choice_and_no_verdict():
    assert check({**PAIR, "verdict": None})["choice"] == "left"
    with pytest.raises(RowError, match="left, right, tie, both_bad"):
        check({**PAIR, "choice": "both"})
    with pytest.raises(RowError, match="no place for 'verdict'"):
        check({**PAIR, "verdict": "plausible"})
    with pytest.raises(RowError, match="must be one of single, grid"):
        check(PAIR, modes=("single", "grid"))


def test_text_that_no_file_can_hold_is_mended():
    assert check({**GOOD, "comment": "a\ud800b\0"})["comment"] == "a?b"


def test_a_session_is_bounded_and_what_is_unusable_left_out():
    row = session_row(
        {"session_id": "s", "user_agent": "x" * 999, "device_pixel_ratio": 2, "colour_note": "calibrated"}
    )
    assert len(row["user_agent"]) == 200
    assert (row["session_id"], row["device_pixel_ratio"], row["colour_note"]) == ("s", 2.0, "calibrated")
    assert set(session_row({"session_id": "<", "device_pixel_ratio": "2", "viewport": 3}).values()) == {None}
    assert set(session_row("text").values()) == {None}
