"""What a trainer asks of its UNet, counted at the UNet itself, and what share of a GPU's peak that is."""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import UNet2DConditionModel
from torch import Tensor

from pathalign.diffusion import lora
from pathalign.diffusion.flops import Profile, profile_unet
from pathalign.schema import peak_rss_mb
from pathalign.settings.adapter import AdapterConfig
from pathalign.trainers import gpus


class Usage:
    """Counts the images that go through a UNet, by whoever calls it, from the last `start` on.

    Args:
        unet: With an adapter attached as `config` says.
        config: Of the trainer.
        device: Where it runs.

    Attributes:
        forwards: Images that went forward: twice under guidance, and again where activations are computed again.
        backwards: Those of them that a gradient came back to.
    """

    def __init__(self, unet: UNet2DConditionModel, config: AdapterConfig, device: torch.device) -> None:
        self.unet, self.config, self.device = unet, config, device
        # Not compiled along: a count is no part of the graph. Before the forward pass, since one that is made again for
        # its activations alone ends as soon as it has them.
        unet.register_forward_pre_hook(torch.compiler.disable(self._count_forward), with_kwargs=True)
        unet.register_forward_hook(torch.compiler.disable(self._watch_gradient))
        self.start()

    def start(self) -> None:
        """Count from here."""
        self.forwards = self.backwards = 0
        self.started = time.monotonic()

    def figures(self, images: int) -> dict[str, float]:
        """What there is to log since `start`, of all processes together.

        Args:
            images: That were learned from.

        Returns:
            `images_per_second`, `unet_forwards`, `unet_backwards`, `unet_flops`; on a GPU in `gpus.GPUS` its
            `share_of_peak`; and `peak_memory_mb`, the most so far in this process: of the GPU, or resident.
        """
        elapsed_s = time.monotonic() - self.started
        counts = gather_object([(self.forwards, self.backwards)])
        forwards, backwards = (sum(column) for column in zip(*counts, strict=True))
        passes = self.profile
        flops = forwards * passes.forward_flops + backwards * (passes.backward_flops - passes.forward_flops)
        on_cpu = self.device.type == "cpu"
        found = {
            "images_per_second": images / elapsed_s,
            "unet_forwards": forwards,
            "unet_backwards": backwards,
            "unet_flops": flops,
            "peak_memory_mb": peak_rss_mb() if on_cpu else torch.accelerator.max_memory_allocated() / 2**20,
        }
        gpu = gpus.named(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        peak = gpu.peak_tflops(self.config.mixed_precision) if gpu else None
        return found if peak is None else {**found, "share_of_peak": flops / elapsed_s / len(counts) / (peak * 1e12)}

    @cached_property
    def profile(self) -> Profile:
        """FLOPs of one image through a UNet of the same shape."""
        config = self.config
        with torch.device("meta"):
            twin = UNet2DConditionModel.from_config(self.unet.config)
        lora.attach(twin, config.lora_rank, config.lora_alpha, config.lora_convolutions, torch.Generator())
        return profile_unet(twin)

    def _count_forward(self, unet: UNet2DConditionModel, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> None:
        self.forwards += len(inputs[0] if inputs else named["sample"])

    def _watch_gradient(self, unet: UNet2DConditionModel, inputs: tuple[Tensor, ...], output: Any) -> None:
        if output[0].requires_grad:
            output[0].register_hook(self._count_backward)

    def _count_backward(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)
