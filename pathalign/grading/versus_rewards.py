"""What a reward model says of the images of a comparison: of each criterion, and on demand where it looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

from accelerate import PartialState
from torch import Tensor

from pathalign.grading.versus import CACHED_DRAWS, Comparison
from pathalign.images import to_pixel_values
from pathalign.reward import explain, load_reward_model
from pathalign.reward.explanation import overlay, require_captum, reward_parts
from pathalign.schema import InputError


@dataclass(frozen=True)
class Rewards:
    """Of one image: the reward, and those of the criteria in the order of `ComparisonRewards.criteria`; all in 0..1."""

    reward: float
    criteria: tuple[float, ...]


class ComparisonRewards:
    """A reward model beside a comparison. Keeps its latest answers; the same question costs nothing twice.

    Args:
        comparison: Draws the images.
        reward_model: Folder or Hub id.
        around: Wraps the functions that compute, such as `spaces.GPU`. Images are drawn before, by the comparison's
            own wrapped function: what it has drawn is not drawn again, and no GPU is asked for within another's time.

    Raises:
        InputError: If the model cannot be loaded, or lacks a class of the comparison.
    """

    def __init__(
        self,
        comparison: Comparison,
        reward_model: str,
        around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda compute: compute,
    ) -> None:
        self._comparison = comparison
        self._model = load_reward_model(reward_model).to(PartialState().device).eval()
        unknown = sorted(set(comparison.class_names) - set(self._model.config.class_names))
        if unknown:
            raise InputError(
                f"The reward model {reward_model} does not know the classes {unknown}; it was trained on "
                f"{self._model.config.class_names}. Name one that was trained for these models."
            )
        self.criteria = tuple(self._model.config.criteria)
        self._judge, self._explain = around(self._judge_images), around(self._explain_images)
        self.rewards = lru_cache(CACHED_DRAWS)(self._rewards)
        self.looks = lru_cache(CACHED_DRAWS)(self._looks)

    @property
    def cannot_look(self) -> str:
        """Why nobody can be shown where the model looks; empty if it can be shown."""
        try:
            require_captum()
        except InputError as error:
            return str(error)
        return ""

    def _rewards(self, class_label: str, seeds: tuple[int, ...]) -> dict[str, list[Rewards]]:
        """Role -> rewards of the images that the comparison draws for these seeds."""
        found: dict[str, list[Rewards]] = self._judge(class_label, self._comparison.draw(class_label, seeds))
        return found

    def _looks(self, class_label: str, seeds: tuple[int, ...]) -> dict[str, list[bytes]]:
        """Role -> PNG of each image with where the model looks, all on one scale.

        Raises:
            InputError: If Captum is not installed.
        """
        found: dict[str, list[bytes]] = self._explain(class_label, self._comparison.draw(class_label, seeds))
        return found

    def _judge_images(self, class_label: str, drawn: dict[str, Tensor]) -> dict[str, list[Rewards]]:
        found = {}
        for role, images in drawn.items():
            ids = self._model.class_ids([class_label] * len(images)).to(self._model.device)
            parts = reward_parts(self._model, to_pixel_values(images).to(self._model.device), ids).tolist()
            found[role] = [Rewards(reward, tuple(criteria)) for reward, *criteria in parts]
        return found

    def _explain_images(self, class_label: str, drawn: dict[str, Tensor]) -> dict[str, list[bytes]]:
        pictures = [image.permute(1, 2, 0).numpy() for images in drawn.values() for image in images]
        found = explain(self._model, pictures, class_label)
        shown = iter(
            [overlay(image, saliency, found.scale) for image, saliency in zip(pictures, found.saliency, strict=True)]
        )
        return {role: list(islice(shown, len(images))) for role, images in drawn.items()}
