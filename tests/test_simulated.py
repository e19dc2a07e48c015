"""The simulated grader: what it accepts, what it refuses, and grades that are known as simulated."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pathalign import phantom
from pathalign.data import prepare
from pathalign.grading.corruptions import corrupt
from pathalign.grading.fitting import fit
from pathalign.grading.simulated import SimulatedGrader, acceptance, class_ids_for, grade
from pathalign.images import ImageSet
from pathalign.schema import InputError, RunRecord
from pathalign.settings.data import DataConfig
from pathalign.settings.grade import GradeConfig
from pathalign.settings.graders import GraderConfig

UNSEEN_SEED = 99
WIDE = 4.0  # standard deviations that a count may lie off: about one run in 16 000


def save_splits(folder: Path, per_class: int, held_out: int, size: int = 32) -> Path:
    """Phantom images for the grader: `per_class` to fit on, `held_out` to calibrate on."""
    drawn = phantom.draw(per_class + held_out, size)
    place = torch.arange(len(drawn)) % (per_class + held_out)
    drawn.select(place < per_class).save(folder, "grader")
    drawn.select(place >= per_class).save(folder, "grader_validation")
    return folder


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """Folder of a grader that has seen 60 phantom cells of each class."""
    folder = tmp_path_factory.mktemp("fitted")
    data = save_splits(folder / "data", 60, 30)
    fit(GraderConfig(data=str(data), steps=110, batch_size=48), folder / "grader")
    return folder / "grader"


@pytest.fixture(scope="module")
def grader(fitted) -> SimulatedGrader:
    return SimulatedGrader.load(fitted)


@pytest.fixture(scope="module")
def unseen() -> ImageSet:
    return phantom.draw(30, seed=UNSEEN_SEED)


@pytest.fixture(scope="module")
def candidates(unseen, tmp_path_factory) -> Path:
    """Unseen cells, every second one under a wrong label."""
    folder = tmp_path_factory.mktemp("candidates")
    wrong = (torch.arange(len(unseen)) % 2) * (1 + torch.arange(len(unseen)) % 4)
    replace(unseen, class_ids=(unseen.class_ids + wrong) % 5, columns={}).save(folder)
    return folder


@pytest.fixture(scope="module")
def fading(unseen, tmp_path_factory) -> Path:
    """Unseen cells in four steps towards plain grey: images of every plausibility, not only good and bad ones."""
    folder = tmp_path_factory.mktemp("fading")
    strengths = [1.0, 0.85, 0.7, 0.55]
    images = torch.cat([128 + strength * (unseen.images.float() - 128) for strength in strengths]).round().byte()
    ImageSet.build(images, unseen.class_ids.repeat(len(strengths)), unseen.class_names).save(folder)
    return folder


def grades_of(candidates: Path, grader: Path, folder: Path, **settings) -> list[dict]:
    grade(GradeConfig(candidates=str(candidates), grader=str(grader), **settings), folder)
    return [json.loads(line) for line in (folder / "grades.jsonl").read_text().splitlines()]


def plausible_share(rows: list[dict]) -> float:
    return sum(row["verdict"] == "plausible" for row in rows) / len(rows)


def test_unseen_cells_pass_under_their_own_name_and_hardly_ever_under_another(grader, unseen):
    result = acceptance(grader, unseen)
    assert result["n"] == 150
    assert result["accepts_real"] >= 0.6
    assert result["accepts_mislabelled"] <= 0.1
    assert result["class_accuracy"] >= 0.85  # chance is 0.2


def test_malformed_cells_are_refused_more_often_than_whole_ones(grader, unseen):
    generator = torch.Generator().manual_seed(0)
    partners = unseen.images.view(5, 30, 3, 32, 32).roll(1, dims=1).flatten(0, 1)
    malformed = corrupt(unseen.pixel_values(), partners.float() / 127.5 - 1, generator)
    assert malformed.shape == unseen.images.shape and malformed.isfinite().all()
    whole = grader.judge_set(unseen).plausible.float().mean()
    torn = grader.judge(malformed, unseen.class_ids).plausible.float().mean()
    assert torn <= whole - 0.3


def test_malforming_follows_its_generator_and_changes_every_image(unseen):
    pixels = unseen.pixel_values()
    partners = pixels.roll(1, dims=0)
    first, second = (corrupt(pixels, partners, torch.Generator().manual_seed(7)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert ((first - pixels).abs().flatten(1).amax(dim=1) > 0.01).all()


def test_a_judgement_names_class_checklist_typicality_and_structure(grader, unseen):
    judgement = grader.judge_set(unseen)
    rubric = [criterion.name for criterion in grader.rubric_criteria]
    assert len(rubric) == 9
    assert judgement.criteria == ("class", *rubric, "typicality", "structure")
    probabilities = judgement.probabilities
    assert probabilities.shape == (150, 12) and ((probabilities >= 0) & (probabilities <= 1)).all()
    torch.testing.assert_close(judgement.plausibility, probabilities.min(dim=1).values, rtol=0, atol=0)
    assert torch.equal(judgement.plausible, ~judgement.failed.any(dim=1))


def test_classes_are_matched_by_name_whatever_their_order(grader, unseen):
    names = tuple(reversed(unseen.class_names))
    turned = replace(unseen, class_names=names, class_ids=4 - unseen.class_ids)
    assert turned.labels() == unseen.labels()
    expected = grader.judge_set(unseen).probabilities
    torch.testing.assert_close(grader.judge_set(turned).probabilities, expected, rtol=0, atol=0)


def test_a_class_that_the_grader_does_not_know_is_refused(grader, unseen):
    other = replace(unseen, class_names=("basophil", "eosinophil", "lymphocyte", "monocyte", "blast"))
    with pytest.raises(InputError, match=r"\['blast'\] are not among"):
        class_ids_for(other, grader.class_names)


def test_one_image_is_judged_the_same_alone_and_in_company(grader, unseen):
    together = grader.judge(unseen.pixel_values(), unseen.class_ids).probabilities[:3]
    alone = grader.judge(unseen.pixel_values()[:3], unseen.class_ids[:3]).probabilities
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)


def test_a_grader_judges_the_same_after_it_was_saved_and_loaded(grader, unseen, tmp_path):
    grader.save_pretrained(tmp_path)
    again = SimulatedGrader.load(tmp_path)
    assert not again.training and again.rubric_version == grader.rubric_version == "white blood cells 1"
    expected = grader.judge_set(unseen).probabilities
    torch.testing.assert_close(again.judge_set(unseen).probabilities, expected, rtol=0, atol=0)


def test_a_grader_with_a_missing_weight_is_refused(grader, tmp_path):
    grader.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("feature_mean")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="damaged simulated grader"):
        SimulatedGrader.load(tmp_path)


def test_a_folder_without_a_grader_is_refused(candidates, tmp_path):
    with pytest.raises(InputError, match="holds no simulated grader; make one with `pathalign grade fit`"):
        grade(GradeConfig(candidates=str(candidates), grader=str(tmp_path)), tmp_path / "grades")
    assert not (tmp_path / "grades").exists()


@pytest.mark.parametrize("architecture", ["resnet", "regnet"])
def test_fitting_is_repeatable_and_works_on_small_images(architecture, tmp_path):
    data = save_splits(tmp_path / "data", 4, 3, size=16)
    config = GraderConfig(data=str(data), architecture=architecture, steps=2, batch_size=4)
    state = torch.random.get_rng_state()
    for name in ("first", "second"):
        fit(config, tmp_path / name)
    assert torch.equal(torch.random.get_rng_state(), state)
    contents = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert contents[0] == contents[1]
    assert all(values.isfinite().all() for values in load_file(tmp_path / "first" / "model.safetensors").values())
    assert RunRecord.load(tmp_path / "first").metrics["n"] == 15


def test_data_without_the_attributes_of_the_checklist_is_refused(tmp_path):
    for split in ("grader", "grader_validation"):
        drawn = phantom.draw(2, 16)
        replace(drawn, columns={"cell_size": drawn.columns["cell_size"]}).save(tmp_path, split)
    with pytest.raises(InputError, match=r"lacks the attribute columns \['chromatin_density', .*another `rubric`"):
        fit(GraderConfig(data=str(tmp_path), steps=1), tmp_path / "grader")
    assert not (tmp_path / "grader").exists()


def test_a_checklist_that_cannot_be_simulated_is_refused_before_training(tmp_path):
    data = save_splits(tmp_path / "data", 2, 2, size=16)
    rubric = tmp_path / "rubric.yaml"
    rubric.write_text("name: mine\nversion: 1\ncriteria: [{name: beauty, question: Is it beautiful}]\n")
    with pytest.raises(InputError, match=r"\['beauty'\] of the checklist 'mine' have no `attribute`"):
        fit(GraderConfig(data=str(data), rubric=str(rubric), steps=10**6), tmp_path / "grader")


def test_every_grade_says_that_it_is_simulated(candidates, fitted, tmp_path):
    rows = grades_of(candidates, fitted, tmp_path / "grades", graders=2, unsure_margin=0.2, flip_rate=0.1)
    assert len(rows) == 300 and all(row["simulated"] is True for row in rows)
    assert Counter(row["grader"] for row in rows) == {"simulated-1": 150, "simulated-2": 150}
    assert {row["rubric_version"] for row in rows} == {"white blood cells 1"}
    assert all(0 <= row["confidence"] <= 1 for row in rows)
    assert RunRecord.load(tmp_path / "grades").metrics["simulated"] is True


def test_criteria_fail_only_where_the_verdict_is_implausible(candidates, fitted, tmp_path):
    rows = grades_of(candidates, fitted, tmp_path / "grades", unsure_margin=0.1)
    assert {row["verdict"] for row in rows} >= {"plausible", "implausible"}
    assert all(bool(row["failed_criteria"]) == (row["verdict"] == "implausible") for row in rows)


def test_without_noise_verdicts_are_the_graders_own(candidates, fitted, grader, tmp_path):
    rows = grades_of(candidates, fitted, tmp_path / "grades")
    expected = grader.judge_set(ImageSet.load(candidates)).plausible.tolist()
    assert [row["verdict"] == "plausible" for row in rows] == expected


def test_grade_ids_repeat_with_the_seed_and_are_unique_even_for_an_image_shown_twice(candidates, fitted, tmp_path):
    shown = ImageSet.load(candidates)
    shown.select([*range(len(shown)), 0, 0]).save(tmp_path / "twice")
    settings = {"graders": 2, "flip_rate": 0.2, "threshold_spread": 1.0, "seed": 5}
    first = grades_of(tmp_path / "twice", fitted, tmp_path / "first", **settings)
    assert grades_of(tmp_path / "twice", fitted, tmp_path / "again", **settings) == first
    assert len({row["grade_id"] for row in first}) == len(first) == 304
    other = grades_of(tmp_path / "twice", fitted, tmp_path / "other", **settings | {"seed": 6})
    assert not {row["grade_id"] for row in first} & {row["grade_id"] for row in other}


def test_a_flip_rate_of_one_half_leaves_no_more_than_chance(candidates, fitted, tmp_path):
    own = grades_of(candidates, fitted, tmp_path / "own")
    noisy = grades_of(candidates, fitted, tmp_path / "noisy", flip_rate=0.5, graders=4)
    agreeing = sum(row["verdict"] == own[index % 150]["verdict"] for index, row in enumerate(noisy))
    assert abs(agreeing - 300) <= WIDE * (600 / 4) ** 0.5


def test_only_faulty_graders_flip_and_lean(candidates, fitted, tmp_path):
    own = [row["verdict"] for row in grades_of(candidates, fitted, tmp_path / "own")]
    settings = {"graders": 3, "faulty_graders": 1, "flip_rate": 0.3, "bias": -2.0}
    rows = grades_of(candidates, fitted, tmp_path / "three", **settings)
    verdicts = {name: [row["verdict"] for row in rows if row["grader"] == f"simulated-{name}"] for name in (1, 2, 3)}
    assert verdicts[1] == verdicts[2] == own
    assert verdicts[3] != own
    with pytest.raises(InputError, match="`faulty_graders` is 4, but there are 3 `graders`"):
        GradeConfig(graders=3, faulty_graders=4)


def test_a_flip_rate_turns_about_that_share_round(candidates, fitted, tmp_path):
    own = grades_of(candidates, fitted, tmp_path / "own")
    noisy = grades_of(candidates, fitted, tmp_path / "noisy", flip_rate=0.1, graders=4)
    turned = sum(row["verdict"] != own[index % 150]["verdict"] for index, row in enumerate(noisy))
    assert abs(turned - 60) <= WIDE * (600 * 0.1 * 0.9) ** 0.5


def test_a_bias_makes_graders_lenient_or_strict(candidates, fitted, tmp_path):
    shares = [
        plausible_share(grades_of(candidates, fitted, tmp_path / f"{bias}", bias=bias)) for bias in (-3.0, 0.0, 3.0)
    ]
    assert shares[0] < shares[1] < shares[2]


def accepted_by_grader(rows: list[dict]) -> list[set[str]]:
    """Ids of the images that each grader finds plausible, strictest grader first."""
    accepted: dict[str, set[str]] = {row["grader"]: set() for row in rows}
    for row in rows:
        if row["verdict"] == "plausible":
            accepted[row["grader"]].add(row["image_id"])
    return sorted(accepted.values(), key=len)


def test_graders_without_thresholds_of_their_own_accept_the_same(candidates, fitted, tmp_path):
    first, second, third = accepted_by_grader(grades_of(candidates, fitted, tmp_path / "grades", graders=3))
    assert first == second == third != set()


def test_graders_with_their_own_thresholds_differ_and_are_nested(fading, fitted, tmp_path):
    # the bias puts the thresholds where images of every plausibility lie
    rows = grades_of(fading, fitted, tmp_path / "grades", graders=3, threshold_spread=2.0, bias=2.0)
    strict, medium, lenient = accepted_by_grader(rows)
    assert strict < medium < lenient  # proper subsets: one threshold is stricter than another, for all images


def test_probabilities_near_the_threshold_are_called_unsure(candidates, fitted, grader, tmp_path):
    rows = grades_of(candidates, fitted, tmp_path / "grades", unsure_margin=0.25)
    plausibility = grader.judge_set(ImageSet.load(candidates)).plausibility
    near = ((plausibility - 0.5).abs() < 0.25).tolist()
    assert 0 < sum(near) < len(rows)
    assert [row["verdict"] == "unsure" for row in rows] == near


@pytest.mark.slow
def test_on_real_cells_grader_and_judge_accept_true_labels_only_and_share_no_images(real_data, tmp_path):
    config = DataConfig(source=str(real_data), image_size_px=32, roles=True, per_class=128)
    prepare(config, tmp_path / "data")
    test = ImageSet.load(tmp_path / "data", "test")
    seen = {name: set(ImageSet.load(tmp_path / "data", name).image_ids) for name in ("train", "grader", "judge")}
    assert not seen["grader"] & seen["judge"] and not seen["train"] & (seen["grader"] | seen["judge"])
    assert not set(test.image_ids) & set.union(*seen.values())
    for role, architecture in (("grader", "resnet"), ("judge", "regnet")):
        fit(GraderConfig(data=str(tmp_path / "data"), role=role, architecture=architecture), tmp_path / role)
        result = acceptance(SimulatedGrader.load(tmp_path / role), test)
        assert result["n"] >= 500
        assert result["accepts_real"] >= 0.85, role
        assert result["accepts_mislabelled"] <= 0.05, role


SHAPES = ["neutrophil:nucleus_shape:band=unsegmented-band"]
SHAPES += ["neutrophil:nucleus_shape:segmented=segmented-bilobed+segmented-multilobed"]


def test_subtypes_are_marked_by_the_attribute_that_the_grader_sees(fitted, grader, unseen, tmp_path):
    unseen.save(tmp_path / "cells")
    options = {"subtypes": SHAPES, "graders": 2}
    rows = grades_of(tmp_path / "cells", fitted, tmp_path / "all", **options)
    plausible = [row for row in rows if row["verdict"] == "plausible" and row["class_label"] == "neutrophil"]
    assert len(plausible) > 10
    marked = {row["grade_id"] for row in rows if row["subtype"]}
    assert marked == {row["grade_id"] for row in plausible}
    shares = grader.attribute(unseen.pixel_values(), "nucleus_shape")
    values = grader.attributes["nucleus_shape"]
    for row in plausible:
        own = dict(zip(values, shares[unseen.image_ids.index(row["image_id"])].tolist(), strict=True))
        segmented = own["segmented-bilobed"] + own["segmented-multilobed"]
        assert row["subtype"] == ("segmented" if segmented > own["unsegmented-band"] else "band")
    few = grades_of(tmp_path / "cells", fitted, tmp_path / "few", **options, max_marks=4)
    assert len({row["image_id"] for row in few if row["subtype"]}) == 4
    unmarked = grades_of(tmp_path / "cells", fitted, tmp_path / "none", graders=2)
    assert [{**row, "subtype": None} for row in rows] == unmarked


def test_subtypes_that_the_grader_cannot_see_are_refused(fitted, candidates, tmp_path):
    for rule, message in {
        "neutrophil:lobes:two=2": "names neutrophil:lobes; .* knows the classes",
        "neutrophil:nucleus_shape:odd=square": "names the nucleus_shape 'square'; .* knows",
    }.items():
        with pytest.raises(InputError, match=message):
            grades_of(candidates, fitted, tmp_path / "grades", subtypes=[rule])
