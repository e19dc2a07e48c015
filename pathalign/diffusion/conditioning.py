"""Labels in, keyword arguments of the UNet out: trainers see this one interface, whatever the base model is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pathalign.diffusion.pipeline import ClassConditionalPipeline


class Conditioning(Protocol):
    """What a trainer knows of a base model beside its UNet and its noise schedule.

    Attributes:
        class_names: Class names in the order of their ids.
        sample_shape: Channels, height and width of what the UNet denoises: pixels or latents.
    """

    class_names: list[str]
    sample_shape: tuple[int, int, int]

    def __call__(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """Keyword arguments of the UNet for images of these classes, shape `(n,)`, int64."""

    def unconditional(self, count: int) -> dict[str, Tensor | None]:
        """The same for `count` images of no class, for classifier-free guidance."""

    def decode(self, sample: Tensor) -> Tensor:
        """What the UNet denoised, `(n, *sample_shape)`, to pixel values `(n, 3, h, w)` near [-1, 1]; differentiable."""

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pixel values in [-1, 1] to what the UNet denoises; no gradient."""


class ClassConditioning:
    """A class-conditional UNet in pixel space, without text."""

    def __init__(self, pipeline: ClassConditionalPipeline) -> None:
        self.unet = pipeline.unet
        config = pipeline.unet.config
        self.class_names = pipeline.class_names
        self.sample_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.no_class_id = config.num_class_embeds - 1

    def __call__(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """Keyword arguments of the UNet for images of these classes, shape `(n,)`, int64."""
        return {"encoder_hidden_states": None, "class_labels": class_ids}

    def unconditional(self, count: int) -> dict[str, Tensor | None]:
        """The same for `count` images of no class."""
        return self(torch.full((count,), self.no_class_id, device=self.unet.device))

    def decode(self, sample: Tensor) -> Tensor:
        """Pixels are what this UNet denoises."""
        return sample

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pixels are what this UNet denoises."""
        return pixel_values
