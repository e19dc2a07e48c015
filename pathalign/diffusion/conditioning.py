"""Labels in, keyword arguments of the UNet out: trainers see this one interface, whatever the base model is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pathalign.diffusion.loading import BaseModel
from pathalign.diffusion.pipeline import ClassConditionalPipeline, general_ids, no_class_id
from pathalign.diffusion.prompted import PromptPipeline


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

    def unconditional(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """What classifier-free guidance moves away from for these classes, of the same form."""

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

    @property
    def no_class_id(self) -> int:
        """Id that stands for "no class"."""
        return no_class_id(self.unet)

    def __call__(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """Keyword arguments of the UNet for images of these classes, shape `(n,)`, int64."""
        return {"encoder_hidden_states": None, "class_labels": class_ids}

    def unconditional(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """The same for "no class", and for the parents of concepts."""
        return self(general_ids(self.unet, class_ids))

    def decode(self, sample: Tensor) -> Tensor:
        """Pixels are what this UNet denoises."""
        return sample

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pixels are what this UNet denoises."""
        return pixel_values


class PromptConditioning:
    """Stable Diffusion: a class is a prompt, no class is the empty prompt, and the UNet denoises a VAE's latents.

    The text is read once, here; the VAE is frozen and computes in float32, as `force_upcast` in its configuration asks.
    """

    def __init__(self, pipeline: PromptPipeline) -> None:
        self.vae = pipeline.vae.requires_grad_(False)
        self.class_names = pipeline.class_names
        size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
        self.sample_shape = (channels, size, size)
        with torch.no_grad():
            # Shape (classes + 1, tokens, width); the last row is the empty prompt.
            self.embeddings = pipeline.encode_prompt([*pipeline.prompts(), ""], pipeline.device, 1, False)[0]

    def __call__(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """Keyword arguments of the UNet for images of these classes, shape `(n,)`, int64."""
        return {"encoder_hidden_states": self.embeddings[class_ids.to(self.embeddings.device)]}

    def unconditional(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """The same for as many images of no class."""
        return {"encoder_hidden_states": self.embeddings[-1:].expand(len(class_ids), -1, -1)}

    def decode(self, sample: Tensor) -> Tensor:
        """Latents `(n, *sample_shape)` to pixel values `(n, 3, h, w)` near [-1, 1]; differentiable."""
        config = self.vae.config
        with torch.autocast(sample.device.type, enabled=False):
            latents = sample.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
            pixel_values: Tensor = self.vae.decode(latents).sample
        return pixel_values

    @torch.no_grad()
    def encode(self, pixel_values: Tensor) -> Tensor:
        """Pixel values in [-1, 1] to latents, the mode of the VAE's posterior: equal images give equal latents."""
        config = self.vae.config
        with torch.autocast(pixel_values.device.type, enabled=False):
            latents: Tensor = self.vae.encode(pixel_values.to(self.vae.dtype)).latent_dist.mode()
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor


def conditioning_for(pipeline: BaseModel) -> Conditioning:
    """The conditioning of a base model, on its device; Stable Diffusion must have been told its classes."""
    if isinstance(pipeline, PromptPipeline):
        return PromptConditioning(pipeline)
    return ClassConditioning(pipeline)
