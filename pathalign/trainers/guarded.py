"""Trainers that follow a reward, epoch by epoch, and are watched for reward hacking."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from pathalign.settings.adapter import GuardedConfig
from pathalign.trainers.adapter import AdapterTrainer

Guarded = TypeVar("Guarded", bound=GuardedConfig)


class GuardedTrainer(AdapterTrainer[Guarded]):
    """Epochs of acting, scoring and updating; a method adds `epoch`."""

    unit: ClassVar[str] = "epoch"
    shown: ClassVar[tuple[str, ...]] = ("reward",)

    @property
    def total(self) -> int:
        """Epochs of the whole run."""
        return self.config.epochs

    @abstractmethod
    def epoch(self, number: int) -> dict[str, float]:
        """Do epoch `number`, from 0; the figures to log have the mean `reward` among them."""

    def step(self, number: int) -> dict[str, float]:
        """One epoch, and a check of the averaged adapter when one is due."""
        return self.epoch(number)

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        """Rewards of images `(n, 3, h, w)` in [-1, 1], shape `(n,)`, float32; differentiable if all sources are."""
        return self.reward_model.rewards(pixel_values, class_ids)

    def metrics(self) -> dict[str, Any]:
        """What the run record says of the result."""
        return {}
