"""Rewards -> weights of the denoising loss, and the one form that is more than a weight.

The paper's weight is the reward itself (arXiv:2306.12438). `contrastive` comes from DiffusionNFT (arXiv:2509.16117): a
share r of an image pulls the model towards it, a share 1 - r pushes it away, both relative to the model that drew it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathalign.settings.reward_weighted import RewardWeightedConfig


def class_means(rewards: Tensor, class_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the rewards of each image's class, both of shape `(n,)`."""
    same = (class_ids[:, None] == class_ids[None, :]).float()
    mean = same @ rewards / same.sum(dim=1)
    spread = (same * (rewards[None, :] - mean[:, None]).square()).sum(dim=1) / same.sum(dim=1)
    return mean, spread.sqrt()


def reward_weights(rewards: Tensor, class_ids: Tensor, config: RewardWeightedConfig) -> Tensor:
    """Weights of images from their rewards, by `config.weighting`.

    Args:
        rewards: Shape `(n,)`, float32 in [0, 1].
        class_ids: Shape `(n,)`, int64.
        config: Names the weighting and its parameters.

    Returns:
        Shape `(n,)`, float32. Positive weights average 1 over the batch, except `reward`: the paper's R itself.
        `advantage` averages 0 within each class; `contrastive` is in [0, 1], 0.5 for an average image of its class.
    """
    mean, spread = class_means(rewards, class_ids)
    if config.weighting == "reward":
        return rewards
    if config.weighting == "normalized":
        return rewards / mean.clamp_min(1e-6)
    if config.weighting == "exponential":
        weights = ((rewards - rewards.max()) / config.temperature).exp()
        return weights / weights.mean()
    if config.weighting == "top_share":
        chosen = torch.zeros_like(rewards)
        for class_id in class_ids.unique():
            own = (class_ids == class_id).nonzero()[:, 0]
            count = max(1, round(config.top_share * len(own)))
            chosen[own[rewards[own].topk(count).indices]] = 1.0
        return chosen / chosen.mean()
    advantage = (rewards - mean) / spread.clamp_min(1e-3)
    if config.weighting == "advantage":
        return advantage
    # Not clipped: that would push away from a class as a whole.
    return 0.5 + 0.5 * advantage / advantage.abs().max().clamp_min(1e-6)


def contrastive_loss(
    prediction: Tensor, old_prediction: Tensor, target: Tensor, share: Tensor, contrast: float
) -> Tensor:
    """Pull towards plausible images, push away from implausible ones.

    Args:
        prediction: Of the trained model, shape `(n, channels, size, size)`.
        old_prediction: Of the model that drew the images, same shape, no gradient.
        target: Noise or velocity of the images.
        share: Shape `(n,)`, in [0, 1]: 1 pulls only, 0 pushes only.
        contrast: The implicit positive model lies `contrast` times the difference from the old one, the negative one
            as far on the other side.

    Returns:
        Shape `(n,)`, float32, divided by `contrast` so that its gradient at the start does not depend on it.

    Source: DiffusionNFT (arXiv:2509.16117).
    """
    difference = contrast * (prediction - old_prediction)
    positive = (old_prediction + difference - target).square().mean(dim=(1, 2, 3))
    negative = (old_prediction - difference - target).square().mean(dim=(1, 2, 3))
    return (share * positive + (1 - share) * negative) / contrast
