"""Advantages: running statistics against weighted moments, groups against standard scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pathalign.trainers.advantages import RunningStatistics, group_advantages

IDS = torch.tensor([0, 1, 0, 1, 0, 1, 1])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_running_statistics_are_moments_weighted_by_age(decay):
    generator = torch.Generator().manual_seed(0)
    statistics = RunningStatistics(2, decay)
    epochs = [torch.rand(7, generator=generator) + epoch for epoch in range(4)]
    for rewards in epochs:
        statistics.update(rewards, IDS)
    for class_id in (0, 1):
        values = np.concatenate([rewards[class_id == IDS].double().numpy() for rewards in epochs])
        ages = np.repeat([3, 2, 1, 0], len(values) // 4)
        weights = np.power(decay, ages)
        mean = np.average(values, weights=weights)
        std = np.sqrt(np.average((values - mean) ** 2, weights=weights))
        assert statistics.mean_and_std(class_id) == pytest.approx((mean, std))
        own = class_id == IDS
        expected = (epochs[-1][own].numpy() - mean) / std
        np.testing.assert_allclose(statistics.advantages(epochs[-1], IDS)[own], expected, rtol=1e-4, atol=1e-6)


def test_a_class_that_is_missing_in_an_epoch_keeps_its_statistics():
    statistics = RunningStatistics(2, 0.5)
    statistics.update(torch.tensor([0.0, 1.0]), torch.tensor([1, 1]))
    statistics.update(torch.tensor([0.3, 0.7]), torch.tensor([0, 0]))
    assert statistics.mean_and_std(1) == (0.5, 0.5)


def test_statistics_go_on_from_their_saved_state():
    first, second = RunningStatistics(2, 0.5), RunningStatistics(2, 0.5)
    first.update(torch.arange(7) / 7, IDS)
    second.moments = [list(values) for values in first.moments]
    for statistics in (first, second):
        statistics.update(torch.arange(7).flip(0) / 5, IDS)
    assert first.moments == second.moments


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7])
def test_equal_rewards_have_advantage_zero(value):
    rewards = torch.tensor([value, 0.1, value, 0.9, value, 0.5, 0.5])
    statistics = RunningStatistics(2, 0.5)
    statistics.update(torch.full((7,), 0.33), IDS)  # a history that differs does not make them good or bad
    statistics.update(rewards, IDS)
    for advantages in (statistics.advantages(rewards, IDS), group_advantages(rewards, IDS, 4)):
        assert advantages[IDS == 0].tolist() == [0.0, 0.0, 0.0]
        assert float(advantages[IDS == 1].abs().min()) < 1 < float(advantages[IDS == 1].abs().max())
        assert bool(torch.isfinite(advantages).all())


def test_groups_are_standard_scores_of_successive_images_of_a_class():
    rewards = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.3, 0.5, 0.8, 0.6, 0.7, 0.05])
    class_ids = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 0])
    expected = np.zeros(10)
    for group in ([0, 2], [4, 6], [8, 9], [1, 3], [5, 7]):  # by hand, two and two
        values = rewards[group].numpy()
        expected[group] = (values - values.mean()) / values.std()
    np.testing.assert_allclose(group_advantages(rewards, class_ids, 2), expected, rtol=1e-4)
