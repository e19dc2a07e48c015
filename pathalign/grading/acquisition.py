"""Which images to grade next: pure functions from what reward models say of images to an order.

    uncertainty    entropy of the predicted verdict (Lewis and Gale, arXiv:cmp-lg/9407020)
    disagreement   what a verdict would tell about the model: mutual information, BALD (arXiv:1112.5745, eq. 2)
    diverse        greedy k-center on encoder features, core-set (arXiv:1708.00489, algorithm 1)
    mixed          the most informative of each class, made diverse (arXiv:1901.05954), by classes in deficit

All are batch methods here: an expert grades many images before a model learns from them.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from scipy.special import entr
from sklearn.metrics import pairwise_distances, pairwise_distances_argmin_min

RANDOM, UNCERTAINTY, DISAGREEMENT, DIVERSE, MIXED = "random", "uncertainty", "disagreement", "diverse", "mixed"
STRATEGIES = (RANDOM, UNCERTAINTY, DISAGREEMENT, DIVERSE, MIXED)
PREFILTER = 3  # `mixed` chooses diverse images among so many times as informative ones as it needs


@dataclass(frozen=True)
class Graded:
    """Images that have a grade.

    Attributes:
        features: Shape `(m, d)`, by the encoders that gave the pool's.
        class_ids: Shape `(m,)`, integers.
        plausible: Shape `(m,)`, bool.
    """

    features: np.ndarray
    class_ids: np.ndarray
    plausible: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Images that have none.

    Attributes:
        probabilities: Shape `(members, n)`, each network's probability of plausible, 0..1.
        features: Shape `(n, d)`.
        class_ids: Shape `(n,)`, integers from 0.
    """

    probabilities: np.ndarray
    features: np.ndarray
    class_ids: np.ndarray


def entropy_bits(probabilities: np.ndarray) -> np.ndarray:
    """Entropy of the verdict by the mean of the members, shape `(members, n)` to `(n,)`, bits, 0..1.

    It falls with the distance of the probability from one half, so that both give one order. Source: Lewis and Gale,
    arXiv:cmp-lg/9407020.
    """
    return _bits(probabilities.mean(axis=0))


def mutual_information_bits(probabilities: np.ndarray) -> np.ndarray:
    """What the verdict would tell about which member is right, shape `(members, n)` to `(n,)`, bits, 0..1.

    Entropy of the mean minus mean of the entropies: high where each member is sure and they disagree, 0 where all
    doubt alike, as on an image on which graders themselves would waver. 0 for a single member. Source: BALD, Houlsby
    et al., arXiv:1112.5745, eq. 2; members of an ensemble stand for draws from the posterior.
    """
    return np.maximum(_bits(probabilities.mean(axis=0)) - _bits(probabilities).mean(axis=0), 0.0)


def information_bits(probabilities: np.ndarray) -> np.ndarray:
    """Mutual information where there are several members, else entropy; shapes as above."""
    return mutual_information_bits(probabilities) if len(probabilities) > 1 else entropy_bits(probabilities)


def _bits(probability: np.ndarray) -> np.ndarray:
    return np.asarray((entr(probability) + entr(1 - probability)) / np.log(2))


def farthest_first(features: np.ndarray, count: int, covered: np.ndarray | None = None) -> list[int]:
    """Rows that cover the others: each is farthest from all that were covered before it.

    Args:
        features: Shape `(n, d)`; distances are Euclidean.
        count: Rows wanted; at most n are given.
        covered: Shape `(m, d)`, what is covered at the start. Without it the first row is the one nearest to the mean.

    Returns:
        Distinct rows, in order; of equal distances the first row counts.

    Source: greedy k-center of Sener and Savarese, arXiv:1708.00489, algorithm 1; within twice the best radius.
    """
    if not len(features) or count < 1:
        return []
    if covered is not None and len(covered):
        distances = distances_to(features, covered)
        chosen: list[int] = []
    else:
        first = int(pairwise_distances(features, features.mean(axis=0, keepdims=True)).argmin())
        distances, chosen = pairwise_distances(features, features[[first]])[:, 0], [first]
    distances[chosen] = -1.0
    while len(chosen) < min(count, len(features)):
        row = int(distances.argmax())
        chosen.append(row)
        distances = np.minimum(distances, pairwise_distances(features, features[[row]])[:, 0])
        distances[chosen] = -1.0
    return chosen


def distances_to(features: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row of `(n, d)` to the nearest of `(m, d)`, shape `(n,)`; in blocks, m at least 1."""
    return np.asarray(pairwise_distances_argmin_min(features, covered)[1])


def effective_grades(class_ids: np.ndarray, plausible: np.ndarray, classes: int) -> np.ndarray:
    """Grades of each class, counted by how much they tell of both verdicts, shape `(classes,)`.

    Four times plausible times implausible by their sum, half a grade added to each: all of them where both verdicts are
    as frequent, about two where there is only one. So a class is in deficit that has few grades, or few of one verdict.
    """
    good = np.bincount(class_ids[plausible], minlength=classes) + 0.5
    bad = np.bincount(class_ids[~plausible], minlength=classes) + 0.5
    return np.asarray(4 * good * bad / (good + bad))


def deficit_quotas(effective: np.ndarray, available: np.ndarray, count: int) -> np.ndarray:
    """How many of `count` images each class gets: always the one that has least so far and has any left.

    Args:
        effective: Shape `(classes,)`, from `effective_grades`.
        available: Shape `(classes,)`, ungraded images.
        count: In all; fewer are given if fewer are available.
    """
    quotas = np.zeros(len(effective), dtype=int)
    waiting = [(float(have), class_id) for class_id, have in enumerate(effective) if available[class_id]]
    heapq.heapify(waiting)
    while waiting and quotas.sum() < count:
        have, class_id = heapq.heappop(waiting)
        quotas[class_id] += 1
        if quotas[class_id] < available[class_id]:
            heapq.heappush(waiting, (have + 1, class_id))
    return quotas


def choose(strategy: str, pool: Pool, graded: Graded, count: int) -> list[int]:
    """Rows of the pool to grade next, the first ones first; of equal ones the earlier row.

    Args:
        strategy: Any of `STRATEGIES` but `random`, which needs no model.
        pool: Ungraded images.
        graded: Graded ones.
        count: Rows wanted; at most as many as there are.
    """
    if strategy == UNCERTAINTY:
        return _highest(entropy_bits(pool.probabilities), count)
    if strategy == DISAGREEMENT:
        return _highest(mutual_information_bits(pool.probabilities), count)
    if strategy == DIVERSE:
        return farthest_first(pool.features, count, graded.features)
    if strategy == MIXED:
        return _mixed(pool, graded, count)
    raise ValueError(f"{strategy!r} ranks nothing.")


def _highest(scores: np.ndarray, count: int) -> list[int]:
    return [int(row) for row in np.argsort(-scores, kind="stable")[:count]]


def _mixed(pool: Pool, graded: Graded, count: int) -> list[int]:
    """Diverse ones among the most informative of each class, classes in turn so that any beginning is balanced too."""
    classes = int(max(pool.class_ids.max(initial=0), graded.class_ids.max(initial=0))) + 1
    have = effective_grades(graded.class_ids, graded.plausible, classes)
    quotas = deficit_quotas(have, np.bincount(pool.class_ids, minlength=classes), count)
    information = information_bits(pool.probabilities)
    places: list[tuple[float, int]] = []
    for class_id, quota in enumerate(quotas.tolist()):
        rows = np.flatnonzero(pool.class_ids == class_id)
        informative = rows[_highest(information[rows], PREFILTER * quota)]
        covered = graded.features[graded.class_ids == class_id]
        found = informative[farthest_first(pool.features[informative], quota, covered)]
        places += [((turn + 1) / (quota + 1), int(row)) for turn, row in enumerate(found)]
    return [row for _, row in sorted(places)]
