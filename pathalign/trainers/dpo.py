"""Diffusion-DPO: make the chosen image of a pair likelier than the rejected one, tied to the base model.

    loss = -log sigmoid( -beta T [ (e_w - e_w_base) - (e_l - e_l_base) ] ),   e = L_denoise at one timestep

Source: Wallace et al., "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv:2311.12908), eq. 14.
w is the chosen image, l the rejected one, T the number of training timesteps; base is the UNet with its adapter off.
The expectation over timesteps and noise stands outside of log sigmoid there, an upper bound by Jensen's inequality:
each pair has one timestep and one noise for both images, and the loss is the mean over pairs of their own log sigmoid.
The paper's weight of timesteps is constant here; a model of velocities has the errors of its velocities.

The paper's e is a sum over pixels. Here, as in the authors' script, it is the mean: with D values in an image the same
loss has `beta_dpo` = D times the paper's beta.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor

from pathalign.artefacts import artefact, fingerprint
from pathalign.augment import random_orientations
from pathalign.diffusion import lora
from pathalign.diffusion.loading import BaseModel, image_size_px
from pathalign.generate import sample, set_scheduler
from pathalign.images import ImageSet, to_pixel_values
from pathalign.pinning import pinned
from pathalign.randomness import seeded
from pathalign.schema import InputError, RunRecord
from pathalign.settings.dpo import DPOConfig
from pathalign.trainers.adapter import TRAINING, load_inputs
from pathalign.trainers.base import cosine_rate, require_finite
from pathalign.trainers.epochs import class_turns, first_seed, micro_batches
from pathalign.trainers.guarded import GuardedTrainer
from pathalign.trainers.preference_pairs import Pairs, graded_pairs, pair_ids, ranked_pairs, read_preferences
from pathalign.trainers.pretrain import denoising_loss, evenly_spread
from pathalign.trainers.rewards import Reward

PAIRS = 3  # stream of random numbers: which pairs an epoch has


def implicit_margins(errors: Tensor, base_errors: Tensor, coefficient: float) -> Tensor:
    """How much more the model prefers the chosen images than the base model does, in log-odds.

    Args:
        errors: Denoising losses of the trained model, shape `(2, n)`: chosen images, then rejected ones.
        base_errors: The same of the base model.
        coefficient: T times `beta_dpo`, for errors that are means over pixels.

    Returns:
        Shape `(n,)`; 0 for a model that is the base.
    """
    chosen, rejected = errors - base_errors
    return -coefficient * (chosen - rejected)


def preference_losses(margins: Tensor) -> Tensor:
    """-log sigmoid of the margins, shape `(n,)`; log 2 for a margin of 0. Source: arXiv:2311.12908, eq. 14."""
    return F.softplus(-margins)


def agreement_shares(margins: Tensor) -> Tensor:
    """1 where the model orders a pair as it was chosen, 0 where not, one half where it makes no difference."""
    return 0.5 + 0.5 * margins.sign()


def align(config: DPOConfig, output_dir: str | Path) -> RunRecord:
    """Align a pipeline and write the adapter; the same call goes on where an interrupted one was.

    Raises:
        InputError: If an input cannot be used, there are no pairs, or the loss is no number any more.
    """
    config = pinned(config)
    pipeline, reward_model, real = load_inputs(config)
    pairs = load_pairs(config, pipeline)
    with artefact(output_dir) as folder:
        record = DPOTrainer(pipeline, reward_model, real, config, folder, pairs).train()
    return record


def load_pairs(config: DPOConfig, pipeline: BaseModel) -> Pairs | None:
    """The pairs that the configuration names; None if they are made anew in each epoch.

    Raises:
        InputError: If they cannot be read, or do not fit the pipeline.
    """
    size = image_size_px(pipeline)
    if config.preferences is not None:
        return read_preferences(config.preferences, pipeline.class_names, size)
    if config.feedback is None:
        return None
    feedback = ImageSet.load(config.feedback, "train")
    if feedback.image_size_px != size:
        raise InputError(
            f"{config.feedback} has images of {feedback.image_size_px} px, {config.base_model} draws {size} px; use "
            "feedback about images of this base model."
        )
    return graded_pairs(feedback, pipeline.class_names, config.min_margin, config.feedback)


class DPOTrainer(GuardedTrainer[DPOConfig]):
    """Epochs of choosing pairs and learning to prefer the chosen image.

    Args:
        pipeline: As for every trainer of adapters; so are `reward_model`, `real`, `config` and `folder`.
        pairs: Given pairs; None makes them of fresh images, best and worst by reward (online DPO).
    """

    shown: ClassVar[tuple[str, ...]] = ("reward", "implicit_accuracy")

    def __init__(
        self,
        pipeline: BaseModel,
        reward_model: Reward,
        real: ImageSet,
        config: DPOConfig,
        folder: Path,
        pairs: Pairs | None,
    ) -> None:
        super().__init__(pipeline, reward_model, real, config, folder)
        set_scheduler(pipeline, config.scheduler)
        self.pairs = pairs
        self.coefficient = self.training_schedule.config.num_train_timesteps * config.beta_dpo
        if pairs is not None:
            self.inputs["pairs"] = fingerprint(pair_ids(pairs))
            self.run.config["pairs"] = self.inputs["pairs"]  # a checkpoint of other pairs is not gone on with
        self.mean_rewards: list[float] = []
        self.accuracy = 0.5

    def epoch(self, number: int) -> dict[str, float]:
        """Choose pairs, go through them `passes` times, one optimizer step a batch."""
        config = self.config
        self.usage.start()
        pairs, chosen, rewards = self.collect(number)
        margins: list[float] = []
        steps = []
        per_pass = -(-len(chosen) // config.batch_size)
        per_epoch = config.passes * per_pass
        for index in range(per_epoch):
            step = number * per_epoch + index
            rate = config.learning_rate * cosine_rate(step, config.epochs * per_epoch, config.warmup_steps)
            self.set_rate(rate)
            run, place = divmod(index, per_pass)
            shuffled = chosen[torch.randperm(len(chosen), generator=seeded(config.seed, PAIRS, number, run + 1))]
            batch = shuffled.split(config.batch_size)[place]
            generator = seeded(config.seed, TRAINING, number, index)
            seen, real = self.gather_gradients(pairs, batch, generator, step, rate)
            margins += seen
            steps.append((real, self.update(), rate))
        found = torch.tensor(gather_object(margins))
        real, norm, rate = (sum(column) / len(steps) for column in zip(*steps, strict=True))
        self.mean_rewards = [*self.mean_rewards[:number], float(rewards.mean())]
        self.accuracy = float(agreement_shares(found).mean())
        return {
            "loss": float(preference_losses(found).mean()) + config.beta * real,
            "real_loss": real,
            "implicit_accuracy": self.accuracy,
            "margin": float(found.mean()),
            "pairs": len(chosen),
            "reward": float(rewards.mean()),
            "gradient_norm": norm,
            "learning_rate": rate,
            **self.usage.figures(2 * len(found)),
        }

    def collect(self, number: int) -> tuple[Pairs, Tensor, Tensor]:
        """Pairs, the places of those that epoch `number` learns from, and rewards of fresh images.

        Raises:
            InputError: If fresh images shall make the pairs and all have the same reward.
        """
        config = self.config
        count = config.images_per_class if self.pairs is None else config.monitor_images_per_class
        images, class_ids, rewards = self.fresh(number, count)
        if self.pairs is not None:
            order = torch.randperm(len(self.pairs), generator=seeded(config.seed, PAIRS, number, 0))
            return self.pairs, class_turns(self.pairs.class_ids, order, config.pairs_per_epoch), rewards
        pairs = ranked_pairs(images, class_ids, rewards)
        if len(pairs) == 0:
            raise InputError(
                f"All {len(rewards)} rewards of epoch {number + 1} are {float(rewards.mean()):.4f} within their class: "
                "there is nothing to learn from. Look at the reward model's evaluation.json, or give `feedback`."
            )
        return pairs, class_turns(pairs.class_ids, torch.arange(len(pairs)), config.pairs_per_epoch), rewards

    @torch.no_grad()
    def fresh(self, number: int, images_per_class: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images of all classes by the averaged adapter, uint8, with their class ids and rewards.

        Raises:
            InputError: If a reward is not finite.
        """
        config = self.config
        class_ids = torch.arange(len(self.pipeline.class_names)).repeat(images_per_class)
        first = first_seed(config.seed, config.epochs, number)
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        parts = []
        with self.weights_of(self.average):
            for rows in micro_batches(torch.arange(len(class_ids)), config.sample_batch_size, process):
                ids, seeds = class_ids[rows], (first + rows).tolist()
                images = sample(self.pipeline, ids.tolist(), seeds, config.inference_steps, config.guidance_scale)
                rewards = self.rewards(to_pixel_values(images).to(self.device), ids.to(self.device)).cpu()
                parts.append((rows, images, rewards))
        rows, images, rewards = (torch.cat(column) for column in zip(*gather_object(parts), strict=True))
        order = rows.argsort()
        return images[order], class_ids, rewards[order]

    def gather_gradients(
        self, pairs: Pairs, batch: Tensor, generator: torch.Generator, step: int, rate: float
    ) -> tuple[list[float], float]:
        """Add up the gradients of one batch, this process's part of it.

        Args:
            pairs: All pairs.
            batch: Places of the batch's pairs.
            generator: Draws orientations, noise and timesteps of the whole batch, whatever the process's part.
            step: Optimizer step, from 0, for the message if the loss is no number.
            rate: Its learning rate, for the same.

        Returns:
            Margins of this process's pairs, and the real loss.
        """
        accelerator = self.accelerator
        places = torch.stack([pairs.chosen[batch], pairs.rejected[batch]])
        pixel_values = to_pixel_values(pairs.images[places.flatten()])
        if self.config.augment:
            pixel_values = random_orientations(pixel_values, generator)
        pixel_values = pixel_values.unflatten(0, places.shape)
        noise = torch.randn((len(batch), *self.conditioning.sample_shape), generator=generator)
        timesteps = evenly_spread(len(batch), self.training_schedule.config.num_train_timesteps, generator)
        class_ids = pairs.class_ids[batch]
        margins: list[float] = []
        process = (accelerator.process_index, accelerator.num_processes)
        for rows in micro_batches(torch.arange(len(batch)), self.config.micro_batch_size, process):
            found = self.margins(pixel_values[:, rows], class_ids[rows], noise[rows], timesteps[rows])
            loss = preference_losses(found).sum() / len(batch)
            require_finite(loss, step, rate)
            accelerator.backward(loss * accelerator.num_processes)
            margins += found.tolist()
        if self.config.beta == 0:
            return margins, 0.0
        with accelerator.autocast():
            real = self.real_loss(generator)
        require_finite(real, step, rate)
        accelerator.backward(self.config.beta * real)
        return margins, real.item()

    def margins(self, pixel_values: Tensor, class_ids: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Implicit margins of pairs, shape `(n,)`, with their graph.

        Args:
            pixel_values: Shape `(2, n, 3, size, size)`: chosen images, then rejected ones.
            class_ids: Shape `(n,)`.
            noise: Shape `(n, *sample_shape)`, the same for both images of a pair.
            timesteps: Shape `(n,)`, the same for both.
        """
        clean = self.conditioning.encode(pixel_values.flatten(0, 1).to(self.device))
        conditions = self.conditioning(class_ids.repeat(2).to(self.device))
        noise, timesteps = noise.to(clean).repeat(2, 1, 1, 1), timesteps.repeat(2).to(self.device)

        def errors() -> Tensor:
            with self.accelerator.autocast():
                losses = denoising_loss(self.unet, self.training_schedule, clean, conditions, noise, timesteps)
            return losses.view(2, -1)

        with torch.no_grad(), lora.disabled(self.unet):
            base_errors = errors()
        return implicit_margins(errors(), base_errors, self.coefficient)

    def extra_state(self) -> dict[str, Any]:
        """All else follows from the seed and the epoch."""
        return {**super().extra_state(), "mean_rewards": self.mean_rewards, "accuracy": self.accuracy}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        super().load_extra_state(state)
        self.mean_rewards, self.accuracy = list(state["mean_rewards"]), float(state["accuracy"])

    def metrics(self) -> dict[str, Any]:
        """Rewards of fresh images before each epoch, and how the last epoch's pairs were ordered."""
        metrics = {"mean_reward_by_epoch": self.mean_rewards, "implicit_accuracy": self.accuracy}
        return {**super().metrics(), **metrics}
