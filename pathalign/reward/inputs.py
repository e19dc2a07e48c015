"""What the reward model learns from, read and checked before anything expensive starts."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from typing import Literal

import numpy as np
import torch

from pathalign.cards import Grading
from pathalign.images import ImageSet, dataset_file
from pathalign.pinning import identity
from pathalign.randomness import seeded
from pathalign.reward.pairs import real_pairs
from pathalign.schema import InputError
from pathalign.settings.reward import RewardConfig

CRITERION = "failed_"
VALIDATION_PAIRS = 4  # stream of random numbers; those of the training pairs are 0 to 3


@dataclasses.dataclass(frozen=True)
class RewardInputs:
    """Graded images by split, and real images with the same class ids."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    real: ImageSet
    criteria: list[str]
    grading: Grading
    fingerprints: dict[str, str]

    @classmethod
    def load(cls, config: RewardConfig) -> RewardInputs:
        """Read and check everything that training needs.

        Raises:
            InputError: If something is missing, the classes differ, or there are too few grades to learn from.
        """
        names = ("train", "validation", "test")
        splits = {name: ImageSet.load(config.feedback, name, config.feedback_revision) for name in names}
        for split, graded in splits.items():
            _check_verdicts(config, split, graded)
        train = splits["train"] = share_of(splits["train"], config.grades)
        if len(train) < config.min_graded:
            raise InputError(
                f"{config.feedback} has {len(train)} graded training images; at least {config.min_graded} are wanted "
                f"(`grades` is {config.grades!r}). "
                "Grade more images, or lower `min_graded`."
            )
        real = ImageSet.load(config.data, "train", config.data_revision)
        if config.real_share == 1:
            unseen = ImageSet.load(config.data, "validation", config.data_revision)
            splits["validation"] = as_graded(
                with_class_names(unseen, train.class_names, config.data), train, config.seed
            )
        agreement = dataset_file(config.feedback, "agreement.json", config.feedback_revision)
        return cls(
            **splits,
            real=with_class_names(real, train.class_names, config.data),
            criteria=[name[len(CRITERION) :] for name in sorted(train.columns) if name.startswith(CRITERION)],
            grading=Grading.from_agreement(json.loads(agreement.read_text())),
            fingerprints={
                "feedback": identity(config.feedback, config.feedback_revision),
                "data": identity(config.data, config.data_revision),
            },
        )


def share_of(graded: ImageSet, share: Literal["all", "even", "odd"]) -> ImageSet:
    """All graded images, or every second one of each class and verdict: two halves that share no image."""
    if share == "all":
        return graded
    seen: Counter[tuple[int, bool]] = Counter()
    chosen = []
    for row, (class_id, plausible) in enumerate(
        zip(graded.class_ids.tolist(), graded.columns["plausible"], strict=True)
    ):
        group = (class_id, plausible > 0.5)
        if seen[group] % 2 == (share == "odd"):
            chosen.append(row)
        seen[group] += 1
    return graded.select(chosen)


def as_graded(real: ImageSet, graded: ImageSet, seed: int) -> ImageSet:
    """Pairs of real images and classes with the columns of `graded`: plausible exactly if the class is the true one."""
    class_ids, matched = real_pairs(real.class_ids, len(real.class_names), seeded(seed, VALIDATION_PAIRS))
    columns = {name: [None] * len(real) for name in graded.columns if name.startswith(CRITERION)}
    return dataclasses.replace(real, class_ids=class_ids, columns={**columns, "plausible": matched.tolist()})


def with_class_names(images: ImageSet, class_names: tuple[str, ...], source: str) -> ImageSet:
    """The same images with class ids that follow `class_names`.

    Raises:
        InputError: If the two sets of names differ.
    """
    if set(images.class_names) != set(class_names):
        raise InputError(
            f"The feedback knows the classes {sorted(class_names)}, {source} knows {sorted(images.class_names)}. "
            "Both must have the same: choose them by `classes` of the `data` stage, or grade images of the others too."
        )
    ids = torch.tensor([class_names.index(name) for name in images.class_names])
    return dataclasses.replace(images, class_ids=ids[images.class_ids], class_names=class_names)


def _check_verdicts(config: RewardConfig, split: str, graded: ImageSet) -> None:
    if "plausible" not in graded.columns:
        raise InputError(
            f"Split {split!r} of {config.feedback} has no column `plausible`; make it with `pathalign feedback`."
        )
    labels = np.array(graded.columns["plausible"], dtype=float)
    if not ((labels >= 0) & (labels <= 1)).all():
        raise InputError(
            f"Split {split!r} of {config.feedback} has values of `plausible` outside 0 to 1; make it again."
        )
    counts = {"plausible": int((labels > 0.5).sum()), "implausible": int((labels < 0.5).sum())}
    if split != "test" and 0 in counts.values():
        raise InputError(
            f"Split {split!r} of {config.feedback} has {counts['plausible']} plausible and {counts['implausible']} "
            "implausible images; a reward model needs both. Grade more images, or candidates of another quality."
        )
