"""Pairwise choices: corrections count once, ties teach no order, and the winner is told whatever the side."""

from __future__ import annotations

import pytest
from datasets import load_dataset
from test_exports import preference

from pathalign.grading.exports import picture_of
from pathalign.grading.preferences import contest, preference_pairs, save_pairs, standing_preferences, tally
from pathalign.schema import InputError


def test_the_chosen_image_is_the_one_on_the_chosen_side_and_undecided_choices_give_no_pair():
    rows = [
        preference(0, "x", "y", "left"),
        preference(1, "x", "y", "right"),
        preference(2, "x", "y", "tie"),
        preference(3, "x", "y", "both_bad"),
    ]
    pairs = [(pair.preference_id, pair.chosen_id, pair.rejected_id) for pair in preference_pairs(rows)]
    assert pairs == [("p0", "x", "y"), ("p1", "y", "x")]


def test_a_correction_replaces_what_it_corrects_and_a_copy_counts_once():
    first = preference(0, "x", "y", "left")
    rows = [first, first, preference(1, "x", "y", "right", supersedes="p0"), preference(2, "y", "z", "tie")]
    assert [row.preference_id for row in standing_preferences(rows)] == ["p1", "p2"]
    (row,) = tally(rows)
    assert row.choices == {"left": 0, "right": 1, "tie": 1, "both_bad": 0}
    assert (row.left.value, row.left.n) == (0.0, 1)


def test_two_choices_of_one_id_are_refused():
    with pytest.raises(InputError, match="Preference p0 is 'left' by grader-1a2b3c4d, then 'right'"):
        standing_preferences([preference(0, "x", "y", "left"), preference(0, "x", "y", "right")])


def test_the_second_model_wins_whatever_side_it_stands_on():
    base, aligned = {"b1", "b2"}, {"a1", "a2"}
    rows = [
        preference(0, "b1", "a1", "right"),  # won
        preference(1, "a2", "b2", "left"),  # won
        preference(2, "a1", "b1", "right"),  # lost
        preference(3, "b1", "a1", "tie"),
        preference(4, "b1", "a1", "both_bad"),
        preference(5, "b1", "b2", "left"),  # not between the two
        preference(6, "other", "a1", "right"),
    ]
    found = contest(rows, base, aligned)
    assert (found.wins.value, found.wins.n, found.ties, found.both_bad) == (2 / 3, 3, 1, 1)
    # Wilson by hand: (2/3 + z2/6) / (1 + z2/3) -+ z sqrt((2/9)/3 + z2/36) / (1 + z2/3), z = 1.959964
    assert found.wins.ci == pytest.approx((0.2077, 0.9385), abs=5e-5)


def test_pairs_load_as_a_dataset_with_both_images_and_the_class(tmp_path, tiny_images):
    ids = tiny_images.image_ids
    rows = [preference(0, ids[0], ids[3], "left"), preference(1, ids[6], ids[9], "right")]
    save_pairs(preference_pairs(rows), picture_of(tiny_images), tmp_path / "out", ("a", "b", "c"), {"notice": "n"})
    found = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert found.column_names[:3] == ["chosen", "rejected", "label"]
    assert found["chosen_id"] == [ids[0], ids[9]]
    assert found["notice"] == ["n", "n"]
    assert list(found[1]["chosen"].getdata()) == list(picture_of(tiny_images)(ids[9]).getdata())
    assert found.features["label"].int2str(found[0]["label"]) == "a"


def test_pairs_of_unknown_images_or_classes_and_no_pairs_at_all_are_refused(tmp_path, tiny_images):
    picture = picture_of(tiny_images)
    known, strange = preference(0, *tiny_images.image_ids[:2], "left"), preference(1, "x", "y", "left")
    for rows, names, message in (
        ([strange], ("a",), "Image x is not in the candidate set of 48 images"),
        ([known], ("b",), r"Choices name the classes \['a'\]"),
        ([], ("a",), "No pairwise choice is decided yet"),
    ):
        with pytest.raises(InputError, match=message):
            save_pairs(preference_pairs(rows), picture, tmp_path / "out", names, {})
