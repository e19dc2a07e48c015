"""Reward-weighted denoising: finetune an adapter on the model's own images, weighted by their rewards.

    loss = E_synthetic[ w(R(x, c)) * L_denoise ] + beta * E_real[ L_denoise ]

Source: "Aligning Synthetic Medical Images with Clinical Knowledge using Human Feedback" (arXiv:2306.12438), where w
is the reward itself; other forms of w are in `weighting.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pathalign.artefacts import artefact
from pathalign.diffusion.loading import BaseModel
from pathalign.generate import Sampling, draw, set_scheduler
from pathalign.images import ImageSet, to_pixel_values
from pathalign.pinning import pinned
from pathalign.progress import say
from pathalign.randomness import seeded
from pathalign.schema import InputError, RunRecord
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.shards import scratch_dir
from pathalign.trainers.adapter import TRAINING, AdapterTrainer, load_inputs
from pathalign.trainers.base import cosine_rate, require_finite
from pathalign.trainers.epochs import first_seed
from pathalign.trainers.pretrain import denoising_loss, noisy_and_target
from pathalign.trainers.rewards import Reward
from pathalign.trainers.weighting import contrastive_loss, reward_weights


@dataclass(frozen=True)
class Batch:
    """Images of one round.

    Attributes:
        images: Shape `(n, 3, size, size)`, uint8.
        class_ids: Shape `(n,)`, int64.
        rewards: Shape `(n,)`, float32 in [0, 1].
        weights: Shape `(n,)`, float32; of `contrastive` the share r in [0, 1], else a factor of the loss.
    """

    images: Tensor
    class_ids: Tensor
    rewards: Tensor
    weights: Tensor


def align(config: RewardWeightedConfig, output_dir: str | Path) -> RunRecord:
    """Align a pipeline and write the adapter; the same call goes on where an interrupted one was.

    Raises:
        InputError: If an input cannot be used, all rewards of a round are equal, or the loss is no number any more.
    """
    config = pinned(config)
    pipeline, reward_model, real = load_inputs(config)
    with artefact(output_dir) as folder:
        record = RewardWeightedTrainer(pipeline, reward_model, real, config, folder).train()
    return record


class RewardWeightedTrainer(AdapterTrainer[RewardWeightedConfig]):
    """Rounds of drawing images with the current adapter, scoring them and training on them."""

    def __init__(
        self,
        pipeline: BaseModel,
        reward_model: Reward,
        real: ImageSet,
        config: RewardWeightedConfig,
        folder: Path,
    ) -> None:
        super().__init__(pipeline, reward_model, real, config, folder)
        set_scheduler(pipeline, config.scheduler)
        self.sampled_with = [weights.clone() for weights in self.average]
        self.batch: Batch | None = None
        self.mean_rewards: list[float] = []
        self.best: dict[str, Any] = {"reward": -float("inf"), "weights": self.average}
        self.setbacks = 0

    @property
    def total(self) -> int:
        """Optimizer steps of all rounds."""
        return self.config.rounds * self.config.steps_per_round

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step on synthetic and real images; the first of a round draws the images."""
        config = self.config
        self.usage.start()
        round_number = number // config.steps_per_round
        if number % config.steps_per_round == 0:
            self.batch = self.begin_round(round_number)
        elif self.batch is None:  # resumed
            self.batch = self.collect(round_number)
        rate = config.learning_rate * 0.5**self.setbacks * cosine_rate(number, self.total, config.warmup_steps)
        self.set_rate(rate)
        generator = seeded(config.seed, TRAINING, number)
        with self.accelerator.autocast():
            synthetic = self.synthetic_loss(self.batch, generator)
            real = self.real_loss(generator) if config.beta > 0 else torch.zeros((), device=self.device)
            loss = synthetic + config.beta * real
        require_finite(loss, number, rate)
        self.accelerator.backward(loss)
        norm = self.update()
        return {
            "round": round_number + 1,
            "loss": loss.item(),
            "synthetic_loss": synthetic.item(),
            "real_loss": real.item(),
            "gradient_norm": norm,
            "learning_rate": rate,
            "mean_reward": float(self.batch.rewards.mean()),
            **self.usage.figures(config.batch_size),
        }

    def begin_round(self, number: int) -> Batch:
        """The averaged adapter draws, and training goes on from it, unless the last round did harm.

        If it did, the best weights come back, the optimizer forgets, and the rest goes on at half the learning rate.

        Raises:
            InputError: If all rewards are equal: there is nothing to learn from.
        """
        self.use(self.average)
        batch = self.collect(number)
        if float(batch.rewards.std()) < 1e-4:
            raise InputError(
                f"All {len(batch.rewards)} rewards of round {number + 1} are about {float(batch.rewards.mean()):.4f}: "
                "there is nothing to learn from. Look at the reward model's evaluation.json, or grade more images."
            )
        mean = float(batch.rewards.mean())
        if self.did_harm(batch):
            say(f"Round {number} did harm: it is undone, and the learning rate halved.")
            self.setbacks += 1
            self.use(self.best["weights"])
            self.optimizer.state.clear()
            batch = self.collect(number)
        elif mean > self.best["reward"]:
            self.best = {"reward": mean, "weights": [weights.clone() for weights in self.average]}
        return batch

    def did_harm(self, batch: Batch) -> bool:
        """Whether the mean reward lies more than its standard error below the best of the rounds before."""
        error = float(batch.rewards.std()) / len(batch.rewards) ** 0.5
        return float(batch.rewards.mean()) < float(self.best["reward"]) - error

    def use(self, weights: list[Tensor]) -> None:
        """Go on from these weights, and draw with them."""
        super().use(weights)
        torch._foreach_copy_(self.sampled_with, weights)

    def collect(self, number: int) -> Batch:
        """Draw images with the weights in `sampled_with`, and score them.

        Raises:
            InputError: If a reward is no number, or negative where it is itself the weight.
        """
        config = self.config
        count = len(self.pipeline.class_names)
        class_ids = torch.arange(count).repeat(config.images_per_class)
        first = first_seed(config.seed, config.rounds, number)
        sampling = Sampling(config.inference_steps, config.guidance_scale, config.sample_batch_size, first)
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        scratch = scratch_dir(self.folder, [asdict(config), self.inputs, number, self.setbacks])
        with self.weights_of(self.sampled_with), self.accelerator.autocast():
            parts = draw(self.pipeline, self.reward_model, class_ids.tolist(), sampling, scratch, process)
        parts = sorted(gather_object(parts), key=lambda part: int(part["start"]))
        rewards = torch.tensor([reward for part in parts for reward in part["rewards"]])
        self.mean_rewards = [*self.mean_rewards[:number], float(rewards.mean())]
        if not torch.isfinite(rewards).all():
            raise InputError(f"{self.config.reward_model} gives rewards that are no numbers; train it again.")
        if self.config.weighting in ("reward", "normalized") and float(rewards.min()) < 0:
            raise InputError(
                f"{self.config.reward_model} gives rewards below 0 (the least is {float(rewards.min()):.3g}), but with "
                f"`weighting: {self.config.weighting}` rewards are weights. Use `weighting: advantage`."
            )
        when = f"before round {number + 1}" if number < config.rounds else "at the end"
        say(f"Mean reward {when}: {float(rewards.mean()):.3f} of {len(rewards)} images.")
        return Batch(
            images=torch.cat([part["images"] for part in parts]),
            class_ids=class_ids,
            rewards=rewards,
            weights=reward_weights(rewards, class_ids, config),
        )

    def synthetic_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The reward-weighted term."""
        index = torch.randint(
            0, len(batch.images), (self.config.batch_size * self.accelerator.num_processes,), generator=generator
        )
        clean, class_ids, noise, timesteps = self.noised(
            to_pixel_values(batch.images[index]), batch.class_ids[index], generator, self.config.noise_share
        )
        weights = self.own(batch.weights[index])
        conditions = self.conditioning(class_ids)
        if self.config.weighting != "contrastive":
            losses = denoising_loss(self.unet, self.training_schedule, clean, conditions, noise, timesteps)
            return (weights * losses).mean()
        noisy, target = noisy_and_target(self.training_schedule, clean, noise, timesteps)
        with torch.no_grad(), self.weights_of(self.sampled_with):
            old_prediction = self.pipeline.unet(noisy, timesteps, **conditions).sample.float()
        prediction = self.unet(noisy, timesteps, **conditions).sample.float()
        return contrastive_loss(prediction, old_prediction, target, weights, self.config.contrast).mean()

    def extra_state(self) -> dict[str, Any]:
        """The round's images are not in it: they lie beside the checkpoint."""
        return {
            "sampled_with": self.sampled_with,
            "mean_rewards": self.mean_rewards,
            "best": self.best,
            "setbacks": self.setbacks,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        torch._foreach_copy_(self.sampled_with, state["sampled_with"])
        self.mean_rewards, self.best, self.setbacks = state["mean_rewards"], state["best"], state["setbacks"]

    def metrics(self) -> dict[str, Any]:
        """Rewards of fresh samples, before each round and at the end; a last round that did harm is undone."""
        self.use(self.average)
        if self.did_harm(self.collect(self.config.rounds)):
            say("The last round did harm: the best adapter before it is kept.")
            self.use(self.best["weights"])
        return {"mean_reward_by_round": self.mean_rewards, "setbacks": self.setbacks}
