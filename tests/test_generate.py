"""Candidate sets: reproducible to the byte, resumed without drawing twice, each image drawn again from its row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from pathalign import generate as module
from pathalign.artefacts import partial_dir
from pathalign.config import ConfigError, build
from pathalign.diffusion import lora
from pathalign.generate import SCHEDULERS, SEEDS_PER_ATTEMPT, generate, load_pipeline, sample, score, set_scheduler
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import InputError, RunRecord
from pathalign.settings.generate import GenerateConfig

COLUMNS = {"seed", "model", "adapter", "scheduler", "steps", "guidance", "kind"}


@pytest.fixture
def config(tiny_pipeline, tmp_path: Path) -> GenerateConfig:
    tiny_pipeline.save_pretrained(tmp_path / "model")
    return GenerateConfig(
        model=str(tmp_path / "model"), images_per_class=5, inference_steps=2, batch_size=4, scheduler="ddim", seed=7
    )


@pytest.fixture
def adapter(tiny_pipeline, tmp_path: Path) -> str:
    lora.attach(tiny_pipeline.unet, 2, 2, True, torch.Generator().manual_seed(0))
    for name, parameter in lora.parameters(tiny_pipeline.unet).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    lora.save(tiny_pipeline.unet, tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.fixture
def reward_model(tmp_path: Path) -> str:
    """An untrained one that knows the classes in another order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RewardModel(RewardModelConfig(class_names=["c", "a", "b"], criteria=[], convnet_channels=[8, 8]))
    model.save_with_processor(tmp_path / "reward")
    return str(tmp_path / "reward")


def parquet(folder: Path) -> bytes:
    return (folder / "data" / "train-00000-of-00001.parquet").read_bytes()


def test_the_same_settings_give_the_same_bytes(config: GenerateConfig, tmp_path: Path):
    records = [generate(config, tmp_path / name) for name in ("one", "two")]
    assert parquet(tmp_path / "one") == parquet(tmp_path / "two")
    assert (tmp_path / "one/samples.png").read_bytes() == (tmp_path / "two/samples.png").read_bytes()
    assert RunRecord.load(tmp_path / "one").metrics == records[1].metrics == {"n": 15}
    assert not (tmp_path / "one/checkpoints").exists()


def test_another_seed_or_guidance_or_sampler_gives_other_images(config: GenerateConfig, tmp_path: Path):
    changes = [{}, {"seed": 8}, {"guidance_scale": 3.0}, {"scheduler": "ddpm"}, {"inference_steps": 3}]
    ids = set()
    for index, change in enumerate(changes):
        generate(replace(config, **change), tmp_path / str(index))
        ids.add(ImageSet.load(tmp_path / str(index)).image_ids)
    assert len(ids) == len(changes)


def test_varied_steps_take_turns_and_every_row_says_its_own(config: GenerateConfig, tmp_path: Path):
    generate(replace(config, varied_steps=[1, 3]), tmp_path / "set")
    candidates = ImageSet.load(tmp_path / "set")
    assert candidates.columns["steps"] == [1, 3] * 7 + [1]
    assert len(set(candidates.columns["seed"])) == 15
    pipeline = load_pipeline(config.model)
    set_scheduler(pipeline, config.scheduler)
    for row in (0, 1, 6, 13, 14):
        seed, steps = (candidates.columns[name][row] for name in ("seed", "steps"))
        again = sample(pipeline, [int(candidates.class_ids[row])], [seed], steps)
        assert (again[0].int() - candidates.images[row].int()).abs().max() <= 1


def test_no_steps_at_all_are_refused():
    with pytest.raises(ConfigError, match=r"`varied_steps` is \[5, 0\]; each must be 1 or more"):
        build(GenerateConfig, {"varied_steps": [5, 0]}, title="generate")


def test_an_interrupted_set_goes_on_and_draws_no_image_twice(
    config: GenerateConfig, drawn: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    generate(config, tmp_path / "straight")
    assert drawn == list(range(7, 22))
    drawn.clear()
    counted = module.sample

    def interrupt(*args):
        if len(drawn) == 8:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "sample", interrupt)
        generate(config, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    generate(config, tmp_path / "resumed")
    assert drawn == list(range(7, 22))
    assert parquet(tmp_path / "resumed") == parquet(tmp_path / "straight")


@pytest.mark.parametrize("change", ["settings", "model", "reward model"])
def test_batches_that_no_longer_fit_are_drawn_again(
    config: GenerateConfig, reward_model: str, tiny_pipeline, drawn: list[int], tmp_path: Path, monkeypatch, change: str
):
    config = replace(config, reward_model=reward_model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "contact_sheet", lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
        generate(config, tmp_path / "set")
    kept = list((partial_dir(tmp_path / "set") / "checkpoints").rglob("*.parquet"))
    assert (len(kept), len(drawn)) == (1, 15)
    drawn.clear()
    if change == "settings":
        config = replace(config, guidance_scale=2.0)
    elif change == "model":
        torch.nn.init.zeros_(tiny_pipeline.unet.conv_out.weight)
        tiny_pipeline.save_pretrained(config.model)
    else:
        other = RewardModel.from_pretrained(reward_model)
        torch.nn.init.zeros_(other.heads[0].plausibility.weight)
        other.save_with_processor(Path(reward_model))
    generate(config, tmp_path / "set")
    assert len(drawn) == 15


def test_any_row_can_be_drawn_again_from_what_it_says(config: GenerateConfig, adapter: str, tmp_path: Path):
    generate(replace(config, adapter=adapter, guidance_scale=2.0, scheduler="ddpm"), tmp_path / "set")
    candidates = ImageSet.load(tmp_path / "set")
    assert set(candidates.columns) == COLUMNS
    assert candidates.columns["seed"] == list(range(7, 22))
    assert set(candidates.columns["kind"]) == {"synthetic"}
    assert candidates.labels() == ["a"] * 5 + ["b"] * 5 + ["c"] * 5
    for name in ("model", "adapter"):
        (version,) = set(candidates.columns[name])
        assert version == RunRecord.load(tmp_path / "set").inputs[name]
    pipeline = load_pipeline(config.model)
    lora.load(pipeline, adapter)
    for row in (3, 11):
        column = {name: values[row] for name, values in candidates.columns.items()}
        set_scheduler(pipeline, column["scheduler"])
        label = pipeline.class_names.index(candidates.labels()[row])
        again = sample(pipeline, [label], [column["seed"]], column["steps"], column["guidance"])
        assert (again[0].int() - candidates.images[row].int()).abs().max() <= 1


def test_an_adapter_changes_the_images_by_its_scale(config: GenerateConfig, adapter: str, tmp_path: Path):
    images = []
    for index, change in enumerate([{}, {"adapter": adapter, "adapter_scale": 0.0}, {"adapter": adapter}]):
        generate(replace(config, **change), tmp_path / str(index))
        images.append(ImageSet.load(tmp_path / str(index)).images.int())
    plain, off, on = images
    assert (plain - off).abs().max() <= 1
    assert (plain - on).abs().max() > 3


def test_one_class_can_be_asked_for(config: GenerateConfig, tmp_path: Path):
    generate(replace(config, classes=["c"], images_per_class=2), tmp_path / "set")
    candidates = ImageSet.load(tmp_path / "set")
    assert candidates.labels() == ["c", "c"]
    assert candidates.class_names == ("a", "b", "c")


def test_best_of_keeps_the_draw_of_the_highest_reward(config: GenerateConfig, reward_model: str, tmp_path: Path):
    for best_of in (1, 3):
        best = replace(config, best_of=best_of, reward_model=reward_model)
        generate(best, tmp_path / str(best_of))
    one, three = ImageSet.load(tmp_path / "1"), ImageSet.load(tmp_path / "3")
    assert set(three.columns) == COLUMNS | {"reward"}
    generate(config, tmp_path / "plain")
    assert one.image_ids == ImageSet.load(tmp_path / "plain").image_ids  # the first draw has the plain seed
    pipeline, model = load_pipeline(config.model), RewardModel.from_pretrained(reward_model)
    set_scheduler(pipeline, config.scheduler)
    ids = one.class_ids.tolist()
    seeds = torch.tensor([[7 + row + attempt * SEEDS_PER_ATTEMPT for row in range(15)] for attempt in range(3)])
    rewards = torch.stack(
        [score(model, sample(pipeline, ids, draw.tolist(), 2), ids, pipeline.class_names) for draw in seeds]
    )
    best = rewards.argmax(0)
    assert len(set(best.tolist())) > 1
    assert three.columns["seed"] == seeds[best, torch.arange(15)].tolist()
    assert three.columns["reward"] == pytest.approx(rewards.max(0).values.tolist(), abs=1e-3)
    assert one.columns["reward"] == pytest.approx(rewards[0].tolist(), abs=1e-3)


def test_rewards_go_by_class_name_whatever_the_order_of_ids(reward_model: str, tiny_images: ImageSet):
    model = RewardModel.from_pretrained(reward_model)
    ours = score(model, tiny_images.images[:3], [0, 1, 2], ["a", "b", "c"])
    with torch.no_grad():
        expected = model.rewards(tiny_images.pixel_values()[:3], torch.tensor([1, 2, 0]))
    torch.testing.assert_close(ours, expected)
    with pytest.raises(InputError, match=r"does not know the classes \['z'\]; it was trained on \['c', 'a', 'b'\]"):
        score(model, tiny_images.images[:1], [0], ["z"])


def test_an_unknown_class_gets_the_nearest_name(tiny_pipeline, config: GenerateConfig, tmp_path: Path):
    tiny_pipeline.register_to_config(id2label={"0": "neutrophil", "1": "monocyte", "2": "basophil"})
    tiny_pipeline.save_pretrained(config.model)
    with pytest.raises(InputError, match=r"There is no class 'neutrofil'\. Did you mean 'neutrophil'\?"):
        generate(replace(config, classes=["neutrofil"]), tmp_path / "set")
    assert not partial_dir(tmp_path / "set").exists()


def test_a_model_that_is_not_there_or_is_broken_is_refused(config: GenerateConfig, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no pipeline .*; make one with `pathalign pretrain`"):
        generate(replace(config, model=str(tmp_path / "empty")), tmp_path / "set")
    with pytest.raises(InputError, match="No pipeline can be loaded from 'no/such/folder'"):
        generate(replace(config, model="no/such/folder"), tmp_path / "set")
    with pytest.raises(InputError, match=r"holds no pytorch_lora_weights\.safetensors"):
        generate(replace(config, adapter=str(tmp_path / "empty")), tmp_path / "set")
    (weights,) = Path(config.model).rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="No pipeline can be loaded"):
        generate(config, tmp_path / "set")


def test_settings_name_every_sampler():
    assert set(get_args(get_type_hints(GenerateConfig)["scheduler"])) == set(SCHEDULERS)


def test_best_of_needs_a_reward_model():
    with pytest.raises(ConfigError, match="`best_of` is 4, but there is no `reward_model` to choose by"):
        GenerateConfig(best_of=4)
