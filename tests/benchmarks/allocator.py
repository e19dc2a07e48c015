"""What it gains on a CPU to keep freed memory, see `pathalign.allocator`.  python tests/benchmarks/allocator.py

Draws 50 images at a time by an untrained UNet of `pathalign demo`, at 32x32 and 64x64, and trains it on 24, in
processes of their own that keep freed memory or do not, in turns, on one thread. About three minutes.

Prints, last, one JSON object: CPU seconds (of the system too) of each, the smallest of the turns; `ratio`, kept to
default; and peak memory in MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch

from pathalign.allocator import keep_freed_memory
from pathalign.generate import sample, set_scheduler
from pathalign.schema import peak_rss_mb
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.pretrain import new_pipeline

CLASSES = ("a", "b", "c", "d", "e")
DRAWN, TRAINED = 50, 24
STEPS = {32: 10, 64: 3}  # of denoising, and of training
MODES = ("default", "kept")


def measure(image_size_px: int) -> dict[str, float]:
    """CPU seconds of drawing and of training, each once, after a step to warm up."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipeline, steps = new_pipeline(PretrainConfig(), image_size_px, CLASSES), STEPS[image_size_px]
    pipeline.set_progress_bar_config(disable=True)
    set_scheduler(pipeline, "dpmsolver++")
    class_ids = [row % len(CLASSES) for row in range(DRAWN)]

    def draw(count: int) -> None:
        sample(pipeline, class_ids, range(DRAWN), count, 1.0)

    def train(count: int) -> None:
        optimizer = torch.optim.AdamW(pipeline.unet.parameters())
        labels, timesteps = torch.tensor(class_ids[:TRAINED]), torch.randint(1000, (TRAINED,))
        for _ in range(count):
            noisy = torch.randn(TRAINED, 3, image_size_px, image_size_px)
            pipeline.predict(noisy, timesteps, labels).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    seconds = {}
    for name, work in (("draw", draw), ("train", train)):
        work(1)
        began = time.process_time()
        work(steps)
        seconds[f"{name}_cpu_s"] = time.process_time() - began
    return {**seconds, "peak_rss_mb": peak_rss_mb()}


def in_own_process(image_size_px: int, mode: str) -> dict[str, float]:
    """What `measure` finds in a new process."""
    command = [sys.executable, __file__, "--image-size-px", str(image_size_px), "--mode", mode]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure once in this process if told so, else in others, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size-px", type=int, choices=STEPS, help="measure this size, once, in this process")
    parser.add_argument("--mode", choices=MODES, default=MODES[0])
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if options.image_size_px:
        assert options.mode == MODES[0] or keep_freed_memory()
        print(json.dumps(measure(options.image_size_px)))
        return
    result: dict[str, Any] = {}
    for size in STEPS:
        turns = [{mode: in_own_process(size, mode) for mode in MODES} for _ in range(options.turns)]
        names = turns[0][MODES[0]]
        best = {name: {mode: min(turn[mode][name] for turn in turns) for mode in MODES} for name in names}
        result[f"{size}x{size}"] = {
            name: {mode: round(value, 2) for mode, value in of.items()}
            | {"ratio": round(of["kept"] / of["default"], 2)}
            for name, of in best.items()
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
