"""FLOPs and activations of networks, counted by running them on one image.

A multiplication and an addition count as two FLOPs. On torch's meta device nothing is computed, without any weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from pathalign.diffusion import lora


@dataclass(frozen=True)
class Profile:
    """One image through a network.

    Attributes:
        parameters: Of the network, without adapter.
        forward_flops: Of a forward pass.
        backward_flops: Of a forward and a backward pass.
        saved_bytes: What a forward pass keeps for the backward pass in float32, parameters aside.
    """

    parameters: int
    forward_flops: int
    backward_flops: int
    saved_bytes: int


class SavedTensors(TorchFunctionMode):
    """Sizes of what is kept for the backward pass while it is on, the parameters of a network aside.

    Attention counts as kernels that keep its inputs and output only: the meta device falls back on one that keeps its
    probabilities, which no training on a GPU does.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self.kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no storage gets the place of another
        self.inside_attention = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.inside_attention = True
        output = func(*args, **(kwargs or {}))
        self.inside_attention = False
        for tensor in (*args[:3], output):
            self.note(tensor)
        return output

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor's storage, once."""
        place = tensor.untyped_storage()._cdata
        if place not in self.parameters and not self.inside_attention:
            self.kept[place] = tensor
        return tensor

    @property
    def total_bytes(self) -> int:
        """Their sum."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def profile(run: Callable[[], Tensor], network: nn.Module, parameters: int) -> Profile:
    """Count a forward and a backward pass of `run`, which asks `network` for one image."""
    saved = SavedTensors(network)
    with FlopCounterMode(display=False) as forward, saved, saved_tensors_hooks(saved.note, lambda tensor: tensor):
        output = run()
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    flops = forward.get_total_flops()
    return Profile(parameters, flops, flops + backward.get_total_flops(), saved.total_bytes)


def profile_unet(unet: UNet2DConditionModel) -> Profile:
    """Count one image through a UNet with its adapter attached."""
    inputs = unet_inputs(unet, 1)
    own = unet.num_parameters() - sum(parameter.numel() for parameter in lora.parameters(unet).values())
    return profile(lambda: unet(**inputs).sample, unet, own)


def unet_inputs(unet: UNet2DConditionModel, count: int) -> dict[str, Any]:
    """Inputs of the UNet for `count` images, on its device."""
    settings, device = unet.config, unet.device
    inputs: dict[str, Any] = {
        "sample": torch.zeros(count, settings.in_channels, settings.sample_size, settings.sample_size, device=device),
        "timestep": torch.zeros(count, dtype=torch.int64, device=device),
        "encoder_hidden_states": None,
    }
    if settings.num_class_embeds is not None:
        return {**inputs, "class_labels": torch.zeros(count, dtype=torch.int64, device=device)}
    tokens = 77  # of CLIP
    return {**inputs, "encoder_hidden_states": torch.zeros(count, tokens, settings.cross_attention_dim, device=device)}
