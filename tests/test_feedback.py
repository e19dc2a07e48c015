"""Grades become a feedback dataset: nothing is lost, agreement is right, no image is on two sides of a split."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import bootstrap
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from pathalign import agreement
from pathalign.feedback import aggregate, assign_groups, build, collect_ratings
from pathalign.grades import current_grades, read_grades
from pathalign.images import ImageSet
from pathalign.near_duplicates import near_duplicate_groups, perceptual_hashes
from pathalign.schema import Grade, InputError, RunRecord
from pathalign.settings.feedback import FeedbackConfig

NAN = np.nan
SPLITS = ("train", "validation", "test")


def grade(grade_id: str, image_id: str = "i0", verdict: str = "plausible", grader: str = "ann", **more: Any) -> Grade:
    return Grade(grade_id=grade_id, image_id=image_id, class_label="a", verdict=verdict, grader=grader, **more)


def write(path: Path, grades: Iterable[Grade]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(item.to_json() + "\n" for item in grades))
    return path


def smooth_images(count: int, seed: int = 0) -> torch.Tensor:
    """Random blobs, shape `(count, 3, 32, 32)`, uint8; no two look alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=generator) * 255
    return torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def candidates() -> ImageSet:
    """80 images of classes a and b; images 60 to 79 are images 0 to 19 with one pixel changed by one."""
    images = smooth_images(60)
    copies = images[:20].clone()
    copies[:, :, 0, 0] ^= 1
    class_ids = torch.arange(60) % 2
    columns = {"seed": list(range(80)), "kind": ["synthetic"] * 80}
    return ImageSet.build(torch.cat([images, copies]), torch.cat([class_ids, class_ids[:20]]), ("a", "b"), columns)


@pytest.fixture
def grades(candidates: ImageSet) -> list[Grade]:
    """Three graders on all images; a third is implausible, and the third grader is sometimes of another opinion."""
    rows = []
    for index, (image_id, label) in enumerate(zip(candidates.image_ids, candidates.labels(), strict=True)):
        for number, grader in enumerate(("ann", "bob", "cem")):
            good = (index % 3 > 0) ^ (number == 2 and index % 5 == 0)
            rows.append(
                Grade(
                    grade_id=f"{grader}-{index}",
                    image_id=image_id,
                    class_label=label,
                    verdict="plausible" if good else "implausible",
                    grader=grader,
                    failed_criteria=() if good else ("nucleus_shape",) if number else ("class", "nucleus_shape"),
                )
            )
    return rows


@pytest.fixture
def workplace(tmp_path: Path, candidates: ImageSet) -> Path:
    candidates.save(tmp_path / "candidates")
    return tmp_path


def config_for(workplace: Path, grades: Iterable[Grade], **options: Any) -> FeedbackConfig:
    path = write(workplace / "grades" / "grades.jsonl", grades)
    options = {"bootstrap_samples": 100, **options}
    return FeedbackConfig(candidates=str(workplace / "candidates"), grades=str(path.parent), **options)


def all_splits(folder: Path) -> dict[str, ImageSet]:
    return {name: ImageSet.load(folder, name) for name in SPLITS}


def rows_by_id(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        image_id: {name: values[row] for name, values in part.columns.items()}
        for part in all_splits(folder).values()
        for row, image_id in enumerate(part.image_ids)
    }


# Agreement against published examples


def ratings_of(table: list[list[int]]) -> np.ndarray:
    """Any raters that give the counts of `table`, shape (images, values)."""
    return np.array([np.repeat(np.arange(len(row)), row) for row in table], dtype=float).T


def test_alpha_equals_krippendorffs_published_example_with_missing_ratings():
    # Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, nominal alpha 0.743.
    ratings = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
            [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
        ]
    )
    result = agreement.alpha(ratings, 100, 0)
    assert result.value == pytest.approx(0.743, abs=5e-4)
    assert result.n == 11  # the last image has one rating: nothing to agree with


def test_fleiss_kappa_equals_the_published_example():
    # Wikipedia, "Fleiss' kappa": fourteen raters, ten subjects, five categories, kappa 0.210.
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert agreement.fleiss(ratings_of(table), 100, 0).value == pytest.approx(0.210, abs=5e-4)


def test_cohens_kappa_equals_the_published_example():
    # Wikipedia, "Cohen's kappa": 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no, kappa 0.4.
    first = np.repeat([1.0, 1.0, 0.0, 0.0], [20, 5, 10, 15])
    second = np.repeat([1.0, 0.0, 1.0, 0.0], [20, 5, 10, 15])
    assert agreement.cohen(first, second, 100, 0).value == pytest.approx(0.4, abs=1e-9)


@pytest.fixture(scope="module")
def noisy_ratings() -> np.ndarray:
    generator = np.random.default_rng(3)
    truth = generator.integers(0, 3, 300)
    ratings = np.stack([np.where(generator.random(300) < 0.8, truth, generator.integers(0, 3, 300)) for _ in range(3)])
    return np.where(generator.random(ratings.shape) < 0.2, NAN, ratings)


def test_alpha_equals_its_definition_by_pairs_of_ratings(noisy_ratings):
    observed, expected = [], []
    units = [unit[~np.isnan(unit)] for unit in noisy_ratings.T]
    units = [unit for unit in units if len(unit) > 1]
    for unit in units:  # each ordered pair within a unit weighs 1 / (ratings - 1)
        observed += [(a != b) / (len(unit) - 1) for a, b in permutations(unit, 2)]
    pool = np.concatenate(units)
    shares = [np.sum(pool == value) for value in range(3)]
    expected = 1 - sum(s * (s - 1) for s in shares) / (len(pool) * (len(pool) - 1))
    assert agreement.alpha(noisy_ratings, 100, 0).value == pytest.approx(
        1 - sum(observed) / len(pool) / expected, abs=1e-6
    )


def test_cohens_kappa_equals_scikit_learns_on_the_images_that_both_rated(noisy_ratings):
    result = agreement.pairwise_cohen(noisy_ratings, ("x", "y", "z"), 100, 0)
    assert list(result) == [("x", "y"), ("x", "z"), ("y", "z")]
    first, _, second = noisy_ratings
    both = ~np.isnan(first) & ~np.isnan(second)
    assert result["x", "z"].value == pytest.approx(cohen_kappa_score(first[both], second[both]), abs=1e-6)
    assert result["x", "z"].n == both.sum()


def test_fleiss_kappa_rests_on_the_images_with_the_most_common_number_of_ratings(noisy_ratings):
    complete = noisy_ratings[:, ~np.isnan(noisy_ratings).any(axis=0)]
    result = agreement.fleiss(noisy_ratings, 100, 0)
    assert result.value == pytest.approx(fleiss_kappa(aggregate_raters(complete.T)[0]), abs=1e-6)
    assert result.n == complete.shape[1]


def test_intervals_equal_scipys_percentile_bootstrap(noisy_ratings):
    both = ~np.isnan(noisy_ratings[:2]).any(axis=0)
    first, second = noisy_ratings[:2, both]

    def kappa(one: np.ndarray, other: np.ndarray) -> float:
        chance = sum(np.mean(one == value) * np.mean(other == value) for value in range(3))
        return (np.mean(one == other) - chance) / (1 - chance)

    reference = bootstrap(
        (first, second), kappa, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=5
    ).confidence_interval
    low, high = agreement.cohen(first, second, 2000, 0).ci
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.015)


@pytest.mark.parametrize("ratings", [[[0, 1, 1, 0]], [[1, 1, 1], [1, 1, 1]], [[0, 1, NAN, NAN], [NAN, NAN, 0, 1]]])
def test_agreement_is_not_measured_for_one_grader_one_value_or_no_shared_image(ratings):
    table = np.array(ratings, dtype=float)
    assert agreement.alpha(table, 100, 0).value is None
    assert agreement.fleiss(table, 100, 0).value is None
    assert all(
        item.value is None and item.ci is None
        for item in agreement.pairwise_cohen(table, "xy"[: len(table)], 100, 0).values()
    )


# Which grades stand


def test_a_grade_sent_twice_counts_once():
    current = current_grades([grade("1"), grade("2", "i1"), grade("1", recorded_at="2026-01-01T00:00:00Z")])
    assert [item.grade_id for item in current.grades] == ["1", "2"]
    assert current.duplicates == 1


def test_a_chain_of_corrections_leaves_the_last_in_whatever_order_it_is_read():
    chain = [
        grade("1"),
        grade("2", verdict="unsure", supersedes="1"),
        grade("3", verdict="implausible", supersedes="2"),
    ]
    for order in permutations(chain):
        current = current_grades(order)
        assert [item.grade_id for item in current.grades] == ["3"]
        assert current.superseded == 2


def test_a_correction_of_a_grade_that_is_not_at_hand_stands():
    assert [item.grade_id for item in current_grades([grade("2", supersedes="lost")]).grades] == ["2"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([grade("1", supersedes="2"), grade("2", supersedes="1")], "circle"),
        ([grade("1", supersedes="1")], "circle"),
        ([grade("1"), grade("2", grader="bob", supersedes="1")], "own grade of the same image"),
        ([grade("1"), grade("2", "i1", supersedes="1")], "own grade of the same image"),
        ([grade("1"), grade("1", verdict="implausible")], "ids stand for different grades"),
    ],
)
def test_contradictory_grades_are_refused_by_name(rows, message):
    with pytest.raises(InputError, match=message) as caught:
        current_grades(rows)
    assert "- 1" in str(caught.value) or "- 2" in str(caught.value)


def test_the_later_of_two_grades_counts_even_if_it_is_read_first():
    late = grade("late", verdict="implausible", recorded_at="2026-02-01T12:00:00Z")
    early = grade("early", recorded_at="2026-02-01T13:30:00+02:00")  # half past eleven in UTC
    ratings = collect_ratings(current_grades([late, early]).grades, ("i0",), "drop")
    assert ratings.scores.tolist() == [[0.0]]
    assert ratings.earlier.tolist() == [[1.0]]


def test_unreadable_lines_are_reported_together_with_file_and_line(tmp_path):
    good = grade("1").to_json()
    verdict = good.replace('"plausible"', '"maybe"')
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{{broken\n[1]\n{verdict}\n")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_bytes(
        b'{"grade_id": "2"}\n\xff\xfe\n' + good.replace('"recorded_at": ""', '"recorded_at": "today"').encode()
    )
    with pytest.raises(InputError) as caught:
        read_grades(tmp_path)
    message = str(caught.value)
    assert message.startswith("6 of 7 grades cannot be read")
    for place in ("a.jsonl:3:", "a.jsonl:4:", "a.jsonl:5:", "b.jsonl:1:", "b.jsonl:2:"):
        assert place in message
    assert "and 1 more" in message


def test_shards_below_a_folder_are_read_together(tmp_path):
    write(tmp_path / "x" / "1.jsonl", [grade("1", comment="one\u2028line")])
    write(tmp_path / "y" / "1.jsonl", [grade("2")])
    assert [item.grade_id for item in read_grades(tmp_path)] == ["1", "2"]
    assert [item.grade_id for item in read_grades(tmp_path / "y" / "1.jsonl")] == ["2"]


@pytest.mark.parametrize("content", [None, "", "\n\n"])
def test_no_grades_are_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "grades.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"no grades in [01] \.jsonl files"):
        read_grades(tmp_path)
    with pytest.raises(InputError, match="There are no grades at"):
        read_grades(tmp_path / "missing")


# One label from several graders


def test_unsure_is_dropped_or_counts_half():
    rows = [grade("1"), grade("2", verdict="unsure", grader="bob"), grade("3", "i1", verdict="unsure")]
    dropped = collect_ratings(rows, ("i0", "i1"), "drop")
    np.testing.assert_array_equal(aggregate(dropped, "majority"), [1.0, NAN])
    half = collect_ratings(rows, ("i0", "i1"), "half")
    np.testing.assert_array_equal(aggregate(half, "majority"), [0.75, 0.5])


def test_a_grader_who_becomes_unsure_takes_the_earlier_verdict_back():
    ratings = collect_ratings([grade("1"), grade("2", verdict="unsure")], ("i0",), "drop")
    assert np.isnan(ratings.scores).all()


def graded_by(reliabilities: list[float], n_images: int, seed: int) -> tuple[list[Grade], list[str], np.ndarray]:
    generator = np.random.default_rng(seed)
    truth = generator.random(n_images) < 0.6
    names = [f"i{index}" for index in range(n_images)]
    rows = [
        grade(f"{g}-{i}", names[i], "plausible" if truth[i] == (generator.random() < right) else "implausible", f"g{g}")
        for g, right in enumerate(reliabilities)
        for i in range(n_images)
    ]
    return rows, names, truth


def test_dawid_skene_finds_the_truth_where_a_grader_who_mixes_up_the_buttons_outvotes_the_others():
    rows, names, truth = graded_by([0.9, 0.85, 0.1], 400, seed=1)
    ratings = collect_ratings(rows, names, "drop")
    right = {method: np.mean((aggregate(ratings, method) > 0.5) == truth) for method in ("majority", "dawid-skene")}
    assert right["majority"] < 0.9
    assert right["dawid-skene"] > 0.93


def test_dawid_skene_equals_the_posterior_of_its_own_model():
    # Bayes' rule with the error rates that generated the grades; the estimated rates differ by sampling only.
    reliabilities = [0.9, 0.8, 0.7]
    rows, names, _ = graded_by(reliabilities, 1500, seed=2)
    ratings = collect_ratings(rows, names, "drop")
    right = np.array(reliabilities)[:, None]
    yes = 0.6 * np.where(ratings.scores == 1, right, 1 - right).prod(axis=0)
    no = 0.4 * np.where(ratings.scores == 0, right, 1 - right).prod(axis=0)
    difference = np.abs(aggregate(ratings, "dawid-skene") - yes / (yes + no))
    assert difference.mean() < 0.04


def test_dawid_skene_takes_unsure_as_half():
    rows, names, _ = graded_by([0.9, 0.9, 0.9], 60, seed=0)
    rows = [replace(row, verdict="unsure") if row.image_id == "i0" else row for row in rows]
    assert aggregate(collect_ratings(rows, names, "half"), "dawid-skene")[0] == pytest.approx(0.5, abs=0.05)


def test_dawid_skene_needs_three_graders():
    rows, names, _ = graded_by([0.9, 0.9], 5, seed=0)
    with pytest.raises(InputError, match="needs three graders"):
        aggregate(collect_ratings(rows, names, "drop"), "dawid-skene")


# The whole stage


def test_the_dataset_holds_each_graded_image_once_with_its_shares(workplace, candidates, grades):
    record = build(config_for(workplace, grades), workplace / "feedback")
    rows = rows_by_id(workplace / "feedback")
    assert sum(len(part) for part in all_splits(workplace / "feedback").values()) == 80
    assert set(rows) == set(candidates.image_ids)
    assert rows[candidates.image_ids[0]] == {  # implausible; the third grader dissents
        "plausible": pytest.approx(1 / 3),
        "majority": False,
        "n_grades": 3,
        "failed_class": pytest.approx(1 / 3),
        "failed_nucleus_shape": pytest.approx(2 / 3),
        "seed": 0,
        "kind": "synthetic",
    }
    assert rows[candidates.image_ids[1]]["plausible"] == 1.0
    assert RunRecord.load(workplace / "feedback").metrics == json.loads(json.dumps(record.metrics))
    assert record.metrics["n"] == 80
    assert record.metrics["simulated"] is False


def test_no_image_and_no_near_duplicate_crosses_splits(workplace, candidates, grades):
    build(config_for(workplace, grades), workplace / "feedback")
    place = {id: name for name, part in all_splits(workplace / "feedback").items() for id in part.image_ids}
    hashes = [imagehash.phash(Image.fromarray(image)) for image in candidates.images.permute(0, 2, 3, 1).numpy()]
    near = [(i, j) for i in range(80) for j in range(i) if hashes[i] - hashes[j] <= 2]
    assert len(near) == 20
    assert all(place[candidates.image_ids[i]] == place[candidates.image_ids[j]] for i, j in near)


def test_splits_have_their_shares_and_both_verdicts(workplace, grades):
    record = build(config_for(workplace, grades), workplace / "feedback")
    counts = record.metrics["splits"]
    assert [counts[name]["n"] for name in SPLITS] == [pytest.approx(n, abs=2) for n in (52, 12, 16)]
    for name in SPLITS:
        assert counts[name]["plausible"] / counts[name]["n"] == pytest.approx(2 / 3, abs=0.12)


def test_the_same_seed_gives_the_same_dataset_whatever_the_order_of_the_grades(workplace, grades):
    build(config_for(workplace, grades), workplace / "one")
    build(config_for(workplace, grades[::-1]), workplace / "two")
    build(config_for(workplace, grades, seed=1), workplace / "three")
    one, two, three = (all_splits(workplace / name) for name in ("one", "two", "three"))
    assert all(one[name].image_ids == two[name].image_ids and one[name].columns == two[name].columns for name in SPLITS)
    assert (workplace / "one" / "agreement.json").read_text() == (workplace / "two" / "agreement.json").read_text()
    assert one["test"].image_ids != three["test"].image_ids


def test_agreement_is_written_with_intervals_and_says_if_it_is_simulated(workplace, grades):
    grades[0] = replace(grades[0], simulated=True)
    record = build(config_for(workplace, grades), workplace / "feedback")
    report = json.loads((workplace / "feedback" / "agreement.json").read_text())
    assert report["simulated"] is record.metrics["simulated"] is True
    assert report["simulated_share"] == pytest.approx(1 / 240)
    assert (report["n_grades"], report["n_graders"], report["n_images"]) == (240, 3, 80)
    first_two, *others = report["cohen_kappa"]
    assert first_two["graders"] == ["ann", "bob"] and first_two["value"] == pytest.approx(1.0)
    assert all(item["ci"][0] < item["value"] < item["ci"][1] < 1 for item in others)
    assert report["fleiss_kappa"]["ci"][0] < report["krippendorff_alpha"]["value"] < report["fleiss_kappa"]["ci"][1]
    assert report["graders"]["ann"]["plausible_share"] == pytest.approx(53 / 80)
    assert report["graders"]["ann"]["intra_rater_kappa"] == {"value": None, "ci": None, "n": 0}


def test_a_subtype_is_what_most_of_those_who_marked_one_agree_on(workplace, grades):
    marks = {
        ("ann", 1): "band",
        ("bob", 1): "band",
        ("cem", 1): "segmented",
        ("ann", 2): "band",
        ("bob", 2): "segmented",
    }
    marks |= {("cem", 4): " segmented "}
    rows = [replace(row, subtype=marks.get((row.grader, int(row.grade_id.split("-")[1])))) for row in grades]
    second = replace(
        rows[3], grade_id="again", subtype="segmented", recorded_at="2026-03-01T10:00:00Z"
    )  # ann's of image 1
    record = build(config_for(workplace, rows), workplace / "feedback")
    assert record.metrics["subtype_marks"] == 2
    found = {image_id: row["subtype"] for image_id, row in rows_by_id(workplace / "feedback").items()}
    ids = ImageSet.load(workplace / "candidates").image_ids
    assert {name: mark for name, mark in found.items() if mark} == {ids[1]: "band", ids[4]: "segmented"}
    build(config_for(workplace, [*rows, second]), workplace / "again")
    assert rows_by_id(workplace / "again")[ids[1]]["subtype"] == "segmented"


def test_a_second_look_measures_the_grader_and_replaces_the_first(workplace, grades):
    second = [
        replace(row, grade_id=f"again-{row.grade_id}", recorded_at="2026-03-01T10:00:00Z")
        for row in grades
        if row.grader == "ann"
    ][:40]
    second[0] = replace(second[0], verdict="plausible", failed_criteria=())
    build(config_for(workplace, grades + second), workplace / "feedback")
    kappa = json.loads((workplace / "feedback" / "agreement.json").read_text())["graders"]["ann"]["intra_rater_kappa"]
    first = [row.verdict for row in grades if row.grader == "ann"][:40]
    assert kappa["n"] == 40
    assert kappa["value"] == pytest.approx(cohen_kappa_score(first, [row.verdict for row in second]), abs=1e-6)
    assert rows_by_id(workplace / "feedback")[second[0].image_id]["plausible"] == pytest.approx(2 / 3)


def test_real_controls_are_counted_apart_and_are_no_feedback(workplace, candidates, grades):
    kinds = ["real control" if index < 10 else "synthetic" for index in range(80)]
    replace(candidates, columns={**candidates.columns, "kind": kinds}).save(workplace / "candidates")
    build(config_for(workplace, grades), workplace / "feedback")
    assert set(rows_by_id(workplace / "feedback")) == set(candidates.image_ids[10:])
    report = json.loads((workplace / "feedback" / "agreement.json").read_text())
    assert report["real_controls"] == {"n": 10, "plausible_share": pytest.approx(0.6)}


def test_images_with_too_few_grades_are_left_out(workplace, candidates, grades):
    build(config_for(workplace, grades[2:], min_grades_per_image=3), workplace / "feedback")
    assert set(rows_by_id(workplace / "feedback")) == set(candidates.image_ids[1:])


def test_an_image_that_is_listed_twice_for_a_repeat_is_in_the_dataset_once(workplace, candidates, grades):
    twice = candidates.select([*range(80), 5])
    twice.columns["kind"][-1] = "repeat"
    twice.save(workplace / "candidates")
    build(config_for(workplace, grades), workplace / "feedback")
    assert sum(len(part) for part in all_splits(workplace / "feedback").values()) == 80


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (
            {"image_id": "nowhere"},
            {},
            "1 graded images are not in the candidate set of 80 images: nowhere",
        ),
        ({"class_label": "z"}, {}, "Grades name the classes z; the candidate set has a, b"),
        ({"class_label": "a"}, {}, "grades name another class than their image was made for"),
        ({"verdict": "plausible"}, {}, "all of them come out plausible"),
        ({"verdict": "unsure"}, {}, "Of 80 graded images 0 have 1 or more counted grades"),
        ({}, {"min_grades_per_image": 4}, "Of 80 graded images 0 have 4 or more counted grades"),
    ],
)
def test_grades_that_no_model_can_learn_from_are_refused_and_nothing_is_written(
    workplace, grades, change, options, message
):
    config = config_for(workplace, [replace(row, **change) for row in grades], **options)
    with pytest.raises(InputError, match=message):
        build(config, workplace / "feedback")
    assert sorted(path.name for path in workplace.iterdir()) == ["candidates", "grades"]


def test_too_few_images_for_three_splits_are_refused(workplace, grades):
    two_images = [replace(row, failed_criteria=()) for row in grades[:6]]
    with pytest.raises(InputError, match="train split would hold 1 of 2 graded images, all of one verdict"):
        build(config_for(workplace, two_images), workplace / "feedback")


def test_all_wrong_settings_are_named_together():
    with pytest.raises(InputError) as caught:
        FeedbackConfig(unsure="dorp", min_grades_per_image=0, test_share=0.9)
    assert "Did you mean 'drop'" in str(caught.value)
    assert "min_grades_per_image" in str(caught.value) and "test_share" in str(caught.value)
    with pytest.raises(InputError, match=r"add up to 1\.00"):
        FeedbackConfig(validation_share=0.5, test_share=0.5)


# Splits and near-duplicates alone


def test_near_duplicates_are_grouped_through_chains_and_counted_in_bits():
    hashes = np.array([0b0000, 0b0011, 0b1111, 1 << 63, (1 << 63) | 1], dtype=np.uint64)
    assert near_duplicate_groups(hashes, 0).tolist() == [0, 1, 2, 3, 4]
    assert near_duplicate_groups(hashes, 1).tolist() == [0, 1, 2, 0, 0]  # 0000 - 1<<63 - (1<<63)+1
    assert near_duplicate_groups(hashes, 2).tolist() == [0, 0, 0, 0, 0]
    assert near_duplicate_groups(hashes[:0], 2).tolist() == []


def test_grouping_many_images_equals_all_pairwise_distances():
    hashes = np.random.default_rng(0).integers(0, 2**12, 1500, dtype=np.uint64)
    groups = near_duplicate_groups(hashes, 0)
    np.testing.assert_array_equal(groups[:, None] == groups, hashes[:, None] == hashes)
    assert groups[0] == 0 and len(set(groups.tolist())) == len(np.unique(hashes))


def test_hashes_differ_by_as_many_bits_as_imagehash_says():
    pictures = [Image.fromarray(image) for image in smooth_images(6, seed=1).permute(0, 2, 3, 1).numpy()]
    hashes = perceptual_hashes(pictures)
    expected = [[imagehash.phash(a) - imagehash.phash(b) for a in pictures] for b in pictures]
    np.testing.assert_array_equal(np.bitwise_count(hashes[:, None] ^ hashes), expected)


def test_groups_are_dealt_out_in_their_shares_and_never_torn():
    groups = np.random.default_rng(0).integers(0, 150, 300)
    strata = [int(group) % 5 for group in groups]
    assigned = assign_groups(groups, strata, [0.65, 0.15, 0.2], seed=0)
    assert all(len(set(assigned[groups == group])) == 1 for group in set(groups.tolist()))
    assert np.bincount(assigned) / 300 == pytest.approx([0.65, 0.15, 0.2], abs=0.02)
    for stratum in range(5):
        inside = assigned[np.array(strata) == stratum]
        assert np.bincount(inside) / len(inside) == pytest.approx([0.65, 0.15, 0.2], abs=0.08)


def test_a_thousand_images_by_three_graders_take_seconds():
    ratings = np.random.default_rng(0).integers(0, 2, (3, 1000)).astype(float)
    started = time.process_time()
    (
        agreement.alpha(ratings, 500, 0),
        agreement.fleiss(ratings, 500, 0),
        agreement.pairwise_cohen(ratings, "xyz", 500, 0),
    )
    assert time.process_time() - started < 5
