"""Settings of the `feedback` stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import DATASET, StageConfig, option


@dataclass
class FeedbackConfig(StageConfig):
    """Turn raw grades into a feedback dataset."""

    candidates: list[str] = option(
        ["runs/candidates"],
        "Candidate set that was graded: a folder or Hub id. Of several rounds give all.",
        holds=DATASET,
    )
    grades: list[str] = option(
        ["runs/grades"], "Grades: a .jsonl file, or a folder with .jsonl files. Of several rounds give all."
    )
    aggregation: Literal["majority", "dawid-skene"] = option(
        "majority",
        "How several graders become one label: the share that said plausible, or the probability of plausible given "
        "each grader's estimated error rates (three graders or more).",
    )
    unsure: Literal["drop", "half"] = option("drop", "What an unsure verdict counts: nothing, or as half plausible.")
    min_grades_per_image: int = option(1, "Images with fewer counted grades are left out.", minimum=1)
    validation_share: float = option(0.15, "Share of the images held out for validation.", minimum=0.01, maximum=0.5)
    test_share: float = option(0.2, "Share of the images held out for testing.", minimum=0.01, maximum=0.5)
    near_duplicate_bits: int = option(
        2,
        "Images whose 64-bit perceptual hashes differ in at most this many bits stay in the same split.",
        minimum=0,
        maximum=16,
    )
    bootstrap_samples: int = option(500, "Resamples behind each interval of agreement.", minimum=100, maximum=100_000)
    seed: int = option(0, "Seed of splits and intervals.", minimum=0)

    def __post_init__(self) -> None:
        """One set may be given as plain text."""
        for name in ("candidates", "grades"):
            if isinstance(value := getattr(self, name), str):
                setattr(self, name, [value])
        super().__post_init__()

    def problems(self) -> list[str]:
        """Something must be there, and left to train on."""
        found = [
            f"`{name}` is empty; name at least one." for name in ("candidates", "grades") if not getattr(self, name)
        ]
        held_out = self.validation_share + self.test_share
        if held_out > 0.8:
            found.append(
                f"`validation_share` and `test_share` add up to {held_out:.2f}; leave at least 0.2 for training."
            )
        return found
