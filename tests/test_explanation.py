from __future__ import annotations

import copy
import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor, nn

from pathalign.images import to_pixel_values
from pathalign.reward import RewardModel, RewardModelConfig, explain
from pathalign.reward.explanation import overlay, reward_parts
from pathalign.schema import InputError

CLASSES = ["a", "b"]
VIT = {
    "model_type": "vit",
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def new_model(seed: int = 0, **settings: object) -> RewardModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"image_size_px": 16, "convnet_channels": [8, 16], "criteria": ["nucleus", "colour"]} | settings
        return RewardModel(RewardModelConfig(class_names=CLASSES, **options)).eval()


def pictures(count: int = 3, size: int = 16) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    smooth = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)) for _ in range(count)]
    return [image.resize((size, size), Image.Resampling.BICUBIC) for image in smooth]


def pixels(images: list[Image.Image]) -> Tensor:
    return to_pixel_values(torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2))


def bright_corner_model() -> RewardModel:
    """Trained to find images plausible whose upper left corner is brighter than the rest; no mean colour tells."""
    model = new_model(convnet_channels=[8, 16, 16], criteria=[])
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    model.train()
    for _ in range(80):
        images = 0.3 * torch.randn(32, 3, 16, 16, generator=generator)
        labels = torch.randint(0, 2, (32,), generator=generator).float()
        images[:, :, :5, :5] += 0.9 * (2 * labels - 1)[:, None, None, None]
        images -= images.mean(dim=(2, 3), keepdim=True)
        soft = 0.1 + 0.8 * labels  # so that rewards do not end at 0 and 1
        loss = model(images.clamp(-1, 1), torch.zeros(32, dtype=torch.int64), soft).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> RewardModel:
    return bright_corner_model()


def corner_images(sign: int) -> list[Image.Image]:
    rng = np.random.default_rng(1)
    images = 128 + rng.normal(0, 30, (4, 16, 16, 3))
    images[:, :5, :5] += sign * 110
    images += 128 - images.mean(axis=(1, 2), keepdims=True)
    return [Image.fromarray(image.clip(0, 255).astype(np.uint8)) for image in images]


@pytest.mark.parametrize(
    ("settings", "error"),  # the integral is a sum of 64 steps: exact where a network is smooth
    [
        ({}, 0.02),
        ({"num_members": 3}, 0.02),
        ({"encoder": "densenet", "image_size_px": 32}, 0.02),
        ({"encoder": "vit", "backbone_config": VIT}, 0.001),
        pytest.param(
            {"encoder": "efficientnet-lite0", "image_size_px": 64, "num_members": 2}, 0.12, marks=pytest.mark.slow
        ),
    ],
    ids=["convnet", "ensemble", "densenet", "transformers", "efficientnet"],
)
def test_a_map_adds_up_to_what_the_image_is_above_its_mean_colour_with_every_encoder(settings, error):
    model, images = new_model(temperature=1.7, **settings), pictures()
    found = explain(model, images, ["a", "b", "a"])
    size = model.config.image_size_px
    assert found.saliency.shape == (3, size, size)
    ids = torch.tensor([0, 1, 0])
    sized = torch.nn.functional.interpolate(pixels(images), (size, size), mode="bilinear", antialias=True)
    flat = sized.mean(dim=(2, 3), keepdim=True).expand_as(sized)
    with torch.no_grad():
        high, low = (torch.logit(model.rewards(values, ids)) for values in (sized, flat))
    torch.testing.assert_close(found.evidence, high - low, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.saliency.sum(dim=(1, 2)), high - low, atol=error, rtol=0)
    torch.testing.assert_close(found.rewards, torch.sigmoid(high), atol=1e-4, rtol=1e-3)


def test_the_map_points_at_the_corner_that_holds_the_evidence_for_and_against(trained):
    for sign in (1, -1):
        found = explain(trained, corner_images(sign), "a")
        assert ((found.rewards > 0.5) == (sign > 0)).all()
        corner = torch.zeros(16, 16, dtype=torch.bool)
        corner[:6, :6] = True
        for saliency in sign * found.saliency:
            assert corner.flatten()[saliency.argmax()]
            assert saliency[corner].mean() > 2 * saliency[~corner].abs().mean()


def test_covering_what_the_map_marks_costs_more_reward_than_covering_as_much_elsewhere(trained):
    images = corner_images(1)
    saliency = explain(trained, images, "a").saliency.flatten(1)
    values, ids = pixels(images), torch.zeros(len(images), dtype=torch.int64)
    rewards = []
    for order in (saliency.argsort(1, descending=True), saliency.argsort(1)):
        covered = torch.zeros_like(saliency).scatter_(1, order[:, :36], 1).view(-1, 1, 16, 16).bool()
        with torch.no_grad():
            rewards.append(trained.rewards(values.masked_fill(covered, 0), ids).mean())
    assert rewards[0] < rewards[1] - 0.02


def test_a_map_tells_of_the_weights_not_of_the_image_alone(trained):
    randomized = copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(3)
    for module in randomized.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    first, second = (explain(model, corner_images(1), "a").saliency.flatten(1) for model in (trained, randomized))
    alike = [abs(spearmanr(one, other).statistic) for one, other in zip(first.numpy(), second.numpy(), strict=True)]
    assert np.mean(alike) < 0.3


def test_the_rewards_of_the_criteria_are_those_of_the_models_heads_whatever_the_batch():
    model, images = new_model(), pictures(5)
    whole, split = explain(model, images, "b"), explain(model, images, "b", batch_size=2)
    assert whole.criteria == ("nucleus", "colour")
    ids = torch.ones(5, dtype=torch.int64)
    with torch.no_grad():
        expected = torch.sigmoid(model(pixels(images), ids).criteria_logits)
    torch.testing.assert_close(whole.criteria_rewards, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(reward_parts(model, pixels(images), ids)[:, 1:], expected)
    torch.testing.assert_close(split.saliency, whole.saliency, atol=1e-4, rtol=1e-3)
    assert explain(new_model(criteria=[]), images, "b").criteria_rewards.shape == (5, 0)


def test_the_same_image_gives_the_same_bytes_and_leaves_the_model_as_it_was():
    model, image = new_model().train(), pictures(1)[0]
    before = copy.deepcopy(model.state_dict())
    drawn = [overlay(image, found.saliency[0], found.scale) for found in (explain(model, image, "a") for _ in range(2))]
    assert drawn[0] == drawn[1]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_overlay_is_blue_with_a_whole_line_where_the_reward_rises_and_orange_with_a_dashed_one_where_it_falls():
    saliency = torch.zeros(16, 16)
    saliency[2:7, 2:7], saliency[9:14, 9:14] = 1, -1
    grey = Image.new("RGB", (32, 32), (128, 128, 128))
    shown = np.asarray(Image.open(io.BytesIO(overlay(grey, saliency, 1.0, size_px=160)))).astype(int)
    assert shown.shape == (160, 160, 3)
    raised, lowered, elsewhere = shown[45, 45], shown[115, 115], shown[120, 30]
    assert raised[2] > raised[0] + 60 and lowered[0] > lowered[2] + 60
    assert elsewhere.max() == elsewhere.min()
    blue, orange = ((shown == colour).all(axis=2) for colour in ((0, 114, 178), (213, 94, 0)))
    assert blue[:80, :80].sum() > 1.5 * orange[80:, 80:].sum() > 0


def test_without_captum_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(InputError, match=r"Captum.*not installed: `pip install 'pathalign\[eval\]'`"):
        explain(new_model(), pictures(1), "a")


def test_a_class_that_the_model_does_not_know_is_named():
    with pytest.raises(InputError, match=r"does not know the classes \['c'\]"):
        explain(new_model(), pictures(1), "c")
