"""Sampling that gradients flow back through: the last steps of a deterministic sampler, and the last one repeated.

Source: DRaFT (Clark et al., arXiv:2309.17400), section 4; the names follow its algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pathalign.diffusion.ddim import prediction_factors
from pathalign.diffusion.pipeline import randn_per_image


@dataclass(frozen=True)
class Call:
    """What a denoiser was asked and said in one step: all but the scalar timestep of shape `(n, *sample_shape)`."""

    sample: Tensor
    timestep: Tensor
    model_output: Tensor


@dataclass(frozen=True)
class Draw:
    """What was drawn: the sample `(n, *sample_shape)`, unclamped, and the calls that a gradient flows back through."""

    sample: Tensor
    calls: tuple[Call, ...]


def unrolled(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    class_ids: Tensor,
    inference_steps: int,
    train_steps: int,
) -> Draw:
    """Draw images; the graph of the last `train_steps` steps is kept (DRaFT-K).

    Args:
        denoise: Noisy sample, timestep and class ids to the output of the UNet.
        scheduler: Deterministic, in a state of its own: DDIM (eta 0) or DPM-Solver++.
        noise: Standard normal, shape `(n, *sample_shape)`.
        class_ids: Shape `(n,)`.
        inference_steps: Steps in all.
        train_steps: K, from 1 to `inference_steps`; what comes before is a constant to the gradient.
    """
    scheduler.set_timesteps(inference_steps, device=noise.device)
    sample = noise * scheduler.init_noise_sigma
    calls = []
    for index, timestep in enumerate(scheduler.timesteps):
        trained = index >= inference_steps - train_steps
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            model_input = scheduler.scale_model_input(sample, timestep)
            model_output = denoise(model_input, timestep, class_ids)
            sample = scheduler.step(model_output, timestep, sample).prev_sample
        if trained:
            calls.append(Call(model_input, timestep, model_output))
    scheduler.set_timesteps(inference_steps, device=noise.device)  # a multistep solver lets go of the graph
    return Draw(sample, tuple(calls))


def renoised(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    schedule: DDIMScheduler,
    draw: Draw,
    class_ids: Tensor,
    generators: Sequence[torch.Generator],
) -> Draw:
    """The last step once more, from fresh noise on the finished images (one more sample of DRaFT-LV).

    Args:
        denoise: As in `unrolled`.
        schedule: The training schedule: its signal and noise levels and its prediction type.
        draw: What `unrolled` gave; its images are constants here.
        class_ids: Shape `(n,)`.
        generators: One for each image.

    Source: DRaFT-LV (arXiv:2309.17400, section 4): x_1 = alpha_1 stop_gradient(x_0) + sigma_1 noise, then x_0 from it.
    """
    final, timestep = draw.sample.detach(), draw.calls[-1].timestep
    noise = randn_per_image(final.shape[1:], generators).to(final)
    sample = schedule.add_noise(final, noise, timestep.expand(len(final)))
    model_output = denoise(sample, timestep, class_ids)
    return Draw(predicted_original(schedule, sample, model_output, timestep), (Call(sample, timestep, model_output),))


def predicted_original(schedule: DDIMScheduler, sample: Tensor, model_output: Tensor, timestep: Tensor) -> Tensor:
    """The estimate of x_0 that an output of the UNet implies.

    Args:
        schedule: The training schedule.
        sample: x_t, shape `(n, *sample_shape)`.
        model_output: Noise, velocity or x_0 itself, as `schedule.config.prediction_type` says, same shape.
        timestep: t, a scalar.

    Source: DDIM (arXiv:2010.02502), eq. 12; velocity: arXiv:2202.00512, appendix D.
    """
    alpha_prod = schedule.alphas_cumprod.to(sample.device)[timestep].to(sample.dtype)
    of_sample, of_output, _, _ = prediction_factors(schedule.config.prediction_type, alpha_prod)
    return of_sample * sample + of_output * model_output
