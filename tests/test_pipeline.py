"""The pipeline: labels and generators to images, on disk and back, here and where pathalign is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from pathalign.diffusion.pipeline import ClassConditionalPipeline, randn_per_image
from pathalign.generate import SCHEDULERS, set_scheduler
from pathalign.images import to_images
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.pretrain import build_unet

LABELS = ["a", "c", "b", "a", "c"]


def seeded(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + index) for index in range(count)]


def draw(pipeline: ClassConditionalPipeline, first: int = 0, labels: list[str] = LABELS, **options) -> torch.Tensor:
    generators = seeded(len(labels), first)
    return pipeline(labels, generators, num_inference_steps=4, output_type="pt", **options).images


def count_calls(pipeline: ClassConditionalPipeline) -> list[int]:
    """A list that gets the batch size of every later call of the UNet."""
    calls: list[int] = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    return calls


def test_labels_are_names_or_ids(tiny_pipeline: ClassConditionalPipeline):
    assert tiny_pipeline.class_names == ["a", "b", "c"]
    assert tiny_pipeline.class_ids(["c", 0, "b"]).tolist() == [2, 0, 1]
    assert tiny_pipeline.class_ids("b").tolist() == tiny_pipeline.class_ids(1).tolist() == [1]
    assert torch.equal(draw(tiny_pipeline), tiny_pipeline([0, 2, 1, 0, 2], seeded(5), 4, output_type="pt").images)


@pytest.mark.parametrize("label", ["d", 3, -1])
def test_an_unknown_label_is_refused_with_those_that_are_known(tiny_pipeline: ClassConditionalPipeline, label):
    with pytest.raises(ValueError, match=r"is not known; use one of \['a', 'b', 'c'\] or 0 to 2"):
        tiny_pipeline(["a", label])


def test_class_names_follow_ids_past_ten(tiny_pipeline: ClassConditionalPipeline, tmp_path: Path):
    names = {str(index): f"class {index}" for index in range(12)}
    ClassConditionalPipeline(tiny_pipeline.unet, tiny_pipeline.scheduler, names).save_pretrained(tmp_path)
    assert ClassConditionalPipeline.from_pretrained(tmp_path).class_names == list(names.values())


def test_as_many_generators_as_labels_are_needed(tiny_pipeline: ClassConditionalPipeline):
    with pytest.raises(ValueError, match="There are 2 generators for 3 labels; give one for each image"):
        tiny_pipeline(["a", "b", "c"], seeded(2))


def test_one_generator_seeds_all_images(tiny_pipeline: ClassConditionalPipeline):
    one, same, other = (
        tiny_pipeline(["a", "a"], torch.Generator().manual_seed(seed), 2, output_type="pt").images for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])


def test_without_generators_every_call_is_new_and_the_global_seed_decides(tiny_pipeline: ClassConditionalPipeline):
    with torch.random.fork_rng(devices=[]):
        images = []
        for _ in range(2):
            torch.manual_seed(0)
            images += [tiny_pipeline("a", None, 2, output_type="pt").images for _ in range(2)]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddpm"])
def test_the_batch_an_image_is_in_never_changes_it(tiny_pipeline: ClassConditionalPipeline, scheduler: str):
    set_scheduler(tiny_pipeline, scheduler)
    together = draw(tiny_pipeline)
    assert torch.equal(to_images(draw(tiny_pipeline)), to_images(together))
    alone = torch.cat([draw(tiny_pipeline, index, [label]) for index, label in enumerate(LABELS)])
    pairs = torch.cat([draw(tiny_pipeline, 0, LABELS[:2]), draw(tiny_pipeline, 2, LABELS[2:])])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)
    torch.testing.assert_close(pairs, together, rtol=0, atol=1e-4)


def test_a_stochastic_sampler_draws_from_each_images_own_generator(tiny_pipeline: ClassConditionalPipeline):
    set_scheduler(tiny_pipeline, "ddpm")
    torch.manual_seed(0)
    state = torch.get_rng_state()
    images = draw(tiny_pipeline, labels=["a", "a"])
    assert torch.equal(state, torch.get_rng_state())
    generators = [*seeded(1), *seeded(1, 100)]
    other = tiny_pipeline(["a", "a"], generators, 4, output_type="pt").images
    torch.testing.assert_close(images[0], other[0], rtol=0, atol=1e-4)
    assert (images[1] - other[1]).abs().max() > 0.01
    start = generators[0].get_state()
    fresh = seeded(1)[0]
    randn_per_image((3, 16, 16), [fresh])
    assert not torch.equal(start, fresh.get_state())  # it drew more than the first noise


def test_guidance_of_1_asks_the_unet_once_a_step_and_any_other_twice(tiny_pipeline: ClassConditionalPipeline):
    calls = count_calls(tiny_pipeline)
    plain = draw(tiny_pipeline, guidance_scale=1.0)
    assert calls == [5] * 4
    calls.clear()
    guided = draw(tiny_pipeline, guidance_scale=2.0)
    assert calls == [5] * 8
    assert not torch.equal(plain, guided)


def test_guidance_follows_its_formula_and_nears_the_plain_prediction_at_1(tiny_pipeline: ClassConditionalPipeline):
    sample, ids = torch.randn(2, 3, 16, 16, generator=seeded(1)[0]), torch.tensor([0, 2])
    with torch.no_grad():
        with_class = tiny_pipeline.predict(sample, 500, ids)
        without_class = tiny_pipeline.predict(sample, 500, torch.tensor([3, 3]))
        guided = tiny_pipeline.predict(sample, 500, ids, 3.0)
        nearly = tiny_pipeline.predict(sample, 500, ids, 1.0 + 1e-6)
    torch.testing.assert_close(guided, 3 * with_class - 2 * without_class)  # arXiv:2207.12598, eq. 6, with w = 2
    torch.testing.assert_close(nearly, with_class)


@pytest.mark.parametrize(
    ("prediction_type", "zero_terminal_snr"), [("v_prediction", False), ("v_prediction", True), ("epsilon", False)]
)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_sampler_recovers_the_image_that_a_perfect_model_knows(
    tiny_pipeline: ClassConditionalPipeline, name: str, prediction_type: str, zero_terminal_snr: bool
):
    """With x0 known, velocity and noise follow from x_t alone (arXiv:2202.00512, appendix D)."""
    tiny_pipeline.scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal_snr,
        timestep_spacing="trailing" if zero_terminal_snr else "leading",
        clip_sample=False,
    )
    signal = tiny_pipeline.scheduler.alphas_cumprod.clone()
    set_scheduler(tiny_pipeline, name)
    clean = torch.linspace(-0.8, 0.8, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)

    def perfect(sample: torch.Tensor, timestep: torch.Tensor, *rest: object) -> torch.Tensor:
        alpha, sigma = signal[int(timestep)].sqrt(), (1 - signal[int(timestep)]).sqrt()
        noise = (sample - alpha * clean) / sigma
        return alpha * noise - sigma * clean if prediction_type == "v_prediction" else noise

    tiny_pipeline.predict = perfect
    images = tiny_pipeline(["a", "b"], seeded(2), num_inference_steps=10, output_type="pt").images
    torch.testing.assert_close(images, clean, rtol=0, atol=0.05)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_unet_can_be_built_for_larger_images(size: int):
    unet = build_unet(PretrainConfig(block_out_channels=[8, 16], attention_levels=[1]), size, num_classes=3)
    assert unet.config.sample_size == size
    assert unet.config.num_class_embeds == 4
    with torch.no_grad():
        output = unet(torch.zeros(1, 3, size, size), 10, encoder_hidden_states=None, class_labels=torch.tensor([3]))
    assert output.sample.shape == (1, 3, size, size)


def test_output_types_show_the_same_images(tiny_pipeline: ClassConditionalPipeline):
    tensors = draw(tiny_pipeline)
    arrays = tiny_pipeline(LABELS, seeded(5), 4, output_type="np").images
    (images,) = tiny_pipeline(LABELS, seeded(5), 4, return_dict=False)
    assert (tensors.shape, tensors.dtype) == ((5, 3, 16, 16), torch.float32)
    assert tensors.abs().max() <= 1
    assert (arrays.shape, arrays.dtype) == ((5, 16, 16, 3), np.float32)
    np.testing.assert_allclose(arrays, tensors.permute(0, 2, 3, 1).numpy() / 2 + 0.5, atol=1e-6)
    assert [image.size for image in images] == [(16, 16)] * 5
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), (arrays * 255).round())
    with pytest.raises(ValueError, match="`output_type` is 'jpg'; use pil, np or pt"):
        tiny_pipeline(LABELS, output_type="jpg")


def test_drawing_leaves_no_gradient_behind(tiny_pipeline: ClassConditionalPipeline):
    assert not draw(tiny_pipeline).requires_grad
    assert tiny_pipeline.unet.conv_in.weight.grad is None


def test_a_saved_pipeline_draws_the_same_bits(tiny_pipeline: ClassConditionalPipeline, tmp_path: Path):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = ClassConditionalPipeline.from_pretrained(tmp_path)
    before, after = tiny_pipeline.unet.state_dict(), loaded.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = {name: value for name, value in tiny_pipeline.scheduler.config.items() if not name.startswith("_")}
    assert kept.items() <= loaded.scheduler.config.items()
    assert loaded.class_names == tiny_pipeline.class_names
    assert torch.equal(draw(loaded), draw(tiny_pipeline))
    assert not any(path.suffix == ".bin" for path in tmp_path.rglob("*"))  # safetensors only


def test_a_saved_pipeline_can_be_saved_again(tiny_pipeline: ClassConditionalPipeline, tmp_path: Path):
    tiny_pipeline.save_pretrained(tmp_path / "one")
    ClassConditionalPipeline.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/pipeline.py").read_text() == (tmp_path / "two/pipeline.py").read_text()


def test_push_to_hub_and_the_lora_loader_are_inherited():
    for name in ("push_to_hub", "load_lora_weights", "set_adapters", "unload_lora_weights", "enable_model_cpu_offload"):
        assert callable(getattr(ClassConditionalPipeline, name))
        assert name not in vars(ClassConditionalPipeline)


@pytest.mark.slow
def test_a_saved_pipeline_and_adapter_load_where_pathalign_is_not_installed(
    tiny_pipeline: ClassConditionalPipeline, tmp_path: Path
):
    from pathalign.diffusion import lora

    tiny_pipeline.save_pretrained(tmp_path / "model")
    np.save(tmp_path / "plain.npy", draw(tiny_pipeline).numpy())
    lora.attach(tiny_pipeline.unet, 2, 2, True, seeded(1)[0])
    for name, parameter in lora.parameters(tiny_pipeline.unet).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=seeded(1)[0])
    lora.save(tiny_pipeline.unet, tmp_path / "adapter")
    adapted = draw(tiny_pipeline)
    np.save(tmp_path / "adapted.npy", adapted.numpy())
    script = """
import sys, numpy as np, torch
sys.modules["pathalign"] = None  # importing it fails
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
pipeline = DiffusionPipeline.from_pretrained("model", custom_pipeline="model", trust_remote_code=True)
def draw():
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    return pipeline(["a", "c", "b", "a", "c"], generators, num_inference_steps=4, output_type="pt").images.numpy()
np.testing.assert_allclose(draw(), np.load("plain.npy"), rtol=0, atol=1e-5)
pipeline.load_lora_weights("adapter")
np.testing.assert_allclose(draw(), np.load("adapted.npy"), rtol=0, atol=1e-5)
pipeline.fuse_lora()
np.testing.assert_allclose(draw(), np.load("adapted.npy"), rtol=0, atol=1e-3)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert (adapted - torch.from_numpy(np.load(tmp_path / "plain.npy"))).abs().max() > 0.01
