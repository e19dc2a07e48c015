"""Rewards -> advantages: how much better an image is than others of its class, in standard deviations.

Per-class running statistics stand for the per-prompt ones of DDPO (arXiv:2305.13301, appendix); groups are GRPO's
(arXiv:2402.03300, section 4.1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathalign.trainers.weighting import class_means

EQUAL = 1e-6  # rewards of a class that differ by less say nothing


class RunningStatistics:
    """Mean and spread of the rewards of each class, with rewards of earlier epochs weighing less.

    A reward that is k epochs old has weight `decay ** k`. Mean and sum of squares are merged as in Chan, Golub,
    LeVeque (1979), so that nothing cancels.

    Args:
        classes: Number of classes.
        decay: 0 forgets earlier epochs, 0.5 halves their weight each time.
    """

    def __init__(self, classes: int, decay: float) -> None:
        self.decay = decay
        self.moments = [[0.0, 0.0, 0.0] for _ in range(classes)]  # weight, mean, sum of squared deviations

    def update(self, rewards: Tensor, class_ids: Tensor) -> None:
        """Take in an epoch's rewards; `rewards` and `class_ids` have shape `(n,)`."""
        for class_id, (weight, mean, squares) in enumerate(self.moments):
            own = rewards[class_ids == class_id].double()
            if not len(own):
                continue
            kept, difference = weight * self.decay, float(own.mean()) - mean
            total = kept + len(own)
            self.moments[class_id] = [
                total,
                mean + difference * len(own) / total,
                squares * self.decay
                + float((own - own.mean()).square().sum())
                + difference**2 * kept * len(own) / total,
            ]

    def mean_and_std(self, class_id: int) -> tuple[float, float]:
        """Weighted mean and population standard deviation of a class; 0 and 0 before its first reward."""
        weight, mean, squares = self.moments[class_id]
        return mean, math.sqrt(squares / weight) if weight else 0.0

    def advantages(self, rewards: Tensor, class_ids: Tensor) -> Tensor:
        """Standard scores of the rewards by their class's statistics, shape `(n,)`, float32.

        A class whose rewards here are all equal gets 0: none of its images is to be preferred.
        """
        result = torch.zeros(len(rewards))
        for class_id in range(len(self.moments)):
            own = class_ids == class_id
            mean, std = self.mean_and_std(class_id)
            if own.any() and float(rewards[own].max() - rewards[own].min()) > EQUAL:
                result[own] = (rewards[own] - mean) / std
        return result


def group_advantages(rewards: Tensor, class_ids: Tensor, group_size: int) -> Tensor:
    """Standard scores within groups of the same class, shape `(n,)`, float32; a group of equal rewards gets 0.

    Args:
        rewards: Shape `(n,)`.
        class_ids: Shape `(n,)`, int64; the first `group_size` images of a class are its first group, and so on.
        group_size: Images in a group; a class's last group is smaller if there are too few.
    """
    turn = torch.zeros_like(class_ids)  # how many earlier images have the same class
    for class_id in class_ids.unique():
        own = class_ids == class_id
        turn[own] = torch.arange(int(own.sum()))
    groups = class_ids * (len(rewards) // group_size + 1) + turn // group_size
    mean, std = class_means(rewards, groups)
    return torch.where(std > EQUAL, (rewards - mean) / std.clamp_min(EQUAL), 0.0)
