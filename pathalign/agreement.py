"""How far graders agree, beyond chance, with bootstrap intervals over images; and shares with Wilson intervals.

The figures of agreement take `ratings` of shape `(graders, images)`: nominal codes as floats, NaN where a grader did
not rate an image. A figure that the ratings do not determine is `None`, which reports show as "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import krippendorff
import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa
from statsmodels.stats.proportion import proportion_confint

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure with its uncertainty.

    Attributes:
        value: The figure on all images; `None` if it is not determined.
        ci: Interval of level `LEVEL`; `None` if it is not determined (of a bootstrap: by half of the resamples).
        n: Images that it rests on.
    """

    value: float | None
    ci: tuple[float, float] | None
    n: int


def alpha(ratings: np.ndarray, samples: int, seed: int) -> Estimate:
    """Krippendorff's alpha, nominal, over the images with at least two ratings.

    Args:
        ratings: See the module.
        samples: Resamples of the images.
        seed: Of the resampling.

    Source: Krippendorff, Computing Krippendorff's alpha-reliability (2011); the library krippendorff.
    """
    counts = value_counts(ratings)
    return _estimate(_alpha, counts[counts.sum(axis=1) >= 2], samples, seed)


def fleiss(ratings: np.ndarray, samples: int, seed: int) -> Estimate:
    """Fleiss' kappa. It needs equally many ratings of each image, so it rests on the images that have the most common
    number of ratings, two or more (the larger number if two are equally common).

    Source: Fleiss, Psychological Bulletin 76 (1971) 378; statsmodels. Arguments as for `alpha`.
    """
    counts = value_counts(ratings)
    n_ratings = counts.sum(axis=1)
    frequency = np.bincount(n_ratings, minlength=3)[2:]
    most_common = len(frequency) + 1 - int(np.argmax(frequency[::-1]))
    return _estimate(_fleiss, counts[n_ratings == most_common], samples, seed)


def cohen(first: np.ndarray, second: np.ndarray, samples: int, seed: int) -> Estimate:
    """Cohen's kappa of two raters, over the images that both rated.

    Args:
        first: Shape `(images,)`, NaN where missing.
        second: The same of the other rater, or of the same rater's second look.
        samples: Resamples of the images.
        seed: Of the resampling.

    Source: Cohen, Educational and Psychological Measurement 20 (1960) 37; statsmodels.
    """
    both = ~np.isnan(first) & ~np.isnan(second)
    codes = np.unique(np.concatenate([first[both], second[both]]))
    pairs = np.stack([np.searchsorted(codes, first[both]), np.searchsorted(codes, second[both])], axis=1)
    return _estimate(_cohen, pairs, samples, seed)


def pairwise_cohen(
    ratings: np.ndarray, graders: Iterable[str], samples: int, seed: int
) -> dict[tuple[str, str], Estimate]:
    """Cohen's kappa of each two graders; `graders` names the rows of `ratings`. Arguments else as for `alpha`."""
    return {
        (first, second): cohen(ratings[row], ratings[column], samples, seed)
        for (row, first), (column, second) in combinations(enumerate(graders), 2)
    }


def share(successes: int, count: int) -> Estimate:
    """A share of `count` independent cases with its Wilson score interval. Source: Wilson 1927, by statsmodels."""
    if count == 0:
        return Estimate(value=None, ci=None, n=0)
    low, high = proportion_confint(successes, count, alpha=1 - LEVEL, method="wilson")
    return Estimate(value=successes / count, ci=(float(low), float(high)), n=count)


def value_counts(ratings: np.ndarray) -> np.ndarray:
    """How many graders gave each value: shape `(images, values)`, int64, values ascending."""
    codes = np.unique(ratings[~np.isnan(ratings)])
    return (ratings.T[:, :, None] == codes).sum(axis=1)


def _alpha(counts: np.ndarray) -> float:
    if np.count_nonzero(counts.sum(axis=0)) < 2:  # one value only: chance agreement is already perfect
        return np.nan
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))


def _fleiss(counts: np.ndarray) -> float:
    if np.count_nonzero(counts.sum(axis=0)) < 2:
        return np.nan
    return float(fleiss_kappa(counts))


def _cohen(pairs: np.ndarray) -> float:
    size = int(pairs.max()) + 1
    table = np.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size * size).reshape(size, size)
    if np.count_nonzero(table.sum(axis=0) + table.sum(axis=1)) < 2:
        return np.nan
    return float(cohens_kappa(table, return_results=False))


def _estimate(statistic: Callable[[np.ndarray], float], items: np.ndarray, samples: int, seed: int) -> Estimate:
    count = len(items)
    value = statistic(items) if count >= 2 else np.nan
    if np.isnan(value):
        return Estimate(value=None, ci=None, n=count)
    generator = np.random.default_rng(seed)
    draws = np.array([statistic(items[generator.integers(0, count, count)]) for _ in range(samples)])
    draws = draws[~np.isnan(draws)]
    if 2 * len(draws) < samples:
        return Estimate(value=value, ci=None, n=count)
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value=value, ci=(float(low), float(high)), n=count)
