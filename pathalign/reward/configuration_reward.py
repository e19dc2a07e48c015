"""Configuration of the reward model. Travels with the weights, so it imports nothing of pathalign."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from transformers import PretrainedConfig


class RewardModelConfig(PretrainedConfig):
    """What a reward model is built from and how its rewards are calibrated.

    Attributes:
        class_names: Names of the image classes; class ids are positions in this list.
        criteria: Names of the checklist criteria, one head each.
        encoder: `convnet`, `densenet`, `efficientnet-lite0`, or the name of the transformers backbone it came from.
        backbone_config: Configuration of a transformers backbone, so that no second download is needed.
        image_size_px: Width and height that images are resized to first.
        image_mean: Channel means that a pretrained encoder expects, in units of 0..1.
        image_std: Channel standard deviations that a pretrained encoder expects, in units of 0..1.
        convnet_channels: Channels of the `convnet` at full, half, quarter and eighth resolution.
        freeze_encoder: Whether the encoder's weights are fixed.
        num_members: Networks (heads, on a pretrained encoder) whose logits are averaged.
        class_embedding_size: Dimensions of the class embedding.
        hidden_size: Units of the head's hidden layer.
        criteria_weight: Weight of the criteria in the loss.
        grading: Who gave the grades: fields of `cards.Grading`, None if not known.
        temperature: Logits are divided by it before the sigmoid; fitted on validation images.
    """

    model_type = "pathalign_reward"

    class_names: list[str] = field(default_factory=lambda: ["0", "1"])
    criteria: list[str] = field(default_factory=list)
    encoder: str = "convnet"
    backbone_config: dict[str, Any] | None = None
    image_size_px: int = 32
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    convnet_channels: list[int] = field(default_factory=lambda: [16, 40, 80, 160])
    freeze_encoder: bool = False
    num_members: int = 1
    class_embedding_size: int = 32
    hidden_size: int = 128
    criteria_weight: float = 0.3
    grading: dict[str, Any] | None = None
    temperature: float = 1.0
