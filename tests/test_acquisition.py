"""What to grade next, as pure functions: against textbook values, brute force and a law that is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import entropy

from pathalign.grading import learning_curve
from pathalign.grading.acquisition import (
    PREFILTER,
    Graded,
    Pool,
    choose,
    deficit_quotas,
    effective_grades,
    entropy_bits,
    farthest_first,
    information_bits,
    mutual_information_bits,
)
from pathalign.grading.learning_curve import PowerLaw, expected_gain, fit_power_law


def pool_of(count: int, members: int = 3, classes: int = 3, seed: int = 0) -> Pool:
    generator = np.random.default_rng(seed)
    return Pool(generator.random((members, count)), generator.normal(size=(count, 4)), np.arange(count) % classes)


def graded_of(counts: dict[int, tuple[int, int]], seed: int = 1) -> Graded:
    """Class -> plausible and implausible images."""
    ids = np.array([c for c, (good, bad) in counts.items() for _ in range(good + bad)], dtype=int)
    verdicts = np.array([v for good, bad in counts.values() for v in [True] * good + [False] * bad], dtype=bool)
    return Graded(np.random.default_rng(seed).normal(size=(len(ids), 4)), ids, verdicts)


def test_entropy_is_that_of_scipy_and_orders_images_by_their_distance_from_one_half():
    probabilities = np.random.default_rng(0).random((1, 40))
    expected = [entropy([p, 1 - p], base=2) for p in probabilities[0]]
    np.testing.assert_allclose(entropy_bits(probabilities), expected)
    assert np.argsort(-entropy_bits(probabilities)).tolist() == np.argsort(abs(probabilities[0] - 0.5)).tolist()
    np.testing.assert_allclose(entropy_bits(np.array([[0.0, 0.5, 1.0]])), [0, 1, 0])


def test_members_who_are_sure_and_disagree_are_worth_a_bit_and_members_who_all_doubt_nothing():
    probabilities = np.array([[0.0, 0.5, 1.0, 0.9], [1.0, 0.5, 1.0, 0.1]])
    np.testing.assert_allclose(mutual_information_bits(probabilities)[:3], [1, 0, 0], atol=1e-12)
    assert entropy_bits(probabilities)[1] == 1  # plain entropy takes shared doubt for something to learn
    assert 0 < mutual_information_bits(probabilities)[3] < 1


def test_mutual_information_is_that_of_the_joint_distribution_of_member_and_verdict():
    probabilities = np.random.default_rng(1).random((4, 10))
    for image in range(10):
        joint = np.stack([probabilities[:, image], 1 - probabilities[:, image]], axis=1) / 4
        independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
        expected = (joint * np.log2(joint / independent)).sum()
        assert mutual_information_bits(probabilities)[image] == pytest.approx(expected)
    assert (information_bits(probabilities[:1]) == entropy_bits(probabilities[:1])).all()


def test_farthest_first_takes_what_a_plain_loop_takes():
    generator = np.random.default_rng(2)
    features, covered = generator.normal(size=(30, 3)), generator.normal(size=(5, 3))
    chosen: list[int] = []
    for _ in range(10):
        centres = [*covered, *features[chosen]]
        distances = [
            -1 if row in chosen else min(float(np.linalg.norm(features[row] - centre)) for centre in centres)
            for row in range(30)
        ]
        chosen.append(int(np.argmax(distances)))
    assert farthest_first(features, 10, covered) == chosen


def test_farthest_first_covers_within_twice_the_best_radius_and_takes_nothing_twice():
    features = np.random.default_rng(3).normal(size=(12, 2))

    def radius(centres) -> float:
        return max(min(np.linalg.norm(point - features[c]) for c in centres) for point in features)

    best = min(radius(centres) for centres in combinations(range(12), 3))
    assert radius(farthest_first(features, 3)) <= 2 * best
    same = np.zeros((5, 2))
    assert sorted(farthest_first(same, 9)) == list(range(5)) and farthest_first(same[:0], 3) == []


def test_a_class_is_in_deficit_with_few_grades_or_few_of_one_verdict():
    graded = graded_of({0: (50, 50), 1: (1, 99), 2: (5, 5)})
    found = effective_grades(graded.class_ids, graded.plausible, 4)
    assert found[0] == pytest.approx(101) and found[1] < found[2] < found[0]
    assert found[3] == found.min()  # no grade at all


def test_quotas_level_the_classes_and_never_ask_for_more_than_there_is():
    quotas = deficit_quotas(np.array([10.0, 2.0, 5.0]), np.array([100, 100, 100]), 12)
    assert quotas.tolist() == [0, 8, 4]  # 2 + 8 and 5 + 4: level, the class of 10 waits
    assert deficit_quotas(np.array([10.0, 2.0]), np.array([3, 1]), 12).tolist() == [3, 1]


def test_each_strategy_puts_first_what_it_says():
    pool, graded = pool_of(60), graded_of({0: (4, 4), 1: (4, 4), 2: (4, 4)})
    doubt = np.argsort(-entropy_bits(pool.probabilities), kind="stable")[:9].tolist()
    assert choose("uncertainty", pool, graded, 9) == doubt
    disagreement = np.argsort(-mutual_information_bits(pool.probabilities), kind="stable")[:9].tolist()
    assert choose("disagreement", pool, graded, 9) == disagreement
    assert choose("diverse", pool, graded, 9) == farthest_first(pool.features, 9, graded.features)


def test_mixed_is_balanced_by_deficit_at_every_length_informative_and_distinct():
    pool, graded = pool_of(300), graded_of({0: (10, 10), 1: (10, 10), 2: (1, 1)})
    chosen = choose("mixed", pool, graded, 24)
    assert len(set(chosen)) == 24
    counts = np.bincount(pool.class_ids[chosen], minlength=3)
    assert counts[2] > counts[0] + 10  # the class of two grades catches up
    assert abs(np.bincount(pool.class_ids[chosen[:12]], minlength=3)[2] - counts[2] / 2) <= 1
    bits = information_bits(pool.probabilities)
    for class_id, count in enumerate(counts):
        own = np.flatnonzero(pool.class_ids == class_id)
        informative = set(own[np.argsort(-bits[own])[: PREFILTER * count]].tolist())
        assert {row for row in chosen if pool.class_ids[row] == class_id} <= informative


def test_a_power_law_is_found_again():
    sizes = np.array([50, 100, 200, 400])
    law = PowerLaw(0.2, 3.0, 0.6)
    found = fit_power_law(sizes, law(sizes))
    assert (found.floor, found.scale, found.exponent) == pytest.approx((0.2, 3.0, 0.6), rel=1e-3)
    assert found(1600) == pytest.approx(law(1600), rel=1e-3)
    flat = fit_power_law(sizes, np.full(4, 0.5))
    assert flat(400) - flat(4000) == pytest.approx(0, abs=1e-6)


def test_the_interval_of_the_gain_holds_the_true_one_and_reaches_0_where_nothing_is_learnt(monkeypatch):
    monkeypatch.setattr(learning_curve, "SAMPLES", 30)
    sizes, law, held = np.array([50, 100, 200, 400]), PowerLaw(0.3, 2.0, 0.5), 0
    for seed in range(6):
        generator = np.random.default_rng(seed)
        images = generator.gamma(1.0, 1.0, size=(1, 1, 80))  # some are hard for every model
        noise = 1 + 0.05 * generator.normal(size=(4, 3, 80))
        found = expected_gain(sizes, law(sizes)[:, None, None] * images / images.mean() * noise, 400, 800, seed)
        held += found.low <= law(400) - law(800) <= found.high
    assert held >= 5
    useless = expected_gain(sizes, 0.6 + 0.1 * np.random.default_rng(0).normal(size=(4, 3, 80)), 400, 800, 0)
    assert useless.low < 1e-3
