"""`transformers.pipeline` for a reward model: images and their classes to plausibilities. Travels with the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Pipeline

from .image_processing_reward import load_image, paired

TASK = {"plausibility": {"impl": "pipeline_reward.RewardPipeline", "pt": ["AutoModel"]}}  # in a model's config.json


class RewardPipeline(Pipeline):
    """Images and class labels to a list of `{"label": ..., "score": ...}`, as `RewardModel.score` gives it.

    `pipeline(model=REPO, trust_remote_code=True)` makes one where pathalign is not installed.
    """

    _load_tokenizer = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_processor = False

    def __call__(self, images: Any, class_labels: str | Sequence[str], **options: Any) -> list[dict[str, Any]]:
        """Judge images; arguments and errors as of `RewardModel.score`, other options as of any `Pipeline`."""
        pairs = paired(images, class_labels)
        self.model.class_ids([label for _, label in pairs])  # names are checked before an image is opened
        answers: list[dict[str, Any]] = super().__call__(pairs, **options) if pairs else []
        return answers

    def _sanitize_parameters(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        return {}, {}, {}

    def preprocess(self, pair: tuple[Any, str]) -> dict[str, Any]:
        """One image as the model reads it, and the id of its class."""
        image, label = pair
        pixel_values = self.image_processor(load_image(image), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixel_values, "class_ids": self.model.class_ids([label])}

    def _forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"rewards": self.model.rewards(**inputs), "class_ids": inputs["class_ids"]}

    def postprocess(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The class and the plausibility of one image."""
        name = self.model.config.class_names[int(outputs["class_ids"])]
        return {"label": name, "score": float(outputs["rewards"])}
