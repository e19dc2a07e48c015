"""Settings of the `generate` stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import ADAPTER, PIPELINE, REWARD_MODEL, StageConfig, option
from pathalign.settings.prompt import PROMPT, PROMPT_HELP, prompt_problems


@dataclass
class GenerateConfig(StageConfig):
    """Sample a candidate set from a pipeline."""

    model: str = option(
        "runs/base",
        "Pipeline, class-conditional or Stable Diffusion: a folder or Hub id.",
        holds=PIPELINE,
        revision="revision",
    )
    revision: str | None = option(None, "Hub revision of `model`.")
    adapter: str | None = option(None, "LoRA adapter: a folder or Hub id.", holds=ADAPTER)
    adapter_scale: float = option(1.0, "Strength of the adapter: 0 is the base model.")
    any_base: bool = option(False, "Use the adapter even on another base model than it was trained on.")
    classes: list[str] = option([], "Class names to sample; all if empty. Stable Diffusion has none of its own.")
    prompt: str = option(PROMPT, PROMPT_HELP)
    images_per_class: int = option(100, "Images of each class.", minimum=1)
    inference_steps: int = option(10, "Denoising steps.", minimum=1)
    varied_steps: list[int] = option(
        [],
        "Numbers of denoising steps that the images get in turn, in place of `inference_steps`: candidates of varied "
        "quality teach a reward model more.",
    )
    guidance_scale: float = option(1.0, "Classifier-free guidance; 1 is none.", minimum=0.0)
    scheduler: Literal["dpmsolver++", "ddim", "ddpm", "euler", "unipc"] = option("dpmsolver++", "Sampler.")
    images_per_shard: int | None = option(
        None,
        "Images in one Parquet file; all in one if empty. Memory holds one file at a time, and the processes of "
        "`accelerate launch` share the files.",
        minimum=1,
    )
    batch_size: int = option(50, "Images sampled at once; it never changes an image.", minimum=1)
    best_of: int = option(
        1, "Draw this many images for each one kept, the one of the highest reward.", minimum=1, maximum=256
    )
    reward_model: str | None = option(
        None, "Reward model that `best_of` chooses by: a folder or Hub id.", holds=REWARD_MODEL
    )
    seed: int = option(0, "Seed of the first image; image i has seed `seed + i`.", minimum=0)

    def problems(self) -> list[str]:
        """Best-of-N needs a reward model, and an image at least one step."""
        found = prompt_problems(self.prompt)
        if self.best_of > 1 and self.reward_model is None:
            found.append(f"`best_of` is {self.best_of}, but there is no `reward_model` to choose by.")
        if any(steps < 1 for steps in self.varied_steps):
            found.append(f"`varied_steps` is {self.varied_steps}; each must be 1 or more.")
        return found
