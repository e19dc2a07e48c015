"""Rewards from models, functions and weighted sums: values, class ids, gradients, errors, and the worker thread."""

from __future__ import annotations

import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pathalign.cards import Grading, render
from pathalign.config import ConfigError
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import InputError, RunRecord
from pathalign.settings.adapter import GuardedConfig, is_function, weighted_source
from pathalign.trainers.rewards import (
    AsynchronousRewards,
    RewardFunction,
    RewardPart,
    WeightedRewards,
    class_map,
    identity,
    load_reward,
    load_rewards,
    require_finite_rewards,
    without_gradient,
)

CLASSES = ("a", "b", "c")


class Channel(nn.Module):
    """A reward model of one channel's mean, plus the position of the class in its own order."""

    def __init__(self, channel: int, class_names: tuple[str, ...] = CLASSES, grading: dict | None = None) -> None:
        super().__init__()
        self.channel, self.device = channel, torch.device("cpu")
        self.config = RewardModelConfig(class_names=list(class_names), grading=grading)

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        return pixel_values[:, self.channel].mean(dim=(1, 2)) + class_ids


@pytest.fixture
def functions(monkeypatch) -> types.ModuleType:
    """A module of the user's, `my_rewards`."""
    module = types.ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, "my_rewards", module)
    return module


@pytest.fixture
def models(monkeypatch) -> dict[str, Channel]:
    """Reward models that can be loaded, by name."""
    found = {"red": Channel(0), "green": Channel(1, CLASSES[::-1]), "narrow": Channel(2, ("a", "b"))}
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda source: found[source])
    return found


def batch(count: int = 6) -> tuple[Tensor, Tensor]:
    pixel_values = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return pixel_values, torch.arange(count) % 3


def test_a_function_sees_uint8_images_and_class_names(functions):
    seen = []

    def reward(images, labels):
        seen.append((images, labels))
        return images.float().mean(dim=(1, 2, 3)).numpy() / 255 + np.array(
            [{"a": 10, "b": 20, "c": 30}[x] for x in labels]
        )

    functions.reward = reward
    pixel_values, class_ids = batch()
    rewards = load_reward("my_rewards:reward", CLASSES).rewards(pixel_values, class_ids)
    ((images, labels),) = seen
    expected = np.rint((pixel_values.numpy() + 1) * 127.5)
    np.testing.assert_array_equal(images.numpy(), expected)
    assert images.dtype == torch.uint8 and labels == ["a", "b", "c", "a", "b", "c"]
    np.testing.assert_allclose(rewards, expected.mean(axis=(1, 2, 3)) / 255 + [10, 20, 30, 10, 20, 30], rtol=1e-6)
    assert rewards.dtype == torch.float32


@pytest.mark.parametrize("form", [list, np.asarray, torch.tensor, tuple])
def test_a_function_may_return_any_sequence_of_numbers(functions, form):
    functions.reward = lambda images, labels: form([-2.5, 0.0, 7.0])
    assert RewardFunction("my_rewards:reward", CLASSES).rewards(*batch(3)).tolist() == [-2.5, 0.0, 7.0]


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def one(images, labels):\n    return [1.0] * len(labels)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_reward("rewards_of_mine:one", CLASSES).rewards(*batch(2)).tolist() == [1.0, 1.0]
    before = identity("rewards_of_mine:one")
    (tmp_path / "rewards_of_mine.py").write_text("def one(images, labels):\n    return [2.0] * len(labels)\n")
    assert before.startswith("rewards_of_mine:one@") and identity("rewards_of_mine:one") != before
    monkeypatch.delitem(sys.modules, "rewards_of_mine")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no_such_module_here:reward", "module 'no_such_module_here' cannot be imported"),
        ("my_rewards:rewrad", "Did you mean 'reward'"),
        ("my_rewards:number", "`number` is no function"),
    ],
)
def test_a_function_that_cannot_be_found_is_explained(functions, source, message):
    functions.reward, functions.number = len, 5
    with pytest.raises(InputError, match=message):
        load_reward(source, CLASSES)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0, 2.0], r"my_rewards:reward returned 2 values of shape \(2,\) for 6 images"),
        (torch.ones(6, 1), r"returned 6 values of shape \(6, 1\)"),
        (3.0, r"returned 1 values of shape \(\) for 6 images"),
        ("high", "returned a str that is no list of numbers"),
        (
            [1.0, float("nan"), 2.0, float("inf"), 0.0, 0.0],
            "2 values of 6 that are not finite, the first nan for image 1",
        ),
    ],
)
def test_what_a_function_must_not_return_is_named(functions, returned, message):
    functions.reward = lambda images, labels: returned
    with pytest.raises(InputError, match=message):
        load_reward("my_rewards:reward", CLASSES).rewards(*batch())


def test_weights_add_up_and_each_part_gets_its_own_class_ids(functions, models):
    functions.reward = lambda images, labels: [float(ord(label)) for label in labels]
    config = GuardedConfig(reward_model="red", other_rewards=["green=0.5", "my_rewards:reward=-2"])
    rewards = load_rewards(config, CLASSES)
    pixel_values, class_ids = batch()
    pixels, ids = pixel_values.numpy(), class_ids.numpy()
    expected = pixels[:, 0].mean(axis=(1, 2)) + ids
    expected = expected + 0.5 * (pixels[:, 1].mean(axis=(1, 2)) + 2 - ids) - 2 * (ord("a") + ids)
    np.testing.assert_allclose(rewards.rewards(pixel_values, class_ids), expected, rtol=1e-5)
    assert without_gradient(rewards) == ["my_rewards:reward"]


def test_a_sum_of_reward_models_is_differentiable_and_its_gradient_is_the_sum(models):
    rewards = load_rewards(GuardedConfig(reward_model="red", other_rewards=["green=0.5"]), CLASSES)
    pixel_values, class_ids = batch()
    pixel_values.requires_grad_()
    rewards.rewards(pixel_values, class_ids).sum().backward()
    expected = np.zeros(pixel_values.shape)
    expected[:, 0], expected[:, 1] = 1 / 16, 0.5 / 16
    np.testing.assert_allclose(pixel_values.grad, expected)
    assert without_gradient(rewards) == []


def test_a_gradient_of_a_function_is_refused(functions):
    functions.reward = lambda images, labels: [0.0] * len(labels)
    reward = load_reward("my_rewards:reward", CLASSES)
    pixel_values, class_ids = batch()
    pixel_values.requires_grad_()
    with pytest.raises(InputError, match=r"my_rewards:reward has none.*such as ddpo"):
        reward.rewards(pixel_values, class_ids)
    with torch.no_grad():
        assert reward.rewards(pixel_values, class_ids).tolist() == [0.0] * 6


def test_without_others_the_reward_model_is_itself(models):
    assert load_rewards(GuardedConfig(reward_model="green"), CLASSES) is models["green"]


def test_a_class_that_a_reward_model_does_not_know_is_named_when_it_is_loaded(models):
    for config in (
        GuardedConfig(reward_model="narrow"),
        GuardedConfig(reward_model="red", other_rewards=["narrow=1"]),
    ):
        with pytest.raises(
            InputError, match=r"narrow does not know the classes \['c'\]; it was trained on \['a', 'b'\]"
        ):
            load_rewards(config, CLASSES)
    assert class_map(("c", "x", "a", "b"), CLASSES, "wide").tolist() == [2, 3, 0]


def test_a_part_that_is_not_finite_is_named():
    sick = Channel(1)
    sick.rewards = lambda pixel_values, class_ids: torch.full((len(class_ids),), float("nan"))
    rewards = WeightedRewards([RewardPart("red", Channel(0), 1.0), RewardPart("sick", sick, 0.1)], CLASSES)
    with pytest.raises(InputError, match="Reward sick gave 6 values of 6 that are not finite"):
        rewards.rewards(*batch())
    assert require_finite_rewards(torch.tensor([1.0], dtype=torch.float64), "x").dtype == torch.float32


def test_settings_name_every_wrong_reward_and_a_held_out_model_that_is_trained_on():
    with pytest.raises(ConfigError) as caught:
        GuardedConfig(other_rewards=["a", "b=high", "=1", "c=inf"], held_out_reward_model="runs/reward")
    assert len(caught.value.problems) == 5
    assert "write SOURCE=WEIGHT" in caught.value.problems[0] and "which is trained on" in caught.value.problems[-1]
    with pytest.raises(ConfigError, match="'other', which is trained on"):
        GuardedConfig(other_rewards=["other=2"], held_out_reward_model="other")
    assert weighted_source("runs/a=b=-0.5") == ("runs/a=b", -0.5)


def test_only_module_and_function_look_like_a_function(tmp_path, monkeypatch):
    assert is_function("a.b_c:d") and is_function("m:f")
    assert not any(is_function(text) for text in ("user/model", "runs/reward", "a:b:c", "a:", "C:/rewards", "a b:c"))
    monkeypatch.chdir(tmp_path)
    Path("m:f").mkdir()
    assert not is_function("m:f")


def test_the_card_says_that_a_function_rewarded_and_who_graded_beside_it(functions, models):
    functions.reward = len
    record = RunRecord("align", {})
    alone = load_reward("my_rewards:reward", CLASSES).config.grading
    card = render("lora_adapter", record, grading=Grading(**alone), base_model="someone/cells")
    assert "Nobody: the rewards are no model of anybody's grades." in card and "`my_rewards:reward`" in card
    assert "Experts, under pseudonyms." not in card
    models["red"].config.grading = {"simulated": False, "n_grades": 90}
    models["green"].config.grading = {"simulated": True, "n_grades": 7}
    config = GuardedConfig(reward_model="red", other_rewards=["green=1", "my_rewards:reward=1"])
    grading = Grading(**load_rewards(config, CLASSES).config.grading)
    assert grading == Grading(simulated=True, n_grades=90, functions=("my_rewards:reward",))
    card = render("lora_adapter", record, grading=grading, base_model="someone/cells")
    assert "Simulated graders" in card and "`my_rewards:reward`" in card and "Nobody" not in card


def test_asynchronous_rewards_come_in_the_order_of_submission_from_another_thread_without_gradients():
    threads = set()

    def score(images: Tensor, class_ids: Tensor) -> tuple[float, bool]:
        threads.add(threading.get_ident())
        return float(images.sum()), (images * torch.ones((), requires_grad=True)).requires_grad

    with AsynchronousRewards(score) as scorer:
        for number in range(5):
            scorer.submit(torch.full((2,), float(number)), torch.zeros(2))
        assert scorer.results() == [(2.0 * number, False) for number in range(5)]
        scorer.submit(torch.ones(3), torch.zeros(3))
        assert scorer.results() == [(3.0, False)]
        assert scorer.results() == []
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_drawing_goes_on_while_a_batch_is_scored():
    drawn = threading.Event()

    def score(images: Tensor, class_ids: Tensor) -> bool:
        return drawn.wait(60)

    with AsynchronousRewards(score) as scorer:
        scorer.submit(torch.zeros(1), torch.zeros(1))
        drawn.set()  # reached before the first score is there, or the score is False
        assert scorer.results() == [True]


def test_the_first_error_of_the_worker_is_raised_where_results_are_taken():
    def score(images: Tensor, class_ids: Tensor) -> float:
        if images.sum() > 1:
            raise InputError(f"batch {int(images.sum())} cannot be scored")
        return 0.0

    with AsynchronousRewards(score) as scorer:
        for number in (1, 3, 2):
            scorer.submit(torch.tensor([float(number)]), torch.zeros(1))
        with pytest.raises(InputError, match="batch 3"):
            scorer.results()
    assert not any(thread.name.startswith("rewards") for thread in threading.enumerate())
