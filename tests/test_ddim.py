"""DDIM as a policy: means against diffusers' own step, densities against torch's, over a grid of settings."""

from __future__ import annotations

import itertools
from functools import cache

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pathalign.diffusion.ddim import DDIMPolicy
from pathalign.schema import InputError

GRID = [
    {
        "timestep_spacing": spacing,
        "steps_offset": offset,
        "set_alpha_to_one": to_one,
        "rescale_betas_zero_snr": zero_snr,
        "prediction_type": prediction,
        "clip_sample": clip,
        "beta_schedule": "scaled_linear" if offset else "squaredcos_cap_v2",
    }
    for spacing, offset, to_one, zero_snr, prediction, clip in itertools.product(
        ("leading", "trailing", "linspace"),
        (0, 1),
        (True, False),
        (False, True),
        ("epsilon", "v_prediction", "sample"),
        (False, True),
    )
]
STEPS_AND_ETAS = ((7, 1.0), (10, 0.3))


def describes_pure_noise(settings: dict) -> bool:
    """Noise prediction from a timestep without signal: neither diffusers nor anything else can do that."""
    starts_at_the_end = settings["timestep_spacing"] in ("trailing", "linspace")
    return settings["prediction_type"] == "epsilon" and settings["rescale_betas_zero_snr"] and starts_at_the_end


def drawn(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(count)]


@cache
def cases() -> list[tuple[DDIMPolicy, DDIMScheduler, float]]:
    found = []
    for settings, (steps, eta) in itertools.product(GRID, STEPS_AND_ETAS):
        if not describes_pure_noise(settings):
            scheduler = DDIMScheduler(**settings)
            scheduler.set_timesteps(steps)
            found.append((DDIMPolicy.from_config(scheduler.config, steps, eta), scheduler, eta))
    assert len(found) == (len(GRID) - 2**4) * 2  # two spacings, offsets, last alphas and clippings describe pure noise
    return found


def test_steps_equal_diffusers_own_in_every_setting():
    sample, output, noise = drawn()
    not_from_diffusers = 0
    for policy, scheduler, eta in cases():
        assert policy.timesteps.tolist() == scheduler.timesteps.tolist()
        for step, timestep in enumerate(scheduler.timesteps):
            expected = scheduler.step(output, timestep, sample, eta=eta, variance_noise=noise).prev_sample
            value = policy.mean(sample, output, step) + policy.std(step, sample) * noise
            assert torch.isfinite(value).all()
            if not torch.isfinite(expected).all():  # its root of 1 - a - std^2 is of a number rounded below 0
                assert eta == 1.0
                not_from_diffusers += 1
                continue
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)
    assert not_from_diffusers < len(cases()) / 4  # at most the first step, at zero SNR


def test_log_probs_are_means_of_torch_normals_and_the_last_step_never_has_one():
    sample, output, next_sample = drawn()
    for policy, _, _ in cases():
        steps = len(policy.timesteps)
        assert policy.stochastic_steps == tuple(range(steps - 1))
        for step in policy.stochastic_steps:
            normal = Normal(policy.mean(sample, output, step), policy.stds[step])
            expected = normal.log_prob(next_sample).mean(dim=(1, 2, 3))
            torch.testing.assert_close(policy.log_prob(next_sample, sample, output, step), expected)


def test_a_step_for_each_image_is_the_same_as_one_step_for_all():
    sample, output, next_sample = drawn()
    policy = DDIMPolicy.from_config(DDIMScheduler(timestep_spacing="trailing").config, 10, 1.0)
    steps = torch.tensor([7, 2])
    for row, step in enumerate(steps.tolist()):
        alone = [values[row : row + 1] for values in (next_sample, sample, output)]
        together = policy.log_prob(next_sample, sample, output, steps)[row]
        torch.testing.assert_close(together, policy.log_prob(*alone, step)[0])


def test_divergence_is_that_of_torch_normals():
    mean, other, _ = drawn()
    policy = DDIMPolicy.from_config(DDIMScheduler().config, 10, 0.7)
    for step in policy.stochastic_steps:
        expected = kl_divergence(Normal(mean, policy.stds[step]), Normal(other, policy.stds[step]))
        torch.testing.assert_close(policy.divergence(mean, other, step), expected.mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_anything_is_computed(dtype):
    sample, output, next_sample = (values.to(dtype) for values in drawn())
    policy = DDIMPolicy.from_config(DDIMScheduler().config, 10, 1.0)
    value = policy.log_prob(next_sample, sample, output, 3)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, policy.log_prob(next_sample.float(), sample.float(), output.float(), 3))


def test_without_noise_there_is_no_density():
    sample, output, next_sample = drawn()
    policy = DDIMPolicy.from_config(DDIMScheduler().config, 10, 0.0)
    assert policy.stochastic_steps == ()
    with pytest.raises(ValueError, match="Step 3 has standard deviation 0"):
        policy.log_prob(next_sample, sample, output, 3)
    policy = DDIMPolicy.from_config(DDIMScheduler().config, 10, 1.0)
    with pytest.raises(ValueError, match="no density"):
        policy.log_prob(next_sample, sample, output, torch.tensor([3, 9]))


@pytest.mark.parametrize("steps", [61, 103])
def test_a_number_of_steps_that_rounds_to_one_too_many_has_no_step_beyond_the_end(steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[-1] == -1  # diffusers 0.42
    assert DDIMPolicy.from_config(scheduler.config, steps, 1.0).timesteps.tolist() == scheduler.timesteps[:-1].tolist()


@pytest.mark.parametrize(
    ("settings", "steps", "eta", "message"),
    [
        ({}, 10, 1.5, "`eta` is 1.5"),
        ({"thresholding": True}, 10, 1.0, "`thresholding`"),
        ({"steps_offset": 1}, 1000, 1.0, "begin at timestep 1000 of 1000"),
        (
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            10,
            1.0,
            "At timestep 999 there is no signal.*`prediction_type: epsilon`",
        ),
    ],
)
def test_settings_without_a_policy_are_refused(settings, steps, eta, message):
    with pytest.raises(InputError, match=message):
        DDIMPolicy.from_config(DDIMScheduler(**settings).config, steps, eta)
