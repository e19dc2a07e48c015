"""Images and labels that the reward model learns from: graded images, and real images paired with a class.

Which images a batch holds, and how they are augmented, depends on the seed and the batch's number alone, so a run that
was interrupted goes on with the batches that it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pathalign.augment import random_exposure, random_orientations
from pathalign.images import ImageSet, to_pixel_values
from pathalign.randomness import seeded
from pathalign.reward.image_processing_reward import resize

Augmentation = Literal["full", "flips_rotations", "none"]
Row = dict[str, Tensor]


def real_pairs(class_ids: Tensor, num_classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pair real images with a class: the true one for half of them, else one drawn uniformly from the others.

    Args:
        class_ids: True classes, shape `(n,)`.
        num_classes: At least 2.
        generator: Decides which.

    Returns:
        Paired classes, shape `(n,)`, and labels, shape `(n,)`: 1 (plausible) exactly where the pair is true.

    Source: arXiv:2306.12438, section 3; labels turned round, and the share of true pairs fixed at one half.
    """
    matched = torch.rand(len(class_ids), generator=generator) < 0.5
    others = (class_ids + torch.randint(1, num_classes, class_ids.shape, generator=generator)) % num_classes
    return torch.where(matched, class_ids, others), matched.float()


def augment(pixel_values: Tensor, kind: Augmentation, generator: torch.Generator) -> Tensor:
    """Vary images in ways that leave a verdict as it is: flips, quarter turns, and with `full` exposure and noise.

    Shape `(n, 3, size, size)`, values in [-1, 1], as the result. Sizes never change: experts judge the size of a cell.
    """
    if kind == "none":
        return pixel_values
    turned = random_orientations(pixel_values, generator)
    return turned if kind == "flips_rotations" else random_exposure(turned, generator).clamp(-1, 1)


def targets(graded: ImageSet, criteria: list[str]) -> tuple[Tensor, Tensor]:
    """Labels of graded images: plausibility `(n,)`, and criteria met `(n, len(criteria))` with NaN where unknown."""
    failed = [graded.columns[f"failed_{name}"] for name in criteria]
    met = [[float("nan") if share is None else 1 - share for share in shares] for shares in failed]
    columns = torch.tensor(met, dtype=torch.float32).reshape(len(criteria), len(graded)).T
    return torch.tensor(graded.columns["plausible"], dtype=torch.float32), columns


class GradedImages(Dataset[Row]):
    """Graded images as they are, for validation."""

    def __init__(self, graded: ImageSet, criteria: list[str], image_size_px: int) -> None:
        self.graded, self.image_size_px = graded, image_size_px
        self.labels, self.criteria_labels = targets(graded, criteria)

    def __len__(self) -> int:
        return len(self.graded)

    def __getitem__(self, index: int) -> Row:
        pixel_values = resize(to_pixel_values(self.graded.images[index : index + 1]), self.image_size_px)
        return {
            "pixel_values": pixel_values[0],
            "class_ids": self.graded.class_ids[index],
            "labels": self.labels[index],
            "criteria_labels": self.criteria_labels[index],
        }


@dataclass
class TrainingPairs(Dataset[Row]):
    """All training batches of a run in their order: position `p` belongs to batch `p // batch_size`.

    Each batch begins with its real pairs; the rest are graded images, each seen once in a pass.

    Attributes:
        graded: Graded images, with the columns of a feedback dataset.
        real: Real images; class ids follow the same names.
        criteria: Criteria that have a head.
        image_size_px: Size of the model's input.
        batches: How many batches the run has.
        batch_size: Images in a batch.
        real_share: Share of real pairs in each.
        augmentation: See `augment`.
        label_smoothing: Share by which labels are drawn towards 0.5.
        seed: Decides order, pairs and augmentation.
    """

    graded: ImageSet
    real: ImageSet
    criteria: list[str]
    image_size_px: int
    batches: int
    batch_size: int
    real_share: float
    augmentation: Augmentation
    label_smoothing: float
    seed: int

    def __post_init__(self) -> None:
        self.real_count = real_count(self.batch_size, self.real_share)
        self.labels, self.criteria_labels = targets(self.graded, self.criteria)
        self._order = lru_cache(maxsize=8)(self._draw_order)
        self._pairs = lru_cache(maxsize=4)(self._draw_pairs)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __getitem__(self, position: int) -> Row:
        """One row; it depends on its whole batch only by the augmentation."""
        first = position - position % self.batch_size
        return self.__getitems__(list(range(first, first + self.batch_size)))[position - first]

    def __getitems__(self, positions: list[int]) -> list[Row]:
        """The rows of one whole batch, which is how a `DataLoader` asks for them."""
        batch = positions[0] // self.batch_size
        real_draws = range(batch * self.real_count, (batch + 1) * self.real_count)
        graded_count = self.batch_size - self.real_count
        graded_rows = self._rows(0, range(batch * graded_count, (batch + 1) * graded_count), len(self.graded))
        real_rows = self._rows(1, real_draws, len(self.real))
        pairs = [self._pairs(draw // len(self.real)) for draw in real_draws]
        paired_ids = [ids[row] for (ids, _), row in zip(pairs, real_rows, strict=True)]
        matched = [labels[row] for (_, labels), row in zip(pairs, real_rows, strict=True)]
        images = [
            resize(to_pixel_values(source.images[rows]), self.image_size_px)
            for source, rows in ((self.real, real_rows), (self.graded, graded_rows))
            if rows
        ]
        pixel_values = augment(torch.cat(images), self.augmentation, seeded(self.seed, 2, batch))
        labels = torch.cat([torch.tensor(matched), self.labels[graded_rows]])
        unknown = torch.full((self.real_count, len(self.criteria)), torch.nan)
        columns: Row = {
            "pixel_values": pixel_values,
            "class_ids": torch.cat([torch.tensor(paired_ids, dtype=torch.int64), self.graded.class_ids[graded_rows]]),
            "labels": labels + (0.5 - labels) * self.label_smoothing,
            "criteria_labels": torch.cat([unknown, self.criteria_labels[graded_rows]]),
        }
        return [{name: values[row] for name, values in columns.items()} for row in range(self.batch_size)]

    def _rows(self, stream: int, draws: range, size: int) -> list[int]:
        """Row numbers of successive draws, a new order after every `size` of them."""
        return [int(self._order(stream, draw // size, size)[draw % size]) for draw in draws]

    def _draw_order(self, stream: int, epoch: int, size: int) -> Tensor:
        return torch.randperm(size, generator=seeded(self.seed, stream, epoch))

    def _draw_pairs(self, epoch: int) -> tuple[Tensor, Tensor]:
        return real_pairs(self.real.class_ids, len(self.real.class_names), seeded(self.seed, 3, epoch))


def real_count(batch_size: int, real_share: float) -> int:
    """Real pairs in a batch; at least one graded image stays, unless real pairs are all that is wanted."""
    return batch_size if real_share == 1 else min(round(batch_size * real_share), batch_size - 1)
