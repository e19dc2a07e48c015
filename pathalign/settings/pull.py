"""Settings of pulling grades: of the command, and of the `grade` stage by experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pathalign.config import DATASET, StageConfig, option

STUDY = "study.yaml"  # what a run writes beside its candidates for their graders


@dataclass
class PullConfig(StageConfig):
    """Merge the grades that the servers of a study sent, from a Hub dataset or a folder."""

    # When and how often it is looked decides nothing about what is made.
    incidental: ClassVar[tuple[str, ...]] = ("poll_s", "timeout_s")
    counts_simulated: ClassVar[bool] = True  # towards the grades that are waited for

    source: str = option(
        "",
        "Where grades gather: OWNER/NAME[@REVISION] or hf://datasets/OWNER/NAME of a Hub dataset, or a folder (as "
        "./NAME/... if it is not there yet). A run makes a folder beside its candidates if there is none.",
    )
    candidates: str | None = option(
        None,
        "Images that were graded, to count and check against: a folder or Hub id. Grades of others are left out.",
        holds=DATASET,
    )
    revision: str | None = option(None, "Branch, tag or commit of the dataset; without it the newest commit.")
    comments: bool = option(False, "Keep the graders' free text too.")
    min_grades: int = option(0, "Wait until so many grades stand.", minimum=0)
    min_grades_per_class: int = option(0, "Wait until each class has so many.", minimum=0)
    poll_s: float = option(30.0, "Seconds between two looks while waiting.", minimum=0.1)
    timeout_s: float = option(0.0, "Give up waiting after so many seconds; 0 is never.", minimum=0.0)

    def problems(self) -> list[str]:
        """Classes are those of the candidates."""
        if self.min_grades_per_class and self.candidates is None:
            return ["`min_grades_per_class` needs `candidates`: their classes are counted."]
        return []


@dataclass
class CollectConfig(PullConfig):
    """Wait for the grades that experts give a candidate set, and take them."""

    incidental: ClassVar[tuple[str, ...]] = (*PullConfig.incidental, "references", "rubric", "study")
    counts_simulated: ClassVar[bool] = False  # a run by experts waits for experts

    study: str | None = option(
        None, "Study whose texts, checklist, people and order are those of the study that is written for the graders."
    )
    references: str | None = option(
        "runs/data", "Real images that graders see beside the candidates; `study` has its own."
    )
    rubric: str = option("white_blood_cells", "Checklist: a preset or a YAML file; `study` has its own.")
