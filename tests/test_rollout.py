"""Trajectories: which steps are kept, that images are those of diffusers' sampler, merged adapters."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from pathalign.diffusion import lora
from pathalign.diffusion.conditioning import ClassConditioning
from pathalign.diffusion.ddim import DDIMPolicy
from pathalign.diffusion.denoiser import Denoiser
from pathalign.randomness import seeded
from pathalign.trainers.rollout import Trajectories, choose_steps, roll_out

STEPS, SHAPE = 6, (3, 16, 16)
NEAR = {"rtol": 1e-3, "atol": 1e-3}  # diffusers takes the root of a difference that float32 rounds by 6e-8


@pytest.fixture
def adapted(tiny_pipeline):
    """The tiny pipeline with an adapter that changes what it draws."""
    generator = torch.Generator().manual_seed(1)
    lora.attach(tiny_pipeline.unet, 2, 2.0, True, generator)
    for parameter in lora.parameters(tiny_pipeline.unet).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tiny_pipeline


def drawn(
    pipeline, seeds: list[int], batch: int, steps: Tensor, guidance: float = 1.0
) -> tuple[Tensor, Trajectories, DDIMPolicy]:
    policy = DDIMPolicy.from_config(pipeline.scheduler.config, STEPS, 1.0)
    denoiser = Denoiser(pipeline.unet, ClassConditioning(pipeline), guidance)
    class_ids = torch.arange(len(seeds)) % 3
    trajectories = Trajectories.allocate(class_ids, steps, STEPS, SHAPE, torch.float32, torch.device("cpu"))
    finals = []
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        finals.append(roll_out(denoiser, policy, trajectories, part, seeds[part]))
    return torch.cat(finals), trajectories, policy


def path_by_diffusers(pipeline, seed: int, class_id: int, guidance: float) -> list[Tensor]:
    """All samples of one image, by diffusers' scheduler and the pipeline's own guidance."""
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(seed)
    path = [torch.randn(1, *SHAPE, generator=generator)]
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.predict(path[-1], timestep, torch.tensor([class_id]), guidance)
        step = scheduler.step(output, timestep, path[-1], eta=1.0, generator=generator)
        path.append(step.prev_sample)
    return path


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_kept_pairs_and_final_images_lie_on_the_path_of_diffusers_sampler(adapted, guidance):
    steps = torch.tensor([[0, 1], [1, 4], [2, 3]])
    final, trajectories, policy = drawn(adapted, [7, 8, 9], 2, steps, guidance)
    assert len(trajectories.samples) == 3 + 4 + 3  # neighbouring steps share a sample
    for image, seed in enumerate((7, 8, 9)):
        path = path_by_diffusers(adapted, seed, image, guidance)
        torch.testing.assert_close(final[image : image + 1], path[-1], **NEAR)
        for column in (0, 1):
            step = int(steps[image, column])
            pair = trajectories.pairs(torch.tensor([image]), torch.tensor([column]), torch.device("cpu"))
            torch.testing.assert_close(torch.cat(pair), torch.cat(path[step : step + 2]), **NEAR)
            # By the scheduler's noise: x = mean + std z has the density of a standard normal z, over std.
            mean = policy.mean(pair[0], _output(adapted, pair[0], policy.timesteps[step], image, guidance), step)
            expected = torch.distributions.Normal(mean, policy.stds[step]).log_prob(pair[1]).mean()
            torch.testing.assert_close(trajectories.log_probs[image, column], expected, rtol=1e-4, atol=1e-5)


def _output(pipeline, sample: Tensor, timestep: Tensor, class_id: int, guidance: float) -> Tensor:
    with torch.no_grad():
        return pipeline.predict(sample, timestep, torch.tensor([class_id]), guidance)


def test_the_number_of_images_drawn_at_once_changes_no_image(adapted):
    steps = torch.tensor([[0, 2]]).expand(5, 2)
    one, other = (drawn(adapted, [3, 4, 5, 6, 7], batch, steps) for batch in (1, 5))
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[1].samples, other[1].samples, rtol=1e-4, atol=1e-5)


def test_a_merged_adapter_draws_the_same_and_leaves_no_trace(adapted):
    steps = torch.tensor([[0, 2]]).expand(4, 2)
    before = {name: values.clone() for name, values in adapted.unet.state_dict().items()}
    plain, trajectories, _ = drawn(adapted, [1, 2, 3, 4], 4, steps)
    for _ in range(2):
        with lora.merged(adapted.unet):
            now = adapted.unet.state_dict()
            names = [name for name, values in now.items() if not torch.equal(values, before[name])]
            merged, merged_trajectories, _ = drawn(adapted, [1, 2, 3, 4], 4, steps)
        assert len(names) > 10 and all("base_layer.weight" in name for name in names)
        torch.testing.assert_close(merged, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged_trajectories.log_probs, trajectories.log_probs, rtol=1e-5, atol=1e-5)
        assert all(torch.equal(values, before[name]) for name, values in adapted.unet.state_dict().items())
    assert torch.equal(drawn(adapted, [1, 2, 3, 4], 4, steps)[0], plain)


def test_base_weights_come_back_when_sampling_fails(adapted):
    before = {name: values.clone() for name, values in adapted.unet.state_dict().items()}
    with pytest.raises(RuntimeError, match="no memory"), lora.merged(adapted.unet):
        raise RuntimeError("no memory")
    assert all(torch.equal(values, before[name]) for name, values in adapted.unet.state_dict().items())


def test_random_steps_are_distinct_in_order_and_equally_frequent():
    steps = choose_steps((0, 2, 3, 5), 4000, 2, "random", 0, seeded(0, 1))
    assert steps.shape == (4000, 2) and bool((steps[:, 0] < steps[:, 1]).all())
    counts = torch.bincount(steps.flatten(), minlength=6)
    assert counts[[1, 4]].tolist() == [0, 0]
    # each is in half of the rows: 2000, with standard deviation sqrt(4000 / 4)
    assert bool(((counts[[0, 2, 3, 5]] - 2000).abs() < 5 * 1000**0.5).all())


@pytest.mark.parametrize(
    ("choice", "epoch", "count", "expected"),
    [
        ("first", 3, 2, [0, 1]),
        ("window", 0, 2, [0, 1]),
        ("window", 2, 2, [2, 3]),
        ("window", 4, 2, [0, 1]),
        ("random", 0, 0, [0, 1, 2, 3, 4]),
        ("first", 0, 9, [0, 1, 2, 3, 4]),
    ],
)
def test_steps_are_chosen_as_asked(choice, epoch, count, expected):
    steps = choose_steps(range(5), 3, count, choice, epoch, seeded(0))
    assert steps.tolist() == [expected] * 3
