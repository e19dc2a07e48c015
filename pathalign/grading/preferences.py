"""Pairwise choices: which ones stand, who won, and the dataset of chosen and rejected images that DPO learns from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pathalign.agreement import Estimate, share
from pathalign.schema import InputError, Preference

Picture = Callable[[str], Image.Image]  # image id -> its pixels


@dataclass(frozen=True)
class PreferenceTally:
    """Choices in one class.

    Attributes:
        class_label: Name of the class.
        choices: `left`, `right`, `tie`, `both_bad` -> number of choices that stand.
        left: Share of left among the decided ones. Sides are random, so far from one half means a grader who looks
            at the side and not at the image.
    """

    class_label: str
    choices: dict[str, int]
    left: Estimate


@dataclass(frozen=True)
class Contest:
    """How often the second of two models won: share among decided choices, and how many were not decided."""

    wins: Estimate
    ties: int
    both_bad: int


@dataclass(frozen=True)
class Pair:
    """One decided choice: the image that was chosen, and the one beside it that was not."""

    preference_id: str
    class_label: str
    chosen_id: str
    rejected_id: str
    grader: str


def standing_preferences(preferences: Sequence[Preference]) -> list[Preference]:
    """Leave out rows that were sent twice and choices that a later one supersedes; order as given.

    Raises:
        InputError: If two different choices have one id.
    """
    by_id: dict[str, Preference] = {}
    for row in preferences:
        first = by_id.setdefault(row.preference_id, row)
        if (first.choice, first.grader) != (row.choice, row.grader):
            raise InputError(
                f"Preference {row.preference_id} is {first.choice!r} by {first.grader}, then {row.choice!r} by "
                f"{row.grader}; give each choice an id of its own."
            )
    corrected = {row.supersedes for row in by_id.values()}
    return [row for row in by_id.values() if row.preference_id not in corrected]


def tally(preferences: Sequence[Preference]) -> tuple[PreferenceTally, ...]:
    """Count the choices that stand, by class, classes in alphabetical order."""
    counts: dict[str, Counter[str]] = {}
    for row in standing_preferences(preferences):
        counts.setdefault(row.class_label, Counter())[row.choice] += 1
    return tuple(
        PreferenceTally(
            class_label=name,
            choices={choice: found[choice] for choice in ("left", "right", "tie", "both_bad")},
            left=share(found["left"], found["left"] + found["right"]),
        )
        for name, found in sorted(counts.items())
    )


def contest(preferences: Sequence[Preference], first_ids: set[str], second_ids: set[str]) -> Contest:
    """How often images of the second model were chosen over images of the first.

    Args:
        preferences: Choices; those that are not between one image of each model are not counted.
        first_ids: Image ids of the first model, such as the base.
        second_ids: Image ids of the second model, such as the aligned one.
    """
    counts: Counter[str] = Counter()
    for row in standing_preferences(preferences):
        sides = row.left_image_id, row.right_image_id
        second = next((side for side, name in zip(("left", "right"), sides, strict=True) if name in second_ids), None)
        if second is None or not first_ids & set(sides):
            continue
        counts["win" if row.choice == second else "loss" if row.choice in ("left", "right") else row.choice] += 1
    wins = share(counts["win"], counts["win"] + counts["loss"])
    return Contest(wins=wins, ties=counts["tie"], both_bad=counts["both_bad"])


def preference_pairs(preferences: Sequence[Preference]) -> list[Pair]:
    """The decided choices that stand as pairs of a chosen and a rejected image; ties and both bad teach no order."""
    pairs = []
    for row in standing_preferences(preferences):
        if row.choice not in ("left", "right"):
            continue
        chosen, rejected = row.left_image_id, row.right_image_id
        if row.choice == "right":
            chosen, rejected = rejected, chosen
        pairs.append(Pair(row.preference_id, row.class_label, chosen, rejected, row.grader))
    return pairs


def save_pairs(
    pairs: Sequence[Pair], picture: Picture, folder: Path, class_names: Sequence[str], marks: Mapping[str, Any]
) -> None:
    """Write `data/train-00000-of-00001.parquet` as `datasets.load_dataset` reads it.

    Columns: `chosen` and `rejected` (images), `label` (class), `chosen_id`, `rejected_id`, `preference_id`, `grader`.

    Args:
        pairs: At least one.
        picture: Gives each image by its id.
        folder: Where the dataset goes.
        class_names: All classes, in the order of the study.
        marks: Columns with the same value in every row, such as the notice.

    Raises:
        InputError: If there are no pairs, or a class is not among `class_names`.
    """
    import datasets

    if not pairs:
        raise InputError("No pairwise choice is decided yet: grade in pairwise mode, or leave out `preferences`.")
    unknown = sorted({pair.class_label for pair in pairs} - set(class_names))
    if unknown:
        raise InputError(f"Choices name the classes {unknown}; the candidate set has {list(class_names)}.")
    columns: dict[str, list[Any]] = {
        "chosen": [picture(pair.chosen_id) for pair in pairs],
        "rejected": [picture(pair.rejected_id) for pair in pairs],
        "label": [list(class_names).index(pair.class_label) for pair in pairs],
        **{
            name: [getattr(pair, name) for pair in pairs]
            for name in ("chosen_id", "rejected_id", "preference_id", "grader")
        },
        **{name: [value] * len(pairs) for name, value in marks.items()},
    }
    features = datasets.Dataset.from_dict({name: columns[name] for name in columns if name not in _TYPED}).features
    features |= {
        "chosen": datasets.Image(),
        "rejected": datasets.Image(),
        "label": datasets.ClassLabel(names=list(class_names)),
    }
    ordered = datasets.Features({name: features[name] for name in columns})
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=ordered).to_parquet(path)


_TYPED = ("chosen", "rejected", "label")
