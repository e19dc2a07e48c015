"""The reward model R(x, c) = P(plausible | x, c) as a transformers model. Travels with its weights.

Source: Sun et al., arXiv:2306.12438, section 3, whose label is 1 for implausible; ours is 1 for plausible.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from .image_processing_reward import RewardImageProcessor, load_image, paired, resize

try:
    from pathalign.pinning import Reference, unusable
    from pathalign.schema import InputError
except ImportError:  # loaded by trust_remote_code where pathalign is not installed
    InputError, Reference = ValueError, lambda *parts: parts  # type: ignore[assignment, misc]

    def unusable(error, reference, holds):  # type: ignore[misc, no-untyped-def]
        """Say what could not be loaded, in transformers' words."""
        return InputError(f"No reward model can be loaded from {reference[0]!r}: {error}")


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
        """Load a reward model from a folder or Hub id, strictly, and from safetensors only.

        Raises:
            InputError: If there is none, or its weights don't fit its configuration exactly.
        """
        with_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # they are refused below, with a message that names them
        kwargs["use_safetensors"] = True
        names = ("revision", "token", "cache_dir", "local_files_only")
        where = {name: kwargs[name] for name in names if name in kwargs}
        try:
            found, _ = RewardModelConfig.get_config_dict(pretrained_model_name_or_path, **where)
            if found.get("model_type") != RewardModelConfig.model_type:
                raise OSError(f"it is of type {found.get('model_type')!r}, no reward model.")
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            reference = Reference(str(pretrained_model_name_or_path), kwargs.get("revision"))
            raise unusable(error, reference, "a reward model") from error
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

    def class_ids(self, class_labels: Sequence[str]) -> Tensor:
        """Class names to ids, shape `(n,)`, int64, on the CPU.

        Raises:
            ValueError: If the model does not know a name.
        """
        known = self.config.class_names
        unknown = sorted(set(class_labels) - set(known))
        if unknown:
            raise InputError(f"The reward model does not know the classes {unknown}; it was trained on {known}.")
        return torch.tensor([known.index(label) for label in class_labels], dtype=torch.int64)

    @torch.no_grad()
    def score(self, images: Any, class_labels: str | Sequence[str], batch_size: int = 64) -> list[dict[str, Any]]:
        """How plausible images are as images of their classes.

        Args:
            images: One or several: PIL images, files, or uint8 arrays `(height, width, 3)` of any size.
            class_labels: Names from `config.class_names`: one for all images, or one for each.
            batch_size: Images judged at once.

        Returns:
            `{"label": class name, "score": calibrated probability of plausible, 0..1}` for each image, in their order.

        Raises:
            ValueError: If a class is unknown, the numbers differ, or an image is none of these.
            OSError: If a file cannot be read.
        """
        pairs = paired(images, class_labels)
        ids = self.class_ids([label for _, label in pairs])
        processor, rewards = RewardImageProcessor(image_size_px=self.config.image_size_px), []
        for start in range(0, len(pairs), batch_size):
            opened = [load_image(image) for image, _ in pairs[start : start + batch_size]]
            pixel_values = processor(opened)["pixel_values"].to(self.device)
            rewards += self.rewards(pixel_values, ids[start : start + batch_size].to(self.device)).tolist()
        return [{"label": label, "score": score} for (_, label), score in zip(pairs, rewards, strict=True)]

    def save_with_processor(self, folder: str | Path) -> None:
        """Write configuration, weights, image processing and the pipeline of `pipeline_reward.py` into one folder."""
        from .pipeline_reward import TASK  # an import of this file's, so that transformers copies that file too

        self.config.custom_pipelines = TASK
        self.save_pretrained(folder)
        RewardImageProcessor(image_size_px=self.config.image_size_px).save_pretrained(folder)
