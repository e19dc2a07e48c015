"""Whether generated images copy training images: near-copies, and how many lie nearer to them than to other real ones.

Everything works on features, shape `(n, d)`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import norm

from pathalign.augment import ORIENTATIONS
from pathalign.evaluate.neighbours import Neighbours

NEAR_COPY_QUANTILE = 0.01


@dataclass(frozen=True)
class CopyCheck:
    """Nearest training images, to find generated images that copy one.

    Attributes:
        search: Searches the features of all orientations of the training images.
        threshold: Distance that 99 % of unseen real images keep from their nearest training image.
        train_count: Number of training images, each in 8 orientations.
    """

    search: Neighbours
    threshold: float
    train_count: int

    @classmethod
    def fit(cls, train_orientations: np.ndarray, unseen_real: np.ndarray) -> CopyCheck:
        """Learn the threshold. Features of shapes `(8 * n, d)` (see `FeatureStore.features`) and `(m, d)`."""
        search = Neighbours(train_orientations)
        threshold = float(np.quantile(search.nearest(unseen_real)[0], NEAR_COPY_QUANTILE))
        return cls(search, threshold, len(train_orientations) // ORIENTATIONS)

    def check(self, features: np.ndarray) -> NearestTraining:
        """Compare features of shape `(n, d)` with the training images."""
        distances, rows = (found[:, 0] for found in self.search.nearest(features))
        return NearestTraining(
            distances=distances,
            rows=rows % self.train_count,
            orientation=rows // self.train_count,
            no_near_copy=distances >= self.threshold,
        )


@dataclass(frozen=True)
class NearestTraining:
    """The nearest training image of each of n images: its distance, row and orientation; all of shape `(n,)`."""

    distances: np.ndarray
    rows: np.ndarray
    orientation: np.ndarray
    no_near_copy: np.ndarray  # bool

    def closest(self, count: int) -> list[dict[str, Any]]:
        """The `count` pairs that lie closest together, closest first."""
        order = np.argsort(self.distances, kind="stable")[:count]
        return [
            {
                "row": int(row),
                "train_row": int(self.rows[row]),
                "orientation": int(self.orientation[row]),
                "distance": float(self.distances[row]),
                "near_copy": not bool(self.no_near_copy[row]),
            }
            for row in order
        ]


@dataclass(frozen=True)
class Closeness:
    """Distances of n images to the nearest of m training images and to the nearest of m held-out ones.

    Attributes:
        to_train: Shape `(n,)`, float64: distance to the nearest training image.
        to_held_out: Shape `(n,)`, float64: distance to the nearest real image that nothing was trained on.
        rows: Shape `(n,)`: row of that training image.
        held_out_rows: Shape `(n,)`: row of that held-out image.
        train_classes: Shape `(m,)`: class of each training image.
        held_out_classes: Shape `(m,)`: class of each held-out image; both hold as many of each class.
    """

    to_train: np.ndarray
    to_held_out: np.ndarray
    rows: np.ndarray
    held_out_rows: np.ndarray
    train_classes: np.ndarray
    held_out_classes: np.ndarray

    def of(self, chosen: np.ndarray) -> Closeness:
        """The same of some of the n images, by row number."""
        return replace(
            self,
            to_train=self.to_train[chosen],
            to_held_out=self.to_held_out[chosen],
            rows=self.rows[chosen],
            held_out_rows=self.held_out_rows[chosen],
        )

    @property
    def nearer_to_train(self) -> np.ndarray:
        """Shape `(n,)`: 1 where the training image is nearer, 0 where the held-out one is, 1/2 at equal distance."""
        return (np.sign(self.to_held_out - self.to_train) + 1) / 2

    @property
    def ratios(self) -> np.ndarray:
        """Shape `(n,)`: distance to training over distance to held-out images; 1 where both are 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            found = self.to_train / self.to_held_out
        return np.where((self.to_train == 0) & (self.to_held_out == 0), 1.0, found)

    def null_deviation(self) -> float:
        """Standard deviation of the share nearer to training images, were training and held-out ones interchangeable.

        Images that share a nearest real one are nearer to training together, so that n images are not n trials: one
        real image that lies near the middle may be the nearest of many. What is random is which of the 2 m real images
        were trained on. Let c_i be how many images have real image i as their nearest, a tie counting half for both.
        Over all ways to call half of the N images of a class training images, their sum of c_i has the variance
        N / (4 (N - 1)) * sum (c_i - mean c)^2; classes are independent.
        """
        nearer, size = self.nearer_to_train, len(self.train_classes)
        counts = (
            np.bincount(self.rows, nearer, size),
            np.bincount(self.held_out_rows, 1 - nearer, len(self.held_out_classes)),
        )
        variance = 0.0
        for label in np.unique(self.train_classes):
            own = np.concatenate([counts[0][self.train_classes == label], counts[1][self.held_out_classes == label]])
            variance += len(own) / (4 * (len(own) - 1)) * float(np.square(own - own.mean()).sum())
        return float(np.sqrt(variance)) / len(nearer)

    def metrics(self, confidence: float) -> dict[str, Any]:
        """Share nearer to training images, with interval and test against 1/2, and the median of the ratios.

        Of a generator that memorizes nothing half of the images are nearer to a training image, and the ratio is 1.
        Images at equal distance to both count half. Interval and two-sided p are those of a normal distribution with
        `null_deviation`; the interval is cut off at 0 and 1. The median has no interval, since its images are not
        independent either; it is None where most images coincide with held-out ones, which makes their ratios infinite.
        """
        share, deviation = float(self.nearer_to_train.mean()), self.null_deviation()
        ratio = float(np.median(self.ratios))
        reach = float(norm.ppf((1 + confidence) / 2)) * deviation
        return {
            "nearer_to_train": share,
            "nearer_to_train_ci": [max(0.0, share - reach), min(1.0, share + reach)],
            "nearer_to_train_p": float(2 * norm.sf(abs(share - 0.5) / deviation)) if deviation else 1.0,
            "train_distance_ratio": ratio if np.isfinite(ratio) else None,
        }

    def closest(self, count: int) -> list[dict[str, Any]]:
        """The `count` images nearest to a training image, nearest first, with that image and both distances."""
        return [
            {
                "row": int(row),
                "train_row": int(self.rows[row]),
                "distance": float(self.to_train[row]),
                "held_out_distance": float(self.to_held_out[row]),
            }
            for row in np.argsort(self.to_train, kind="stable")[:count]
        ]


def closeness(
    train: Neighbours,
    held_out: Neighbours,
    features: np.ndarray,
    train_classes: np.ndarray,
    held_out_classes: np.ndarray,
) -> Closeness:
    """Distances of `features`, shape `(n, d)`, to the nearest of two sets of real images of equal make-up.

    Only equal numbers of each class make 1/2 the share to expect: of a larger set the nearest one is nearer.

    Source: nearest-neighbour tests of data copying, as in arXiv:2004.05675, with the plain share as statistic.
    """
    distances, rows = train.nearest(features)
    others, held_out_rows = held_out.nearest(features)
    return Closeness(distances[:, 0], others[:, 0], rows[:, 0], held_out_rows[:, 0], train_classes, held_out_classes)


def match_real_rows(train: np.ndarray, held_out: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Choose as many training as held-out images in each class, and leave other held-out ones to be compared with them.

    Args:
        train: Class id of each training image, shape `(n,)`.
        held_out: Class id of each held-out image, shape `(m,)`.
        seed: Draws both.

    Returns:
        Rows of training images, rows of held-out images, and rows of the other held-out images, at least as many: they
        stand for a generator that memorizes nothing.
    """
    rng = np.random.default_rng(seed)
    chosen: tuple[list[np.ndarray], ...] = ([], [], [])
    for class_id in np.unique(held_out):
        own, other = (rng.permutation(np.flatnonzero(ids == class_id)) for ids in (train, held_out))
        count = min(len(own), len(other) // 2)
        for rows, part in zip(chosen, (own[:count], other[:count], other[count:]), strict=True):
            rows.append(part)
    first, second, third = (np.concatenate(rows) for rows in chosen)
    return first, second, third
