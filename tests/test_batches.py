"""Rows as lines, files as bytes, and paths that nobody else writes."""

from __future__ import annotations

import hashlib
import json

import pytest

from pathalign.grading.batches import Row, batch_content, batch_path, kind_of, read_batch
from pathalign.schema import Grade, InputError

GRADE = {"grade_id": "g1", "image_id": "i1", "class_label": "a", "verdict": "plausible", "grader": "grader-1"}


def test_a_row_is_one_line_with_sorted_keys_whatever_is_in_the_comment():
    row = Row.make("grade", "g1", {**GRADE, "comment": "two\nlines\u2028and \ud800 more"})
    assert "\n" not in row.body
    assert row.body == json.dumps(row.content, sort_keys=True)
    assert list(row.content) == sorted(row.content)
    assert read_batch("grades/x.jsonl", batch_content([row]), "grade") == [row]


def test_half_a_character_becomes_the_replacement_character_and_whole_ones_stay():
    row = Row.make(
        "grade", "g1", {**GRADE, "comment": "cut \ud83d", "failed_criteria": ["\udc00", "\U0001f642 \u00b5m"]}
    )
    assert (row.content["comment"], row.content["failed_criteria"]) == ("cut \ufffd", ["\ufffd", "\U0001f642 \u00b5m"])
    with pytest.raises(InputError, match="cannot be written"):
        Row.make("grade", "\ud83d", {**GRADE, "grade_id": "\ud83d"})


def test_a_grade_is_written_as_the_schema_writes_it():
    grade = Grade.from_mapping(GRADE)
    assert Row.make("grade", "g1", json.loads(grade.to_json())).body == grade.to_json()


@pytest.mark.parametrize(
    ("kind", "row_id", "content", "said"),
    [
        ("guess", "g1", GRADE, "of kind 'guess'; use one of grade, preference, session"),
        ("grade", "", {**GRADE, "grade_id": ""}, "non-empty"),
        ("grade", "g2", GRADE, "'g1' as `grade_id`"),
        ("preference", "g1", GRADE, "None as `preference_id`"),
        ("grade", "g1", {**GRADE, "confidence": float("nan")}, "cannot be written as JSON"),
        ("grade", "g1", {**GRADE, "comment": b"bytes"}, "cannot be written as JSON"),
    ],
)
def test_a_row_that_could_not_be_read_back_is_refused(kind: str, row_id: str, content: dict, said: str):
    with pytest.raises(InputError, match=said):
        Row.make(kind, row_id, content)


def test_a_row_sent_again_may_differ_in_what_the_server_adds_but_not_in_what_was_said():
    row = Row.make("grade", "g1", {**GRADE, "recorded_at": "2026-01-01T00:00:00+00:00", "app_version": "1"})
    again = Row.make("grade", "g1", {**GRADE, "recorded_at": "2026-01-01T00:00:09+00:00", "app_version": "2"})
    assert row.says_the_same_as(again)
    for change in ({"verdict": "implausible"}, {"grader": "grader-2"}, {"comment": "no"}, {"supersedes": "g0"}):
        assert not row.says_the_same_as(Row.make("grade", "g1", {**GRADE, **change}))
    assert not row.says_the_same_as(Row.make("session", "g1", {"session_id": "g1", "grader": "grader-1"}))


def test_a_simulated_grade_is_no_copy_of_an_experts():
    grade = {key: value for key, value in GRADE.items() if key != "simulated"}
    row = Row.make("grade", "g1", grade)
    assert row.says_the_same_as(Row.make("grade", "g1", {**grade, "simulated": False}))
    assert not row.says_the_same_as(Row.make("grade", "g1", {**grade, "simulated": True}))


def test_a_path_names_kind_day_replica_sequence_and_content():
    content = b"{}\n"
    path = batch_path("preference", "2026-03-01", "abc", 7, content)
    assert path == f"preferences/2026-03-01-abc-000007-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
    assert batch_path("preference", "2026-03-01", "abc", 7, b"{ }\n") != path


def test_the_kind_of_a_file_is_told_by_its_folder_or_name():
    paths = ["grades/a.jsonl", "sessions/a.jsonl", "grades.parquet", "preferences/x.parquet", "README.md"]
    paths += ["data/train.parquet", "grades/.gitkeep"]
    assert [kind_of(path) for path in paths] == ["grade", "session", "grade", "preference", None, None, None]


def test_lines_that_are_no_rows_are_named_with_file_and_number():
    content = b'{"grade_id": "g1"}\n\nnot json\n[1]\n{"image_id": "i"}\n'
    with pytest.raises(InputError, match="3 of 4 rows cannot be read") as caught:
        read_batch("grades/x.jsonl", content, "grade")
    assert [line.split(":")[1] for line in str(caught.value).splitlines()[1:]] == ["3", "4", "5"]
