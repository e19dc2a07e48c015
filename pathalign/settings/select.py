"""Settings of the `select` stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import DATASET, StageConfig, option


@dataclass
class SelectConfig(StageConfig):
    """Keep a part of a feedback dataset, as if experts had graded no more: which part, by a strategy.

    `random` is a uniform draw. The others begin with one, train a scout, a small reward model, on what is kept so far,
    take the images that it ranks first, and go on: what the experts of a study with `pathalign study next` would have
    graded. Validation images are drawn at random by every strategy, and the test split stays whole.
    """

    feedback: str = option(
        "runs/feedback",
        "Feedback dataset with splits `train`, `validation`, `test`: a folder or Hub id.",
        holds=DATASET,
        revision="feedback_revision",
    )
    feedback_revision: str | None = option(None, "Hub revision of `feedback`.")
    data: str = option(
        "runs/data", "Real images, split `train`, for the scouts: a folder or Hub id.", holds=DATASET,
        revision="data_revision",
    )  # fmt: skip
    data_revision: str | None = option(None, "Hub revision of `data`.")
    strategy: Literal["random", "uncertainty", "disagreement", "diverse", "mixed"] = option(
        "random",
        "`uncertainty`: entropy; `disagreement`: mutual information (BALD) of the scout's networks; `diverse`: "
        "k-center on its features; `mixed`: informative and diverse images of the classes in deficit.",
    )
    budget: float = option(
        0.25, "What is kept of the graded training and validation images: a share up to 1, or above 1 their number.",
        minimum=0.0,
    )  # fmt: skip
    start: float = option(
        0.05, "Share that is drawn at random before the first scout learns.", minimum=0.001, maximum=1.0
    )
    batches: int = option(
        6, "Rounds from `start` to all images, each a constant factor larger; a budget ends within one.", minimum=1,
        maximum=100,
    )  # fmt: skip
    scout_encoder: Literal["convnet", "densenet", "efficientnet-lite0"] = option(
        "convnet", "Encoder of the scouts, as in the `reward` stage."
    )
    scout_members: int = option(3, "Networks of each scout.", minimum=1, maximum=16)
    scout_steps: int = option(150, "Optimizer steps of each scout.", minimum=1)
    seed: int = option(0, "Seed of the draw and of the scouts.", minimum=0)

    def problems(self) -> list[str]:
        """Checks across fields."""
        found = []
        if not 0 < self.budget <= 1 and self.budget != int(self.budget):
            found.append(f"`budget` is {self.budget}; give a share above 0 up to 1, or a whole number of images.")
        if self.budget == 0:
            found.append("`budget` is 0; give a share above 0 up to 1, or a whole number of images.")
        if self.strategy == "disagreement" and self.scout_members < 2:
            found.append("`strategy: disagreement` needs two networks or more; raise `scout_members`.")
        return found
