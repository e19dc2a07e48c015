"""New clinical concepts: where marks come from, how classes are split, what an adapter brings and how it goes again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_artefacts as tiny
import torch
from brightness import SPENT, Brightness, log_rows, small_inputs, steady_rows
from hub import serve
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pathalign.artefacts import artefact, partial_dir
from pathalign.config import ConfigError
from pathalign.diffusion import lora
from pathalign.diffusion.conditioning import conditioning_for
from pathalign.diffusion.denoiser import Denoiser
from pathalign.diffusion.pipeline import CONCEPT_WEIGHTS, CONCEPTS_KEY, ClassConditionalPipeline, base_hash
from pathalign.generate import generate, load_pipeline, sample
from pathalign.grading.simulated import class_ids_for
from pathalign.images import ImageSet
from pathalign.randomness import seeded
from pathalign.reward import RewardModel
from pathalign.schema import InputError, RunRecord
from pathalign.settings.concepts import ConceptsConfig
from pathalign.settings.generate import GenerateConfig
from pathalign.settings.subtypes import SubtypeRule, subtype_rule
from pathalign.trainers import concepts as module
from pathalign.trainers.concepts import ConceptsTrainer, align
from pathalign.trainers.marks import BlockFeatures, Concept, MarkClassifier, collect_marks, predict, surest

RULES = ["a:shade:dark=black+grey", "a:shade:light=white"]
NEW = {"dark a": "a", "light a": "a"}
POOL = ("marked", "recognised_real", "recognised_drawn")
SMALL: dict[str, Any] = {
    "subtypes": RULES,
    "images_per_class": 4,
    "inference_steps": 2,
    "sample_batch_size": 5,
    "steps": 5,
    "recognition": 0.1,
    "recognition_batch_size": 2,
    "train_steps": 1,
    "batch_size": 4,
    "real_batch_size": 2,
    "warmup_steps": 0,
    "lora_rank": 2,
    "checkpoint_every_steps": 2,
    "check_images_per_class": 2,
}


class Colours(nn.Module):
    """An encoder that anyone can follow: mean and spread of each colour."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.cat([pixel_values.mean(dim=(2, 3)), pixel_values.std(dim=(2, 3))], dim=1)


def shaded(count: int = 48) -> ImageSet:
    """Noise of three classes; cells of a are black, grey, white or of no shade that a rule names, in turn."""
    generator = torch.Generator().manual_seed(0)
    class_ids = torch.arange(count) % 3
    shades = ["black", "white", "grey", "odd"]
    names = [shades[index // 3 % 4] for index in range(count)]
    level = torch.tensor([{"black": 40, "grey": 60, "white": 200, "odd": 128}[name] for name in names])
    level[class_ids != 0] = 128
    noise = torch.randint(-30, 31, (count, 3, 16, 16), generator=generator)
    pixels = (level[:, None, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet.build(pixels, class_ids, ("a", "b", "c"), {"shade": names, "area": list(range(count))})


@pytest.fixture(autouse=True)
def encoder(monkeypatch):
    monkeypatch.setattr(module, "load_encoder", lambda *_, **__: Colours())


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    return {**SMALL, **small_inputs(tmp_path_factory.mktemp("inputs"), shaded())}


@pytest.fixture(scope="module")
def straight(settings, tmp_path_factory) -> Path:
    """The adapter of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight") / "adapter"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "from_pretrained", lambda *_: Brightness())
        patch.setattr(module, "load_encoder", lambda *_, **__: Colours())
        align(ConceptsConfig(**settings), folder)
    return folder


def save_concepts(folder: Path, base: ClassConditionalPipeline, concepts: dict[str, str], seed: int = 1) -> Path:
    """Write an adapter with concepts far from their parents, and take it off again."""
    lora.attach(base.unet, rank=2, alpha=4, convolutions=True, generator=seeded(seed, 0))
    lora.add_concepts(base, concepts, noise=3.0, generator=seeded(seed, 2))
    for name, parameter in lora.parameters(base.unet).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2, generator=seeded(seed, 1))
    lora.save(base.unet, folder, base.class_names)
    base.unload_lora_weights()
    return folder


def drawn(pipeline: ClassConditionalPipeline, labels: list[str], **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(index) for index in range(len(labels))]
    images: Tensor = pipeline(labels, generators, num_inference_steps=3, output_type="pt", **options).images
    return images


@pytest.fixture
def base() -> ClassConditionalPipeline:
    return tiny.pipeline()


# What an adapter brings


def test_a_concept_without_noise_draws_as_its_parent_and_takes_the_place_of_no_class_away_from_nobody(base):
    plain = drawn(base, ["b", "c"])
    guided = {
        "b": drawn(base, ["b", "c"], guidance_scale=3.0),
        "new b": plain,
    }  # a concept is guided away from its parent
    lora.attach(base.unet, 2, 2, True, seeded(0, 0))
    lora.add_concepts(base, {"new b": "b", "new c": "c"}, noise=0.0, generator=seeded(0, 1))
    assert base.class_names == ["a", "b", "c", "new b", "new c"] and base.concepts == {"new b": "b", "new c": "c"}
    assert base.class_ids(["c", "new b"]).tolist() == [2, 3]
    for labels in (["b", "c"], ["new b", "new c"]):
        torch.testing.assert_close(drawn(base, labels), plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(drawn(base, labels, guidance_scale=3.0), guided[labels[0]], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"'newer b' is not known; .* 'new c'"):
        base.class_ids("newer b")


def test_guidance_draws_what_sets_a_concept_apart_from_its_parent_in_samplers_and_trainers(base, tmp_path):
    base.load_lora_weights(save_concepts(tmp_path, base, {"new b": "b"}))
    sample, timestep, ids = torch.randn(3, 3, 16, 16, generator=seeded(2)), torch.tensor(400), torch.tensor([3, 0, 1])
    with torch.no_grad():
        asked, general = (base.predict(sample, timestep, torch.tensor(rows)) for rows in ([3, 0, 1], [1, 4, 4]))
        expected = general + 2.5 * (asked - general)  # row 4 is "no class"
        torch.testing.assert_close(base.predict(sample, timestep, ids, 2.5), expected)
        torch.testing.assert_close(Denoiser(base.unet, conditioning_for(base), 2.5)(sample, timestep, ids), expected)


def test_concepts_are_rows_between_the_classes_and_no_class(base):
    weight = base.unet.class_embedding.weight.detach().clone()
    lora.attach(base.unet, 2, 2, True, seeded(0, 0))
    lora.add_concepts(base, {"new b": "b"}, noise=0.5, generator=seeded(0, 1))
    layer = base.unet.class_embedding
    offset = torch.randn((1, weight.shape[1]), generator=seeded(0, 1)) * 0.5 * weight.std()
    expected = torch.cat([weight[:3], weight[1:2] + offset, weight[3:]])
    torch.testing.assert_close(layer(torch.arange(5)), expected)
    assert layer.num_embeddings == 5
    with lora.disabled(base.unet):
        torch.testing.assert_close(layer(torch.tensor([3, 4])), weight[[1, 3]])
        assert base.class_names[-1] == "new b"
    base.unet.set_adapters(["default"], [0.25])
    torch.testing.assert_close(layer(torch.tensor([3]))[0], weight[1] + 0.25 * offset[0])


def test_a_saved_concept_is_drawn_again_and_equal_adapters_are_equal_bytes(base, tmp_path):
    lora.attach(base.unet, 2, 4, True, seeded(1, 0))
    own = base_hash(base.unet)
    lora.add_concepts(base, NEW, noise=3.0, generator=seeded(1, 2))
    assert base_hash(base.unet) == own == base_hash(tiny.pipeline().unet)
    expected = drawn(base, [*NEW, "b"])
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    for name in ("one", "two"):
        lora.save(base.unet, tmp_path / name, base.class_names)
    files = [(tmp_path / name / lora.WEIGHTS_NAME).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    for load in (
        lambda pipe: pipe.load_lora_weights(tmp_path / "one"),
        lambda pipe: lora.load(pipe, str(tmp_path / "one")),
    ):
        other = tiny.pipeline()
        load(other)
        assert other.concepts == NEW
        torch.testing.assert_close(drawn(other, [*NEW, "b"]), expected, rtol=0, atol=1e-6)


def test_an_adapter_without_concepts_says_nothing_of_any(base, tmp_path):
    tiny.save_adapter(tmp_path / "plain", base, seed=1)
    with safe_open(tmp_path / "plain" / lora.WEIGHTS_NAME, "pt") as file:
        assert CONCEPT_WEIGHTS not in list(file.keys())
        assert CONCEPTS_KEY not in json.loads(file.metadata()["lora_adapter_metadata"])
    base.load_lora_weights(tmp_path / "plain")
    assert isinstance(base.unet.class_embedding, nn.Embedding) and base.class_names == ["a", "b", "c"]


def test_concepts_come_and_go_with_their_adapter(base, tmp_path):
    plain = drawn(base, ["a", "b"])
    save_concepts(tmp_path / "one", base, NEW)
    save_concepts(tmp_path / "two", base, {"new b": "b"}, seed=2)
    tiny.save_adapter(tmp_path / "three", base, seed=3)
    for name in ("one", "two", "three"):
        base.load_lora_weights(tmp_path / name, adapter_name=name)
    base.set_adapters(["two", "one", "three"])
    assert base.class_names == ["a", "b", "c", "new b", *NEW]
    together = drawn(base, ["new b", "light a"])
    base.set_adapters(["one"])
    assert base.class_names == ["a", "b", "c", *NEW]
    with pytest.raises(ValueError, match="'new b' is not known"):
        drawn(base, ["new b"])
    assert (drawn(base, ["b", "light a"])[1] - together[1]).abs().max() > 1e-3
    base.set_adapters(["one", "two"], [0.0, 0.0])  # no strength: the parents as the base model draws them
    torch.testing.assert_close(drawn(base, ["dark a", "new b"]), plain, rtol=0, atol=1e-6)
    base.disable_lora()
    torch.testing.assert_close(drawn(base, ["dark a", "new b"]), plain, rtol=0, atol=1e-6)
    base.enable_lora()
    base.delete_adapters("one")
    assert base.class_names == ["a", "b", "c", "new b"] and base.get_list_adapters() == {"unet": ["two", "three"]}
    base.unload_lora_weights()
    assert base.class_names == ["a", "b", "c"] and isinstance(base.unet.class_embedding, nn.Embedding)
    torch.testing.assert_close(drawn(base, ["a", "b"]), plain, rtol=0, atol=0)


def test_adapters_that_are_loaded_without_a_name_get_names_of_their_own(base, tmp_path):
    save_concepts(tmp_path / "one", base, NEW)
    tiny.save_adapter(tmp_path / "plain", base, seed=3)
    for name in ("plain", "one", "plain"):
        base.load_lora_weights(tmp_path / name)
    assert base.get_list_adapters() == {"unet": ["default_0", "default_1", "default_2"]}
    base.set_adapters(["default_1"])
    assert base.concepts == NEW


def test_fusing_keeps_what_is_drawn(base, tmp_path):
    save_concepts(tmp_path / "one", base, NEW)
    base.load_lora_weights(tmp_path / "one")
    adapted = drawn(base, [*NEW, "b"])
    base.fuse_lora()
    torch.testing.assert_close(drawn(base, [*NEW, "b"]), adapted, rtol=0, atol=1e-4)
    base.unfuse_lora()
    torch.testing.assert_close(drawn(base, [*NEW, "b"]), adapted, rtol=0, atol=1e-4)
    with lora.merged(base.unet):
        torch.testing.assert_close(drawn(base, [*NEW, "b"]), adapted, rtol=0, atol=1e-4)


def test_concepts_that_do_not_fit_the_classes_are_refused(base, tmp_path):
    save_concepts(tmp_path / "one", base, {"dark a": "a"})
    save_concepts(tmp_path / "other", base, {"dark a": "b"})
    base.load_lora_weights(tmp_path / "one", adapter_name="one")
    with pytest.raises(ValueError, match="Another adapter has 'dark a' with another parent"):
        base.load_lora_weights(tmp_path / "other", adapter_name="other")
    strange = tiny.pipeline(classes=("x", "y", "z"))
    with pytest.raises(ValueError, match=r"concept 'dark a' of 'a' does not fit this model, .*'x', 'y', 'z'"):
        strange.load_lora_weights(tmp_path / "one")


# Marks


def test_rules_are_read_and_wrong_ones_named():
    assert subtype_rule(RULES[0]) == SubtypeRule("a", "shade", "dark", ("black", "grey"))
    for wrong in ("a:shade=dark", "a:shade:dark", "a:shade:dark=", "a:shade:dark=x+"):
        with pytest.raises(ConfigError, match="write CLASS:ATTRIBUTE:SUBTYPE=VALUE"):
            ConceptsConfig(subtypes=[wrong])
    with pytest.raises(ConfigError, match="shade 'x' is 'dark' and 'light'"):
        ConceptsConfig(subtypes=["a:shade:dark=x", "a:shade:light=x"])
    with pytest.raises(ConfigError, match="write CLASS:SUBTYPE=NAME"):
        ConceptsConfig(names=["dark"])


def test_real_marks_are_the_attribute_of_the_images_and_no_more_than_are_allowed():
    real = shaded()
    marks = collect_marks(ConceptsConfig(subtypes=RULES), real, real.class_names)
    assert marks.concepts == (Concept("dark a", "a", "dark"), Concept("light a", "a", "light"))
    assert marks.real.all() and len(marks) == 12  # of 16 cells of class a, 4 of no shade that a rule names
    found = dict(zip(real.image_ids, real.columns["shade"], strict=True))
    for image_id, concept in zip(marks.image_ids, marks.concept_ids.tolist(), strict=True):
        assert (found[image_id] == "white") == (concept == 1)
    limited = [ConceptsConfig(subtypes=RULES, max_marks=9, min_marks=2, seed=seed) for seed in (0, 0, 1)]
    few = [collect_marks(config, real, real.class_names) for config in limited]
    assert [len(marks) for marks in few] == [9, 9, 9]
    assert few[0].image_ids == few[1].image_ids != few[2].image_ids


def test_marks_are_drawn_from_each_subtype_in_turn_so_that_a_rare_one_is_not_outnumbered():
    real = shaded(240)
    shades = ["white" if index % 10 == 0 else "black" for index in range(240)]
    real = replace(real, columns={"shade": shades})
    counts = []
    for allowed in (12, 30):  # 8 of the 80 cells of class a are white
        marks = collect_marks(ConceptsConfig(subtypes=RULES, max_marks=allowed), real, real.class_names)
        counts.append(torch.bincount(marks.concept_ids).tolist())
    assert counts == [[6, 6], [22, 8]]


def test_marks_of_feedback_count_where_the_image_came_out_plausible(tmp_path):
    real = shaded()
    columns = {"majority": [index % 2 == 0 for index in range(48)], "subtype": ["dark", "light", "light", ""] * 12}
    replace(real, columns=columns).save(tmp_path, "train")
    marks = collect_marks(ConceptsConfig(feedback=str(tmp_path)), real, real.class_names)
    wanted = [(real.image_ids[i], real.labels()[i]) for i in range(48) if columns["subtype"][i] and i % 2 == 0]
    assert sorted(marks.image_ids) == sorted(image_id for image_id, _ in wanted) and not marks.real.any()
    names = [f"{mark} {name}" for name in "abc" for mark in ("dark", "light")]
    assert [concept.name for concept in marks.concepts] == names
    replace(real, columns={"majority": columns["majority"]}).save(tmp_path, "train")  # written before there were marks
    with pytest.raises(InputError, match="marks are: none"):
        collect_marks(ConceptsConfig(feedback=str(tmp_path)), real, real.class_names)


def test_a_class_is_split_only_in_two_and_by_enough_marks():
    real = shaded()
    with pytest.raises(InputError, match=r"two subtypes with 5 marks each; marks are: a 'dark' 8, a 'light' 4"):
        collect_marks(ConceptsConfig(subtypes=RULES, min_marks=5), real, real.class_names)
    with pytest.raises(InputError, match="Two classes would be called 'b'"):
        collect_marks(ConceptsConfig(subtypes=RULES, names=["a:dark=b"]), real, real.class_names)
    named = collect_marks(ConceptsConfig(subtypes=RULES, names=["a:dark=night"]), real, real.class_names)
    assert [concept.name for concept in named.concepts] == ["night", "light a"]
    for rule, message in (("z:shade:x=y", "the class 'z'"), ("a:colour:x=y", r"'colour', which .* has \['shade'\]")):
        with pytest.raises(InputError, match=message):
            collect_marks(ConceptsConfig(subtypes=[rule]), real, real.class_names)


class Blocks(nn.Module):
    """An encoder of two blocks: one gives maps, the other tokens in a tuple, as backbones do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.ReLU()])

    def forward(self, pixel_values: Tensor) -> Tensor:
        maps = self.blocks[0](pixel_values)
        return self.blocks[1](maps.flatten(2).transpose(1, 2))[:, 0]


def test_features_are_the_mean_and_the_spread_of_every_block_beside_the_encoders_own():
    torch.manual_seed(0)
    encoder, images = Blocks(), torch.rand(2, 3, 8, 8, requires_grad=True)
    features = BlockFeatures(encoder)(images)
    maps = encoder.blocks[0](images).detach().numpy()
    tokens = np.maximum(maps.reshape(2, 4, 36), 0)
    expected = [tokens[:, :, 0], maps.mean((2, 3)), maps.std((2, 3)), tokens.mean(2), tokens.std(2)]
    np.testing.assert_allclose(features.detach(), np.concatenate(expected, axis=1), atol=1e-4)
    flat = BlockFeatures(encoder)(torch.zeros_like(images).requires_grad_())  # nothing varies
    assert torch.autograd.grad(features.sum(), images)[0].isfinite().all() and flat.isfinite().all()
    assert BlockFeatures(Colours())(images).shape == (2, 6)  # no blocks


def test_the_classifier_spreads_the_marks_and_says_how_well_it_knows_them():
    real = shaded(96)
    marks = collect_marks(ConceptsConfig(subtypes=RULES), real, real.class_names)
    classifier = MarkClassifier(Colours(), marks)
    shares = classifier.probabilities(real.images, real.labels())
    cells = real.class_ids == 0
    torch.testing.assert_close(shares[cells].sum(1), torch.ones(int(cells.sum())))
    assert not shares[~cells].any()
    for share, shade in zip(shares[cells], [real.columns["shade"][row] for row in cells.nonzero()[:, 0]], strict=True):
        assert shade == "odd" or (share[1] > 0.5) == (shade == "white")
    assert classifier.cross_validated(0) == {"n": 24, "accuracy": 1.0, "balanced_accuracy": 1.0, "guessing": 0.5}
    shuffled = replace(marks, concept_ids=marks.concept_ids[torch.randperm(24, generator=seeded(3))])
    assert MarkClassifier(Colours(), shuffled).cross_validated(0)["balanced_accuracy"] < 0.8


@pytest.mark.parametrize("shades", [["black", "white"], ["black", "grey", "white"]])
def test_log_probabilities_are_those_of_the_classifier_and_have_a_gradient(shades):
    real = shaded(96)
    rules = [f"a:shade:{shade}={shade}" for shade in shades] + ["b:shade:x=black", "b:shade:y=white+odd"]
    marks = collect_marks(ConceptsConfig(subtypes=rules), real, real.class_names)
    classifier = MarkClassifier(Colours(), marks)
    cells = real.select(real.class_ids == 0)
    features = classifier.encode(cells.images)[:, :1]  # as they are, not turned
    expected = np.log(predict(classifier.models["a"], features))
    pixel_values = cells.pixel_values().requires_grad_()
    for concept in range(len(shades)):
        found = classifier.log_probabilities(pixel_values, torch.full((len(cells),), concept))
        np.testing.assert_allclose(found.detach(), expected[:, concept], atol=1e-3)
        assert float(torch.autograd.grad(found.sum(), pixel_values)[0].abs().max()) > 0


def test_the_surest_images_of_each_concept_are_kept():
    shares = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.45, 0.55]])
    rows, ids = surest(shares, 0.5)  # of 0, 1, 3 the first two by share; of 2, 4 one
    assert dict(zip(rows.tolist(), ids.tolist(), strict=True)) == {0: 0, 3: 0, 2: 1}
    assert [part.tolist() for part in surest(torch.zeros(0, 2), 0.5)] == [[], []]


# Training


@pytest.mark.slow
@pytest.mark.parametrize("recognition", [0.0, 0.1])
def test_new_classes_learn_what_was_marked_and_the_base_model_stays(settings, brightness, tmp_path, recognition):
    long = settings | {"steps": 100, "batch_size": 8, "learning_rate": 1e-2, "recognition": recognition}
    config, real = ConceptsConfig(**long), ImageSet.load(settings["data"])
    pipeline = load_pipeline(settings["base_model"])
    before = {name: values.clone() for name, values in pipeline.unet.state_dict().items()}
    marks = collect_marks(config, real, pipeline.class_names)
    with artefact(tmp_path / "adapter") as folder:
        record = ConceptsTrainer(pipeline, brightness, real, config, folder, marks).train()
    after = {name.replace(".base_layer", ""): values for name, values in pipeline.unet.state_dict().items()}
    assert [name for name, values in before.items() if not torch.equal(values, after[name])] == []
    assert all("lora_" in name for name in set(after) - set(before))
    dark, light = (drawn(pipeline, [name] * 12).mean(dim=(1, 2, 3)) for name in NEW)
    assert int((dark < light).sum()) >= 11
    assert [entry["marks"] for entry in record.metrics["concepts"]] == [8, 4]


def test_new_embeddings_have_a_learning_rate_of_their_own(settings, brightness, tmp_path):
    config = ConceptsConfig(**settings | {"embedding_rate": 8.0, "learning_rate": 1e-3})
    real, pipeline = ImageSet.load(settings["data"]), load_pipeline(settings["base_model"])
    marks = collect_marks(config, real, pipeline.class_names)
    trainer = ConceptsTrainer(pipeline, brightness, real, config, tmp_path, marks)
    before = {name: values.detach().clone() for name, values in lora.parameters(pipeline.unet).items()}
    trainer.step(0)
    moved = {
        name: float((values.detach() - before[name]).abs().max())
        for name, values in lora.parameters(pipeline.unet).items()
    }
    for name, distance in moved.items():  # Adam's first step is the learning rate, whatever the gradient
        if "lora_B" in name:
            assert distance == pytest.approx(1e-3, rel=0.02)
        if "lora_concepts" in name:
            assert distance == pytest.approx(8e-3, rel=0.02)
    assert sum("lora_concepts" in name for name in moved) == 1


def test_the_parents_are_held_where_the_base_model_has_them(settings, brightness, tmp_path):
    real, distances = ImageSet.load(settings["data"]), {}
    for beta in (0.0, 100.0):
        config = ConceptsConfig(**settings | {"beta": beta, "steps": 12, "learning_rate": 1e-2})
        pipeline = load_pipeline(settings["base_model"])
        marks = collect_marks(config, real, pipeline.class_names)
        (folder := tmp_path / str(beta)).mkdir()
        trainer = ConceptsTrainer(pipeline, brightness, real, config, folder, marks)
        assert trainer.parents_loss(seeded(1)).item() == 0
        for number in range(config.steps):
            trainer.step(number)
        with torch.no_grad():
            distances[beta] = float(trainer.parents_loss(seeded(1)))
    assert 0 < distances[100.0] < distances[0.0] / 2


def contents(folder: Path) -> tuple[bytes, list[dict], Any]:
    rows = steady_rows(folder, without=SPENT)
    return (folder / lora.WEIGHTS_NAME).read_bytes(), rows, RunRecord.load(folder).metrics


@pytest.mark.parametrize("interrupt", [1, 2, 4, 5])
def test_the_same_call_after_an_interruption_ends_as_a_straight_run(
    settings, straight, brightness, tmp_path, monkeypatch, interrupt
):
    plain, taken = ConceptsTrainer.step, []

    def step(self, index):
        if index == interrupt - 1 and not taken:
            taken.append(index)
            raise KeyboardInterrupt
        return plain(self, index)

    monkeypatch.setattr(ConceptsTrainer, "step", step)
    with pytest.raises(KeyboardInterrupt):
        align(ConceptsConfig(**settings), tmp_path / "stopped")
    assert partial_dir(tmp_path / "stopped").is_dir()
    align(ConceptsConfig(**settings), tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(straight)


def test_the_log_the_record_and_the_card_say_what_was_learned(settings, straight):
    rows = log_rows(straight)
    names = {"step", "loss", "concept_loss", "recognition_loss", "parents_loss", "gradient_norm", "learning_rate"}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and all(set(row) == names | SPENT for row in rows)
    record = RunRecord.load(straight)
    assert record.metrics["class_names"] == ["a", "b", "c", *NEW]
    first = record.metrics["concepts"][0]
    assert (first["name"], first["parent"], first["marks"], first["marks_of_real"]) == ("dark a", "a", 8, 8)
    assert record.metrics["pool"]["marked"] == 12
    card = (straight / "README.md").read_text()
    assert "| dark a | a | 8 | 8 |" in card and 'pipe(["dark a"] * 4' in card


def test_marks_that_teach_nothing_are_said_to(settings, brightness, tmp_path, capsys):
    few = {"steps": 1, "unmarked_real": False}
    align(ConceptsConfig(**settings | few), tmp_path / "adapter")
    assert "100% are told right" in (clear := capsys.readouterr().err) and "next to nothing" not in clear
    real = ImageSet.load(settings["data"])
    columns = {"shade": [("black", "white")[int(value) // 12 % 2] for value in real.columns["area"]]}
    replace(real, columns=columns).save(tmp_path / "data")
    align(ConceptsConfig(**settings | few | {"data": str(tmp_path / "data")}), tmp_path / "other")
    assert "mark more images, or use larger ones" in capsys.readouterr().err


def test_unmarked_images_are_learned_from_only_if_the_marks_can_be_told(settings, brightness, tmp_path, capsys):
    real = ImageSet.load(settings["data"])
    columns = {"shade": [("black", "white")[int(value) // 12 % 2] for value in real.columns["area"]]}
    replace(real, columns=columns).save(tmp_path / "data")  # marks at random
    found = {}
    for least in (0.8, 0.0):
        given = settings | {"steps": 1, "data": str(tmp_path / "data"), "max_marks": 8, "least_accuracy": least}
        found[least] = align(ConceptsConfig(**given), tmp_path / str(least)).metrics
    assert found[0.8]["marks_cross_validated"]["balanced_accuracy"] < 0.8
    assert found[0.8]["pool"] == {"marked": 8} and set(found[0.0]["pool"]) == {*POOL}
    assert capsys.readouterr().err.count("Unmarked images are left out: `least_accuracy` is 80%") == 1


def test_marks_alone_are_enough(settings, brightness, tmp_path):
    alone = {"images_per_class": 0, "unmarked_real": False, "steps": 1}
    record = align(ConceptsConfig(**settings | alone), tmp_path / "adapter")
    assert record.metrics["pool"] == dict(zip(POOL, (12, 0, 0), strict=True))


def test_without_marks_or_with_words_for_classes_nothing_starts(settings, brightness, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="take marks of the real images with `subtypes`"):
        align(ConceptsConfig(**settings | {"subtypes": []}), tmp_path / "adapter")
    words = object()
    monkeypatch.setattr(module, "load_inputs", lambda _: (words, brightness, shaded()))
    with pytest.raises(InputError, match=r"is Stable Diffusion, .* needs a pipeline made by `pathalign pretrain`"):
        align(ConceptsConfig(**settings), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# Drawing and judging


def test_candidates_of_a_concept_are_labelled_as_its_parent_and_say_which_they_are(
    settings, straight, brightness, tmp_path
):
    config = GenerateConfig(
        model=settings["base_model"], adapter=str(straight), classes=["light a", "b"], images_per_class=3,
        inference_steps=2, best_of=2, reward_model="brightness",
    )  # fmt: skip
    generate(config, tmp_path / "drawn")
    found = ImageSet.load(tmp_path / "drawn")
    assert found.class_names == ("a", "b", "c")
    assert found.labels() == ["a"] * 3 + ["b"] * 3
    assert found.columns["concept"] == ["light a"] * 3 + [""] * 3
    assert class_ids_for(found, ["c", "b", "a"]).tolist() == [2, 2, 2, 1, 1, 1]
    pipeline = load_pipeline(settings["base_model"])
    lora.load(pipeline, str(straight))
    again = sample(replace_scheduler(pipeline), [4], found.columns["seed"][:1], 2)
    assert torch.equal(again[0], found.images[0])
    generate(
        replace(config, classes=[]), tmp_path / "plain"
    )  # by default the base model's classes, as without concepts
    plain = ImageSet.load(tmp_path / "plain")
    assert plain.labels() == ["a"] * 3 + ["b"] * 3 + ["c"] * 3 and "concept" not in plain.columns
    with pytest.raises(InputError, match="There is no class 'lite a'"):
        generate(replace(config, classes=["lite a"]), tmp_path / "none")


def replace_scheduler(pipeline: ClassConditionalPipeline) -> ClassConditionalPipeline:
    from pathalign.generate import set_scheduler

    set_scheduler(pipeline, "dpmsolver++")
    return pipeline


TRAVELLED = """
import json, sys
import torch
torch.set_num_threads(1)
sys.modules["pathalign"] = None  # importing it fails
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
folder = snapshot_download("lab/base")
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
pipe.load_lora_weights("lab/adapter")
generators = [torch.Generator().manual_seed(index) for index in range(2)]
images = pipe(["dark a", "light a"], generators, num_inference_steps=3, output_type="pt").images
error = float((images - load_file("expected.safetensors")["images"]).abs().max())
pipe.unload_lora_weights()
print(json.dumps([error, pipe.class_names]))
"""
PUTTING = """
from huggingface_hub import HfApi
for name in ("base", "adapter"):
    HfApi().create_repo(f"lab/{name}")
    HfApi().upload_folder(repo_id=f"lab/{name}", folder_path=name)
"""


@pytest.mark.slow
@pytest.mark.hub
def test_a_concept_is_drawn_from_the_hub_and_from_the_cache_where_pathalign_is_not_installed(base, tmp_path):
    base.save_pretrained(tmp_path / "base")
    save_concepts(tmp_path / "adapter", base, NEW)
    base.load_lora_weights(tmp_path / "adapter")
    save_file({"images": drawn(base, list(NEW))}, tmp_path / "expected.safetensors")
    with serve(tmp_path / "hub") as hub:
        tiny.run(PUTTING, tmp_path, hub)
        online = tiny.run(TRAVELLED, tmp_path, hub)
    offline = tiny.run(TRAVELLED, tmp_path, hub, HF_HUB_OFFLINE="1")
    assert online == offline
    assert online[0] <= 1e-5 and online[1] == ["a", "b", "c"]
