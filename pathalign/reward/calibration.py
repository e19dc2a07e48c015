"""How far rewards can be believed: temperature, and the figures of `evaluation.json`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_expit
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

Floats = NDArray[np.float64]
CALIBRATION_BINS = 15
BOOTSTRAP_SAMPLES = 1000


def negative_log_likelihood(logits: Floats, labels: Floats, temperature: float = 1.0) -> float:
    """Mean cross-entropy of `sigmoid(logits / temperature)` with labels in 0..1; both of shape `(n,)`."""
    scaled = logits / temperature
    return float(-np.mean(labels * log_expit(scaled) + (1 - labels) * log_expit(-scaled)))


def fit_temperature(logits: Floats, labels: Floats) -> float:
    """Temperature between 0.05 and 20 with the least negative log-likelihood; shapes `(n,)`, labels in 0..1.

    Source: Guo et al., arXiv:1706.04599, section 4.2.
    """
    result = minimize_scalar(
        lambda inverse: negative_log_likelihood(logits, labels, 1 / inverse), bounds=(1 / 20, 20), method="bounded"
    )
    return float(1 / result.x)


def calibration_curve(rewards: Floats, verdicts: Floats, bins: int = CALIBRATION_BINS) -> list[dict[str, float]]:
    """Bins of equal width over 0..1 that hold any image: `low`, `high`, `n`, `mean_reward`, `plausible_share`."""
    index = np.minimum((rewards * bins).astype(int), bins - 1)
    return [
        {
            "low": number / bins,
            "high": (number + 1) / bins,
            "n": int(held.sum()),
            "mean_reward": float(rewards[held].mean()),
            "plausible_share": float(verdicts[held].mean()),
        }
        for number in range(bins)
        if (held := index == number).any()
    ]


def expected_calibration_error(rewards: Floats, verdicts: Floats, bins: int = CALIBRATION_BINS) -> float:
    """Mean distance of reward and plausible share over the bins, weighted by images (arXiv:1706.04599, eq. 3)."""
    curve = calibration_curve(rewards, verdicts, bins)
    return sum(row["n"] * abs(row["mean_reward"] - row["plausible_share"]) for row in curve) / len(rewards)


def roc_auc_interval(rewards: Floats, verdicts: Floats, seed: int) -> list[float]:
    """95 % bootstrap interval of the ROC AUC, plausible and implausible images resampled apart."""
    generator = np.random.default_rng(seed)
    positive, negative = rewards[verdicts == 1], rewards[verdicts == 0]
    drawn = np.concatenate(
        [generator.choice(group, (BOOTSTRAP_SAMPLES, len(group))) for group in (positive, negative)], axis=1
    )
    # Mann-Whitney: the AUC is the rank sum of the positives less its minimum, as a share of all pairs.
    count = len(positive)
    rank_sums = rankdata(drawn, axis=1)[:, :count].sum(axis=1)
    areas = (rank_sums - count * (count + 1) / 2) / (count * len(negative))
    low, high = np.quantile(areas, [0.025, 0.975])
    return [float(low), float(high)]


def figures(rewards: Floats, verdicts: Floats, seed: int = 0) -> dict[str, Any]:
    """Quality of rewards `(n,)` in 0..1 against hard verdicts `(n,)` of 0 and 1; None where it is not defined."""
    both = len(np.unique(verdicts)) == 2
    return {
        "n": len(rewards),
        "n_plausible": int(verdicts.sum()),
        "roc_auc": float(roc_auc_score(verdicts, rewards)) if both else None,
        "roc_auc_ci": roc_auc_interval(rewards, verdicts, seed) if both else None,
        "average_precision": float(average_precision_score(verdicts, rewards)) if both else None,
        "brier": float(brier_score_loss(verdicts, rewards, pos_label=1)) if len(rewards) else None,
        "ece": expected_calibration_error(rewards, verdicts) if len(rewards) else None,
    }


def evaluation(
    rewards: Floats, plausible: Floats, class_ids: NDArray[np.int64], class_names: list[str], seed: int
) -> dict[str, Any]:
    """Figures against the majority verdict, overall and for each class; images without a majority are only counted.

    Args:
        rewards: Shape `(n,)`, in 0..1.
        plausible: Shape `(n,)`, share of graders that called the image plausible.
        class_ids: Shape `(n,)`, positions in `class_names`.
        class_names: All classes.
        seed: Of the bootstrap.

    Returns:
        What `evaluation.json` holds: `overall`, `per_class`, `calibration_curve`, `n_ties`.
    """
    decided = plausible != 0.5
    rewards, verdicts, class_ids = rewards[decided], (plausible[decided] > 0.5).astype(float), class_ids[decided]
    return {
        "overall": figures(rewards, verdicts, seed),
        "per_class": {
            name: figures(rewards[class_ids == class_id], verdicts[class_ids == class_id], seed)
            for class_id, name in enumerate(class_names)
        },
        "calibration_curve": calibration_curve(rewards, verdicts),
        "n_ties": int((~decided).sum()),
    }
