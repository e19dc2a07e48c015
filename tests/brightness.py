"""What tests of trainers share: a reward that anyone can compute, how bright an image is, and the log's lines."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from pathalign.reward import RewardModelConfig


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


def epoch_rows(folder: Path) -> list[dict]:
    """Lines of the log, one for each epoch; the line of the check before the first one is left out."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if row["step"] > 0]
