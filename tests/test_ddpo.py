"""DDPO: estimators against theory, gradients against differences, what changes, and what an interruption costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from brightness import CLASSES, MEASURED, SPENT, Brightness, epoch_rows, small_inputs, steady_rows
from torch import Tensor, nn
from torch.distributions import Normal

from pathalign.artefacts import partial_dir
from pathalign.config import ConfigError
from pathalign.diffusion import lora
from pathalign.generate import load_pipeline
from pathalign.images import ImageSet
from pathalign.randomness import seeded
from pathalign.schema import InputError, RunRecord
from pathalign.settings.ddpo import DDPOConfig, GRPOConfig
from pathalign.trainers.adapter import TRAINING
from pathalign.trainers.ddpo import DDPOTrainer, align, even_parts, policy_loss, share_of

PROJECT = Path(__file__).resolve().parents[1]
SMALL = {
    "train_steps": 2,
    "kl_weight": 0.0,
    "epochs": 2,
    "images_per_class": 4,
    "inference_steps": 4,
    "sample_batch_size": 5,
    "batch_size": 6,
    "micro_batch_size": 5,
    "lora_rank": 2,
    "check_images_per_class": 2,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Settings of a small run on an untrained pipeline."""
    return {**SMALL, **small_inputs(tmp_path_factory.mktemp("inputs"))}


@pytest.fixture
def trainer_of(tmp_path, tiny_pipeline, tiny_images):
    """Makes a trainer on the tiny pipeline; its adapter is moved away from zero."""

    def make(config_class=DDPOConfig, reward_model=None, pipeline=tiny_pipeline, **options) -> DDPOTrainer:
        config = config_class(**SMALL | options)
        trainer = DDPOTrainer(pipeline, reward_model or Brightness(), tiny_images, config, tmp_path)
        generator = torch.Generator().manual_seed(1)
        for parameter in trainer.parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data += 0.05 * noise
        return trainer

    return make


# The estimators.


def toy_gradients(estimator: str, theta: float, drawn_by: float, std: float, count: int) -> Tensor:
    """One estimate for each draw of d/dtheta E[x], x ~ N(theta, std^2), from draws of N(drawn_by, std^2)."""
    generator = torch.Generator().manual_seed(0)
    actions = drawn_by + std * torch.randn(count, generator=generator, dtype=torch.float64)
    mean = torch.full((count,), theta, dtype=torch.float64, requires_grad=True)
    log_prob = Normal(mean, std).log_prob(actions)
    old = Normal(torch.full_like(mean, drawn_by).detach(), std).log_prob(actions)
    (gradient,) = torch.autograd.grad(policy_loss(log_prob, old, actions, estimator, 1e9).sum(), mean)
    return -gradient


def moments_by_quadrature(estimator: str, theta: float, drawn_by: float, std: float) -> tuple[float, float]:
    """Mean and variance of the estimate, by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    actions, weights = drawn_by + std * nodes, weights / weights.sum()
    ratio = np.exp((np.square(actions - drawn_by) - np.square(actions - theta)) / (2 * std**2))
    values = actions * (actions - theta) / std**2 * (ratio if estimator == "importance_sampling" else 1)
    mean = float(weights @ values)
    return mean, float(weights @ np.square(values - mean))


@pytest.mark.parametrize("estimator", ["importance_sampling", "score_function"])
@pytest.mark.parametrize("drawn_by", [0.4, 0.7])
def test_mean_and_variance_of_the_estimators_agree_with_theory(estimator, drawn_by):
    theta, std, count = 0.4, 0.8, 400_000
    estimates = toy_gradients(estimator, theta, drawn_by, std, count)
    mean, variance = moments_by_quadrature(estimator, theta, drawn_by, std)
    if estimator == "importance_sampling" or drawn_by == theta:
        assert mean == pytest.approx(1.0)  # d/dtheta E[x] = 1: unbiased
    else:
        assert mean == pytest.approx(1 + drawn_by * (drawn_by - theta) / std**2)  # the bias of stale draws
    assert float(estimates.mean()) == pytest.approx(mean, abs=5 * (variance / count) ** 0.5)
    assert float(estimates.var()) == pytest.approx(variance, rel=0.05)


def test_both_estimators_have_the_same_gradient_on_steps_of_the_current_policy():
    on_policy = [toy_gradients(name, 0.3, 0.3, 1.2, 50) for name in ("importance_sampling", "score_function")]
    torch.testing.assert_close(*on_policy)


@pytest.mark.parametrize(
    ("ratio", "advantage", "pulls"),
    [(1.2, 1.0, False), (0.8, 1.0, True), (1.2, -1.0, True), (0.8, -1.0, False), (1.05, 1.0, True)],
)
def test_a_step_that_has_gone_far_enough_in_its_direction_is_pulled_no_further(ratio, advantage, pulls):
    log_prob = torch.tensor([ratio]).log().requires_grad_()
    loss = policy_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), "importance_sampling", 0.1)
    expected = min(ratio * advantage, float(np.clip(ratio, 0.9, 1.1)) * advantage)  # PPO, equation 7
    assert float(loss.detach()) == pytest.approx(-expected)
    loss.sum().backward()
    assert bool(log_prob.grad != 0) == pulls


# One update.


def gradients_of(trainer: DDPOTrainer, monkeypatch, epoch: int = 0) -> list[list[Tensor]]:
    """Gradients of each optimizer step of an epoch; nothing is updated."""
    found = []

    def update(*_) -> float:
        found.append([parameter.grad.clone() for parameter in trainer.parameters])
        trainer.optimizer.zero_grad()
        return 0.0

    monkeypatch.setattr(trainer, "update", update)
    trainer.epoch(epoch)
    return found


@pytest.mark.parametrize(
    "options", [{"kl_weight": 0.7, "guidance_scale": 0.5}, pytest.param({}, marks=pytest.mark.slow)]
)
def test_the_policy_gradient_is_that_of_finite_differences(
    trainer_of, tiny_pipeline, tiny_images, monkeypatch, options
):
    tiny_pipeline.unet.double()
    trainer = trainer_of(
        pipeline=tiny_pipeline, batch_size=12, micro_batch_size=9, train_steps=0, merge_adapter=False, **options
    )
    for parameter in trainer.parameters:
        parameter.data = parameter.data.double()
    trainer.average = [values.double() for values in trainer.average]
    (gradients,) = gradients_of(trainer, monkeypatch)
    batch = trainer.collect(0)
    trajectories = batch.trajectories
    pairs = torch.cartesian_prod(torch.arange(12), torch.arange(3))
    before, after = trajectories.pairs(*pairs.unbind(1), torch.device("cpu"))
    steps = trajectories.steps[tuple(pairs.unbind(1))]
    class_ids, timesteps = trajectories.class_ids[pairs[:, 0]], trainer.policy.timesteps[steps]

    @torch.no_grad()
    def terms() -> tuple[Tensor, Tensor]:
        mean = trainer.policy.mean(before, trainer.denoiser(before, timesteps, class_ids), steps)
        std = trainer.policy.stds[steps].double()[:, None, None, None]
        return Normal(mean, std).log_prob(after).mean(dim=(1, 2, 3)), mean / std

    old = terms()[0]
    with lora.disabled(trainer.unet):
        base = terms()[1]

    def objective() -> float:
        log_prob, mean = terms()
        divergence = (mean - base).square().mean(dim=(1, 2, 3)) / 2
        surrogate = (log_prob - old).exp() * batch.advantages.double()[pairs[:, 0]]
        return float((trainer.config.kl_weight * divergence - surrogate).mean())

    generator = torch.Generator().manual_seed(2)
    for _ in range(2):
        direction = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in gradients]
        values = []
        for size in (1e-5, -1e-5):
            for parameter, along in zip(trainer.parameters, direction, strict=True):
                parameter.data += size * along
            values.append(objective())
            for parameter, along in zip(trainer.parameters, direction, strict=True):
                parameter.data -= size * along
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=2e-4, abs=1e-9)


def test_the_gradient_does_not_depend_on_how_many_images_are_sampled_or_trained_on_at_once(trainer_of, monkeypatch):
    trainer = trainer_of()
    expected = gradients_of(trainer, monkeypatch)
    assert len(expected) == 2  # 12 images in steps of at most 6
    for sizes in ({"sample_batch_size": 12, "micro_batch_size": 12}, {"sample_batch_size": 3, "micro_batch_size": 1}):
        trainer.config = replace(trainer.config, **sizes)
        for one, other in zip(expected, gradients_of(trainer, monkeypatch), strict=True):
            for gradient, same in zip(one, other, strict=True):
                torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"channels_last": True}, {"trajectory_device": "cpu"}]
)
def test_options_for_memory_and_speed_change_no_gradient(trainer_of, tiny_pipeline, monkeypatch, options):
    expected = gradients_of(trainer_of(pipeline=deepcopy(tiny_pipeline)), monkeypatch)
    got = gradients_of(trainer_of(**options), monkeypatch)
    for one, other in zip(expected, got, strict=True):
        for gradient, same in zip(one, other, strict=True):
            torch.testing.assert_close(gradient, same, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"merge_adapter": False}, {"guidance_scale": 1.5}, {"mixed_precision": "bf16"}]
)
def test_the_ratio_is_exactly_one_before_the_first_update(trainer_of, options):
    figures = trainer_of(batch_size=12, train_steps=0, **options).epoch(0)
    assert (figures["ratio_mean"], figures["ratio_deviation"], figures["clip_share"]) == (1.0, 0.0, 0.0)
    assert figures["sampling_error"] < (1e-5 if "mixed_precision" not in options else 1e-2)


def test_later_updates_of_an_epoch_have_a_ratio_to_the_policy_that_drew(trainer_of):
    figures = trainer_of(learning_rate=1e-3, inner_epochs=2).epoch(0)
    assert figures["ratio_deviation"] > 1e-6
    assert 0 < figures["clip_share"] < 1


def test_the_real_term_is_added_with_its_weight(trainer_of, tiny_pipeline, monkeypatch):
    trainer = trainer_of(batch_size=12, beta=0.5, real_batch_size=4)
    (both,) = gradients_of(trainer, monkeypatch)
    trainer.config = replace(trainer.config, beta=0.0)
    (policy,) = gradients_of(trainer, monkeypatch)
    generator = seeded(0, TRAINING, 0, 0)
    torch.randperm(1, generator=generator)
    trainer.real_loss(generator).backward()
    for parameter, sum_of_both, own in zip(trainer.parameters, both, policy, strict=True):
        torch.testing.assert_close(sum_of_both - own, 0.5 * parameter.grad, rtol=1e-3, atol=1e-5)


def test_unet_calls_are_counted(trainer_of):
    # 12 images, 4 steps, 2 of them trained; the divergence is probed on the first micro-batch of 5
    figures = trainer_of(train_steps=2).epoch(0)
    assert (figures["unet_forwards"], figures["unet_backwards"]) == (12 * 4 + 12 * 2 + 5, 12 * 2)


def test_counts_with_divergence_guidance_and_inner_epochs(trainer_of):
    figures = trainer_of(train_steps=2, kl_weight=0.1, guidance_scale=2.0, inner_epochs=2).epoch(0)
    assert figures["unet_forwards"] == 2 * (12 * 4 + 2 * (12 * 2 + 12 * 2))
    assert figures["unet_backwards"] == 2 * 2 * 12 * 2


def test_divergence_from_the_base_model_is_zero_only_without_adapter(trainer_of):
    trainer = trainer_of(kl_weight=0.1, batch_size=12, learning_rate=0.0)
    moved = trainer.epoch(0)["kl"]
    trainer.use([torch.zeros_like(weights) for weights in trainer.average])
    assert moved > 1e-6 and trainer.epoch(1)["kl"] == 0.0


# Rewards.


class ByClass(nn.Module):
    """Rewards by class name; the classes are in another order than the pipeline's."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Brightness().config
        self.seen: list[Tensor] = []

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        self.seen.append(pixel_values)
        values = {"a": 0.1, "b": 0.5, "c": 0.9}
        own = [values[self.config.class_names[class_id]] for class_id in class_ids.tolist()]
        return torch.tensor(own) + 0.01 * pixel_values.mean(dim=(1, 2, 3))


def test_the_reward_sees_saved_images_and_its_own_class_numbers(trainer_of):
    model = ByClass()
    figures = trainer_of(reward_model=model).epoch(0)
    assert [round(figures[f"reward_{name}"], 1) for name in CLASSES] == [0.1, 0.5, 0.9]
    pixels = (torch.cat(model.seen) + 1) * 127.5
    assert len(pixels) == 12
    torch.testing.assert_close(pixels, pixels.round(), rtol=0, atol=1e-4)  # 8 bits


def test_each_epoch_draws_other_images(trainer_of):
    trainer = trainer_of(learning_rate=0.0)
    first, again, second = (trainer.collect(number).trajectories.samples for number in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)


@pytest.mark.parametrize("failure", ["nan", "error"])
def test_a_reward_that_fails_ends_the_run_and_the_epochs_before_are_kept(
    settings, brightness, tmp_path, monkeypatch, failure
):
    plain = Brightness.rewards

    def failing(self, pixel_values, class_ids):
        rewards = plain(self, pixel_values, class_ids)
        if self.calls == 7:  # the second batch of the second epoch, after a check of two batches
            if failure == "error":
                raise RuntimeError("the server is gone")
            rewards[0] = float("nan")
        return rewards

    monkeypatch.setattr(Brightness, "rewards", failing)
    config = DDPOConfig(**settings, checkpoint_every_steps=100)
    message = (
        "brightness gave 1 values of 5 that are not finite" if failure == "nan" else r"RuntimeError: the server is gone"
    )
    with pytest.raises(InputError, match=f"In epoch 2 .*{message}.*The 1 epochs before are kept.*brightness"):
        align(config, tmp_path / "adapter")
    (checkpoint,) = (partial_dir(tmp_path / "adapter") / "checkpoints").glob("step-*.pt")
    assert checkpoint.name == "step-0000001.pt"
    if failure == "nan":
        monkeypatch.setattr(Brightness, "rewards", plain)
        align(config, tmp_path / "adapter")
        align(config, tmp_path / "straight")
        assert contents(tmp_path / "adapter") == contents(tmp_path / "straight")


def test_equal_rewards_are_refused_with_advice(settings, brightness, tmp_path):
    brightness.slope = 0.0
    with pytest.raises(InputError, match=r"All 12 rewards of the first epoch are about 0\.5000.*evaluation\.json"):
        align(DDPOConfig(**settings), tmp_path / "adapter")


# Whole runs.


def contents(folder: Path) -> tuple[bytes, list[dict], list[float]]:
    """What equal runs have in common."""
    rewards = RunRecord.load(folder).metrics["reward_by_epoch"]
    return (folder / lora.WEIGHTS_NAME).read_bytes(), steady_rows(folder), rewards


@pytest.mark.parametrize(
    ("config_class", "slope"),
    [
        (DDPOConfig, 12.0),
        pytest.param(DDPOConfig, -12.0, marks=pytest.mark.slow),
        pytest.param(GRPOConfig, 12.0, marks=pytest.mark.slow),
        pytest.param(GRPOConfig, -12.0, marks=pytest.mark.slow),
    ],
)
def test_training_raises_the_reward_of_fresh_images_and_changes_the_adapter_only(
    settings, tmp_path, config_class, slope
):
    model = Brightness(slope=slope)
    larger = {"epochs": 8, "images_per_class": 16, "group_size": 8, "batch_size": 24, "micro_batch_size": 48}
    config = config_class(**settings | larger | {"sample_batch_size": 48, "lora_rank": 4, "learning_rate": 5e-3})
    pipeline = load_pipeline(settings["base_model"])
    frozen = {name: values.clone() for name, values in pipeline.unet.named_parameters()}
    (tmp_path / "checkpoints").mkdir()
    trainer = DDPOTrainer(pipeline, model, ImageSet.load(settings["data"]), config, tmp_path)
    started = {name: values.detach().clone() for name, values in lora.parameters(pipeline.unet).items()}
    record = trainer.train()
    rewards = record.metrics["reward_by_epoch"]
    assert len(rewards) == 8
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.02
    after = {name.replace(".base_layer", ""): values for name, values in pipeline.unet.named_parameters()}
    assert set(after) == set(frozen) | set(started)
    assert [name for name in frozen if not torch.equal(frozen[name], after[name])] == []
    assert [name for name in started if torch.equal(started[name], after[name])] == []


def test_one_log_line_for_each_epoch(settings, brightness, tmp_path):
    align(DDPOConfig(**settings), tmp_path / "adapter")
    rows = epoch_rows(tmp_path / "adapter")
    names = """step reward reward_std reward_a reward_b reward_c loss real_loss kl ratio_mean ratio_deviation clip_share
    sampling_error gradient_norm learning_rate"""
    assert [row["step"] for row in rows] == [1, 2]
    assert all(set(row) - {"check_reward"} == {*names.split(), *SPENT} for row in rows)
    for row in rows:
        assert row["reward"] == pytest.approx(np.mean([row[f"reward_{name}"] for name in CLASSES]), rel=1e-5)
    pipeline = load_pipeline(settings["base_model"])
    pipeline.load_lora_weights(tmp_path / "adapter", weight_name=lora.WEIGHTS_NAME)


@pytest.mark.parametrize(
    ("config_class", "interrupted_in"),
    [
        (DDPOConfig, 2),
        pytest.param(DDPOConfig, 1, marks=pytest.mark.slow),
        pytest.param(GRPOConfig, 2, marks=pytest.mark.slow),
    ],
)
def test_the_same_call_after_an_interruption_ends_as_a_straight_run(
    settings, brightness, tmp_path, config_class, interrupted_in
):
    options = {"group_size": 2, "inner_epochs": 2, "beta": 0.1, "real_batch_size": 2, "kl_weight": 0.1}
    config = config_class(**settings | options)
    align(config, tmp_path / "straight")
    brightness.calls, brightness.interrupt_at = 0, 3 * interrupted_in - 1  # 12 images are three batches
    with pytest.raises(KeyboardInterrupt):
        align(config, tmp_path / "stopped")
    align(config, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_problems_of_settings_are_named_together():
    with pytest.raises(ConfigError) as raised:
        GRPOConfig(eta=0, estimator="score_function", inner_epochs=2, group_size=3, train_steps=20)
    assert [text.split("`")[1] for text in raised.value.problems] == [
        "eta",
        "inner_epochs",
        "images_per_class",
        "train_steps",
    ]


@pytest.mark.parametrize(("count", "largest"), [(15, 6), (100, 50), (7, 3), (2, 5), (1, 1)])
def test_batches_and_shares_hold_every_image_once(count, largest):
    batches = even_parts(count, largest)
    assert [row for batch in batches for row in batch] == list(range(count))
    assert max(map(len, batches)) <= largest and max(map(len, batches)) - min(map(len, batches)) <= 1
    for processes in (1, 2, 3):
        for batch in batches:
            shares = [share_of(batch, process, processes) for process in range(processes)]
            assert [row for share in shares for row in share] == list(batch)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


SCRIPT = """
import sys
from brightness import Brightness
from pathalign.reward import RewardModel
from pathalign.settings.ddpo import DDPOConfig
from pathalign.trainers.ddpo import align
import json, torch
torch.set_num_threads(1)
RewardModel.from_pretrained = lambda *_: Brightness()
align(DDPOConfig(**json.loads(sys.argv[1])), sys.argv[2])
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(settings, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    options = {
        "images_per_class": 5,
        "inner_epochs": 2,
        "learning_rate": 1e-4,
        "kl_weight": 0.1,
        "beta": 0.1,
        "eta": 1.0,  # less noise would magnify rounding in the log-probabilities
    }
    # batches of 5 images are shared 2 and 3; the last sampling batch of each process is smaller
    environment = {
        **os.environ,
        "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    for processes in (1, 2):
        launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        values = json.dumps({**settings, **options, "real_batch_size": 4 // processes})
        command = [sys.executable, "-m", *launch, str(script), values, str(tmp_path / str(processes))]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path, timeout=300)
    one, two = (epoch_rows(tmp_path / name) for name in ("1", "2"))
    assert [row["step"] for row in two] == [1, 2]
    for row, other in zip(one, two, strict=True):
        assert {name: other[name] for name in row if name not in MEASURED} == pytest.approx(
            {name: value for name, value in row.items() if name not in MEASURED}, rel=2e-3, abs=1e-5
        )
    assert sum(row["unet_backwards"] for row in two) == sum(row["unet_backwards"] for row in one)
