"""Settings of the `data` stage."""

from __future__ import annotations

from dataclasses import dataclass

from pathalign.config import StageConfig, option


@dataclass
class DataConfig(StageConfig):
    """Which real images are used, and what for."""

    source: str = option("phantom", "Folder, parquet dataset or Hub id of labelled images; `phantom` draws them.")
    revision: str | None = option(None, "Hub revision of `source`.")
    image_size_px: int = option(32, "Width and height that all images get, in pixels.", minimum=8, maximum=1024)
    classes: list[str] = option([], "Class names to use, in this order; all if empty.")
    per_class: int | None = option(None, "Training images of each class for the base model; all if empty.", minimum=2)
    rare: list[str] = option([], "CLASS=COUNT: a class of which the base model gets fewer training images.")
    roles: bool = option(
        False,
        "Give the images that `per_class` leaves over to the simulated grader and the judge, which share none "
        "(splits `grader`, `grader_validation`, `judge`, `judge_validation`).",
    )
    validation_share: float = option(
        0.1, "Share held out for validation where the source has no such split.", minimum=0.01, maximum=0.5
    )
    test_share: float = option(
        0.2, "Share held out for testing where the source has no such split.", minimum=0.01, maximum=0.5
    )
    near_duplicate_bits: int = option(
        4,
        "Images whose 64-bit perceptual hashes differ in at most this many bits count as near-duplicates.",
        minimum=0,
        maximum=16,
    )
    strict: bool = option(False, "Refuse a source with any unreadable file instead of leaving it out with a report.")
    phantom_per_class: int = option(700, "Phantom images drawn for each class.", minimum=20)
    seed: int = option(0, "Seed of splits, roles and the phantom.", minimum=0)

    def problems(self) -> list[str]:
        """Roles need something left over, and rare classes must be rarer than the others."""
        if self.roles and self.per_class is None:
            return ["`roles` needs `per_class`: say how many training images of each class the base model may see."]
        for text in self.rare:
            name, _, count = text.rpartition("=")
            if not name or not count.isdecimal() or not 2 <= int(count) <= (self.per_class or 0):
                return [f"`rare` has {text!r}; write CLASS=COUNT, from 2 to `per_class` ({self.per_class}) images."]
        if len(set(self.classes)) == 1:
            return [f"`classes` names one class, {self.classes[0]!r}; plausibility of a class needs at least two."]
        return []
