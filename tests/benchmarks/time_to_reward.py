"""How much CPU time each method of `pathalign align` needs until images are plausible, by a judge that it never sees.

    python tests/benchmarks/time_to_reward.py runs/real_cells/seed-* --methods reward-weighted ddpo draft --cpu-s 600

Needs run directories of `pathalign run` or `pathalign demo` with their base, grader, judge and reward model. Each
method runs in one thread; the clock counts the CPU time of training only. What is measured is kept, so that the same
command goes on after an interruption. Writes `time_to_reward.png`, the curves of the judge's share and of the reward,
and prints, last, one JSON object: the median over runs of the CPU seconds until 30 % of the distance between the base's
and the real images' share is closed (`cpu_s`, by method; null if most runs never got there), and the ratio
`time_to_reward_ratio`: DDPO with 50 steps of which all are trained over DDPO as it is by default. If the slow one never
got there it is at least this, and `ratio_is_lower_bound` is true. `control` is continued pretraining as in the demo: it
learns from the training images alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure

from pathalign.config import build
from pathalign.generate import sample, score, set_scheduler
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet
from pathalign.reward import RewardModel
from pathalign.settings.pretrain import PretrainConfig
from pathalign.stages import METHODS, load
from pathalign.trainers.adapter import load_inputs
from pathalign.trainers.ddpo import DDPOTrainer
from pathalign.trainers.dpo import DPOTrainer
from pathalign.trainers.draft import DraftTrainer
from pathalign.trainers.guarded import GuardedTrainer
from pathalign.trainers.pretrain import PretrainTrainer, new_pipeline
from pathalign.trainers.reward_weighted import RewardWeightedTrainer
from pathalign.workflow import recipe

CLOSED = 0.3
SEED = 3_000_000_000  # of the images that are measured: neither graded nor trained on
TRAINERS: dict[str, Any] = {
    "reward-weighted": RewardWeightedTrainer,
    "ddpo": DDPOTrainer,
    "grpo": DDPOTrainer,
    "draft": DraftTrainer,
    "dpo": DPOTrainer,
}
LONG = {"epochs": 10_000}  # time is what ends it: the learning rate is constant
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in TRAINERS} | {
    "ddpo": ("ddpo", LONG),
    "grpo": ("grpo", LONG),
    "ddpo-50-50": ("ddpo", LONG | {"inference_steps": 50, "train_steps": 0}),
}
CONTROL = "control"
PAIRS: dict[str, Any] = {"dpo": {"pairs": None}}  # of fresh images, ranked by the reward model


class OutOfTimeError(Exception):
    """The CPU time of a method is used up."""


class Stopwatch:
    """Measures the averaged adapter of a trainer whenever another `interval_s` of CPU time were spent on training."""

    def __init__(self, run: Path, images_per_class: int, interval_s: float, limit_s: float) -> None:
        self.judge = SimulatedGrader.load(run / "judge")
        self.reward_model = RewardModel.from_pretrained(run / "reward").eval()
        self.images_per_class, self.interval_s, self.limit_s = images_per_class, interval_s, limit_s
        self.spent_s, self.next_s = 0.0, interval_s
        self.points: list[dict[str, float]] = []

    def watch(self, trainer_class: Any) -> type:
        """A trainer like this one, whose units are timed; it raises `OutOfTimeError` at the limit."""
        stopwatch = self
        unit = "epoch" if issubclass(trainer_class, GuardedTrainer) else "step"  # without checks, which cost time too

        def timed(trainer: Any, number: int) -> Any:
            if not stopwatch.points:
                stopwatch.measure(trainer)
            began = time.process_time()
            figures = getattr(trainer_class, unit)(trainer, number)
            stopwatch.spent_s += time.process_time() - began
            if stopwatch.spent_s >= min(stopwatch.next_s, stopwatch.limit_s):
                stopwatch.next_s = stopwatch.spent_s + stopwatch.interval_s
                stopwatch.measure(trainer)
            if stopwatch.spent_s >= stopwatch.limit_s:
                raise OutOfTimeError
            return figures

        return type(trainer_class.__name__, (trainer_class,), {unit: timed})

    def measure(self, trainer: Any) -> None:
        """Share of plausible images and mean reward, the same seeds every time."""
        pipeline = trainer.pipeline
        names = pipeline.class_names
        class_ids = [index for index in range(len(names)) for _ in range(self.images_per_class)]
        usual = pipeline.scheduler
        set_scheduler(pipeline, "dpmsolver++")
        with averaged(trainer):
            images = torch.cat(
                [
                    sample(pipeline, class_ids[start : start + 50], range(SEED + start, SEED + start + 50), 10)
                    for start in range(0, len(class_ids), 50)
                ]
            )
        pipeline.scheduler = usual
        drawn = ImageSet.build(images, torch.tensor(class_ids), tuple(names))
        share = float(self.judge.judge_set(drawn).plausible.float().mean())
        reward = float(score(self.reward_model, images, class_ids, names).mean())
        self.points.append({"cpu_s": round(self.spent_s, 1), "judge_share": share, "reward": reward})
        print(json.dumps(self.points[-1]), flush=True)


@contextlib.contextmanager
def averaged(trainer: Any) -> Iterator[None]:
    """Context in which a trainer's pipeline draws with the averaged weights."""
    if not isinstance(trainer, PretrainTrainer):
        with trainer.weights_of(trainer.average):
            yield
        return
    parameters = list(trainer.pipeline.unet.parameters())
    trainer.ema.store(parameters)
    trainer.ema.copy_to(parameters)
    yield
    trainer.ema.restore(parameters)


def continue_pretraining(run: Path, stopwatch: Stopwatch, folder: Path) -> None:
    """The control of the demo on real cells."""
    settings = {"validate_every_steps": 10**6, **recipe("demo_real")["control"]}
    config = build(PretrainConfig, {"data": str(run / "data"), "initial_model": str(run / "base"), **settings})
    train, validation = (ImageSet.load(run / "data", split) for split in ("train", "validation"))
    pipeline = new_pipeline(config, train.image_size_px, train.class_names)
    stopwatch.watch(PretrainTrainer)(pipeline, train, validation, config, folder).train()


def align(run: Path, variant: str, stopwatch: Stopwatch, folder: Path) -> None:
    """A method of `pathalign align` without checks, which cost time too and change nothing here."""
    name, options = VARIANTS[variant]
    method = next(method for method in METHODS if method.name == name)
    inputs = {"base_model": str(run / "base"), "reward_model": str(run / "reward"), "data": str(run / "data")}
    unchecked = {} if name == "reward-weighted" else {"check_images_per_class": 2, "check_every_epochs": 10**6}
    config = build(load(method.settings), {**inputs, **unchecked, **options})
    stopwatch.watch(TRAINERS[name])(*load_inputs(config), config, folder, **PAIRS.get(name, {})).train()


def curve(run: Path, variant: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Measured points of one method on one run; kept beside the run."""
    kept = run / "time_to_reward" / f"{variant}.json"
    if kept.is_file():
        return list(json.loads(kept.read_text()))
    stopwatch = Stopwatch(run, arguments.images_per_class, arguments.interval_s, arguments.cpu_s)
    with TemporaryDirectory() as folder, contextlib.suppress(OutOfTimeError):
        if variant == CONTROL:
            continue_pretraining(run, stopwatch, Path(folder))
        else:
            align(run, variant, stopwatch, Path(folder))
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps(stopwatch.points))
    return stopwatch.points


def real_share(run: Path) -> float:
    """Share of unseen real images that the judge accepts."""
    real = ImageSet.load(run / "data", "test")
    return float(SimulatedGrader.load(run / "judge").judge_set(real).plausible.float().mean())


def time_to(points: list[dict[str, float]], wanted: float) -> float | None:
    """CPU seconds of the first point whose share is at least `wanted`; None if there is none."""
    return next((point["cpu_s"] for point in points if point["judge_share"] >= wanted), None)


def draw_curves(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Judge's share and reward against CPU time, a line for each run, a colour for each method."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, column in zip(axes, ("judge_share", "reward"), strict=True):
        for index, (variant, runs) in enumerate(curves.items()):
            for number, points in enumerate(runs):
                label = variant if number == 0 else None
                times, values = ([point[name] for point in points] for name in ("cpu_s", column))
                axis.plot(times, values, f"C{index}", marker=".", label=label)
        axis.set_xlabel("CPU seconds of training")
        axis.set_ylabel(column.replace("_", " "))
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--methods", nargs="+", choices=[*VARIANTS, CONTROL], default=[*VARIANTS, CONTROL])
    parser.add_argument("--cpu-s", type=float, default=900, help="CPU seconds of training for each method")
    parser.add_argument("--interval-s", type=float, default=30, help="CPU seconds between measurements")
    parser.add_argument("--images-per-class", type=int, default=60, help="images of each class in a measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in arguments.methods}
    times: dict[str, list[float | None]] = {name: [] for name in arguments.methods}
    for run in arguments.runs:
        real = real_share(run)
        for name in arguments.methods:
            print(f"{run.name}, {name}", flush=True)
            points = curve(run, name, arguments)
            curves[name].append(points)
            times[name].append(time_to(points, points[0]["judge_share"] * (1 - CLOSED) + CLOSED * real))
    draw_curves(curves, Path("time_to_reward.png"))
    medians = {
        name: statistics.median(math.inf if value is None else value for value in values)
        for name, values in times.items()
    }
    slow, fast = medians.get("ddpo-50-50", math.inf), medians.get("ddpo", math.inf)
    result = {
        "cpu_s": {name: None if math.isinf(value) else value for name, value in medians.items()},
        "time_to_reward_ratio": None if math.isinf(fast) else min(slow, arguments.cpu_s) / fast,
        "ratio_is_lower_bound": math.isinf(slow),
        "runs": times,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
