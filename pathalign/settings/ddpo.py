"""Settings of the `align` stage with policy gradients: DDPO and GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import option
from pathalign.settings.adapter import GuardedConfig


@dataclass
class DDPOConfig(GuardedConfig):
    """Finetune LoRA adapters by policy gradient: denoising steps are actions, the final image is rewarded."""

    epochs: int = option(40, "Times that the policy acts, is scored and is updated.", minimum=1)
    images_per_class: int = option(20, "Images of each class drawn in an epoch, all devices together.", minimum=2)
    inference_steps: int = option(
        20, "Denoising steps of these images (DDIM); too few, and the policy learns to mend what they spoil.", minimum=2
    )
    eta: float = option(
        0.7, "Noise that DDIM adds at each step: 1 is as much as DDPM, 0 leaves nothing to learn from.", maximum=1.0
    )
    guidance_scale: float = option(
        1.0, "Classifier-free guidance; 1 is none, anything else doubles the UNet's work.", minimum=0.0
    )
    train_steps: int = option(4, "Denoising steps of each image that are trained on; 0 is all.", minimum=0)
    train_step_choice: Literal["random", "first", "window"] = option(
        "random",
        "Which steps these are: drawn for each image, the noisiest, or a window that moves on by one each epoch.",
    )
    estimator: Literal["importance_sampling", "score_function"] = option(
        "importance_sampling",
        "Policy gradient: clipped ratio of probabilities (PPO), or REINFORCE, which has no ratio.",
    )
    clip_range: float = option(
        1e-3,
        "The ratio is clipped to 1 +- this. Its log-probabilities are means over pixels: 1e-3 is a factor of 20 for a "
        "whole image of 3 x 32 x 32.",
        minimum=1e-7,
    )
    baseline: Literal["class", "group"] = option(
        "class", "Rewards are standardized by running statistics of their class, or within their group (GRPO)."
    )
    group_size: int = option(
        10, "Images of one class that are compared with each other by `baseline: group`.", minimum=2
    )
    statistics_decay: float = option(
        0.5,
        "Weight that the rewards of a class keep in its running statistics from epoch to epoch; 0 forgets them.",
        minimum=0.0,
        maximum=0.999,
    )
    advantage_clip: float = option(5.0, "Advantages are clipped to +- this.", minimum=0.1)
    inner_epochs: int = option(1, "Times that each epoch's images are trained on.", minimum=1)
    batch_size: int = option(50, "Images in an optimizer step at most, all devices together.", minimum=1)
    micro_batch_size: int = option(25, "Denoising steps that go through the UNet at once in training.", minimum=1)
    kl_weight: float = option(
        0.06,
        "Weight of the divergence from the base model, mean over pixels; above 0 it costs a further forward pass.",
        minimum=0.0,
    )
    beta: float = option(0.0, "Weight of the denoising loss on real images.", minimum=0.0)
    learning_rate: float = option(1e-3, "Learning rate of AdamW.", minimum=0.0)
    warmup_steps: int = option(0, "Epochs of linear warm-up.", minimum=0)
    largest_gradient_norm: float = option(1.0, "Gradients are scaled down to this norm.", minimum=0.0)
    checkpoint_every_steps: int = option(1, "Epochs between checkpoints.", minimum=1)
    merge_adapter: bool = option(True, "Sample with the adapter merged into the weights, which is faster.")
    trajectory_device: Literal["same", "cpu"] = option(
        "same", "Where the steps to train on are kept: on the device that draws them, or in main memory."
    )
    channels_last: bool = option(False, "Memory layout that can be faster on a GPU.")
    compile: bool = option(False, "Compile the UNet (torch.compile).")
    gradient_checkpointing: bool = option(
        False, "Compute activations twice rather than keep them: slower, less memory."
    )

    def problems(self) -> list[str]:
        """Checks across fields."""
        found = super().problems()
        if self.eta <= 0:
            found.append(f"`eta` is {self.eta}; without noise there is no policy. Use a number above 0, up to 1.")
        if self.estimator == "score_function" and self.inner_epochs > 1:
            found.append(
                f"`inner_epochs` is {self.inner_epochs}, but `score_function` holds for images of the current policy "
                "only; use 1, or `estimator: importance_sampling`."
            )
        if self.baseline == "group" and self.images_per_class % self.group_size:
            found.append(
                f"`images_per_class` is {self.images_per_class}, which groups of `group_size` {self.group_size} do not "
                "divide evenly."
            )
        if self.train_steps >= self.inference_steps:
            found.append(
                f"`train_steps` is {self.train_steps} of {self.inference_steps} `inference_steps`; the last one has no "
                "density, so use at most one fewer, or 0 for all that have one."
            )
        return found


@dataclass
class GRPOConfig(DDPOConfig):
    """Finetune LoRA adapters by group-relative policy gradient: DDPO with groups as baseline."""

    baseline: Literal["class", "group"] = option(
        "group", "Rewards are standardized within their group, or by running statistics of their class (DDPO)."
    )
