"""Settings of `pathalign reward score`."""

from __future__ import annotations

from dataclasses import dataclass

from pathalign.config import DATASET, REWARD_MODEL, StageConfig, option


@dataclass
class ScoreConfig(StageConfig):
    """Score a candidate set with a reward model, shard by shard."""

    candidates: str = option(
        "runs/candidates", "Images to score, in one file or in shards: a folder or Hub dataset.", holds=DATASET
    )
    split: str = option("train", "Split of `candidates`.")
    reward_model: str = option("runs/reward", "Reward model: a folder or Hub id.", holds=REWARD_MODEL)
    batch_size: int = option(250, "Images scored at once.", minimum=1)
    with_images: bool = option(False, "Keep the images and their other columns: a candidate set with rewards.")
