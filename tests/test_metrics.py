"""Metrics on features, against other libraries, the published code of a paper, loops, and what theory expects."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import pathalign.evaluate as package
from pathalign.augment import orient
from pathalign.cards.measures import by_present_names, image_measures, losses
from pathalign.evaluate import auditing, features, fidelity, memorization, neighbours
from pathalign.evaluate.neighbours import Neighbours, radii, tiles
from pathalign.schema import InputError


def normal(seed: int, count: int, dimensions: int, mean: float = 0, std: float = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, std, (count, dimensions))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that small arrays fill several of them."""
    for name in ("QUERY_BLOCK", "POINT_BLOCK", "TILE_ROWS", "TILE_COLUMNS"):
        monkeypatch.setattr(neighbours, name, 17)
    for name in ("KERNEL_BLOCK", "MOMENTS_BLOCK"):
        monkeypatch.setattr(fidelity, name, 17)


class GivenFeatures(nn.Module):
    """Passes given features through, where torchmetrics expects an Inception network."""

    num_features = 12

    def forward(self, given: Tensor) -> Tensor:
        return given


@pytest.mark.parametrize("offset", [0, 1e4])
def test_nearest_rows_are_those_of_float64_even_far_from_the_origin_and_among_duplicates(small_blocks, offset):
    known, queries = normal(0, 300, 5) + offset, normal(1, 90, 5) + offset
    known[50:80], known[200:210] = known[49], known[0] + 1e-7
    queries[:40] = known[40:80]
    distances, rows = Neighbours(known).nearest(queries, 4)
    expected = cdist(queries, known)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :4], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.take_along_axis(expected, rows, axis=1), distances, rtol=1e-9, atol=1e-12)
    assert rows[9].tolist() == [49, 50, 51, 52]  # equal distances: lower rows first


def test_balls_hold_whom_a_loop_in_float64_finds_in_them(small_blocks):
    first, second = normal(2, 70, 4) + 500, normal(3, 50, 4) + 500
    own, other = radii(first, 3), radii(second, 3)
    np.testing.assert_allclose(own, np.sort(cdist(first, first), axis=1)[:, 3])
    distances = cdist(first, second)
    found = np.zeros((2, 70, 50), dtype=bool)
    for tile in tiles(first, own, second, other):
        found[:, tile.first, tile.second] = tile.in_first, tile.in_second
    assert (found[0] == (distances < own[:, None])).all() and (found[1] == (distances < other)).all()
    assert found.any() and not found.all()


@pytest.mark.parametrize(("count", "other", "k"), [(60, 60, 5), (150, 90, 3), (90, 150, 1)])
def test_precision_recall_density_and_coverage_are_those_of_the_authors_library(small_blocks, count, other, k):
    real, generated = normal(4, count, 6), normal(5, other, 6, mean=0.3, std=0.8)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(real, generated, k)
    assert fidelity.neighbourhood_metrics(real, generated, k) == pytest.approx(expected, abs=1e-5)


def test_kid_and_fid_are_those_of_torchmetrics_on_the_same_features(small_blocks):
    real, generated = normal(6, 80, 12, mean=3), normal(7, 80, 12, mean=3.2, std=1.3)
    kid = KernelInceptionDistance(feature=GivenFeatures(), subsets=1, subset_size=80).set_dtype(torch.float64)
    fid = FrechetInceptionDistance(feature=GivenFeatures()).set_dtype(torch.float64)
    for metric in (kid, fid):
        metric.update(torch.from_numpy(real), real=True)
        metric.update(torch.from_numpy(generated), real=False)
    assert fidelity.whole_kernel_distance(real, generated) == pytest.approx(float(kid.compute()[0]), rel=1e-5)
    assert fidelity.frechet_distance(real, generated) == pytest.approx(float(fid.compute()), rel=1e-5)


def test_subsets_of_many_images_are_measured_as_those_of_few_are(monkeypatch):
    real, generated = normal(8, 60, 5), normal(9, 70, 5, mean=0.5)
    few = fidelity.kernel_distance(real, generated, np.random.default_rng(0), subsets=7)
    monkeypatch.setattr(fidelity, "WHOLE_KERNEL_ROWS", 10)
    many = fidelity.kernel_distance(real, generated, np.random.default_rng(0), subsets=7)
    assert many == pytest.approx(few)


def test_moments_of_blocks_are_those_of_the_whole_even_far_from_zero(small_blocks):
    points = normal(10, 100, 4) + 1e6
    moments = fidelity.Moments.of(points)
    np.testing.assert_allclose(moments.mean, points.mean(axis=0))
    np.testing.assert_allclose(moments.covariance, np.cov(points.T), rtol=1e-6)


def published_curves(real: np.ndarray, generated: np.ndarray, levels: np.ndarray) -> tuple[list[float], list[float]]:
    """Alpha-precision and beta-recall as in the published code of arXiv:2102.08921, k = 1, one image at a time."""
    centre, own_centre = real.mean(axis=0), generated.mean(axis=0)
    limits = np.quantile([np.linalg.norm(x - centre) for x in real], levels)
    near, centrality = [], []
    for index, x in enumerate(real):
        to_generated = [np.linalg.norm(x - y) for y in generated]
        to_others = [np.linalg.norm(x - other) for place, other in enumerate(real) if place != index]
        nearest = int(np.argmin(to_generated))
        near.append(to_generated[nearest] <= min(to_others))
        centrality.append(np.linalg.norm(generated[nearest] - own_centre))
    own_limits = np.quantile(centrality, levels)
    precision = [np.mean([np.linalg.norm(y - centre) <= limit for y in generated]) for limit in limits]
    recall = [np.mean([n and c <= limit for n, c in zip(near, centrality, strict=True)]) for limit in own_limits]
    return precision, recall


def test_alpha_precision_and_beta_recall_are_those_of_the_published_code(small_blocks):
    real, generated = normal(11, 80, 3), normal(12, 60, 3, mean=0.4, std=0.7)
    found = auditing.supports(real, generated, neighbours=1, levels=30)
    precision, recall = published_curves(real, generated, found.levels)
    np.testing.assert_allclose(found.alpha_precision, precision, atol=1e-5)
    np.testing.assert_allclose(found.beta_recall, recall, atol=1e-5)
    flat = auditing.Supports(np.linspace(0, 1, 11), np.zeros(11), np.linspace(0, 1, 11))
    assert flat.integrated() == {"alpha_precision": pytest.approx(0), "beta_recall": pytest.approx(1)}


def test_alpha_precision_and_beta_recall_say_what_the_paper_says_of_them():
    real, k = normal(13, 1500, 4), 5

    def measured(generated: np.ndarray) -> dict[str, float]:
        return auditing.supports(real, generated, k).integrated()

    same = measured(normal(14, 1500, 4))
    assert same["alpha_precision"] > 0.95
    assert same["beta_recall"] == pytest.approx(1 - 2**-k, abs=0.03)
    half = normal(15, 4000, 4)
    collapsed = measured(half[half[:, 0] > 0][:1500])  # one side of the cloud is never drawn, the other is real
    assert collapsed["alpha_precision"] > 0.95 and collapsed["beta_recall"] < same["beta_recall"] - 0.2
    outliers = normal(16, 1500, 4)
    outliers[:450] *= 10
    spread = measured(outliers)
    assert spread["alpha_precision"] < same["alpha_precision"] - 0.25
    assert spread["beta_recall"] > same["beta_recall"] - 0.1
    tight = measured(normal(17, 1500, 4, std=0.05))  # all typical, none varied
    assert tight["alpha_precision"] < 0.2 and tight["beta_recall"] < 0.2


def circles_in_common() -> float:
    """Part of a disc of radius 1 that another around a point of its edge shares."""
    return (2 * np.pi / 3 - np.sqrt(3) / 2) / np.pi


@pytest.mark.parametrize(("dimensions", "shared"), [(1, 0.5), (2, circles_in_common())])
def test_fresh_draws_are_authentic_as_often_as_theory_says_and_copies_never(dimensions, shared):
    # The nearest training image x of a draw lies at distance a. No other lies within a of the draw; none within a of x
    # either if the draw is not authentic. With volumes exponentially distributed that is 1 / (2 - shared).
    rng = np.random.default_rng(18)
    train, fresh = rng.uniform(size=(2, 3000, dimensions))
    assert auditing.authentic(train, fresh).mean() == pytest.approx((1 - shared) / (2 - shared), abs=0.03)
    assert not auditing.authentic(train, train[:500]).any()
    assert not auditing.authentic(train, train[:500] + 1e-9).any()
    assert auditing.authentic(train, fresh + 5).all()


def test_authenticity_is_what_a_loop_over_its_definition_finds(small_blocks):
    train, generated = normal(19, 50, 3), normal(20, 40, 3)
    expected = []
    for x in generated:
        distances = np.linalg.norm(train - x, axis=1)
        nearest = int(distances.argmin())
        others = np.delete(np.linalg.norm(train - train[nearest], axis=1), nearest)
        expected.append(distances[nearest] > others.min())
    assert auditing.authentic(train, generated).tolist() == expected
    assert 0 < np.mean(expected) < 1


def closeness_of(train: np.ndarray, held_out: np.ndarray, generated: np.ndarray, *classes: np.ndarray):
    classes = classes or (np.zeros(len(train)), np.zeros(len(held_out)))
    return memorization.closeness(Neighbours(train), Neighbours(held_out), generated, *classes)


def test_a_generator_that_copies_is_nearer_to_training_and_a_fair_one_is_called_so_in_one_case_of_twenty():
    # In many dimensions a few real images are the nearest of most others: a test that counts the images rejects often.
    rng = np.random.default_rng(21)
    values = [closeness_of(*rng.normal(size=(2, 40, 32)), rng.normal(size=(160, 32))).metrics(0.95) for _ in range(200)]
    rejected = np.array([found["nearer_to_train_p"] < 0.05 for found in values])
    assert 0.015 < rejected.mean() < 0.095  # of 200 fair ones 3 to 19 are expected 998 times in 1000
    outside = [not found["nearer_to_train_ci"][0] <= 0.5 <= found["nearer_to_train_ci"][1] for found in values]
    assert (rejected == outside).all()
    assert np.mean([found["train_distance_ratio"] for found in values]) == pytest.approx(1, abs=0.01)
    train, held_out = normal(21, 300, 6), normal(22, 300, 6)
    copies = closeness_of(train, held_out, train[:100] + normal(24, 100, 6, std=0.05))
    found = copies.metrics(0.95)
    assert found["nearer_to_train"] == 1 and found["nearer_to_train_p"] < 1e-20 and found["train_distance_ratio"] < 0.2
    assert found["nearer_to_train_ci"][0] > 0.8 and found["nearer_to_train_ci"][1] == 1
    assert copies.rows.tolist() == list(range(100))
    closest = copies.closest(3)
    assert [pair["train_row"] for pair in closest] == [pair["row"] for pair in closest]
    assert closest[0]["distance"] == copies.to_train.min()


def test_the_test_of_memorization_knows_how_the_share_varies_over_all_ways_to_name_the_training_images():
    classes = np.array([0, 0, 0, 1, 1])
    train, held_out, generated = normal(25, 5, 2), normal(26, 5, 2), normal(27, 40, 2)
    real, labels = np.concatenate([train, held_out]), np.tile(classes, 2)
    nearest = cdist(generated, real).argmin(axis=1)
    shares = [
        np.isin(nearest, [*first, *second]).mean()
        for first in combinations(np.flatnonzero(labels == 0), 3)
        for second in combinations(np.flatnonzero(labels == 1), 2)
    ]
    assert np.mean(shares) == pytest.approx(0.5)
    found = closeness_of(train, held_out, generated, classes, classes)
    assert found.null_deviation() == pytest.approx(np.std(shares))


def test_images_as_near_to_one_as_to_the_other_say_nothing_about_memorization():
    points = normal(25, 30, 3)
    found = closeness_of(points, points, points).metrics(0.95)
    assert found["nearer_to_train"] == 0.5 and found["nearer_to_train_p"] == 1
    assert found["train_distance_ratio"] == 1


def test_images_that_coincide_with_held_out_ones_have_no_ratio_and_still_fit_into_json():
    held_out = normal(28, 30, 3)
    found = closeness_of(normal(29, 30, 3), held_out, held_out[:20]).metrics(0.95)
    assert found["train_distance_ratio"] is None and found["nearer_to_train"] == 0
    json.dumps(found, allow_nan=False)


def test_as_many_held_out_as_training_images_are_compared_in_each_class_and_the_rest_is_the_floor():
    train, test = np.repeat([0, 1], [10, 30]), np.repeat([0, 1], [50, 41])
    rows = memorization.match_real_rows(train, test, seed=0)
    assert [np.bincount(ids[own]).tolist() for ids, own in zip((train, test, test), rows, strict=True)] == [
        [10, 20],
        [10, 20],
        [40, 21],
    ]
    assert not set(rows[1]) & set(rows[2])


def table(seed: int, sources: tuple[str, ...], count: int = 60) -> dict[str, object]:
    """Two classes, three units apart, `count` images of each source, sources mixed."""
    labels = [("a", "b")[index // len(sources) % 2] for index in range(count * len(sources))]
    points = normal(seed, len(labels), 4).astype(np.float32)
    points[:, 0] += 3 * (np.array(labels) == "b")
    return {"features": points, "source": list(sources) * count, "class_label": labels}


def rows_of(given: dict, source: str, label: str | None = None) -> np.ndarray:
    chosen = np.array(given["source"]) == source
    return given["features"][chosen if label is None else chosen & (np.array(given["class_label"]) == label)]


@pytest.mark.parametrize("name", [name for name in package.METRICS if name != "PlausibleShare"])
def test_a_metric_that_is_fed_in_batches_and_rows_says_what_it_says_of_the_whole(name, tmp_path):
    make: Callable = getattr(package, name)
    given = table(26, make.SOURCES)
    whole = make(cache_dir=str(tmp_path)).compute(**given)
    metric = make(cache_dir=str(tmp_path))
    for start, stop in ((0, 70), (70, 71), (71, len(given["source"]))):
        metric.add_batch(**{column: values[start:stop] for column, values in given.items()})
    assert metric.compute() == whole
    single = make(cache_dir=str(tmp_path))
    for features_, source, label in zip(*given.values(), strict=True):
        single.add(features=features_, source=source, class_label=label)
    assert single.compute() == whole
    assert make(keep_in_memory=True, cache_dir=str(tmp_path)).compute(**given) == whole
    assert set(whole["per_class"]) == {"a", "b"} or name == "FrechetDistance"
    assert metric.description and metric.citation and "source (list" in metric.inputs_description
    assert not list(tmp_path.rglob("*.f32")) and not list(tmp_path.rglob("*.arrow"))


def test_metrics_of_a_table_are_those_of_its_sources_overall_and_in_each_class(tmp_path):
    given = table(27, ("real", "generated"))
    found = package.NeighbourhoodMetrics(cache_dir=str(tmp_path)).compute(**given, neighbours=3)
    for label, figures in ((None, found), *found.pop("per_class").items()):
        expected = fidelity.neighbourhood_metrics(rows_of(given, "real", label), rows_of(given, "generated", label), 3)
        assert figures == pytest.approx(expected)
    kid = package.KernelDistance(cache_dir=str(tmp_path)).compute(**given, subsets=5, seed=1)
    pair = rows_of(given, "real"), rows_of(given, "generated")
    assert (kid["kid"], kid["kid_sd"]) == fidelity.kernel_distance(*pair, np.random.default_rng(1), 5)
    fid = package.FrechetDistance(cache_dir=str(tmp_path)).compute(**given)
    assert fid["fid"] == pytest.approx(fidelity.frechet_distance(*pair)) and fid["n_floor"] == 30


def test_a_class_with_too_few_images_has_no_figures_and_images_without_class_none_of_classes(tmp_path):
    given = table(28, ("real", "generated"))
    given["class_label"] = ["rare" if index < 6 else "b" for index in range(120)]
    metric = package.NeighbourhoodMetrics(cache_dir=str(tmp_path))
    assert metric.compute(**given)["per_class"]["rare"] is None
    assert metric.compute(**{**given, "class_label": None})["per_class"] == {}


def test_usefulness_tells_a_generator_that_mixes_the_classes_up_from_one_that_does_not(tmp_path):
    given = table(29, ("real", "generated", "train"))
    good = package.Usefulness(cache_dir=str(tmp_path)).compute(**given)
    assert good["utility_accuracy"] > 0.85
    recalls = [figures["utility_recall"] for figures in good["per_class"].values()]
    assert np.mean(recalls) == pytest.approx(good["utility_accuracy"])  # both classes have as many images
    swapped = {"a": "b", "b": "a"}
    labels = [
        swapped[label] if source == "generated" else label
        for source, label in zip(given["source"], given["class_label"], strict=True)
    ]
    bad = package.Usefulness(cache_dir=str(tmp_path)).compute(**{**given, "class_label": labels})
    assert bad["utility_accuracy"] == pytest.approx(1 - good["utility_accuracy"])
    assert bad["real_accuracy"] == good["real_accuracy"]
    assert bad["augment_gain"] == pytest.approx(bad["augment_accuracy"] - bad["real_accuracy"])
    assert bad["augment_gain_ci"][1] < 0


def test_the_plausible_share_stands_with_its_interval_and_its_gain_over_the_same_seeds(tmp_path):
    before, after = np.arange(263) < 60, np.arange(263) < 81
    metric = package.PlausibleShare(cache_dir=str(tmp_path))
    metric.add(plausible=after[0], before=before[0], class_label="a")
    metric.add_batch(plausible=after[1:], before=before[1:], class_label=["a"] * 262)
    found = metric.compute()
    assert found["plausible_share_ci"] == pytest.approx([0.2553, 0.3662], abs=5e-5)  # Newcombe 1998, table I
    assert found["plausible_gain"] == pytest.approx(21 / 263)
    low, high = found["plausible_gain_ci"]
    assert 0 < low < 21 / 263 < high and found["per_class"]["a"]["plausible_gain_ci"] == [low, high]
    alone = package.PlausibleShare(cache_dir=str(tmp_path)).compute(plausible=[True, False])
    assert alone["plausible_gain"] is None and alone["per_class"] == {}
    with pytest.raises(InputError, match="give `plausible`, true or false"):
        metric.add_batch(plausible=[True, None])


def test_a_table_that_cannot_be_measured_is_refused_with_what_to_give(tmp_path):
    metric = package.KernelDistance(cache_dir=str(tmp_path))
    for batch, words in (
        ({"features": np.zeros(3), "source": ["real"]}, r"shape \(3,\); give \(images, dimensions\)"),
        ({"features": np.zeros((2, 3)), "source": ["real"]}, "2 rows, `source` 1"),
        ({"features": np.zeros((1, 3)), "source": ["fake"]}, "holds 'fake'; kernel_distance knows 'real', 'generated'"),
        ({"features": np.full((1, 3), np.nan), "source": ["real"]}, "not finite"),
    ):
        with pytest.raises(InputError, match=words):
            metric.add_batch(**batch)
    with pytest.raises(InputError, match="no rows with the source 'generated'"):
        metric.compute(features=np.zeros((2, 3)), source=["real"] * 2)
    other = package.KernelDistance(cache_dir=str(tmp_path))
    other.add_batch(features=np.zeros((4, 3)), source=["real"] * 4)
    with pytest.raises(InputError, match=r"lengths \[2, 3\]; use one encoder"):
        other.compute(features=np.zeros((4, 2)), source=["generated"] * 4)
    few = package.NeighbourhoodMetrics(cache_dir=str(tmp_path))
    with pytest.raises(InputError, match="`neighbours` = 5 needs 6 images, 'real' has 2"):
        few.compute(features=np.zeros((4, 2)), source=["real", "generated"] * 2)


def test_a_metric_refuses_names_and_options_that_cannot_be_meant_and_keeps_its_rows(tmp_path):
    given = table(30, ("real", "generated"))
    metric = package.NeighbourhoodMetrics(cache_dir=str(tmp_path))
    metric.add_batch(**given)
    known = "takes `features`, `source`, `class_label`"
    for name in ("neighbors", "predictions"):
        with pytest.raises(InputError, match=f"neighbourhood_metrics knows no `{name}`; it {known}, `neighbours`"):
            metric.compute(**{name: 3})
    for add in (metric.add_batch, metric.add):
        with pytest.raises(InputError, match=f"knows no `labels`; it {known}"):
            add(**given, labels=["a"])
    with pytest.raises(InputError, match="`neighbours` is 0; give a whole number, at least 1"):
        metric.compute(neighbours=0)
    assert metric.compute() == package.NeighbourhoodMetrics(cache_dir=str(tmp_path)).compute(**given)
    kid, audit = package.KernelDistance(cache_dir=str(tmp_path)), package.AuditMetrics(cache_dir=str(tmp_path))
    share = package.PlausibleShare(cache_dir=str(tmp_path))
    for other, option, value in (
        (kid, "subsets", 0),
        (kid, "subset_size", 1),
        (kid, "seed", -1),
        (audit, "levels", 1),
        (audit, "neighbours", 2.5),
        (audit, "confidence", 95),
        (share, "bootstrap_samples", 0),
    ):
        with pytest.raises(InputError, match=f"`{option}` is {value}"):
            other.compute(**{option: value})
    with pytest.raises(InputError, match="plausible_share knows no `verdict`; it takes `plausible`"):
        share.add(plausible=True, verdict=False)


def test_arrays_are_taken_as_lists_are_and_a_missing_class_is_no_class_called_none(tmp_path):
    given = table(31, ("real", "generated"))
    arrays = {name: np.asarray(values) for name, values in given.items()}
    make = partial(package.NeighbourhoodMetrics, cache_dir=str(tmp_path))
    assert make().compute(**arrays) == make().compute(**given)
    assert make().compute(**{**given, "class_label": [None] * 120})["per_class"] == {}
    share = package.PlausibleShare(cache_dir=str(tmp_path))
    assert share.compute(plausible=np.array([True, False]), class_label=["a", None])["per_class"] == {}


def test_a_gain_is_that_of_the_images_that_have_a_verdict_before(tmp_path):
    metric = package.PlausibleShare(cache_dir=str(tmp_path))
    before = [False, False, True, True, None, None]
    found = metric.compute(plausible=[True] * 5 + [False], before=before, class_label=list("aaaaab"))
    assert (found["n"], found["n_pairs"], found["plausible_gain"]) == (6, 4, 0.5)
    assert found["per_class"]["b"]["plausible_gain"] is None and found["per_class"]["b"]["n_pairs"] == 0


def test_features_that_were_made_before_an_interruption_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SAVE_EVERY_ROWS", 8)
    seen: list[int] = []

    class Encoder(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            seen.append(len(pixel_values))
            if len(seen) == 4 and not finished:
                raise KeyboardInterrupt
            return pixel_values.flatten(1)

    pixels = torch.randint(0, 256, (10, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    finished = False
    store = features.FeatureStore(Encoder(), "flat", tmp_path, torch.device("cpu"))
    store.batch_size = 4
    with pytest.raises(KeyboardInterrupt):
        store.features(pixels, "cells", orientations=8)
    finished = True
    found = store.features(pixels, "cells", orientations=8)
    expected = torch.cat([orient(pixels, orientation) for orientation in range(8)]).flatten(1) / 127.5 - 1
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert sum(seen) == 80 + 4 + 2  # what was lost: the batch that failed, and the one after the last save
    assert {path.suffix for path in Path(tmp_path).iterdir()} - {".lock"} == {".npy"}  # some filelocks leave theirs


def test_features_of_an_encoder_of_the_same_name_with_other_weights_are_made_anew(tmp_path):
    pixels = torch.randint(0, 256, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def features_with(weight: float) -> np.ndarray:
        encoder = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 2))
        nn.init.constant_(encoder[2].weight, weight)
        nn.init.constant_(encoder[2].bias, 0)
        return features.FeatureStore(encoder, "retrained", tmp_path, torch.device("cpu")).features(pixels, "cells")

    np.testing.assert_allclose(features_with(2.0), 2 * features_with(1.0), rtol=1e-6)
    assert len(list(Path(tmp_path).glob("*.npy"))) == 2
    features_with(1.0)
    assert len(list(Path(tmp_path).glob("*.npy"))) == 2


def test_a_card_calls_the_figures_of_older_reports_by_what_they_measure():
    older = {"n": 500, "authenticity": 1.0, "authenticity_ci": [0.99, 1.0]}
    (measure,) = image_measures(older, simulated_judge=False)
    assert (measure.key, measure.interval, measure.n) == ("no_near_copy", (0.99, 1.0), 500)
    newer = {"n": 500, "authenticity": 0.4, "no_near_copy": 0.99}
    assert by_present_names(newer) == newer
    worse = [{"name": "authenticity", "before": 1.0, "after": 0.9}, {"name": "recall", "before": 0.6, "after": 0.5}]
    report = {"metrics": {"after": older, "control": None}, "worse": worse}
    assert [row["name"] for row in losses(report)] == ["share without near-copies", "recall"]
    assert losses({**report, "metrics": {"after": newer}}) == worse and losses({}) is None
