"""Settings that every trainer of adapters has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import StageConfig, option
from pathalign.settings.pretrain import tracker_problems


@dataclass
class AdapterConfig(StageConfig):
    """Finetune LoRA adapters on a diffusion UNet."""

    base_model: str = option("runs/base", "Pipeline to align: a folder or Hub id.")
    base_revision: str | None = option(None, "Hub revision of `base_model`.")
    reward_model: str = option("runs/reward", "Reward model: a folder or Hub id.")
    data: str = option("runs/data", "Real images (split `train`) for the real term: a folder or Hub dataset.")
    real_batch_size: int = option(12, "Real images in a batch, per device.", minimum=0)
    beta: float = option(0.3, "Weight of the denoising loss on real images.", minimum=0.0)
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW.", minimum=0.0)
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
    sample_batch_size: int = option(50, "Images sampled at once, per device.", minimum=1)
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Precision of the forward pass, by Accelerate.")
    checkpoint_every_steps: int = option(20, "Steps (epochs of policy trainers) between checkpoints.", minimum=1)
    trackers: list[str] = option([], "Trackers beside log.jsonl: tensorboard, trackio.")
    seed: int = option(0, "Seed of adapter weights, samples, batches and noise.", minimum=0)

    def problems(self) -> list[str]:
        """Checks across fields."""
        found = []
        if self.beta > 0 and self.real_batch_size == 0:
            found.append(f"`beta` is {self.beta}, but `real_batch_size` is 0; give real images, or set `beta` to 0.")
        return found + tracker_problems(self.trackers)


@dataclass
class GuardedConfig(AdapterConfig):
    """Finetune LoRA adapters on rewards, watched for reward hacking."""

    epochs: int = option(30, "Times that the policy acts, is scored and is updated.", minimum=1)
    other_rewards: list[str] = option(
        [], "Further rewards, each SOURCE=WEIGHT: a folder, Hub id or `module:function`; `reward_model` has weight 1."
    )
    held_out_reward_model: str | None = option(
        None, "Reward model that is never trained on: when it turns while the reward climbs, that is reward hacking."
    )
    judge: str | None = option(None, "Judge whose plausible share is logged and plotted; it decides nothing.")
    check_every_epochs: int = option(5, "Epochs between checks: images of the same seeds, all rewards.", minimum=1)
    check_images_per_class: int = option(20, "Images of each class in a check.", minimum=2)
    on_reward_hacking: Literal["rollback", "stop", "continue"] = option(
        "rollback",
        "When the held-out reward turns: go back to the best check and end there, end as it is, or only log it.",
    )
