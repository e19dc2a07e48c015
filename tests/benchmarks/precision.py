"""What bf16 gains on this processor, see `mixed_precision: auto`.  python tests/benchmarks/precision.py

Trains the UNets of `pathalign demo` (32x32) and of the study of concepts (64x64) on 8 images, and draws with them,
in float32 and under autocast to bf16, in turns, on one thread. Half a minute. With ONEDNN_MAX_CPU_ISA=AVX512_CORE it
shows what a processor does that has no instructions for it.

Prints one JSON object: `computes_in_bf16`, which `auto` asks, and for each size and task the CPU seconds of a pass, the
median of the turns, and `ratio`, bf16 to float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from pathalign.allocator import keep_freed_memory
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.base import computes_in_bf16
from pathalign.trainers.pretrain import new_pipeline

CLASSES = ("a", "b", "c", "d", "e")
NETWORKS = {
    32: PretrainConfig(),
    64: PretrainConfig(block_out_channels=[32, 64, 96, 128], attention_levels=[3]),  # as in concepts.yaml
}
BATCH = {"train": 8, "draw": 50}


def cpu_seconds(image_size_px: int, turns: int) -> dict[str, Any]:
    """Task -> precision -> CPU seconds of one pass; the passes of the first turn warm up."""
    torch.manual_seed(0)
    pipeline = new_pipeline(NETWORKS[image_size_px], image_size_px, CLASSES)
    found: dict[str, Any] = {}
    for task, images in BATCH.items():
        noisy = torch.randn(images, 3, image_size_px, image_size_px)
        class_ids, timesteps = torch.arange(images) % len(CLASSES), torch.randint(1000, (images,))
        times: dict[str, list[float]] = {"no": [], "bf16": []}
        for _ in range(turns + 1):
            for precision, seconds in times.items():
                began = time.process_time()
                with torch.set_grad_enabled(task == "train"):
                    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                        output = pipeline.predict(noisy, timesteps, class_ids)
                    if task == "train":
                        output.float().square().mean().backward()
                        pipeline.unet.zero_grad()
                seconds.append(time.process_time() - began)
        medians = {precision: statistics.median(seconds[1:]) for precision, seconds in times.items()}
        found[task] = {name: round(value, 3) for name, value in medians.items()}
        found[task]["ratio"] = round(medians["bf16"] / medians["no"], 2)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    turns = parser.parse_args().turns
    torch.set_num_threads(1)
    keep_freed_memory()
    result: dict[str, Any] = {"computes_in_bf16": computes_in_bf16("cpu")}
    for size in NETWORKS:
        result[f"{size}x{size}"] = cpu_seconds(size, turns)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
