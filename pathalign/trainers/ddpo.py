"""DDPO: finetune an adapter by policy gradient on the rewards of the model's own images.

    loss = -E[ min(r A, clip(r, 1 +- c) A) ] + kl_weight * KL(policy || base) + beta * E_real[ L_denoise ]

A is the advantage of an image within its class, r the ratio of a denoising step's probabilities under the current
policy and the one that drew it. Log-probabilities and KL are means over pixels. Sources: DDPO (arXiv:2305.13301), PPO's
clipped ratio (arXiv:1707.06347, equation 7), group-relative advantages: GRPO (arXiv:2402.03300).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pathalign.artefacts import artefact
from pathalign.diffusion import lora
from pathalign.diffusion.ddim import DDIMPolicy
from pathalign.diffusion.denoiser import Denoiser
from pathalign.diffusion.loading import BaseModel
from pathalign.images import ImageSet, to_images, to_pixel_values
from pathalign.pinning import pinned
from pathalign.randomness import seeded
from pathalign.schema import InputError, RunRecord
from pathalign.settings.ddpo import DDPOConfig
from pathalign.trainers.adapter import SAMPLING, TRAINING, load_inputs
from pathalign.trainers.advantages import RunningStatistics, group_advantages
from pathalign.trainers.base import require_finite
from pathalign.trainers.epochs import first_seed
from pathalign.trainers.guarded import GuardedTrainer
from pathalign.trainers.rewards import AsynchronousRewards, Reward
from pathalign.trainers.rollout import Trajectories, choose_steps, roll_out

PROBED_STEPS = 16  # steps whose divergence is measured each epoch if it has no weight


def align(config: DDPOConfig, output_dir: str | Path) -> RunRecord:
    """Align a pipeline and write the adapter; the same call goes on where an interrupted one was.

    Raises:
        InputError: If an input cannot be used, a reward cannot be had or is no number, or the loss is none any more.
    """
    config = pinned(config)
    pipeline, reward_model, real = load_inputs(config)
    with artefact(output_dir) as folder:
        record = DDPOTrainer(pipeline, reward_model, real, config, folder).train()
    return record


def policy_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, estimator: str, clip_range: float) -> Tensor:
    """Loss whose gradient is a policy gradient; all of shape `(n,)`.

    Args:
        log_prob: Of the current policy, with gradient.
        old_log_prob: Of the policy that drew the steps.
        advantage: Of the images that the steps led to.
        estimator: `importance_sampling` (DDPO_IS: right for steps drawn by another policy, clipped) or
            `score_function` (DDPO_SF: right for steps of this very policy).
        clip_range: Half-width of the clip on the ratio.
    """
    if estimator == "score_function":
        return -advantage * log_prob
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantage, clipped * advantage)


def even_parts(count: int, largest: int) -> list[range]:
    """The numbers below `count` in as few parts of at most `largest` as there can be, of nearly the same size."""
    parts = -(-count // largest)
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]


def share_of(part: range, process: int, processes: int) -> range:
    """A process's share of a batch; shares differ by one at most, and may be empty."""
    count = len(part)
    return part[count * process // processes : count * (process + 1) // processes]


@dataclass(frozen=True)
class Batch:
    """One process's share of an epoch's images, and what is known of all of them.

    Attributes:
        trajectories: Of this process's images.
        advantages: Of the same images, shape `(n,)`, float32, on the CPU.
        rewards: Of all images, shape `(images,)`, float32.
        class_ids: Of all images.
    """

    trajectories: Trajectories
    advantages: Tensor
    rewards: Tensor
    class_ids: Tensor


class DDPOTrainer(GuardedTrainer[DDPOConfig]):
    """Epochs of drawing images with the current policy, scoring them and following the policy gradient."""

    def __init__(
        self,
        pipeline: BaseModel,
        reward_model: Reward,
        real: ImageSet,
        config: DDPOConfig,
        folder: Path,
    ) -> None:
        super().__init__(pipeline, reward_model, real, config, folder)
        self.policy = DDIMPolicy.from_config(pipeline.scheduler.config, config.inference_steps, config.eta)
        if not self.policy.stochastic_steps:
            raise InputError(
                f"None of the {config.inference_steps} denoising steps adds noise, so there is nothing to train; raise "
                "`inference_steps` or `eta`."
            )
        if config.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        if config.compile:
            self.unet.compile()
        self.denoiser = Denoiser(self.unet, self.conditioning, config.guidance_scale)
        self.statistics = RunningStatistics(len(pipeline.class_names), config.statistics_decay)
        self.reward_by_epoch: list[float] = []
        self.batches = even_parts(config.images_per_class * len(pipeline.class_names), config.batch_size)
        process = self.accelerator.process_index, self.accelerator.num_processes
        self.shares = [share_of(batch, *process) for batch in self.batches]

    def epoch(self, number: int) -> dict[str, float]:
        """Draw, score and update.

        Raises:
            InputError: If a reward cannot be had or is no number, all are equal at the start, or the loss is no number.
        """
        self.usage.start()
        rate = self.config.learning_rate * min(1.0, (number + 1) / (self.config.warmup_steps + 1))
        self.set_rate(rate)
        batch = self.collect(number)
        figures = self.learn(batch, number)
        require_finite(torch.tensor(figures["loss"]), number, rate)  # the same on all processes: none waits
        self.reward_by_epoch = [*self.reward_by_epoch[:number], float(batch.rewards.mean())]
        by_class = {
            f"reward_{name}": float(batch.rewards[batch.class_ids == class_id].mean())
            for class_id, name in enumerate(self.pipeline.class_names)
        }
        return {
            "reward": self.reward_by_epoch[number],
            "reward_std": float(batch.rewards.std(correction=0)),
            **by_class,
            **figures,
            "learning_rate": rate,
            **self.usage.figures(len(batch.rewards)),
        }

    def collect(self, number: int) -> Batch:
        """Images of every class by the current policy, with rewards and advantages; each epoch has its own seeds."""
        config = self.config
        count = len(self.pipeline.class_names)
        class_ids = torch.arange(count).repeat(config.images_per_class)
        steps = choose_steps(
            self.policy.stochastic_steps,
            len(class_ids),
            config.train_steps,
            config.train_step_choice,
            number,
            seeded(config.seed, SAMPLING, number),
        )
        own = torch.tensor([row for share in self.shares for row in share], dtype=torch.int64)
        trajectories = Trajectories.allocate(
            class_ids[own],
            steps[own],
            len(self.policy.timesteps),
            self.conditioning.sample_shape,
            self.unet.dtype,
            self.device if config.trajectory_device == "same" else torch.device("cpu"),
        )
        first = first_seed(config.seed, config.epochs, number)
        with AsynchronousRewards(self.score) as scores:
            self.draw(trajectories, [first + row for row in own.tolist()], scores)
            rewards = self.gathered(own, scores, number)
        if number == 0 and float(rewards.max() - rewards.min()) < 1e-4:
            raise InputError(
                f"All {len(rewards)} rewards of the first epoch are about {float(rewards.mean()):.4f}: there is "
                "nothing to learn from. Look at the reward model's evaluation.json, or grade more images."
            )
        if config.baseline == "group":
            advantages = group_advantages(rewards, class_ids, config.group_size)
        else:
            self.statistics.update(rewards, class_ids)
            advantages = self.statistics.advantages(rewards, class_ids)
        advantages = advantages.clamp(-config.advantage_clip, config.advantage_clip)
        return Batch(trajectories, advantages[own], rewards, class_ids)

    def draw(self, trajectories: Trajectories, seeds: list[int], scores: AsynchronousRewards[Tensor]) -> None:
        """Fill the trajectories; a finished part is scored while the next one is drawn."""
        merging = lora.merged(self.unet) if self.config.merge_adapter else nullcontext()
        size = self.config.sample_batch_size
        with merging, torch.no_grad(), self.accelerator.autocast():
            for start in range(0, len(seeds), size):
                part = slice(start, start + size)
                sample = roll_out(self.denoiser, self.policy, trajectories, part, seeds[part])
                images = to_images(self.conditioning.decode(sample).float())
                class_ids = trajectories.class_ids[part].to(self.device)
                scores.submit(to_pixel_values(images), class_ids)

    def score(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        """Rewards of images as they would be saved, with 8 bits a channel; shape `(n,)`, float32, on the CPU."""
        return self.rewards(pixel_values, class_ids).float().cpu()

    def gathered(self, own: Tensor, scores: AsynchronousRewards[Tensor], number: int) -> Tensor:
        """Rewards of all processes' images, in their order.

        Raises:
            InputError: If one failed or is no number, on any process; a checkpoint is written before.
        """
        values: list[float] = []
        problem, cause = "", None
        try:
            values = [value for part in scores.results() for value in part.tolist()]
        except Exception as error:
            problem, cause = f"the reward failed ({type(error).__name__}: {error})", error
        parts = gather_object([(own.tolist(), values, problem)])
        problems = [text for _, _, text in parts if text]
        if problems:
            self.save(number)
            raise InputError(
                f"In epoch {number + 1} {problems[0]}. The {number} epochs before are kept in a checkpoint: mend or "
                f"replace {self.config.reward_model}, and run the same command again."
            ) from cause
        rewards = torch.empty(sum(len(rows) for rows, _, _ in parts))
        for rows, values, _ in parts:
            rewards[torch.tensor(rows, dtype=torch.int64)] = torch.tensor(values)
        return rewards

    def learn(self, batch: Batch, number: int) -> dict[str, float]:
        """Optimizer steps on an epoch's images; returns what there is to log of them."""
        figures: dict[str, list[Tensor]] = defaultdict(list)
        norms: list[float] = []
        starts = torch.tensor([0, *(len(share) for share in self.shares)]).cumsum(0).tolist()
        for inner_epoch in range(self.config.inner_epochs):
            generator = seeded(self.config.seed, TRAINING, number, inner_epoch)
            for index in torch.randperm(len(self.batches), generator=generator).tolist():
                images = torch.arange(starts[index], starts[index + 1])
                scale = self.accelerator.num_processes / len(self.batches[index]) / batch.trajectories.steps.shape[1]
                self.accumulate(batch, images, scale, figures, on_policy=not norms)
                if self.config.beta > 0:
                    figures["real_loss"].append(self.real_term(generator))
                norms.append(self.update(self.config.largest_gradient_norm))
        return {**self.summary(figures), "gradient_norm": sum(norms) / len(norms)}

    def accumulate(
        self, batch: Batch, images: Tensor, scale: float, figures: dict[str, list[Tensor]], on_policy: bool
    ) -> None:
        """Gradients of one optimizer step, in micro-batches of denoising steps.

        Args:
            batch: The epoch's images.
            images: Which of this process's images are trained on.
            scale: Weight of each denoising step, so that all processes' steps have the mean as their loss.
            figures: What there is to log is appended to these.
            on_policy: Whether the policy is still the one that drew. Its own log-probabilities are the old ones then,
                so that the ratio is exactly 1: those from sampling differ by rounding (merged adapter, batch size).
        """
        config, trajectories = self.config, batch.trajectories
        chosen = trajectories.steps.shape[1]
        pairs = torch.cartesian_prod(images, torch.arange(chosen)).view(-1, 2)
        for rows, columns in (part.unbind(dim=1) for part in pairs.split(config.micro_batch_size)):
            if not len(rows):  # this process has no share in the batch
                continue
            sample, next_sample = trajectories.pairs(rows, columns, self.device)
            inputs = sample, self.policy.timesteps[trajectories.steps[rows, columns]].to(self.device)
            steps, class_ids = trajectories.steps[rows, columns], trajectories.class_ids[rows].to(self.device)
            measured = len(rows) if config.kl_weight > 0 else 0 if figures["kl"] else min(len(rows), PROBED_STEPS)
            with self.accelerator.autocast():
                reference = self.reference(*inputs, class_ids, measured)
                output = self.denoiser(*inputs, class_ids)
            log_prob = self.policy.log_prob(next_sample, sample, output, steps)
            old = trajectories.log_probs[rows, columns].to(self.device)
            if on_policy:
                figures["sampling_error"].append((log_prob.detach() - old).abs())
                old = log_prob.detach()
                trajectories.log_probs[rows, columns] = old.float().cpu()
            advantage = batch.advantages[rows].to(self.device)
            losses = policy_loss(log_prob, old, advantage, config.estimator, config.clip_range)
            mean = self.policy.mean(sample[:measured], output[:measured], steps[:measured])
            divergence = self.policy.divergence(
                mean, self.policy.mean(sample[:measured], reference, steps[:measured]), steps[:measured]
            )
            if config.kl_weight > 0:
                losses = losses + config.kl_weight * divergence
            self.accelerator.backward(losses.sum() * scale)
            figures["kl"].append(divergence.detach())
            figures["loss"].append(losses.detach())
            figures["ratio"].append((log_prob.detach() - old).exp())

    @torch.no_grad()
    def reference(self, sample: Tensor, timesteps: Tensor, class_ids: Tensor, count: int) -> Tensor:
        """Output of the base model, without adapter, for the first `count` samples."""
        if count == 0:
            return sample[:0]
        return self.denoiser.reference(sample[:count], timesteps[:count], class_ids[:count])

    def real_term(self, generator: torch.Generator) -> Tensor:
        """Gradient of the denoising loss on real images, added to the policy's; returns the loss, shape `(1,)`."""
        with self.accelerator.autocast():
            loss = self.real_loss(generator)
        self.accelerator.backward(self.config.beta * loss)
        return loss.detach()[None]

    def summary(self, figures: Mapping[str, list[Tensor]]) -> dict[str, float]:
        """Means and largest values over the steps of all processes."""
        own = {name: torch.cat(values).tolist() for name, values in figures.items() if values}
        parts = gather_object([own])
        pooled = {
            name: torch.tensor([value for part in parts for value in part.get(name, [])])
            for name in ("loss", "real_loss", "kl", "ratio", "sampling_error")
        }
        deviation = (pooled["ratio"] - 1).abs()
        real = float(pooled["real_loss"].mean()) if self.config.beta > 0 else 0.0
        return {
            "loss": float(pooled["loss"].mean()) + self.config.beta * real,
            "real_loss": real,
            "kl": float(pooled["kl"].mean()),
            "ratio_mean": float(pooled["ratio"].mean()),
            "ratio_deviation": float(deviation.max()),
            "clip_share": float((deviation > self.config.clip_range).float().mean()),
            "sampling_error": float(pooled["sampling_error"].max()),
        }

    def extra_state(self) -> dict[str, Any]:
        """The statistics of the classes, and the rewards so far."""
        own = {"statistics": self.statistics.moments, "reward_by_epoch": self.reward_by_epoch}
        return {**super().extra_state(), **own}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        super().load_extra_state(state)
        self.statistics.moments, self.reward_by_epoch = state["statistics"], state["reward_by_epoch"]

    def metrics(self) -> dict[str, Any]:
        """Mean reward of each epoch's images."""
        return {**super().metrics(), "reward_by_epoch": self.reward_by_epoch}
