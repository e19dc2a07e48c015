"""Verdicts arranged by grader and image, as agreement, results and the feedback dataset need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pathalign.schema import Grade

SCORES = {"plausible": 1.0, "unsure": 0.5, "implausible": 0.0}
REPEAT, REAL_CONTROL = "repeat", "real control"  # values of the candidates' column `kind`


@dataclass(frozen=True)
class Ratings:
    """Each grader's last verdict on each image.

    Attributes:
        image_ids: Graded images, in the candidates' order.
        graders: Pseudonyms, sorted.
        scores: Shape `(graders, images)`: 1 plausible, 0 implausible, 0.5 unsure; NaN where nothing counts.
        earlier: Same shape: the first score of a grader who looked at an image twice, else NaN.
        failed: Criterion -> shape `(graders, images)` bool; criteria sorted by name.
    """

    image_ids: tuple[str, ...]
    graders: tuple[str, ...]
    scores: np.ndarray
    earlier: np.ndarray
    failed: dict[str, np.ndarray]


def collect_ratings(grades: Sequence[Grade], image_ids: Sequence[str], unsure: str) -> Ratings:
    """Arrange grades by grader and image; of several by one grader on one image the last one counts.

    Args:
        grades: Oldest first.
        image_ids: All candidates.
        unsure: `drop` to leave unsure verdicts out, `half` to count them as 0.5.
    """
    first: dict[tuple[str, str], Grade] = {}
    last: dict[tuple[str, str], Grade] = {}
    for grade in grades:
        first.setdefault((grade.grader, grade.image_id), grade)
        last[grade.grader, grade.image_id] = grade
    graded = {grade.image_id for grade in grades}
    columns = {name: place for place, name in enumerate(id for id in dict.fromkeys(image_ids) if id in graded)}
    rows = {name: place for place, name in enumerate(sorted({grade.grader for grade in grades}))}
    criteria = sorted({name for grade in last.values() for name in grade.failed_criteria})
    scores = np.full((len(rows), len(columns)), np.nan)
    earlier = scores.copy()
    failed = {name: np.zeros(scores.shape, dtype=bool) for name in criteria}
    values = SCORES | ({"unsure": np.nan} if unsure == "drop" else {})
    for (grader, image_id), grade in last.items():
        cell = rows[grader], columns[image_id]
        scores[cell] = values[grade.verdict]
        if first[grader, image_id] is not grade:
            earlier[cell] = values[first[grader, image_id].verdict]
        for name in grade.failed_criteria:
            failed[name][cell] = True
    return Ratings(image_ids=tuple(columns), graders=tuple(rows), scores=scores, earlier=earlier, failed=failed)
