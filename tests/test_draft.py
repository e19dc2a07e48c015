"""DRaFT: its gradient against formulas and differences, what changes it and what must not, resume and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from brightness import CLASSES, Brightness, epoch_rows, small_inputs, steady_rows
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from pathalign.artefacts import artefact, partial_dir
from pathalign.diffusion import lora
from pathalign.diffusion.conditioning import ClassConditioning
from pathalign.diffusion.denoiser import Denoiser
from pathalign.diffusion.differentiable import predicted_original, renoised, unrolled
from pathalign.diffusion.pipeline import randn_per_image
from pathalign.generate import SCHEDULERS, load_pipeline, sample, score, set_scheduler
from pathalign.images import ImageSet, to_images
from pathalign.randomness import seeded
from pathalign.reward import RewardImageProcessor, RewardModel, RewardModelConfig
from pathalign.schema import InputError, RunRecord
from pathalign.settings.draft import DraftConfig
from pathalign.trainers.draft import DraftTrainer, align, objective_of, output_distance, visible
from pathalign.trainers.epochs import class_balanced_weights, class_turns, first_seed, micro_batches
from pathalign.trainers.usage import Usage

SMALL = {
    "epochs": 3,
    "images_per_class": 2,
    "variant": "lv",
    "kl_weight": 1.0,
    "batch_size": 4,
    "micro_batch_size": 2,
    "inference_steps": 2,
    "real_batch_size": 2,
    "warmup_steps": 0,
    "lora_rank": 2,
    "checkpoint_every_steps": 1,
    "check_images_per_class": 2,
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Settings of a small run on an untrained pipeline."""
    return {**SMALL, **small_inputs(tmp_path_factory.mktemp("inputs"))}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """The adapter of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "adapter"
    model = Brightness()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "from_pretrained", lambda *_: model)
        align(DraftConfig(**settings), folder)
    assert model.calls == 27 + 3  # and three checks
    return folder


@pytest.fixture
def adapted(tiny_pipeline):
    """A pipeline in float64 with an adapter that changes its outputs."""
    lora.attach(tiny_pipeline.unet, 2, 2.0, True, seeded(0))
    tiny_pipeline.unet.to(torch.float64)
    shake(tiny_pipeline.unet)
    return tiny_pipeline


def shake(unet) -> None:
    """Give the adapter's up-projections values: those it starts with do nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.parameters(unet).items():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def noise_of(count: int) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return randn_per_image((3, 16, 16), generators).double()


def denoiser(pipeline, **options) -> Denoiser:
    return Denoiser(pipeline.unet, ClassConditioning(pipeline), **options)


def sampler(pipeline, name: str):
    return SCHEDULERS[name].from_config(pipeline.scheduler.config)


def toy_reward(images: Tensor) -> Tensor:
    """Smooth, and not linear in a pixel."""
    return torch.sin(3 * images).mean(dim=(1, 2, 3)).sum()


def gradient_of(unet, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(lora.parameters(unet).values()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def draw(pipeline, name: str, train_steps: int, ids: Tensor, **options):
    denoise = denoiser(pipeline, **options)
    return unrolled(denoise, sampler(pipeline, name), noise_of(len(ids)), ids, 4, train_steps)


def levels(pipeline, steps: int) -> list[float]:
    """Signal shares of the last steps and of the finished image, in float64 from the schedule itself."""
    spaced = [1000 - round(index * 1000 / 4) - 1 for index in range(4)]  # trailing, arXiv:2305.08891
    return [float(pipeline.scheduler.alphas_cumprod[t]) for t in spaced[-steps:]] + [1.0]


@pytest.mark.parametrize("train_steps", [1, 3])
def test_the_gradient_is_that_of_finite_differences_of_ddim_written_out_by_hand(adapted, train_steps):
    ids, unet = torch.tensor([0, 2]), adapted.unet
    found = draw(adapted, "ddim", train_steps, ids, guidance_scale=1.5)
    gradient = gradient_of(unet, toy_reward(found.sample))
    start = found.calls[0].sample.detach()
    timesteps = [call.timestep for call in found.calls]
    alphas = levels(adapted, train_steps)

    @torch.no_grad()
    def reward() -> float:
        x = start
        for t, now, then in zip(timesteps, alphas[:-1], alphas[1:], strict=True):
            with_class = unet(x, t, encoder_hidden_states=None, class_labels=ids).sample
            without = unet(x, t, encoder_hidden_states=None, class_labels=torch.tensor([3, 3])).sample
            velocity = without + 1.5 * (with_class - without)
            clean = math.sqrt(now) * x - math.sqrt(1 - now) * velocity
            eps = math.sqrt(1 - now) * x + math.sqrt(now) * velocity
            x = math.sqrt(then) * clean + math.sqrt(1 - then) * eps
        return float(toy_reward(x))

    parameters = list(lora.parameters(unet).values())
    generator = torch.Generator().manual_seed(2)
    for direction in (gradient / gradient.norm(), torch.randn(gradient.shape, generator=generator).double()):
        parts = direction.split([parameter.numel() for parameter in parameters])
        values = []
        for side in (1e-5, -2e-5, 1e-5):
            with torch.no_grad():
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter += side * part.view_as(parameter)
            values.append(reward())
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient @ direction), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("train_steps", [1, 3])
def test_the_gradient_through_dpm_solver_is_that_of_its_formula_written_out_by_hand(adapted, train_steps):
    ids, unet = torch.tensor([1, 2]), adapted.unet
    full = draw(adapted, "dpmsolver++", 4, ids)
    gradient = gradient_of(unet, toy_reward(draw(adapted, "dpmsolver++", train_steps, ids).sample))
    alphas = levels(adapted, 4)
    signal = [math.sqrt(alpha) for alpha in alphas]
    sigma = [math.sqrt(1 - alpha) for alpha in alphas]
    half_log_snr = [math.log(a / s) for a, s in zip(signal[:-1], sigma[:-1], strict=True)]
    x, before = full.calls[0].sample.detach(), torch.zeros(())
    for index, call in enumerate(full.calls):
        trained = index >= 4 - train_steps
        with torch.set_grad_enabled(trained):
            velocity = unet(x, call.timestep, encoder_hidden_states=None, class_labels=ids).sample
            clean = signal[index] * x - sigma[index] * velocity
            if index == 3:  # to a noise level of 0: the estimate itself
                x = clean
                break
            h = half_log_snr[index + 1] - half_log_snr[index]
            mixed = clean
            if index > 0:  # arXiv:2211.01095, algorithm 2
                ratio = (half_log_snr[index] - half_log_snr[index - 1]) / h
                mixed = (1 + 1 / (2 * ratio)) * clean - before / (2 * ratio)
            x = sigma[index + 1] / sigma[index] * x - signal[index + 1] * math.expm1(-h) * mixed
            before = clean
    by_hand = gradient_of(unet, toy_reward(x))
    assert float((gradient - by_hand).norm() / by_hand.norm()) < 1e-3  # diffusers steps in float32


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
def test_one_and_two_trained_steps_draw_the_same_images_and_have_other_gradients(adapted, name):
    ids = torch.tensor([0, 1])
    one, two = (draw(adapted, name, train_steps, ids) for train_steps in (1, 2))
    assert torch.equal(one.sample, two.sample) and (len(one.calls), len(two.calls)) == (1, 2)
    first, second = (gradient_of(adapted.unet, toy_reward(found.sample)) for found in (one, two))
    assert float((first - second).norm() / first.norm()) > 1e-2


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_the_images_are_those_that_the_pipeline_draws(tiny_pipeline, name, guidance_scale):
    set_scheduler(tiny_pipeline, name)
    lora.attach(tiny_pipeline.unet, 2, 2.0, True, seeded(0))
    shake(tiny_pipeline.unet)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = randn_per_image((3, 16, 16), generators)
    found = unrolled(
        denoiser(tiny_pipeline, guidance_scale=guidance_scale),
        sampler(tiny_pipeline, name),
        noise,
        torch.tensor([0, 2]),
        5,
        2,
    )
    assert found.sample.requires_grad
    assert torch.equal(to_images(found.sample.detach()), sample(tiny_pipeline, [0, 2], [5, 6], 5, guidance_scale))


@pytest.mark.parametrize("train_steps", [1, 3])
def test_checkpointing_changes_no_gradient_and_costs_one_more_forward_pass(adapted, train_steps):
    ids, gradients, calls = torch.tensor([0, 1]), [], []
    for checkpointing in (False, True):
        denoise = denoiser(adapted, checkpointing=checkpointing)
        usage = Usage(adapted.unet, DraftConfig(), torch.device("cpu"))
        found = unrolled(denoise, sampler(adapted, "dpmsolver++"), noise_of(2), ids, 4, train_steps)
        distance = sum(
            output_distance(call.model_output, denoise.reference(call.sample, call.timestep, ids)).sum()
            for call in found.calls
        )
        gradients.append(gradient_of(adapted.unet, toy_reward(found.sample) + distance))
        calls.append((usage.forwards, usage.backwards))
    assert torch.equal(*gradients)
    # two images, four steps; a reference for each trained step, with a gradient if its sample depends on the adapter
    through = train_steps + (train_steps - 1)
    assert calls == [(2 * (4 + train_steps), 2 * through), (2 * (4 + train_steps + through), 2 * through)]


def test_the_reference_is_the_base_model_and_leaves_the_adapter_as_it_was(tiny_pipeline):
    x, t, ids = noise_of(2).float(), torch.tensor(300), torch.tensor([0, 1])
    plain = tiny_pipeline.unet(x, t, encoder_hidden_states=None, class_labels=ids).sample.detach()
    lora.attach(tiny_pipeline.unet, 2, 2.0, True, seeded(0))
    denoise = denoiser(tiny_pipeline)
    assert torch.equal(denoise(x, t, ids), plain)  # an adapter starts as nothing
    shake(tiny_pipeline.unet)
    before = denoise(x, t, ids)
    assert not torch.allclose(before, plain, atol=1e-3)
    assert torch.equal(denoise.reference(x, t, ids), plain)
    assert torch.equal(denoise(x, t, ids), before)
    assert all(parameter.requires_grad for parameter in lora.parameters(tiny_pipeline.unet).values())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_estimate_of_the_clean_image_undoes_the_noise(prediction_type):
    schedule = DDIMScheduler(prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    share = float(schedule.alphas_cumprod[700])
    noisy = math.sqrt(share) * clean + math.sqrt(1 - share) * noise
    velocity = math.sqrt(share) * noise - math.sqrt(1 - share) * clean
    output = noise if prediction_type == "epsilon" else velocity
    torch.testing.assert_close(
        predicted_original(schedule, noisy, output, torch.tensor(700)), clean, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("repeats", [1, 3])
def test_repeating_the_last_step_divides_the_variance_by_the_number_of_samples(repeats):
    """A toy that draws one image whatever the noise: gradients differ by the last step's noise only.

    With `eps = (x - signal * image) / sigma + w x` at w = 0 a DDIM step keeps an image's noise, and the mean pixel of
    the estimate has d/dw = -(sigma / signal) mean(x): independent for each fresh noise, of one variance.
    """
    schedule = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 2, 2, generator=generator, dtype=torch.float64)
    count = 4000
    w = torch.zeros(count, dtype=torch.float64, requires_grad=True)  # one for each image: one gradient for each

    def denoise(x: Tensor, timestep: Tensor, class_ids: Tensor) -> Tensor:
        share = schedule.alphas_cumprod[timestep].double()
        return (x - share.sqrt() * image) / (1 - share).sqrt() + w[:, None, None, None] * x

    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    noise = randn_per_image((3, 2, 2), generators).double()
    ids = torch.zeros(count, dtype=torch.int64)
    first = unrolled(denoise, sampler_of(schedule), noise, ids, 10, 1)
    draws = [first] + [renoised(denoise, schedule, first, ids, generators) for _ in range(repeats)]
    torch.testing.assert_close(first.sample.detach(), image.expand_as(noise), rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(d.sample.mean(dim=(1, 2, 3)).sum(), w, retain_graph=True)[0].numpy() for d in draws
    ]
    share = float(schedule.alphas_cumprod[99])
    assert np.var(gradients[0]) == pytest.approx((1 - share) ** 2 / share / 12, rel=0.1)  # variance of a mean of 12
    averaged = np.mean(gradients, axis=0)
    assert np.var(averaged) / np.var(gradients[0]) == pytest.approx(1 / (1 + repeats), rel=0.1)
    assert np.mean(averaged) == pytest.approx(np.mean(gradients[0]), abs=4 * np.std(gradients[0]) / count**0.5)


def sampler_of(schedule: DDIMScheduler) -> DDIMScheduler:
    return DDIMScheduler.from_config(schedule.config)


def test_objectives_are_the_reward_its_logarithm_and_its_log_odds():
    odds = torch.tensor([-20.0, -2.0, 0.0, 2.0], dtype=torch.float64)

    def slope(kind: str) -> Tensor:
        logits = odds.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective_of(torch.sigmoid(logits), kind).sum(), logits)
        return gradient

    share = 1 / (1 + np.exp(-odds.numpy()))
    np.testing.assert_allclose(slope("reward"), share * (1 - share))
    np.testing.assert_allclose(slope("log_reward"), 1 - share)
    np.testing.assert_allclose(slope("log_odds"), 1)
    torch.testing.assert_close(objective_of(torch.sigmoid(odds), "log_odds"), odds)
    for kind in ("log_reward", "log_odds"):
        assert torch.isfinite(objective_of(torch.tensor([0.0, 1.0]), kind)).all()


def test_the_distance_is_the_mean_square_of_differences():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    expected = [float(np.mean((a - b) ** 2)) for a, b in zip(one.numpy(), other.numpy(), strict=True)]
    np.testing.assert_allclose(output_distance(one, other), expected, rtol=1e-6)


@pytest.mark.parametrize("size", [16, 32])
def test_rewards_of_visible_pixels_are_those_of_the_image_processor(size):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RewardModel(RewardModelConfig(class_names=list(CLASSES), image_size_px=size)).eval()
    generator = torch.Generator().manual_seed(0)
    decoded = 1.5 * torch.randn(6, 3, 16, 16, generator=generator)
    ids = torch.arange(6) % 3
    pixels = visible(decoded).requires_grad_()
    saved = [Image.fromarray(image) for image in to_images(decoded).permute(0, 2, 3, 1).numpy()]
    processed = RewardImageProcessor(image_size_px=size)(saved)["pixel_values"]
    with torch.no_grad():
        expected = model.rewards(processed, ids)
        on_the_grid = model.rewards(visible(to_images(decoded).float() / 127.5 - 1), ids)
    assert torch.equal(on_the_grid, expected)  # no 8-bit rounding between the two
    rewards = model.rewards(pixels, ids)
    (gradient,) = torch.autograd.grad(rewards.sum(), pixels)
    rounding = (to_images(decoded).float() / 127.5 - 1 - pixels).detach()
    assert float(rounding.abs().max()) <= 1 / 255 + 1e-6
    bound = gradient.abs().sum(dim=(1, 2, 3)) / 255  # first order, all pixels rounded against us
    assert (rewards - expected).detach().abs().max() > 0
    assert ((rewards - expected).detach().abs() <= bound).all()
    shift = (gradient * rounding).sum(dim=(1, 2, 3))
    torch.testing.assert_close(expected - rewards.detach(), shift, rtol=0.2, atol=2e-4)


def test_weights_make_a_mean_over_classes():
    ids, values = torch.tensor([0, 0, 2, 0, 2, 1]), np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    expected = np.mean([np.mean([1, 2, 4]), 6, np.mean([3, 5])])
    assert float(class_balanced_weights(ids).double() @ torch.tensor(values)) == pytest.approx(expected, rel=1e-6)


def test_turns_give_every_class_the_same_number_as_far_as_they_go():
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    order = torch.tensor([3, 1, 6, 5, 4, 0, 2])
    chosen = class_turns(ids, order, 5)
    assert chosen[:3].tolist() == [3, 6, 5] and sorted(chosen[3:].tolist()) == [1, 4]
    assert sorted(class_turns(ids, order, 100).tolist()) == list(range(7))


def test_processes_and_micro_batches_share_a_batch_without_gap_or_overlap():
    rows = torch.arange(10, 17)
    parts = [part.tolist() for index in range(3) for part in micro_batches(rows, 2, (index, 3))]
    assert max(map(len, parts)) == 2 and sorted(row for part in parts for row in part) == list(range(10, 17))
    assert micro_batches(rows[:1], 2, (1, 2)) == []


def test_image_seeds_meet_neither_each_other_nor_those_of_candidates():
    ranges = [first_seed(seed, 20, epoch) for seed in range(3) for epoch in range(21)]
    assert len(set(ranges)) == 63 and min(abs(a - b) for a in ranges for b in ranges if a != b) >= 2**20
    assert min(ranges) >= 2**31 > 2000 * 1_000_000  # a candidate set of run r begins at r million
    assert max(ranges) + 2**20 <= 2**32  # torch heeds 32 bits


def trainer_of(settings: dict, folder: Path, model: Brightness | None = None, **options) -> DraftTrainer:
    config = DraftConfig(**settings | options)
    folder.mkdir(exist_ok=True)
    pipeline = load_pipeline(config.base_model)
    return DraftTrainer(pipeline, model or Brightness(), ImageSet.load(config.data), config, folder)


def batch_gradient(trainer: DraftTrainer) -> Tensor:
    """Of one batch of six images, with an adapter that does something."""
    shake(trainer.unet)
    trainer.gather_gradients(torch.arange(12) % 3, torch.arange(6), 2**31, 0, 1e-3)
    return torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])


@pytest.mark.parametrize("variant", [pytest.param("k", marks=pytest.mark.slow), "lv"])
def test_micro_batches_and_processes_change_no_gradient(settings, tmp_path, variant, monkeypatch):
    options = {"variant": variant, "beta": 0.2, "learning_rate": 1e-3}
    whole = batch_gradient(trainer_of(settings, tmp_path / "whole", micro_batch_size=6, **options))
    parts = batch_gradient(trainer_of(settings, tmp_path / "parts", micro_batch_size=1, **options))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    shares = []
    for index in range(2):  # without the real term, whose batch is one for each process
        trainer = trainer_of(settings, tmp_path / f"process-{index}", **options | {"beta": 0.0})
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
        monkeypatch.setattr(type(trainer.accelerator), "process_index", index)
        shares.append(batch_gradient(trainer))
        monkeypatch.undo()
    alone = batch_gradient(trainer_of(settings, tmp_path / "alone", **options | {"beta": 0.0}))
    torch.testing.assert_close(torch.stack(shares).mean(dim=0), alone, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_sum_of_its_terms_and_all_classes_have_the_same_say(settings, tmp_path):
    trainer = trainer_of(settings, tmp_path / "run", variant="k", train_steps=2, kl_weight=0.7, objective="reward")
    shake(trainer.unet)
    weights = torch.tensor([0.5, 0.25, 0.25])
    outcome = trainer.outcome(torch.tensor([0, 1, 1]), weights, [7, 8, 9], measured=True)
    expected = float((weights * (0.7 * outcome.distances - outcome.rewards)).sum())
    assert outcome.loss.item() == pytest.approx(expected, rel=1e-5)
    assert float(outcome.distances.min()) > 1e-5


def test_a_batch_counts_each_of_its_own_classes_the_same(settings, tmp_path):
    trainer = trainer_of(settings, tmp_path / "run", kl_weight=0.7, objective="reward", beta=0.0)
    shake(trainer.unet)
    class_ids = torch.tensor([0, 1, 2, 1, 1, 2])
    seen, loss, real = trainer.gather_gradients(class_ids, torch.arange(1, 5), 2**31, 0, 1e-3)
    assert sorted(class_id for class_id, _, _ in seen) == [1, 1, 1, 2] and real == 0.0
    of_class = [np.mean([0.7 * distance - reward for own, reward, distance in seen if own == one]) for one in (1, 2)]
    assert loss == pytest.approx(np.mean(of_class), rel=1e-5)


def test_a_class_whose_images_are_all_refused_has_a_gradient(settings, tmp_path):
    """At rewards of 1e-9 the reward is flat, its logarithm is as steep as at one half."""
    norms = {}
    for objective in ("reward", "log_reward"):
        model = Brightness()
        model.rewards = lambda pixels, _: torch.sigmoid(pixels.mean(dim=(1, 2, 3)) - 20)
        options = {"kl_weight": 0.0, "beta": 0.0, "objective": objective}
        trainer = trainer_of(settings, tmp_path / objective, model, **options)
        norms[objective] = float(batch_gradient(trainer).norm())
    assert norms["log_reward"] > 1e-3 and norms["reward"] < 1e-6 * norms["log_reward"]


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "lv", "scheduler": "dpmsolver++"},
        pytest.param({"variant": "k", "train_steps": 2, "scheduler": "ddim"}, marks=pytest.mark.slow),
    ],
)
def test_training_raises_the_reward_of_fresh_images_and_changes_the_adapter_only(settings, tmp_path, options):
    pipeline, model = load_pipeline(settings["base_model"]), Brightness()
    ids = [index % 3 for index in range(24)]
    small = {"epochs": 6, "images_per_class": 4, "batch_size": 6, "micro_batch_size": 6, "learning_rate": 1e-2}
    config = DraftConfig(**(settings | small | options | {"beta": 0.0, "kl_weight": 0.0}))
    set_scheduler(pipeline, config.scheduler)

    def fresh_rewards() -> Tensor:
        return score(model, sample(pipeline, ids, range(10_000, 10_024), 2), ids, CLASSES)

    before = fresh_rewards()
    frozen = {name: values.clone() for name, values in pipeline.unet.named_parameters()}
    with artefact(tmp_path / "adapter") as folder:
        trainer = DraftTrainer(pipeline, model, ImageSet.load(settings["data"]), config, folder)
        started = {name: values.detach().clone() for name, values in lora.parameters(pipeline.unet).items()}
        record = trainer.train()
    brighter = fresh_rewards() - before
    assert float(brighter.mean()) >= 0.05
    assert int((brighter > 0).sum()) >= 20  # by chance less than once in 1000
    rewards = record.metrics["mean_reward_by_epoch"]
    assert len(rewards) == 6 and rewards[-1] > rewards[0] + 0.05
    after = {name.replace(".base_layer", ""): values for name, values in pipeline.unet.named_parameters()}
    assert set(after) == set(frozen) | set(started)
    assert [name for name in frozen if not torch.equal(frozen[name], after[name])] == []
    assert [name for name in started if torch.equal(started[name], after[name])] == []


def test_the_tie_to_the_base_model_holds_the_adapter_back(settings, tmp_path):
    distances = []
    for weight in (0.0, 100.0):
        with artefact(tmp_path / str(weight)) as folder:
            trainer_of(settings, folder, kl_weight=weight, beta=0.0, learning_rate=1e-2).train()
        rows = epoch_rows(tmp_path / str(weight))
        assert rows[0]["kl"] < 1.0
        distances.append(rows[-1]["kl"])
    assert distances[1] < 0.5 * distances[0]


def test_one_log_line_for_each_epoch_with_every_class_and_what_it_cost(settings, brightness, tmp_path):
    config = DraftConfig(**settings | {"epochs": 2, "gradient_checkpointing": True, "guidance_scale": 1.5})
    align(config, tmp_path / "adapter")
    rows = epoch_rows(tmp_path / "adapter")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        by_class = [row[f"reward_{name}"] for name in CLASSES]
        assert row["reward"] == pytest.approx(np.mean(by_class), rel=1e-5)  # two images of each
        # 6 images, each with and without class: 2 steps, 2 repetitions, 3 references; 3 of them trained, and again; and
        # two batches of 2 real images
        assert row["unet_forwards"] == 6 * 2 * (2 + 2 + 3 + 3) + 4 and row["unet_backwards"] == 6 * 2 * 3 + 4
        assert row["peak_memory_mb"] > 10 and row["images_per_second"] > 0 and row["gradient_norm"] > 0
    record = RunRecord.load(tmp_path / "adapter")
    assert record.stage == "align"
    assert record.metrics["mean_reward_by_epoch"] == pytest.approx([row["reward"] for row in rows])
    assert (tmp_path / "adapter" / lora.WEIGHTS_NAME).is_file()


def contents(folder: Path) -> tuple[bytes, list[dict], list[float]]:
    rewards = RunRecord.load(folder).metrics["mean_reward_by_epoch"]
    return (folder / lora.WEIGHTS_NAME).read_bytes(), steady_rows(folder), rewards


# nine calls in an epoch: batches of two parts and of one, each scored three times
@pytest.mark.parametrize(
    "call", [pytest.param(2, marks=pytest.mark.slow), pytest.param(27, marks=pytest.mark.slow), 11]
)
def test_the_same_call_after_an_interruption_ends_as_a_straight_run(settings, straight, brightness, tmp_path, call):
    config = DraftConfig(**settings)
    brightness.interrupt_at = call
    with pytest.raises(KeyboardInterrupt):
        align(config, tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists() and partial_dir(tmp_path / "stopped").is_dir()
    align(config, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(straight)


def test_rewards_that_are_no_numbers_stop_the_run_with_advice(settings, brightness, tmp_path):
    brightness.slope = float("nan")
    with pytest.raises(InputError, match=r"brightness gave 6 values of 6 that are not finite"):
        align(DraftConfig(**settings), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(InputError, match="`train_steps` is 4, but there are 3 `inference_steps`"):
        DraftConfig(variant="k", train_steps=4, inference_steps=3)
    with pytest.raises(InputError, match="`train_steps` is 2, but `variant: lv` repeats the last step"):
        DraftConfig(variant="lv", train_steps=2)


def test_views_are_of_each_images_own_seed_and_keep_its_pixels(settings, tmp_path):
    trainer = trainer_of(settings, tmp_path / "run")
    values = torch.linspace(-1, 1, 16 * 16).view(1, 1, 16, 16).expand(4, 3, 16, 16)
    seeds = [3, 4, 5, 6]
    together = trainer.view(values, [torch.Generator().manual_seed(seed) for seed in seeds])
    alone = [trainer.view(values[:1], [torch.Generator().manual_seed(seed)]) for seed in seeds]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(image.flatten().tolist()) for image in together}) > 1
    assert set(together.flatten().tolist()) <= set(values[0].flatten().tolist())
    plain = trainer_of(settings, tmp_path / "plain", augment=False)
    assert torch.equal(plain.view(values, []), values)
