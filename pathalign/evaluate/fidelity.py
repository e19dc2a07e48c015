"""How near generated images are to unseen real ones and how varied they are, on feature arrays of any length.

Nothing here holds more than blocks of the features, or of the matrices between them, in memory: arrays may be
memory-mapped.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg
from sklearn.decomposition import PCA

from pathalign.evaluate.neighbours import blocks, radii, tiles
from pathalign.images import ImageSet
from pathalign.schema import InputError

MAX_PCA_COMPONENTS = 64
KERNEL_BLOCK = 512  # small enough for a processor's cache
WHOLE_KERNEL_ROWS = 2048  # up to here the subsets share kernel matrices that are made once
MOMENTS_BLOCK = 4096


@dataclass(frozen=True)
class MatchedRows:
    """Row numbers that give all compared sets the same number of images in each class.

    Attributes:
        generated: Set name -> rows of that set.
        reference: Rows of the real test images that everything is compared with.
        floor: As many other rows of the real test images; they stand for a perfect generator.
    """

    generated: dict[str, np.ndarray]
    reference: np.ndarray
    floor: np.ndarray


def match_rows(generated: dict[str, ImageSet], test: ImageSet, neighbours: int, seed: int) -> MatchedRows:
    """Choose equal numbers of generated, reference and floor images, class by class.

    Neighbourhood metrics depend on sample size, so both sides get the same. Generated rows are the first of each class,
    hence the same seeds in every set; real rows are drawn with `seed`.

    Raises:
        InputError: If too few images are left for `neighbours`.
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in generated}
    reference, floor = [], []
    for class_id in range(len(test.class_names)):
        real = rng.permutation(rows_of_class(test, class_id))
        own = {name: rows_of_class(images, class_id) for name, images in generated.items()}
        count = min(len(real) // 2, *(len(found) for found in own.values()))
        reference.append(real[:count])
        floor.append(real[count : 2 * count])
        for name, found in own.items():
            rows[name].append(found[:count])
    total = sum(map(len, reference))
    if total <= neighbours:
        raise InputError(
            f"Only {total} images of each kind can be compared (generated, and two halves of the {len(test)} real test "
            f"images, class by class); `neighbours` = {neighbours} needs more. Generate more, or lower `neighbours`."
        )
    generated_rows = {name: np.concatenate(parts) for name, parts in rows.items()}
    return MatchedRows(generated_rows, np.concatenate(reference), np.concatenate(floor))


def rows_of_class(images: ImageSet, class_id: int) -> np.ndarray:
    """Row numbers of one class, in order."""
    return (images.class_ids == class_id).nonzero().flatten().numpy()


@dataclass(frozen=True)
class Neighbourhoods:
    """Which images lie within the balls that reach to the k-th nearest neighbour of the same set.

    Attributes:
        surrounding: Shape `(generated,)`, how many real images' balls hold each generated one.
        reached: Shape `(real,)`, bool, whether some generated image's ball holds the real one.
        covered: Shape `(real,)`, bool, whether the real image's ball holds some generated one.
        neighbours: k.
    """

    surrounding: np.ndarray
    reached: np.ndarray
    covered: np.ndarray
    neighbours: int

    def metrics(self) -> dict[str, float]:
        """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797)."""
        return {
            "precision": float((self.surrounding > 0).mean()),
            "recall": float(self.reached.mean()),
            "density": float(self.surrounding.mean() / self.neighbours),
            "coverage": float(self.covered.mean()),
        }


def neighbourhoods(real: np.ndarray, generated: np.ndarray, neighbours: int) -> Neighbourhoods:
    """Compare two sets of features, of shapes `(n, d)` and `(m, d)`, both longer than `neighbours`."""
    surrounding = np.zeros(len(generated), dtype=np.int64)
    reached, covered = np.zeros(len(real), dtype=bool), np.zeros(len(real), dtype=bool)
    for tile in tiles(real, radii(real, neighbours), generated, radii(generated, neighbours)):
        surrounding[tile.second] += tile.in_first.sum(axis=0)
        covered[tile.first] |= tile.in_first.any(axis=1)
        assert tile.in_second is not None
        reached[tile.first] |= tile.in_second.any(axis=1)
    return Neighbourhoods(surrounding, reached, covered, neighbours)


def neighbourhood_metrics(real: np.ndarray, generated: np.ndarray, neighbours: int) -> dict[str, float]:
    """Precision, recall, density and coverage, see `Neighbourhoods.metrics`.

    Args:
        real: Features of real images, shape `(n, d)`.
        generated: Features of generated images, shape `(m, d)`, best with m = n.
        neighbours: Size of the neighbourhoods; less than n and m.
    """
    return neighbourhoods(real, generated, neighbours).metrics()


def kernel_distance(
    real: np.ndarray, generated: np.ndarray, rng: np.random.Generator, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel inception distance: mean and standard deviation over random subsets of the unbiased squared MMD.

    With less than two subsets' worth of images, a subset is half of the smaller set.

    Args:
        real: Features, shape `(n, d)`.
        generated: Features, shape `(m, d)`.
        rng: Draws the subsets, without replacement.
        subsets: How many.
        subset_size: Images in each, at most.

    Source: arXiv:1801.01401; kernel k(x, y) = (x.y / d + 1)^3.
    """
    size = max(2, min(subset_size, len(real) // 2, len(generated) // 2))
    whole = None
    if max(len(real), len(generated)) <= WHOLE_KERNEL_ROWS:
        x, y = real.astype(np.float64), generated.astype(np.float64)
        whole = kernel(x, x), kernel(y, y), kernel(x, y)
    values = []
    for _ in range(subsets):
        i, j = rng.choice(len(real), size, replace=False), rng.choice(len(generated), size, replace=False)
        if whole is not None:
            values.append(unbiased_mmd2(whole[0][np.ix_(i, i)], whole[1][np.ix_(j, j)], whole[2][np.ix_(i, j)]))
        else:
            x, y = real[np.sort(i)].astype(np.float64), generated[np.sort(j)].astype(np.float64)
            values.append(unbiased_mmd2(kernel(x, x), kernel(y, y), kernel(x, y)))
    return float(np.mean(values)), float(np.std(values))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The polynomial kernel (x.y / d + 1)^3 of features of shapes `(n, d)` and `(m, d)`. Shape `(n, m)`."""
    product = x @ y.T
    product /= x.shape[1]
    product += 1
    cube = product * product
    cube *= product
    return cube


def unbiased_mmd2(k_xx: np.ndarray, k_yy: np.ndarray, k_xy: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy from kernel matrices `(n, n)`, `(m, m)`, `(n, m)`. May be below 0.

    Source: Gretton et al. 2012, JMLR 13, equation 3.
    """
    n, m = k_xy.shape
    within_x = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def whole_kernel_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """The same estimate over all pairs of images at once, block by block: of all unbiased ones that of least variance.

    Args:
        real: Features, shape `(n, d)`, n > 1.
        generated: Features, shape `(m, d)`, m > 1.
    """
    n, m = len(real), len(generated)
    within_x, within_y = (
        _kernel_sum_within(features) / (len(features) * (len(features) - 1)) for features in (real, generated)
    )
    between = sum(
        float(kernel(x, generated[columns].astype(np.float64)).sum())
        for x in (real[rows].astype(np.float64) for rows in blocks(n, KERNEL_BLOCK))
        for columns in blocks(m, KERNEL_BLOCK)
    )
    return within_x + within_y - 2 * between / (n * m)


def _kernel_sum_within(features: np.ndarray) -> float:
    """Sum of the kernel over all ordered pairs of different rows; each pair of blocks is visited once."""
    total = 0.0
    for rows in blocks(len(features), KERNEL_BLOCK):
        x = features[rows].astype(np.float64)
        own = kernel(x, x)
        total += float(own.sum() - np.trace(own))
        for later in blocks(len(features) - rows.stop, KERNEL_BLOCK):
            y = features[rows.stop + later.start : rows.stop + later.stop].astype(np.float64)
            total += 2 * float(kernel(x, y).sum())
    return total


def reduce_dimensions(fit_on: np.ndarray, count: int) -> PCA | None:
    """PCA for the Frechet distance when `count` images are fewer than twice the feature dimensions, else None.

    It is fitted on training images, which are neither in the reference nor in the floor. Four images for each component
    are kept, at most 64 components.
    """
    if count >= 2 * fit_on.shape[1]:
        return None
    components = max(1, min(MAX_PCA_COMPONENTS, count // 4, len(fit_on) - 1, fit_on.shape[1]))
    return PCA(components, svd_solver="full").fit(fit_on)


@dataclass(frozen=True)
class Moments:
    """Number, mean of shape `(d,)` and covariance of shape `(d, d)` of features, in float64."""

    count: int
    mean: np.ndarray
    covariance: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Moments of features of shape `(n, d)`, n > 1, in one pass over blocks.

        Source: Chan, Golub and LeVeque 1979, equation 1.5: means and sums of squares of two parts are combined, so
        that a mean far from zero does not cancel.
        """
        count, mean = 0, np.zeros(features.shape[1])
        scatter = np.zeros((features.shape[1], features.shape[1]))
        for rows in blocks(len(features), MOMENTS_BLOCK):
            block = features[rows].astype(np.float64)
            block_mean, size = block.mean(axis=0), len(block)
            block -= block_mean
            difference = block_mean - mean
            scatter += block.T @ block + np.outer(difference, difference) * (count * size / (count + size))
            mean += difference * (size / (count + size))
            count += size
        return cls(count, mean, scatter / (count - 1))


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians fitted to features of shape `(n, d)`.

    Source: arXiv:1706.08500. The trace of (C1 C2)^(1/2) is taken as the sum of the roots of the eigenvalues of
    C1^(1/2) C2 C1^(1/2), which are the same, and real because that matrix is symmetric.
    """
    first, second = Moments.of(real), Moments.of(generated)
    values, vectors = linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    roots = np.sqrt(np.clip(linalg.eigvalsh(root @ second.covariance @ root), 0, None))
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2 * roots.sum())
