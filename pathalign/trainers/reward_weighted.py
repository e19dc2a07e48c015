"""Reward-weighted denoising: finetune an adapter on the model's own images, weighted by their rewards.

    loss = E_synthetic[ w(R(x, c)) * L_denoise ] + beta * E_real[ L_denoise ]

Source: "Aligning Synthetic Medical Images with Clinical Knowledge using Human Feedback" (arXiv:2306.12438), where w
is the reward itself; other forms of w are in `weighting.py`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from diffusers import DDIMScheduler
from torch import Tensor

from pathalign.artefacts import artefact, fingerprint
from pathalign.augment import random_orientations
from pathalign.cards import Grading, write_card
from pathalign.diffusion import lora
from pathalign.diffusion.conditioning import ClassConditioning
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.generate import Sampling, draw, load_pipeline, scratch_dir, set_scheduler
from pathalign.images import ImageSet, to_pixel_values
from pathalign.progress import Progress, say
from pathalign.randomness import seeded
from pathalign.reward import RewardModel
from pathalign.schema import InputError, RunRecord, peak_rss_mb
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.trainers.base import RunFolder, accelerator_for, cosine_rate, require_finite
from pathalign.trainers.pretrain import denoising_loss, evenly_spread, noisy_and_target
from pathalign.trainers.weighting import contrastive_loss, reward_weights

ADAPTER, TRAINING = 0, 1  # streams of random numbers
FIRST_SEED, SEEDS_PER_ROUND = 2**31, 2**20  # beyond the seeds of candidate sets; torch uses 32 bits of a seed


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
    pipeline = load_pipeline(config.base_model, config.base_revision)
    reward_model = RewardModel.from_pretrained(config.reward_model)
    real = ImageSet.load(config.data, "train")
    if list(real.class_names) != pipeline.class_names:
        raise InputError(
            f"{config.data} has the classes {list(real.class_names)}, {config.base_model} has {pipeline.class_names}; "
            "use the data that the base model was trained on."
        )
    if real.image_size_px != pipeline.unet.config.sample_size:
        raise InputError(
            f"{config.data} has images of {real.image_size_px} px, {config.base_model} draws "
            f"{pipeline.unet.config.sample_size} px; use the data that the base model was trained on."
        )
    unknown = sorted(set(pipeline.class_names) - set(reward_model.config.class_names))
    if unknown:
        raise InputError(
            f"{config.reward_model} does not know the classes {unknown} of {config.base_model}; it was trained on "
            f"{list(reward_model.config.class_names)}. Use a reward model trained on feedback about this base model."
        )
    with artefact(output_dir) as folder:
        record = RewardWeightedTrainer(pipeline, reward_model, real, config, folder).train()
    return record


class RewardWeightedTrainer:
    """Rounds of drawing images with the current adapter, scoring them and training on them."""

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        reward_model: RewardModel,
        real: ImageSet,
        config: RewardWeightedConfig,
        folder: Path,
    ) -> None:
        self.pipeline, self.config, self.folder, self.real = pipeline, config, folder, real
        self.accelerator = accelerator_for(config.mixed_precision, config.trackers, folder)
        self.device = self.accelerator.device
        pipeline.to(self.device)
        self.reward_model = reward_model.to(self.device).eval()
        self.training_schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
        set_scheduler(pipeline, config.scheduler)
        self.conditioning = ClassConditioning(pipeline)
        lora.attach(
            pipeline.unet, config.lora_rank, config.lora_alpha, config.lora_convolutions, seeded(config.seed, ADAPTER)
        )
        self.parameters = list(lora.parameters(pipeline.unet).values())
        optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.unet, self.optimizer = self.accelerator.prepare(pipeline.unet, optimizer)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.sampled_with = [parameter.detach().clone() for parameter in self.parameters]
        self.real_pixel_values = real.pixel_values()
        inputs = {"base_model": config.base_model, "reward_model": config.reward_model}
        self.inputs = {name: fingerprint(Path(path)) if Path(path).is_dir() else path for name, path in inputs.items()}
        self.inputs["data"] = fingerprint(list(real.image_ids))
        self.run = RunFolder(folder, self.accelerator, {**asdict(config), **self.inputs}, config.trackers)
        self.mean_rewards: list[float] = []
        self.best: dict[str, Any] = {"reward": -float("inf"), "weights": self.average}
        self.setbacks = 0

    def train(self) -> RunRecord:
        """Run all rounds that are left, then write the adapter."""
        started = time.monotonic()
        step = self.resume()
        total = self.config.rounds * self.config.steps_per_round
        while step < total:
            number = step // self.config.steps_per_round
            batch = self.begin_round(number) if step % self.config.steps_per_round == 0 else self.collect(number)
            with Progress(f"align, round {number + 1}/{self.config.rounds}", total, done=step) as progress:
                while step < (number + 1) * self.config.steps_per_round:
                    figures = self.step(step, batch)
                    step += 1
                    self.run.log(step, round=number + 1, **figures)
                    if step % self.config.checkpoint_every_steps == 0 and step < total:
                        self.save(step)
                    progress.update(loss=figures["loss"], reward=float(batch.rewards.mean()))
        return self.finish(time.monotonic() - started)

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
        """Go on from these weights: they draw, and they are the average so far."""
        for held in ([parameter.data for parameter in self.parameters], self.average, self.sampled_with):
            torch._foreach_copy_(held, weights)

    def collect(self, number: int) -> Batch:
        """Draw images with the weights in `sampled_with`, and score them.

        Raises:
            InputError: If a reward is no number.
        """
        config = self.config
        count = len(self.pipeline.class_names)
        class_ids = torch.arange(count).repeat(config.images_per_class)
        first_seed = FIRST_SEED + (config.seed * (config.rounds + 1) + number) * SEEDS_PER_ROUND % FIRST_SEED
        sampling = Sampling(config.inference_steps, config.guidance_scale, config.sample_batch_size, first_seed)
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        scratch = scratch_dir(self.folder, [asdict(config), self.inputs, number, self.setbacks])
        with self.weights_of(self.sampled_with):
            parts = draw(self.pipeline, self.reward_model, class_ids.tolist(), sampling, scratch, process)
        parts = sorted(gather_object(parts), key=lambda part: int(part["start"]))
        rewards = torch.tensor([reward for part in parts for reward in part["rewards"]])
        self.mean_rewards = [*self.mean_rewards[:number], float(rewards.mean())]
        if not torch.isfinite(rewards).all():
            raise InputError(f"{self.config.reward_model} gives rewards that are no numbers; train it again.")
        when = f"before round {number + 1}" if number < config.rounds else "at the end"
        say(f"Mean reward {when}: {float(rewards.mean()):.3f} of {len(rewards)} images.")
        return Batch(
            images=torch.cat([part["images"] for part in parts]),
            class_ids=class_ids,
            rewards=rewards,
            weights=reward_weights(rewards, class_ids, config),
        )

    def weights_of(self, weights: list[Tensor]) -> _Weights:
        """Context in which the adapter has other weights."""
        return _Weights(self.parameters, weights)

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        """One optimizer step on synthetic and real images."""
        config = self.config
        total = config.rounds * config.steps_per_round
        rate = config.learning_rate * 0.5**self.setbacks * cosine_rate(step, total, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = seeded(config.seed, TRAINING, step)
        with self.accelerator.autocast():
            synthetic = self.synthetic_loss(batch, generator)
            real = self.real_loss(generator) if config.beta > 0 else torch.zeros((), device=self.device)
            loss = synthetic + config.beta * real
        require_finite(loss, step, rate)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, [parameter.data for parameter in self.parameters], 1 - config.ema_decay)
        return {
            "loss": loss.item(),
            "synthetic_loss": synthetic.item(),
            "real_loss": real.item(),
            "gradient_norm": float(norm) if norm is not None else float("nan"),
            "learning_rate": rate,
            "mean_reward": float(batch.rewards.mean()),
        }

    def synthetic_loss(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """The reward-weighted term."""
        index = torch.randint(
            0, len(batch.images), (self.config.batch_size * self.accelerator.num_processes,), generator=generator
        )
        clean, class_ids, noise, timesteps = self.noised(
            to_pixel_values(batch.images[index]), batch.class_ids[index], generator
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

    def real_loss(self, generator: torch.Generator) -> Tensor:
        """Denoising loss on real training images."""
        count = self.config.real_batch_size * self.accelerator.num_processes
        index = torch.randint(0, len(self.real), (count,), generator=generator)
        clean, class_ids, noise, timesteps = self.noised(
            self.real_pixel_values[index], self.real.class_ids[index], generator
        )
        conditions = self.conditioning(class_ids)
        return denoising_loss(self.unet, self.training_schedule, clean, conditions, noise, timesteps).mean()

    def noised(
        self, pixel_values: Tensor, class_ids: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's images (turned at random), classes, noise and timesteps; timesteps are spread evenly."""
        images = random_orientations(pixel_values, generator)
        noise = torch.randn(images.shape, generator=generator)
        timesteps = evenly_spread(len(images), self.training_schedule.config.num_train_timesteps, generator)
        return self.own(images), self.own(class_ids), self.own(noise), self.own(timesteps)

    def own(self, values: Tensor) -> Tensor:
        """This process's part of a global batch, on its device."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index].to(self.device)

    def save(self, step: int) -> None:
        """Write a checkpoint with all that an exact resume needs; the round's images lie beside it."""
        state = {
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
            "average": self.average,
            "sampled_with": self.sampled_with,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            "mean_rewards": self.mean_rewards,
            "best": self.best,
            "setbacks": self.setbacks,
        }
        self.run.save(step, state)

    def resume(self) -> int:
        """Load the newest checkpoint; returns the step to go on with."""
        state = self.run.load()
        if state is None:
            return 0
        torch._foreach_copy_([parameter.data for parameter in self.parameters], state["parameters"])
        torch._foreach_copy_(self.average, state["average"])
        torch._foreach_copy_(self.sampled_with, state["sampled_with"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.mean_rewards, self.best, self.setbacks = state["mean_rewards"], state["best"], state["setbacks"]
        return int(state["step"])

    def finish(self, wall_s: float) -> RunRecord:
        """Write the averaged adapter, or the best one if the last round did harm, with its card and record."""
        self.use(self.average)
        if self.did_harm(self.collect(self.config.rounds)):
            say("The last round did harm: the best adapter before it is kept.")
            self.use(self.best["weights"])
        record = RunRecord(
            stage="align",
            config=asdict(self.config),
            inputs=self.inputs,
            seeds={"seed": self.config.seed},
            metrics={
                "mean_reward_by_round": self.mean_rewards,  # of fresh samples, before each round and at the end
                "setbacks": self.setbacks,
                "adapter_parameters": sum(parameter.numel() for parameter in self.parameters),
            },
            wall_s=wall_s,
            peak_rss_mb=peak_rss_mb(),
        )
        if self.accelerator.is_main_process:
            lora.save(self.accelerator.unwrap_model(self.unet), self.folder)
            write_card(
                self.folder,
                "lora_adapter",
                record,
                grading=Grading(**(self.reward_model.config.grading or {"simulated": False})),
                base_model=self.config.base_model,
                class_names=self.pipeline.class_names,
            )
            record.save(self.folder)
        self.run.close()
        self.accelerator.wait_for_everyone()
        return record


class _Weights:
    """Swaps the values of parameters for the time of a block."""

    def __init__(self, parameters: list[torch.nn.Parameter], weights: list[Tensor]) -> None:
        self.data, self.weights = [parameter.data for parameter in parameters], weights

    def __enter__(self) -> None:
        self.kept = [values.clone() for values in self.data]
        torch._foreach_copy_(self.data, self.weights)

    def __exit__(self, *_: object) -> None:
        torch._foreach_copy_(self.data, self.kept)
