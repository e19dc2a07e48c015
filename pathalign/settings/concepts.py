"""Settings of the `align` stage with new clinical concepts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import BACKBONE, DATASET, option
from pathalign.settings.adapter import AdapterConfig
from pathalign.settings.subtypes import RULE_HELP, rule_problems


def concept_name(text: str) -> tuple[str, str, str]:
    """Read `CLASS:SUBTYPE=NAME`.

    Raises:
        ValueError: If it is not of that form.
    """
    which, _, name = text.partition("=")
    class_name, _, subtype = which.partition(":")
    if not (class_name.strip() and subtype.strip() and name.strip()):
        raise ValueError(text)
    return class_name.strip(), subtype.strip(), name.strip()


@dataclass
class ConceptsConfig(AdapterConfig):
    """Split classes by the experts' subtype marks: new class embeddings, trained with LoRA adapters."""

    feedback: str | None = option(
        None, "Feedback dataset whose column `subtype` holds marks: a folder or Hub id.", holds=DATASET
    )
    subtypes: list[str] = option(
        [], f"Marks of the real training images, by the expert attribute that they come with: {RULE_HELP}."
    )
    names: list[str] = option(
        [], "Names of new classes, each CLASS:SUBTYPE=NAME; by default SUBTYPE and CLASS, as in `band neutrophil`."
    )
    max_marks: int = option(100, "Marks that are used at most, drawn at random from all that there are.", minimum=4)
    min_marks: int = option(4, "Marks that a subtype needs.", minimum=2)
    encoder: str = option(
        "efficientnet-lite0",
        "Whose features the marks are learned on: `efficientnet-lite0`, or a transformers backbone by folder or Hub "
        "id. The judge of the result must have another.",
        holds=BACKBONE,
    )
    images_per_class: int = option(
        200, "Images of each split class that the base model draws, to be marked by what was learned.", minimum=0
    )
    inference_steps: int = option(10, "Denoising steps of these images and of the checks.", minimum=1)
    guidance_scale: float = option(1.0, "Classifier-free guidance of these images; 1 is none.", minimum=0.0)
    scheduler: Literal["dpmsolver++", "ddim"] = option("dpmsolver++", "Sampler of these images.")
    top_share: float = option(
        0.5, "Share of these images that is kept, those of the highest rewards.", minimum=0.01, maximum=1.0
    )
    sure_share: float = option(
        0.4,
        "Share of the unmarked images recognised as a new class that is learned from, the surest ones.",
        minimum=0.01,
        maximum=1.0,
    )
    unmarked_real: bool = option(True, "Learn from real training images without a mark too.")
    least_accuracy: float = option(
        0.8,
        "Unmarked images, drawn or real, are learned from only if this share of held-out marks is told right, a mean "
        "over the new classes: below it they bring more errors than knowledge.",
        minimum=0.0,
        maximum=1.0,
    )
    noise_scale: float = option(
        0.05, "New embeddings start at the parent's plus noise of this size, in units of its own spread.", minimum=0.0
    )
    embedding_rate: float = option(
        10.0,
        "Learning rate of new embeddings, in units of the adapter's: they have to get as far apart as classes are.",
        minimum=0.0,
    )
    noise_share: float = option(
        1.0,
        "Images of new classes are noised up to this share of the schedule; the coarse shape is decided near its end.",
        minimum=0.01,
        maximum=1.0,
    )
    recognition: float = option(
        0.0,
        "Weight of being recognised: the gradient of the marks' classifier on images that are being drawn, as in "
        "DRaFT. What fools the classifier is learned too, so that another judge must look at the result.",
        minimum=0.0,
    )
    recognition_batch_size: int = option(8, "Images that are drawn for it in each step, per device.", minimum=1)
    train_steps: int = option(2, "Last denoising steps that this gradient goes back through.", minimum=1)
    steps: int = option(600, "Optimizer steps; the learning rate falls as a cosine.", minimum=1)
    batch_size: int = option(16, "Images of new classes in a batch, per device.", minimum=1)
    beta: float = option(
        4.0,
        "Weight of the distance from the base model's output on real images, by which all classes stay.",
        minimum=0.0,
    )
    checkpoint_every_steps: int = option(50, "Steps between checkpoints.", minimum=1)
    check_images_per_class: int = option(
        20,
        "Images of each class and each new class that are drawn at the end, to be recognised and rewarded.",
        minimum=2,
    )

    def problems(self) -> list[str]:
        """Marks must come from somewhere, and rules and names be readable."""
        found = super().problems() + rule_problems(self.subtypes)
        if self.train_steps > self.inference_steps:
            found.append(
                f"`train_steps` is {self.train_steps}, but `inference_steps` are {self.inference_steps}; use no more."
            )
        for text in self.names:
            try:
                concept_name(text)
            except ValueError:
                found.append(f"`names` has {text!r}; write CLASS:SUBTYPE=NAME, as in neutrophil:band=stab cell.")
        return found
