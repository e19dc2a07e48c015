"""Settings of `pathalign study next`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import DATASET, REWARD_MODEL, StageConfig, option


@dataclass
class NextConfig(StageConfig):
    """Propose which images of a study to grade next, and say what that is expected to bring."""

    study: str = option("study.yaml", "YAML file of the study.")
    count: int = option(40, "Images to propose.", minimum=1)
    strategy: Literal["mixed", "uncertainty", "disagreement", "diverse"] = option(
        "mixed",
        "`uncertainty`: entropy; `disagreement`: mutual information (BALD) of several networks; `diverse`: k-center on "
        "their features; `mixed`: informative and diverse images of the classes in deficit.",
    )
    reward_models: list[str] = option(
        [],
        "Reward models that rank, folders or Hub ids; by default the study's, else small ones trained on the grades.",
        holds=REWARD_MODEL,
    )
    grades: str | None = option(
        None, "Where grades are: a .jsonl file, a folder, or hf://datasets/USER/REPO; by default the study's `sink`."
    )
    data: str | None = option(
        None,
        "Real images, split `train`, that the small reward models learn from too: a folder or Hub id; by default the "
        "study's `references`.",
        holds=DATASET,
        revision="data_revision",
    )
    data_revision: str | None = option(None, "Hub revision of `data`.")
    refits: int = option(
        3, "Small reward models for each of four numbers of grades, for the expected gain; 0 leaves it out.",
        minimum=0, maximum=50,
    )  # fmt: skip
    scout_encoder: Literal["convnet", "densenet", "efficientnet-lite0"] = option(
        "convnet", "Encoder of the small reward models, as in the `reward` stage."
    )
    scout_steps: int = option(150, "Optimizer steps of each of them.", minimum=1)
    seed: int = option(0, "Seed of subsets and refits.", minimum=0)

    def problems(self) -> list[str]:
        """A curve through one draw has no interval."""
        return ["`refits` is 1; give 0 for none, or 2 and more for an interval."] if self.refits == 1 else []
