"""DDIM as a stochastic policy: each denoising step is an action drawn from a Gaussian whose density is known.

    x_{t-1} ~ N(mean(x_t, model output), std^2),  std = eta * sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))

Legend: a_t is the cumulative product of alphas, alpha-bar in DDPM. Sources: DDIM (arXiv:2010.02502), equations 12 and
16; denoising as a Markov decision process: DDPO (arXiv:2305.13301), section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pathalign.schema import InputError


@dataclass(frozen=True)
class DDIMPolicy:
    """The steps of one sampler, each a diagonal Gaussian with the same deviation for every pixel.

    A `step` is an index into `timesteps`, 0 the noisiest: one integer, or int64 of shape `(n,)` on the CPU, one for
    each image. Everything is computed in float32 (float64 if the sample is), whatever the precision of the UNet.

    Attributes:
        timesteps: Training timesteps, int64, shape `(steps,)`, from noisy to clean.
        stds: Standard deviations of the steps, float32, shape `(steps,)`.
        coefficients: Shape `(steps, 6)`: factors of sample and model output in the predicted clean sample, the same two
            in the predicted noise, and the factors of clean sample and noise in the mean.
        clip_range: Half-width to which the clean sample is clipped, or None.
        stochastic_steps: Steps that have a density to train on: those with noise, and never the last one. What the
            last step adds is seen in the image as noise, so that samplers leave it out (deviation 0) or nearly so.
    """

    timesteps: Tensor
    stds: Tensor
    coefficients: Tensor
    clip_range: float | None
    stochastic_steps: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], steps: int, eta: float) -> DDIMPolicy:
        """Policy of a diffusers scheduler's configuration; unknown keys are ignored, as `from_config` does there.

        Args:
            config: Of any diffusers scheduler with a noise schedule; its timestep spacing, offset, prediction type,
                clipping and last alpha are those of the samples.
            steps: Denoising steps, at least 1.
            eta: 0 adds no noise, 1 as much as DDPM; at most 1, beyond which the mean is no real number.

        Raises:
            InputError: If `eta` is out of range, the settings reach timesteps that the schedule lacks, predict noise
                where there is no signal (zero terminal SNR), or need what has no density here.
        """
        if not 0 <= eta <= 1:
            raise InputError(f"`eta` is {eta}; use 0 (no noise) to 1 (as much as DDPM).")
        scheduler = DDIMScheduler.from_config(config)
        if scheduler.config.thresholding:
            raise InputError("The scheduler has `thresholding`, which has no fixed range; set it to false.")
        scheduler.set_timesteps(steps)
        total = scheduler.config.num_train_timesteps
        timesteps = scheduler.timesteps
        timesteps = timesteps[
            timesteps >= 0
        ]  # "trailing" rounds to one more than asked for, at -1, for 61 steps of 1000
        if int(timesteps.max()) >= total:
            raise InputError(
                f"{steps} steps with `steps_offset` {scheduler.config.steps_offset} begin at timestep "
                f"{int(timesteps.max())} of {total}; use fewer steps, or another `timestep_spacing`."
            )
        products = scheduler.alphas_cumprod.double()
        previous = timesteps - total // steps
        a_t = products[timesteps]
        a_prev = torch.where(previous >= 0, products[previous.clamp_min(0)], scheduler.final_alpha_cumprod.double())
        stds = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).clamp_min(0).sqrt()
        # At zero SNR and eta 1 nothing is left under the root; rounding must not make it negative.
        direction = (1 - a_prev - stds.square()).clamp_min(0).sqrt()
        clean_and_noise = prediction_factors(scheduler.config.prediction_type, a_t)
        coefficients = torch.stack([*clean_and_noise, a_prev.sqrt(), direction], dim=1)
        if not torch.isfinite(coefficients).all():
            raise InputError(
                f"At timestep {int(timesteps[0])} there is no signal (zero terminal SNR), and `prediction_type: "
                f"{scheduler.config.prediction_type}` says nothing there; use a model trained with v_prediction."
            )
        stochastic = [step for step in range(len(timesteps) - 1) if stds[step] > 0]
        clip = scheduler.config.clip_sample_range if scheduler.config.clip_sample else None
        return cls(timesteps, stds.float(), coefficients, clip, tuple(stochastic))

    def std(self, step: int | Tensor, like: Tensor) -> Tensor:
        """Standard deviation, shape `(1, 1, 1, 1)` or `(n, 1, 1, 1)`, on the device of `like`."""
        return _beside(self.stds[_index(step)], like)

    def mean(self, sample: Tensor, model_output: Tensor, step: int | Tensor) -> Tensor:
        """Mean of the next sample; `sample` and `model_output` have shape `(n, channels, height, width)`."""
        sample, model_output = _wide(sample), _wide(model_output)
        factors = self.coefficients[_index(step)].unbind(dim=1)
        clean_s, clean_o, noise_s, noise_o, of_clean, of_noise = (_beside(factor, sample) for factor in factors)
        clean = clean_s * sample + clean_o * model_output
        if self.clip_range is not None:
            clean = clean.clamp(-self.clip_range, self.clip_range)
        return of_clean * clean + of_noise * (noise_s * sample + noise_o * model_output)

    def log_prob(self, next_sample: Tensor, sample: Tensor, model_output: Tensor, step: int | Tensor) -> Tensor:
        """Log-density of `next_sample`, shape `(n,)`: MEAN over channels and pixels, since a ratio of sums overflows.

        Raises:
            ValueError: If a step adds no noise, so that there is no density.
        """
        if bool((self.stds[_index(step)] == 0).any()):
            raise ValueError(f"Step {step} has standard deviation 0 and no density; use {self.stochastic_steps}.")
        std = self.std(step, sample)
        standardized = (_wide(next_sample) - self.mean(sample, model_output, step)) / std
        density = -0.5 * standardized.square() - std.log() - 0.5 * math.log(2 * math.pi)
        return density.flatten(1).mean(dim=1)

    def divergence(self, mean: Tensor, other_mean: Tensor, step: int | Tensor) -> Tensor:
        """KL divergence between two Gaussians of a step, shape `(n,)`: mean over channels and pixels, in nats."""
        return ((mean - other_mean) / self.std(step, mean)).square().flatten(1).mean(dim=1) / 2


def prediction_factors(prediction_type: str, a_t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors of sample and model output in the predicted clean sample, then in the noise, shaped as `a_t`."""
    signal, noise = a_t.sqrt(), (1 - a_t).sqrt()
    zero, one = torch.zeros_like(a_t), torch.ones_like(a_t)
    if prediction_type == "epsilon":
        return 1 / signal, -noise / signal, zero, one
    if prediction_type == "sample":
        return zero, one, 1 / noise, -signal / noise
    return signal, -noise, noise, signal  # velocity: arXiv:2202.00512, appendix D


def _index(step: int | Tensor) -> Tensor:
    return torch.tensor([step]) if isinstance(step, int) else step


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _beside(factors: Tensor, like: Tensor) -> Tensor:
    """Factors of shape `(n,)`, float64 or float32, as `(n, 1, 1, 1)` beside samples."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return factors[:, None, None, None].to(like.device, dtype)
