"""Untrained artefacts of every kind, small and the same each time, and a loopback Hub that holds them."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch
from hub import HubServer

from pathalign.diffusion import lora
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet
from pathalign.randomness import seeded
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.pretrain import new_pipeline

CLASSES = ("a", "b", "c")
CARD = """---
license: apache-2.0
task_categories: [image-classification]
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
# Candidates
"""
DRAWING = """
import torch
torch.set_num_threads(1)
def draw(pipeline):
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    return pipeline(["a", "b", "c"], generators, num_inference_steps=3, output_type="pt").images
"""


def pipeline(seed: int = 0, classes: tuple[str, ...] = CLASSES) -> ClassConditionalPipeline:
    """A pipeline of 16 px images; another seed, other weights."""
    made = new_pipeline(PretrainConfig(block_out_channels=[8, 16], attention_levels=[1], seed=seed), 16, classes)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: ClassConditionalPipeline) -> torch.Tensor:
    """Three images, as `DRAWING` draws them in another process."""
    names: dict[str, Any] = {}
    exec(DRAWING, names)
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = names["draw"](pipeline)
    return images


def save_adapter(folder: Path, base: ClassConditionalPipeline, seed: int) -> None:
    """Write an adapter on `base` with weights as if it had been trained."""
    lora.attach(base.unet, rank=2, alpha=4, convolutions=True, generator=seeded(seed, 0))
    for name, parameter in lora.parameters(base.unet).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=seeded(seed, 1))
    lora.save(base.unet, folder)
    base.unet.delete_adapters(lora.ADAPTER_NAME)


def reward_model(seed: int = 0, classes: tuple[str, ...] = CLASSES) -> RewardModel:
    """A reward model whose rewards differ between images and classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RewardModel(RewardModelConfig(class_names=list(classes), image_size_px=16)).eval()


def candidates(images: ImageSet) -> ImageSet:
    """The images as a candidate set."""
    columns = {"seed": list(range(len(images))), "kind": ["synthetic"] * len(images)}
    return ImageSet.build(images.images, images.class_ids, images.class_names, columns)


def save_all(folder: Path, images: ImageSet) -> None:
    """Write `base`, `adapter`, `second` (adapter), `reward`, `judge` and `candidates` below a folder."""
    base = pipeline()
    base.save_pretrained(folder / "base")
    save_adapter(folder / "adapter", base, seed=1)
    save_adapter(folder / "second", base, seed=2)
    reward_model().save_with_processor(folder / "reward")
    SimulatedGrader(list(CLASSES), {}, [], "resnet", 32, "none 1").save_pretrained(folder / "judge")
    candidates(images).save(folder / "candidates")
    (folder / "candidates" / "README.md").write_text(CARD)


def run(
    code: str,
    folder: Path,
    hub: HubServer,
    *arguments: str,
    token: str | None = None,
    python: str | Path = sys.executable,
    **environment: str,
) -> Any:
    """Run code in a process of its own that speaks to `hub`, and return the JSON in the last line of what it prints.

    `HF_HOME` is `home` in the folder, where the process runs.
    """
    variables = hub.variables(folder / "home", token, **{"PYTHONPATH": "", **environment})
    command = [str(python), "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else None
