"""What trainers that go epoch by epoch share: seeds of an epoch's images, and how a batch is dealt out."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_SEED, SEEDS_PER_EPOCH = 2**31, 2**20  # beyond the seeds of candidate sets; torch uses 32 bits of a seed


def first_seed(seed: int, epochs: int, number: int) -> int:
    """Seed of the first image of epoch `number`; image i has the seed plus i.

    Epochs of a run never share a seed while there are no more than 2048 of them and no more than 2**20 images in
    each; nor do images drawn for training share one with candidates and evaluation samples, whose seeds are lower.

    Args:
        seed: Of the run.
        epochs: Of the whole run.
        number: From 0; `epochs` itself is the look at the result.
    """
    return FIRST_SEED + (seed * (epochs + 1) + number) * SEEDS_PER_EPOCH % FIRST_SEED


def micro_batches(rows: Tensor, size: int, process: tuple[int, int] = (0, 1)) -> list[Tensor]:
    """This process's rows of a global batch in parts of at most `size`; none if it has none.

    Args:
        rows: Shape `(n,)`; the processes take turns.
        size: Rows in a part.
        process: Index and number of processes.
    """
    index, processes = process
    own = rows[index::processes]
    return list(own.split(size)) if len(own) else []


def class_balanced_weights(class_ids: Tensor) -> Tensor:
    """Weights with which a sum over images is the mean over classes of the mean within a class.

    Args:
        class_ids: Shape `(n,)`, int64.

    Returns:
        Shape `(n,)`, float32, adding up to 1; each class that occurs has the same share.
    """
    _, place, counts = class_ids.unique(return_inverse=True, return_counts=True)
    return 1.0 / (len(counts) * counts[place].float())


def class_turns(class_ids: Tensor, order: Tensor, count: int) -> Tensor:
    """Choose items so that all classes get the same number as far as they have them.

    Args:
        class_ids: Shape `(n,)`, class of each item.
        order: Shape `(n,)`, all items, the ones to take first in front.
        count: Items to choose.

    Returns:
        Shape `(min(count, n),)`: the first item of each class, then the second of each, and so on.
    """
    ordered = class_ids[order]
    turn = torch.zeros_like(order)
    for class_id in ordered.unique():
        own = ordered == class_id
        turn[own] = torch.arange(int(own.sum()))
    return order[torch.argsort(turn, stable=True)][:count]
