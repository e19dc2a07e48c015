"""Replaying acquisition: an honest draw, nested budgets, an untouched test split, and scouts that are trained once."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pathalign import workflow
from pathalign.artefacts import fingerprint, partial_dir
from pathalign.cli import main
from pathalign.config import ConfigError
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.reward.ensemble import opinions
from pathalign.schema import InputError, RunRecord
from pathalign.settings.reward import RewardConfig
from pathalign.settings.select import SelectConfig
from pathalign.trainers import scouts, selection
from pathalign.trainers.reward import train_reward
from pathalign.trainers.selection import GradedPool, acquire, budget_counts, select

CLASSES = ("dark", "bright")
AGREEMENT = {"simulated": True, "n_grades": 400, "n_graders": 2, "krippendorff_alpha": {"value": 0.5}}
CHOOSING = ("uncertainty", "disagreement", "diverse", "mixed")


def graded(count: int, seed: int) -> ImageSet:
    """Noisy images shown as a random class; plausible if the brightness is that of the class. Two graders each."""
    generator = torch.Generator().manual_seed(seed)
    bright, class_ids = torch.randint(2, (2, count), generator=generator)
    noise = torch.randint(-50, 51, (count, 3, 16, 16), generator=generator)
    plausible = (bright == class_ids).float().tolist()
    columns = {"plausible": plausible, "n_grades": [2] * count, "failed_brightness": [1 - value for value in plausible]}
    images = (90 + 75 * bright[:, None, None, None] + noise).to(torch.uint8)
    return ImageSet.build(images, class_ids, CLASSES, columns)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    for split, count, seed in (("train", 120, 1), ("validation", 40, 2), ("test", 40, 3)):
        graded(count, seed).save(folder / "feedback", split)
    (folder / "feedback" / "agreement.json").write_text(json.dumps(AGREEMENT))
    real = graded(40, 4)
    bright = torch.where(torch.tensor(real.columns["plausible"]) > 0.5, real.class_ids, 1 - real.class_ids)
    ImageSet.build(real.images, bright, CLASSES).save(folder / "data", "train")
    return folder


def config_of(inputs: Path, **values) -> SelectConfig:
    given = {"feedback": str(inputs / "feedback"), "data": str(inputs / "data"), "start": 0.1, "batches": 3}
    return SelectConfig(**{**given, "scout_members": 2, "scout_steps": 2, **values})


@pytest.fixture
def untrained(monkeypatch) -> list[int]:
    """Scouts that depend on what they would have learnt from, but are not trained; counts what that is."""
    learnt_from: list[int] = []

    def scout(settings, train, validation, agreement, seed, scratch):
        learnt_from.append(len(train))
        torch.manual_seed(seed)
        model = RewardModelConfig(class_names=list(CLASSES), convnet_channels=[4, 8], image_size_px=16)
        model.num_members = settings.members
        return RewardModel(model).eval()

    monkeypatch.setattr(selection, "train_scout", scout)
    return learnt_from


def order_of(inputs: Path, tmp_path: Path, **values) -> selection.Acquisition:
    config = config_of(inputs, **values)
    pool = GradedPool.load(config)
    return acquire(config, pool, budget_counts(config.budget, len(pool.train), len(pool.validation)), tmp_path)


def test_random_takes_every_image_alike_and_pairs_of_them_too(inputs, tmp_path):
    config = config_of(inputs, budget=0.25)
    pool = GradedPool.load(config)
    drawn = [acquire(replace(config, seed=seed), pool, (30, 10), tmp_path).train for seed in range(400)]
    counts = Counter(row for rows in drawn for row in rows)
    # Binomial with n = 400, p = 1/4: mean 100, standard deviation 8.7; 4.5 of them hold for 120 images.
    assert len(counts) == 120 and min(counts.values()) > 100 - 39 and max(counts.values()) < 100 + 39
    together = Counter(pair for rows in drawn for pair in zip(rows[::2], rows[1::2], strict=True))
    assert max(together.values()) <= 6


@pytest.mark.parametrize("strategy", ("random", *CHOOSING))
def test_a_smaller_budget_is_the_beginning_of_a_larger_one(inputs, tmp_path, untrained, strategy):
    found = [order_of(inputs, tmp_path, strategy=strategy, budget=budget) for budget in (0.1, 0.25, 0.5, 1.0)]
    for smaller, larger in pairwise(found):
        assert larger.train[: len(smaller.train)] == smaller.train
        assert larger.validation[: len(smaller.validation)] == smaller.validation
    assert [len(each.train) for each in found] == [12, 30, 60, 120]
    assert sorted(found[-1].train) == list(range(120)) and sorted(found[-1].validation) == list(range(40))
    assert order_of(inputs, tmp_path, strategy=strategy, budget=0.5) == found[2]


def test_all_strategies_begin_with_the_same_random_images_and_grow_by_a_constant_factor(inputs, tmp_path, untrained):
    random = order_of(inputs, tmp_path, budget=1.0)
    for strategy in CHOOSING:
        untrained.clear()
        found = order_of(inputs, tmp_path, strategy=strategy, budget=0.9)
        assert found.train[:12] == random.train[:12] and found.validation == random.validation[:36]
        assert untrained == [12, 26, 56]  # 120 / 12 = 10 in three rounds: 2.15 each
        assert found.rounds[:27] == [0] * 12 + [1] * 14 + [2] and found.bits[11] is None and found.bits[12] is not None
        assert found.train != random.train[:108]


def test_an_ensembles_opinions_average_to_what_the_model_says(inputs):
    model = RewardModelConfig(class_names=list(CLASSES[::-1]), convnet_channels=[4, 8], image_size_px=16, num_members=3)
    model.temperature = 1.7
    torch.manual_seed(0)
    scout, images = RewardModel(model).eval(), graded(30, 5)
    found = opinions([scout], images, batch_size=8)
    with torch.no_grad():
        rewards = scout.rewards(images.pixel_values(), scout.class_ids(images.labels())).double().numpy()
    logits = np.log(found.probabilities / (1 - found.probabilities))
    np.testing.assert_allclose(1 / (1 + np.exp(-logits.mean(axis=0))), rewards, atol=1e-5)
    assert found.features.shape == (30, 3 * 8)
    both = opinions([scout, scout], images)
    assert both.probabilities.shape == (6, 30)
    np.testing.assert_allclose(np.square(both.features).sum(axis=1).mean(), 6)  # no encoder outweighs another


def test_a_selection_is_a_feedback_dataset_whose_test_split_is_untouched(inputs, tmp_path, untrained):
    record = select(config_of(inputs, strategy="mixed", budget=40), tmp_path / "selection")
    whole = ImageSet.load(inputs / "feedback", "test")
    test = ImageSet.load(tmp_path / "selection", "test")
    assert test.image_ids == whole.image_ids and test.columns == whole.columns
    train = ImageSet.load(tmp_path / "selection", "train")
    assert (len(train), len(ImageSet.load(tmp_path / "selection", "validation"))) == (30, 10)
    agreement = json.loads((tmp_path / "selection" / "agreement.json").read_text())
    assert agreement["n_grades"] == 2 * 80 and agreement["selected_from"]["n_grades"] == 400
    assert agreement["simulated"] is True
    order = json.loads((tmp_path / "selection" / "acquisition.json").read_text())
    assert [row["image_id"] for row in order["train"]] == list(train.image_ids)
    assert (record.metrics["n"], record.metrics["of"], RunRecord.load(tmp_path / "selection").stage) == (
        40,
        160,
        "select",
    )
    assert not (tmp_path / "selection" / "scouts").exists()


def test_a_reward_model_learns_from_what_the_command_selected(inputs, tmp_path):
    arguments = ["--feedback", str(inputs / "feedback"), "--data", str(inputs / "data"), "--budget", "0.3", "--json"]
    result = CliRunner().invoke(main, ["study", "replay", *arguments, "--output-dir", str(tmp_path / "part")])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["metrics"]["n"] == 36 + 12
    reward = RewardConfig(
        feedback=str(tmp_path / "part"), data=str(inputs / "data"), max_steps=2, batch_size=8, augment="none"
    )
    assert train_reward(reward, tmp_path / "reward").metrics["n"] == 40


@pytest.mark.slow
def test_after_ctrl_c_a_scout_that_is_trained_is_not_trained_again(inputs, tmp_path, monkeypatch):
    config = config_of(inputs, strategy="uncertainty", budget=0.5, start=0.2, batches=4)
    train, trained = scouts.train_reward, []

    def interrupted(reward_config, folder):
        if len(trained) == 1:
            raise KeyboardInterrupt
        trained.append(len(ImageSet.load(reward_config.feedback, "train")))
        return train(reward_config, folder)

    monkeypatch.setattr(scouts, "train_reward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        select(config, tmp_path / "selection")
    assert partial_dir(tmp_path / "selection").is_dir() and not (tmp_path / "selection").exists()

    def counted(reward_config, folder):
        trained.append(len(ImageSet.load(reward_config.feedback, "train")))
        return train(reward_config, folder)

    monkeypatch.setattr(scouts, "train_reward", counted)
    select(config, tmp_path / "selection")
    assert trained == [24, 36, 54]
    select(config, tmp_path / "straight")
    assert fingerprint(tmp_path / "straight") == fingerprint(tmp_path / "selection")


def test_what_cannot_be_replayed_is_refused_with_what_to_type(inputs, tmp_path):
    with pytest.raises(InputError, match="`budget` is 161 images, and the feedback has 160"):
        select(config_of(inputs, budget=161), tmp_path / "selection")
    with pytest.raises(InputError, match="the budget buys 2, all of one verdict"):
        select(config_of(inputs, budget=2), tmp_path / "selection")
    for values, text in (
        ({"budget": 0.0}, "`budget` is 0; give a share"),
        ({"budget": 2.5}, "`budget` is 2.5"),
        ({"strategy": "disagreement", "scout_members": 1}, "raise `scout_members`"),
    ):
        with pytest.raises(ConfigError, match=text):
            config_of(inputs, **values)
    assert not (tmp_path / "selection").exists()


def test_in_a_run_all_after_it_read_the_selection_if_the_configuration_has_one():
    plain = {job.step.folder: job.config for job in workflow.plan({}, Path("x"))}
    assert "selection" not in plain and plain["reward"].feedback == str(Path("x/feedback"))
    for section in ({"budget": 0.1}, None):  # `select:` alone is a wish too
        jobs = {job.step.folder: job.config for job in workflow.plan({"select": section, "rounds": 2}, Path("x"))}
        assert jobs["selection"].feedback == str(Path("x/feedback"))
        assert jobs["reward"].feedback == jobs["evaluation"].feedback == str(Path("x/selection"))
        assert jobs["round-2/selection"].feedback == str(Path("x/round-2/feedback"))
        assert jobs["round-2/reward"].feedback == str(Path("x/round-2/selection"))
