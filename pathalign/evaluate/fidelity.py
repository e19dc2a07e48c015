"""How near generated images are to unseen real ones, how varied they are, and whether they copy training images.

Everything here works on feature arrays, except `FeatureStore`, which makes them with an image encoder.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prdc import compute_prdc
from scipy import linalg
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from pathalign.artefacts import fingerprint, write_atomically
from pathalign.augment import ORIENTATIONS, orient
from pathalign.images import ImageSet, content_id, to_pixel_values
from pathalign.progress import Progress
from pathalign.schema import InputError

NEAR_COPY_QUANTILE = 0.01
CPU_BATCH_SIZE, ACCELERATOR_BATCH_SIZE = 16, 256  # larger ones cost a CPU twice the time, in page faults
MAX_PCA_COMPONENTS = 64


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


class FeatureStore:
    """Makes encoder features and keeps them in a folder, so that an interrupted evaluation makes none twice."""

    def __init__(self, encoder: nn.Module, encoder_name: str, folder: Path, device: torch.device):
        self.encoder = encoder.to(device).eval()
        self.encoder_name, self.folder, self.device = encoder_name, folder, device
        self.batch_size = CPU_BATCH_SIZE if device.type == "cpu" else ACCELERATOR_BATCH_SIZE
        folder.mkdir(parents=True, exist_ok=True)

    @torch.no_grad()
    def features(self, images: Tensor, description: str) -> np.ndarray:
        """Features of uint8 images of shape `(n, 3, height, width)`: shape `(n, d)`, float32."""
        path = self.folder / f"features-{fingerprint([self.encoder_name, len(images), content_id(images)])}.npy"
        if path.is_file():
            return np.load(path)
        parts = []
        with Progress(f"features of {description}", len(images), unit="image") as progress:
            for batch in images.split(self.batch_size):
                parts.append(self.encoder(to_pixel_values(batch).to(self.device)).float().cpu().numpy())
                progress.update(len(batch))
        result = np.concatenate(parts)
        buffer = io.BytesIO()
        np.save(buffer, result)
        write_atomically(path, buffer.getvalue())
        return result


def all_orientations(images: Tensor) -> Tensor:
    """The eight flips and quarter turns of each image, by which training is augmented.

    Args:
        images: Shape `(n, channels, size, size)`.

    Returns:
        Shape `(8 * n, channels, size, size)`; row `k * n + i` is image i in orientation k, orientation 0 being itself.
    """
    return torch.cat([orient(images, orientation) for orientation in range(ORIENTATIONS)])


def neighbourhood_metrics(real: np.ndarray, generated: np.ndarray, neighbours: int) -> dict[str, float]:
    """Precision, recall, density and coverage of features of shape `(n, d)`, by the authors' library.

    Source: improved precision and recall (arXiv:1904.06991); density and coverage (arXiv:2002.09797).
    """
    with contextlib.redirect_stdout(io.StringIO()):  # prdc 0.2 prints, and stdout belongs to the results
        values = compute_prdc(real, generated, neighbours)
    return {name: float(value) for name, value in values.items()}


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
    x, y = real.astype(np.float64), generated.astype(np.float64)
    dimensions = x.shape[1]
    k_xx, k_yy, k_xy = ((a @ b.T / dimensions + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    values = []
    for _ in range(subsets):
        i, j = rng.choice(len(x), size, replace=False), rng.choice(len(y), size, replace=False)
        values.append(unbiased_mmd2(k_xx[np.ix_(i, i)], k_yy[np.ix_(j, j)], k_xy[np.ix_(i, j)]))
    return float(np.mean(values)), float(np.std(values))


def unbiased_mmd2(k_xx: np.ndarray, k_yy: np.ndarray, k_xy: np.ndarray) -> float:
    """Unbiased squared maximum mean discrepancy from kernel matrices `(n, n)`, `(m, m)`, `(n, m)`. May be below 0.

    Source: Gretton et al. 2012, JMLR 13, equation 3.
    """
    n, m = k_xy.shape
    within_x = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within_x + within_y - 2 * k_xy.mean())


def reduce_dimensions(fit_on: np.ndarray, count: int) -> PCA | None:
    """PCA for the Frechet distance when `count` images are fewer than twice the feature dimensions, else None.

    It is fitted on training images, which are neither in the reference nor in the floor. Four images for each component
    are kept, at most 64 components.
    """
    if count >= 2 * fit_on.shape[1]:
        return None
    components = max(1, min(MAX_PCA_COMPONENTS, count // 4, len(fit_on) - 1, fit_on.shape[1]))
    return PCA(components, svd_solver="full").fit(fit_on)


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians fitted to features of shape `(n, d)`.

    Source: arXiv:1706.08500; trace of the matrix root as the sum of the roots of the product's eigenvalues.
    """
    cov_real, cov_generated = (np.atleast_2d(np.cov(x.astype(np.float64), rowvar=False)) for x in (real, generated))
    difference = real.mean(axis=0, dtype=np.float64) - generated.mean(axis=0, dtype=np.float64)
    roots = np.sqrt(np.clip(linalg.eigvals(cov_real @ cov_generated).real, 0, None))
    return float(difference @ difference + np.trace(cov_real) + np.trace(cov_generated) - 2 * roots.sum())


@dataclass(frozen=True)
class CopyCheck:
    """Nearest training images, to find generated images that copy one.

    Attributes:
        index: Searches the features of all orientations of the training images.
        threshold: Distance that 99 % of unseen real images keep from their nearest training image.
        train_count: Number of training images, each in 8 orientations.
    """

    index: NearestNeighbors
    threshold: float
    train_count: int

    @classmethod
    def fit(cls, train_orientations: np.ndarray, unseen_real: np.ndarray) -> CopyCheck:
        """Learn the threshold. Features of shapes `(8 * n, d)` (see `all_orientations`) and `(m, d)`."""
        index = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(train_orientations)
        distances = index.kneighbors(unseen_real)[0][:, 0]
        threshold = float(np.quantile(distances, NEAR_COPY_QUANTILE))
        return cls(index, threshold, len(train_orientations) // ORIENTATIONS)

    def check(self, features: np.ndarray) -> NearestTraining:
        """Compare features of shape `(n, d)` with the training images."""
        distances, rows = (found[:, 0] for found in self.index.kneighbors(features))
        return NearestTraining(
            distances=distances,
            rows=rows % self.train_count,
            orientation=rows // self.train_count,
            authentic=distances >= self.threshold,
        )


@dataclass(frozen=True)
class NearestTraining:
    """The nearest training image of each of n images: its distance, row and orientation; all of shape `(n,)`."""

    distances: np.ndarray
    rows: np.ndarray
    orientation: np.ndarray
    authentic: np.ndarray  # bool, False for a near-copy

    def closest(self, count: int) -> list[dict[str, Any]]:
        """The `count` pairs that lie closest together, closest first."""
        order = np.argsort(self.distances, kind="stable")[:count]
        return [
            {
                "row": int(row),
                "train_row": int(self.rows[row]),
                "orientation": int(self.orientation[row]),
                "distance": float(self.distances[row]),
                "near_copy": not bool(self.authentic[row]),
            }
            for row in order
        ]
