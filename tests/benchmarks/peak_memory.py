"""Peak memory of each method of `pathalign align` at batch 16 with 20 denoising steps.

    python tests/benchmarks/peak_memory.py

Each method trains one epoch (one round) on 16 images at a time in a process of its own; the UNet is that of
`pathalign demo` at 32x32 and the reward model a convnet, both untrained. About two minutes on a CPU, where resident
memory is counted; on a GPU it is the GPU's.

Prints, last, one JSON object: `loaded_mb`, the peak of a process that loads all inputs and does nothing, and for each
method `peak_mb` and `over_loaded_mb`, what training adds. `ddpo-50-50` trains on all 50 steps that it draws, `draft-5`
goes back through the last 5 steps, and with `checkpointed` makes their activations again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pathalign.config import build
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import peak_rss_mb
from pathalign.settings.pretrain import PretrainConfig
from pathalign.stages import METHODS, load
from pathalign.trainers.adapter import load_inputs
from pathalign.trainers.pretrain import new_pipeline

CLASSES = ("a", "b", "c", "d")
BATCH, STEPS = 16, 20
DRAWN = {"images_per_class": BATCH // len(CLASSES), "sample_batch_size": BATCH, "inference_steps": STEPS}
POLICY = {**DRAWN, "epochs": 1, "batch_size": BATCH, "micro_batch_size": BATCH, "check_images_per_class": 2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "reward-weighted": ("reward-weighted", {**DRAWN, "rounds": 1, "steps_per_round": 4, "batch_size": BATCH}),
    "ddpo": ("ddpo", POLICY),
    "ddpo-50-50": ("ddpo", {**POLICY, "inference_steps": 50, "train_steps": 0}),
    "grpo": ("grpo", {**POLICY, "group_size": BATCH // len(CLASSES)}),
    "draft": ("draft", POLICY),
    "draft-5": ("draft", {**POLICY, "train_steps": 5}),
    "draft-5 checkpointed": ("draft", {**POLICY, "train_steps": 5, "gradient_checkpointing": True}),
    "dpo": ("dpo", {**POLICY, "pairs_per_epoch": BATCH, "monitor_images_per_class": 2}),
}


def make_inputs(folder: Path) -> dict[str, str]:
    """Untrained networks and black images: only their sizes matter."""
    inputs = {"base_model": str(folder / "base"), "reward_model": str(folder / "reward"), "data": str(folder / "data")}
    if not (folder / "data").is_dir():
        new_pipeline(PretrainConfig(), 32, CLASSES).save_pretrained(folder / "base")
        RewardModel(RewardModelConfig(class_names=list(CLASSES))).save_pretrained(folder / "reward")
        images = torch.zeros(4 * BATCH, 3, 32, 32, dtype=torch.uint8)
        ImageSet.build(images, torch.arange(4 * BATCH) % len(CLASSES), CLASSES).save(folder / "data")
    return inputs


def measure(variant: str, folder: Path) -> float:
    """Peak of this process in MB, after one epoch of a method, or after loading for `loaded`."""
    name, options = VARIANTS["ddpo" if variant == "loaded" else variant]
    method = next(method for method in METHODS if method.name == name)
    config = build(load(method.settings), {**make_inputs(folder), **options})
    if variant == "loaded":
        load_inputs(config)
        on_gpu = torch.accelerator.is_available()
        return torch.accelerator.max_memory_allocated() / 2**20 if on_gpu else peak_rss_mb()
    made = folder / variant
    load(method.entry)(config, made)
    rows = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    return max(row["peak_memory_mb"] for row in rows if "peak_memory_mb" in row)


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
        return
    peaks = {}
    with TemporaryDirectory() as folder:
        make_inputs(Path(folder))
        for variant in ("loaded", *VARIANTS):
            command = [sys.executable, __file__, variant, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks[variant] = float(done.stdout.splitlines()[-1])
            print(f"{variant}: {peaks[variant]:.0f} MB", flush=True)
    loaded = peaks.pop("loaded")
    methods = {name: {"peak_mb": round(peak), "over_loaded_mb": round(peak - loaded)} for name, peak in peaks.items()}
    print(json.dumps({"batch": BATCH, "steps": STEPS, "loaded_mb": round(loaded), "methods": methods}))


if __name__ == "__main__":
    main()
