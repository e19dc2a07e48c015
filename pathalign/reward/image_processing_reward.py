"""What an image goes through before the reward model: RGB, [-1, 1], resize, all PIL and torch. Travels with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature


def resize(pixel_values: Tensor, image_size_px: int) -> Tensor:
    """Resize `(n, 3, height, width)` to square `image_size_px`, antialiased bilinear; differentiable, stays in [-1, 1].

    Images of that size come back untouched, so resizing twice is resizing once.
    """
    if pixel_values.shape[-2:] == (image_size_px, image_size_px):
        return pixel_values
    return torch.nn.functional.interpolate(
        pixel_values, size=(image_size_px, image_size_px), mode="bilinear", align_corners=False, antialias=True
    )


def load_image(image: Image.Image | np.ndarray | str | Path) -> Image.Image:
    """A PIL image from one, from a file, or from a uint8 array `(height, width, 3)` or `(height, width)`.

    Raises:
        ValueError: If it is something else, such as an address: nothing is fetched here.
        OSError: If a file cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (3,)):
        return Image.fromarray(image)
    if isinstance(image, (str, Path)):
        if "://" in str(image):
            raise ValueError(f"{str(image)!r} is an address; fetch it first, and give the file or a PIL image.")
        with Image.open(image) as opened:
            opened.load()
            return opened
    found = f"{image.dtype} array {tuple(image.shape)}" if hasattr(image, "dtype") else type(image).__name__
    raise ValueError(f"An image is given as {found}; give a PIL image, a file, or a uint8 array (height, width, 3).")


def paired(images: Any, class_labels: str | Sequence[str]) -> list[tuple[Any, str]]:
    """Each image with its class: one name for all images, or one for each.

    Raises:
        ValueError: If there are more or fewer names than images.
    """
    alone = isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim < 4)
    images = [images] if alone else list(images)
    labels = [class_labels] * len(images) if isinstance(class_labels, str) else list(class_labels)
    if len(labels) != len(images):
        raise ValueError(f"There are {len(labels)} class labels for {len(images)} images; give one for each.")
    return list(zip(images, labels, strict=True))


class RewardImageProcessor(BaseImageProcessor):
    """Turns PIL images into `pixel_values` of shape `(n, 3, image_size_px, image_size_px)`, float32 in [-1, 1].

    The same torch function resizes here and in `RewardModel`, so both paths give the same rewards.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size_px: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size_px = image_size_px

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = "pt", **_: Any
    ) -> BatchFeature:
        """Process one image or several.

        Raises:
            ValueError: If an image has more than 8 bits a channel, which RGB conversion would clip to white.
        """
        images = [images] if isinstance(images, Image.Image) else list(images)
        deep = sorted({image.mode for image in images if image.mode.startswith(("I", "F"))})
        if deep:
            raise ValueError(f"Images of mode {deep} have more than 8 bits a channel; scale them to 0..255 first.")
        arrays = [np.asarray(image.convert("RGB")) for image in images]
        pixels = [torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 127.5 - 1 for array in arrays]
        batch = torch.cat([resize(image[None], self.image_size_px) for image in pixels])
        return BatchFeature({"pixel_values": batch}, tensor_type=return_tensors)
