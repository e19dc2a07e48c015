"""Whether generated images copy training images: near-copies, and how many lie nearer to them than to other real ones.

Everything works on features, shape `(n, d)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from pathalign.augment import ORIENTATIONS
from pathalign.evaluate.alignment import percentile_interval, share
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
    """Distances of n images to their nearest training image and to their nearest held-out one; shape `(n,)`, float64.

    Attributes:
        to_train: Distance to the nearest training image.
        to_held_out: Distance to the nearest of as many real images that nothing was trained on.
        rows: Row of that training image.
    """

    to_train: np.ndarray
    to_held_out: np.ndarray
    rows: np.ndarray

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

    def metrics(self, confidence: float, bootstrap_samples: int, rng: np.random.Generator) -> dict[str, Any]:
        """Share nearer to training images with Wilson interval and exact binomial test, and the median of the ratios.

        Of a generator that memorizes nothing half of the images are nearer to a training image, and the ratio is 1.
        Images at equal distance to both say nothing and are left out of the share. Interval and test take the real
        images as given and the generated ones as independent of each other.

        Args:
            confidence: Of both intervals.
            bootstrap_samples: Resamples of the images behind the interval of the median.
            rng: Draws them.
        """
        decided = self.nearer_to_train != 0.5
        nearer = self.nearer_to_train[decided] == 1
        ratios = self.ratios
        draws = [np.median(ratios[rng.integers(len(ratios), size=len(ratios))]) for _ in range(bootstrap_samples)]
        found: dict[str, Any] = {"nearer_to_train": None, "nearer_to_train_ci": None, "nearer_to_train_p": None}
        if decided.any():
            found = share(nearer, confidence, "nearer_to_train")
            found["nearer_to_train_p"] = float(binomtest(int(nearer.sum()), len(nearer), 0.5).pvalue)
        return {
            **found,
            "train_distance_ratio": float(np.median(ratios)),
            "train_distance_ratio_ci": percentile_interval(np.asarray(draws), confidence),
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


def closeness(train: Neighbours, held_out: Neighbours, features: np.ndarray) -> Closeness:
    """Distances of `features`, shape `(n, d)`, to the nearest of two sets of real images of equal size.

    Only equal numbers, best in each class, make 1/2 the share to expect: of a larger set the nearest one is nearer.

    Source: nearest-neighbour tests of data copying, as in arXiv:2004.05675, with the plain share as statistic.
    """
    distances, rows = train.nearest(features)
    return Closeness(distances[:, 0], held_out.nearest(features)[0][:, 0], rows[:, 0])


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
