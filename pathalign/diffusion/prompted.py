"""Stable Diffusion, asked for classes: each class is a prompt made from a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, StableDiffusionPipeline

from pathalign.diffusion.pipeline import convert, label_ids, one_generator_each


def prompt_for(class_name: str, template: str) -> str:
    """The prompt of a class: its name, with spaces for underscores, in place of `{class_name}`."""
    return template.replace("{class_name}", class_name.replace("_", " "))


class PromptPipeline(StableDiffusionPipeline):
    """A `StableDiffusionPipeline` that is called as a `ClassConditionalPipeline` is: labels and generators to images.

    It has no classes before `name_classes`. Images are synthetic: for research only, never for diagnosis.
    """

    class_names: list[str]
    template: str

    def name_classes(self, class_names: Sequence[str], template: str) -> None:
        """Say which classes it shall draw, in the order of their ids, and how to ask for them."""
        self.class_names, self.template = list(class_names), template

    @property
    def concepts(self) -> dict[str, str]:
        """None: new classes are rows of a class embedding, and this model has words."""
        return {}

    def prompts(self) -> list[str]:
        """The prompt of each class, in the order of their ids."""
        return [prompt_for(name, self.template) for name in self.class_names]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[str | int],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one image for each label; arguments as for `ClassConditionalPipeline.__call__`.

        A `guidance_scale` of 1 or less is none, as always in Stable Diffusion.

        Raises:
            ValueError: If a label is unknown, or the number of generators differs from the number of labels.
        """
        ids = label_ids(class_labels, self.class_names).tolist()
        prompts = self.prompts()
        images = super().__call__(
            prompt=[prompts[class_id] for class_id in ids],
            generator=one_generator_each(generator, len(ids)),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
        )[0]
        converted: Any = convert(images.float() * 2 - 1, output_type)
        return ImagePipelineOutput(images=converted)
