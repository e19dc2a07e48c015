"""Replays acquisition on a graded pool: which grades the experts would have given, had they given fewer.

random start -> scout learns -> ranks the rest -> next batch -> scout learns -> ... until the budget
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pathalign.artefacts import artefact, fingerprint
from pathalign.grading.acquisition import RANDOM, Graded, Pool, choose, information_bits
from pathalign.images import ImageSet, dataset_file
from pathalign.pinning import identity, pinned
from pathalign.progress import say
from pathalign.reward.ensemble import opinions
from pathalign.schema import InputError, RunRecord, peak_rss_mb
from pathalign.settings.select import SelectConfig
from pathalign.trainers.scouts import ScoutSettings, train_scout

SPLITS = ("train", "validation", "test")
AGREEMENT, ORDER, SCOUTS = "agreement.json", "acquisition.json", "scouts"


@dataclass(frozen=True)
class GradedPool:
    """A feedback dataset."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    agreement: dict[str, Any]

    @classmethod
    def load(cls, config: SelectConfig) -> GradedPool:
        """Read it.

        Raises:
            InputError: If it cannot be read.
        """
        splits = {name: ImageSet.load(config.feedback, name, config.feedback_revision) for name in SPLITS}
        agreement = dataset_file(config.feedback, AGREEMENT, config.feedback_revision).read_text()
        return cls(**splits, agreement=json.loads(agreement))


@dataclass(frozen=True)
class Acquisition:
    """Training and validation images in the order in which they are graded.

    Attributes:
        train: Rows of the training split. A larger budget of the same strategy and seed begins with the same ones.
        validation: Rows of the validation split, drawn at random.
        rounds: Of the round in which each of `train` came; 0 is the random start.
        bits: What the scout expected of each of `train`, by `information_bits`; None where it was drawn at random.
        history: For each scout the grades it learnt from, and the mean bits of the pool and of the batch it chose.
    """

    train: list[int]
    validation: list[int]
    rounds: list[int]
    bits: list[float | None]
    history: list[dict[str, float]]


def select(config: SelectConfig, output_dir: Path) -> RunRecord:
    """Write the part of a feedback dataset that a budget buys: the same layout, and `acquisition.json`.

    An interrupted call goes on: scouts that are trained are not trained again.

    Raises:
        InputError: If the feedback cannot be read, or the budget holds one verdict only or more than there is.
    """
    started = time.monotonic()
    config = pinned(config)
    pool = GradedPool.load(config)
    counts = budget_counts(config.budget, len(pool.train), len(pool.validation))
    with artefact(output_dir, scratch=(SCOUTS,)) as folder:
        found = acquire(config, pool, counts, folder / SCOUTS)
        kept = write_selection(pool, found, folder, config.strategy)
        record = RunRecord(
            stage="select",
            config=asdict(config),
            inputs={"feedback": identity(config.feedback, config.feedback_revision)},
            seeds={"seed": config.seed},
            metrics={
                "simulated": pool.agreement["simulated"],
                "n": sum(counts),
                "of": len(pool.train) + len(pool.validation),
                "splits": {
                    name: {"n": len(part), "plausible": sum(value > 0.5 for value in part.columns["plausible"])}
                    for name, part in kept.items()
                },
                "rounds": found.history,
            },
            wall_s=time.monotonic() - started,
            peak_rss_mb=peak_rss_mb(),
        )
        record.save(folder)
    return record


def budget_counts(budget: float, n_train: int, n_validation: int) -> tuple[int, int]:
    """Training and validation images that a budget buys: the same share of both, rounded up.

    Raises:
        InputError: If it is more than there is.
    """
    total = n_train + n_validation
    if budget > total:
        raise InputError(
            f"`budget` is {budget:g} images, and the feedback has {total} graded training and validation images: lower "
            "it, or give 1 for all."
        )
    share = budget if budget <= 1 else budget / total
    return math.ceil(round(share * n_train, 6)), math.ceil(round(share * n_validation, 6))


def acquire(config: SelectConfig, pool: GradedPool, counts: tuple[int, int], scratch: Path) -> Acquisition:
    """The first `counts` training and validation images in the order of the strategy.

    Rounds begin at fixed numbers of images, whatever the budget, so that a smaller budget is the beginning of a larger.

    Args:
        config: Strategy, rounds and scouts.
        pool: What is graded.
        counts: Training and validation images wanted.
        scratch: Where scouts are made and found again.

    Raises:
        InputError: If what was drawn at random, or what is wanted, holds one verdict only.
    """
    drawn = [np.random.default_rng([config.seed, split]).permutation(len(part)).tolist() for split, part in
             enumerate((pool.train, pool.validation))]  # fmt: skip
    found = Acquisition([], drawn[1][: counts[1]], [], [], [])
    starts = [0, len(pool.train)] if config.strategy == RANDOM else [0, *round_starts(config, pool, drawn)]
    rounds = sum(begin < counts[0] for begin in starts[1:])
    for number, (begin, end) in enumerate(pairwise(starts)):
        if begin >= counts[0]:
            break
        if number == 0:
            batch: list[int] = drawn[0][:end]
            bits: list[float | None] = [None] * len(batch)
        else:
            validation = drawn[1][: max(1, math.ceil(begin / len(pool.train) * len(pool.validation)))]
            say(f"select: {config.strategy}, round {number} of {rounds}: a scout learns from {begin} images")
            batch, bits = _next_batch(config, pool, found, validation, end - begin, scratch)
        found.train.extend(batch)
        found.rounds.extend([number] * len(batch))
        found.bits.extend(bits)
    for listed in (found.train, found.rounds, found.bits):
        del listed[counts[0] :]
    for name, part, rows in (("train", pool.train, found.train), ("validation", pool.validation, found.validation)):
        if not _both_verdicts(part, rows):
            raise InputError(
                f"Of {len(part)} images in the {name} split the budget buys {len(rows)}, all of one verdict, from "
                "which no reward model can be trained; give a larger `budget` or another `seed`."
            )
    return found


def round_starts(config: SelectConfig, pool: GradedPool, drawn: Sequence[Sequence[int]]) -> list[int]:
    """Training images that are there when each round begins, and all of them last: a geometric series.

    The first number is `start`, or more where otherwise no scout could learn: until both splits hold both verdicts.

    Raises:
        InputError: If a split holds one verdict only.
    """
    size, share = len(pool.train), config.start
    for name, part, rows in zip(SPLITS, (pool.train, pool.validation), drawn, strict=False):
        if not _both_verdicts(part, rows):
            raise InputError(f"The {name} split of {config.feedback} holds one verdict only; grade more images.")
        share = max(share, next(n for n in range(2, len(rows) + 1) if _both_verdicts(part, rows[:n])) / len(rows))
    first = min(size, math.ceil(round(share * size, 6)))
    series = [round(first * (size / first) ** (number / config.batches)) for number in range(config.batches + 1)]
    return sorted(set(series))


def _both_verdicts(part: ImageSet, rows: Sequence[int]) -> bool:
    values = [part.columns["plausible"][row] for row in rows]
    return any(value > 0.5 for value in values) and any(value < 0.5 for value in values)


def _next_batch(
    config: SelectConfig, pool: GradedPool, found: Acquisition, validation: list[int], count: int, scratch: Path
) -> tuple[list[int], list[float | None]]:
    """Rows of the training split that a scout, trained on what was found so far, wants graded next, and their bits."""
    known = set(found.train)
    rest = [row for row in range(len(pool.train)) if row not in known]
    settings = ScoutSettings(
        config.data, config.data_revision, config.scout_encoder, config.scout_members, config.scout_steps
    )
    graded = pool.train.select(found.train)
    scout = train_scout(
        settings, graded, pool.validation.select(validation), pool.agreement, config.seed + len(found.history), scratch
    )
    seen = opinions([scout], pool.train)
    features, ids = seen.features, pool.train.class_ids.numpy()
    verdicts = np.array(graded.columns["plausible"], dtype=float) > 0.5
    ungraded = Pool(seen.probabilities[:, rest], features[rest], ids[rest])
    chosen = choose(config.strategy, ungraded, Graded(features[found.train], ids[found.train], verdicts), count)
    bits = information_bits(ungraded.probabilities)
    found.history.append(
        {"learnt_from": len(graded), "pool_bits": float(bits.mean()), "batch_bits": float(bits[chosen].mean())}
    )
    return [rest[row] for row in chosen], [float(bits[row]) for row in chosen]


def write_selection(pool: GradedPool, found: Acquisition, folder: Path, strategy: str) -> dict[str, ImageSet]:
    """Write the three splits, what is known of the graders, and the order; returns the splits."""
    kept = {
        "train": pool.train.select(found.train),
        "validation": pool.validation.select(found.validation),
        "test": pool.test,
    }
    for name, part in kept.items():
        part.save(folder, name)
    grades = sum(sum(part.columns.get("n_grades", [1] * len(part))) for part in kept.values())
    agreement = {
        **pool.agreement,
        "n_grades": grades,
        "n_images": sum(map(len, kept.values())),
        "selected_from": {"n_grades": pool.agreement["n_grades"], "n_images": pool.agreement.get("n_images")},
    }
    (folder / AGREEMENT).write_text(json.dumps(agreement, indent=2, sort_keys=True) + "\n")
    rows = zip(kept["train"].image_ids, kept["train"].labels(), found.rounds, found.bits, strict=True)
    order = {
        "strategy": strategy,
        "fingerprint": fingerprint(list(kept["train"].image_ids)),
        "train": [{"image_id": i, "class": c, "round": number, "bits": bits} for i, c, number, bits in rows],
        "validation": [{"image_id": image_id} for image_id in kept["validation"].image_ids],
    }
    (folder / ORDER).write_text(json.dumps(order, indent=1) + "\n")
    return kept
