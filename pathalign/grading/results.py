"""What a study has found so far: pace, plausible shares, agreement, disagreements. Pure functions over the rows.

A share counts images, not grades: of several graders the majority speaks, a tie is not plausible, `unsure` counts for
neither side. So its Wilson interval rests on independent images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from pathalign import agreement
from pathalign.agreement import Estimate, share
from pathalign.grades import SHOWN, current_grades
from pathalign.grading.preferences import PreferenceTally, tally
from pathalign.ratings import REAL_CONTROL, SCORES, collect_ratings
from pathalign.schema import VERDICTS, Grade, InputError, Preference

Images = Mapping[str, Mapping[str, Any]]  # image id -> `class_label`, `kind`
MS_PER_HOUR = 3_600_000


@dataclass(frozen=True)
class GraderResult:
    """One grader's work.

    Attributes:
        grader: Pseudonym.
        simulated: Whether the grader is a network.
        verdicts: Verdict -> number of standing grades.
        plausible: Share of the synthetic images that this grader finds plausible.
        controls: Share of the hidden real images that this grader finds plausible.
        median_active_s: Active seconds of a typical grade, corrected ones included; `None` if no time was kept.
        grades_per_hour: Standing grades in an hour of active time.
        repeats: Kappa of the first and the last look at images shown twice (intra-rater).
        first_at: When the first grade was recorded.
        last_at: When the last one was.
    """

    grader: str
    simulated: bool
    verdicts: dict[str, int]
    plausible: Estimate
    controls: Estimate
    median_active_s: float | None
    grades_per_hour: float | None
    repeats: Estimate
    first_at: str
    last_at: str

    @property
    def n_grades(self) -> int:
        """Standing grades."""
        return sum(self.verdicts.values())


@dataclass(frozen=True)
class ClassResult:
    """Plausible shares of one class, or of all (`class_label` is None).

    Attributes:
        class_label: Name of the class.
        plausible: Of all graded synthetic images.
        unbiased: Of those that were drawn at random only; what a reward model chose is not typical of the generator.
        controls: Of the hidden real images.
    """

    class_label: str | None
    plausible: Estimate
    unbiased: Estimate
    controls: Estimate


@dataclass(frozen=True)
class CriterionResult:
    """How often a criterion failed on synthetic images: share of the counted grades, and how often in each class."""

    name: str
    failed: Estimate
    by_class: dict[str, int]


@dataclass(frozen=True)
class Disagreement:
    """An image that some find plausible and others do not; each grader's last grade of it."""

    image_id: str
    class_label: str
    kind: str
    grades: tuple[Grade, ...]

    def of(self, verdict: str) -> tuple[Grade, ...]:
        """Those who gave this verdict."""
        return tuple(grade for grade in self.grades if grade.verdict == verdict)


@dataclass(frozen=True)
class Results:
    """What the results page shows; `Estimate.value` is `None` where a figure is not determined.

    Attributes:
        n_grades: Standing grades.
        n_images: Graded images.
        n_simulated: Standing grades by simulated graders.
        left_out: Rows that do not count: `duplicates` and `superseded`.
        graders: Sorted by pseudonym.
        total: All classes together.
        classes: In the order of the study.
        criteria: Most often failed first.
        alpha: Krippendorff's, nominal.
        fleiss: Fleiss' kappa.
        cohen: Cohen's kappa of each two graders.
        disagreements: Most evenly split first.
        preferences: Pairwise choices by class.
    """

    n_grades: int
    n_images: int
    n_simulated: int
    left_out: dict[str, int]
    graders: tuple[GraderResult, ...]
    total: ClassResult
    classes: tuple[ClassResult, ...]
    criteria: tuple[CriterionResult, ...]
    alpha: Estimate
    fleiss: Estimate
    cohen: dict[tuple[str, str], Estimate]
    disagreements: tuple[Disagreement, ...]
    preferences: tuple[PreferenceTally, ...]


def study_results(
    grades: Sequence[Grade],
    preferences: Sequence[Preference],
    images: Images,
    class_names: Sequence[str] = (),
    repeats: Collection[str] | None = None,
    samples: int = 200,
    seed: int = 0,
) -> Results:
    """Compute everything that the results page shows.

    Args:
        grades: All rows as recorded, corrections and copies among them.
        preferences: The same of pairwise choices.
        images: Image id -> `class_label` and `kind` (`synthetic` or `real control`) of every image of the study.
        class_names: Order of the classes; those not named follow by name.
        repeats: Ids of grades given to a hidden repeat; by default every grade of an image that its grader had graded.
        samples: Resamples behind each interval of agreement.
        seed: Of the resampling.

    Raises:
        InputError: If a grade is about an image that the study does not have, or corrections cannot be followed.
    """
    _check_known(grades, images)
    current = current_grades(grades)
    standing = current.grades
    image_ids = list(dict.fromkeys(grade.image_id for grade in standing))
    ratings = collect_ratings(standing, image_ids, "drop")
    counted = {grade.class_label for grade in standing}
    labels = [*(name for name in class_names if name in counted), *sorted(counted - set(class_names))]
    return Results(
        n_grades=len(standing),
        n_images=len(image_ids),
        n_simulated=sum(grade.simulated for grade in standing),
        left_out={"duplicates": current.duplicates, "superseded": current.superseded},
        graders=tuple(
            grader_result(
                [grade for grade in grades if grade.grader == name],
                [grade for grade in standing if grade.grader == name],
                images,
                partial(agreement.cohen, samples=samples, seed=seed),
                repeats,
            )
            for name in ratings.graders
        ),
        total=class_result(None, standing, images),
        classes=tuple(class_result(name, standing, images) for name in labels),
        criteria=failed_criteria(standing, images),
        alpha=agreement.alpha(ratings.scores, samples, seed),
        fleiss=agreement.fleiss(ratings.scores, samples, seed),
        cohen=agreement.pairwise_cohen(ratings.scores, ratings.graders, samples, seed),
        disagreements=disagreements(standing, images),
        preferences=tally(preferences),
    )


def plausible_share(grades: Sequence[Grade]) -> Estimate:
    """Share of the images that the majority of their graders find plausible.

    Args:
        grades: Standing ones, oldest first; of several by one grader on one image the last counts.
    """
    ratings = collect_ratings(grades, [grade.image_id for grade in grades], "drop")
    counted = ~np.isnan(ratings.scores)
    total, count = np.nansum(ratings.scores, axis=0), counted.sum(axis=0)
    return share(int((2 * total > count).sum()), int((count > 0).sum()))


def class_result(class_label: str | None, standing: Sequence[Grade], images: Images) -> ClassResult:
    """Shares of one class, or of all classes."""
    own = [grade for grade in standing if class_label in (None, grade.class_label)]
    synthetic = [grade for grade in own if not _is_control(grade, images)]
    return ClassResult(
        class_label=class_label,
        plausible=plausible_share(synthetic),
        unbiased=plausible_share([grade for grade in synthetic if grade.drawn_by == "random"]),
        controls=plausible_share([grade for grade in own if _is_control(grade, images)]),
    )


def failed_criteria(standing: Sequence[Grade], images: Images) -> tuple[CriterionResult, ...]:
    """Criteria that graders said fail on synthetic images, most often failed first."""
    last = {(grade.grader, grade.image_id): grade for grade in standing if not _is_control(grade, images)}
    counted = [grade for grade in last.values() if grade.verdict != "unsure"]
    by_class: dict[str, Counter[str]] = {}
    for grade in counted:
        for name in set(grade.failed_criteria):
            by_class.setdefault(name, Counter())[grade.class_label] += 1
    rows = [
        CriterionResult(name, share(n.total(), len(counted)), dict(n.most_common())) for name, n in by_class.items()
    ]
    return tuple(sorted(rows, key=lambda row: (-(row.failed.value or 0.0), row.name)))


def disagreements(standing: Sequence[Grade], images: Images) -> tuple[Disagreement, ...]:
    """Images with both verdicts: most evenly split first, then those that more graders have seen."""
    last = {(grade.grader, grade.image_id): grade for grade in standing}
    by_image: dict[str, list[Grade]] = {}
    for grade in last.values():
        by_image.setdefault(grade.image_id, []).append(grade)
    found = [
        Disagreement(
            image_id=image_id,
            class_label=opinions[0].class_label,
            kind=images[image_id]["kind"],
            grades=tuple(sorted(opinions, key=lambda grade: (VERDICTS.index(grade.verdict), grade.grader))),
        )
        for image_id, opinions in by_image.items()
        if {"plausible", "implausible"} <= {grade.verdict for grade in opinions}
    ]

    def rank(item: Disagreement) -> tuple[float, int, str]:
        n_yes, n_no = len(item.of("plausible")), len(item.of("implausible"))
        return abs(n_yes - n_no) / (n_yes + n_no), -len(item.grades), item.image_id

    return tuple(sorted(found, key=rank))


def pace(rows: Iterable[Grade], n_standing: int) -> tuple[float | None, float | None]:
    """Median active seconds of a grade, and standing grades in an hour of active time.

    Args:
        rows: All grades with their times; the time of a corrected grade was spent too.
        n_standing: Grades that stand.

    Returns:
        `None` for what cannot be told, since no time was kept.
    """
    times = [grade.active_ms for grade in rows if grade.active_ms is not None]
    if not times:
        return None, None
    total = sum(times)
    return median(times) / 1000, n_standing * MS_PER_HOUR / total if total else None


def grader_result(
    rows: Sequence[Grade],
    standing: Sequence[Grade],
    images: Images,
    kappa: Callable[[np.ndarray, np.ndarray], Estimate],
    repeats: Collection[str] | None = None,
) -> GraderResult:
    """One grader's work.

    Args:
        rows: All grades of this grader; only their times are used.
        standing: Those that stand, one or more.
        images: See `study_results`.
        kappa: Agreement of two looks at the same images.
        repeats: See `study_results`.
    """
    verdicts = Counter(grade.verdict for grade in standing)
    times = sorted(grade.recorded_at for grade in standing if grade.recorded_at)
    median_active_s, per_hour = pace({grade.grade_id: grade for grade in rows}.values(), len(standing))
    return GraderResult(
        grader=standing[0].grader,
        simulated=any(grade.simulated for grade in standing),
        verdicts={verdict: verdicts[verdict] for verdict in VERDICTS},
        plausible=plausible_share([grade for grade in standing if not _is_control(grade, images)]),
        controls=plausible_share([grade for grade in standing if _is_control(grade, images)]),
        median_active_s=median_active_s,
        grades_per_hour=per_hour,
        repeats=kappa(*looks(standing, repeats)),
        first_at=times[0] if times else "",
        last_at=times[-1] if times else "",
    )


def looks(standing: Sequence[Grade], repeats: Collection[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one grader's first and second look at the images shown twice, each of shape `(images,)`.

    Args:
        standing: The grader's grades, oldest first.
        repeats: Ids of those that are second looks; by default the last one of each image with several.
    """
    first: dict[str, Grade] = {}
    second: dict[str, Grade] = {}
    for grade in standing:
        later = grade.image_id in first if repeats is None else grade.grade_id in repeats
        (second if later else first)[grade.image_id] = grade
    score = SCORES | {"unsure": np.nan}
    both = [image_id for image_id in first if image_id in second]
    earlier, later_look = (np.array([score[found[name].verdict] for name in both]) for found in (first, second))
    return earlier, later_look


def _is_control(grade: Grade, images: Images) -> bool:
    return bool(images[grade.image_id]["kind"] == REAL_CONTROL)


def _check_known(grades: Sequence[Grade], images: Images) -> None:
    missing = sorted({grade.image_id for grade in grades} - set(images))
    if missing:
        raise InputError(
            f"{len(missing)} graded images are not among the {len(images)} of this study: "
            f"{', '.join(missing[:SHOWN])}{' ...' if len(missing) > SHOWN else ''}. "
            "Give the study, or the candidate set, that these grades are about."
        )
