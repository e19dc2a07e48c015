"""Settings of the `align` stage with direct preference optimization (Diffusion-DPO)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import DATASET, option
from pathalign.settings.adapter import GuardedConfig


@dataclass
class DPOConfig(GuardedConfig):
    """Finetune LoRA adapters on pairs of a chosen and a rejected image of one class.

    With neither `preferences` nor `feedback` the pairs are made anew in each epoch, of images that the adapter draws
    and the reward model orders: online DPO.
    """

    preferences: str | None = option(
        None,
        "Pairwise choices of experts, as `pathalign grade export` writes them: a folder or Hub dataset.",
        holds=DATASET,
    )
    feedback: str | None = option(
        None,
        "Feedback dataset whose plausible and implausible images of one class make pairs: a folder or Hub id.",
        holds=DATASET,
    )
    min_margin: float = option(
        0.5,
        "Of `feedback`: smallest difference between the plausible shares of a pair's images.",
        minimum=0.0,
        maximum=1.0,
    )
    epochs: int = option(20, "Times that pairs are chosen and learned from.", minimum=1)
    learning_rate: float = option(
        5e-4, "Peak learning rate of AdamW; it falls as a cosine over all steps.", minimum=0.0
    )
    beta: float = option(
        0.0,
        "Weight of the denoising loss on real images. The gradient of a pair is up to 1000 times `beta_dpo` that of a "
        "denoising loss: a weight that is felt is in the hundreds.",
        minimum=0.0,
    )
    beta_dpo: float = option(
        2.5,
        "Strength of the tie to the base model: the paper's beta where errors are means over pixels, and not sums. "
        "2.5 with 1000 timesteps is the 5000 of the authors' script, which holds the timesteps and is halved.",
        minimum=1e-6,
    )
    pairs_per_epoch: int = option(25, "Pairs in an epoch, the same number of each class where there are.", minimum=1)
    passes: int = option(4, "Times that an epoch's pairs are gone through, each time with other noise.", minimum=1)
    batch_size: int = option(25, "Pairs in an optimizer step, of all devices together.", minimum=1)
    micro_batch_size: int = option(
        25, "Pairs at once, per device; it changes memory only, never the gradient.", minimum=1
    )
    augment: bool = option(True, "Turn and flip the images of pairs at random, as pretraining did.")
    images_per_class: int = option(
        20,
        "Images of each class drawn in an epoch without `preferences` and `feedback`; the best makes a pair with the "
        "worst, the second best with the second worst, and so on.",
        minimum=2,
    )
    monitor_images_per_class: int = option(
        4, "Images of each class drawn in an epoch with given pairs: their mean reward is logged.", minimum=1
    )
    inference_steps: int = option(10, "Denoising steps of the images that are drawn.", minimum=1)
    guidance_scale: float = option(1.0, "Classifier-free guidance of these images; 1 is none.", minimum=0.0)
    scheduler: Literal["dpmsolver++", "ddim", "ddpm", "euler", "unipc"] = option(
        "dpmsolver++", "Sampler of these images."
    )

    def problems(self) -> list[str]:
        """Pairs come from one place."""
        found = super().problems()
        if self.preferences is not None and self.feedback is not None:
            found.append(
                "`preferences` and `feedback` are both given; pairs come from one of them, leave out the other."
            )
        return found
