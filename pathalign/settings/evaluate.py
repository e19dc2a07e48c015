"""Settings of the `evaluate` stage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from pathalign.config import ADAPTER, BACKBONE, DATASET, GRADER, REWARD_MODEL, StageConfig, option

COMMIT = re.compile("[0-9a-f]{40}")


@dataclass
class EvaluateConfig(StageConfig):
    """Which candidate sets are compared, against which real images, and who judges them."""

    incidental: ClassVar[tuple[str, ...]] = ("feature_cache",)

    data: str = option("", "Real images: split `train` the base model saw, split `test` nothing saw.", holds=DATASET)
    before: str = option("", "Candidate set of the base model.", holds=DATASET)
    after: str = option("", "Candidate set of the aligned model, made with the seeds of `before`.", holds=DATASET)
    control: str | None = option(
        None, "Candidate set of continued pretraining with the same compute, same seeds.", holds=DATASET
    )
    best_of_n: str | None = option(
        None, "Candidate set of the base model, best of N by the reward model.", holds=DATASET
    )
    judge: str = option("", "Simulated grader that measures; no part of feedback or reward.", holds=GRADER)
    grader: str | None = option(
        None, "Simulated grader that gave the feedback, to compare with the judge.", holds=GRADER
    )
    reward_model: str | None = option(
        None, "Reward model; adds rewards, and what its evaluation.json says.", holds=REWARD_MODEL
    )
    feedback: str | None = option(
        None, "Feedback dataset; its split `test` shows how the rewards are calibrated.", holds=DATASET
    )
    adapter: str | None = option(
        None,
        "Adapter that made `after`, a folder or Hub id: its run record shows how rewards went while it was trained.",
        holds=ADAPTER,
    )
    encoder: str = option(
        "efficientnet-lite0",
        "Image encoder; its features carry fidelity, memorization, authenticity and usefulness.",
        holds=BACKBONE,
    )
    trust_remote_code: bool = option(
        False, "Run code that the repo of `encoder` brings; `encoder` must then be OWNER/NAME@COMMIT."
    )
    feature_cache: str | None = option(
        None, "Folder where features of images are kept for other evaluations; by default they are thrown away."
    )
    neighbours: int = option(
        5, "Nearest neighbours of precision, recall, density, coverage and beta-recall.", minimum=1, maximum=100
    )
    bootstrap_samples: int = option(2000, "Resamples behind each bootstrap interval.", minimum=100)
    confidence: float = option(0.95, "Confidence of all intervals.", minimum=0.5, maximum=0.999)
    seed: int = option(0, "Seed of the subsets of real images and of the bootstrap.", minimum=0)

    def problems(self) -> list[str]:
        """Four inputs have no default, calibration needs a reward model, and code that is run a commit."""
        problems = [
            f"`{name}` is empty; give the folder or Hub id that the `{stage}` stage wrote."
            for name, stage in (("data", "data"), ("before", "generate"), ("after", "generate"), ("judge", "graders"))
            if not getattr(self, name)
        ]
        if self.feedback and not self.reward_model:
            problems.append(
                "`feedback` shows the reward model's calibration; give `reward_model` too, or leave it out."
            )
        if self.trust_remote_code and not COMMIT.fullmatch(self.encoder.rpartition("@")[2]):
            problems.append(
                f"`trust_remote_code` runs code from {self.encoder!r}; name the commit that you have read, as "
                "OWNER/NAME@COMMIT with all 40 digits."
            )
        return problems
