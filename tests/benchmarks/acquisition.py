"""What each grade is worth: ROC AUC of the reward model against the number of grades, by acquisition strategy.

    python tests/benchmarks/acquisition.py runs/real_cells/seed-0 runs/real_cells/seed-1

Reads `feedback` and `data` of each run directory and writes below `--work`; what is finished is not done again, so that
other settings need another `--work`. A run's seed is its place among the arguments, from 0.

For each strategy acquisition is replayed once, up to the largest budget below 1, and smaller budgets are its beginning.
Every reward model has one network, the same number of steps and the validation images of its budget, and is measured
on the test split of the feedback, which no strategy sees. About six CPU minutes a run directory. Prints one line for
each reward model and, last, one JSON object with the values of each seed and their means.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pathalign.artefacts import write_atomically
from pathalign.grading.acquisition import RANDOM, STRATEGIES
from pathalign.settings.reward import RewardConfig
from pathalign.settings.select import SelectConfig
from pathalign.trainers.reward import train_reward
from pathalign.trainers.selection import (
    Acquisition,
    GradedPool,
    acquire,
    budget_counts,
    write_selection,
)

BUDGETS = (0.05, 0.1, 0.25, 0.5, 1.0)


def orders(run: Path, strategy: str, work: Path, seed: int, members: int, steps: int) -> tuple[GradedPool, Acquisition]:
    """The pool of a run, and the order in which a strategy grades it, up to the largest budget that leaves a choice."""
    config = SelectConfig(
        feedback=str(run / "feedback"),
        data=str(run / "data"),
        strategy=strategy,
        budget=1.0 if strategy == RANDOM else max(budget for budget in BUDGETS if budget < 1),
        scout_members=members,
        scout_steps=steps,
        seed=seed,
    )
    pool = GradedPool.load(config)
    return pool, acquire(config, pool, budget_counts(config.budget, len(pool.train), len(pool.validation)), work)


def measured(
    pool: GradedPool, order: Acquisition, budget: float, strategy: str, run: Path, folder: Path, steps: int, seed: int
) -> dict[str, Any]:
    """Figures of the reward model that a budget of an order trains."""
    done = folder / "figures.json"
    if not done.is_file():
        n_train, n_validation = budget_counts(budget, len(pool.train), len(pool.validation))
        part = replace(order, train=order.train[:n_train], validation=order.validation[:n_validation],
                       rounds=order.rounds[:n_train], bits=order.bits[:n_train])  # fmt: skip
        write_selection(pool, part, folder / "selection", strategy)
        config = RewardConfig(
            feedback=str(folder / "selection"),
            data=str(run / "data"),
            max_steps=steps,
            patience_epochs=steps,
            seed=seed,
        )
        metrics = train_reward(config, folder / "reward").metrics
        found = {"n_grades": n_train + n_validation, "roc_auc": metrics["roc_auc"], "brier": metrics["brier"]}
        write_atomically(done, json.dumps(found))
    return dict(json.loads(done.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="Run directories with `feedback` and `data`.")
    parser.add_argument("--work", type=Path, default=Path("runs/acquisition"))
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--steps", type=int, default=200, help="Optimizer steps of each reward model.")
    parser.add_argument("--scout-steps", type=int, default=100)
    parser.add_argument("--scout-members", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for seed, run in enumerate(arguments.runs):
        seeds[run.name] = {}
        for strategy in arguments.strategies:
            work = arguments.work / run.name
            scouts = (arguments.scout_members, arguments.scout_steps)
            pool, order = orders(run, strategy, work / "scouts", seed, *scouts)
            found = seeds[run.name][strategy] = {}
            for budget in BUDGETS:
                # The beginning is random, and all is all, whatever the strategy.
                shared = budget in (BUDGETS[0], BUDGETS[-1])
                own = RANDOM if shared else strategy
                if shared and strategy != RANDOM:
                    if RANDOM in seeds[run.name]:
                        found[str(budget)] = seeds[run.name][RANDOM][str(budget)]
                    continue
                folder = work / f"{own}-{budget:g}"
                found[str(budget)] = measured(pool, order, budget, own, run, folder, arguments.steps, seed)
                print(run.name, strategy, budget, found[str(budget)], flush=True)
    print(json.dumps({"seeds": seeds, "mean_roc_auc": means(seeds)}, indent=1))


def means(seeds: dict[str, dict[str, dict[str, dict[str, Any]]]]) -> dict[str, dict[str, float]]:
    """Mean ROC AUC over the runs, by strategy and budget."""
    first = next(iter(seeds.values()))
    return {
        strategy: {
            budget: statistics.mean(seed[strategy][budget]["roc_auc"] for seed in seeds.values()) for budget in budgets
        }
        for strategy, budgets in first.items()
    }


if __name__ == "__main__":
    main()
