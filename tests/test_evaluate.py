from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import pathalign.evaluate as stage
from pathalign.augment import orient
from pathalign.evaluate import alignment, fidelity, memorization, utility
from pathalign.evaluate.subjects import load_subjects
from pathalign.grading.simulated import Judgement
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.reward.calibration import evaluation
from pathalign.schema import InputError, RunRecord
from pathalign.settings.evaluate import EvaluateConfig

CLASSES = ("a", "b")


class BrightnessJudge(nn.Module):
    """Finds an image plausible if its green channel is bright; the class criterion always holds."""

    class_names = ["b", "a"]  # another order than the images have

    def judge(self, pixel_values: Tensor, class_ids: Tensor) -> Judgement:
        green = (pixel_values[:, 1].mean(dim=(1, 2)) + 1) / 2
        return Judgement(torch.stack([torch.ones_like(green), green], dim=1), ("class", "green"))


class PooledPixels(nn.Module):
    """A stand-in for an encoder: 48 block means."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(pixel_values, 4).flatten(1)


def images(count: int, seed: int, green: float = 128, names: tuple[str, ...] = CLASSES) -> ImageSet:
    rng = np.random.default_rng(seed)
    ids = torch.arange(count) % len(names)
    pixels = rng.normal(128, 40, (count, 3, 8, 8))
    pixels[:, 0] += 60 * ids.numpy()[:, None, None]
    pixels[:, 1] += green - 128 + rng.normal(0, 20, (count, 1, 1))
    seeds = [int(value) for value in range(count)]
    return ImageSet.build(torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)), ids, names, {"seed": seeds})


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, str]:
    images(40, 1).save(tmp_path / "data", "train")
    images(60, 2, green=160).save(tmp_path / "data", "test")
    RunRecord(stage="data", config={"source": "phantom"}).save(tmp_path / "data")
    for name, seed, green in (("before", 3, 120), ("after", 4, 145), ("control", 5, 122)):
        images(30, seed, green).save(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("data", "before", "after", "control")}


@pytest.fixture
def panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage.SimulatedGrader, "load", lambda folder: BrightnessJudge())
    monkeypatch.setattr(stage, "load_encoder", lambda name, **_: PooledPixels())


def config(inputs: dict[str, str], **changes: object) -> EvaluateConfig:
    return EvaluateConfig(**{**inputs, "judge": "judge", "bootstrap_samples": 200, **changes})


def brute_force_prdc(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """Definitions of arXiv:1904.06991 and arXiv:2002.09797, one image at a time."""

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]  # place 0 is the point itself

    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, j) for j in range(len(fake))]
    inside = [[np.linalg.norm(x - y) < real_radius[i] for i, x in enumerate(real)] for y in fake]
    return {
        "precision": sum(any(row) for row in inside) / len(fake),
        "recall": sum(any(np.linalg.norm(x - y) < fake_radius[j] for j, y in enumerate(fake)) for x in real)
        / len(real),
        "density": sum(map(sum, inside)) / (k * len(fake)),
        "coverage": sum(any(row[i] for row in inside) for i in range(len(real))) / len(real),
    }


def test_neighbourhood_metrics_equal_their_definitions_counted_by_hand(capsys):
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(40, 3)), rng.normal(0.7, 1, size=(40, 3))
    assert fidelity.neighbourhood_metrics(real, fake, 5) == pytest.approx(brute_force_prdc(real, fake, 5))
    assert capsys.readouterr().out == ""


def test_wilson_interval_matches_newcombe_1998():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263 and 0/20, score method without correction.
    assert alignment.wilson(81, 263, 0.95) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert alignment.wilson(0, 20, 0.95) == pytest.approx([0.0, 0.1611], abs=5e-5)


def test_unbiased_mmd_equals_the_double_sum_over_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 3)), rng.normal(1, 1, size=(5, 3))

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 3 + 1) ** 3

    expected = (
        sum(k(x[i], x[j]) for i in range(6) for j in range(6) if i != j) / 30
        + sum(k(y[i], y[j]) for i in range(5) for j in range(5) if i != j) / 20
        - 2 * sum(k(a, b) for a in x for b in y) / 30
    )
    matrices = [(a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    assert fidelity.unbiased_mmd2(*matrices) == pytest.approx(expected)


def test_kernel_distance_is_unbiased_around_zero_for_equal_distributions():
    rng = np.random.default_rng(2)
    values = [
        fidelity.kernel_distance(rng.normal(size=(60, 4)), rng.normal(size=(60, 4)), rng, subsets=20)[0]
        for _ in range(30)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(30)
    assert fidelity.kernel_distance(rng.normal(size=(60, 4)), rng.normal(1, 1, (60, 4)), rng)[0] > max(values)


def test_frechet_distance_of_gaussians_matches_the_closed_form():
    # Samples whitened to have exactly zero mean and unit covariance, then given diagonal covariances:
    # d^2 = |difference of means|^2 + sum (sigma_1 - sigma_2)^2.
    rng = np.random.default_rng(3)

    def exact(std: np.ndarray, mean: np.ndarray) -> np.ndarray:
        raw = rng.normal(size=(500, 3))
        centred = raw - raw.mean(0)
        return centred @ np.linalg.inv(np.linalg.cholesky(np.cov(centred.T))).T * std + mean

    first = exact(np.array([1.0, 2.0, 3.0]), np.zeros(3))
    second = exact(np.array([2.0, 2.0, 1.0]), np.array([1.0, 0.0, -2.0]))
    assert fidelity.frechet_distance(first, second) == pytest.approx(5.0 + 1 + 0 + 4)


def test_dimensions_are_reduced_only_with_too_few_images():
    points = np.random.default_rng(4).normal(size=(50, 10))
    assert fidelity.reduce_dimensions(points, 20) is None
    pca = fidelity.reduce_dimensions(points, 19)
    assert pca is not None and pca.n_components_ == 4


def all_orientations(images: Tensor) -> Tensor:
    return torch.cat([orient(images, orientation) for orientation in range(8)])


def test_copies_and_turned_copies_are_near_copies_and_others_are_not():
    train, unseen, fresh = images(20, 5), images(200, 6), images(20, 7)
    encode = PooledPixels()

    def features(pixels: Tensor) -> np.ndarray:
        return encode(pixels.float()).numpy()

    check = memorization.CopyCheck.fit(features(all_orientations(train.images)), features(unseen.images))
    turned = torch.rot90(train.images, 1, (2, 3)).flip(3)
    for copies in (train.images, turned):
        found = check.check(features(copies))
        assert not found.no_near_copy.any()
        assert found.rows.tolist() == list(range(20))
    assert check.check(features(fresh.images)).no_near_copy.all()
    assert check.check(features(unseen.images)).no_near_copy.mean() == pytest.approx(0.99)


def test_the_closest_pair_names_the_orientation_in_which_it_was_found():
    train = images(5, 8)
    turned = all_orientations(train.images).float().flatten(1).numpy()
    check = memorization.CopyCheck.fit(turned, images(50, 9).images.float().flatten(1).numpy())
    queries = np.stack([turned[7] + 30, turned[5 * 6 + 2]])
    first = check.check(queries).closest(2)[0]
    assert first == {"row": 1, "train_row": 2, "orientation": 6, "distance": 0.0, "near_copy": True}


def test_matched_rows_are_equal_in_each_class_and_never_shared():
    test, few = images(60, 10), images(12, 11)
    rows = fidelity.match_rows({"before": few, "after": images(20, 12)}, test, 3, seed=0)
    assert len(rows.reference) == len(rows.floor) == len(rows.generated["after"]) == 12
    assert not set(rows.reference) & set(rows.floor)
    for chosen in (rows.reference, rows.floor):
        assert np.bincount(test.class_ids[chosen]).tolist() == [6, 6]
    assert rows.generated["before"].tolist() == rows.generated["after"].tolist()


def test_too_few_images_for_the_neighbours_are_refused():
    with pytest.raises(InputError, match=r"Only 4 images.*`neighbours` = 5 needs more"):
        fidelity.match_rows({"before": images(4, 0)}, images(60, 1), 5, seed=0)


def test_a_classifier_is_useful_if_its_classes_lie_where_the_real_ones_do():
    rng = np.random.default_rng(13)
    classes = np.arange(100) % 2
    features = rng.normal(size=(100, 3)) + 6 * classes[:, None]
    assert utility.correct_on_real(features, classes, features, classes).mean() == 1
    assert utility.correct_on_real(features, 1 - classes, features, classes).mean() == 0


def test_a_classifier_trained_in_blocks_and_parts_is_the_one_of_a_plain_pipeline(monkeypatch):
    monkeypatch.setattr(utility, "SCALED_ROWS", 7)
    rng = np.random.default_rng(14)
    classes = np.arange(120) % 3
    features = rng.normal(3, 2, (120, 4)) + classes[:, None]
    test, truth = rng.normal(3, 2, (90, 4)) + np.arange(90)[:, None] % 3, np.arange(90) % 3
    plain = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(features, classes)
    for given in (features, [features[:50], features[50:]]):
        found = utility.correct_on_real(given, classes, test, truth)
        assert found.tolist() == (plain.predict(test) == truth).tolist() and 0 < found.mean() < 1


def test_training_sets_of_the_usefulness_test_have_equal_size():
    rows = utility.match_training_rows({"before": images(30, 0), "after": images(20, 1)}, images(40, 2), seed=0)
    assert {name: len(found) for name, found in rows.items()} == {"before": 20, "after": 20, "real": 20}


def test_the_paired_interval_covers_the_true_gain_about_as_often_as_it_says():
    rng = np.random.default_rng(14)
    covered = 0
    for repeat in range(200):
        luck = rng.uniform(size=150)  # shared by the pair, as the seed is
        before, after = luck < 0.5, (luck + rng.normal(0, 0.1, 150)) < 0.6
        low, high = alignment.paired_gain(before, after, 300, 0.95, repeat)[1]
        truth = 0.1  # up to edge effects of about 0.001
        covered += low <= truth <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_a_bootstrap_in_parts_draws_what_it_draws_at_once(monkeypatch):
    values = [np.random.default_rng(1).uniform(size=50), np.arange(50) % 2 == 0]
    whole = alignment.resampled_means(values, 30, np.random.default_rng(0))
    monkeypatch.setattr(alignment, "WEIGHTS_AT_ONCE", 350)
    np.testing.assert_allclose(alignment.resampled_means(values, 30, np.random.default_rng(0)), whole)
    assert whole.shape == (2, 30)


def test_pairing_makes_the_interval_narrower_than_independent_sets_would():
    luck = np.random.default_rng(15).uniform(size=400)
    before, after = luck < 0.5, luck < 0.6
    paired = np.diff(alignment.paired_gain(before, after, 1000, 0.95, 0)[1])
    shuffled = np.diff(alignment.paired_gain(before, np.random.default_rng(1).permutation(after), 1000, 0.95, 0)[1])
    assert paired < 0.6 * shuffled


def test_gap_closed_is_the_share_of_the_distance_and_null_without_one():
    before, after, real = (np.arange(200) < count for count in (100, 140, 180))
    closed, interval = alignment.gap_closed(before, after, real, 1000, 0.95, 0)
    assert closed == pytest.approx(0.5)
    assert interval is not None and 0.3 < interval[0] < 0.5 < interval[1] < 0.7
    assert alignment.gap_closed(real, after, before, 1000, 0.95, 0) == (None, None)
    assert alignment.gap_closed(before, after, np.arange(200) < 101, 1000, 0.95, 0) == (pytest.approx(40), None)


@pytest.mark.parametrize(
    ("judge_gain", "reward_gain", "grader_gain", "expected"),
    [
        (-0.01, 0.1, None, True),
        (-0.01, None, 0.1, True),
        (-0.01, -0.1, 0.1, True),
        (-0.01, -0.1, 0.0, False),
        (-0.01, None, None, False),
        (0.0, 0.1, 0.1, False),
        (0.05, 0.1, 0.1, False),
    ],
)
def test_hacking_is_a_rising_proxy_with_a_falling_judge(judge_gain, reward_gain, grader_gain, expected):
    assert alignment.reward_hacking(judge_gain, reward_gain, grader_gain) is expected


def test_kappa_is_zero_for_independent_verdicts_and_none_for_constant_ones():
    first, second = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    assert alignment.kappa(first, second) == pytest.approx(0)
    assert alignment.kappa(first, first) == pytest.approx(1)
    assert alignment.kappa(first | True, first | True) is None


def test_calibration_bins_hold_means_of_rewards_and_grades():
    rewards, plausible = np.array([0.01, 0.05, 0.95, 1.0]), np.array([0.0, 0.5, 1.0, 1.0])
    assert alignment.reliability(rewards, plausible) == [
        {"n": 2, "reward": pytest.approx(0.03), "plausible": 0.25},
        {"n": 2, "reward": pytest.approx(0.975), "plausible": 1.0},
    ]


def test_the_stage_measures_all_sets_and_writes_what_it_returns(inputs, panel, tmp_path):
    record = stage.evaluate(config(inputs), tmp_path / "out")
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics == json.loads(json.dumps(record.metrics))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "metrics.json",
        "report.html",
        "figures",
        "run.json",
    }
    before, after = (ImageSet.load(inputs[name]) for name in ("before", "after"))
    truth = [(found.images[:, 1].float().mean(dim=(1, 2)) / 255 >= 0.5).double() for found in (before, after)]
    assert metrics["metrics"]["before"]["plausible_share"] == pytest.approx(truth[0].mean().item())
    assert metrics["plausible_gain"] == pytest.approx((truth[1] - truth[0]).mean().item())
    assert metrics["metrics"]["after"]["per_criterion"]["class"]["failed_share"] == 0
    assert metrics["metrics"]["after"]["per_class"]["b"]["n"] == 15
    assert metrics["metrics"]["real"]["no_near_copy"] == pytest.approx(59 / 60)
    assert metrics["metrics"]["best_of_n"] is None
    assert metrics["simulated"] and metrics["phantom"]
    assert record.inputs.keys() == {"data", "before", "after", "control", "judge"}


def test_gains_are_differences_of_the_figures_with_intervals_over_the_same_seeds_and_real_images(
    inputs, panel, tmp_path
):
    metrics = stage.evaluate(config(inputs, neighbours=3), tmp_path / "out").metrics
    before, after, control, real = (metrics["metrics"][name] for name in ("before", "after", "control", "real"))
    for key in ("precision", "recall", "density", "coverage", "no_near_copy", "authenticity", "utility_accuracy"):
        for gains, other in (("gains", before), ("gains_over_control", control)):
            found = metrics[gains][key]
            assert found["gain"] == pytest.approx(after[key] - other[key]), key
            assert found["ci"][0] <= found["gain"] <= found["ci"][1]
    recalls = [metrics["gains"][f"utility_recall of {label}"]["gain"] for label in CLASSES]
    assert np.mean(recalls) == pytest.approx(metrics["gains"]["utility_accuracy"]["gain"])  # equal classes
    assert real["augment_gain"] == 0 and real["n_augment"] == 40 and after["n_augment"] == 40 + 30
    assert real["n_memorization"] == 30 and after["n_memorization"] == 30  # 15 held out of 30 in each class
    worse = {row["name"]: row for row in metrics["worse"]}
    if metrics["gains"]["recall"]["gain"] < 0:
        assert worse["recall"]["interval"] == metrics["gains"]["recall"]["ci"]


def test_figures_of_a_class_are_those_of_its_images_alone_and_none_if_these_are_few(inputs, panel, tmp_path):
    few = stage.evaluate(config(inputs), tmp_path / "few").metrics["metrics"]["after"]["per_class"]["a"]
    assert few["n_fidelity"] == 15 and few["precision"] is few["kid_unbiased"] is None
    assert 0 <= few["utility_recall"] <= 1 and few["n_utility_recall"] == 30
    metrics = stage.evaluate(config(inputs, neighbours=3), tmp_path / "out").metrics
    subjects = load_subjects(config(inputs))
    rows = fidelity.match_rows(subjects.generated, subjects.test, 3, seed=0)

    def features(images: ImageSet, chosen: np.ndarray) -> np.ndarray:
        own = images.select(chosen)
        return PooledPixels()(own.pixel_values()[own.class_ids == 0]).numpy()

    after = features(subjects.generated["after"], rows.generated["after"])
    expected = brute_force_prdc(features(subjects.test, rows.reference), after, 3)
    found = metrics["metrics"]["after"]["per_class"]["a"]
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_the_same_call_gives_the_same_numbers(inputs, panel, tmp_path):
    first, second = (stage.evaluate(config(inputs), tmp_path / name).metrics for name in ("one", "two"))
    assert first == second


def test_an_interrupted_evaluation_makes_no_feature_twice(inputs, panel, tmp_path, monkeypatch):
    seen = []

    class Counting(PooledPixels):
        def forward(self, pixel_values: Tensor) -> Tensor:
            seen.append(len(pixel_values))
            return super().forward(pixel_values)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "load_encoder", lambda name, **_: Counting())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage.report, "write", interrupt)
        stage.evaluate(config(inputs), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sum(seen) == 8 * 40 + 3 * 30 + 60
    stage.evaluate(config(inputs), tmp_path / "out")
    assert sum(seen) == 8 * 40 + 3 * 30 + 60


def test_different_seeds_are_refused_and_the_row_is_named(inputs):
    after = ImageSet.load(inputs["after"])
    after.columns["seed"][7] = 99
    after.save(inputs["after"])
    with pytest.raises(InputError, match=r"row 7 is \(seed, class\) \(7, 'b'\) in `before` and \(99, 'b'\) in `after`"):
        load_subjects(config(inputs))


def test_a_missing_seed_or_another_length_is_refused(inputs):
    images(28, 0).save(inputs["control"])
    with pytest.raises(InputError, match=r"`before` has 30 images with a seed, `control` has 28"):
        load_subjects(config(inputs))
    replace(images(30, 0), columns={}).save(inputs["control"])
    with pytest.raises(InputError, match=r"`control` has 0"):
        load_subjects(config(inputs))


def test_classes_are_matched_by_name_not_by_id(inputs):
    before = ImageSet.load(inputs["before"])
    swapped = replace(before, class_ids=1 - before.class_ids, class_names=("b", "a"))
    swapped.save(inputs["before"])
    assert load_subjects(config(inputs)).generated["before"].class_ids.tolist() == before.class_ids.tolist()


def test_other_class_names_sizes_and_empty_classes_are_refused(inputs):
    images(30, 0, names=("a", "c")).save(inputs["after"])
    with pytest.raises(InputError, match=r"`after` .* has the classes \['a', 'c'\]"):
        load_subjects(config(inputs))
    only_a = images(30, 0)
    replace(only_a, class_ids=torch.zeros(30, dtype=torch.int64)).save(inputs["after"])
    with pytest.raises(InputError, match=r"no image of the classes \['b'\]"):
        load_subjects(config(inputs))
    replace(only_a, images=only_a.images[:, :, :4, :4]).save(inputs["after"])
    with pytest.raises(InputError, match="has images of 4 px, the real test images have 8 px"):
        load_subjects(config(inputs))


def test_a_missing_folder_or_split_is_named(inputs, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        load_subjects(config(inputs, before=str(tmp_path / "nowhere")))
    images(30, 0).save(tmp_path / "no_test", "train")
    with pytest.raises(InputError, match="has no data/test"):
        load_subjects(config(inputs, data=str(tmp_path / "no_test")))


def test_all_missing_inputs_are_reported_together():
    with pytest.raises(InputError) as error:
        EvaluateConfig(feedback="graded")
    assert [name in str(error.value) for name in ("`data`", "`before`", "`after`", "`judge`", "`reward_model`")] == [
        True
    ] * 5


def test_what_got_worse_lists_every_loss_and_marks_the_clear_ones():
    base = dict.fromkeys(alignment.HIGHER_IS_BETTER, 0.5) | {"kid": 0.1, "fid": 2.0, "nearer_to_train": 0.5}
    before = base | {"per_class": {"a": {"plausible_share": 0.8}}, "per_criterion": {"nucleus": {"failed_share": 0.1}}}
    after = before | {"recall": 0.44, "coverage": 0.46, "precision": 0.9, "fid": 3.0, "grader_share": None}
    after |= {"per_class": {"a": {"plausible_share": 0.7}}, "per_criterion": {"nucleus": {"failed_share": 0.2}}}
    intervals = {"plausible share of a": [-0.15, -0.05], "share failing nucleus": [-0.01, 0.21]}
    intervals |= {"recall": [-0.1, -0.02], "coverage": [-0.1, 0.02]}
    found = {row["name"]: row["verdict"] for row in alignment.what_got_worse(before, after, intervals)}
    assert found == {
        "plausible share of a": "clear",
        "FID": "no interval",  # however large the change
        "share failing nucleus": "chance",
        "recall": "open",
        "coverage": "chance",
    }
    assert next(iter(found)) == "plausible share of a"


@pytest.mark.parametrize(("old", "new", "worse"), [(0.5, 0.6, True), (0.3, 0.45, False), (0.7, 0.45, False)])
def test_a_share_nearer_to_training_is_worse_the_farther_it_is_from_half(old, new, worse):
    before, after = ({"nearer_to_train": share, "per_class": {}, "per_criterion": {}} for share in (old, new))
    assert bool(alignment.what_got_worse(before, after, {})) == worse


def test_the_figures_of_the_reward_model_are_those_that_the_reward_stage_wrote(tmp_path):
    rewards, plausible = np.array([0.9, 0.2, 0.7, 0.4]), np.array([1.0, 0.0, 0.0, 1.0])
    report = evaluation(rewards, plausible, np.array([0, 0, 1, 1]), ["a", "b"], seed=0)
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    found = stage.reward_evaluation(str(tmp_path))
    assert found["roc_auc"] == 0.75  # of the four pairs, 0.4 against 0.7 is the wrong way round
    assert found["n"] == 4 and found["ece"] == report["overall"]["ece"]
    assert set(found["per_class"]) == {"a", "b"}
    assert stage.reward_evaluation(None) == stage.reward_evaluation(str(tmp_path / "none")) == {}


def test_the_checks_of_a_watched_training_come_from_the_adapters_record(inputs, panel, tmp_path):
    checks = [{"epoch": epoch, "reward": 0.1 * epoch, "held_out_reward": 0.5} for epoch in range(3)]
    outcome = {"n_check_images": 8, "reward_hacking": False, "stopped_at": None, "kept_epoch": 2}
    for name, measured in (("watched", {"checks": checks, **outcome}), ("plain", {"setbacks": 0})):
        (tmp_path / name).mkdir()
        RunRecord("align", {}, metrics={**measured, "adapter_parameters": 5}).save(tmp_path / name)
    record = stage.evaluate(config(inputs, adapter=str(tmp_path / "watched")), tmp_path / "out")
    assert record.metrics["training"] == {"checks": checks, **outcome}
    assert "adapter" in record.inputs and (tmp_path / "out/figures/checks.png").is_file()
    assert stage.training_checks(str(tmp_path / "plain")) is None and stage.training_checks(None) is None
    with pytest.raises(InputError, match=r"nowhere has no run\.json"):
        stage.evaluate(config(inputs, adapter="nowhere"), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_rewards_of_criteria_are_those_of_the_models_heads_and_are_shown_with_where_it_looks(
    inputs, panel, tmp_path
):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = {"class_names": ["b", "a"], "criteria": ["nucleus"]}  # another order than the images have
        model = RewardModel(RewardModelConfig(**names, image_size_px=8, convnet_channels=[8, 16])).eval()
    model.save_pretrained(tmp_path / "reward")
    graded = images(20, 6)
    columns = {"plausible": [row % 2 for row in range(20)], "failed_nucleus": [float(row % 2) for row in range(20)]}
    replace(graded, columns=columns).save(tmp_path / "feedback", "test")
    settings = config(inputs, reward_model=str(tmp_path / "reward"), feedback=str(tmp_path / "feedback"))
    metrics = stage.evaluate(settings, tmp_path / "out").metrics
    for name in ("before", "after", "control"):
        found = ImageSet.load(inputs[name])
        with torch.no_grad():
            output = model(found.pixel_values(), 1 - found.class_ids)
        expected = torch.sigmoid(output.criteria_logits).mean().item()
        measured = metrics["metrics"][name]["per_criterion_reward"]["nucleus"]
        assert measured["mean_reward"] == pytest.approx(expected, abs=1e-5) and measured["n"] == 30
        assert metrics["metrics"][name]["mean_reward"] == pytest.approx(output.rewards.mean().item(), abs=1e-5)
    assert metrics["criterion_skill"]["nucleus"]["n_failed"] == 10
    assert (tmp_path / "out/figures/looks_highest.png").is_file()
    assert "Where it looks" in (tmp_path / "out/report.html").read_text()


def test_without_captum_an_evaluation_with_a_reward_model_ends_before_it_measures(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(InputError, match=r"pip install 'pathalign\[eval\]'"):
        stage.load_panel(config(inputs, reward_model=str(tmp_path / "reward")))
