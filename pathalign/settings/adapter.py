"""Settings that every trainer of adapters has."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathalign.config import DATASET, GRADER, PIPELINE, REWARD_MODEL, StageConfig, option
from pathalign.settings.pretrain import tracker_problems
from pathalign.settings.prompt import PROMPT, PROMPT_HELP, prompt_problems

FUNCTION = re.compile(r"[^\d\W]\w*(\.[^\d\W]\w*)*:[^\d\W]\w*")


def is_function(source: str) -> bool:
    """Whether a reward's source is `module:function`; a folder of that name comes first."""
    return FUNCTION.fullmatch(source) is not None and not Path(source).is_dir()


def weighted_source(text: str) -> tuple[str, float]:
    """Read `SOURCE=WEIGHT`.

    Raises:
        ValueError: If there is no source, or the weight is no finite number.
    """
    source, _, weight = text.rpartition("=")
    if not source or not math.isfinite(float(weight)):
        raise ValueError(text)
    return source, float(weight)


@dataclass
class AdapterConfig(StageConfig):
    """Finetune LoRA adapters on a diffusion UNet."""

    base_model: str = option(
        "runs/base",
        "Pipeline to align, class-conditional or Stable Diffusion: a folder or Hub id.",
        holds=PIPELINE,
        revision="base_revision",
    )
    base_revision: str | None = option(None, "Hub revision of `base_model`.")
    prompt: str = option(PROMPT, PROMPT_HELP)
    reward_model: str = option(
        "runs/reward", "Reward model: a folder, Hub id or `module:function`.", holds=REWARD_MODEL
    )
    data: str = option(
        "runs/data", "Real images (split `train`) for the real term: a folder or Hub dataset.", holds=DATASET
    )
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
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = option(
        "no", "Precision of the forward pass, by Accelerate; `auto` is bf16 where the device computes in it, else no."
    )
    checkpoint_every_steps: int = option(20, "Steps (epochs of policy trainers) between checkpoints.", minimum=1)
    trackers: list[str] = option([], "Trackers beside log.jsonl: tensorboard, trackio.")
    seed: int = option(0, "Seed of adapter weights, samples, batches and noise.", minimum=0)

    @property
    def method(self) -> str:
        """Name of the method on the command line and in records: `RewardWeightedConfig` is `reward-weighted`."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(self).__name__.removesuffix("Config")).lower()

    def problems(self) -> list[str]:
        """Checks across fields."""
        found = prompt_problems(self.prompt)
        if self.beta > 0 and self.real_batch_size == 0:
            found.append(f"`beta` is {self.beta}, but `real_batch_size` is 0; give real images, or set `beta` to 0.")
        return found + tracker_problems(self.trackers)


@dataclass
class GuardedConfig(AdapterConfig):
    """Finetune LoRA adapters on rewards, watched for reward hacking."""

    epochs: int = option(30, "Times that the policy acts, is scored and is updated.", minimum=1)
    other_rewards: list[str] = option(
        [],
        "Further rewards, each SOURCE=WEIGHT: a folder, Hub id or `module:function`; `reward_model` has weight 1.",
        holds=REWARD_MODEL,
    )
    held_out_reward_model: str | None = option(
        None,
        "Reward model that is never trained on: when it turns while the reward climbs, that is reward hacking.",
        holds=REWARD_MODEL,
    )
    judge: str | None = option(
        None, "Judge whose plausible share is logged and plotted; it decides nothing.", holds=GRADER
    )
    check_every_epochs: int = option(5, "Epochs between checks: images of the same seeds, all rewards.", minimum=1)
    check_images_per_class: int = option(20, "Images of each class in a check.", minimum=2)
    check_inference_steps: int = option(10, "Denoising steps of these images, by dpmsolver++.", minimum=1)
    check_guidance_scale: float = option(1.0, "Classifier-free guidance of these images; 1 is none.", minimum=0.0)
    check_standard_errors: float = option(
        3.0,
        "A reward has turned when its mean over the same seeds lies this many standard errors below its best check.",
        minimum=0.0,
    )
    patience: int = option(
        4, "Checks in a row without a clearly better held-out reward after which the run ends; 0 is all.", minimum=0
    )
    on_reward_hacking: Literal["rollback", "stop", "continue"] = option(
        "rollback",
        "When the held-out reward turns, or rises no more: end, and keep the earliest adapter that no later check "
        "clearly beats; end, and keep the last one; or only log it.",
    )

    def problems(self) -> list[str]:
        """Checks across fields."""
        found, sources = [], [self.reward_model]
        for text in self.other_rewards:
            try:
                sources.append(weighted_source(text)[0])
            except ValueError:
                found.append(
                    f"`other_rewards` has {text!r}; write SOURCE=WEIGHT with a number, such as runs/other=0.5."
                )
        if self.held_out_reward_model in sources:
            found.append(
                f"`held_out_reward_model` is {self.held_out_reward_model!r}, which is trained on; give another, "
                "or leave it out."
            )
        return super().problems() + found
