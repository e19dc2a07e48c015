"""The images of a study: real ones brought to the candidates' size, references and controls apart, nothing twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_study import images, make_study

from pathalign.grading.catalogue import Catalogue
from pathalign.grading.pictures import resized
from pathalign.images import ImageSet, content_id
from pathalign.schema import InputError


def test_references_and_controls_are_real_and_never_the_same_image(tmp_path):
    catalogue = Catalogue.load(make_study(tmp_path))
    assert len(catalogue.candidates) == 60 and len(catalogue.references) == 6
    assert len(catalogue.controls) == 45 - 6
    assert not set(catalogue.references.image_ids) & set(catalogue.controls)
    assert set(catalogue.references.image_ids) | set(catalogue.controls) == set(images(45, 1).image_ids)
    assert [label for label, _ in catalogue.reference_pixels()] == ["a", "a", "b", "b", "c", "c"]


def test_a_control_claims_its_true_class_and_a_candidate_the_one_it_was_made_for(tmp_path):
    catalogue = Catalogue.load(make_study(tmp_path))
    truth = {**dict(zip(*labelled(0, 60), strict=True)), **dict(zip(*labelled(1, 45), strict=True))}
    assert all(truth[image_id] == label for image_id, label in catalogue.labels.items())


def labelled(seed: int, count: int) -> tuple[tuple[str, ...], list[str]]:
    found = images(count, seed)
    return found.image_ids, found.labels()


def test_classes_are_matched_by_name_and_real_images_of_others_left_out(tmp_path):
    make_study(tmp_path)
    images(60, 1, classes=("d", "c", "a")).save(tmp_path / "mixed")
    catalogue = Catalogue.load(make_study(tmp_path, references=str(tmp_path / "mixed")))
    mixed = images(60, 1, classes=("d", "c", "a"))
    truth = dict(zip(mixed.image_ids, mixed.labels(), strict=True))
    assert len(catalogue.controls) == 40 - 4
    assert all(catalogue.labels[image_id] == truth[image_id] for image_id in catalogue.controls)


def test_real_images_are_brought_to_the_candidates_size(tmp_path):
    make_study(tmp_path)
    large = images(45, 1, size_px=20)
    large.save(tmp_path / "large")
    catalogue = Catalogue.load(make_study(tmp_path, references=str(tmp_path / "large")))
    assert {catalogue.pixels(image_id).shape for image_id in catalogue.labels} == {(8, 8, 3)}
    expected = {
        content_id(torch.from_numpy(resized(array, 8, 8).copy()).permute(2, 0, 1))
        for array in large.images.permute(0, 2, 3, 1).numpy()
    }
    assert set(catalogue.controls) < expected


def test_pixels_are_those_of_the_image(tmp_path):
    catalogue = Catalogue.load(make_study(tmp_path))
    first = images(60, 0)
    assert np.array_equal(catalogue.pixels(first.image_ids[7]), first.images[7].permute(1, 2, 0).numpy())


def test_the_joined_set_can_be_saved_with_its_kinds_and_the_candidates_columns(tmp_path):
    make_study(tmp_path)
    found = images(60, 0)
    ImageSet(found.images, found.class_ids, found.class_names, found.image_ids, {"seed": list(range(60))}).save(
        tmp_path / "seeded"
    )
    Catalogue.load(make_study(tmp_path, candidates=str(tmp_path / "seeded"))).images.save(tmp_path / "joined")
    joined = ImageSet.load(tmp_path / "joined")
    assert joined.columns["kind"] == ["synthetic"] * 60 + ["real control"] * 39
    assert joined.columns["seed"] == [*range(60), *[None] * 39]


def test_copies_count_once_and_a_real_image_among_the_candidates_is_no_control(tmp_path):
    make_study(tmp_path)
    first, real = images(60, 0), images(45, 1)
    doubled = ImageSet.build(
        torch.cat([first.images, first.images[:3], real.images]),
        torch.cat([first.class_ids, first.class_ids[:3], real.class_ids]),
        first.class_names,
    )
    doubled.save(tmp_path / "doubled")
    with pytest.raises(InputError, match="no image left for hidden controls"):
        Catalogue.load(make_study(tmp_path, candidates=str(tmp_path / "doubled")))
    study = make_study(tmp_path, candidates=str(tmp_path / "doubled"), real_control_share=0.0)
    assert len(Catalogue.load(study).candidates) == 105


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": {"A": {}}}, "There is no candidate class 'A'"),
        ({"references_split": "test"}, "has no data/test"),
        ({"references_per_class": 12, "count_real": 30}, "lower `references_per_class`"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path, options, text):
    study = make_study(tmp_path, real=options.pop("count_real", 45), **options)
    with pytest.raises(InputError, match=text):
        Catalogue.load(study)


def test_an_image_under_two_classes_is_refused(tmp_path):
    make_study(tmp_path)
    first = images(6, 0)
    ImageSet.build(first.images[[0, 0]], torch.tensor([0, 1]), first.class_names).save(tmp_path / "two")
    with pytest.raises(InputError, match="under two classes"):
        Catalogue.load(make_study(tmp_path, candidates=str(tmp_path / "two")))


def test_real_images_of_other_classes_only_are_refused(tmp_path):
    make_study(tmp_path)
    images(6, 1, classes=("x", "y")).save(tmp_path / "other")
    with pytest.raises(InputError, match="none of the candidates'"):
        Catalogue.load(make_study(tmp_path, references=str(tmp_path / "other")))
