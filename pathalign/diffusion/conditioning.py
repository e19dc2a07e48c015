"""Class ids -> keyword arguments of the UNet. Trainers see this one interface, whatever the base model is."""

from __future__ import annotations

from torch import Tensor

from pathalign.diffusion.pipeline import ClassConditionalPipeline


class ClassConditioning:
    """Conditions of a class-conditional UNet without text."""

    def __init__(self, pipeline: ClassConditionalPipeline) -> None:
        self.no_class_id = pipeline.unet.config.num_class_embeds - 1

    def __call__(self, class_ids: Tensor) -> dict[str, Tensor | None]:
        """Keyword arguments for images of these classes, shape `(n,)`; `no_class_id` stands for no class."""
        return {"encoder_hidden_states": None, "class_labels": class_ids}
