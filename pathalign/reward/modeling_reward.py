"""The reward model R(x, c) = P(plausible | x, c) as a transformers model. Travels with its weights.

Source: Sun et al., arXiv:2306.12438, section 3, whose label is 1 for implausible; ours is 1 for plausible.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_reward import RewardModelConfig
from .encoders import FROM_SCRATCH, Encoder, EncoderSpec, load_weights
from .image_processing_reward import RewardImageProcessor, resize

try:
    from pathalign.schema import InputError
except ImportError:  # loaded by trust_remote_code where pathalign is not installed
    InputError = ValueError  # type: ignore[assignment, misc]


@dataclass
class RewardModelOutput(ModelOutput):
    """What `RewardModel.forward` returns.

    Attributes:
        loss: Scalar, if `labels` were given.
        logits: Shape `(n,)`, log-odds of plausible before calibration, mean over the members.
        rewards: Shape `(n,)`, float32 in 0..1, calibrated.
        criteria_logits: Shape `(n, len(criteria))`, log-odds that each criterion is met; None without criteria.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    rewards: Tensor | None = None
    criteria_logits: Tensor | None = None


def reward_loss(logits: Tensor, labels: Tensor, criteria_labels: Tensor | None, criteria_weight: float) -> Tensor:
    """Cross-entropy of plausibility plus `criteria_weight` times that of the criteria, each a mean.

    Args:
        logits: Shape `(..., n, 1 + criteria)`; column 0 is plausibility. Leading dimensions are members.
        labels: Shape `(n,)`, in 0..1.
        criteria_labels: Shape `(n, criteria)`, in 0..1; NaN where nobody judged the criterion.
        criteria_weight: At least 0.

    Returns:
        A scalar.
    """
    loss = functional.binary_cross_entropy_with_logits(logits[..., 0], labels.float().expand(logits.shape[:-1]))
    if criteria_labels is None or logits.shape[-1] == 1:
        return loss
    known = ~criteria_labels.isnan()
    targets = criteria_labels.nan_to_num().float().expand_as(logits[..., 1:])
    losses = functional.binary_cross_entropy_with_logits(logits[..., 1:], targets, reduction="none")
    members = losses.shape[:-2].numel()
    return loss + criteria_weight * (losses * known).sum() / (members * known.sum().clamp(min=1))


class RewardHead(nn.Module):
    """Features and class ids to logits `(n, 1 + criteria)`; the class scales and shifts the hidden layer (FiLM)."""

    def __init__(self, feature_size: int, config: RewardModelConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.project = nn.Linear(feature_size, config.hidden_size)
        self.class_embedding = nn.Embedding(len(config.class_names), config.class_embedding_size)
        self.film = nn.Linear(config.class_embedding_size, 2 * config.hidden_size)
        self.plausibility = nn.Linear(config.hidden_size, 1)
        self.criteria = nn.Linear(config.hidden_size, len(config.criteria)) if config.criteria else None

    def forward(self, features: Tensor, class_ids: Tensor) -> Tensor:
        """Shapes `(n, feature_size)` and `(n,)` to `(n, 1 + criteria)`."""
        scale, shift = self.film(self.class_embedding(class_ids)).chunk(2, dim=-1)
        hidden = functional.silu(self.project(self.norm(features)) * (1 + scale) + shift)
        heads = [self.plausibility(hidden)] + ([self.criteria(hidden)] if self.criteria is not None else [])
        return torch.cat(heads, dim=-1)


class RewardModel(PreTrainedModel):
    """Plausibility of an image as an image of a class.

    With `num_members` above 1 each member is a network of its own (`convnet`, `densenet`) or a head of its own on
    one pretrained encoder; their logits are averaged.
    """

    config_class = RewardModelConfig
    main_input_name = "pixel_values"
    config: RewardModelConfig

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        spec = EncoderSpec(
            config.encoder,
            config.image_size_px,
            tuple(config.image_mean),
            tuple(config.image_std),
            tuple(config.convnet_channels),
            config.backbone_config,
        )
        encoders = config.num_members if config.encoder in FROM_SCRATCH else 1
        members = [Encoder(spec) for _ in range(encoders)]
        self.encoders = nn.ModuleList(members)
        self.heads = nn.ModuleList(RewardHead(members[0].feature_size, config) for _ in range(config.num_members))
        if config.freeze_encoder:
            self.encoders.requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Fan-in scaling for linear and convolutional layers, standard normal class embeddings."""
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = "linear" if isinstance(module, nn.Linear) else "relu"
            init.kaiming_normal_(module.weight, nonlinearity=gain)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        else:
            super()._init_weights(module)

    def train(self, mode: bool = True) -> RewardModel:
        """Set the training mode; a frozen encoder stays in evaluation mode, so that its statistics don't move."""
        super().train(mode)
        if self.config.freeze_encoder:
            self.encoders.eval()
        return self

    def load_pretrained_encoder(self, name: str, revision: str | None = None) -> None:
        """Start from the pretrained weights of the encoder `name`, a Hub id or folder, or `efficientnet-lite0`.

        Raises:
            InputError: If the encoder has none.
        """
        for encoder in self.encoders:
            load_weights(cast(Encoder, encoder), name, revision)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a reward model from a folder or Hub id, strictly.

        Raises:
            InputError: If there is none, or its weights don't fit its configuration exactly.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, with a message that names them
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"Cannot load a reward model from {str(pretrained_model_name_or_path)!r}: {error} "
                "Give the folder or Hub id of a model made by `pathalign reward`."
            ) from error
        model, info = loaded
        kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
        wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info.get(kind)}
        if wrong:
            raise InputError(
                f"The weights of {str(pretrained_model_name_or_path)!r} don't fit its config.json: {wrong}. "
                "The folder is damaged or mixed; make it again with `pathalign reward`, or download it again."
            )
        return (model, info) if with_info else model

    def forward(
        self,
        pixel_values: Tensor,
        class_ids: Tensor,
        labels: Tensor | None = None,
        criteria_labels: Tensor | None = None,
    ) -> RewardModelOutput:
        """Judge images.

        Args:
            pixel_values: Shape `(n, 3, height, width)` in [-1, 1], any size; gradients reach it.
            class_ids: Shape `(n,)`, integers, positions in `config.class_names`.
            labels: Shape `(n,)`, probability in 0..1 that the image is plausible.
            criteria_labels: Shape `(n, len(criteria))`, probability that a criterion is met, NaN where unknown.
        """
        pixel_values = resize(pixel_values.to(self.dtype), self.config.image_size_px)
        features = [encoder(pixel_values) for encoder in self.encoders]
        members = [head(features[index % len(features)], class_ids) for index, head in enumerate(self.heads)]
        logits = torch.stack(members).float()
        loss = None if labels is None else reward_loss(logits, labels, criteria_labels, self.config.criteria_weight)
        mean = logits.mean(dim=0)
        return RewardModelOutput(
            loss=loss,
            logits=mean[:, 0],
            rewards=torch.sigmoid(mean[:, 0] / self.config.temperature),
            criteria_logits=mean[:, 1:] if self.config.criteria else None,
        )

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        """Calibrated probability of plausible, shape `(n,)`, float32; arguments as in `forward`.

        Differentiable with respect to `pixel_values`. Use in evaluation mode, as `from_pretrained` leaves the model.
        """
        return self(pixel_values=pixel_values, class_ids=class_ids).rewards

    def save_with_processor(self, folder: str | Path) -> None:
        """Write configuration, weights and image processing into one folder."""
        self.save_pretrained(folder)
        RewardImageProcessor(image_size_px=self.config.image_size_px).save_pretrained(folder)
