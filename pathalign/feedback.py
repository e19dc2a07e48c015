"""Raw grades -> feedback dataset: checks, one label from several graders, agreement, splits without leakage."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pathalign import agreement
from pathalign.artefacts import artefact, fingerprint
from pathalign.grades import SHOWN, CurrentGrades, current_grades, read_grades
from pathalign.images import ImageSet
from pathalign.near_duplicates import near_duplicate_groups, perceptual_hashes
from pathalign.pinning import pinned
from pathalign.progress import say
from pathalign.ratings import REAL_CONTROL, REPEAT, SCORES, Ratings, collect_ratings
from pathalign.schema import Grade, InputError, RunRecord
from pathalign.settings.feedback import FeedbackConfig

AGREEMENT_FILE = "agreement.json"


def build(config: FeedbackConfig, output_dir: str | Path) -> RunRecord:
    """Write a feedback dataset: the splits `train`, `validation` and `test`, and `agreement.json`.

    Columns: `plausible` (0..1), `majority` (`plausible` above one half), `n_grades`, `failed_<criterion>` (share of the
    counted graders), the candidate's `seed`, and where graders marked subtypes `subtype` (see `agreed_subtypes`, else
    empty). Real controls count for agreement only; they are in no split.

    Args:
        config: What to read and how to count.
        output_dir: Where the dataset shall stand.

    Raises:
        InputError: If grades cannot be read or are not about the candidates, if too few or only one verdict is left, or
            if the place cannot be written to.
    """
    started = time.monotonic()
    current = current_grades([grade for source in config.grades for grade in read_grades(source)])
    config = pinned(config)
    candidates = ImageSet.joined([ImageSet.load(source) for source in config.candidates])
    check_against_candidates(current.grades, candidates)
    ratings = collect_ratings(current.grades, candidates.image_ids, config.unsure)
    plausible = aggregate(ratings, config.aggregation)
    control = _is_kind(REAL_CONTROL, candidates, ratings)
    images = label(candidates, ratings, np.where(control, np.nan, plausible), config.min_grades_per_image)
    marks = agreed_subtypes(current.grades)
    if marks:
        images.columns["subtype"] = [marks.get(image_id, "") for image_id in images.image_ids]
    splits = split(images, config)
    controls = plausible[control & ~np.isnan(plausible)] > 0.5
    repeats = _is_kind(REPEAT, candidates, ratings)
    report = {
        **agreement_report(current, ratings, repeats, config.bootstrap_samples, config.seed),
        "real_controls": {"n": len(controls), "plausible_share": float(controls.mean()) if len(controls) else None},
    }
    metrics = {
        "simulated": report["simulated"],
        "n": len(images),
        "plausible_share": float(np.mean(images.columns["majority"])),
        "subtype_marks": sum(map(bool, images.columns.get("subtype", []))),
        "splits": {name: _split_counts(part) for name, part in splits.items()},
        **{name: report[name] for name in ("n_grades", "n_graders", "krippendorff_alpha", "left_out")},
    }
    record = RunRecord(
        stage="feedback",
        config=asdict(config),
        inputs={
            "candidates": fingerprint([candidates.image_ids, candidates.labels()]),
            "grades": fingerprint([grade.to_json() for grade in current.grades]),
        },
        seeds={"feedback": config.seed},
        metrics=metrics,
    )
    with artefact(output_dir) as folder:
        for name, part in splits.items():
            part.save(folder, name)
        (folder / AGREEMENT_FILE).write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
        record.wall_s = time.monotonic() - started
        record.save(folder)
    return record


def check_against_candidates(grades: Sequence[Grade], candidates: ImageSet) -> None:
    """Refuse grades that are not about the candidates.

    Raises:
        InputError: For images that are not there, unknown class labels, and labels that differ from the candidate's;
            each with its count and the first examples.
    """
    labels = dict(zip(candidates.image_ids, candidates.labels(), strict=True))
    doubtful = sorted(
        {i for i, label in zip(candidates.image_ids, candidates.labels(), strict=True) if labels[i] != label}
    )
    if doubtful:
        raise InputError(
            f"The candidate set has {len(doubtful)} images under two classes, such as {doubtful[0]}, "
            "so that a grade could be about either. Take them out of the candidate set."
        )
    missing = sorted({grade.image_id for grade in grades if grade.image_id not in labels})
    unknown = sorted({grade.class_label for grade in grades} - set(candidates.class_names))
    if missing:
        raise InputError(
            f"{len(missing)} graded images are not in the candidate set of {len(labels)} images: "
            f"{', '.join(missing[:SHOWN])}{' ...' if len(missing) > SHOWN else ''}. "
            "Give the candidate set that these grades are about as `candidates`."
        )
    if unknown:
        raise InputError(
            f"Grades name the classes {', '.join(unknown[:SHOWN])}; the candidate set has "
            f"{', '.join(candidates.class_names)}. Give the candidate set that these grades are about as `candidates`."
        )
    differing = [grade for grade in grades if grade.class_label != labels[grade.image_id]]
    if differing:
        first = differing[0]
        raise InputError(
            f"{len(differing)} grades name another class than their image was made for: grade {first.grade_id} says "
            f"{first.class_label!r}, image {first.image_id} is a {labels[first.image_id]!r}. "
            "Give the candidate set that these grades are about as `candidates`."
        )


def aggregate(ratings: Ratings, method: str) -> np.ndarray:
    """One label for each image.

    Args:
        ratings: Of one grader or several.
        method: `majority`: mean score. `dawid-skene`: posterior of plausible (plus half that of unsure).

    Returns:
        Shape `(images,)`, 0..1, NaN where nobody's verdict counts.

    Raises:
        InputError: If Dawid-Skene has fewer than three graders: with two, nothing tells which of them errs.

    Source: Dawid and Skene, Applied Statistics 28 (1979) 20; the library crowd-kit.
    """
    counted = ~np.isnan(ratings.scores)
    if method == "majority":
        total = np.nansum(ratings.scores, axis=0)
        return np.divide(total, counted.sum(axis=0), out=np.full(len(total), np.nan), where=counted.any(axis=0))
    n_graders = int(counted.any(axis=1).sum())
    if n_graders < 3:
        raise InputError(
            f"`aggregation` is dawid-skene, which needs three graders to tell who errs; the grades are by {n_graders}. "
            "Use `aggregation: majority`."
        )
    import pandas as pd
    from crowdkit.aggregation import DawidSkene

    verdicts = {score: verdict for verdict, score in SCORES.items()}
    rows, columns = np.nonzero(counted)
    votes = pd.DataFrame(
        {"task": columns, "worker": rows, "label": [verdicts[score] for score in ratings.scores[rows, columns]]}
    )
    posterior: pd.DataFrame = DawidSkene(n_iter=100, tol=1e-5).fit(votes).probas_
    expected = posterior.to_numpy() @ np.array([SCORES[verdict] for verdict in posterior.columns])
    result = np.full(len(ratings.image_ids), np.nan)
    result[posterior.index.to_numpy()] = np.clip(expected, 0.0, 1.0)
    return result


def label(candidates: ImageSet, ratings: Ratings, plausible: np.ndarray, minimum: int) -> ImageSet:
    """The graded images with their label columns.

    Args:
        candidates: All candidates.
        ratings: Their ratings.
        plausible: Shape `(images of ratings,)`, 0..1, NaN for images to leave out. One half counts as implausible.
        minimum: Images with fewer counted grades are left out.

    Raises:
        InputError: If all that is left is of one verdict, or nothing is.
    """
    counted = ~np.isnan(ratings.scores)
    n_grades = counted.sum(axis=0)
    kept = np.flatnonzero((n_grades >= minimum) & ~np.isnan(plausible))
    majority = (plausible[kept] > 0.5).tolist()
    if len(set(majority)) < 2:
        verdict = "plausible" if any(majority) else "implausible"
        raise InputError(
            f"Of {len(plausible)} graded images {len(kept)} have {minimum} or more counted grades"
            f"{f', and all of them come out {verdict}' if majority else ''}. A reward model needs both plausible and "
            "implausible ones. Grade more images (those of an earlier checkpoint are worse), or lower "
            "`min_grades_per_image`, or count unsure verdicts with `unsure: half`."
        )
    place = {image_id: row for row, image_id in reversed(list(enumerate(candidates.image_ids)))}
    images = candidates.select([place[ratings.image_ids[column]] for column in kept])
    columns = {"plausible": plausible[kept].tolist(), "majority": majority, "n_grades": n_grades[kept].tolist()}
    for name, table in ratings.failed.items():
        columns[f"failed_{name}"] = ((table & counted).sum(axis=0)[kept] / n_grades[kept]).tolist()
    columns |= {name: images.columns[name] for name in ("seed", "kind") if name in images.columns}
    return replace(images, columns=columns)


def agreed_subtypes(grades: Sequence[Grade]) -> dict[str, str]:
    """Subtype of each image that more than half of those who marked one agree on; other images are left out.

    Args:
        grades: Oldest first; of several by one grader on one image the last one counts.
    """
    last = {(grade.image_id, grade.grader): (grade.subtype or "").strip() for grade in grades}
    votes: dict[str, Counter[str]] = {}
    for (image_id, _), mark in last.items():
        if mark:
            votes.setdefault(image_id, Counter())[mark] += 1
    first = {image_id: counts.most_common(1)[0] for image_id, counts in votes.items()}
    return {image_id: mark for image_id, (mark, count) in first.items() if 2 * count > votes[image_id].total()}


def split(images: ImageSet, config: FeedbackConfig) -> dict[str, ImageSet]:
    """Train, validation and test sets, stratified by verdict and class; near-duplicates stay together.

    Raises:
        InputError: If a split is empty, or the training split has only one verdict.
    """
    pictures = [Image.fromarray(image) for image in images.images.permute(0, 2, 3, 1).numpy()]
    groups = near_duplicate_groups(perceptual_hashes(pictures), config.near_duplicate_bits)
    shares = {
        "train": 1 - config.validation_share - config.test_share,
        "validation": config.validation_share,
        "test": config.test_share,
    }
    strata = list(zip(images.columns["majority"], images.class_ids.tolist(), strict=True))
    assigned = assign_groups(groups, strata, list(shares.values()), config.seed)
    splits = {name: images.select(np.flatnonzero(assigned == index).tolist()) for index, name in enumerate(shares)}
    for name, part in splits.items():
        verdicts = set(part.columns["majority"])
        if not verdicts or (name == "train" and len(verdicts) < 2):
            raise InputError(
                f"The {name} split would hold {len(part)} of {len(images)} graded images"
                f"{', all of one verdict' if verdicts else ''}; near-duplicates that must stay together leave "
                f"{len(set(groups.tolist()))} groups. Grade more images, or change `validation_share` or `test_share`."
            )
        if len(verdicts) < 2:
            say(f"The {name} split has one verdict only ({len(part)} images): a ranking cannot be measured on it.")
    return splits


def assign_groups(groups: np.ndarray, strata: Sequence[Any], shares: Sequence[float], seed: int) -> np.ndarray:
    """Deal groups out to splits: shuffled within their stratum, each goes where most is missing so far.

    Strata are dealt one after the other from one running count, so that small strata do not all go to the same split.

    Args:
        groups: Shape `(n,)`, group of each item.
        strata: Stratum of each item; the first item's is its group's.
        shares: Of each split; they add up to 1.
        seed: Of the shuffle.

    Returns:
        Shape `(n,)`, index of each item's split.
    """
    _, first, place, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(first))
    order = sorted(shuffled.tolist(), key=lambda index: strata[int(first[index])])
    dealt, filled = np.zeros(len(first), dtype=int), np.zeros(len(shares))
    for index in order:
        missing = np.asarray(shares) * (filled.sum() + sizes[index]) - filled
        dealt[index] = int(np.argmax(missing))
        filled[dealt[index]] += sizes[index]
    return dealt[place]


def agreement_report(
    current: CurrentGrades, ratings: Ratings, repeats: np.ndarray, samples: int, seed: int
) -> dict[str, Any]:
    """What `agreement.json` holds: counts, shares, alpha and kappas with intervals; `None` is "not measured".

    Args:
        current: Grades that stand.
        ratings: The same, arranged.
        repeats: Shape `(images,)` bool: shown to a grader twice on purpose. If any is, only these count for
            intra-rater kappa; else all that a grader graded twice.
        samples: Resamples for each interval.
        seed: Of the resampling.
    """
    verdicts = Counter(grade.verdict for grade in current.grades)
    by_grader = {name: Counter(g.verdict for g in current.grades if g.grader == name) for name in ratings.graders}
    earlier = np.where(repeats | ~repeats.any(), ratings.earlier, np.nan)
    simulated = sum(grade.simulated for grade in current.grades)
    pairs = agreement.pairwise_cohen(ratings.scores, ratings.graders, samples, seed)
    return {
        "simulated": simulated > 0,
        "simulated_share": simulated / len(current.grades),
        "n_grades": len(current.grades),
        "n_graders": len(ratings.graders),
        "n_images": len(ratings.image_ids),
        "left_out": {"duplicates": current.duplicates, "superseded": current.superseded},
        "unsure_share": verdicts["unsure"] / len(current.grades),
        "graders": {
            name: {
                "n_grades": counts.total(),
                "plausible_share": counts["plausible"] / counts.total(),
                "unsure_share": counts["unsure"] / counts.total(),
                "intra_rater_kappa": asdict(agreement.cohen(earlier[row], ratings.scores[row], samples, seed)),
            }
            for row, (name, counts) in enumerate(by_grader.items())
        },
        "krippendorff_alpha": asdict(agreement.alpha(ratings.scores, samples, seed)),
        "fleiss_kappa": asdict(agreement.fleiss(ratings.scores, samples, seed)),
        "cohen_kappa": [{"graders": list(names), **asdict(estimate)} for names, estimate in pairs.items()],
        "interval": {"level": agreement.LEVEL, "bootstrap_samples": samples, "over": "images"},
    }


def _is_kind(kind: str, candidates: ImageSet, ratings: Ratings) -> np.ndarray:
    kinds = candidates.columns.get("kind", [None] * len(candidates))
    chosen = {image_id for image_id, found in zip(candidates.image_ids, kinds, strict=True) if found == kind}
    return np.array([image_id in chosen for image_id in ratings.image_ids])


def _split_counts(images: ImageSet) -> dict[str, int]:
    return {"n": len(images), "plausible": sum(images.columns["majority"])}
