"""What `align --estimate` says, against what runs count themselves and against FLOPs written out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from brightness import CLASSES, Brightness
from click.testing import CliRunner
from torch import nn

from pathalign.cli import main
from pathalign.diffusion.flops import profile
from pathalign.generate import load_pipeline
from pathalign.settings.concepts import ConceptsConfig
from pathalign.settings.ddpo import DDPOConfig
from pathalign.settings.pretrain import PretrainConfig
from pathalign.stages import METHODS, load
from pathalign.trainers import concepts
from pathalign.trainers.ddpo import DDPOTrainer
from pathalign.trainers.dpo import DPOTrainer
from pathalign.trainers.draft import DraftTrainer
from pathalign.trainers.marks import collect_marks
from pathalign.trainers.pretrain import new_pipeline
from pathalign.trainers.reward_weighted import RewardWeightedTrainer
from pathalign.trainers.usage import Usage
from pathalign.trainers.work import Work, checks, work_of


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    new_pipeline(PretrainConfig(block_out_channels=[8, 16], attention_levels=[1]), 16, CLASSES).save_pretrained(folder)
    return folder


ONLINE = {"epochs": 2, "check_images_per_class": 2}
RUNS = [
    ("reward-weighted", {"rounds": 2, "steps_per_round": 3, "real_batch_size": 4}),
    ("reward-weighted", {"rounds": 1, "steps_per_round": 2, "beta": 0.0, "guidance_scale": 2.0}),
    ("ddpo", ONLINE | {"train_steps": 2, "kl_weight": 0.0}),
    ("ddpo", ONLINE | {"train_steps": 0, "kl_weight": 0.1, "beta": 0.5, "real_batch_size": 4}),
    ("ddpo", ONLINE | {"train_steps": 2, "guidance_scale": 2.0, "inner_epochs": 2}),
    ("grpo", ONLINE | {"train_steps": 1, "group_size": 3}),
    ("draft", ONLINE | {"real_batch_size": 4}),
    ("draft", ONLINE | {"kl_weight": 0.1, "train_steps": 2, "guidance_scale": 2.0, "beta": 0.0}),
    ("draft", ONLINE | {"variant": "lv", "lv_samples": 2, "gradient_checkpointing": True, "beta": 0.0}),
    ("dpo", ONLINE | {"pairs_per_epoch": 3, "passes": 2, "beta": 0.5, "real_batch_size": 4}),
]
SPLIT = ["a:shade:dark=dark", "a:shade:light=light", "b:shade:dark=dark", "b:shade:light=light"]
TRAINERS = {"reward-weighted": RewardWeightedTrainer, "ddpo": DDPOTrainer, "grpo": DDPOTrainer, "draft": DraftTrainer}


@pytest.mark.parametrize(("method", "options"), RUNS, ids=[f"{name}-{number}" for number, (name, _) in enumerate(RUNS)])
def test_a_run_asks_the_unet_as_often_as_is_said(base, tiny_images, tmp_path, monkeypatch, method, options):
    monkeypatch.setattr(RewardWeightedTrainer, "did_harm", lambda self, batch: False)  # no round is undone
    settings = load(next(entry.settings for entry in METHODS if entry.name == method))
    config = settings(base_model=str(base), images_per_class=3, inference_steps=3, batch_size=6, lora_rank=2, **options)
    pipeline = load_pipeline(str(base))
    usage = Usage(pipeline.unet, config, torch.device("cpu"))
    inputs = pipeline, Brightness(), tiny_images, config, tmp_path
    (DPOTrainer(*inputs, pairs=None) if method == "dpo" else TRAINERS[method](*inputs)).train()
    work = work_of(config, len(CLASSES))
    assert usage.backwards == work.backward
    assert usage.forwards == work.forward + work.backward  # a training pass goes forward too


@pytest.mark.parametrize("options", [{"recognition": 0.1, "guidance_scale": 2.0}, {"beta": 0.0, "subtypes": SPLIT[:2]}])
def test_splitting_classes_asks_the_unet_as_often_as_is_said(base, tiny_images, tmp_path, monkeypatch, options):
    monkeypatch.setattr(concepts, "load_encoder", lambda *_, **__: ColourMeans())
    shades = [("dark", "light")[index // 3 % 2] for index in range(len(tiny_images))]
    images = replace(tiny_images, columns={"shade": shades})
    options = {"subtypes": SPLIT, "real_batch_size": 4, "least_accuracy": 0.0} | options
    config = ConceptsConfig(
        base_model=str(base), images_per_class=3, inference_steps=3, batch_size=6, lora_rank=2, steps=2,
        check_images_per_class=2, **options,
    )  # fmt: skip
    pipeline = load_pipeline(str(base))
    usage = Usage(pipeline.unet, config, torch.device("cpu"))
    marks = collect_marks(config, images, pipeline.class_names)
    concepts.ConceptsTrainer(pipeline, Brightness(), images, config, tmp_path, marks).train()
    work = work_of(config, len(CLASSES))
    assert usage.backwards == work.backward
    assert usage.forwards == work.forward + work.backward


class ColourMeans(torch.nn.Module):
    """An encoder that has nothing to load."""

    def __init__(self) -> None:
        super().__init__()
        self.place = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean(dim=(2, 3))


def test_checks_come_before_the_first_epoch_every_few_and_at_the_end():
    config = DDPOConfig(epochs=7, check_every_epochs=3, check_images_per_class=2)
    # after 0, 3, 6 and 7 epochs: 6 images each, 10 steps
    assert checks(config, 3) == Work(forward=4 * 6 * 10, decoded=4 * 6)


def test_flops_of_a_convolution_and_of_its_backward_pass():
    layer = nn.Conv2d(3, 5, 3, padding=1).to("meta").requires_grad_(False)
    image = torch.zeros(1, 3, 8, 8, device="meta", requires_grad=True)
    found = profile(lambda: layer(image), layer, 0)
    forward = 2 * 8 * 8 * 5 * 3 * 3 * 3
    assert (found.forward_flops, found.backward_flops) == (forward, 2 * forward)  # frozen: one more for the image


@pytest.mark.parametrize("method", ["reward-weighted", "ddpo", "grpo", "draft", "dpo"])
def test_an_estimate_needs_the_base_model_only_and_runs_nothing(base, tmp_path, method):
    arguments = ["align", "--method", method, "--base-model", str(base), "--output-dir", str(tmp_path / "adapter")]
    result = CliRunner().invoke(main, [*arguments, "--reward-model", "no/such", "--data", "no/such", "--estimate"])
    assert result.exit_code == 0, result.stderr
    assert "FLOPs in all" in result.stdout and "H100" in result.stdout and f"{method} on " in result.stdout
    assert not (tmp_path / "adapter").exists()
    found = json.loads(CliRunner().invoke(main, [*arguments, "--estimate", "--json"]).stdout)
    assert {"forward_s", "backward_s", "hours"} <= set(found["measured"])
    assert found["memory_gb"]["total"] == pytest.approx(sum(found["memory_gb"].values()) / 2)


def test_an_estimate_with_automatic_precision_takes_each_gpus_own_and_memory_for_float32(base):
    arguments = ["align", "--method", "draft", "--base-model", str(base), "--estimate", "--json", "--mixed-precision"]
    auto, half, full = (
        json.loads(CliRunner().invoke(main, [*arguments, name]).stdout) for name in ("auto", "bf16", "no")
    )
    assert auto["gpu_hours"]["T4"] == full["gpu_hours"]["T4"] and half["gpu_hours"]["T4"] is None  # it has no bf16
    assert auto["gpu_hours"]["H100"] == half["gpu_hours"]["H100"] < full["gpu_hours"]["H100"]
    assert auto["memory_gb"] == full["memory_gb"] != half["memory_gb"]


def test_an_estimate_of_a_missing_base_model_says_so(tmp_path):
    result = CliRunner().invoke(main, ["align", "--base-model", str(tmp_path / "none"), "--estimate"])
    assert result.exit_code != 0 and "none" in result.stderr
