"""What the report says about single images: the rewards of each criterion, and where the reward model looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from pathalign.evaluate import alignment
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, explain
from pathalign.reward.explanation import overlay

EXTREME_SAMPLES = 6
CHANGED_PAIRS = 3
LEAST_OF_A_KIND = 10  # images that met, and that failed a criterion: of fewer a ROC AUC is mostly chance


@dataclass(frozen=True)
class Chosen:
    """Rows that the report looks at closely, by reward: of `after`, and of pairs of the same seed."""

    lowest: list[int]
    highest: list[int]
    risen: list[int]
    fallen: list[int]

    @classmethod
    def by_reward(cls, before: np.ndarray, after: np.ndarray) -> Chosen:
        """The extremes of the rewards after, and of their change; both of shape `(n,)`, row i the same seed."""
        order, change = np.argsort(after, kind="stable"), after - before
        moved = np.argsort(change, kind="stable")
        return cls(
            lowest=order[:EXTREME_SAMPLES].tolist(),
            highest=order[::-1][:EXTREME_SAMPLES].tolist(),
            risen=[int(row) for row in moved[::-1][:CHANGED_PAIRS] if change[row] > 0],
            fallen=[int(row) for row in moved[:CHANGED_PAIRS] if change[row] < 0],
        )

    def rows(self, name: str) -> list[int]:
        """All rows of the set `before` or `after` that are shown, each once."""
        pairs = {*self.risen, *self.fallen}
        return sorted(pairs if name == "before" else pairs | {*self.lowest, *self.highest})


@dataclass(frozen=True)
class CloseLook:
    """The reward model's part of the report; empty without one.

    Attributes:
        chosen: Rows that are looked at closely; None without a reward model.
        criteria: Names of the reward model's criteria.
        criteria_rewards: Set name -> shape `(n, len(criteria))`, in 0..1.
        overlays: Set name -> row -> PNG of the image in grey with its map over it, all maps on one scale.
    """

    chosen: Chosen | None = None
    criteria: tuple[str, ...] = ()
    criteria_rewards: dict[str, np.ndarray] = field(default_factory=dict)
    overlays: dict[str, dict[int, bytes]] = field(default_factory=dict)


def look_closely(
    model: RewardModel, sets: dict[str, ImageSet], rewards: dict[str, np.ndarray], criteria: dict[str, np.ndarray]
) -> CloseLook:
    """Choose images by reward and find out where the reward model looks in them.

    Args:
        model: The reward model.
        sets: Images by set name; `before` and `after` pair up row by row.
        rewards: Rewards of each set, shape `(n,)`.
        criteria: Rewards of the criteria of each set, shape `(n, criteria)`.
    """
    chosen = Chosen.by_reward(rewards["before"], rewards["after"])
    shown = [(name, row) for name in ("before", "after") for row in chosen.rows(name)]
    pictures = [sets[name].images[row].permute(1, 2, 0).numpy() for name, row in shown]
    found = explain(model, pictures, [sets[name].labels()[row] for name, row in shown])
    overlays: dict[str, dict[int, bytes]] = {"before": {}, "after": {}}
    for (name, row), picture, saliency in zip(shown, pictures, found.saliency, strict=True):
        overlays[name][row] = overlay(picture, saliency, found.scale)
    return CloseLook(chosen, found.criteria, criteria, overlays)


def criterion_metrics(
    criteria: tuple[str, ...], rewards: np.ndarray, samples: int, confidence: float, seed: int
) -> dict[str, Any]:
    """Mean reward of each criterion over a set, shape `(n, criteria)`, with its bootstrap interval."""
    if not criteria:
        return {}
    draws = alignment.resampled_means(list(rewards.T), samples, np.random.default_rng(seed))
    return {
        name: {
            "n": len(rewards),
            "mean_reward": float(rewards[:, column].mean()),
            "mean_reward_ci": alignment.percentile_interval(draws[column], confidence),
        }
        for column, name in enumerate(criteria)
    }


def criterion_skill(criteria: tuple[str, ...], rewards: np.ndarray, feedback: ImageSet) -> dict[str, Any]:
    """How well each criterion's reward tells images that met it from images that failed it, on held-out grades.

    Args:
        criteria: Their names.
        rewards: Shape `(n, criteria)`.
        feedback: The same images with the columns `failed_...`, shares of graders or None.

    Returns:
        For each criterion that was graded: `n`, `n_failed`, and `roc_auc`, None where fewer than 10 met or failed it.
    """
    measured = {}
    for column, name in enumerate(criteria):
        shares = [
            (row, share) for row, share in enumerate(feedback.columns.get(f"failed_{name}", [])) if share is not None
        ]
        decided = [(row, share < 0.5) for row, share in shares if share != 0.5]
        met = np.array([verdict for _, verdict in decided], bool)
        enough = min(met.sum(), (~met).sum()) >= LEAST_OF_A_KIND
        scores = rewards[[row for row, _ in decided], column]
        measured[name] = {
            "n": len(met),
            "n_failed": int((~met).sum()),
            "roc_auc": float(roc_auc_score(met, scores)) if enough else None,
        }
    return measured
