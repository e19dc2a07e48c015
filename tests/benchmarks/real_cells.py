"""The README's figures on real cells: the whole demo, once for each seed.

    python tests/benchmarks/real_cells.py --data DIR_OR_HUB_ID --output-dir runs/real_cells --seeds 0 1 2

About a quarter of an hour on two cores for each seed; what is finished is not run again: with `--method ddpo` in a copy
of the output directory, base model, graders and control stay as they are. Prints one line for each seed and, last, one
JSON object with the shares, gains and costs of all of them. Every verdict is a simulated judge's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SETS = ("before", "after", "control", "best_of_n", "real")
SHOWN = ("plausible_share", "recall", "coverage", "precision", "density", "no_near_copy", "grader_judge_kappa")
COMPARED = ("plausible_gain", "plausible_gain_ci", "gain_over_control", "gain_over_control_ci")


def demo(data: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """What `pathalign demo --json` prints."""
    command = [sys.executable, "-m", "pathalign.cli", "demo", "--data", data, "--method", method]
    command += ["--seed", str(seed), "--json"]
    output = subprocess.run([*command, "--output-dir", str(folder)], check=True, stdout=subprocess.PIPE).stdout
    return dict(json.loads(output))


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """What the README quotes of one run."""
    sets = {name: {key: result["metrics"][name].get(key) for key in SHOWN} for name in SETS}
    reward = {key: result["reward"][key] for key in ("roc_auc", "ece")}
    steps = json.loads((Path(result["report"]).parents[1] / "stages.json").read_text())["steps"]
    return {
        **{key: result[key] for key in (*COMPARED, "gap_closed", "gap_closed_ci", "reward_hacking", "peak_rss_mb")},
        "n": result["metrics"]["before"]["n"],
        "wall_s": sum(step["wall_s"] for step in steps.values()),
        "reward": reward,
        "sets": sets,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--method", default="reward-weighted", help="of `pathalign align`")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real_cells"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    found = {}
    for seed in arguments.seeds:
        found[seed] = figures(demo(arguments.data, arguments.method, seed, arguments.output_dir / f"seed-{seed}"))
        shares = ", ".join(f"{name} {found[seed]['sets'][name]['plausible_share']:.1%}" for name in SETS)
        print(f"seed {seed}: {shares}; gap closed {found[seed]['gap_closed']:.1%}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
