"""Sampling trajectories: images of given classes and seeds, with the denoising steps that will be trained on.

A step is a pair of samples, x_t and x_{t-1}. Only chosen steps are kept, each sample once even if two steps share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathalign.diffusion.ddim import DDIMPolicy
from pathalign.diffusion.denoiser import Denoiser
from pathalign.diffusion.pipeline import randn_per_image


def choose_steps(
    stochastic_steps: Sequence[int], images: int, count: int, choice: str, epoch: int, generator: torch.Generator
) -> Tensor:
    """Steps to train on, in order.

    Args:
        stochastic_steps: What there is to choose from.
        images: Number of images.
        count: Steps of each image; 0, or more than there are, is all.
        choice: `random` draws them for each image without replacement, `first` takes the noisiest ones, `window` the
            `count` neighbours that begin one step later each epoch (MixGRPO, arXiv:2507.21802).
        epoch: Number of the epoch, for `window`.
        generator: For `random`.

    Returns:
        Shape `(images, count)`, int64, ascending along each row.
    """
    steps = torch.tensor(stochastic_steps)
    count = min(count, len(steps)) or len(steps)
    if choice == "random":
        order = torch.rand(images, len(steps), generator=generator).argsort(dim=1)
        return steps[order[:, :count].sort(dim=1).values]
    start = epoch % (len(steps) - count + 1) if choice == "window" else 0
    return steps[start : start + count].expand(images, count)


@dataclass(frozen=True)
class Trajectories:
    """Steps of a number of images; made empty by `allocate` and filled by `roll_out`.

    Attributes:
        class_ids: Shape `(n,)`, int64, on the CPU.
        steps: Chosen steps, shape `(n, k)`, int64, on the CPU.
        samples: Kept samples, shape `(m, *sample_shape)`, in the precision of sampling.
        rows: Where in `samples` the sample before step s of image i is kept, shape `(n, steps + 1)`, -1 if it is not.
        log_probs: Of the chosen steps when they were drawn, shape `(n, k)`, float32, on the CPU.
    """

    class_ids: Tensor
    steps: Tensor
    samples: Tensor
    rows: Tensor
    log_probs: Tensor

    @classmethod
    def allocate(
        cls,
        class_ids: Tensor,
        steps: Tensor,
        inference_steps: int,
        sample_shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Trajectories:
        """Room for the samples on both sides of each chosen step."""
        needed = torch.zeros(len(steps), inference_steps + 1, dtype=torch.bool)
        needed.scatter_(1, steps, True).scatter_(1, steps + 1, True)
        rows = torch.where(needed, needed.flatten().cumsum(0).view_as(needed) - 1, -1)
        samples = torch.empty(int(needed.sum()), *sample_shape, dtype=dtype, device=device)
        return cls(class_ids, steps, samples, rows, torch.zeros(steps.shape))

    def keep(self, images: slice, step: int, sample: Tensor) -> None:
        """Keep the samples before `step` of those images that need it."""
        rows = self.rows[images, step]
        needed = (rows >= 0).nonzero()[:, 0]
        self.samples[rows[needed].to(self.samples.device)] = sample[needed.to(sample.device)].to(self.samples.device)

    def pairs(self, images: Tensor, columns: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Samples before and after chosen steps: column `columns[j]` of image `images[j]`, on `device`."""
        steps = self.steps[images, columns]
        before, after = (self.rows[images, steps + side].to(self.samples.device) for side in (0, 1))
        return self.samples[before].to(device), self.samples[after].to(device)


@torch.no_grad()
def roll_out(
    denoiser: Denoiser, policy: DDIMPolicy, trajectories: Trajectories, images: slice, seeds: Sequence[int]
) -> Tensor:
    """Draw some of the images, and keep their chosen steps.

    Args:
        denoiser: Its UNet's device and precision are those of the samples.
        policy: The sampler.
        trajectories: Where the steps go.
        images: Which images of `trajectories` these are.
        seeds: One for each image: how many are drawn at once never changes an image.

    Returns:
        Final samples, shape `(n, *sample_shape)`.
    """
    device, dtype = denoiser.unet.device, trajectories.samples.dtype
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = tuple(trajectories.samples.shape[1:])
    class_ids = trajectories.class_ids[images].to(device)
    steps, log_probs = trajectories.steps[images], trajectories.log_probs[images]
    sample = randn_per_image(shape, generators).to(device, dtype)
    for step, timestep in enumerate(policy.timesteps):
        trajectories.keep(images, step, sample)
        output = denoiser(sample, timestep.to(device).expand(len(sample)), class_ids)
        next_sample = policy.mean(sample, output, step)
        if policy.stds[step] > 0:
            noise = randn_per_image(shape, generators).to(device)
            next_sample = next_sample + policy.std(step, sample) * noise
        next_sample = next_sample.to(dtype)
        rows, columns = (steps == step).nonzero(as_tuple=True)
        if len(rows):
            chosen = rows.to(device)
            drawn = policy.log_prob(next_sample[chosen], sample[chosen], output[chosen], step)
            log_probs[rows, columns] = drawn.float().cpu()
        sample = next_sample
    trajectories.keep(images, len(policy.timesteps), sample)
    return sample
