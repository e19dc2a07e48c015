"""The order of images: hidden shares are kept and do not show, random items stay random, pairs are drawn evenly."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from small_study import images

from pathalign.grading import order
from pathalign.grading.order import Counts, Shares

SHARES = Shares(control=0.1, repeat=0.1, random=0.2)


def sequence(length: int, seed: str, shares: Shares = SHARES) -> list[str]:
    counts, found = Counts(), []
    for place in range(length):
        sort = order.choose(counts, shares, f"{seed}|{place}")
        counts = replace(counts, **{sort: getattr(counts, sort) + 1})
        found.append(sort)
    return found


def test_hidden_shares_are_kept_for_every_grader():
    for grader in range(20):
        counts = Counter(sequence(1000, f"grader-{grader}"))
        assert abs(counts["control"] - 100) <= 8
        assert abs(counts["repeat"] - 100) <= 8


def test_no_place_gives_a_control_away():
    graders = [sequence(120, f"grader-{grader}") for grader in range(400)]
    at_place = [sum(found[place] == "control" for found in graders) for place in range(120)]
    # Binomial with n = 400, p = 0.1: mean 40, standard deviation 6. Four of them hold for 120 places.
    assert min(at_place) > 40 - 24 and max(at_place) < 40 + 24
    after = Counter(b - a for found in graders for a, b in gaps(found))
    assert set(after) >= set(range(1, 25))  # neither every tenth nor any other beat


def gaps(found: list[str]) -> list[tuple[int, int]]:
    places = [place for place, sort in enumerate(found) if sort == "control"]
    return list(pairwise(places))


def test_an_owed_share_is_made_up_for_slowly():
    owed = Counts(control=0, repeat=10, random=90)
    chances = sum(order.choose(owed, SHARES, str(place)) == "control" for place in range(2000)) / 2000
    assert 0.17 < chances < 0.23


def test_random_items_are_a_fifth_of_the_candidates_at_every_moment():
    for grader in range(20):
        found = [sort for sort in sequence(400, f"grader-{grader}") if sort in ("random", "uncertainty")]
        for count in range(1, len(found) + 1):
            assert found[:count].count("random") >= 0.2 * count


def test_without_a_model_everything_is_random_and_without_shares_nothing_is_hidden():
    assert set(sequence(200, "g", Shares(0.0, 0.0, 1.0))) == {"random"}


def test_the_random_sample_does_not_depend_on_the_grader_and_takes_every_image_alike():
    ids = [f"image-{number}" for number in range(50)]
    assert order.random_sample(ids, 0.21, 3) == order.random_sample(ids, 0.21, 3)
    counts = Counter(image_id for seed in range(2000) for image_id in order.random_sample(ids, 0.21, seed))
    assert sum(counts.values()) == 2000 * 11  # 10.5, rounded up
    assert min(counts.values()) > 440 - 5 * 19 and max(counts.values()) < 440 + 5 * 19


def test_each_grader_has_an_own_order_that_a_restart_does_not_change():
    ids = [f"image-{number}" for number in range(100)]
    plans = [order.plan(grader, ids, ["u1", "u2"], ["c1"], ["p|q"], 0) for grader in ("one", "two", "one")]
    assert plans[0] == plans[2]
    assert plans[0].random != plans[1].random and set(plans[0].random) == set(plans[1].random) == set(ids)
    assert plans[0].uncertainty == plans[1].uncertainty == ("u1", "u2")
    assert plans[0].random != order.plan("one", ids, [], [], [], 1).random


@pytest.mark.parametrize(("count", "wanted"), [(7, 5), (8, 28), (10, 12), (5, 100), (2, 3), (1, 3)])
def test_pairs_are_of_one_class_never_twice_and_use_images_evenly(count, wanted):
    labels = {f"{name}{number}": name for name in "ab" for number in range(count)}
    pairs = order.draw_pairs(labels, wanted, 0)
    possible = {order.pair_key(*pair) for pair in combinations(labels, 2) if labels[pair[0]] == labels[pair[1]]}
    assert len(pairs) == len(set(pairs)) == 2 * min(wanted, count * (count - 1) // 2)
    assert set(pairs) <= possible
    uses = Counter(image_id for pair in pairs for image_id in pair.split("|"))
    if pairs:
        assert max(uses[image_id] for image_id in labels) - min(uses[image_id] for image_id in labels) <= 2


def save_reward_model(folder: Path, seed: int = 0) -> None:
    from pathalign.reward import RewardModel, RewardModelConfig

    torch.manual_seed(seed)
    config = RewardModelConfig(class_names=["c", "a", "b"], convnet_channels=[4, 8], image_size_px=8)
    RewardModel(config).save_with_processor(folder)


def test_images_are_ranked_by_how_near_their_reward_is_to_one_half(tmp_path):
    from pathalign.reward import RewardModel

    save_reward_model(tmp_path)
    candidates = images(12, 5)
    ids = torch.tensor([["c", "a", "b"].index(label) for label in candidates.labels()])
    with torch.no_grad():
        rewards = RewardModel.from_pretrained(tmp_path).rewards(candidates.pixel_values(), ids)
    expected = [candidates.image_ids[place] for place in (rewards - 0.5).abs().argsort().tolist()]
    assert order.rank_by_uncertainty(candidates, str(tmp_path)) == expected
    assert order.rank_by_uncertainty(candidates.select([]), str(tmp_path)) == []


def test_rewards_are_computed_once_for_each_model_and_image(tmp_path, monkeypatch):
    from pathalign import generate

    scored, score = [], generate.score
    monkeypatch.setattr(
        generate, "score", lambda model, images, *rest: scored.append(len(images)) or score(model, images, *rest)
    )
    for seed in (0, 1):
        save_reward_model(tmp_path / f"model-{seed}", seed)
    candidates, cache = images(12, 5), tmp_path / "rewards.json"
    plain = order.rank_by_uncertainty(candidates, str(tmp_path / "model-0"))
    order.rank_by_uncertainty(candidates.select(range(9)), str(tmp_path / "model-0"), cache)
    for _ in range(2):
        assert order.rank_by_uncertainty(candidates, str(tmp_path / "model-0"), cache) == plain
    assert scored == [12, 9, 3]
    (tmp_path / "model-0").rename(tmp_path / "elsewhere")
    order.rank_by_uncertainty(candidates, str(tmp_path / "elsewhere"), cache)
    assert scored == [12, 9, 3]
    order.rank_by_uncertainty(candidates, str(tmp_path / "model-1"), cache)
    assert scored == [12, 9, 3, 12]
    for damaged in ("", "[]", "{}", "5"):
        cache.write_text(damaged)
        assert order.rank_by_uncertainty(candidates, str(tmp_path / "elsewhere"), cache) == plain
    assert scored == [12, 9, 3, 12, 12, 12, 12, 12]
