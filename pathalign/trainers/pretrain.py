"""Pretraining: a class-conditional diffusion model on real images.

Noise prediction: arXiv:2006.11239. Velocity prediction: arXiv:2202.00512.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from pathalign.artefacts import artefact, fingerprint
from pathalign.augment import random_orientations
from pathalign.cards import write_card
from pathalign.diffusion.conditioning import ClassConditioning
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.generate import load_pipeline
from pathalign.images import ImageSet, contact_sheet, to_images
from pathalign.pinning import pinned
from pathalign.progress import Progress, say
from pathalign.randomness import seeded
from pathalign.schema import InputError, RunRecord, peak_rss_mb
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.base import RunFolder, accelerator_for, cosine_rate, require_finite, with_precision

TRAIN_TIMESTEPS = 1000
VALIDATION_BATCH = 100
TRAINING, VALIDATION = 0, 1  # streams of random numbers


def evenly_spread(count: int, total: int, generator: torch.Generator) -> Tensor:
    """One timestep from each of `count` equal parts of `total`, in random order: less variance than independent draws.

    Returns:
        Shape `(count,)`, int64, in [0, total).

    Source: low-discrepancy sampler, arXiv:2107.00630, appendix I.1.
    """
    places = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    return (places / count * total).long().clamp_max(total - 1)


def noisy_and_target(
    scheduler: DDIMScheduler, pixel_values: Tensor, noise: Tensor, timesteps: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy images and what the UNet shall predict for them, noise or velocity; all of shape `(n, channels, h, w)`."""
    noisy = scheduler.add_noise(pixel_values, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    return noisy, scheduler.get_velocity(pixel_values, noise, timesteps) if velocity else noise


def denoising_loss(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    pixel_values: Tensor,
    conditions: dict[str, Tensor | None],
    noise: Tensor,
    timesteps: Tensor,
) -> Tensor:
    """Squared error of the prediction, mean over channels and pixels.

    Args:
        unet: Predicts noise or velocity, as `scheduler.config.prediction_type` says.
        scheduler: The training schedule.
        pixel_values: Shape `(n, channels, size, size)`, in [-1, 1].
        conditions: Keyword arguments of the UNet for these images.
        noise: Standard normal, shape of `pixel_values`.
        timesteps: Shape `(n,)`, int64.

    Returns:
        Shape `(n,)`, float32.

    Source: DDPM (arXiv:2006.11239), eq. 14; velocity: arXiv:2202.00512, appendix D.
    """
    noisy, target = noisy_and_target(scheduler, pixel_values, noise, timesteps)
    prediction = unet(noisy, timesteps, **conditions).sample
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def build_unet(config: PretrainConfig, image_size_px: int, num_classes: int) -> UNet2DConditionModel:
    """A UNet with class embeddings and no text; its last embedding stands for "no class"."""
    attention = [level in config.attention_levels for level in range(len(config.block_out_channels))]
    return UNet2DConditionModel(
        sample_size=image_size_px,
        in_channels=3,
        out_channels=3,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        mid_block_type="UNetMidBlock2D",
        num_class_embeds=num_classes + 1,
        attention_head_dim=min(32, *config.block_out_channels),  # a wider head than its level has would be no head
        norm_num_groups=math.gcd(*config.block_out_channels) // 2,
        cross_attention_dim=1,  # nothing attends to text
    )


def new_pipeline(config: PretrainConfig, image_size_px: int, class_names: tuple[str, ...]) -> ClassConditionalPipeline:
    """An untrained pipeline, or `initial_model` to train on.

    Raises:
        InputError: If `initial_model` cannot be loaded, or has other classes or another image size.
    """
    if config.initial_model is not None:
        pipeline = load_pipeline(config.initial_model)
        if pipeline.class_names != list(class_names) or pipeline.unet.config.sample_size != image_size_px:
            raise InputError(
                f"{config.initial_model} draws {pipeline.class_names} at {pipeline.unet.config.sample_size} px, but "
                f"the data has {list(class_names)} at {image_size_px} px; use data with the same classes and size."
            )
        return pipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # diffusers initializes from the global generator
        unet = build_unet(config, image_size_px, len(class_names))
    scheduler = DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
        rescale_betas_zero_snr=config.zero_terminal_snr,
        timestep_spacing="trailing",  # few-step sampling then begins at pure noise (arXiv:2305.08891, section 3.3)
        clip_sample=False,
    )
    return ClassConditionalPipeline(unet, scheduler, {str(index): name for index, name in enumerate(class_names)})


def pretrain(config: PretrainConfig, output_dir: str | Path) -> RunRecord:
    """Train and write a pipeline; the same call goes on where an interrupted one was.

    Raises:
        InputError: If the data cannot be used, or the loss is no number any more.
    """
    config = pinned(config)
    train = ImageSet.load(config.data, "train", config.revision)
    validation = ImageSet.load(config.data, "validation", config.revision)
    pipeline = new_pipeline(config, train.image_size_px, train.class_names)
    with artefact(output_dir) as folder:
        record = PretrainTrainer(pipeline, train, validation, config, folder).train()
    return record


class PretrainTrainer:
    """Trains the UNet of a pipeline and keeps the moving average of its weights that validates best."""

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        train: ImageSet,
        validation: ImageSet,
        config: PretrainConfig,
        folder: Path,
    ) -> None:
        self.pipeline, self.folder = pipeline, folder
        self.config = config = with_precision(config)
        self.train_set, self.validation_set = train, validation
        self.accelerator = accelerator_for(config.mixed_precision, config.trackers, folder)
        self.device = self.accelerator.device
        self.pixel_values = train.pixel_values()
        self.conditioning = ClassConditioning(pipeline)
        optimizer = torch.optim.AdamW(
            pipeline.unet.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=config.weight_decay
        )
        self.unet, self.optimizer = self.accelerator.prepare(pipeline.unet, optimizer)
        self.ema = EMAModel(
            pipeline.unet.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.9, foreach=True
        )
        self.ema.to(self.device)
        self.inputs = {"data": fingerprint([train.image_ids, validation.image_ids])}
        identity = {**asdict(config), **self.inputs}
        self.run = RunFolder(folder, self.accelerator, identity, config.trackers, config.keep_checkpoints)
        self.best: dict[str, Any] = {"loss": float("inf"), "step": 0, "weights": []}

    def train(self) -> RunRecord:
        """Run all steps that are left, then write the pipeline."""
        started = time.monotonic()
        start = self.resume()
        with Progress("pretrain", self.config.steps, done=start) as progress:
            for step in range(start, self.config.steps):
                loss = self.step(step)
                done = step + 1
                if done % self.config.validate_every_steps == 0 or done == self.config.steps:
                    self.validate(done, train_loss=loss, learning_rate=self.optimizer.param_groups[0]["lr"])
                if self.config.sample_every_steps and done % self.config.sample_every_steps == 0:
                    self.sample(self.folder / "samples" / f"step-{done:07d}.png")
                if done % self.config.checkpoint_every_steps == 0 and done < self.config.steps:
                    self.save(done)
                progress.update(loss=loss)
        return self.finish(time.monotonic() - started)

    def step(self, step: int) -> float:
        """One optimizer step; returns the mean loss of its micro-batches."""
        rate = self.config.learning_rate * cosine_rate(step, self.config.steps, self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for micro in range(self.config.gradient_accumulation_steps):
            last = micro == self.config.gradient_accumulation_steps - 1
            with nullcontext() if last else self.accelerator.no_sync(self.unet):
                with self.accelerator.autocast():
                    loss = self.loss(*self.batch(step, micro))
                require_finite(loss, step, rate)
                self.accelerator.backward(loss / self.config.gradient_accumulation_steps)
            total += loss.item() / self.config.gradient_accumulation_steps
        self.accelerator.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.pipeline.unet.parameters())
        return total

    def batch(self, step: int, micro: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's part of a global batch: images, class ids (some dropped), noise and timesteps."""
        config, processes = self.config, self.accelerator.num_processes
        generator = seeded(config.seed, TRAINING, step, micro)
        count = config.batch_size * processes
        index = torch.randint(0, len(self.train_set), (count,), generator=generator)
        images = self.pixel_values[index]
        if config.augment == "flips_rotations":
            images = random_orientations(images, generator)
        dropped = torch.rand(count, generator=generator) < config.class_dropout
        class_ids = torch.where(dropped, self.conditioning.no_class_id, self.train_set.class_ids[index])
        noise = torch.randn(images.shape, generator=generator)
        timesteps = evenly_spread(count, TRAIN_TIMESTEPS, generator)
        own = slice(
            self.accelerator.process_index * config.batch_size, (self.accelerator.process_index + 1) * config.batch_size
        )
        return tuple(part[own].to(self.device) for part in (images, class_ids, noise, timesteps))  # type: ignore[return-value]

    def loss(self, images: Tensor, class_ids: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean denoising loss of a batch."""
        conditions = self.conditioning(class_ids)
        return denoising_loss(self.unet, self.pipeline.scheduler, images, conditions, noise, timesteps).mean()

    @torch.no_grad()
    def validate(self, step: int, **figures: float) -> None:
        """Loss of the averaged weights on held-out images with fixed noise; remember the best and log `figures`."""
        generator = seeded(self.config.seed, VALIDATION)
        images = self.validation_set.pixel_values()
        noise = torch.randn(images.shape, generator=generator)
        timesteps = evenly_spread(len(images), TRAIN_TIMESTEPS, generator)
        self.ema.store(self.pipeline.unet.parameters())
        self.ema.copy_to(self.pipeline.unet.parameters())
        losses = [
            self.loss(*(part.to(self.device) for part in batch)) * len(batch[0])
            for batch in zip(
                *(part.split(VALIDATION_BATCH) for part in (images, self.validation_set.class_ids, noise, timesteps)),
                strict=True,
            )
        ]
        loss = float(sum(losses)) / len(images)
        require_finite(torch.tensor(loss), step, self.config.learning_rate)
        if loss < self.best["loss"]:
            weights = [parameter.detach().cpu().clone() for parameter in self.pipeline.unet.parameters()]
            self.best = {"loss": loss, "step": step, "weights": weights}
        self.ema.restore(self.pipeline.unet.parameters())
        self.run.log(step, validation_loss=loss, **figures)

    def sample(self, path: Path) -> None:
        """A sheet of eight images of each class by the averaged weights, the same seeds every time."""
        if not self.accelerator.is_main_process:
            return
        count = len(self.train_set.class_names)
        generators = [torch.Generator().manual_seed(seed) for seed in range(8 * count)]
        labels = [index // 8 for index in range(8 * count)]
        self.ema.store(self.pipeline.unet.parameters())
        self.ema.copy_to(self.pipeline.unet.parameters())
        self.pipeline.set_progress_bar_config(disable=True)
        images = self.pipeline(labels, generators, num_inference_steps=20, output_type="pt")[0]
        self.ema.restore(self.pipeline.unet.parameters())
        path.parent.mkdir(exist_ok=True)
        contact_sheet(to_images(images), columns=8).save(path)

    def save(self, step: int) -> None:
        """Write a checkpoint with all that an exact resume needs."""
        state = {
            "unet": self.accelerator.get_state_dict(self.unet),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {},
            "best": self.best,
        }
        self.run.save(step, state)

    def resume(self) -> int:
        """Load the newest checkpoint; returns the step to go on with."""
        state = self.run.load()
        if state is None:
            if self.config.initial_model is not None:
                self.validate(0)
            return 0
        self.accelerator.unwrap_model(self.unet).load_state_dict(state["unet"])
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        return int(state["step"])

    def finish(self, wall_s: float) -> RunRecord:
        """Put the best weights into the pipeline and write it with its card and record."""
        with torch.no_grad():
            for parameter, best in zip(self.pipeline.unet.parameters(), self.best["weights"], strict=True):
                parameter.copy_(best)
        self.ema = EMAModel(self.pipeline.unet.parameters(), decay=self.config.ema_decay)
        record = RunRecord(
            stage="pretrain",
            config=asdict(self.config),
            inputs=self.inputs,
            seeds={"seed": self.config.seed},
            metrics={
                "validation_loss": self.best["loss"],
                "best_step": self.best["step"],
                "n": len(self.train_set),
                "parameters": sum(parameter.numel() for parameter in self.pipeline.unet.parameters()),
            },
            wall_s=wall_s,
            peak_rss_mb=peak_rss_mb(),
        )
        say(f"Best validation loss {self.best['loss']:.4f} at step {self.best['step']}.")
        if self.accelerator.is_main_process:
            self.sample(self.folder / "samples" / "final.png")
            self.pipeline.save_pretrained(self.folder)
            write_card(self.folder, "diffusion_base", record, class_names=self.pipeline.class_names)
            record.save(self.folder)
        self.run.close()
        self.accelerator.wait_for_everyone()
        return record
