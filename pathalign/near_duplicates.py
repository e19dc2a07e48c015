"""Near-duplicates by perceptual hash: images that look the same must never stand on two sides of a split."""

from __future__ import annotations

from collections.abc import Iterable

import imagehash
import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ROWS_AT_ONCE = 512  # bounds the memory of all pairwise distances


def perceptual_hashes(images: Iterable[Image.Image]) -> np.ndarray:
    """64-bit perceptual hash (pHash: signs of the lowest 8x8 DCT coefficients) of each image.

    Returns:
        Shape `(n,)`, uint64; the number of differing bits of two hashes measures how unlike the images look.

    Source: the library imagehash, `phash` with its default size.
    """
    bits = [imagehash.phash(image).hash.ravel() for image in images]
    if not bits:
        return np.empty(0, dtype=np.uint64)
    return np.packbits(np.stack(bits), axis=1).view(np.uint64).ravel()


def near_duplicate_groups(hashes: np.ndarray, bits: int) -> np.ndarray:
    """Group images that are linked by a chain of near-duplicates.

    Args:
        hashes: Shape `(n,)`, uint64, see `perceptual_hashes`.
        bits: Two images are near-duplicates if their hashes differ in at most this many bits.

    Returns:
        Shape `(n,)`, int32: images with the same number belong together; numbers count up from 0 by first appearance.
    """
    rows, columns = [], []
    for start in range(0, len(hashes), ROWS_AT_ONCE):
        distances = np.bitwise_count(hashes[start : start + ROWS_AT_ONCE, None] ^ hashes[None, start:])
        row, column = np.nonzero(distances <= bits)
        rows.append(row + start)
        columns.append(column + start)
    if not rows:
        return np.empty(0, dtype=np.int32)
    row, column = np.concatenate(rows), np.concatenate(columns)
    links = coo_array((np.ones(len(row), dtype=bool), (row, column)), shape=(len(hashes), len(hashes)))
    _, groups = connected_components(links, directed=False)
    return groups
