"""From figures of each arm and seed to a table: means, intervals over seeds, and differences seed by seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from pathalign.experiments.measures import CONFIDENCE, Figure
from pathalign.experiments.recipe import Experiment

FEWEST_SEEDS = 3
Figures = dict[str, dict[int, dict[str, Figure]]]  # arm -> seed -> name -> figure


@dataclass(frozen=True)
class Summary:
    """One figure of one arm.

    Attributes:
        mean: Over the seeds.
        interval: 95 %: of the mean over seeds, by Student's t; with one seed over its images, None if there is none.
        by_seed: Values in the order of the experiment's seeds.
        by_seed_interval: Interval of each over its images, None where there is none.
        n: Images behind each value, None where it is no share of images.
        difference: Mean of the differences from the arm that is compared with, seed by seed; None for that arm itself.
        difference_interval: 95 %, of that mean over seeds, by Student's t; None for less than three seeds.
    """

    mean: float
    interval: list[float] | None
    by_seed: list[float]
    by_seed_interval: list[list[float] | None]
    n: int | None
    difference: float | None
    difference_interval: list[float] | None

    @property
    def clear(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        interval = self.difference_interval
        return interval is not None and (interval[0] > 0 or interval[1] < 0)


def over_seeds(values: Sequence[float]) -> list[float] | None:
    """95 % interval of a mean over seeds, by Student's t; None for less than `FEWEST_SEEDS`: it would say nothing."""
    if len(values) < FEWEST_SEEDS:
        return None
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return [float(np.mean(values) - reach), float(np.mean(values) + reach)]


def summarize(experiment: Experiment, figures: Figures) -> dict[str, dict[str, Summary]]:
    """Arm -> name -> summary, of every figure that the arm has with all seeds."""
    return {
        arm.name: {
            name: _summary(experiment, figures, arm.name, name)
            for name in figures[arm.name][experiment.seeds[0]]
            if all(name in figures[arm.name][seed] for seed in experiment.seeds)
        }
        for arm in experiment.arms
    }


def _summary(experiment: Experiment, figures: Figures, arm: str, name: str) -> Summary:
    found = [figures[arm][seed][name] for seed in experiment.seeds]
    values = [figure.value for figure in found]
    other = [figures[experiment.against][seed].get(name) for seed in experiment.seeds]
    differences = [value - figure.value for value, figure in zip(values, other, strict=True) if figure is not None]
    compared = arm != experiment.against and len(differences) == len(values)
    return Summary(
        mean=float(np.mean(values)),
        interval=over_seeds(values) if len(values) > 1 else found[0].interval,
        by_seed=values,
        by_seed_interval=[figure.interval for figure in found],
        n=found[0].n,
        difference=float(np.mean(differences)) if compared else None,
        difference_interval=over_seeds(differences) if compared else None,
    )


def as_json(experiment: Experiment, figures: Figures, summaries: dict[str, dict[str, Summary]]) -> dict[str, Any]:
    """Everything that `results.json` holds besides the origin."""
    return {
        "title": experiment.title,
        "question": experiment.question,
        "seeds": list(experiment.seeds),
        "against": experiment.against,
        "show": list(experiment.show),
        "confidence": CONFIDENCE,
        "arms": {
            arm.name: {
                "title": arm.title,
                "settings": arm.settings,
                "set": arm.set,
                "summary": {name: asdict(summary) for name, summary in summaries[arm.name].items()},
                "by_seed": {
                    str(seed): {name: asdict(figure) for name, figure in figures[arm.name][seed].items()}
                    for seed in experiment.seeds
                },
            }
            for arm in experiment.arms
        },
    }
