"""Settings of the `grade` stage by simulated graders."""

from __future__ import annotations

from dataclasses import dataclass

from pathalign.config import DATASET, GRADER, StageConfig, option
from pathalign.settings.subtypes import RULE_HELP, rule_problems


@dataclass
class GradeConfig(StageConfig):
    """Grade a candidate set with simulated graders."""

    candidates: str = option("runs/candidates", "Candidate set made by `pathalign generate`.", holds=DATASET)
    grader: str = option("runs/grader", "Simulated grader made by `pathalign grade fit`.", holds=GRADER)
    graders: int = option(1, "Graders that look at each image; they differ by their noise.", minimum=1, maximum=100)
    flip_rate: float = option(0.0, "Share of verdicts that a grader turns round at random.", minimum=0.0, maximum=0.5)
    bias: float = option(0.0, "Added to the log-odds of plausible: above 0 lenient, below 0 strict.")
    faulty_graders: int | None = option(
        None, "How many of the graders have `flip_rate` and `bias`, the last ones; all if empty.", minimum=0
    )
    threshold: float = option(0.5, "Probability from which an image is called plausible.", minimum=0.01, maximum=0.99)
    threshold_spread: float = option(0.0, "Standard deviation of the graders' own log-odds thresholds.", minimum=0.0)
    unsure_margin: float = option(
        0.0, "Probabilities this close to the threshold are called unsure.", minimum=0.0, maximum=0.5
    )
    subtypes: list[str] = option(
        [], f"Subtypes that graders mark on images they call plausible, by the attribute that they see: {RULE_HELP}."
    )
    max_marks: int = option(100, "Images that are marked at most, drawn at random.", minimum=0)
    seed: int = option(0, "Seed of the graders' noise.", minimum=0)

    def problems(self) -> list[str]:
        """There cannot be more faulty graders than graders, and rules must be readable."""
        found = rule_problems(self.subtypes)
        if self.faulty_graders is not None and self.faulty_graders > self.graders:
            found.append(f"`faulty_graders` is {self.faulty_graders}, but there are {self.graders} `graders`.")
        return found
