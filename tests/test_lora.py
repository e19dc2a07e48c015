"""Adapters: attached, saved, loaded, scaled, fused and taken off again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pathalign.diffusion import lora
from pathalign.diffusion.pipeline import BASE_KEY, ClassConditionalPipeline, base_hash
from pathalign.schema import InputError
from pathalign.settings.pretrain import PretrainConfig
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.trainers.pretrain import build_unet


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipeline: ClassConditionalPipeline) -> torch.Tensor:
    generators = [generator(seed) for seed in range(3)]
    return pipeline(["a", "b", "c"], generators, num_inference_steps=3, output_type="pt").images


def trained(pipeline: ClassConditionalPipeline, convolutions: bool = True) -> ClassConditionalPipeline:
    """Attach an adapter and give it weights as if it had been trained."""
    lora.attach(pipeline.unet, rank=2, alpha=4, convolutions=convolutions, generator=generator())
    for name, parameter in lora.parameters(pipeline.unet).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator(1))
    return pipeline


@pytest.fixture
def base(tiny_pipeline: ClassConditionalPipeline, tmp_path: Path) -> Path:
    tiny_pipeline.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load_base(folder: Path) -> ClassConditionalPipeline:
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("convolutions", [False, True])
def test_a_new_adapter_changes_nothing_and_is_all_that_trains(tiny_pipeline, convolutions: bool):
    before = draw(tiny_pipeline)
    lora.attach(tiny_pipeline.unet, rank=2, alpha=2, convolutions=convolutions, generator=generator())
    torch.testing.assert_close(draw(tiny_pipeline), before, rtol=0, atol=1e-6)
    trainable = {name for name, parameter in tiny_pipeline.unet.named_parameters() if parameter.requires_grad}
    assert trainable == set(lora.parameters(tiny_pipeline.unet))
    assert any("conv1" in name for name in trainable) == convolutions
    assert any("to_q" in name for name in trainable)


def test_every_layer_of_the_adapter_gets_a_gradient(tiny_pipeline):
    unet = trained(tiny_pipeline).unet
    sample = torch.randn(2, 3, 16, 16, generator=generator())
    tiny_pipeline.predict(sample, 10, torch.tensor([0, 1])).square().mean().backward()
    without = [name for name, parameter in lora.parameters(unet).items() if parameter.grad is None]
    assert without == []
    assert unet.conv_in.weight.grad is None


def test_the_down_projections_follow_the_generator_and_not_the_global_seed(base: Path):
    weights = []
    for global_seed, seed in ((0, 5), (1, 5), (0, 6)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(global_seed)
            unet = load_base(base).unet
            lora.attach(unet, 2, 2, True, generator(seed))
        weights.append(torch.cat([tensor.flatten() for tensor in lora.parameters(unet).values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_saved_adapter_draws_the_same_on_a_fresh_pipeline(tiny_pipeline, base: Path, tmp_path: Path):
    trained(tiny_pipeline)
    lora.save(tiny_pipeline.unet, tmp_path / "adapter")
    expected = draw(tiny_pipeline)
    by_diffusers, by_us = load_base(base), load_base(base)
    plain = draw(by_us)
    by_diffusers.load_lora_weights(tmp_path / "adapter")
    lora.load(by_us, str(tmp_path / "adapter"))
    torch.testing.assert_close(draw(by_diffusers), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(draw(by_us), expected, rtol=0, atol=1e-6)
    assert (expected - plain).abs().max() > 0.01


def test_a_scale_of_0_is_the_base_model_and_scales_act(tiny_pipeline, base: Path, tmp_path: Path):
    lora.save(trained(tiny_pipeline).unet, tmp_path / "adapter")
    pipeline = load_base(base)
    plain = draw(pipeline)
    lora.load(pipeline, str(tmp_path / "adapter"), scale=0.0)
    torch.testing.assert_close(draw(pipeline), plain, rtol=0, atol=1e-6)
    pipeline.set_adapters([lora.ADAPTER_NAME], [0.5])
    half = draw(pipeline)
    pipeline.set_adapters([lora.ADAPTER_NAME], [1.0])
    whole = draw(pipeline)
    assert 0 < (half - plain).abs().mean() < (whole - plain).abs().mean()


def test_fusing_keeps_the_images_and_everything_can_be_taken_off_again(tiny_pipeline, base: Path, tmp_path: Path):
    lora.save(trained(tiny_pipeline).unet, tmp_path / "adapter")
    pipeline = load_base(base)
    plain = draw(pipeline)
    lora.load(pipeline, str(tmp_path / "adapter"))
    adapted = draw(pipeline)
    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline), adapted, rtol=0, atol=1e-4)
    pipeline.unfuse_lora()
    torch.testing.assert_close(draw(pipeline), adapted, rtol=0, atol=1e-4)
    pipeline.disable_lora()
    torch.testing.assert_close(draw(pipeline), plain, rtol=0, atol=1e-4)
    pipeline.enable_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(draw(pipeline), plain, rtol=0, atol=1e-4)
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())


def test_the_file_holds_rank_and_alpha_and_only_lora_weights(tiny_pipeline, base: Path, tmp_path: Path):
    lora.save(trained(tiny_pipeline).unet, tmp_path)
    assert all("lora" in name for name in load_file(tmp_path / lora.WEIGHTS_NAME))
    pipeline = load_base(base)
    lora.load(pipeline, str(tmp_path))
    config = pipeline.unet.peft_config[lora.ADAPTER_NAME]
    assert (config.r, config.lora_alpha) == (2, 4)


def test_a_folder_without_adapter_is_refused(tiny_pipeline, tmp_path: Path):
    with pytest.raises(InputError, match=r"holds no pytorch_lora_weights.safetensors; .* `pathalign align`"):
        lora.load(tiny_pipeline, str(tmp_path))


def test_an_adapter_of_the_default_model_takes_less_than_5_mb(tmp_path: Path):
    settings = RewardWeightedConfig()
    unet = build_unet(PretrainConfig(), 64, num_classes=5)
    lora.attach(unet, settings.lora_rank, settings.lora_alpha, settings.lora_convolutions, generator())
    lora.save(unet, tmp_path)
    assert (tmp_path / lora.WEIGHTS_NAME).stat().st_size < 5e6


def test_the_hash_of_a_base_follows_its_weights_and_neither_precision_nor_adapters(tiny_pipeline, base: Path):
    plain = base_hash(tiny_pipeline.unet)
    assert base_hash(load_base(base).unet) == base_hash(load_base(base).unet.half()) == plain
    trained(tiny_pipeline)
    assert base_hash(tiny_pipeline.unet) == plain
    other = load_base(base).unet
    other.conv_out.bias.data[0] += 1e-2
    assert base_hash(other) != plain


def test_an_adapter_on_another_base_is_refused_by_us_and_warned_of_by_the_stock_call(
    tiny_pipeline, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lora.save(trained(tiny_pipeline).unet, tmp_path / "adapter")
    same, other = load_base(base), load_base(base)
    other.unet.conv_out.bias.data[0] += 1e-2
    same.load_lora_weights(tmp_path / "adapter")
    assert "another base model" not in caplog.text
    with pytest.raises(InputError, match=r"adapter does not fit .*another base model.*`--any-base`"):
        lora.load(other, str(tmp_path / "adapter"))
    assert not hasattr(other.unet, "peft_config")
    other.load_lora_weights(tmp_path / "adapter", adapter_name="stock")
    assert "The adapter was trained on another base model" in caplog.text
    lora.load(other, str(tmp_path / "adapter"), any_base=True)
    assert other.get_active_adapters() == [lora.ADAPTER_NAME]


def test_an_adapter_that_names_no_base_loads_on_any(tiny_pipeline, base: Path, tmp_path: Path):
    lora.save(trained(tiny_pipeline).unet, tmp_path / "adapter")
    path = tmp_path / "adapter" / lora.WEIGHTS_NAME
    with safe_open(path, "pt") as opened:
        metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert metadata.pop(BASE_KEY) == base_hash(tiny_pipeline.unet)
    save_file(load_file(path), path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})
    other = load_base(base)
    other.unet.conv_out.bias.data[0] += 1e-2
    lora.load(other, str(tmp_path / "adapter"))


def test_pickled_adapters_are_refused_by_name_and_in_folders(tiny_pipeline, base: Path, tmp_path: Path):
    lora.save(trained(tiny_pipeline).unet, tmp_path / "adapter")
    path = tmp_path / "adapter" / lora.WEIGHTS_NAME
    torch.save(load_file(path), path.with_suffix(".bin"))
    pipeline = load_base(base)
    with pytest.raises(ValueError, match=r"read from \.safetensors only, not from pickles"):
        pipeline.load_lora_weights(tmp_path / "adapter", weight_name="pytorch_lora_weights.bin")
    path.unlink()
    with pytest.raises(OSError, match=r"pytorch_lora_weights\.safetensors"):
        pipeline.load_lora_weights(tmp_path / "adapter")
