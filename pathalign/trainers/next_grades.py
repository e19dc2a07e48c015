"""`pathalign study next`: which images of a study to grade next, why, and what that is expected to bring."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import xlogy
from sklearn.metrics import roc_auc_score

from pathalign.artefacts import artefact
from pathalign.feedback import aggregate, label, split
from pathalign.grades import CurrentGrades, current_grades
from pathalign.grading.acquisition import (
    DISAGREEMENT,
    DIVERSE,
    UNCERTAINTY,
    Graded,
    Pool,
    choose,
    distances_to,
    entropy_bits,
    information_bits,
)
from pathalign.grading.catalogue import SYNTHETIC, Catalogue
from pathalign.grading.exports import read_recorded
from pathalign.grading.learning_curve import ExpectedGain, expected_gain
from pathalign.grading.order import random_sample
from pathalign.grading.proposals import NEXT
from pathalign.grading.study import Study
from pathalign.images import ImageSet, contact_sheet
from pathalign.pinning import pinned
from pathalign.progress import say
from pathalign.ratings import collect_ratings
from pathalign.reward import RewardModel, load_reward_model
from pathalign.reward.ensemble import Opinions, opinions
from pathalign.schema import DISCLAIMER, InputError, RunRecord, peak_rss_mb
from pathalign.settings.feedback import FeedbackConfig
from pathalign.settings.next_grades import NextConfig
from pathalign.trainers.scouts import ScoutSettings, train_scout

SHARES = (0.25, 0.4, 0.63, 1.0)  # of the training images, for the points of the learning curve
FEWEST, FEWEST_OF_EACH = 100, 20  # graded images, and of each verdict, for a curve that says anything
SHEET, SCOUTS = "next.png", "scouts"
SHEET_COLUMNS = 10


@dataclass(frozen=True)
class Progressed:
    """How far a study is.

    Attributes:
        candidates: All images to grade.
        seen: Ids of those that have any grade.
        graded: Those whose grades count, with the columns of a feedback dataset; empty if there are none.
        grades: What graders said of candidates.
    """

    candidates: ImageSet
    seen: frozenset[str]
    graded: ImageSet
    grades: CurrentGrades

    @property
    def plausible(self) -> np.ndarray:
        """Verdict of each graded image, shape `(n,)`, bool."""
        return np.array(self.graded.columns["plausible"], dtype=float) > 0.5


@dataclass(frozen=True)
class Curve:
    """What models trained on parts of the grades say.

    Attributes:
        points: For each number of training images the mean log loss and ROC AUC on the held-out images.
        gain: What the proposed number of grades brings, by the law through them; None where it cannot be told.
        doubled: What twice the grades bring.
        held_out: Number of those images.
        reason: Why there is no curve, and what is needed; empty if there is one.
        models: Those that learnt from all training images.
    """

    points: list[dict[str, float]]
    gain: ExpectedGain | None
    doubled: ExpectedGain | None
    held_out: int
    reason: str
    models: list[RewardModel]


def propose(config: NextConfig, output_dir: Path) -> RunRecord:
    """Write `next.json`, a contact sheet in the same order and a run record.

    Raises:
        InputError: If study, grades or reward models cannot be used, nothing is left to grade, or there are neither
            reward models nor enough grades to train some.
    """
    started = time.monotonic()
    study = Study.load(config.study)
    config = pinned(config)
    progress = progressed(study, config.grades)
    # What the study shows at random is graded in any case, whatever a model says of it.
    at_random = random_sample(progress.candidates.image_ids, study.random_share, study.seed)
    left = [i for i, name in enumerate(progress.candidates.image_ids) if name not in progress.seen | at_random]
    if not left:
        raise InputError(
            f"Of {len(progress.candidates)} candidates {len(progress.seen)} have a grade, and the others come up at "
            "random: nothing is left to propose. Draw more candidates with `pathalign generate`."
        )
    names = config.reward_models or ([study.reward_model] if study.reward_model else [])
    models = [load_reward_model(name) for name in names]
    with artefact(output_dir, scratch=(SCOUTS,)) as folder:
        curve = learning_curve(config, study, progress, folder / SCOUTS)
        models = models or curve.models
        if not models:
            raise InputError(
                f"There is no reward model to rank with, and none can be trained: {curve.reason} Name one by "
                "`--reward-models`, or grade at random first (`order: random` in the study)."
            )
        pool = progress.candidates.select(left)
        content = proposal(config, progress, pool, models, curve)
        order = [pool.image_ids.index(row["image_id"]) for row in content["images"]]
        contact_sheet(pool.images[order], SHEET_COLUMNS, scale=max(1, 96 // pool.image_size_px)).save(folder / SHEET)
        (folder / NEXT).write_text(json.dumps(content, indent=1) + "\n")
        record = RunRecord(
            stage="next",
            config=asdict(config),
            seeds={"seed": config.seed},
            metrics={key: value for key, value in content.items() if key != "images"},
            wall_s=time.monotonic() - started,
            peak_rss_mb=peak_rss_mb(),
        )
        record.save(folder)
    return record


def progressed(study: Study, source: str | None) -> Progressed:
    """Read a study's candidates and the grades there are, from its sink or from `source`.

    Raises:
        InputError: If either cannot be read.
    """
    images = Catalogue.load(study).images
    synthetic = [row for row, kind in enumerate(images.columns["kind"]) if kind == SYNTHETIC]
    candidates = images.select(synthetic)
    place = source or study.sink
    nothing_yet = source is None and "://" not in place and not Path(place).exists()
    recorded = [] if nothing_yet else read_recorded(place).grades
    known = set(candidates.image_ids)
    grades = current_grades([grade for grade in recorded if grade.image_id in known])
    ratings = collect_ratings(grades.grades, candidates.image_ids, "drop")
    if not grades.grades:
        return Progressed(candidates, frozenset(), candidates.select([]), grades)
    plausible = aggregate(ratings, "majority")
    both = {value > 0.5 for value in plausible[~np.isnan(plausible)]} == {True, False}
    if both:
        graded = label(candidates, ratings, plausible, 1)
    else:
        values = {name: float(value) for name, value in zip(ratings.image_ids, plausible, strict=True)}
        rows = [row for row, name in enumerate(candidates.image_ids) if not np.isnan(values.get(name, np.nan))]
        graded = candidates.select(rows)
        graded.columns["plausible"] = [values[name] for name in graded.image_ids]
    return Progressed(candidates, frozenset(ratings.image_ids), graded, grades)


def learning_curve(config: NextConfig, study: Study, progress: Progressed, scratch: Path) -> Curve:
    """Train small reward models on parts of the grades, each part several times, and look at held-out grades."""
    good = int(progress.plausible.sum()) if len(progress.graded) else 0
    bad = len(progress.graded) - good
    if config.refits == 0:
        return Curve([], None, None, 0, "`--refits` is 0.", [])
    if len(progress.graded) < FEWEST or min(good, bad) < FEWEST_OF_EACH:
        reason = (
            f"{len(progress.graded)} images have a grade that counts, {good} plausible and {bad} implausible; learning "
            f"from them takes {FEWEST}, and {FEWEST_OF_EACH} of each verdict."
        )
        return Curve([], None, None, 0, reason, [])
    try:
        parts = split(progress.graded, FeedbackConfig(seed=config.seed))
    except InputError as error:
        return Curve([], None, None, 0, str(error), [])
    settings = ScoutSettings(*real_images(config, study, progress), config.scout_encoder, 1, config.scout_steps)
    simulated = any(grade.simulated for grade in progress.grades.grades)
    graders = len({grade.grader for grade in progress.grades.grades})
    agreement = {
        "simulated": simulated,
        "n_grades": len(progress.grades.grades),
        "n_graders": graders,
        "krippendorff_alpha": {"value": None},
    }
    train, test = parts["train"], parts["test"]
    sizes = sorted({max(2, round(share * len(train))) for share in SHARES})
    losses, rankings = np.zeros((len(sizes), config.refits, len(test))), np.zeros((len(sizes), config.refits))
    models: list[RewardModel] = []
    for refit in range(config.refits):
        rows = shuffled(np.array(train.columns["plausible"]) > 0.5, sizes[0], config.seed, refit)
        for point, size in enumerate(sizes):
            say(f"next: small reward model {refit * len(sizes) + point + 1} of {losses[..., 0].size}, {size} images")
            graded, seed = train.select(rows[:size].tolist()), config.seed + refit
            model = train_scout(settings, graded, parts["validation"], agreement, seed, scratch)
            losses[point, refit], rankings[point, refit] = held_out_losses(model, test)
        models.append(model)
    points = [
        {"training_images": size, "log_loss": float(losses[i].mean()), "roc_auc": float(np.nanmean(rankings[i]))}
        for i, size in enumerate(sizes)
    ]
    growth = (1 + config.count / len(progress.graded), 2.0)  # a new grade is as often one to train on as before
    gain, doubled = (
        expected_gain(np.array(sizes), losses, len(train), factor * len(train), config.seed) for factor in growth
    )
    return Curve(points, gain, doubled, len(test), "", models)


def real_images(config: NextConfig, study: Study, progress: Progressed) -> tuple[str | None, str | None]:
    """Real images for the small reward models and their revision; the study's references if they can serve."""
    if config.data is not None:
        return config.data, config.data_revision
    if study.references is None or study.references_split != "train":
        return None, None
    known = ImageSet.load(study.references, "train", study.references_revision).class_names
    if set(known) != set(progress.candidates.class_names):
        say("next: the references have other classes than the candidates; small reward models learn from grades only.")
        return None, None
    return study.references, study.references_revision


def shuffled(verdicts: np.ndarray, first: int, seed: int, refit: int) -> np.ndarray:
    """A random order of rows; drawn again while the `first` ones are all of one verdict. Both verdicts must occur."""
    generator = np.random.default_rng([seed, refit])
    rows = generator.permutation(len(verdicts))
    while len(set(verdicts[rows[:first]].tolist())) < 2:
        rows = generator.permutation(len(verdicts))
    return rows


def held_out_losses(model: RewardModel, test: ImageSet) -> tuple[np.ndarray, float]:
    """Log loss of each image against its soft label, nats, shape `(n,)`, and ROC AUC; NaN where it is not defined."""
    found = opinions([model], test).probabilities[0].clip(1e-7, 1 - 1e-7)
    labels = np.array(test.columns["plausible"], dtype=float)
    verdicts = labels > 0.5
    area = float(roc_auc_score(verdicts, found)) if len(set(verdicts.tolist())) == 2 else float("nan")
    return -(xlogy(labels, found) + xlogy(1 - labels, 1 - found)), area


def proposal(
    config: NextConfig, progress: Progressed, pool: ImageSet, models: Sequence[RewardModel], curve: Curve
) -> dict[str, Any]:
    """What `next.json` holds; nothing of this machine.

    Raises:
        InputError: If one network alone is to disagree.
    """
    names = progress.candidates.class_names
    place = {image_id: row for row, image_id in enumerate(progress.candidates.image_ids)}
    everything = opinions(models, progress.candidates)
    if config.strategy == DISAGREEMENT and len(everything.probabilities) < 2:
        raise InputError(
            "`disagreement` needs two networks or more; name several `--reward-models`, or one trained with "
            "`num_members` above 1."
        )
    rows = [place[image_id] for image_id in pool.image_ids]
    known = [place[image_id] for image_id in progress.graded.image_ids]
    verdicts = progress.plausible if known else np.zeros(0, dtype=bool)
    graded = Graded(everything.features[known], progress.graded.class_ids.numpy(), verdicts)
    seen = Opinions(everything.probabilities[:, rows], everything.features[rows])
    chosen = choose(config.strategy, Pool(seen.probabilities, seen.features, pool.class_ids.numpy()), graded,
                    config.count)  # fmt: skip
    bits = information_bits(seen.probabilities)
    by_class = {
        name: {"graded": int((graded.class_ids == i).sum()), "plausible": int(verdicts[graded.class_ids == i].sum())}
        for i, name in enumerate(names)
    }
    scores = _scores(config.strategy, seen, graded)
    images = [
        {
            "image_id": pool.image_ids[row],
            "class": names[int(pool.class_ids[row])],
            "score": float(scores[row]),
            "probability": float(seen.probabilities[:, row].mean()),
            "why": why(config.strategy, seen, row, float(scores[row]), by_class[names[int(pool.class_ids[row])]]),
        }
        for row in chosen
    ]
    return {
        "about": f"Images proposed for grading, by `pathalign study next`. {DISCLAIMER}",
        "strategy": config.strategy,
        "networks": len(seen.probabilities),
        "graded": {"images": len(progress.graded), "of": len(progress.candidates), "by_class": by_class},
        "expected": {
            "criterion": "mutual information" if len(seen.probabilities) > 1 else "entropy",
            "bits_proposed": float(bits[chosen].sum()),
            "bits_at_random": float(bits.mean() * len(chosen)),
            "learning_curve": curve.points,
            "held_out_images": curve.held_out,
            "more_grades": config.count,
            "log_loss": asdict(curve.gain) if curve.gain else None,
            "log_loss_doubled": asdict(curve.doubled) if curve.doubled else None,
            "reason": curve.reason,
        },
        "images": images,
    }


def _scores(strategy: str, seen: Opinions, graded: Graded) -> np.ndarray:
    if strategy == UNCERTAINTY:
        return entropy_bits(seen.probabilities)
    if strategy == DIVERSE:
        if not len(graded.features):
            return np.zeros(len(seen.features))
        return distances_to(seen.features, graded.features)
    return information_bits(seen.probabilities)


def why(strategy: str, seen: Opinions, row: int, score: float, of_class: dict[str, int]) -> str:
    """One line for a person about why an image is proposed."""
    members = seen.probabilities[:, row]
    if strategy == DIVERSE:
        return f"{score:.2f} from the nearest graded image" if of_class["graded"] else "unlike what is graded"
    said = f"plausible with {members.mean():.0%}"
    if len(members) > 1:
        said = f"{len(members)} networks say {members.min():.0%} to {members.max():.0%}"
    if strategy in (UNCERTAINTY, DISAGREEMENT):
        return said
    return f"{said}; class has {of_class['graded']} graded, {of_class['plausible']} plausible"
