"""What `align --estimate` says, against what runs count themselves and against FLOPs written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from brightness import Brightness, epoch_rows
from click.testing import CliRunner

from pathalign.cli import main
from pathalign.generate import load_pipeline
from pathalign.settings.ddpo import DDPOConfig
from pathalign.settings.draft import DraftConfig
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers import cost
from pathalign.trainers.ddpo import DDPOTrainer
from pathalign.trainers.draft import DraftTrainer
from pathalign.trainers.pretrain import new_pipeline
from pathalign.trainers.work import Work, checks, ddpo, draft

SMALL = {"epochs": 2, "images_per_class": 3, "inference_steps": 3, "batch_size": 6, "lora_rank": 2, "beta": 0.5}
SMALL |= {"real_batch_size": 4, "check_images_per_class": 2, "micro_batch_size": 4}
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    new_pipeline(PretrainConfig(block_out_channels=[8, 16], attention_levels=[1]), 16, CLASSES).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options", [{}, {"kl_weight": 0.1}, {"guidance_scale": 2.0, "inner_epochs": 2}], ids=["plain", "kl", "guided"]
)
def test_ddpo_asks_the_unet_as_often_as_is_said(base, tiny_images, tmp_path, options):
    config = DDPOConfig(base_model=str(base), train_steps=2, **SMALL, **options)
    DDPOTrainer(load_pipeline(str(base)), Brightness(), tiny_images, config, tmp_path).train()
    rows = epoch_rows(tmp_path)
    work = ddpo(config, len(CLASSES))
    assert work.backward == sum(row["unet_backward_images"] for row in rows)
    # The trainer counts the forward half of a training pass as a forward pass too.
    assert work.forward + work.backward == sum(row["unet_forward_images"] for row in rows)


@pytest.mark.parametrize("options", [{}, {"kl_weight": 0.1}, {"guidance_scale": 2.0}], ids=["plain", "kl", "guided"])
def test_draft_goes_back_through_the_unet_as_often_as_is_said(base, tiny_images, tmp_path, options):
    config = DraftConfig(base_model=str(base), **SMALL, **options)
    DraftTrainer(load_pipeline(str(base)), Brightness(), tiny_images, config, tmp_path).train()
    real = 2 * 2 * SMALL["real_batch_size"]  # epochs, optimizer steps of 9 images; not in the trainer's count
    assert draft(config, len(CLASSES)).backward - real == sum(row["unet_backwards"] for row in epoch_rows(tmp_path))


def test_checks_come_before_the_first_epoch_every_few_and_at_the_end():
    config = DDPOConfig(**SMALL | {"epochs": 7}, check_every_epochs=3)
    # after 0, 3, 6 and 7 epochs: 6 images each, 10 steps
    assert checks(config, 3) == Work(forward=4 * 6 * 10, decoded=4 * 6)


def test_flops_of_a_convolution_and_of_its_backward_pass():
    import torch
    from torch import nn

    layer = nn.Conv2d(3, 5, 3, padding=1).to("meta").requires_grad_(False)
    image = torch.zeros(1, 3, 8, 8, device="meta", requires_grad=True)
    found = cost.profile(lambda: layer(image), layer, 0)
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
    assert found["measured"]["backward_s"] > found["measured"]["forward_s"] > 0
    assert found["memory_gb"]["total"] == pytest.approx(sum(found["memory_gb"].values()) / 2)


def test_an_estimate_of_a_missing_base_model_says_so(tmp_path):
    result = CliRunner().invoke(main, ["align", "--base-model", str(tmp_path / "none"), "--estimate"])
    assert result.exit_code != 0 and "none" in result.stderr
