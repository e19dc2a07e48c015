"""Pretraining: it learns, goes on exactly where it was stopped, and its loss is the one of the papers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from pathalign.artefacts import fingerprint, partial_dir
from pathalign.config import ConfigError
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.images import ImageSet
from pathalign.randomness import seeded
from pathalign.schema import InputError, RunRecord
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers import base
from pathalign.trainers.base import RunFolder, cosine_rate, require_finite
from pathalign.trainers.pretrain import PretrainTrainer, denoising_loss, evenly_spread, new_pipeline, pretrain

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def config(tiny_images: ImageSet, tmp_path: Path) -> PretrainConfig:
    tiny_images.select(range(36)).save(tmp_path / "data", "train")
    tiny_images.select(range(36, 48)).save(tmp_path / "data", "validation")
    return PretrainConfig(
        data=str(tmp_path / "data"),
        block_out_channels=[8, 16],
        attention_levels=[1],
        steps=6,
        batch_size=4,
        warmup_steps=1,
        validate_every_steps=2,
        checkpoint_every_steps=2,
    )


def trainer(config: PretrainConfig, folder: Path) -> PretrainTrainer:
    train, validation = (ImageSet.load(config.data, split) for split in ("train", "validation"))
    folder.mkdir(exist_ok=True)
    pipeline = new_pipeline(config, train.image_size_px, train.class_names)
    return PretrainTrainer(pipeline, train, validation, config, folder)


def log(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def interrupt_before(step: int, monkeypatch: pytest.MonkeyPatch, config: PretrainConfig, output_dir: Path) -> None:
    do_step = PretrainTrainer.step

    def stop(self: PretrainTrainer, number: int) -> float:
        if number == step:
            raise KeyboardInterrupt
        return do_step(self, number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PretrainTrainer, "step", stop)
        pretrain(config, output_dir)


def same_weights(one: Path, two: Path) -> bool:
    first, second = load_file(one / WEIGHTS), load_file(two / WEIGHTS)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_loss_falls_and_the_result_is_a_pipeline_with_card_and_record(config: PretrainConfig, tmp_path: Path):
    long = replace(config, steps=120, batch_size=16, learning_rate=3e-3, ema_decay=0.9, validate_every_steps=40)
    record = pretrain(long, tmp_path / "base")
    lines = log(tmp_path / "base")
    assert [line["step"] for line in lines] == [40, 80, 120]
    assert lines[-1]["validation_loss"] < 0.85 * lines[0]["validation_loss"]
    assert record.metrics["n"] == 36
    assert record.metrics["validation_loss"] == min(line["validation_loss"] for line in lines)
    assert RunRecord.load(tmp_path / "base").config == asdict(long)
    images = ClassConditionalPipeline.from_pretrained(tmp_path / "base")(["a", 2], num_inference_steps=2).images
    assert [image.size for image in images] == [(16, 16)] * 2
    assert {"README.md", "pipeline.py", "samples"} <= {path.name for path in (tmp_path / "base").iterdir()}
    assert not (tmp_path / "base" / "checkpoints").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_interrupted_run_ends_with_the_bits_of_one_that_was_not(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
):
    config = replace(config, gradient_accumulation_steps=accumulation)
    pretrain(config, tmp_path / "straight")
    interrupt_before(5, monkeypatch, config, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    kept = sorted(path.name for path in (partial_dir(tmp_path / "resumed") / "checkpoints").iterdir())
    assert kept == ["step-0000002.pt", "step-0000004.pt"]
    pretrain(config, tmp_path / "resumed")
    assert same_weights(tmp_path / "straight", tmp_path / "resumed")
    assert log(tmp_path / "straight") == log(tmp_path / "resumed")
    assert fingerprint(tmp_path / "straight") == fingerprint(tmp_path / "resumed")


def test_lines_logged_after_the_checkpoint_are_not_there_twice(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = replace(config, checkpoint_every_steps=3)
    interrupt_before(5, monkeypatch, config, tmp_path / "base")
    assert [line["step"] for line in log(partial_dir(tmp_path / "base"))] == [2, 4]
    with (partial_dir(tmp_path / "base") / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "trai')  # killed while writing
    pretrain(config, tmp_path / "base")
    assert [line["step"] for line in log(tmp_path / "base")] == [2, 4, 6]


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_checkpoints_are_kept(config: PretrainConfig, tmp_path: Path, monkeypatch, keep: int):
    config = replace(config, keep_checkpoints=keep, checkpoint_every_steps=1)
    interrupt_before(5, monkeypatch, config, tmp_path / "base")
    names = sorted(path.name for path in (partial_dir(tmp_path / "base") / "checkpoints").iterdir())
    assert names == [f"step-{step:07d}.pt" for step in range(6 - keep, 6)]


def test_half_a_checkpoint_and_one_of_other_settings_are_not_used(config: PretrainConfig, tmp_path: Path):
    settings = asdict(config)
    run = RunFolder(tmp_path, Accelerator(), settings, [], keep_checkpoints=3)
    run.save(2, {"value": torch.ones(1)})
    (tmp_path / "checkpoints" / "step-0000004.tmp").write_bytes(b"half")
    RunFolder(tmp_path, Accelerator(), {**settings, "seed": 1}, [], keep_checkpoints=3).save(6, {"value": None})
    assert run.load()["step"] == 2
    assert RunFolder(tmp_path, Accelerator(), {**settings, "seed": 2}, []).load() is None


def test_the_best_validated_weights_are_saved_and_not_the_last(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    short = trainer(config, tmp_path / "short")
    for step in range(2):
        short.step(step)
    expected = [tensor.clone() for tensor in short.ema.shadow_params]
    true_loss = PretrainTrainer.loss

    def worse_later(self: PretrainTrainer, *batch: torch.Tensor) -> torch.Tensor:
        return true_loss(self, *batch) + (0 if torch.is_grad_enabled() else float(self.ema.optimization_step))

    monkeypatch.setattr(PretrainTrainer, "loss", worse_later)
    assert pretrain(config, tmp_path / "base").metrics["best_step"] == 2
    saved = ClassConditionalPipeline.from_pretrained(tmp_path / "base").unet
    assert all(torch.equal(one, two) for one, two in zip(saved.parameters(), expected, strict=True))


def test_the_average_lags_behind_the_weights_and_validation_puts_the_weights_back(
    config: PretrainConfig, tmp_path: Path
):
    run = trainer(config, tmp_path / "run")
    start = [parameter.detach().clone() for parameter in run.pipeline.unet.parameters()]
    for step in range(5):
        run.step(step)
    weights = [parameter.detach().clone() for parameter in run.pipeline.unet.parameters()]
    moved = sum((now - then).abs().sum() for now, then in zip(weights, start, strict=True))
    lag = sum((now - mean).abs().sum() for now, mean in zip(weights, run.ema.shadow_params, strict=True))
    assert 0 < lag < moved
    run.validate(5)
    after = list(run.pipeline.unet.parameters())
    assert all(torch.equal(one, two) for one, two in zip(weights, after, strict=True))


@pytest.mark.parametrize("when", ["training", "validation"])
def test_a_loss_that_is_no_number_stops_the_run(config: PretrainConfig, tmp_path: Path, monkeypatch, when: str):
    true_loss = PretrainTrainer.loss

    def broken(self: PretrainTrainer, *batch: torch.Tensor) -> torch.Tensor:
        loss = true_loss(self, *batch)
        return loss * float("nan") if torch.is_grad_enabled() == (when == "training") else loss

    monkeypatch.setattr(PretrainTrainer, "loss", broken)
    with pytest.raises(InputError, match=r"The loss is nan at step \d.*Lower `learning_rate`"):
        pretrain(config, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_infinity_is_no_number_either():
    require_finite(torch.tensor(3.0), 1, 0.1)
    with pytest.raises(InputError, match=r"The loss is inf at step 7 with learning rate 0\.1"):
        require_finite(torch.tensor(float("inf")), 7, 0.1)


def test_a_gradient_is_the_mean_of_those_of_its_micro_batches(config: PretrainConfig, tmp_path: Path, monkeypatch):
    gradients = {}
    batches = [trainer(config, tmp_path / "batches").batch(0, micro) for micro in range(2)]
    for name, micro_batches in {"first": batches[:1], "second": batches[1:], "both": batches}.items():
        run = trainer(replace(config, gradient_accumulation_steps=len(micro_batches)), tmp_path / name)
        run.batch = lambda step, micro, given=micro_batches: given[micro]
        monkeypatch.setattr(run.accelerator, "clip_grad_norm_", lambda *args: None)
        run.optimizer.zero_grad = lambda *args: None
        run.step(0)
        gradients[name] = [parameter.grad.clone() for parameter in run.pipeline.unet.parameters()]
    for one, two, both in zip(*(gradients[name] for name in ("first", "second", "both")), strict=True):
        torch.testing.assert_close(both, (one + two) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_papers(tiny_pipeline: ClassConditionalPipeline, prediction_type: str):
    """x_t = alpha x + sigma e; the target is e, or v = alpha e - sigma x (arXiv:2202.00512, appendix D)."""
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)  # arXiv:2006.11239, section 4
    scheduler = DDIMScheduler(beta_schedule="linear", prediction_type=prediction_type)
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2))
    timesteps, ids = torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 3])
    signal = np.cumprod(1 - betas)[timesteps.numpy()].reshape(4, 1, 1, 1)
    alpha, sigma = np.sqrt(signal), np.sqrt(1 - signal)
    noisy = alpha * clean.numpy() + sigma * noise.numpy()
    target = noise.numpy() if prediction_type == "epsilon" else alpha * noise.numpy() - sigma * clean.numpy()
    unet = tiny_pipeline.unet
    with torch.no_grad():
        prediction = unet(torch.tensor(noisy).float(), timesteps, None, class_labels=ids).sample.numpy()
        conditions = {"encoder_hidden_states": None, "class_labels": ids}
        losses = denoising_loss(unet, scheduler, clean, conditions, noise, timesteps)
    assert losses.shape == (4,)
    np.testing.assert_allclose(losses.numpy(), ((prediction - target) ** 2).mean((1, 2, 3)), rtol=1e-4)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [cosine_rate(step, 100, 9) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(0.5 * (1 + np.cos(0.09 * np.pi)))
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)


def test_each_position_in_a_run_has_its_own_random_numbers():
    positions = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (2,)]
    first = {torch.randn(1, generator=seeded(seed, *at)).item() for seed in (0, 1) for at in positions}
    assert len(first) == 2 * len(positions)
    draws = [torch.randn(1, generator=seeded(0, step, 0)).item() for step in range(2000)]
    assert len(set(draws)) == 2000
    assert abs(np.mean(draws)) < 4 / np.sqrt(2000)
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 4 / np.sqrt(2000)


def test_the_settings_seed_decides_and_the_global_one_does_not(config: PretrainConfig, tmp_path: Path):
    states = {}
    for name, seed, global_seed in (("one", 0, 0), ("two", 0, 1), ("three", 1, 0)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            pretrain(replace(config, steps=1, seed=seed), tmp_path / name)
            states[name] = torch.get_rng_state()
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert not same_weights(tmp_path / "one", tmp_path / "three")
    assert torch.equal(states["one"], states["three"])


def test_images_without_class_train_the_embedding_of_no_class_only(config: PretrainConfig, tmp_path: Path):
    for dropout, changed in ((1.0, [False, False, False, True]), (0.0, [True, True, True, False])):
        run = trainer(
            replace(config, class_dropout=dropout, weight_decay=0.0, batch_size=32), tmp_path / f"run-{dropout}"
        )
        before = run.pipeline.unet.class_embedding.weight.detach().clone()
        run.step(0)
        after = run.pipeline.unet.class_embedding.weight.detach()
        assert (before != after).any(dim=1).tolist() == changed


def test_without_augmentation_images_are_those_of_the_data(config: PretrainConfig, tmp_path: Path):
    known = {tuple(image.flatten().tolist()) for image in ImageSet.load(config.data).pixel_values()}
    for augment in ("none", "flips_rotations"):
        run = trainer(replace(config, augment=augment), tmp_path / augment)
        found = sum(tuple(image.flatten().tolist()) in known for image in run.batch(0, 0)[0])
        assert found == 4 if augment == "none" else found < 4


def test_continued_pretraining_starts_from_the_model_and_may_keep_it(config: PretrainConfig, tmp_path: Path):
    pretrain(config, tmp_path / "base")
    more = replace(config, initial_model=str(tmp_path / "base"))
    start = new_pipeline(more, 16, ("a", "b", "c")).unet.state_dict()
    assert all(torch.equal(start[name], tensor) for name, tensor in load_file(tmp_path / "base" / WEIGHTS).items())
    record = pretrain(replace(more, steps=2, learning_rate=0.0), tmp_path / "more")
    assert record.metrics["best_step"] == 0
    assert same_weights(tmp_path / "base", tmp_path / "more")
    assert [line["step"] for line in log(tmp_path / "more")] == [0, 2]


def test_the_first_validation_is_logged_once_however_often_a_run_is_stopped(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pretrain(replace(config, steps=1), tmp_path / "base")
    more = replace(config, initial_model=str(tmp_path / "base"))
    for _ in range(2):
        interrupt_before(1, monkeypatch, more, tmp_path / "more")
    assert [line["step"] for line in log(partial_dir(tmp_path / "more"))] == [0]


def test_continued_pretraining_refuses_other_classes_and_a_model_that_is_not_there(
    tiny_pipeline: ClassConditionalPipeline, config: PretrainConfig, tmp_path: Path
):
    tiny_pipeline.register_to_config(id2label={"0": "a", "1": "c", "2": "b"})
    tiny_pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"draws \['a', 'c', 'b'\] at 16 px, but the data has \['a', 'b', 'c'\]"):
        pretrain(replace(config, initial_model=str(tmp_path / "other")), tmp_path / "base")
    with pytest.raises(InputError, match=r"`initial_model`: .* is a dataset; give a pipeline"):
        pretrain(replace(config, initial_model=config.data), tmp_path / "base")
    assert not partial_dir(tmp_path / "base").exists()


def test_tensorboard_gets_the_figures_too(config: PretrainConfig, tmp_path: Path):
    pretrain(replace(config, steps=2, trackers=["tensorboard"]), tmp_path / "base")
    assert [path for path in (tmp_path / "base").rglob("events.out.tfevents.*") if path.stat().st_size > 0]
    assert len(log(tmp_path / "base")) == 1


def test_half_precision_trains_and_saves_whole_weights(config: PretrainConfig, tmp_path: Path):
    pretrain(replace(config, steps=2, mixed_precision="bf16"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize(("has_it", "precision"), [(True, "bf16"), (False, "no")])
def test_automatic_precision_is_that_of_the_device_and_is_recorded(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_it: bool, precision: str
):
    monkeypatch.setattr(base, "computes_in_bf16", lambda device_type: has_it)
    record = pretrain(replace(config, steps=2, mixed_precision="auto"), tmp_path / "auto")
    pretrain(replace(config, steps=2, mixed_precision=precision), tmp_path / "named")
    assert record.config["mixed_precision"] == precision
    weights, named = (load_file(tmp_path / name / WEIGHTS) for name in ("auto", "named"))
    assert all(torch.equal(weights[name], named[name]) for name in named)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="no list of the processor's instructions")
def test_a_cpu_computes_in_bf16_if_its_list_of_instructions_says_so():
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    assert base.computes_in_bf16("cpu") == bool({"avx512_bf16", "amx_bf16"} & set(flags[1].split() if flags else ()))


def test_sample_sheets_are_drawn_on_the_way(config: PretrainConfig, tmp_path: Path):
    pretrain(replace(config, steps=4, sample_every_steps=2), tmp_path / "base")
    names = sorted(path.name for path in (tmp_path / "base" / "samples").iterdir())
    assert names == ["final.png", "step-0000002.png", "step-0000004.png"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_out_channels": [8, 12]}, "multiples of 8"),
        ({"attention_levels": [3]}, "use 0 to 2"),
        ({"zero_terminal_snr": True, "prediction_type": "epsilon"}, "needs `prediction_type: v_prediction`"),
        ({"trackers": ["wandb"]}, "use tensorboard or trackio"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PretrainConfig(**settings)


@pytest.mark.slow
def test_two_processes_train_like_one_with_twice_the_batch(config: PretrainConfig, tmp_path: Path):
    """Float sums differ in their order, and AdamW may turn such a difference into up to a learning rate a step."""
    config = replace(config, steps=3, gradient_accumulation_steps=2, ema_decay=0.5)
    pretrain(replace(config, batch_size=8), tmp_path / "one")
    script = tmp_path / "train.py"
    script.write_text(
        "import torch\n"
        "from pathalign.settings.pretrain import PretrainConfig\n"
        "from pathalign.trainers.pretrain import pretrain\n"
        f"torch.set_num_threads(1)\npretrain(PretrainConfig(**{asdict(config)!r}), {str(tmp_path / 'two')!r})\n"
    )
    # What `accelerate launch` starts on several GPUs; on CPUs it would want MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment = {**os.environ, **paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ended = subprocess.run(launch, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in tmp_path.glob(".two*")] == []
    one, two = load_file(tmp_path / "one" / WEIGHTS), load_file(tmp_path / "two" / WEIGHTS)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-4)
    losses = [line["validation_loss"] for line in log(tmp_path / "two")]
    assert losses == pytest.approx([line["validation_loss"] for line in log(tmp_path / "one")], rel=1e-4)


@pytest.mark.parametrize("count", [1, 8, 1000, 2500])
def test_timesteps_are_spread_evenly_over_the_schedule_in_random_order(count):
    timesteps = evenly_spread(count, 1000, torch.Generator().manual_seed(3))
    assert timesteps.shape == (count,) and timesteps.min() >= 0 and timesteps.max() <= 999
    found = torch.histc(timesteps.float(), bins=min(count, 8), min=0, max=1000)
    assert found.max() - found.min() <= 1
    assert count < 8 or not torch.equal(timesteps, timesteps.sort().values)
