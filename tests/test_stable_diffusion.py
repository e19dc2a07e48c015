"""Stable Diffusion as a base model: classes become prompts, and every method trains an adapter that diffusers loads."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from brightness import Brightness
from diffusers import AutoencoderKL, StableDiffusionPipeline
from huggingface_hub import ModelCard
from tiny_stable_diffusion import IMAGE_SIZE_PX, SCALING_FACTOR, SHIFT_FACTOR, save_tiny_stable_diffusion
from torch import Tensor

from pathalign.config import ConfigError
from pathalign.diffusion import lora
from pathalign.diffusion.conditioning import ClassConditioning, PromptConditioning, conditioning_for
from pathalign.diffusion.loading import image_size_px, load_base
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.diffusion.prompted import PromptPipeline
from pathalign.generate import generate, load_pipeline, sample
from pathalign.images import ImageSet, to_images
from pathalign.schema import InputError, RunRecord
from pathalign.settings.concepts import ConceptsConfig
from pathalign.settings.generate import GenerateConfig
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.stages import METHODS, load
from pathalign.trainers import rewards
from pathalign.trainers.concepts import align as align_concepts
from pathalign.trainers.reward_weighted import RewardWeightedTrainer, align

CLASSES = ["red_cell", "blue cell"]
PROMPTS = ["a microscopy image of a red cell", "a microscopy image of a blue cell"]
SMALL: dict[str, Any] = {
    "images_per_class": 4,
    "inference_steps": 3,
    "batch_size": 4,
    "real_batch_size": 2,
    "beta": 0.1,
    "lora_rank": 2,
    "warmup_steps": 0,
}
WATCHED = {"epochs": 2, "check_images_per_class": 2, "check_inference_steps": 2}
OWN: dict[str, dict[str, Any]] = {  # two units of each method
    "reward-weighted": {"rounds": 1, "steps_per_round": 2},
    "ddpo": {**WATCHED, "train_steps": 2, "guidance_scale": 2.0, "micro_batch_size": 4},
    "grpo": {**WATCHED, "train_steps": 2, "group_size": 2},
    "draft": {**WATCHED, "guidance_scale": 2.0},
    "dpo": {**WATCHED, "passes": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds the base model `sd`, and images for it in `data`."""
    folder = tmp_path_factory.mktemp("stable_diffusion")
    save_tiny_stable_diffusion(folder / "sd")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX), generator=generator).to(torch.uint8)
    ImageSet.build(pixels, torch.arange(8) % 2, CLASSES).save(folder / "data")
    return folder


@pytest.fixture
def pipeline(folder: Path) -> PromptPipeline:
    return load_base(str(folder / "sd"), class_names=CLASSES)


@pytest.fixture
def conditioning(pipeline: PromptPipeline) -> PromptConditioning:
    made = conditioning_for(pipeline)
    assert isinstance(made, PromptConditioning)
    return made


@pytest.fixture
def brightness(monkeypatch) -> Brightness:
    """The reward model that is loaded; it knows the classes in another order."""
    model = Brightness(tuple(reversed(CLASSES)))
    monkeypatch.setattr(rewards.RewardModel, "from_pretrained", lambda *_: model)
    return model


def state_of(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    """All weights of all networks, by the names they have without an adapter."""
    return {
        f"{part}.{name.replace('.base_layer', '')}": values.detach().clone()
        for part in ("unet", "vae", "text_encoder")
        for name, values in getattr(pipeline, part).named_parameters()
    }


def images_of(pipeline: StableDiffusionPipeline, **options: Any) -> Tensor:
    """Images by diffusers' own call, uint8."""
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(PROMPTS, generator=generators, num_inference_steps=2, output_type="pt", **options).images
    return to_images(images * 2 - 1)


def test_the_kind_of_a_base_model_is_read_from_its_model_index(folder, tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path / "base")
    own = load_base(str(tmp_path / "base"), class_names=["other"])
    assert isinstance(own, ClassConditionalPipeline) and own.class_names == ["a", "b", "c"]
    assert isinstance(conditioning_for(own), ClassConditioning)
    assert isinstance(load_base(str(folder / "sd"), class_names=CLASSES), StableDiffusionPipeline)
    with pytest.raises(InputError, match="knows words, not classes; name the classes to draw with `classes`"):
        load_base(str(folder / "sd"))
    with pytest.raises(InputError, match="is Stable Diffusion; give a pipeline made by `pathalign pretrain`"):
        load_pipeline(str(folder / "sd"))
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match="is a FluxPipeline; use one of ClassConditionalPipeline, StableDiffusion"):
        load_base(str(tmp_path / "base"))


def test_a_class_is_the_prompt_that_the_template_makes_of_it_and_no_class_the_empty_one(pipeline, conditioning):
    assert pipeline.prompts() == PROMPTS
    tokens = pipeline.tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(tokens).last_hidden_state
    found = conditioning(torch.tensor([1, 0, 1]))
    assert set(found) == {"encoder_hidden_states"}
    torch.testing.assert_close(found["encoder_hidden_states"], expected[[1, 0, 1]])
    torch.testing.assert_close(
        conditioning.unconditional(torch.tensor([0, 1]))["encoder_hidden_states"], expected[[2, 2]]
    )
    assert not torch.equal(expected[0], expected[1])
    other = load_base(pipeline.name_or_path, None, ["x"], "a {class_name} of {class_name}")
    assert other.prompts() == ["a x of x"]


def test_a_template_without_the_class_is_refused():
    with pytest.raises(ConfigError, match=r"`prompt` is 'a cell', the same for all classes; put \{class_name\}"):
        RewardWeightedConfig(prompt="a cell")
    with pytest.raises(ConfigError, match="the same for all classes"):
        GenerateConfig(prompt="a cell")


def test_latents_and_pixels_follow_the_vae_with_its_scale_and_shift(pipeline, conditioning):
    assert conditioning.sample_shape == (4, 8, 8) and image_size_px(pipeline) == IMAGE_SIZE_PX
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(3, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX, generator=generator) * 2 - 1
    latents = conditioning.encode(pixels)
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        torch.testing.assert_close(latents, (posterior.mean - SHIFT_FACTOR) * SCALING_FACTOR)
        decoded = conditioning.decode(latents)
        torch.testing.assert_close(decoded, pipeline.vae.decode(posterior.mean).sample)
    assert latents.shape == (3, 4, 8, 8) and not latents.requires_grad
    assert decoded.shape == pixels.shape and decoded.dtype == torch.float32
    assert float(decoded.abs().max()) < 10
    assert torch.equal(conditioning.encode(pixels), latents)


def test_decoding_passes_the_gradient_of_finite_differences_to_the_latents_and_none_to_the_vae(pipeline, conditioning):
    pipeline.vae.double()  # differences of float32 would be noise
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(latents.shape, generator=generator, dtype=torch.float64)

    def brightness(sample: Tensor) -> Tensor:
        return conditioning.decode(sample).square().mean()

    (gradient,) = torch.autograd.grad(brightness(latents), latents)
    with torch.no_grad():
        difference = (brightness(latents + 1e-5 * direction) - brightness(latents - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-9)
    assert float(gradient.abs().max()) > 0
    assert not any(parameter.requires_grad for parameter in pipeline.vae.parameters())


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_labels_and_seeds_give_the_images_that_diffusers_gives_for_the_prompts(folder, pipeline, guidance_scale):
    plain = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    ours = sample(pipeline, [0, 1], [5, 6], 2, guidance_scale)
    assert (ours.int() - images_of(plain, guidance_scale=guidance_scale).int()).abs().max() <= 1
    alone = sample(pipeline, [1], [6], 2, guidance_scale)
    assert (alone[0].int() - ours[1].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="Class 'green' is not known"):
        pipeline(["green"])


def aligned(
    method: Any, folder: Path, output_dir: Path, monkeypatch, **options: Any
) -> tuple[Any, dict[str, Tensor], Any]:
    """Run a method; returns its record, the weights before it and the trained pipeline."""
    config_class = load(method.settings)
    module = import_module(method.entry.partition(":")[0])
    plain, seen = module.load_inputs, []

    def load_inputs(config: Any) -> Any:
        inputs = plain(config)
        seen.append((state_of(inputs[0]), inputs[0]))
        return inputs

    monkeypatch.setattr(module, "load_inputs", load_inputs)
    # So few steps may well do harm: they shall be kept all the same.
    monkeypatch.setattr(RewardWeightedTrainer, "did_harm", lambda *_: False)
    inputs = {"base_model": str(folder / "sd"), "data": str(folder / "data"), "reward_model": "brightness"}
    config = config_class(**SMALL, **OWN[method.name], **inputs, learning_rate=1e-2, **options)
    record = module.align(config, output_dir)
    ((before, pipeline),) = seen
    return record, before, pipeline


@pytest.mark.parametrize("method", [item for item in METHODS if item.name in OWN], ids=lambda method: method.name)
def test_every_method_changes_the_adapter_only_and_diffusers_loads_it(
    method, folder, brightness, tmp_path, monkeypatch
):
    record, before, trained = aligned(method, folder, tmp_path / "adapter", monkeypatch)
    after = state_of(trained)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    added = set(after) - set(before)
    assert added and all("lora_" in name and name.startswith("unet.") for name in added)
    moved = [name for name in added if "lora_B" in name and float(after[name].abs().max()) > 0]
    assert len(moved) == len([name for name in added if "lora_B" in name])
    assert any("attn2" in name for name in moved)  # the layers that see the prompt
    assert record.metrics["method"] == method.name == RunRecord.load(tmp_path / "adapter").metrics["method"]

    plain = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    without = images_of(plain)
    plain.load_lora_weights(tmp_path / "adapter", weight_name=lora.WEIGHTS_NAME)
    adapted = images_of(plain)
    assert not torch.equal(without, adapted)
    assert (adapted.int() - images_of_base(trained).int()).abs().max() <= 1
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.pipeline_tag == "text-to-image" and {"stable-diffusion", method.name} <= set(card.data.tags)
    assert PROMPTS[0] in card.text


def test_new_classes_need_class_embeddings(folder, brightness, tmp_path):
    assert {method.name for method in METHODS} - set(OWN) == {"concepts"}
    config = ConceptsConfig(base_model=str(folder / "sd"), data=str(folder / "data"), reward_model="brightness")
    with pytest.raises(InputError, match=r"has words in place of class embeddings; .* Any other method can align"):
        align_concepts(config, tmp_path / "adapter")
    assert brightness.calls == 0 and not (tmp_path / "adapter").exists()


def test_draft_learns_the_same_when_activations_of_unet_and_vae_are_computed_again(
    folder, brightness, tmp_path, monkeypatch
):
    method = next(method for method in METHODS if method.name == "draft")
    calls: list[bool] = []
    decode = AutoencoderKL.decode

    def counted(self: AutoencoderKL, *args: Any, **named: Any) -> Any:
        calls.append(checkpointing)
        return decode(self, *args, **named)

    monkeypatch.setattr(AutoencoderKL, "decode", counted)
    for checkpointing in (False, True):
        aligned(method, folder, tmp_path / str(checkpointing), monkeypatch, gradient_checkpointing=checkpointing)
    weights = [(tmp_path / str(checkpointing) / lora.WEIGHTS_NAME).read_bytes() for checkpointing in (False, True)]
    assert weights[0] == weights[1]
    assert calls.count(True) - calls.count(False) == 2 * 2  # epochs, batches of each


def images_of_base(pipeline: PromptPipeline) -> Tensor:
    """Images of the pipeline as it was trained, by the sampler that it was saved with."""
    pipeline.scheduler = load_base(pipeline.name_or_path, class_names=CLASSES).scheduler
    return sample(pipeline, [0, 1], [5, 6], 2, 7.5)  # guidance by which diffusers draws if it is not told


def test_candidates_are_drawn_from_stable_diffusion_with_an_adapter(folder, brightness, tmp_path, monkeypatch):
    aligned(METHODS[0], folder, tmp_path / "adapter", monkeypatch)
    config = {"model": str(folder / "sd"), "classes": CLASSES, "images_per_class": 2, "inference_steps": 2}
    generate(GenerateConfig(**config), tmp_path / "plain")
    generate(GenerateConfig(**config, adapter=str(tmp_path / "adapter")), tmp_path / "adapted")
    plain, adapted = ImageSet.load(tmp_path / "plain"), ImageSet.load(tmp_path / "adapted")
    assert plain.class_names == tuple(CLASSES)
    assert plain.labels() == adapted.labels() == [name for name in CLASSES for _ in range(2)]
    assert plain.images.shape == (4, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    assert not torch.equal(plain.images, adapted.images)
    with pytest.raises(InputError, match="name the classes to draw with `classes`"):
        generate(GenerateConfig(**config | {"classes": []}), tmp_path / "none")


def test_data_of_another_size_than_the_vae_decodes_is_refused(folder, brightness, tmp_path):
    data = ImageSet.load(folder / "data")
    ImageSet.build(data.images[:, :, :8, :8], data.class_ids, CLASSES).save(tmp_path / "small")
    config = RewardWeightedConfig(base_model=str(folder / "sd"), data=str(tmp_path / "small"), reward_model="x")
    with pytest.raises(InputError, match=r"images of 8 px, .* draws 16 px; make data .*--image-size-px 16"):
        align(config, tmp_path / "adapter")
    assert brightness.calls == 0
