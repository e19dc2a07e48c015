"""Epochs of trl 0.23.1's own `DDPOTrainer`, on request: the other side of `ddpo_epoch.py`, which starts this.

It runs in an environment with that trl and without pathalign. Sampler, log-probabilities, loss and loop are trl's
(`pipeline_step`, `scheduler_step`, `DDPOTrainer.step`); what is written here only puts a class-conditional UNet where
trl expects Stable Diffusion: classes in place of prompts, pixels in place of latents. It prints `ready`, then
for each line on stdin it does one epoch, without logging and checkpoints, and prints its CPU seconds and UNet passes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn
from trl import DDPOConfig, DDPOTrainer
from trl.models.modeling_sd_base import DDPOStableDiffusionPipeline, pipeline_step, scheduler_step


class ClassUNet(UNet2DConditionModel):
    """Takes class ids, `(n, 1, 1)`, where trl gives embeddings of prompts; counts images that go through it."""

    forwards = backwards = 0

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True, **_: Any
    ) -> Any:
        self.forwards += len(sample)
        self.backwards += len(sample) if torch.is_grad_enabled() else 0
        return super().forward(
            sample, timestep, None, class_labels=encoder_hidden_states[:, 0, 0], return_dict=return_dict
        )


class Classes(nn.Module):
    """Tokenizer and text encoder at once: a prompt is the number of a class, and its embedding too."""

    model_max_length = 1

    def forward(self, prompts: Any, **_: Any) -> Any:
        if isinstance(prompts, Tensor):
            return (prompts[:, :, None],)
        return SimpleNamespace(input_ids=torch.tensor([[int(prompt or 0)] for prompt in prompts]))


class Pixels(nn.Module):
    """A VAE that changes nothing: the UNet denoises pixels."""

    config = SimpleNamespace(scaling_factor=1.0)

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (latents,)


class ClassPipeline(DDPOStableDiffusionPipeline):
    """What trl's trainer and its `pipeline_step` ask of a pipeline."""

    vae_scale_factor, use_lora, autocast = 1, False, None
    unet = vae = scheduler = tokenizer = text_encoder = None  # read-only properties in trl's class

    def __init__(self, folder: Path) -> None:
        self.unet = ClassUNet.from_pretrained(folder, subfolder="unet")
        self.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.tokenizer = self.text_encoder = Classes()
        self.vae, self.image_processor = Pixels(), VaeImageProcessor()
        self._execution_device = torch.device("cpu")

    def __call__(self, **options: Any) -> Any:
        return pipeline_step(self, **options)

    def scheduler_step(self, *arguments: Any, **options: Any) -> Any:
        return scheduler_step(self.scheduler, *arguments, **options)

    def get_trainable_layers(self) -> nn.Module:
        return self.unet

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def progress_bar(self, total: int) -> Any:
        return contextlib.nullcontext(SimpleNamespace(update=lambda: None))

    def check_inputs(self, *_: Any) -> None:
        pass

    def _encode_prompt(self, *_: Any, prompt_embeds: Tensor, **__: Any) -> Tensor:
        return prompt_embeds

    def prepare_latents(self, count: int, channels: int, height: int, width: int, *_: Any) -> Tensor:
        return torch.randn(count, channels, height, width)

    def run_safety_checker(self, image: Tensor, *_: Any) -> tuple[Tensor, None]:
        return image, None


def brightness(images: Tensor, *_: Any) -> tuple[Tensor, dict[str, Any]]:
    """The same reward as `Brightness` in tests/brightness.py; images are in [0, 1] here."""
    return torch.sigmoid(6 * (2 * images - 1).mean(dim=(1, 2, 3))), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a class-conditional pipeline")
    parser.add_argument("--images", type=int, required=True, help="images of an epoch")
    parser.add_argument("--sample-batch", type=int, required=True)
    parser.add_argument("--train-batch", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True, help="denoising steps")
    parser.add_argument("--train-steps", type=int, required=True, help="those of them that are trained on")
    arguments = parser.parse_args()
    replies, sys.stdout = sys.stdout, sys.stderr  # nothing else may print a reply
    torch.set_num_threads(1)
    PartialState()  # trl's trainer logs before it makes its Accelerator, which accelerate refuses by now (1.15)
    pipeline = ClassPipeline(arguments.folder)
    classes = itertools.cycle(range(pipeline.unet.config.num_class_embeds - 1))
    settings = DDPOConfig(
        mixed_precision="no",
        sample_num_steps=arguments.steps,
        sample_batch_size=arguments.sample_batch,
        sample_num_batches_per_epoch=arguments.images // arguments.sample_batch,
        sample_guidance_scale=1.0,
        train_batch_size=arguments.train_batch,
        train_timestep_fraction=arguments.train_steps / arguments.steps,
        train_cfg=False,
        negative_prompts=None,
    )
    trainer = DDPOTrainer(settings, brightness, lambda: (str(next(classes)), {}), pipeline)
    for count in (arguments.sample_batch, arguments.train_batch):  # the first passes of a size take longer
        sample = pipeline.prepare_latents(count, 3, *[pipeline.unet.config.sample_size] * 2)
        output = pipeline.unet(sample, 500, torch.zeros(count, 1, 1, dtype=torch.int64)).sample
        output.square().mean().backward()
        pipeline.unet.zero_grad()
    print("ready", file=replies, flush=True)
    for _ in sys.stdin:
        pipeline.unet.forwards = pipeline.unet.backwards = 0
        began = time.process_time()
        trainer.step(epoch=0, global_step=0)
        spent = time.process_time() - began
        if not all(bool(parameter.isfinite().all()) for parameter in pipeline.unet.parameters()):
            raise SystemExit("trl's training made a weight that is no number: its epoch is no measure.")
        reply = {"cpu_s": spent, "forwards": pipeline.unet.forwards, "backwards": pipeline.unet.backwards}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
