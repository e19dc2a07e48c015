"""Exact nearest neighbours and membership in balls, in blocks: no matrix of all distances is ever in memory.

faiss searches and measures in float32, in the fast form |x|^2 + |y|^2 - 2 x.y. That form cancels, so features are
centred first, and whatever a rounding error could decide is measured again in float64 as a plain difference. The
results are those of float64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np

QUERY_BLOCK = 1024
POINT_BLOCK = 8192
TILE_ROWS, TILE_COLUMNS = 512, 2048  # a tile of distances fits a processor's cache
SPARE_CANDIDATES = 8
EXACT_BYTES = 2**26  # of float64 differences at once
FLOAT32_STEP = 2.0**-24


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices that cover `count` rows, `size` at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def mean_of(features: np.ndarray) -> np.ndarray:
    """Mean of features of shape `(n, d)`, summed in float64 block by block. Shape `(d,)`."""
    total = np.zeros(features.shape[1])
    for rows in blocks(len(features), POINT_BLOCK):
        total += features[rows].sum(axis=0, dtype=np.float64)
    return total / len(features)


def distances_to(centre: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Euclidean distance of each row of `features`, shape `(n, d)`, to one point of shape `(d,)`. Shape `(n,)`."""
    parts = [np.linalg.norm(features[rows] - centre, axis=1) for rows in blocks(len(features), QUERY_BLOCK)]
    return np.concatenate(parts)


class Neighbours:
    """Exact nearest neighbours in one set of features, by faiss.

    Args:
        features: Shape `(n, d)`, float32 or float64, n > 0; may be memory-mapped. Values lie well within float32.
    """

    def __init__(self, features: np.ndarray) -> None:
        self.features, self.centre = features, mean_of(features)
        self.index = faiss.IndexFlatL2(features.shape[1])
        for rows in blocks(len(features), POINT_BLOCK):
            self.index.add(_centred(features[rows], self.centre))

    def nearest(self, queries: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The `count` nearest rows of each query, nearest first; among equal distances the lower row comes first.

        Args:
            queries: Shape `(m, d)`.
            count: At most the size of the set.

        Returns:
            Distances, float64, and row numbers, int64, both of shape `(m, count)`.
        """
        distances = np.empty((len(queries), count))
        rows = np.empty((len(queries), count), dtype=np.int64)
        for block in blocks(len(queries), QUERY_BLOCK):
            distances[block], rows[block] = self._search(np.asarray(queries[block], dtype=np.float64), count)
        return distances, rows

    def _search(self, queries: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        wanted = min(count + SPARE_CANDIDATES, len(self.features))
        rough, candidates = self.index.search(_centred(queries, self.centre), wanted)
        squares = np.stack([_square_distances(self.features[column], queries) for column in candidates.T], axis=1)
        squares, candidates = _smallest(squares, candidates, count)
        if wanted == len(self.features):
            return np.sqrt(squares), candidates
        # Whatever was not returned lies, up to rounding, at least as far as the last candidate.
        norms = np.linalg.norm(queries - self.centre, axis=1)
        last = squares[:, -1]
        error = _rounding(self.index.d) * (norms**2 + (norms + np.sqrt(last)) ** 2)
        unsure = np.flatnonzero((last > rough[:, -1] - error) & (last > 0))
        for row in unsure:
            squares[row], candidates[row] = self._exhaustive(queries[row], count)
        return np.sqrt(squares), candidates

    def _exhaustive(self, query: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        squares, rows = np.empty((1, 0)), np.empty((1, 0), dtype=np.int64)
        for block in blocks(len(self.features), QUERY_BLOCK):
            found = _square_distances(self.features[block], query)
            squares = np.concatenate([squares, found[None]], axis=1)
            rows = np.concatenate([rows, np.arange(block.start, block.stop)[None]], axis=1)
            squares, rows = _smallest(squares, rows, min(count, squares.shape[1]))
        return squares[0], rows[0]


def radii(features: np.ndarray, count: int) -> np.ndarray:
    """Distance of each row, of shape `(n, d)`, to its `count`-th nearest other row. Shape `(n,)`; n > `count`."""
    return Neighbours(features).nearest(features, count + 1)[0][:, count]  # the nearest row is the row itself


@dataclass(frozen=True)
class Tile:
    """Which of some rows lie within each other's balls.

    Attributes:
        first: Rows of the first set.
        second: Rows of the second set.
        in_first: Shape `(len(first), len(second))`, bool: the second's row lies in the open ball of the first's.
        in_second: The same the other way round; None if the second set has no balls.
    """

    first: slice
    second: slice
    in_first: np.ndarray
    in_second: np.ndarray | None


def tiles(
    first: np.ndarray, first_radii: np.ndarray, second: np.ndarray, second_radii: np.ndarray | None = None
) -> Iterator[Tile]:
    """Compare two sets tile by tile with the balls of one or both.

    Args:
        first: Shape `(n, d)`.
        first_radii: Shape `(n,)`, of the balls around the rows of `first`.
        second: Shape `(m, d)`.
        second_radii: Shape `(m,)`.
    """
    centre = mean_of(first)
    for columns in blocks(len(second), TILE_COLUMNS):
        right = _centred(second[columns], centre)
        for rows in blocks(len(first), TILE_ROWS):
            left = _centred(first[rows], centre)
            squares = faiss.pairwise_distances(left, right)
            ours, theirs = first[rows], second[columns]
            inside = _inside(squares, left, first_radii[rows], ours, theirs)
            other = None
            if second_radii is not None:
                other = _inside(squares.T, right, second_radii[columns], theirs, ours).T
            yield Tile(rows, columns, inside, other)


def _inside(
    squares: np.ndarray, centred: np.ndarray, ball_radii: np.ndarray, centres: np.ndarray, points: np.ndarray
) -> np.ndarray:
    """Whether points lie in open balls, shape `(balls, points)`; what rounding could decide is measured again."""
    norms = np.linalg.norm(centred.astype(np.float64), axis=1)
    error = _rounding(centred.shape[1]) * (norms**2 + (norms + ball_radii) ** 2)
    inside = squares < (ball_radii**2)[:, None]
    low, high = ((ball_radii**2 + sign * error).astype(np.float32)[:, None] for sign in (-1, 1))
    balls, found = np.nonzero((squares >= low) & (squares <= high))
    step = max(1, EXACT_BYTES // (8 * centred.shape[1]))
    for part in blocks(len(balls), step):
        ball, point = balls[part], found[part]
        exact = np.sqrt(_square_distances(points[point], centres[ball].astype(np.float64)))
        inside[ball, point] = exact < ball_radii[ball]
    return inside


def _centred(features: np.ndarray, centre: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(features - centre, dtype=np.float32)


def _square_distances(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared distances, row by row, of shapes `(n, d)` and `(n, d)` or `(d,)`, in float64."""
    difference = features - others
    return np.einsum("nd,nd->n", difference, difference)


def _smallest(squares: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((rows, squares), axis=1)[:, :count]
    return np.take_along_axis(squares, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _rounding(dimensions: int) -> float:
    """Bound on the error of a float32 squared distance, relative to the sum of both squared norms.

    Twice the classical bound of an inner product of that length (Higham 2002, section 3.1), which also covers the
    conversion to float32.
    """
    return 2 * (dimensions + 8) * FLOAT32_STEP
