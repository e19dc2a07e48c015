"""Scouts: small reward models trained on a part of the grades, to rank what is left or to see what grades are worth."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathalign.artefacts import fingerprint
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, load_reward_model
from pathalign.settings.reward import RewardConfig
from pathalign.trainers.reward import train_reward

BATCH_SIZE = 32


@dataclass(frozen=True)
class ScoutSettings:
    """How a scout is trained.

    Attributes:
        data: Real images, folder or Hub id; None trains on graded images only.
        data_revision: Its Hub revision.
        encoder: As in `RewardConfig`.
        members: Networks.
        steps: Optimizer steps; the best validated epoch of them is kept.
    """

    data: str | None
    data_revision: str | None
    encoder: str
    members: int
    steps: int


def train_scout(
    settings: ScoutSettings,
    train: ImageSet,
    validation: ImageSet,
    agreement: Mapping[str, Any],
    seed: int,
    scratch: Path,
) -> RewardModel:
    """Train a scout, or load the one that an interrupted call trained on the same images.

    Args:
        settings: How.
        train: Graded images, with the columns of a feedback dataset.
        validation: Those on which it is stopped and calibrated.
        agreement: What `agreement.json` says of the graders.
        seed: Of weights, batches and augmentation.
        scratch: Where scouts are made, each in a folder of its own; a half-made one goes on from its last checkpoint.

    Raises:
        InputError: If a split has one verdict only, or the real images have other classes.
    """
    folder = scratch / fingerprint([vars(settings), train.image_ids, train.columns, validation.image_ids, seed])
    model = folder / "model"
    if not model.is_dir():
        feedback = folder / "feedback"
        for split, part in (("train", train), ("validation", validation), ("test", validation)):
            part.save(feedback, split)
        (feedback / "agreement.json").write_text(json.dumps(agreement))
        config = RewardConfig(
            feedback=str(feedback),
            data=settings.data or str(feedback),
            data_revision=settings.data_revision if settings.data else None,
            real_share=0.5 if settings.data else 0.0,
            encoder=settings.encoder,
            num_members=settings.members,
            batch_size=BATCH_SIZE,
            max_steps=settings.steps,
            patience_epochs=settings.steps,
            select_by="nll",
            min_graded=2,
            seed=seed,
        )
        train_reward(config, model)
    return load_reward_model(model)
