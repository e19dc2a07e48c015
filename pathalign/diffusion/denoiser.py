"""A UNet as a sampler sees it, with its conditions, guidance and reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pathalign.diffusion import lora
from pathalign.diffusion.conditioning import Conditioning


class Denoiser:
    """A UNet as a sampler sees it: classes in, guided output out.

    Args:
        unet: With an adapter attached.
        conditioning: Class ids to its keyword arguments.
        guidance_scale: Classifier-free guidance (arXiv:2207.12598); 1 is none and costs half.
        checkpointing: Keep no activations for the backward pass but compute them again: one more forward pass for the
            memory of a single call.
        autocast: Makes the context of lower precision; outputs come back in the precision of the sample.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        checkpointing: bool = False,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.unet, self.conditioning, self.guidance_scale = unet, conditioning, guidance_scale
        self.checkpointing, self.autocast = checkpointing, autocast

    def __call__(self, sample: Tensor, timestep: Tensor, class_ids: Tensor) -> Tensor:
        """UNet output for noisy images `(n, *sample_shape)` at one timestep or at `(n,)`, of the same shape."""
        return self._run(self._guided, sample, timestep, class_ids, torch.is_grad_enabled())

    def reference(self, sample: Tensor, timestep: Tensor, class_ids: Tensor) -> Tensor:
        """The same with the adapter off; a gradient reaches `sample` only."""
        return self._run(self._unadapted, sample, timestep, class_ids, torch.is_grad_enabled() and sample.requires_grad)

    def _run(
        self, output: Callable[..., Tensor], sample: Tensor, timestep: Tensor, class_ids: Tensor, backward: bool
    ) -> Tensor:
        if backward and self.checkpointing:
            return checkpoint(output, sample, timestep, class_ids, use_reentrant=False)
        return output(sample, timestep, class_ids)

    def _unadapted(self, sample: Tensor, timestep: Tensor, class_ids: Tensor) -> Tensor:
        with lora.disabled(self.unet):
            return self._guided(sample, timestep, class_ids)

    def _guided(self, sample: Tensor, timestep: Tensor, class_ids: Tensor) -> Tensor:
        with self.autocast():
            conditional = self.unet(sample, timestep, **self.conditioning(class_ids)).sample
            if self.guidance_scale == 1.0:
                return conditional.to(sample.dtype)
            unconditional = self.unet(sample, timestep, **self.conditioning.unconditional(class_ids)).sample
        return (unconditional + self.guidance_scale * (conditional - unconditional)).to(sample.dtype)
