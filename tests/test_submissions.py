"""What browsers send is checked value by value; whatever is wrong is refused with a reason, never an exception."""

from __future__ import annotations

import json
import math
import re

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
        ({"grade_id": None}, "`grade_id` is None; it must be 1 to 64 letters, digits or any of . : _ -"),
        ({"grade_id": "../x"}, "`grade_id` is '../x'; it must be 1 to 64"),
        ({"grade_id": "a" * 65}, "aaa'; it must be 1 to 64"),
        ({"item_id": ["i"]}, "`item_id` is ['i']; it must be"),
        ({"mode": "pair"}, "`mode` is 'pair'; it must be one of single, grid, pairwise."),
        ({"mode": None}, "`mode` is None; it must be"),
        ({"verdict": "good"}, "The verdict is 'good'; it must be one of plausible, implausible, unsure."),
        ({"verdict": ["plausible"]}, "The verdict is ['plausible']; it must be"),
        ({"verdict": "implausible"}, "The verdict implausible needs a reason"),
        ({"verdict": "implausible", "comment": " \n"}, "needs a reason"),
        ({"failed_criteria": ["size", "colour"]}, "`failed_criteria` has ['colour']; it must be a list of names of"),
        ({"failed_criteria": ["colour"]}, "names of this checklist: size, shape."),
        ({"failed_criteria": "size"}, "`failed_criteria` has 'size'; it must be a list"),
        ({"failed_criteria": [["size"]]}, "`failed_criteria` has [['size']]; it must be a list"),
        ({"confidence": 1.01}, "The confidence is 1.01; it must be a number from 0 to 1."),
        ({"confidence": -0.1}, "The confidence is -0.1; it must be"),
        ({"confidence": math.nan}, "The confidence is nan; it must be"),
        ({"confidence": 10**400}, "000; it must be a number from 0 to 1"),
        ({"confidence": True}, "The confidence is True; it must be a number"),
        ({"confidence": "1"}, "The confidence is '1'; it must be a number"),
        ({"comment": "x" * 2001}, "The comment has 2001 characters; it may have 2000."),
        ({"comment": 5}, "The comment is 5; it must be text."),
        ({"subtype": "x" * 81}, "The subtype has 81 characters; it may have 80."),
        ({"active_ms": -1}, "`active_ms` is -1; it must be a whole number of milliseconds from 0 to 1000000000000."),
        ({"idle_ms": 1.5}, "`idle_ms` is 1.5; it must be"),
        ({"hidden_ms": True}, "`hidden_ms` is True; it must be"),
        ({"hidden_ms": 10**5000}, "`hidden_ms` is a number of thousands of digits; it must be"),
        ({"supersedes": ""}, "`supersedes` is ''; it must be the id of an earlier grade, or left out."),
        ({"session": 3}, "`session` is 3; it must be the id of the session, or left out."),
        ({"grader": "somebody"}, "There is no place for ['grader'] in mode single, only for grade_id, item_id, mode"),
        ({"\ud800": 1}, "no place for ['\\ud800']"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_value_seen_and_the_one_wanted(change, reason):
    with pytest.raises(RowError) as caught:
        check({**GOOD, **change})
    assert reason in str(caught.value)
    json.dumps(str(caught.value), ensure_ascii=False).encode()


@pytest.mark.parametrize("row", [None, 3, "text", [], [GOOD]])
def test_what_is_no_row_is_refused(row):
    with pytest.raises(RowError, match=f"must be an object with named values, not {re.escape(repr(row)[:8])}"):
        check(row)


@pytest.mark.parametrize("value", ["#" * 5000, ["#" * 30] * 90, {"#" * 300: {"#" * 300: "#" * 300}}, "\ud800" * 5000])
@pytest.mark.parametrize(
    "key", ["grade_id", "mode", "verdict", "confidence", "failed_criteria", "active_ms", "session"]
)
def test_a_refusal_shows_no_more_than_80_characters_of_what_came(key, value):
    with pytest.raises(RowError) as caught:
        check({**GOOD, key: value})
    seen = re.split(" is | has ", str(caught.value).partition("; it must be")[0])[1]
    assert 20 < len(seen) <= 80


def test_a_refusal_shows_no_more_than_80_characters_of_names_without_a_place():
    with pytest.raises(RowError) as caught:
        check({**GOOD, **{f"{number}{'#' * 5000}": 1 for number in range(90)}})
    seen = str(caught.value).removeprefix("There is no place for ").partition(" in mode single, only for ")[0]
    assert 20 < len(seen) <= 80


def test_a_reason_is_a_failed_criterion_or_a_comment():
    check({**GOOD, "verdict": "implausible", "failed_criteria": ["size"]})
    check({**GOOD, "verdict": "implausible", "comment": "no nucleus"})
    check({**GOOD, "verdict": "implausible"}, reason_for=())
    with pytest.raises(RowError, match="unsure needs a reason"):
        check({**GOOD, "verdict": "unsure"}, reason_for=("unsure",))


def test_pairs_have_a_choice_and_no_verdict():
    assert check({**PAIR, "verdict": None})["choice"] == "left"
    with pytest.raises(RowError, match="The choice is 'both'; it must be one of left, right, tie, both_bad"):
        check({**PAIR, "choice": "both"})
    with pytest.raises(RowError, match=r"no place for \['verdict'\] in mode pairwise"):
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
