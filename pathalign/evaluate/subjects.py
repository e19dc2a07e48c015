"""The image sets of an evaluation: read, numbered alike, and checked to be comparable before anything expensive."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from pathalign.grading.simulated import class_ids_for
from pathalign.images import ImageSet
from pathalign.schema import InputError, RunRecord
from pathalign.settings.evaluate import EvaluateConfig

GENERATED = ("before", "after", "control", "best_of_n")
PAIRED = ("before", "after", "control")


@dataclass(frozen=True)
class Subjects:
    """All images of one evaluation; every set numbers its classes like `test`."""

    generated: dict[str, ImageSet]
    train: ImageSet
    test: ImageSet
    feedback: ImageSet | None
    phantom: bool

    def judged(self) -> dict[str, ImageSet]:
        """The sets that judge, grader and reward model look at, real test images last."""
        return {**self.generated, "real": self.test}


def load_subjects(config: EvaluateConfig) -> Subjects:
    """Read all image sets and check that they can be compared.

    Raises:
        InputError: See `evaluate`.
    """
    train, test = ImageSet.load(config.data, "train"), ImageSet.load(config.data, "test")
    sources = {name: path for name in GENERATED if (path := getattr(config, name))}
    generated = {name: _adopt(ImageSet.load(path), test, name, path) for name, path in sources.items()}
    for name in PAIRED[1:]:
        if name in generated:
            _check_pairs(generated["before"], generated[name], name)
    feedback = ImageSet.load(config.feedback, "test") if config.feedback else None
    run = Path(config.data) / RunRecord.FILE_NAME
    phantom = run.is_file() and RunRecord.load(config.data).config.get("source") == "phantom"
    return Subjects(generated, _adopt(train, test, "data", config.data), test, feedback, phantom)


def _adopt(images: ImageSet, test: ImageSet, name: str, path: str) -> ImageSet:
    """`images` with the class ids of `test`, after checking that classes and size are the same."""
    if set(images.class_names) != set(test.class_names):
        raise InputError(
            f"`{name}` ({path}) has the classes {list(images.class_names)}, the real test images have "
            f"{list(test.class_names)}. Compare sets that were made from the same data."
        )
    if images.image_size_px != test.image_size_px:
        raise InputError(
            f"`{name}` ({path}) has images of {images.image_size_px} px, the real test images have "
            f"{test.image_size_px} px. Make the data again with `image_size_px` = {images.image_size_px}."
        )
    ids = class_ids_for(images, test.class_names)
    absent = sorted(set(test.class_names) - {test.class_names[index] for index in ids.tolist()})
    if absent:
        raise InputError(f"`{name}` ({path}) has no image of the classes {absent}; generate some of every class.")
    return replace(images, class_ids=ids, class_names=test.class_names)


def _check_pairs(before: ImageSet, other: ImageSet, name: str) -> None:
    """Row i of both sets must be the same seed and class, or the paired comparison is void."""
    rows = [list(zip(images.columns.get("seed", []), images.labels(), strict=False)) for images in (before, other)]
    if rows[0] == rows[1] and len(rows[0]) == len(before) == len(other):
        return
    different = next((i for i, pair in enumerate(zip(*rows, strict=False)) if pair[0] != pair[1]), None)
    if different is None:
        found = f"`before` has {len(rows[0])} images with a seed, `{name}` has {len(rows[1])}"
    else:
        first, second = (pairs[different] for pairs in rows)
        found = f"row {different} is (seed, class) {first} in `before` and {second} in `{name}`"
    raise InputError(
        f"`before` and `{name}` do not pair up: {found}. Generate both with the same seed, classes and number."
    )
