"""Settings of the `graders` stage: fitting a simulated grader or judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import DATASET, StageConfig, option


@dataclass
class GraderConfig(StageConfig):
    """Fit a simulated grader on real images and their attributes."""

    data: str = option(
        "runs/data", "Folder with the splits of the grader, made by `pathalign data --roles`.", holds=DATASET
    )
    role: Literal["grader", "judge"] = option(
        "grader", "Whose images it is fitted on: split `<role>` and `<role>_validation`."
    )
    architecture: Literal["resnet", "regnet"] = option(
        "resnet", "Network, from scratch; the judge's must not be the grader's."
    )
    rubric: str = option(
        "white_blood_cells", "Checklist: a preset or a YAML file with the attribute values accepted for each class."
    )
    steps: int = option(1000, "Optimizer steps.", minimum=1)
    batch_size: int = option(64, "Images in a batch.", minimum=2)
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW; one cycle.", minimum=0.0)
    typicality_quantile: float = option(
        0.95, "Share of unseen real images that count as typical of their class.", minimum=0.5, maximum=1.0
    )
    structure_quantile: float = option(
        0.99, "Share of unseen real images that count as whole, not malformed.", minimum=0.5, maximum=0.9999
    )
    seed: int = option(0, "Seed of the weights and batches.", minimum=0)
