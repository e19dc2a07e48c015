"""Reward-weighted denoising: weights and losses against numpy, what changes, and what an interruption costs."""

from __future__ import annotations

import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from brightness import CLASSES, SPENT, Brightness, log_rows, small_inputs, steady_rows
from diffusers import DDIMScheduler
from torch import Tensor

from pathalign.artefacts import artefact, partial_dir
from pathalign.diffusion import lora
from pathalign.generate import load_pipeline, sample, score
from pathalign.images import ImageSet
from pathalign.reward import RewardModel
from pathalign.schema import InputError, RunRecord
from pathalign.settings.pretrain import PretrainConfig
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.trainers.pretrain import new_pipeline, noisy_and_target
from pathalign.trainers.reward_weighted import RewardWeightedTrainer, align
from pathalign.trainers.weighting import class_means, contrastive_loss, reward_weights

WEIGHTINGS = ("contrastive", "advantage", "reward", "normalized", "exponential", "top_share")
CLASS_IDS = [0, 1, 0, 1, 2, 0, 1, 0, 2, 2]
REWARDS = [0.9, 0.2, 0.1, 0.4, 0.5, 0.3, 0.6, 0.7, 0.8, 0.05]
SMALL = {
    "rounds": 2,
    "images_per_class": 4,
    "inference_steps": 2,
    "sample_batch_size": 5,
    "steps_per_round": 3,
    "batch_size": 4,
    "real_batch_size": 2,
    "warmup_steps": 0,
    "lora_rank": 2,
    "checkpoint_every_steps": 2,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Settings of a small run on an untrained pipeline."""
    return {**SMALL, **small_inputs(tmp_path_factory.mktemp("inputs"))}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """The adapter of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "from_pretrained", lambda *_: Brightness())
        align(RewardWeightedConfig(**settings), folder)
    return folder


def weights_of(weighting: str, **parameters) -> np.ndarray:
    config = RewardWeightedConfig(weighting=weighting, **parameters)
    weights = reward_weights(torch.tensor(REWARDS), torch.tensor(CLASS_IDS), config)
    assert weights.dtype == torch.float32
    return weights.numpy()


def by_class(function) -> np.ndarray:
    """`function` applied to the rewards of each class, put back in place."""
    rewards, ids = np.array(REWARDS), np.array(CLASS_IDS)
    result = np.empty_like(rewards)
    for class_id in set(CLASS_IDS):
        result[ids == class_id] = function(rewards[ids == class_id])
    return result


def by_class_means(weights: np.ndarray) -> list[float]:
    ids = np.array(CLASS_IDS)
    return [float(weights[ids == class_id].mean()) for class_id in (0, 1, 2)]


def standard_scores(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / values.std()


def test_class_means_are_those_of_each_images_class():
    mean, spread = class_means(torch.tensor(REWARDS), torch.tensor(CLASS_IDS))
    np.testing.assert_allclose(mean, by_class(np.mean), rtol=1e-6)
    np.testing.assert_allclose(spread, by_class(np.std), rtol=1e-5)


def test_reward_weighting_is_the_papers_reward_itself():
    np.testing.assert_array_equal(weights_of("reward"), np.float32(REWARDS))


def test_normalized_weights_average_one_in_each_class():
    weights = weights_of("normalized")
    np.testing.assert_allclose(weights, by_class(lambda values: values / values.mean()), rtol=1e-5)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.05, 0.2, 2.0])
def test_exponential_weights_are_a_softmax_times_the_number_of_images(temperature):
    powers = np.exp(np.array(REWARDS) / temperature)
    np.testing.assert_allclose(
        weights_of("exponential", temperature=temperature), 10 * powers / powers.sum(), rtol=1e-4
    )


def test_top_share_keeps_the_best_of_each_class_with_equal_weights():
    # 4, 3 and 3 images: 0.5 keeps 2 of each class; kept by hand: 0.9 0.7, 0.6 0.4, 0.8 0.5
    expected = np.isin(REWARDS, [0.9, 0.7, 0.6, 0.4, 0.8, 0.5]) * (10 / 6)
    np.testing.assert_allclose(weights_of("top_share", top_share=0.5), expected, rtol=1e-6)
    assert np.count_nonzero(weights_of("top_share", top_share=0.01)) == 3  # one of each class at least


def test_advantages_are_standard_scores_within_each_class():
    np.testing.assert_allclose(weights_of("advantage"), by_class(standard_scores), rtol=1e-4, atol=1e-6)


def test_contrastive_shares_are_half_for_an_average_image_and_stay_within_0_and_1():
    scores = by_class(standard_scores)
    expected = 0.5 + 0.5 * scores / np.abs(scores).max()
    weights = weights_of("contrastive")
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)
    assert weights.min() >= 0 and weights.max() <= 1
    np.testing.assert_allclose(by_class_means(weights), 0.5, atol=1e-5)


def test_a_class_with_equal_rewards_neither_pulls_nor_pushes():
    config = RewardWeightedConfig(weighting="contrastive")
    weights = reward_weights(torch.tensor([0.4, 0.4, 0.1, 0.9]), torch.tensor([0, 0, 1, 1]), config)
    assert weights.tolist()[:2] == [0.5, 0.5]
    equal = reward_weights(torch.tensor([0.4, 0.4, 0.9, 0.9]), torch.tensor([0, 0, 1, 1]), config)
    assert equal.tolist() == [0.5] * 4


@pytest.fixture
def predictions() -> tuple[Tensor, Tensor, Tensor]:
    """A sampling model's prediction, the target, and shares of five images, in float64."""
    generator = torch.Generator().manual_seed(0)
    old, target = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    return old, target, torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("contrast", [0.1, 1.0, 3.0])
def test_the_contrastive_gradient_at_the_start_is_the_analytic_one_whatever_the_contrast(predictions, contrast):
    old, target, share = predictions

    def loss(prediction: Tensor) -> Tensor:
        return contrastive_loss(prediction, old, target, share, contrast)

    analytic = -2 * (2 * share[:, None, None, None] - 1) * (target - old) / old[0].numel()
    prediction = old.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(prediction).sum(), prediction)
    torch.testing.assert_close(gradient, analytic)
    for pixel in range(0, 48, 7):
        step = torch.zeros_like(old)
        step.flatten(1)[:, pixel] = 1e-5
        differences = (loss(old + step) - loss(old - step)) / 2e-5
        torch.testing.assert_close(differences, analytic.flatten(1)[:, pixel], rtol=1e-5, atol=1e-8)


def test_contrastive_loss_of_wholly_plausible_images_is_the_plain_denoising_loss(predictions):
    old, target, _ = predictions
    prediction = old + 0.3
    loss = contrastive_loss(prediction, old, target, torch.ones(5), contrast=1.0)
    expected = [
        float(np.mean((one - other) ** 2)) for one, other in zip(prediction.numpy(), target.numpy(), strict=True)
    ]
    np.testing.assert_allclose(loss, expected)


@pytest.mark.parametrize("slope", [6.0, pytest.param(-6.0, marks=pytest.mark.slow)])
def test_training_raises_the_reward_of_fresh_images_and_changes_the_adapter_only(settings, tmp_path, slope):
    pipeline, model = load_pipeline(settings["base_model"]), Brightness(slope=slope)
    ids = [index % 3 for index in range(24)]

    def fresh_rewards() -> Tensor:
        return score(model, sample(pipeline, ids, range(10_000, 10_024), 3), ids, CLASSES)

    small = {"rounds": 4, "images_per_class": 16, "inference_steps": 3, "steps_per_round": 30, "batch_size": 12}
    config = RewardWeightedConfig(
        **(settings | small | {"lora_rank": 4}), beta=0.0, contrast=0.2, learning_rate=6e-3, ema_decay=0.5
    )
    before = fresh_rewards()
    frozen = {name: values.clone() for name, values in pipeline.unet.named_parameters()}
    with artefact(tmp_path / "adapter") as folder:
        trainer = RewardWeightedTrainer(pipeline, model, ImageSet.load(settings["data"]), config, folder)
        started = {name: values.detach().clone() for name, values in lora.parameters(pipeline.unet).items()}
        record = trainer.train()
    brighter = fresh_rewards() - before
    assert float(brighter.mean()) >= 0.02
    assert int((brighter > 0).sum()) >= 20  # by chance less than once in 1000
    rounds = record.metrics["mean_reward_by_round"]
    assert len(rounds) == 5 and rounds[-1] > rounds[0]  # each round draws other noise
    after = {name.replace(".base_layer", ""): values for name, values in pipeline.unet.named_parameters()}
    assert set(after) == set(frozen) | set(started)
    assert [name for name in frozen if not torch.equal(frozen[name], after[name])] == []
    assert [name for name in started if torch.equal(started[name], after[name])] == []


def test_a_round_that_does_harm_is_undone_and_the_best_adapter_is_the_one_that_is_written(
    settings, brightness, tmp_path, monkeypatch
):
    seen = []
    plain = RewardWeightedTrainer.collect

    def scripted(self, number):
        """Real images; the rewards fall from round to round, unless the first weights are back."""
        batch = plain(self, number)
        untouched = all(torch.equal(a, b) for a, b in zip(self.sampled_with, first, strict=True))
        seen.append((number, untouched, self.setbacks))
        return replace(batch, rewards=batch.rewards / batch.rewards.max() * (0.5 if untouched else 0.1))

    config = RewardWeightedConfig(**settings, learning_rate=1e-2)
    with artefact(tmp_path / "adapter") as folder:
        pipeline = load_pipeline(settings["base_model"])
        trainer = RewardWeightedTrainer(pipeline, brightness, ImageSet.load(settings["data"]), config, folder)
        first = [weights.clone() for weights in trainer.average]
        monkeypatch.setattr(RewardWeightedTrainer, "collect", scripted)
        record = trainer.train()
    assert seen == [(0, True, 0), (1, False, 0), (1, True, 1), (2, False, 1)]
    assert record.metrics["setbacks"] == 1
    assert all(torch.equal(a, b.detach()) for a, b in zip(first, trainer.parameters, strict=True))
    rows = log_rows(tmp_path / "adapter")
    rates = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]  # cosine over all six steps
    halved = [rate * (0.5 if step >= 3 else 1) for step, rate in enumerate(rates)]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], halved, rtol=1e-6)


def test_the_written_adapter_loads_by_diffusers_own_method_and_changes_images(settings, brightness, tmp_path):
    align(RewardWeightedConfig(**settings, learning_rate=1e-2), tmp_path / "adapter")
    pipeline = load_pipeline(settings["base_model"])
    plain = sample(pipeline, [0, 1], [5, 6], 2)
    pipeline.load_lora_weights(tmp_path / "adapter", weight_name=lora.WEIGHTS_NAME)
    adapted = sample(pipeline, [0, 1], [5, 6], 2)
    assert not torch.equal(plain, adapted)
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline, [0, 1], [5, 6], 2), plain)
    assert RunRecord.load(tmp_path / "adapter").stage == "align"
    assert not (tmp_path / "adapter" / "checkpoints").exists()


def test_one_log_line_for_each_step(settings, brightness, tmp_path):
    align(RewardWeightedConfig(**settings), tmp_path / "adapter")
    rows = log_rows(tmp_path / "adapter")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["round"] for row in rows] == [1, 1, 1, 2, 2, 2]
    names = {"loss", "synthetic_loss", "real_loss", "gradient_norm", "learning_rate", "mean_reward", "step", "round"}
    assert all(set(row) == names | SPENT for row in rows)
    beta = RewardWeightedConfig(**settings).beta
    for row in rows:
        assert row["loss"] == pytest.approx(row["synthetic_loss"] + beta * row["real_loss"], rel=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_each_weighting_trains(settings, brightness, tmp_path, weighting):
    small = settings | {"rounds": 1, "steps_per_round": 2}
    record = align(RewardWeightedConfig(**small, weighting=weighting), tmp_path / "adapter")
    assert (tmp_path / "adapter" / lora.WEIGHTS_NAME).is_file()
    assert np.isfinite(record.metrics["mean_reward_by_round"]).all()


def test_without_the_real_term_no_real_images_are_needed(settings, brightness, tmp_path):
    small = settings | {"rounds": 1, "steps_per_round": 2, "beta": 0.0, "real_batch_size": 0}
    align(RewardWeightedConfig(**small), tmp_path / "adapter")
    rows = log_rows(tmp_path / "adapter")
    assert [row["real_loss"] for row in rows] == [0.0, 0.0]


def contents(folder: Path) -> tuple[bytes, list[dict], list[float]]:
    rewards = RunRecord.load(folder).metrics["mean_reward_by_round"]
    rows = steady_rows(folder, without=SPENT)  # a run that goes on draws its round's images again
    return (folder / lora.WEIGHTS_NAME).read_bytes(), rows, rewards


@pytest.mark.parametrize("interrupt", ["step 1", "step 2", "step 4", "step 6", "images of round 2"])
def test_the_same_call_after_an_interruption_ends_as_a_straight_run(
    settings, straight, brightness, tmp_path, monkeypatch, interrupt
):
    config = RewardWeightedConfig(**settings)
    kind, _, number = interrupt.partition(" ")
    if kind == "step":
        plain, taken = RewardWeightedTrainer.step, []

        def step(self, index):
            if index == int(number) - 1 and not taken:
                taken.append(index)
                raise KeyboardInterrupt
            return plain(self, index)

        monkeypatch.setattr(RewardWeightedTrainer, "step", step)
    else:  # 12 images of a round are three batches of five and fewer
        brightness.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        align(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists() and partial_dir(tmp_path / "stopped").is_dir()
    align(config, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(straight)
    assert not partial_dir(tmp_path / "stopped").exists()


def test_images_do_not_depend_on_how_many_are_drawn_at_once(settings, brightness, tmp_path):
    rewards = []
    for count in (5, 12):
        small = settings | {"rounds": 1, "steps_per_round": 1, "sample_batch_size": count}
        rewards += align(RewardWeightedConfig(**small), tmp_path / str(count)).metrics["mean_reward_by_round"]
    assert rewards[:2] == pytest.approx(rewards[2:], abs=1e-3)  # before the round and at the end


def test_equal_rewards_are_refused_with_advice(settings, brightness, tmp_path):
    brightness.slope = 0.0
    with pytest.raises(InputError, match=r"All 12 rewards of round 1 are about 0\.5000.*evaluation\.json"):
        align(RewardWeightedConfig(**settings), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_its_checkpoints(settings, brightness, tmp_path):
    config = RewardWeightedConfig(**settings | {"checkpoint_every_steps": 1}, learning_rate=1e30)
    with pytest.raises(InputError, match=r"The loss is (nan|inf) at step \d with learning rate \S+e\+29.*Lower"):
        align(config, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert sorted((partial_dir(tmp_path / "adapter") / "checkpoints").glob("step-*.pt"))


def test_rewards_that_are_no_numbers_are_refused(settings, brightness, tmp_path):
    brightness.slope = float("nan")
    with pytest.raises(InputError, match="gives rewards that are no numbers"):
        align(RewardWeightedConfig(**settings), tmp_path / "adapter")


def red_less_blue(images: Tensor, labels: list[str]) -> Tensor:
    """A reward that a user may write: any range, by class name."""
    return (
        images[:, 0].float().mean(dim=(1, 2))
        - images[:, 2].float().mean(dim=(1, 2))
        - 100 * Tensor([label == "c" for label in labels])
    )


def test_a_function_may_give_the_rewards_unless_they_are_negative_weights(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "a_users_module", types.SimpleNamespace(red_less_blue=red_less_blue))
    small = settings | {"reward_model": "a_users_module:red_less_blue", "rounds": 1, "steps_per_round": 1}
    record = align(RewardWeightedConfig(**small), tmp_path / "adapter")
    assert record.metrics["mean_reward_by_round"][0] < 0
    assert "`a_users_module:red_less_blue`" in (tmp_path / "adapter" / "README.md").read_text()
    with pytest.raises(InputError, match=r"rewards below 0 .* Use `weighting: advantage`"):
        align(RewardWeightedConfig(**small, weighting="reward"), tmp_path / "other")


def test_other_classes_or_another_size_are_refused_before_anything_is_drawn(
    settings, brightness, tiny_images, tmp_path
):
    pixels = tiny_images.images
    others = {
        "classes": ImageSet.build(pixels, tiny_images.class_ids, ("a", "b", "d")),
        "size": ImageSet.build(pixels[:, :, :8, :8], tiny_images.class_ids, ("a", "b", "c")),
    }
    for name, message in (("classes", r"\['a', 'b', 'd'\]"), ("size", "images of 8 px.*draws 16 px")):
        others[name].save(tmp_path / name)
        with pytest.raises(InputError, match=message):
            align(RewardWeightedConfig(**settings | {"data": str(tmp_path / name)}), tmp_path / "adapter")
    brightness.config.class_names = ["a", "b"]
    with pytest.raises(InputError, match=r"does not know the classes \['c'\]"):
        align(RewardWeightedConfig(**settings), tmp_path / "adapter")
    assert brightness.calls == 0 and not (tmp_path / "adapter").exists()


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(settings, straight, brightness, tmp_path):
    brightness.interrupt_at = 5
    with pytest.raises(KeyboardInterrupt):
        align(RewardWeightedConfig(**settings | {"seed": 1}), tmp_path / "adapter")
    align(RewardWeightedConfig(**settings), tmp_path / "adapter")
    assert contents(tmp_path / "adapter") == contents(straight)


def test_the_adapter_of_the_default_model_is_smaller_than_5_mb(tmp_path):
    pipeline = new_pipeline(PretrainConfig(), 32, ("a", "b"))
    config = RewardWeightedConfig()
    generator = torch.Generator().manual_seed(0)
    lora.attach(pipeline.unet, config.lora_rank, config.lora_alpha, config.lora_convolutions, generator)
    lora.save(pipeline.unet, tmp_path)
    assert 10_000 < (tmp_path / lora.WEIGHTS_NAME).stat().st_size < 5_000_000


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noisy_images_and_targets_follow_the_papers_formulas(tiny_pipeline, tiny_images, tmp_path, prediction_type):
    tiny_pipeline.scheduler = DDIMScheduler.from_config(tiny_pipeline.scheduler.config, prediction_type=prediction_type)
    trainer = RewardWeightedTrainer(tiny_pipeline, Brightness(), tiny_images, RewardWeightedConfig(**SMALL), tmp_path)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    noisy, target = noisy_and_target(trainer.training_schedule, clean, noise, torch.tensor([10, 900]))
    share = tiny_pipeline.scheduler.alphas_cumprod[[10, 900]][:, None, None, None]
    torch.testing.assert_close(noisy, share.sqrt() * clean + (1 - share).sqrt() * noise)
    velocity = share.sqrt() * noise - (1 - share).sqrt() * clean  # arXiv:2202.00512, appendix D
    torch.testing.assert_close(target, noise if prediction_type == "epsilon" else velocity)
