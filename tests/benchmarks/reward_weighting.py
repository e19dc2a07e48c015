"""Which weighting of rewards helps, by the judge: aligns the base model of a finished run with each of them.

    python tests/benchmarks/reward_weighting.py runs/demo --set learning_rate=1e-3

Needs the run directory of `pathalign demo` or `pathalign run`. Weightings that are finished are kept, so that the same
command goes on after an interruption. Prints one JSON object: for each weighting the judge's and the grader's plausible
share and the mean reward of fresh samples, all with the same seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import get_args, get_type_hints

from pathalign.config import build, parse_overrides
from pathalign.generate import generate, score
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet
from pathalign.reward import RewardModel
from pathalign.settings.generate import GenerateConfig
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.trainers.reward_weighted import align


def measure(run: Path, samples: ImageSet) -> dict[str, float]:
    """Shares and mean reward of one set of samples."""
    reward_model = RewardModel.from_pretrained(run / "reward")
    rewards = score(reward_model, samples.images, samples.class_ids.tolist(), samples.class_names)
    shares = {
        f"{name}_share": SimulatedGrader.load(run / name).judge_set(samples).plausible.float().mean().item()
        for name in ("judge", "grader")
    }
    return {**shares, "mean_reward": rewards.mean().item(), "n": len(samples)}


def main() -> None:
    weightings = get_args(get_type_hints(RewardWeightedConfig)["weighting"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--weightings", nargs="+", choices=weightings, default=list(weightings))
    parser.add_argument("--images-per-class", type=int, default=60)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of `align`")
    arguments = parser.parse_args()
    run: Path = arguments.run
    results = {"base": measure(run, ImageSet.load(run / "samples_before").first_per_class(arguments.images_per_class))}
    for weighting in arguments.weightings:
        folder = run / "weightings" / weighting
        inputs = {"base_model": str(run / "base"), "reward_model": str(run / "reward"), "data": str(run / "data")}
        config = build(RewardWeightedConfig, {**inputs, "weighting": weighting, **parse_overrides(arguments.set)})
        if not folder.is_dir():
            align(config, folder)
        samples = folder.with_name(f"samples_{weighting}")
        if not samples.is_dir():
            options = {"images_per_class": arguments.images_per_class, "seed": 0}
            generate(GenerateConfig(model=str(run / "base"), adapter=str(folder), **options), samples)
        results[weighting] = measure(run, ImageSet.load(samples))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
