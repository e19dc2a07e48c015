"""Settings of the `align` stage with reward-weighted denoising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import option
from pathalign.settings.adapter import AdapterConfig


@dataclass
class RewardWeightedConfig(AdapterConfig):
    """Finetune LoRA adapters on reward-weighted denoising."""

    weighting: Literal["advantage", "contrastive", "reward", "normalized", "exponential", "top_share"] = option(
        "advantage",
        "How rewards weight the denoising loss: `reward` as in the paper, `normalized` to mean 1 within a class, "
        "`exponential` of reward over `temperature`, `top_share` of each class, `advantage` over the class's mean "
        "(worse images push away), or `contrastive`: the same, held near the model that drew the images.",
    )
    temperature: float = option(0.2, "Of `exponential`, in units of reward.", minimum=1e-3)
    top_share: float = option(0.35, "Share of each class that `top_share` keeps.", minimum=0.01, maximum=1.0)
    contrast: float = option(
        1.0,
        "Of `contrastive`: how far the implicit policies lie from the sampling one; smaller pushes harder.",
        minimum=0.01,
    )
    noise_share: float = option(
        0.35,
        "Synthetic images are noised up to this share of the schedule: details are decided late in sampling.",
        minimum=0.01,
        maximum=1.0,
    )
    rounds: int = option(3, "Times that images are drawn with the current adapter, scored and trained on.", minimum=1)
    images_per_class: int = option(70, "Images of each class drawn in a round.", minimum=2)
    inference_steps: int = option(10, "Denoising steps of these images.", minimum=1)
    guidance_scale: float = option(1.0, "Classifier-free guidance of these images; 1 is none.", minimum=0.0)
    scheduler: Literal["dpmsolver++", "ddim", "ddpm", "euler", "unipc"] = option(
        "dpmsolver++", "Sampler of these images."
    )
    steps_per_round: int = option(
        60, "Optimizer steps in a round; the learning rate falls as a cosine over all rounds.", minimum=1
    )
    batch_size: int = option(24, "Synthetic images in a batch, per device.", minimum=1)
