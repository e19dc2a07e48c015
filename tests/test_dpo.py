"""Diffusion-DPO: the loss against the paper's formula, where pairs come from, what training does, resume, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from brightness import CLASSES, SPENT, Brightness, epoch_rows, small_inputs, steady_rows
from test_exports import preference

from pathalign.artefacts import artefact, partial_dir
from pathalign.diffusion import lora
from pathalign.generate import load_pipeline
from pathalign.grading.exports import picture_of
from pathalign.grading.preferences import preference_pairs, save_pairs
from pathalign.images import ImageSet, content_id, to_pixel_values
from pathalign.reward import RewardModel
from pathalign.schema import InputError, RunRecord
from pathalign.settings.dpo import DPOConfig
from pathalign.trainers.dpo import (
    DPOTrainer,
    agreement_shares,
    align,
    implicit_margins,
    load_pairs,
    preference_losses,
)
from pathalign.trainers.preference_pairs import Pairs, graded_pairs, ranked_pairs, read_preferences

SMALL = {
    "epochs": 3,
    "pairs_per_epoch": 6,
    "passes": 2,
    "batch_size": 4,
    "micro_batch_size": 3,
    "images_per_class": 4,
    "monitor_images_per_class": 1,
    "inference_steps": 2,
    "sample_batch_size": 12,
    "real_batch_size": 2,
    "warmup_steps": 0,
    "lora_rank": 2,
    "checkpoint_every_steps": 1,
    "check_images_per_class": 2,
}


@pytest.fixture
def brightness(monkeypatch) -> Brightness:
    """The reward model that `align` loads."""
    model = Brightness(slope=60.0)
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_: model)
    return model


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """24 images of 16 px in three classes; every second of a class is much brighter."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 100, (24, 3, 16, 16), generator=generator)
    pixels[torch.arange(24) % 6 >= 3] += 150
    return ImageSet.build(pixels.to(torch.uint8), torch.arange(24) % 3, CLASSES)


@pytest.fixture(scope="module")
def settings(images, tmp_path_factory) -> dict:
    """Settings of a small run on an untrained pipeline, with graded images: bright ones are plausible."""
    folder = tmp_path_factory.mktemp("inputs")
    shares = [0.9 if row % 6 >= 3 else 0.1 for row in range(24)]
    replace(images, columns={"plausible": shares}).save(folder / "feedback")
    return {**SMALL, **small_inputs(folder, images)}


@pytest.fixture(scope="module")
def feedback(settings) -> dict:
    """The same with pairs of graded images."""
    return {**settings, "feedback": str(Path(settings["data"]).with_name("feedback"))}


def trainer_of(settings: dict, folder: Path, **options) -> DPOTrainer:
    config = DPOConfig(**settings | options)
    folder.mkdir(exist_ok=True)
    pipeline = load_pipeline(config.base_model)
    real = ImageSet.load(config.data)
    return DPOTrainer(pipeline, Brightness(slope=60.0), real, config, folder, load_pairs(config, pipeline))


def some_pairs(images: ImageSet) -> tuple[torch.Tensor, ...]:
    """Pixel values `(2, 4, 3, 16, 16)`, class ids, noise and timesteps of four pairs."""
    generator = torch.Generator().manual_seed(0)
    pixels = to_pixel_values(images.images[:8]).view(2, 4, 3, 16, 16)
    return (
        pixels,
        torch.tensor([0, 1, 2, 0]),
        torch.randn(4, 3, 16, 16, generator=generator),
        torch.tensor([40, 300, 600, 950]),
    )


def shake(unet) -> None:
    """Give the adapter's up-projections values: those it starts with do nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.parameters(unet).items():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def test_the_loss_is_equation_14_with_means_over_pixels_in_numpy():
    rng = np.random.default_rng(0)
    errors, base = rng.uniform(0, 0.002, (2, 7)), rng.uniform(0, 0.002, (2, 7))
    margins = implicit_margins(torch.tensor(errors), torch.tensor(base), 1000 * 2.5)
    inside = -1000 * 2.5 * ((errors[0] - base[0]) - (errors[1] - base[1]))
    np.testing.assert_allclose(margins, inside, rtol=1e-10)
    np.testing.assert_allclose(preference_losses(margins), -np.log(1 / (1 + np.exp(-inside))), rtol=1e-8)
    np.testing.assert_allclose(agreement_shares(margins), inside > 0)
    assert agreement_shares(torch.zeros(1)).tolist() == [0.5]
    pixels = 3 * 16 * 16  # the paper's sums over pixels: beta is smaller by the number of values in an image
    by_sums = -1000 * (2.5 / pixels) * ((pixels * errors[0] - pixels * base[0]) - pixels * (errors[1] - base[1]))
    np.testing.assert_allclose(margins, by_sums, rtol=1e-8)


def test_margins_of_a_trainer_are_those_of_two_models_by_hand(settings, images, tmp_path):
    trainer = trainer_of(settings, tmp_path, beta_dpo=1.5)
    shake(trainer.unet)
    pixels, ids, noise, timesteps = some_pairs(images)
    found = trainer.margins(pixels, ids, noise, timesteps).detach()
    base = load_pipeline(settings["base_model"])  # a second copy, never adapted
    shares = base.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    velocity = shares.sqrt() * noise - (1 - shares).sqrt() * pixels  # arXiv:2202.00512, appendix D
    noisy = shares.sqrt() * pixels + (1 - shares).sqrt() * noise
    errors = []
    for unet in (trainer.unet, base.unet):
        with torch.no_grad():
            outputs = [
                unet(side, timesteps, encoder_hidden_states=None, class_labels=ids).sample.numpy() for side in noisy
            ]
        errors.append(((np.stack(outputs) - velocity.numpy()) ** 2).mean(axis=(2, 3, 4)))
    (chosen, rejected), (base_chosen, base_rejected) = errors
    expected = -1000 * 1.5 * ((chosen - base_chosen) - (rejected - base_rejected))
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=2e-3)  # differences of errors in float32, times 1500
    assert all(parameter.requires_grad for parameter in trainer.parameters)


def test_at_the_start_the_loss_is_log_2_and_no_order_is_preferred(settings, images, tmp_path):
    trainer = trainer_of(settings, tmp_path)
    margins = trainer.margins(*some_pairs(images))
    assert margins.tolist() == [0.0] * 4 and margins.requires_grad
    assert preference_losses(margins).tolist() == [pytest.approx(math.log(2), rel=1e-7)] * 4
    assert agreement_shares(margins).tolist() == [0.5] * 4


def test_micro_batches_change_no_gradient(feedback, tmp_path):
    gradients = []
    for size in (1, 5):
        trainer = trainer_of(feedback, tmp_path / str(size), micro_batch_size=size, beta=0.5)
        shake(trainer.unet)
        pairs, places, _ = trainer.collect(0)
        trainer.gather_gradients(pairs, places[:5], torch.Generator().manual_seed(3), 0, 1e-3)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trainer.parameters]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * float(gradients[0].abs().max()))


def test_processes_share_a_batch_and_their_mean_gradient_is_that_of_the_whole(feedback, tmp_path, monkeypatch):
    gradients = {}
    for index, processes in ((0, 1), (0, 2), (1, 2)):
        trainer = trainer_of(feedback, tmp_path / f"{index}-{processes}")
        shake(trainer.unet)
        pairs, places, _ = trainer.collect(0)
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
        monkeypatch.setattr(type(trainer.accelerator), "process_index", index)
        trainer.gather_gradients(pairs, places[:5], torch.Generator().manual_seed(3), 0, 1e-3)
        gradients[index, processes] = torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])
        monkeypatch.undo()
    whole = gradients[0, 1]
    shared = (gradients[0, 2] + gradients[1, 2]) / 2
    torch.testing.assert_close(shared, whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))


def test_graded_pairs_are_of_one_class_plausible_first_and_of_two_images():
    pixels = torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 4, 4).contiguous()
    pixels[7] = pixels[0]  # the same picture graded twice, with other verdicts
    graded = ImageSet.build(pixels, torch.tensor([0, 0, 0, 1, 1, 1, 2, 0]), ("a", "b", "c"))
    graded = replace(graded, columns={"plausible": [1.0, 0.0, 2 / 3, 0.6, 1.0, 1 / 3, 1.0, 0.0]})
    pairs = graded_pairs(graded, ["c", "b", "a"], 2 / 3, "feedback")
    found = set(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.class_ids.tolist(), strict=True))
    # by hand: a (id 2 of the model) 0>1, 2>1, 2>7, not 0>7; b 4>5, not 3>5 by 0.27; c has no second image
    assert found == {(0, 1, 2), (2, 1, 2), (2, 7, 2), (4, 5, 1)}
    with pytest.raises(InputError, match=r"4 plausible.*differ by 1\.0 or more.*`min_margin`"):
        graded_pairs(graded.select([0, 2, 3, 4, 5]), ["a", "b", "c"], 1.0, "feedback")


def test_ranked_pairs_join_the_best_with_the_worst_of_a_class():
    ids = torch.tensor([0, 1, 0, 1, 0, 1, 0, 0])
    rewards = torch.tensor([0.1, 0.5, 0.9, 0.5, 0.4, 0.5, 0.6, 0.5])
    pairs = ranked_pairs(torch.zeros(8, 3, 2, 2, dtype=torch.uint8), ids, rewards)
    found = list(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), pairs.class_ids.tolist(), strict=True))
    assert found == [(2, 0, 0), (6, 4, 0)]  # 7 is in the middle; class 1 has equal rewards


def test_pairs_of_the_pairwise_page_are_read_with_the_models_class_ids(images, tmp_path):
    ids = images.image_ids
    rows = [preference(0, ids[0], ids[3], "right"), preference(1, ids[6], ids[9], "left")]  # images of class a
    save_pairs(preference_pairs(rows), picture_of(images), tmp_path / "pairs", CLASSES, {"notice": "n"})
    pairs = read_preferences(tmp_path / "pairs", ["b", "c", "a"], 16)
    assert pairs.class_ids.tolist() == [2, 2]
    assert [content_id(image) for image in pairs.images[pairs.chosen]] == [ids[3], ids[6]]
    assert [content_id(image) for image in pairs.images[pairs.rejected]] == [ids[0], ids[9]]


def test_preferences_that_do_not_fit_are_refused_and_say_what_to_do(images, settings, tmp_path):
    ids = images.image_ids
    rows = [preference(0, ids[0], ids[3], "left")]
    save_pairs(preference_pairs(rows), picture_of(images), tmp_path / "pairs", CLASSES, {})
    with pytest.raises(InputError, match=r"has the classes \['a', 'b', 'c'\]: There is no class 'c'"):
        read_preferences(tmp_path / "pairs", ["a", "b"], 16)
    with pytest.raises(InputError, match="images of 16 x 16 px, the base model draws 32 px"):
        read_preferences(tmp_path / "pairs", CLASSES, 32)
    with pytest.raises(InputError, match=r"lacks the columns \['chosen', 'rejected'\].*go into `feedback`"):
        read_preferences(settings["data"], CLASSES, 16)
    same = [preference(0, ids[0], ids[0], "left")]
    save_pairs(preference_pairs(same), picture_of(images), tmp_path / "same", CLASSES, {})
    with pytest.raises(InputError, match=r"Pair 0 .* is one image twice"):
        read_preferences(tmp_path / "same", CLASSES, 16)
    with pytest.raises(InputError, match="`preferences` and `feedback` are both given"):
        DPOConfig(preferences="one", feedback="other")


def test_feedback_about_other_classes_or_sizes_is_refused_before_anything_is_drawn(
    settings, brightness, images, tmp_path
):
    shares = {"plausible": [0.0, 1.0] * 12}
    others = {
        "classes": replace(images, class_names=("a", "b", "d"), columns=shares),
        "size": ImageSet.build(images.images[:, :, :8, :8], images.class_ids, CLASSES, shares),
        "ungraded": images,
    }
    messages = {
        "classes": "There is no class 'd'",
        "size": "images of 8 px.*draws 16 px",
        "ungraded": "has no column `plausible`",
    }
    for name, message in messages.items():
        others[name].save(tmp_path / name)
        with pytest.raises(InputError, match=message):
            align(DPOConfig(**settings, feedback=str(tmp_path / name)), tmp_path / "adapter")
    assert brightness.calls == 0 and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("reverse", [False, True])
def test_training_on_given_pairs_makes_the_model_order_them_and_changes_the_adapter_only(feedback, tmp_path, reverse):
    options = {"epochs": 4, "passes": 4, "pairs_per_epoch": 12, "batch_size": 6, "micro_batch_size": 6}
    with artefact(tmp_path / "adapter") as folder:
        trainer = trainer_of(feedback, folder, **options, learning_rate=3e-3)
        if reverse:
            pairs: Pairs = trainer.pairs
            trainer.pairs = replace(pairs, chosen=pairs.rejected, rejected=pairs.chosen)
        unet = trainer.unet
        before = {name: values.detach().clone() for name, values in unet.named_parameters()}
        record = trainer.train()
        held_out = torch.linspace(50, 950, 24).long()
        noise = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(9))
        some = torch.arange(24) % len(trainer.pairs)
        places = torch.stack([trainer.pairs.chosen[some], trainer.pairs.rejected[some]])
        pixels = to_pixel_values(trainer.pairs.images[places.flatten()]).unflatten(0, places.shape)
        with torch.no_grad():
            margins = trainer.margins(pixels, trainer.pairs.class_ids[some], noise, held_out)
    rows = epoch_rows(tmp_path / "adapter")
    assert rows[0]["implicit_accuracy"] < rows[-1]["implicit_accuracy"] >= 0.8
    assert rows[-1]["loss"] < math.log(2) and rows[-1]["margin"] > 0
    assert record.metrics["implicit_accuracy"] == rows[-1]["implicit_accuracy"]
    assert float(agreement_shares(margins).mean()) >= 0.75
    changed = {name for name, values in unet.named_parameters() if not torch.equal(before[name], values)}
    assert changed == {name for name in before if "lora_" in name}


@pytest.mark.slow
def test_online_pairs_raise_the_reward_of_fresh_images(settings, brightness, tmp_path):
    brightness.slope = 6.0
    options = {"epochs": 6, "images_per_class": 12, "pairs_per_epoch": 18, "passes": 4, "batch_size": 9}
    small = settings | options | {"micro_batch_size": 9, "sample_batch_size": 36, "ema_decay": 0.5, "lora_rank": 4}
    record = align(DPOConfig(**small, learning_rate=1e-2, beta_dpo=0.1), tmp_path / "adapter")
    rewards = record.metrics["mean_reward_by_epoch"]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.1


def test_online_pairs_are_of_each_epochs_own_images_and_one_line_is_logged_for_each(settings, brightness, tmp_path):
    align(DPOConfig(**settings, beta=10.0), tmp_path / "adapter")
    rows = epoch_rows(tmp_path / "adapter")
    assert [row["step"] for row in rows] == [1, 2, 3] and {row["pairs"] for row in rows} == {6}
    assert len({row["reward"] for row in rows}) == 3
    names = {"loss", "real_loss", "implicit_accuracy", "margin", "pairs", "reward", "gradient_norm", "learning_rate"}
    assert all(set(row) - {"check_reward"} == names | SPENT | {"step"} for row in rows)
    record = RunRecord.load(tmp_path / "adapter")
    assert record.metrics["mean_reward_by_epoch"] == [row["reward"] for row in rows] and record.stage == "align"


def contents(folder: Path) -> tuple[bytes, list[dict]]:
    return (folder / lora.WEIGHTS_NAME).read_bytes(), steady_rows(folder)


@pytest.mark.parametrize("source", ["fresh images", "feedback"])
def test_the_same_call_after_an_interruption_ends_as_a_straight_run(settings, feedback, brightness, tmp_path, source):
    config = DPOConfig(**feedback if source == "feedback" else settings)
    align(config, tmp_path / "straight")
    assert brightness.calls == 3 + 2  # once in an epoch, and two checks
    brightness.calls, brightness.interrupt_at = 0, 4
    with pytest.raises(KeyboardInterrupt):
        align(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists() and partial_dir(tmp_path / "stopped").is_dir()
    align(config, tmp_path / "stopped")
    assert brightness.calls == 4 + 2
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_a_checkpoint_of_other_grades_is_not_gone_on_with(feedback, brightness, images, tmp_path):
    own = feedback | {"feedback": str(tmp_path / "feedback")}
    brightness.interrupt_at = 4
    replace(images, columns={"plausible": [0.0, 1.0] * 12}).save(tmp_path / "feedback")
    with pytest.raises(KeyboardInterrupt):
        align(DPOConfig(**own), tmp_path / "adapter")
    replace(images, columns={"plausible": [1.0, 0.0] * 12}).save(tmp_path / "feedback")
    brightness.calls, brightness.interrupt_at = 0, 0
    align(DPOConfig(**own), tmp_path / "adapter")
    assert brightness.calls == 3 + 2


def test_equal_or_missing_rewards_are_refused_with_advice(settings, brightness, tmp_path):
    brightness.slope = 0.0
    with pytest.raises(InputError, match=r"All 12 rewards of epoch 1 are 0\.5000.*evaluation\.json"):
        align(DPOConfig(**settings), tmp_path / "adapter")
    brightness.slope = float("nan")
    with pytest.raises(InputError, match="6 values of 6 that are not finite"):
        align(DPOConfig(**settings), tmp_path / "adapter")
