"""Pairs of a chosen and a rejected image of one class: read, or made of grades or of rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pathalign.images import ImageSet, content_id, dataset_shards, decode, read_table
from pathalign.schema import InputError, unknown_name


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of one class each.

    Attributes:
        images: Shape `(n, 3, size, size)`, uint8.
        chosen: Shape `(pairs,)`, int64, place in `images` of the better one.
        rejected: Shape `(pairs,)`, int64, place of the other.
        class_ids: Shape `(pairs,)`, int64.
    """

    images: Tensor
    chosen: Tensor
    rejected: Tensor
    class_ids: Tensor

    def __len__(self) -> int:
        return len(self.chosen)


def read_preferences(path_or_repo_id: str | Path, class_names: Sequence[str], image_size_px: int) -> Pairs:
    """Pairs that experts decided, as `pathalign.grading.preferences.save_pairs` writes them.

    Args:
        path_or_repo_id: A folder or a Hub dataset with the columns `chosen`, `rejected` and `label`.
        class_names: Of the model, in the order of their ids; the dataset may have fewer, in another order.
        image_size_px: Of the model's images.

    Raises:
        InputError: If it cannot be read, lacks a column, names a class that the model does not know, has images of
            another size, or a pair of one image.
    """
    import datasets
    import pyarrow

    shards = dataset_shards(path_or_repo_id)
    table = pyarrow.concat_tables([read_table(shards.path(index)) for index in range(len(shards))])
    missing = sorted({"chosen", "rejected", "label"} - set(table.column_names))
    if missing:
        raise InputError(
            f"{path_or_repo_id} lacks the columns {missing} of pairwise choices; export them with `pathalign grade "
            "export` from a study in pairwise mode. Graded images of a feedback dataset go into `feedback`."
        )
    names = datasets.Features.from_arrow_schema(table.schema)["label"].names
    ids = _known_ids(names, class_names, path_or_repo_id)
    sides = []
    for side in ("chosen", "rejected"):
        arrays = [decode(row["bytes"]) for row in table.column(side).to_pylist()]
        _check_sizes({array.shape[:2] for array in arrays}, image_size_px, path_or_repo_id)
        sides.append(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))
    for row, (chosen, rejected) in enumerate(zip(*sides, strict=True)):
        if torch.equal(chosen, rejected):
            raise InputError(f"Pair {row} of {path_or_repo_id} is one image twice; take it out, it teaches no order.")
    chosen = torch.arange(len(table))
    labels = torch.tensor(table.column("label").to_pylist())
    return Pairs(torch.cat(sides), chosen, len(table) + chosen, ids[labels])


def graded_pairs(feedback: ImageSet, class_names: Sequence[str], min_margin: float, source: str) -> Pairs:
    """All pairs of a plausible and an implausible image of one class.

    Args:
        feedback: Split `train` of a feedback dataset, with the column `plausible`.
        class_names: Of the model, in the order of their ids.
        min_margin: Smallest difference between the plausible shares of a pair's images.
        source: Where `feedback` comes from, for messages.

    Raises:
        InputError: If there is no pair, no column `plausible`, or a class that the model does not know.
    """
    if "plausible" not in feedback.columns:
        raise InputError(f"{source} has no column `plausible`; make it with `pathalign feedback`.")
    class_ids = _known_ids(feedback.class_names, class_names, source)[feedback.class_ids]
    shares = torch.tensor(feedback.columns["plausible"], dtype=torch.float64)
    better, worse = (shares > 0.5).nonzero()[:, 0], (shares <= 0.5).nonzero()[:, 0]
    fits = class_ids[better][:, None] == class_ids[worse][None, :]
    fits &= shares[better][:, None] - shares[worse][None, :] >= min_margin - 1e-9  # shares are fractions such as 2/3
    _, contents = np.unique(feedback.image_ids, return_inverse=True)
    fits &= torch.from_numpy(contents[better.numpy()][:, None] != contents[worse.numpy()][None, :])
    first, second = fits.nonzero(as_tuple=True)
    if len(first) == 0:
        raise InputError(
            f"{source} has {len(better)} plausible and {len(worse)} implausible images for training, but no pair "
            f"of one class whose shares differ by {min_margin} or more. Grade more images, or lower `min_margin`."
        )
    return Pairs(feedback.images, better[first], worse[second], class_ids[better[first]])


def ranked_pairs(images: Tensor, class_ids: Tensor, rewards: Tensor) -> Pairs:
    """Within each class the best image with the worst, the second best with the second worst, and so on.

    Args:
        images: Shape `(n, 3, size, size)`, uint8.
        class_ids: Shape `(n,)`, int64.
        rewards: Shape `(n,)`; images of equal reward make no pair.

    Returns:
        Of each class the pairs with the largest difference first.
    """
    chosen, rejected = [], []
    for class_id in class_ids.unique().tolist():
        own = (class_ids == class_id).nonzero()[:, 0]
        order = own[rewards[own].argsort(descending=True, stable=True)]
        best, worst = order[: len(order) // 2], order.flip(0)[: len(order) // 2]
        differ = rewards[best] > rewards[worst]
        chosen.append(best[differ])
        rejected.append(worst[differ])
    better = torch.cat(chosen)
    return Pairs(images, better, torch.cat(rejected), class_ids[better])


def pair_ids(pairs: Pairs) -> list[str]:
    """Content of the pairs in their order, to tell one set of pairs from another."""
    contents = [content_id(image) for image in pairs.images]
    columns = (pairs.chosen, pairs.rejected, pairs.class_ids)
    return [f"{contents[a]}>{contents[b]}:{c}" for a, b, c in zip(*(x.tolist() for x in columns), strict=True)]


def _known_ids(names: Sequence[str], class_names: Sequence[str], source: str | Path) -> Tensor:
    """Class ids of the model for a dataset's class names."""
    for name in names:
        if name not in class_names:
            raise InputError(
                f"{source} has the classes {list(names)}: {unknown_name('class', name, class_names)} "
                "Use choices or grades about images of this base model."
            )
    return torch.tensor([list(class_names).index(name) for name in names])


def _check_sizes(sizes: set[tuple[int, ...]], image_size_px: int, source: str | Path) -> None:
    other = sorted(sizes - {(image_size_px, image_size_px)})
    if other:
        raise InputError(
            f"{source} has images of {other[0][1]} x {other[0][0]} px, the base model draws {image_size_px} px; use "
            "choices about images of this base model."
        )
