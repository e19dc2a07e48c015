"""A phantom smear: drawn blood leukocytes whose morphology is known, for machines with no data and no network.

As in medical imaging, a phantom is an object with known ground truth. It serves demos and tests, and never stands for a
result on real cells.

The cells look stained with May-Gruenwald-Giemsa: five classes of leukocyte, centred, with red cells and platelets
behind. Each image carries the eleven attributes of the WBCAtt data set (Tsutsui, Pang, Wen, arXiv:2306.13531) in its
spelling; they are sampled first, and the drawing follows them. Lengths are in units of half the image's width (1 is
about 10 micrometres), so that one seed shows the same scene at every image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pathalign.images import ImageSet
from pathalign.schema import InputError

Array = NDArray[Any]  # float32: the name keeps signatures short
Values = NDArray[np.str_]

CLASS_NAMES = ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")
# Shares within each class, in CLASS_NAMES order, rounded from the training split of PBC + WBCAtt; values of less than
# 1 % of a class are left out. Within a class the attributes are independent of each other here, unlike in real cells.
# fmt: off
FREQUENCIES: dict[str, dict[str, tuple[float, float, float, float, float]]] = {
    "cell_size": {"big": (0.26, 0.65, 0, 0.86, 0.57), "small": (0.74, 0.35, 1, 0.14, 0.43)},
    "cell_shape": {"irregular": (0.10, 0.09, 0.33, 0.57, 0.23), "round": (0.90, 0.91, 0.67, 0.43, 0.77)},
    "nucleus_shape": {
        "irregular": (0.41, 0, 0.03, 0.20, 0.01), "segmented-bilobed": (0.27, 0.71, 0, 0, 0.18),
        "segmented-multilobed": (0.21, 0.18, 0, 0, 0.12), "unsegmented-band": (0.07, 0.11, 0, 0, 0.69),
        "unsegmented-indented": (0.02, 0, 0.17, 0.74, 0), "unsegmented-round": (0.02, 0, 0.80, 0.06, 0),
    },
    "nuclear_cytoplasmic_ratio": {"high": (0, 0, 0.92, 0.09, 0), "low": (1, 1, 0.08, 0.91, 1)},
    "chromatin_density": {"densely": (1, 1, 0.98, 0.40, 0.98), "loosely": (0, 0, 0.02, 0.60, 0.02)},
    "cytoplasm_vacuole": {"no": (1, 1, 1, 0.54, 0.96), "yes": (0, 0, 0, 0.46, 0.04)},
    "cytoplasm_texture": {"clear": (1, 1, 0.37, 0.12, 1), "frosted": (0, 0, 0.63, 0.88, 0)},
    "cytoplasm_colour": {
        "blue": (0, 0, 0.62, 0.47, 0), "light blue": (1, 1, 0.04, 0.08, 1), "purple blue": (0, 0, 0.34, 0.45, 0),
    },
    "granule_type": {
        "coarse": (1, 0, 0, 0, 0), "nil": (0, 0, 1, 1, 0), "round": (0, 1, 0, 0, 0), "small": (0, 0, 0, 0, 1),
    },
    "granule_colour": {
        "nil": (0, 0, 1, 1, 0), "pink": (0, 0, 0, 0, 0.98), "purple": (1, 0, 0, 0, 0.02), "red": (0, 1, 0, 0, 0),
    },
    "granularity": {"no": (0, 0, 1, 1, 0), "yes": (1, 1, 0, 0, 1)},
}
# fmt: on
ATTRIBUTE_NAMES = tuple(FREQUENCIES)

CELL_RADIUS = {"small": (0.54, 0.63), "big": (0.69, 0.76)}
LOOKS = {  # scale of the cell, scale of the nucleus's lobes, colour of the nucleus
    "basophil": (0.98, 1.2, (76, 34, 124)),
    "eosinophil": (1.0, 1.1, (86, 44, 132)),
    "lymphocyte": (0.86, 1.0, (76, 38, 128)),
    "monocyte": (1.04, 1.1, (92, 46, 138)),
    "neutrophil": (1.0, 1.08, (70, 33, 126)),
}
# A nucleus is a chain of five lobes along an arc, in cell radii: places along it (two at one place are one lobe),
# the arc's radius and span (radians), size of the lobes, how much sizes and places vary, how thin the bridges are.
EVEN = (-0.5, -0.25, 0.0, 0.25, 0.5)
CHAINS: dict[str, list[tuple[tuple[float, ...], float, float, float, float, float, float]]] = {
    "irregular": [(EVEN, 0.34, 3.75, 0.35, 0.14, 0.42, 0)],
    "segmented-bilobed": [((-0.5, -0.28, 0.28, 0.5, 0.5), 0.49, 3.8, 0.285, 0.02, 0.06, 0.8)],
    "segmented-multilobed": [
        ((-0.5, 0, 0.5, 0.5, 0.5), 0.48, 4.8, 0.265, 0.05, 0.10, 0.8),
        ((-0.5, -0.17, 0.17, 0.5, 0.5), 0.48, 5.2, 0.235, 0.05, 0.10, 0.8),
        (EVEN, 0.49, 5.6, 0.21, 0.04, 0.08, 0.8),
    ],
    "unsegmented-band": [(EVEN, 0.49, 3.6, 0.225, 0.03, 0.04, 0.12)],
    "unsegmented-indented": [(EVEN, 0.39, 3.2, 0.395, 0.03, 0, 0)],
    "unsegmented-round": [(EVEN, 0.06, 3.0, 0.62, 0.03, 0, 0)],
}
CYTOPLASM_RGB = {"blue": (146, 146, 186), "light blue": (206, 192, 204), "purple blue": (174, 144, 182)}
GRANULE_RGB = {"purple": (62, 28, 108), "red": (188, 92, 106), "pink": (170, 98, 148)}
# spacing, smallest and largest radius, share of places filled
GRANULES = {"coarse": (0.09, 0.036, 0.045, 0.96), "round": (0.08, 0.03, 0.04, 1.0), "small": (0.07, 0.006, 0.022, 0.75)}
HAZE = {"coarse": ((164, 102, 156), 0.75), "round": ((198, 142, 162), 0.9), "small": ((212, 160, 172), 0.6)}
BACKGROUND_RGB = (254, 230, 204)
PLATELET_RGB, VACUOLE_RGB = (142, 84, 152), (246, 226, 220)
RED_CELL_OD = (0.26, 0.38, 0.22)  # optical density of a red cell's rim: (196, 157, 164) on the background above
RED_CELLS, PLATELETS, VACUOLES, LOBES = 10, 2, 7, 5
SUPERSAMPLING = 2
PIXELS_AT_ONCE = 2**16  # keeps the arrays of one batch within a processor's cache


def draw(count_per_class: int, image_size_px: int = 32, seed: int = 0) -> ImageSet:
    """Draw leukocytes with known morphology: a phantom for demos and tests, no evidence about real cells.

    Args:
        count_per_class: Images of each of the five classes, at least 1.
        image_size_px: Width and height, 8 to 1024. One seed shows the same cells at every size.
        seed: Not negative. Image i of a class depends on seed, class and i only: a longer draw begins with the shorter.

    Returns:
        `5 * count_per_class` images ordered by class as in `CLASS_NAMES`, shape `(n, 3, image_size_px, image_size_px)`,
        with the columns `ATTRIBUTE_NAMES`: the truth that each drawing follows.

    Raises:
        InputError: If a number is outside its range.
    """
    for name, value, low, high in (
        ("count_per_class", count_per_class, 1, 10**6),
        ("image_size_px", image_size_px, 8, 1024),
        ("seed", seed, 0, 2**63),
    ):
        if not low <= value <= high:
            raise InputError(f"The phantom's `{name}` is {value}; give a whole number from {low} to {high}.")
    canvas, slide = Canvas(image_size_px), Canvas(image_size_px, supersampling=1)
    at_once = max(1, PIXELS_AT_ONCE // canvas.x.size)
    batches: list[NDArray[np.uint8]] = []
    columns: dict[str, list[str]] = {name: [] for name in ATTRIBUTE_NAMES}
    for class_id, class_name in enumerate(CLASS_NAMES):
        for start in range(0, count_per_class, at_once):
            dice = Dice(seed, class_id, range(start, min(start + at_once, count_per_class)))
            attributes = _sample_attributes(class_id, dice)
            batches.append(_draw_batch(class_name, attributes, dice, canvas, slide))
            for name, values in attributes.items():
                columns[name].extend(values.tolist())
    class_ids = torch.arange(len(CLASS_NAMES)).repeat_interleave(count_per_class)
    return ImageSet.build(torch.from_numpy(np.concatenate(batches)), class_ids, CLASS_NAMES, dict(columns))


class Dice:
    """Random numbers of a batch: each image has its own stream, and batches of one class use it in the same order."""

    def __init__(self, seed: int, class_id: int, indices: Sequence[int]) -> None:
        self._streams = [np.random.default_rng((seed, class_id, index)) for index in indices]

    def uniform(self, low: float, high: float, *shape: int) -> Array:
        """Shape `(n, *shape)`, between `low` and `high`."""
        return low + (high - low) * np.stack([stream.random(shape, dtype=np.float32) for stream in self._streams])

    def normal(self, *shape: int) -> Array:
        """Shape `(n, *shape)`, mean 0 and standard deviation 1."""
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in self._streams])

    def choose(self, shares: Sequence[float]) -> NDArray[np.intp]:
        """Shape `(n,)`: indices into `shares`, drawn in these proportions."""
        limits = np.cumsum(shares) / sum(shares)
        return np.minimum(np.searchsorted(limits, self.uniform(0, 1), side="right"), len(limits) - 1)


class Canvas:
    """The grid of fine pixels that images are drawn on, and the way back to the pixels asked for.

    Attributes:
        x: Shape `(pixels,)`, to the right, -1 at the left border and 1 at the right one.
        y: Shape `(pixels,)`, downwards.
        edge: Width over which an outline fades, so that it has no steps.
    """

    def __init__(self, image_size_px: int, supersampling: int = SUPERSAMPLING) -> None:
        self.size, self.fine = image_size_px, image_size_px * supersampling
        self.axis = ((np.arange(self.fine) + 0.5) * 2 / self.fine - 1).astype(np.float32)
        self.x, self.y = np.tile(self.axis, self.fine), np.repeat(self.axis, self.fine)
        self.edge = 3.0 / self.fine
        self._spline = lru_cache(maxsize=None)(self._spline_weights)

    def cover(self, distance: Array, softness: float | Array = 0.0) -> Array:
        """Share of each pixel that a shape covers, from the signed distance to its outline (negative inside)."""
        return np.clip(0.5 - distance / (self.edge + softness), 0, 1)

    def texture(self, dice: Dice, spacing: float) -> Array:
        """Smooth noise whose bumps lie about `spacing` apart: shape `(n, pixels)`, standard deviation about 1."""
        weights = self._spline(spacing)
        knots = dice.normal(weights.shape[1], weights.shape[1])
        return (weights @ knots @ weights.T).reshape(len(knots), -1)

    def _spline_weights(self, spacing: float) -> Array:
        knots = np.arange(-1 - 2 * spacing, 1 + 2 * spacing, spacing)
        t = np.abs(self.axis[:, None] - knots) / spacing
        weights = np.where(t < 1, 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6)
        return (weights / np.sqrt(151 / 315)).astype(np.float32)  # a cubic B-spline's mean sum of squared weights

    @cached_property
    def blur(self) -> tuple[Array, Array]:
        """Two ways from a fine line to a line of the image, shape `(size, fine)`: sharp, and a little out of focus."""
        sharp = np.repeat(np.eye(self.size), SUPERSAMPLING, axis=1) / SUPERSAMPLING
        spread = np.exp(-(((self.axis[:, None] - self.axis) / 0.045) ** 2) / 2)
        return sharp.astype(np.float32), (sharp @ (spread / spread.sum(1, keepdims=True))).astype(np.float32)


def _sample_attributes(class_id: int, dice: Dice) -> dict[str, Values]:
    chosen = {name: dice.choose([shares[class_id] for shares in table.values()]) for name, table in FREQUENCIES.items()}
    return {name: np.array(list(FREQUENCIES[name]))[index] for name, index in chosen.items()}


def _draw_batch(class_name: str, attributes: dict[str, Values], dice: Dice, canvas: Canvas, slide: Canvas) -> Array:
    """Images of one class, shape `(n, 3, size, size)`, uint8: from the slide upwards, layer on layer.

    The background is out of focus and costs most, so it is drawn on `slide`, which is not supersampled.
    """
    cell_scale, lobe_scale, nucleus_rgb = LOOKS[class_name]
    radius = np.stack([dice.uniform(*CELL_RADIUS[size]) for size in ("small", "big")], axis=1)
    radius = np.where(attributes["cell_size"] == "big", radius[:, 1], radius[:, 0])[:, None] * cell_scale
    middle = dice.uniform(-0.05, 0.05, 2, 1)
    x, y = canvas.x - middle[:, 0], canvas.y - middle[:, 1]
    warp = canvas.texture(dice, 0.33), canvas.texture(dice, 0.33)
    planes = _background(dice, slide).reshape(-1, 3, canvas.size, canvas.size)
    image = planes.repeat(SUPERSAMPLING, axis=2).repeat(SUPERSAMPLING, axis=3).reshape(len(planes), 3, -1)
    outline = _cell_outline(x, y, radius, attributes["cell_shape"], warp, dice)
    frosted = (attributes["cytoplasm_texture"] == "frosted")[:, None]
    cell = canvas.cover(outline, np.where(frosted, 0.05, 0.012).astype(np.float32))
    _paint(image, _cytoplasm(outline, attributes["cytoplasm_colour"], frosted, dice, canvas), cell)
    shape, high_ratio = attributes["nucleus_shape"], attributes["nuclear_cytoplasmic_ratio"] == "high"
    points, sizes, pinch = _nucleus_chain(shape, high_ratio, dice)
    bend = np.select([shape == "irregular", shape == "unsegmented-indented"], [0.07, 0.028], 0.018).astype(np.float32)
    bent_x, bent_y = x + bend[:, None] * warp[0], y + bend[:, None] * warp[1]
    nucleus = _nucleus_outline(bent_x, bent_y, points * radius[:, :, None], sizes * radius * lobe_scale, pinch)
    nucleus = np.maximum(nucleus, outline + 0.025)  # within the cell
    chromatin = _chromatin(nucleus_rgb, nucleus, attributes["chromatin_density"], dice, canvas)
    granule_type = attributes["granule_type"][0]  # each class has one
    free = 0.75 * np.clip(warp[0] - 1.2, 0, 1) if granule_type == "round" else 0.0
    if granule_type != "nil":
        haze, opacity = HAZE[granule_type]
        _paint(image, _rgb([haze]), opacity * cell * (1 - free))
    if granule_type in ("round", "small"):
        _granules(image, cell * (1 - free), attributes, dice, canvas)
    _paint(image, chromatin, canvas.cover(nucleus))
    if granule_type == "coarse":  # a basophil's granules hide its nucleus and stand out from its outline
        _granules(image, canvas.cover(outline - 0.03), attributes, dice, canvas)
    _vacuoles(image, x, y, radius, attributes["cytoplasm_vacuole"], dice, canvas)
    return _develop(image, dice, canvas)


def _paint(image: Array, colour: Array, alpha: Array) -> None:
    """Lay `colour`, shape `(n, 3, pixels or 1)`, on `image` where `alpha`, shape `(n, pixels)`, says so."""
    image += (colour - image) * alpha[:, None]


def _rgb(colours: Sequence[tuple[float, float, float]]) -> Array:
    return np.array(colours, dtype=np.float32)[:, :, None]


def _background(dice: Dice, canvas: Canvas) -> Array:
    """Cream slide with red cells and platelets around the middle: nothing here depends on the cell or its class."""
    uneven = canvas.texture(dice, 0.33)
    thickness = _red_cell_thickness(uneven, dice, canvas)
    light = np.exp(-thickness[:, None] * _rgb([RED_CELL_OD]) * dice.uniform(0.8, 1.15, 1, 1))
    image = light * _rgb([BACKGROUND_RGB]) * (1 + 0.006 * uneven[:, None])
    middle = _polar(dice.uniform(0.85, 1.3, PLATELETS), dice.uniform(0, 2 * np.pi, PLATELETS))
    size, present = dice.uniform(0.05, 0.1, PLATELETS), dice.uniform(0, 1, PLATELETS) < 0.2
    for k in range(PLATELETS):
        away = np.hypot(canvas.x - middle[:, k, :1], canvas.y - middle[:, k, 1:])
        cover = canvas.cover(away - size[:, k, None] * (1 + 0.15 * uneven), 0.05)
        _paint(image, _rgb([PLATELET_RGB]), 0.85 * cover * present[:, k, None])
    return image


def _red_cell_thickness(uneven: Array, dice: Dice, canvas: Canvas) -> Array:
    """How much red cell the light passes at each pixel, shape `(n, pixels)`: 1 at a rim, less in the pale middle."""
    clear = dice.uniform(0.5, 0.78, 1)  # radius kept free, drawn for any cell alike: the background tells no class
    angle = (np.arange(RED_CELLS, dtype=np.float32) + dice.uniform(0, 1, RED_CELLS)) * (2 * np.pi / 7.3)
    size = dice.uniform(0.29, 0.37, RED_CELLS)
    middle = _polar(clear + size + dice.uniform(0, 0.65, RED_CELLS), angle)
    stretch, tilt = dice.uniform(0, 0.16, RED_CELLS), dice.uniform(0, np.pi, RED_CELLS)
    pallor = dice.uniform(0.1, 0.85, RED_CELLS) * (dice.uniform(0, 1, RED_CELLS) < 0.75)
    present = dice.uniform(0, 1, RED_CELLS) < 0.88
    long, short = _polar(1 / (size * (1 + stretch)), tilt), _polar(1 / (size * (1 - stretch)), tilt)
    thickness = np.zeros_like(uneven)
    for k in range(RED_CELLS):
        x, y = canvas.x - middle[:, k, :1], canvas.y - middle[:, k, 1:]
        square = (x * long[:, k, :1] + y * long[:, k, 1:]) ** 2 + (y * short[:, k, :1] - x * short[:, k, 1:]) ** 2
        body = canvas.cover((square - 1 + 0.06 * uneven) * size[:, k, None] / 2, 0.02)
        disc = (0.8 + 0.2 * square) - pallor[:, k, None] / (1 + (square * 6.5) ** 2)
        thickness += body * disc * present[:, k, None]
    return np.minimum(thickness, 1 + 0.25 * (thickness - 1))  # overlapping cells stain a little darker only


def _polar(away: Array, angle: Array) -> Array:
    """Points at distance `away` from the middle, shape `(..., 2)`."""
    return np.stack([away * np.cos(angle), away * np.sin(angle)], axis=-1)


def _cell_outline(x: Array, y: Array, radius: Array, shape: Values, warp: tuple[Array, Array], dice: Dice) -> Array:
    """Signed distance to the cell membrane, shape `(n, pixels)`: a circle with waves of 2 to 5 periods around it."""
    irregular = (shape == "irregular")[:, None]
    away = np.hypot(x, y) + 1e-6
    cos, sin = x / away, y / away
    wave_cos, wave_sin = cos, sin
    swell = np.zeros_like(away)
    for limit in (0.10, 0.08, 0.06, 0.04):
        wave_cos, wave_sin = wave_cos * cos - wave_sin * sin, wave_sin * cos + wave_cos * sin
        size = dice.uniform(-limit, limit, 2) * np.where(irregular, 1, 0.3).astype(np.float32)
        swell += size[:, :1] * wave_cos + size[:, 1:] * wave_sin
    rough = np.where(irregular, 0.022, 0.005).astype(np.float32)
    return away - radius * (1 + swell) + rough * warp[0]


def _cytoplasm(outline: Array, names: Values, frosted: Array, dice: Dice, canvas: Canvas) -> Array:
    """Colour of the cytoplasm, shape `(n, 3, pixels)`: bluer at the rim; ground glass where frosted."""
    colour = _rgb([CYTOPLASM_RGB[name] for name in names])
    grain = canvas.texture(dice, 0.045) * np.where(frosted, 0.075, 0.012).astype(np.float32)
    rim = np.clip(1 + outline / 0.16, 0, 1) * 0.09
    return colour * (1 + (grain - rim)[:, None] * np.array([[[1.0], [1.0], [0.5]]], dtype=np.float32))


def _nucleus_outline(x: Array, y: Array, points: Array, sizes: Array, pinch: Array) -> Array:
    """Signed distance to the nucleus: a chain of five lobes, melted together or held by thin bridges."""
    joined = np.full_like(x, 9)
    for k in range(LOBES - 1):  # two lobes and the bridge between them at a time
        px, py = x - points[:, k, :1], y - points[:, k, 1:]
        bx, by = np.diff(points[:, k : k + 2], axis=1)[:, 0].T[:, :, None]
        along = np.clip((px * bx + py * by) / (bx * bx + by * by + 1e-6), 0, 1)
        width = sizes[:, k : k + 1] * (1 - along) + sizes[:, k + 1 : k + 2] * along
        waist = (4 * along * (1 - along)) ** 3 * pinch[:, k : k + 1]
        part = np.hypot(px - along * bx, py - along * by) - width * (1 - waist)
        blend = np.clip(0.04 - np.abs(joined - part), 0, None)  # smooth minimum: lobes melt where they touch
        joined = np.minimum(joined, part) - blend * blend * (0.25 / 0.04)
    return joined


def _nucleus_chain(shape: Values, high_ratio: NDArray[np.bool_], dice: Dice) -> tuple[Array, Array, Array]:
    """Lobe centres `(n, 5, 2)` and sizes `(n, 5)` in cell radii, and how far each bridge is pinched, `(n, 4)`."""
    which = dice.choose((0.5, 0.35, 0.15))  # of three, four or five lobes
    chains = [CHAINS[kind][min(index, len(CHAINS[kind]) - 1)] for kind, index in zip(shape, which, strict=True)]
    places = np.array([chain[0] for chain in chains], np.float32)
    arc, span, size, uneven, scatter, pinched = np.array([chain[1:] for chain in chains], np.float32).T[:, :, None]
    gaps = np.diff(places, axis=1)
    angle = places * span * dice.uniform(0.75, 1.25, 1)
    points = _polar(arc * dice.uniform(0.9, 1.1, 1), angle)
    points[..., 0] -= 0.8 * points[..., 0].mean(axis=1, keepdims=True)  # the bulk of the arc lies in the middle
    points += scatter[:, :, None] * dice.uniform(-0.5, 0.5, LOBES, 2)
    points[:, 1:] = np.where(gaps[:, :, None] > 0, points[:, 1:], points[:, :-1])
    sizes = size * dice.uniform(0.93, 1.07, 1) + uneven * dice.uniform(-0.5, 0.5, LOBES)
    pinch = np.where(gaps > 0.23, pinched * dice.uniform(0.88, 1.12, LOBES - 1), 0)  # nearer lobes are one long lobe
    turn = dice.uniform(0, 2 * np.pi)
    rotation = np.stack([np.cos(turn), np.sin(turn), -np.sin(turn), np.cos(turn)], axis=1).reshape(-1, 2, 2)
    scale = np.where(high_ratio, 1.29, 0.98)[:, None].astype(np.float32)
    aside = dice.uniform(-1, 1, 1, 2) * np.where(high_ratio, 0.05, 0.14)[:, None, None].astype(np.float32)
    return points * scale[:, :, None] @ rotation + aside, sizes * scale, pinch


def _chromatin(rgb: tuple[int, int, int], nucleus: Array, density: Values, dice: Dice, canvas: Canvas) -> Array:
    """Colour of the nucleus, shape `(n, 3, pixels)`: clumped and dark where dense, a lighter lace where loose."""
    loose = (density == "loosely")[:, None]
    clump = canvas.texture(dice, 0.06)
    lace = 0.9 - 1.5 * np.abs(canvas.texture(dice, 0.075))  # dark threads where the noise crosses zero
    membrane = np.clip(1 - np.abs(nucleus + 0.025) / 0.035, 0, 1)
    dark = np.where(loose, 0.17 * lace - 0.18, 0.16 * lace + 0.04 * clump) + 0.16 * membrane
    colour = _rgb([rgb]) * (1 - dark[:, None] * np.array([[[1.0], [1.1], [0.5]]], np.float32))
    specks = np.where(loose, 0.14, 0.34) * np.clip(clump - 1.1, 0, 1)
    return colour + (_rgb([(176, 120, 186)]) - colour) * specks[:, None].astype(np.float32)


def _granules(image: Array, within: Array, attributes: dict[str, Values], dice: Dice, canvas: Canvas) -> None:
    """Paint granules `within` the cell: one anywhere in each square of a grid, so that they never align."""
    spacing, smallest, largest, filled = GRANULES[attributes["granule_type"][0]]
    tint = _rgb([GRANULE_RGB[value] for value in attributes["granule_colour"]])
    squares = int(np.ceil(2 / spacing)) + 2
    place_x, place_y = dice.uniform(0, 1, squares * squares), dice.uniform(0, 1, squares * squares)
    size = dice.uniform(smallest, largest, squares * squares) / spacing
    size = np.where(dice.uniform(0, 1, squares * squares) < filled, size, -1)
    column, row = (canvas.x + 1) / spacing + 1, (canvas.y + 1) / spacing + 1
    depth = np.full_like(within, -1)
    # granules are smaller than half a square: the four nearest squares are all that can reach a pixel
    for left in (-1, 0):
        for above in (-1, 0):
            i, j = np.rint(column).astype(int) + left, np.rint(row).astype(int) + above
            square = j * squares + i
            distance = np.hypot(column - i - place_x.take(square, 1), row - j - place_y.take(square, 1))
            np.maximum(depth, size.take(square, 1) - distance, out=depth)
    _paint(image, tint, 0.8 * canvas.cover(-depth * spacing, 0.01) * within)


def _vacuoles(image: Array, x: Array, y: Array, radius: Array, present: Values, dice: Dice, canvas: Canvas) -> None:
    """Paint pale bubbles near the membrane of the images that have them."""
    angle = dice.uniform(0, 2 * np.pi, 1) + dice.uniform(-1.3, 1.3, VACUOLES)
    middle = _polar(dice.uniform(0.70, 0.88, VACUOLES) * radius, angle)
    size = dice.uniform(0.04, 0.10, VACUOLES)
    rows = np.flatnonzero(present == "yes")
    distance = np.full((len(rows), x.shape[1]), 1, np.float32)
    for k in range(VACUOLES):
        away = np.hypot(x[rows] - middle[rows, k, :1], y[rows] - middle[rows, k, 1:])
        np.minimum(distance, away - size[rows, k, None], out=distance)
    layer = image[rows]
    _paint(layer, _rgb([VACUOLE_RGB]), 0.9 * canvas.cover(distance, 0.02))
    image[rows] = layer


def _develop(image: Array, dice: Dice, canvas: Canvas) -> NDArray[np.uint8]:
    """Focus, stain strength, white balance and sensor noise; from fine pixels to bytes, shape `(n, 3, size, size)`."""
    planes = image.reshape(len(image), 3, canvas.fine, canvas.fine)
    sharp, blurred = (way @ planes @ way.T for way in canvas.blur)
    focus = dice.uniform(0, 0.5, 1, 1, 1) ** 2
    picture = np.clip(sharp + (blurred - sharp) * focus, 1, None) / 255
    stain = 1 + 0.07 * dice.normal(1, 1, 1) + 0.025 * dice.normal(3, 1, 1)
    light = 1 + 0.008 * dice.normal(1, 1, 1) + 0.005 * dice.normal(3, 1, 1)
    picture = np.exp(np.log(picture) * stain) * light
    noisy = picture * 255 + 1.8 * dice.normal(3, canvas.size, canvas.size)
    return np.rint(np.clip(noisy, 0, 255)).astype(np.uint8)
