"""What tests of trainers share: a reward that anyone can compute (brightness), small inputs, the lines of the log."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from pathalign.images import ImageSet
from pathalign.reward import RewardModelConfig
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.pretrain import new_pipeline

CLASSES = ("a", "b", "c")
MEASURED = ("images_per_second", "peak_memory_mb")
SPENT = {*MEASURED, "unet_forwards", "unet_backwards", "unet_flops"}  # what every trainer logs of its use of the UNet


class Brightness(nn.Module):
    """Rewards bright images, whatever their class; `interrupt_at` raises Ctrl-C at that call."""

    def __init__(self, class_names: tuple[str, ...] = ("c", "b", "a"), slope: float = 6.0) -> None:
        super().__init__()
        self.config = RewardModelConfig(class_names=list(class_names))
        self.device, self.slope, self.calls, self.interrupt_at = torch.device("cpu"), slope, 0, 0

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        return torch.sigmoid(self.slope * pixel_values.mean(dim=(1, 2, 3)))


def small_inputs(folder: Path, images: ImageSet | None = None) -> dict:
    """Settings that name an untrained base model, real images (noise by default) and a reward model, all made here."""
    if images is None:
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(0, 256, (24, 3, 16, 16), generator=generator).to(torch.uint8)
        images = ImageSet.build(pixels, torch.arange(24) % 3, CLASSES)
    images.save(folder / "data")
    config = PretrainConfig(block_out_channels=[8, 16], attention_levels=[1])
    new_pipeline(config, 16, CLASSES).save_pretrained(folder / "base")
    return {"base_model": str(folder / "base"), "data": str(folder / "data"), "reward_model": "brightness"}


def log_rows(folder: Path) -> list[dict]:
    """All lines of a trainer's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def epoch_rows(folder: Path) -> list[dict]:
    """Lines of the log, one for each epoch; the line of the check before the first one is left out."""
    return [row for row in log_rows(folder) if row["step"] > 0]


def steady_rows(folder: Path, without: Collection[str] = MEASURED) -> list[dict]:
    """All lines of the log without what is measured: equal for equal runs."""
    return [{name: value for name, value in row.items() if name not in without} for row in log_rows(folder)]
