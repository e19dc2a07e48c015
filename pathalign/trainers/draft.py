"""DRaFT: the gradient of the reward model goes straight back through the last sampling steps.

    loss = -mean over classes of E[ objective(R(x, c)) ] + kl_weight * ||eps - eps_base||^2 + beta * E_real[ L_denoise ]

Source: Clark et al., "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (arXiv:2309.17400). The paper
sums the gradients of DRaFT-LV's repetitions; here they are averaged, so that their number does not change the rate.
A gradient of the reward is also an adversary of the reward model: hence the distance to the base model on the noisy
images of the trained steps, the real term, and images turned and moved at random before they are scored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pathalign.artefacts import artefact
from pathalign.augment import random_orientations, random_shifts
from pathalign.diffusion.denoiser import Denoiser
from pathalign.diffusion.differentiable import Draw, renoised, unrolled
from pathalign.diffusion.loading import BaseModel
from pathalign.diffusion.pipeline import randn_per_image
from pathalign.generate import SCHEDULERS, set_scheduler
from pathalign.images import ImageSet
from pathalign.pinning import pinned
from pathalign.randomness import seeded
from pathalign.schema import RunRecord
from pathalign.settings.draft import DraftConfig
from pathalign.trainers.adapter import TRAINING, load_inputs
from pathalign.trainers.base import cosine_rate, require_finite
from pathalign.trainers.epochs import class_balanced_weights, first_seed, micro_batches
from pathalign.trainers.guarded import GuardedTrainer
from pathalign.trainers.rewards import Reward

LEAST_REWARD = 1e-30  # its logarithm is a number, and so is the slope of it


def objective_of(rewards: Tensor, kind: str) -> Tensor:
    """What is maximized, element by element.

    Args:
        rewards: Any shape; probabilities for `log_reward` and `log_odds`, which take numbers below 1e-30 as 1e-30.
        kind: `reward`, `log_reward` or `log_odds`. A refused image (R near 0) has log-odds z with dR/dz = R (1 - R),
            next to nothing, but d log R/dz = 1 - R; log-odds have the slope 1 everywhere.
    """
    if kind == "reward":
        return rewards
    if kind == "log_reward":
        return rewards.clamp_min(LEAST_REWARD).log()
    return rewards.clamp_min(LEAST_REWARD).log() - torch.log1p(-rewards.clamp_max(1 - 1e-6))


def output_distance(model_output: Tensor, reference: Tensor) -> Tensor:
    """Squared distance of two outputs of the UNet `(n, channels, h, w)`, mean over channels and pixels, shape `(n,)`.

    Two reverse steps of one variance have the KL divergence w(t) times this, with w known from the schedule alone; w is
    left out here, as it is from the denoising loss (arXiv:2006.11239, eq. 14).
    """
    return (model_output - reference).float().square().mean(dim=(1, 2, 3))


def visible(decoded: Tensor) -> Tensor:
    """Pixel values `(n, 3, h, w)` as a saved image shows them: clamped to [-1, 1], but not rounded to 256 levels.

    The reward model resizes them with the function of its image processor, so that a reward here is that of the saved
    image up to rounding. A pixel beyond the range has no gradient: it cannot be hacked.
    """
    return decoded.float().clamp(-1, 1)


@dataclass(frozen=True)
class Outcome:
    """What a micro-batch gave: a scalar loss with its graph, and of each image the mean reward and, if asked for, the
    KL-like term.
    """

    loss: Tensor
    rewards: Tensor
    distances: Tensor | None


def align(config: DraftConfig, output_dir: str | Path) -> RunRecord:
    """Align a pipeline and write the adapter; the same call goes on where an interrupted one was.

    Raises:
        InputError: If an input cannot be used, or a reward or the loss is no number any more.
    """
    config = pinned(config)
    pipeline, reward_model, real = load_inputs(config)
    with artefact(output_dir) as folder:
        record = DraftTrainer(pipeline, reward_model, real, config, folder).train()
    return record


class DraftTrainer(GuardedTrainer[DraftConfig]):
    """Epochs of drawing images of all classes and following the gradient of their rewards."""

    follows_gradient: ClassVar[bool] = True

    def __init__(
        self,
        pipeline: BaseModel,
        reward_model: Reward,
        real: ImageSet,
        config: DraftConfig,
        folder: Path,
    ) -> None:
        super().__init__(pipeline, reward_model, real, config, folder)
        set_scheduler(pipeline, config.scheduler)
        self.sampler = SCHEDULERS[config.scheduler].from_config(pipeline.scheduler.config)
        self.reward_model.requires_grad_(False)
        self.denoise = Denoiser(
            self.unet,
            self.conditioning,
            config.guidance_scale,
            config.gradient_checkpointing,
            self.accelerator.autocast,
        )
        self.mean_rewards: list[float] = []

    def epoch(self, number: int) -> dict[str, float]:
        """Draw each class's images batch by batch, one optimizer step a batch."""
        config = self.config
        self.usage.start()
        names = self.pipeline.class_names
        class_ids = torch.arange(len(names)).repeat(config.images_per_class)
        first = first_seed(config.seed, config.epochs, number)
        batches = torch.arange(len(class_ids)).split(config.batch_size)
        rows: list[tuple[int, float, float | None]] = []
        steps = []
        for index, batch in enumerate(batches):
            step = number * len(batches) + index
            rate = config.learning_rate * cosine_rate(step, config.epochs * len(batches), config.warmup_steps)
            self.set_rate(rate)
            seen, loss, real = self.gather_gradients(class_ids, batch, first, step, rate)
            rows += seen
            steps.append((loss, real, self.update(), rate))
        rows = gather_object(rows)
        rewards = torch.tensor([reward for _, reward, _ in rows])
        distances = [distance for _, _, distance in rows if distance is not None]
        seen_ids = torch.tensor([class_id for class_id, _, _ in rows])
        self.mean_rewards = [*self.mean_rewards[:number], float(rewards.mean())]
        loss, real, norm, rate = (sum(column) / len(steps) for column in zip(*steps, strict=True))
        return {
            "loss": float(sum(gather_object([loss]))),
            "real_loss": real,
            "kl": sum(distances) / len(distances),
            "gradient_norm": norm,
            "learning_rate": rate,
            "reward": float(rewards.mean()),
            "reward_std": float(rewards.std(correction=0)),
            **{f"reward_{name}": float(rewards[seen_ids == index].mean()) for index, name in enumerate(names)},
            **self.usage.figures(len(rows)),
        }

    def gather_gradients(
        self, class_ids: Tensor, batch: Tensor, first: int, step: int, rate: float
    ) -> tuple[list[tuple[int, float, float | None]], float, float]:
        """Add up the gradients of one batch, this process's part of it.

        Args:
            class_ids: Shape `(n,)`, of all images of the epoch.
            batch: Places in `class_ids` of the images to draw; image i has seed `first + i`.
            first: Seed of the epoch's first image.
            step: Optimizer step, from 0.
            rate: Learning rate, for the message if the loss is no number.

        Returns:
            Class id, reward and KL-like term of each image (without `kl_weight` that of the epoch's first micro-batch
            only: it costs a pass of the UNet); this process's share of the loss; the real loss in it.
        """
        accelerator = self.accelerator
        weights = torch.zeros(len(class_ids))
        weights[batch] = class_balanced_weights(class_ids[batch])
        seen: list[tuple[int, float, float | None]] = []
        share = 0.0
        process = (accelerator.process_index, accelerator.num_processes)
        for part in micro_batches(batch, self.config.micro_batch_size, process):
            measured = self.config.kl_weight > 0 or (int(batch[0]) == 0 and not seen)
            outcome = self.outcome(class_ids[part], weights[part], [first + row for row in part.tolist()], measured)
            require_finite(outcome.loss, step, rate)
            accelerator.backward(outcome.loss * accelerator.num_processes)
            share += outcome.loss.item()
            distances = [None] * len(part) if outcome.distances is None else outcome.distances.tolist()
            seen += list(zip(class_ids[part].tolist(), outcome.rewards.tolist(), distances, strict=True))
        real = 0.0
        if self.config.beta > 0:
            with accelerator.autocast():
                loss = self.config.beta * self.real_loss(seeded(self.config.seed, TRAINING, step))
            require_finite(loss, step, rate)
            accelerator.backward(loss)
            real = loss.item() / self.config.beta
            share += loss.item() / accelerator.num_processes
        return seen, share, real

    def outcome(self, class_ids: Tensor, weights: Tensor, seeds: list[int], measured: bool) -> Outcome:
        """Draw images and score them, with the graph of the trained steps.

        Args:
            class_ids: Shape `(n,)`.
            weights: Shape `(n,)`, of each image in the loss.
            seeds: One for each image: its noise, its repetitions and its views depend on nothing else.
            measured: Whether to ask the base model how far the adapter has gone.

        Raises:
            InputError: If a reward is not finite.
        """
        config = self.config
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        class_ids, weights = class_ids.to(self.device), weights.to(self.device)
        noise = randn_per_image(self.conditioning.sample_shape, generators).to(self.device, self.unet.dtype)
        draws = [unrolled(self.denoise, self.sampler, noise, class_ids, config.inference_steps, config.train_steps)]
        for _ in range(config.lv_samples if config.variant == "lv" else 0):
            draws.append(renoised(self.denoise, self.training_schedule, draws[0], class_ids, generators))
        rewards = torch.stack([self.rewards(self.view(draw.sample, generators), class_ids) for draw in draws])
        losses = -objective_of(rewards, config.objective).mean(dim=0)
        distances = self.distances(draws, class_ids) if measured else None
        if distances is not None and config.kl_weight > 0:
            losses = losses + config.kl_weight * distances
        return Outcome(
            (weights * losses).sum(), rewards.detach().mean(dim=0), None if distances is None else distances.detach()
        )

    def view(self, sample: Tensor, generators: list[torch.Generator]) -> Tensor:
        """What the reward model sees of a sample: `visible` pixels, each image turned and moved at random."""
        decode = self.conditioning.decode
        if self.config.gradient_checkpointing:
            pixel_values = visible(checkpoint(decode, sample, use_reentrant=False))
        else:
            pixel_values = visible(decode(sample))
        if not self.config.augment:
            return pixel_values
        images = zip(pixel_values.split(1), generators, strict=True)
        return torch.cat([random_shifts(random_orientations(image, own), own) for image, own in images])

    def distances(self, draws: list[Draw], class_ids: Tensor) -> Tensor:
        """Squared distance to the base model, mean over the trained calls, shape `(n,)`.

        Samples of all trained steps but the first depend on the adapter; the gradient knows that.
        """
        calls = [call for draw in draws for call in draw.calls]
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.kl_weight > 0):
            found = [
                output_distance(call.model_output, self.denoise.reference(call.sample, call.timestep, class_ids))
                for call in calls
            ]
        return torch.stack(found).mean(dim=0)

    def extra_state(self) -> dict[str, Any]:
        """All else follows from the seed and the epoch."""
        return {**super().extra_state(), "mean_rewards": self.mean_rewards}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        super().load_extra_state(state)
        self.mean_rewards = list(state["mean_rewards"])

    def metrics(self) -> dict[str, Any]:
        """Mean reward of the images that each epoch learned from."""
        return {**super().metrics(), "mean_reward_by_epoch": self.mean_rewards}
