"""Images for the example study: drawn phantoms, sound and malformed ones, made in place without a network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pathalign import phantom
from pathalign.grading.corruptions import corrupt
from pathalign.images import ImageSet, to_images, to_pixel_values

CANDIDATES, REFERENCES = "example/candidates", "example/references"
IMAGE_SIZE_PX = 128
SEED = 3


def make_images(folder: Path, per_class: int = 24, image_size_px: int = IMAGE_SIZE_PX) -> None:
    """Draw what the example study grades and compares with, below `folder`; what is there already stays.

    Args:
        folder: Where the study's YAML file stands.
        per_class: Candidates of each class; every second one is malformed.
        image_size_px: Width and height.
    """
    if not (folder / REFERENCES).is_dir():
        phantom.draw(16, image_size_px, seed=SEED + 1).save(folder / REFERENCES)
    if not (folder / CANDIDATES).is_dir():
        _half_malformed(phantom.draw(per_class, image_size_px, seed=SEED)).save(folder / CANDIDATES)


def _half_malformed(cells: ImageSet) -> ImageSet:
    odd = torch.arange(1, len(cells), 2)
    generator = torch.Generator().manual_seed(SEED)
    values = cells.pixel_values()[odd]
    partners = to_pixel_values(cells.images[odd - 1])
    images = cells.images.clone()
    images[odd] = to_images(corrupt(values, partners, generator))
    changed = ImageSet.build(images, cells.class_ids, cells.class_names)
    return replace(changed, columns={"drawn": ["malformed" if row % 2 else "sound" for row in range(len(cells))]})
