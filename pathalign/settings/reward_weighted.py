"""Settings of the `align` stage with reward-weighted denoising."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import StageConfig, option
from pathalign.settings.pretrain import tracker_problems


@dataclass
class RewardWeightedConfig(StageConfig):
    """Finetune LoRA adapters on reward-weighted denoising."""

    base_model: str = option("runs/base", "Pipeline to align: a folder or Hub id.")
    base_revision: str | None = option(None, "Hub revision of `base_model`.")
    reward_model: str = option("runs/reward", "Reward model: a folder or Hub id.")
    data: str = option("runs/data", "Real images (split `train`) for the real term: a folder or Hub dataset.")
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
    beta: float = option(0.3, "Weight of the denoising loss on real images.", minimum=0.0)
    rounds: int = option(3, "Times that images are drawn with the current adapter, scored and trained on.", minimum=1)
    images_per_class: int = option(70, "Images of each class drawn in a round.", minimum=2)
    inference_steps: int = option(10, "Denoising steps of these images.", minimum=1)
    guidance_scale: float = option(1.0, "Classifier-free guidance of these images; 1 is none.", minimum=0.0)
    scheduler: Literal["dpmsolver++", "ddim", "ddpm", "euler", "unipc"] = option(
        "dpmsolver++", "Sampler of these images."
    )
    sample_batch_size: int = option(50, "Images sampled at once, per device.", minimum=1)
    steps_per_round: int = option(60, "Optimizer steps in a round.", minimum=1)
    batch_size: int = option(24, "Synthetic images in a batch, per device.", minimum=1)
    real_batch_size: int = option(12, "Real images in a batch, per device.", minimum=0)
    learning_rate: float = option(
        2e-3, "Peak learning rate of AdamW; warm-up, then cosine decay over all rounds.", minimum=0.0
    )
    warmup_steps: int = option(5, "Steps of linear warm-up.", minimum=0)
    ema_decay: float = option(
        0.9,
        "Decay of the adapter's moving average, which samples and is saved; 0 is none.",
        minimum=0.0,
        maximum=0.9999,
    )
    lora_rank: int = option(8, "Rank of the adapter.", minimum=1)
    lora_alpha: float = option(8.0, "Scale of the adapter, over its rank.", minimum=0.0)
    lora_convolutions: bool = option(True, "Adapt convolutions and time projections too, not attention only.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Precision of the forward pass, by Accelerate.")
    checkpoint_every_steps: int = option(20, "Steps between checkpoints.", minimum=1)
    trackers: list[str] = option([], "Trackers beside log.jsonl: tensorboard, trackio.")
    seed: int = option(0, "Seed of adapter weights, samples, batches and noise.", minimum=0)

    def problems(self) -> list[str]:
        """Checks across fields."""
        found = []
        if self.beta > 0 and self.real_batch_size == 0:
            found.append(f"`beta` is {self.beta}, but `real_batch_size` is 0; give real images, or set `beta` to 0.")
        return found + tracker_problems(self.trackers)
