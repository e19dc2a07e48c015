"""What every trainer of adapters shares: inputs, LoRA weights and their average, the loop, exact resume, the result.

A trainer adds `step`, what one unit of its progress does, and `extra_state`, what a resume needs beyond the weights.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pathalign.artefacts import fingerprint
from pathalign.augment import random_orientations
from pathalign.cards import Grading, write_card
from pathalign.diffusion import lora
from pathalign.diffusion.conditioning import conditioning_for
from pathalign.diffusion.loading import BaseModel, image_size_px, load_base
from pathalign.diffusion.pipeline import base_hash
from pathalign.diffusion.prompted import PromptPipeline
from pathalign.images import ImageSet
from pathalign.progress import Progress
from pathalign.randomness import seeded
from pathalign.remote import parse
from pathalign.schema import InputError, RunRecord, peak_rss_mb
from pathalign.settings.adapter import AdapterConfig
from pathalign.trainers.base import RunFolder, accelerator_for, with_precision
from pathalign.trainers.pretrain import denoising_loss, evenly_spread
from pathalign.trainers.rewards import Reward, identity, load_rewards
from pathalign.trainers.usage import Usage

ADAPTER, TRAINING, SAMPLING = 0, 1, 2  # streams of random numbers


def load_inputs(config: AdapterConfig) -> tuple[BaseModel, Reward, ImageSet]:
    """Pipeline, rewards and real images, checked against each other before anything is drawn.

    Raises:
        InputError: If one cannot be loaded, or they do not fit together.
    """
    real = ImageSet.load(config.data, "train")
    pipeline = load_base(config.base_model, config.base_revision, real.class_names, config.prompt)
    reward_model = load_rewards(config, pipeline.class_names)
    if list(real.class_names) != pipeline.class_names:
        raise InputError(
            f"{config.data} has the classes {list(real.class_names)}, {config.base_model} has {pipeline.class_names}; "
            "use the data that the base model was trained on."
        )
    size = image_size_px(pipeline)
    if real.image_size_px != size:
        raise InputError(
            f"{config.data} has images of {real.image_size_px} px, {config.base_model} draws {size} px; make data of "
            f"its size with `pathalign data --image-size-px {size}`."
        )
    return pipeline, reward_model, real


Config = TypeVar("Config", bound=AdapterConfig)


class AdapterTrainer(ABC, Generic[Config]):
    """Trains LoRA weights of a pipeline's UNet; the base weights never change.

    Args:
        pipeline: Moved to the device; gets the adapter.
        reward_model: P(plausible | image, class), or what stands in its place, see `rewards.py`.
        real: Real training images, for the real term.
        config: Settings of the method.
        folder: Working folder of the artefact: log, checkpoints and, in the end, the adapter.
    """

    unit: ClassVar[str] = "step"  # what is counted, logged and checkpointed
    shown: ClassVar[tuple[str, ...]] = ("loss", "mean_reward")  # figures on the progress bar

    def __init__(
        self,
        pipeline: BaseModel,
        reward_model: Reward,
        real: ImageSet,
        config: Config,
        folder: Path,
    ) -> None:
        self.pipeline, self.folder, self.real = pipeline, folder, real
        self.config = config = with_precision(config)
        self.accelerator = accelerator_for(config.mixed_precision, config.trackers, folder)
        self.device = self.accelerator.device
        pipeline.to(self.device)
        self.reward_model = reward_model.to(self.device).eval()
        self.training_schedule = DDIMScheduler.from_config(pipeline.scheduler.config)
        self.conditioning = conditioning_for(pipeline)
        self.attach()
        self.parameters = list(lora.parameters(pipeline.unet).values())
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(self.parameter_groups(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
        )
        self.unet = pipeline.unet
        self.usage = Usage(self.unet, config, self.device)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.real_pixel_values = real.pixel_values()
        self.inputs = {name: identity(source) for name, source in self.sources().items()}
        self.inputs["base_unet"] = base_hash(pipeline.unet)
        self.inputs["data"] = fingerprint(list(real.image_ids))
        self.run = RunFolder(folder, self.accelerator, {**asdict(config), **self.inputs}, config.trackers)

    def attach(self) -> None:
        """Add the adapter whose weights are trained; at first it changes nothing."""
        config, generator = self.config, seeded(self.config.seed, ADAPTER)
        lora.attach(self.pipeline.unet, config.lora_rank, config.lora_alpha, config.lora_convolutions, generator)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains, with a `multiple` of the learning rate where it is another."""
        return [{"params": self.parameters}]

    def sources(self) -> dict[str, str]:
        """Models that the run rests on, by name: folders, Hub ids or functions."""
        base = parse(self.config.base_model, self.config.base_revision)
        return {"base_model": str(base), "reward_model": self.config.reward_model}

    @property
    @abstractmethod
    def total(self) -> int:
        """Units of the whole run."""

    @abstractmethod
    def step(self, number: int) -> dict[str, float]:
        """Do unit `number`, from 0, and return the figures to log."""

    @abstractmethod
    def metrics(self) -> dict[str, Any]:
        """What the run record says of the result; called once, at the end, and may still choose other weights."""

    def extra_state(self) -> dict[str, Any]:
        """What a resume needs beyond weights, average and optimizer; plain values and tensors."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""

    def train(self) -> RunRecord:
        """Do all units that are left, then write the adapter."""
        started = time.monotonic()
        number = self.resume()
        with Progress("align", self.total, done=number, unit=self.unit) as progress:
            while number < self.total:
                figures = self.step(number)
                number += 1
                self.run.log(number, **figures)
                if number % self.config.checkpoint_every_steps == 0 and number < self.total:
                    self.save(number)
                progress.update(1, **{name: figures[name] for name in self.shown if name in figures})
        return self.finish(started)

    def update(self, largest_norm: float = 1.0) -> float:
        """One optimizer step on the gradients that `backward` gathered; the average follows. Returns their norm."""
        self.reduce_gradients()
        norm = self.accelerator.clip_grad_norm_(self.parameters, largest_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, [parameter.data for parameter in self.parameters], 1 - self.config.ema_decay)
        return float(norm) if norm is not None else float("nan")

    def reduce_gradients(self) -> None:
        """Mean of the processes' gradients: LoRA's are small, so that one message carries them all.

        Each process's loss is its own share of the global batch times the number of processes, so that the mean is the
        gradient of the global batch even if shares are uneven.
        """
        if self.accelerator.num_processes == 1:
            return
        gradients = [
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in self.parameters
        ]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for parameter, part in zip(self.parameters, flat.split([g.numel() for g in gradients]), strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def set_rate(self, rate: float) -> None:
        """Learning rate of the next updates; a group may have a multiple of it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("multiple", 1.0)

    def use(self, weights: list[Tensor]) -> None:
        """Go on from these weights: they draw, and they are the average so far."""
        for held in ([parameter.data for parameter in self.parameters], self.average):
            torch._foreach_copy_(held, weights)

    @contextmanager
    def weights_of(self, weights: list[Tensor]) -> Iterator[None]:
        """Context in which the adapter has other weights."""
        data = [parameter.data for parameter in self.parameters]
        kept = [values.clone() for values in data]
        torch._foreach_copy_(data, weights)
        try:
            yield
        finally:
            torch._foreach_copy_(data, kept)

    def real_loss(self, generator: torch.Generator) -> Tensor:
        """Denoising loss on real training images, a scalar."""
        clean, class_ids, noise, timesteps = self.noised_real(generator)
        conditions = self.conditioning(class_ids)
        return denoising_loss(self.unet, self.training_schedule, clean, conditions, noise, timesteps).mean()

    def noised_real(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a batch of real training images of all classes, as `noised` gives it."""
        count = self.config.real_batch_size * self.accelerator.num_processes
        index = torch.randint(0, len(self.real), (count,), generator=generator)
        return self.noised(self.real_pixel_values[index], self.real.class_ids[index], generator)

    def noised(
        self, pixel_values: Tensor, class_ids: Tensor, generator: torch.Generator, share: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's images (turned at random) as the UNet sees them, classes, noise and timesteps.

        Timesteps are spread evenly over the lowest `share` of the schedule.
        """
        images = random_orientations(pixel_values, generator)
        noise = torch.randn((len(images), *self.conditioning.sample_shape), generator=generator)
        highest = max(1, round(share * self.training_schedule.config.num_train_timesteps))
        timesteps = evenly_spread(len(images), highest, generator)
        clean = self.conditioning.encode(self.own(images))
        return clean, self.own(class_ids), self.own(noise), self.own(timesteps)

    def own(self, values: Tensor) -> Tensor:
        """This process's part of a global batch, on its device."""
        return values.chunk(self.accelerator.num_processes)[self.accelerator.process_index].to(self.device)

    def save(self, number: int) -> None:
        """Write a checkpoint with all that an exact resume needs."""
        state = {
            "parameters": [parameter.detach().cpu() for parameter in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            **self.extra_state(),
        }
        self.run.save(number, state)

    def resume(self) -> int:
        """Load the newest checkpoint; returns the unit to go on with."""
        state = self.run.load()
        if state is None:
            return 0
        torch._foreach_copy_([parameter.data for parameter in self.parameters], state["parameters"])
        torch._foreach_copy_(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.load_extra_state(state)
        return int(state["step"])

    def finish(self, started: float) -> RunRecord:
        """Write the averaged adapter with its card and record."""
        metrics = self.metrics()
        self.use(self.average)
        record = RunRecord(
            stage="align",
            config=asdict(self.config),
            inputs=self.inputs,
            seeds={"seed": self.config.seed},
            metrics={
                "method": self.config.method,
                **metrics,
                "adapter_parameters": sum(parameter.numel() for parameter in self.parameters),
                "class_names": list(self.pipeline.class_names),
                "criteria": list(self.reward_model.config.criteria),
                "grading": self.reward_model.config.grading,
            },
            wall_s=time.monotonic() - started,
            peak_rss_mb=peak_rss_mb(),
        )
        if self.accelerator.is_main_process:
            lora.save(self.unet, self.folder, self.pipeline.class_names)
            write_card(
                self.folder,
                "lora_adapter",
                record,
                grading=Grading(**(self.reward_model.config.grading or {"simulated": False})),
                base_model=self.config.base_model,
                class_names=self.pipeline.class_names,
                prompts=self.pipeline.prompts() if isinstance(self.pipeline, PromptPipeline) else (),
            )
            record.save(self.folder)
        self.run.close()
        self.accelerator.wait_for_everyone()
        return record
