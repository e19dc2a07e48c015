"""Settings of the `align` stage with gradients of the reward straight through sampling (DRaFT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import option
from pathalign.settings.adapter import GuardedConfig


@dataclass
class DraftConfig(GuardedConfig):
    """Finetune LoRA adapters by the gradient of the reward model through the last sampling steps."""

    epochs: int = option(8, "Times that each class's images are drawn and learned from.", minimum=1)
    learning_rate: float = option(
        1e-3, "Peak learning rate of AdamW; it falls as a cosine over all steps.", minimum=0.0
    )
    beta: float = option(0.3, "Weight of the denoising loss on real images.", minimum=0.0)
    check_every_epochs: int = option(2, "Epochs between checks: images of the same seeds, all rewards.", minimum=1)
    images_per_class: int = option(20, "Images of each class drawn in an epoch.", minimum=1)
    batch_size: int = option(20, "Images in an optimizer step, of all devices together.", minimum=1)
    micro_batch_size: int = option(
        20, "Images at once, per device; it changes memory only, never the gradient.", minimum=1
    )
    inference_steps: int = option(10, "Denoising steps of these images.", minimum=1)
    guidance_scale: float = option(
        1.0, "Classifier-free guidance of these images, in sampling and training; 1 is none.", minimum=0.0
    )
    scheduler: Literal["ddim", "dpmsolver++"] = option("dpmsolver++", "Sampler of these images; both draw no noise.")
    variant: Literal["k", "lv"] = option(
        "k",
        "`k`: the gradient goes back through the last `train_steps` steps. `lv`: through the last step only, which is "
        "repeated from fresh noise on the finished image `lv_samples` times, for less variance.",
    )
    train_steps: int = option(1, "K: last sampling steps that the gradient goes back through.", minimum=1)
    lv_samples: int = option(2, "Of `lv`: repetitions of the last step.", minimum=1)
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory for one more forward pass."
    )
    objective: Literal["reward", "log_reward", "log_odds"] = option(
        "log_reward",
        "What is maximized: the reward itself (no gradient where all images are refused), its logarithm (it levels off "
        "where images are accepted), or its log-odds (as hard everywhere).",
    )
    kl_weight: float = option(
        0.0,
        "Weight of the squared distance between the UNet's outputs with and without adapter, mean over pixels, on the "
        "noisy images of the trained steps: up to a factor of each step the KL divergence to the base model.",
        minimum=0.0,
    )
    augment: bool = option(
        True, "Turn, flip and move images at random before the reward model: its gradient is then less adversarial."
    )

    def problems(self) -> list[str]:
        """Gradients go through steps that there are; `lv` repeats the last one only."""
        found = super().problems()
        if self.train_steps > self.inference_steps:
            found.append(
                f"`train_steps` is {self.train_steps}, but there are {self.inference_steps} `inference_steps`."
            )
        if self.variant == "lv" and self.train_steps != 1:
            found.append(f"`train_steps` is {self.train_steps}, but `variant: lv` repeats the last step; set it to 1.")
        return found
