"""What a trainer says it asks of its UNet, against counts and FLOPs written out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from pathalign.diffusion import lora
from pathalign.settings.ddpo import DDPOConfig
from pathalign.trainers import gpus, usage
from pathalign.trainers.usage import Usage

CPU = torch.device("cpu")
CONFIG = DDPOConfig(lora_rank=2)


@pytest.fixture
def unet(tiny_pipeline) -> UNet2DConditionModel:
    lora.attach(tiny_pipeline.unet, CONFIG.lora_rank, CONFIG.lora_alpha, CONFIG.lora_convolutions, torch.Generator())
    return tiny_pipeline.unet


def ask(unet: UNet2DConditionModel, count: int) -> torch.Tensor:
    return unet(torch.zeros(count, 3, 16, 16), 10, None, class_labels=torch.zeros(count, dtype=torch.int64)).sample


def test_images_are_counted_forward_and_only_where_a_gradient_came_back(unet):
    counted = Usage(unet, CONFIG, CPU)
    with torch.no_grad():
        ask(unet, 3)
    ask(unet, 5)  # a graph that is never used
    ask(unet, 2).sum().backward()
    assert (counted.forwards, counted.backwards) == (10, 2)
    checkpoint(ask, unet, 4, use_reentrant=False).sum().backward()  # goes forward twice
    assert (counted.forwards, counted.backwards) == (18, 6)
    counted.start()
    assert (counted.forwards, counted.backwards) == (0, 0)


def test_flops_are_those_of_the_passes(unet):
    counted = Usage(unet, CONFIG, CPU)
    ask(unet, 2).sum().backward()
    with torch.no_grad():
        ask(unet, 3)
    passes = counted.profile
    found = counted.figures(2)
    assert found["unet_flops"] == 3 * passes.forward_flops + 2 * passes.backward_flops
    assert passes.backward_flops > 2 * passes.forward_flops * 0.9  # as much back as forward, or more
    assert "share_of_peak" not in found  # a CPU's is not known


def test_on_a_known_gpu_the_share_of_its_peak_is_told(unet, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda: 3 * 2**20)
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(usage.time, "monotonic", lambda: next(clock))
    counted = Usage(unet, CONFIG, torch.device("cuda", 0))
    ask(unet, 2).sum().backward()
    found = counted.figures(8)
    assert found["share_of_peak"] == pytest.approx(found["unet_flops"] / 4 / 67e12)  # seconds, float32 peak
    assert (found["images_per_second"], found["peak_memory_mb"]) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("driver_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("Tesla T4", "T4"),
        ("NVIDIA L40S", None),
        ("NVIDIA A10", None),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(driver_name, name):
    found = gpus.named(driver_name)
    assert (found.name if found else None) == name
