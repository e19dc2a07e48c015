"""What the single networks of one reward model, or of several, say of images, and how their encoders see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit

from pathalign.images import ImageSet, to_pixel_values
from pathalign.reward.image_processing_reward import resize
from pathalign.reward.modeling_reward import RewardModel


@dataclass(frozen=True)
class Opinions:
    """What an ensemble says.

    Attributes:
        probabilities: Shape `(members, n)`, float64, each member's probability of plausible, at the temperature of the
            mean of all members of its model. Only that mean is calibrated: single members are not.
        features: Shape `(n, d)`, float64: of all encoders side by side, each divided by its root mean square norm, so
            that none outweighs the others in a distance.
    """

    probabilities: np.ndarray
    features: np.ndarray


@torch.no_grad()
def opinions(models: Sequence[RewardModel], images: ImageSet, batch_size: int = 256) -> Opinions:
    """Ask every member of every model about images as images of their classes.

    Raises:
        InputError: If a model does not know a class.
    """
    parts = [_opinions(model, images, batch_size) for model in models]
    probabilities = np.concatenate([own for own, _ in parts])
    features = [encoder for _, encoders in parts for encoder in encoders]
    norms = [np.sqrt(np.square(own).sum(axis=1).mean()) if len(own) else 1.0 for own in features]
    scaled = [own / max(norm, 1e-12) for own, norm in zip(features, norms, strict=True)]
    return Opinions(probabilities, np.concatenate(scaled, axis=1))


def _opinions(model: RewardModel, images: ImageSet, batch_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    ids = model.class_ids(images.labels())
    logits: list[np.ndarray] = []
    features: list[list[np.ndarray]] = [[] for _ in model.encoders]
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        pixel_values = to_pixel_values(images.images[rows]).to(model.device, model.dtype)
        seen = [encoder(resize(pixel_values, model.config.image_size_px)) for encoder in model.encoders]
        class_ids = ids[rows].to(model.device)
        members = [head(seen[index % len(seen)], class_ids)[:, 0] for index, head in enumerate(model.heads)]
        logits.append(torch.stack(members).double().cpu().numpy())
        for kept, own in zip(features, seen, strict=True):
            kept.append(own.double().cpu().numpy())
    scaled = np.concatenate(logits, axis=1) / model.config.temperature
    return expit(scaled), [np.concatenate(kept) for kept in features]
