"""What the judge, the grader and the reward model say about a set of images, and what changed from before to after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor

from pathalign.grading.simulated import SimulatedGrader, class_ids_for
from pathalign.images import ImageSet

BATCH_SIZE = 128
WEIGHTS_AT_ONCE = 2**23  # of a bootstrap, 8 bytes each

Interval = list[float]


@dataclass(frozen=True)
class Verdicts:
    """A judge's answers on a whole set.

    Attributes:
        plausible: Shape `(n,)`, bool.
        criteria: Names of the criteria.
        failed: Shape `(n, len(criteria))`, bool.
    """

    plausible: np.ndarray
    criteria: tuple[str, ...]
    failed: np.ndarray


def ask(judge: SimulatedGrader, images: ImageSet) -> Verdicts:
    """Let `judge` look at all images; classes are matched by name."""
    answer = judge.judge(images.pixel_values(), class_ids_for(images, judge.class_names))
    return Verdicts(answer.plausible.numpy(), answer.criteria, answer.failed.numpy())


@torch.no_grad()
def rewards_of(
    rewards: Callable[[Tensor, Tensor], Tensor], class_names: Sequence[str], images: ImageSet, device: torch.device
) -> np.ndarray:
    """Rewards of all images, in batches on `device`. Shape `(n,)`, float64 in 0..1."""
    class_ids = class_ids_for(images, class_names)
    parts = [
        rewards(pixels.to(device), ids.to(device)).cpu()
        for pixels, ids in zip(images.pixel_values().split(BATCH_SIZE), class_ids.split(BATCH_SIZE), strict=True)
    ]
    return torch.cat(parts).double().numpy()


def wilson(successes: int, count: int, confidence: float) -> Interval:
    """Wilson score interval of a share. Source: Wilson 1927, by statsmodels."""
    low, high = proportion_confint(successes, count, alpha=1 - confidence, method="wilson")
    return [float(low), float(high)]


def share(values: np.ndarray, confidence: float, name: str) -> dict[str, Any]:
    """Share of true values of shape `(n,)`, n > 0, as `{name: share, name_ci: [low, high]}`."""
    return {name: float(values.mean()), f"{name}_ci": wilson(int(values.sum()), len(values), confidence)}


def judged_metrics(verdicts: Verdicts, images: ImageSet, confidence: float) -> dict[str, Any]:
    """Plausible share overall and per class, and the share that fails each criterion, with n and intervals."""
    count, ids = len(images), images.class_ids.numpy()
    overall = share(verdicts.plausible, confidence, "plausible_share")
    return {
        "n": count,
        "plausible_share": overall["plausible_share"],
        "plausible_ci": overall["plausible_share_ci"],
        "per_class": {
            name: {
                "n": int((ids == class_id).sum()),
                **share(verdicts.plausible[ids == class_id], confidence, "plausible_share"),
            }
            for class_id, name in enumerate(images.class_names)
            if (ids == class_id).any()
        },
        "per_criterion": {
            name: {"n": count, **share(verdicts.failed[:, column], confidence, "failed_share")}
            for column, name in enumerate(verdicts.criteria)
        },
    }


def kappa(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cohen's kappa of two verdicts of shape `(n,)`; None where both always say the same one thing."""
    if len(np.unique(np.concatenate([first, second]))) < 2:
        return None
    return float(cohen_kappa_score(first, second))


def resampled_means(columns: Sequence[np.ndarray], samples: int, rng: np.random.Generator) -> np.ndarray:
    """Bootstrap means of arrays of shape `(n,)` whose rows belong together. Shape `(len(columns), samples)`.

    Each resample takes the same rows from every column: images of one seed stay a pair.
    """
    count, values = len(columns[0]), np.stack(columns).astype(np.float64)
    means = np.empty((len(columns), samples))
    step = max(1, WEIGHTS_AT_ONCE // count)
    for first in range(0, samples, step):
        size = min(step, samples - first)
        weights = rng.multinomial(count, np.full(count, 1 / count), size=size) / count
        means[:, first : first + size] = values @ weights.T
    return means


def percentile_interval(draws: np.ndarray, confidence: float) -> Interval:
    """Percentile bootstrap interval of draws of shape `(samples,)`."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return [float(low), float(high)]


def paired_gain(
    before: np.ndarray, after: np.ndarray, samples: int, confidence: float, seed: int
) -> tuple[float, Interval]:
    """Mean of `after - before` over pairs, both of shape `(n,)`, with its percentile bootstrap interval over pairs."""
    return paired_gains({"gain": before}, {"gain": after}, samples, confidence, seed)["gain"]


def paired_gains(
    before: dict[str, np.ndarray], after: dict[str, np.ndarray], samples: int, confidence: float, seed: int
) -> dict[str, tuple[float, Interval]]:
    """`paired_gain` of every figure that both hold with as many values, figures of one length resampled together."""
    shared = [name for name in before if name in after and len(before[name]) == len(after[name])]
    found = {}
    for count in sorted({len(before[name]) for name in shared}):
        names = [name for name in shared if len(before[name]) == count]
        columns = [values[name] for values in (before, after) for name in names]
        draws = resampled_means(columns, samples, np.random.default_rng(seed))
        for row, name in enumerate(names):
            gain = float(after[name].mean() - before[name].mean())
            found[name] = gain, percentile_interval(draws[len(names) + row] - draws[row], confidence)
    return found


def gap_closed(
    before: np.ndarray, after: np.ndarray, real: np.ndarray, samples: int, confidence: float, seed: int
) -> tuple[float | None, Interval | None]:
    """Part of the distance between the base's and the real images' plausible share that alignment closed.

    Args:
        before: Verdicts, shape `(n,)`, bool; row i has the seed of row i of `after`.
        after: Verdicts, shape `(n,)`, bool.
        real: Verdicts on real images, shape `(m,)`, bool.
        samples: Number of resamples.
        confidence: Of the interval.
        seed: Of the resampling.

    Returns:
        (after - before) / (real - before), 1 being all of it, and its bootstrap interval over pairs and real images.
        Both are None where real images are not above the base; the interval is None where resampling leaves that open
        in more cases than the interval leaves out on one side.
    """
    gap = float(real.mean() - before.mean())
    if gap <= 0:
        return None, None
    rng = np.random.default_rng(seed)
    first, second = resampled_means([before, after], samples, rng)
    distances = rng.binomial(len(real), real.mean(), samples) / len(real) - first
    closed = float(after.mean() - before.mean()) / gap
    if (distances <= 0).mean() > (1 - confidence) / 2:
        return closed, None
    above = distances > 0
    return closed, percentile_interval((second - first)[above] / distances[above], confidence)


def reward_hacking(judge_gain: float, reward_gain: float | None, grader_gain: float | None) -> bool:
    """Whether what was optimized rises while the judge falls.

    Point estimates decide, not intervals: a warning that comes too early costs a look, one that is missing costs trust.

    Args:
        judge_gain: Change of the judge's plausible share.
        reward_gain: Change of the mean reward, None if not measured.
        grader_gain: Change of the grader's plausible share, None if not measured.
    """
    return judge_gain < 0 and any(gain is not None and gain > 0 for gain in (reward_gain, grader_gain))


def reliability(rewards: np.ndarray, plausible: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Calibration bins of equal width over 0..1: `n`, mean reward and mean plausibility of each that holds images.

    Args:
        rewards: Shape `(n,)`, in 0..1.
        plausible: Shape `(n,)`, graded plausibility in 0..1.
        bins: Number of bins, empty ones included.
    """
    numbers = np.minimum((rewards * bins).astype(int), bins - 1)
    return [
        {
            "n": int((numbers == number).sum()),
            "reward": float(rewards[numbers == number].mean()),
            "plausible": float(plausible[numbers == number].mean()),
        }
        for number in np.unique(numbers)
    ]


HIGHER_IS_BETTER = {  # authenticity is not among them: it falls as images come to lie among real ones
    "plausible_share": "plausible share",
    "grader_share": "grader's plausible share",
    "grader_judge_kappa": "agreement of grader and judge (kappa)",
    "mean_reward": "mean reward",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "alpha_precision": "alpha-precision",
    "beta_recall": "beta-recall",
    "no_near_copy": "share without near-copies",
    "utility_accuracy": "usefulness",
    "augment_accuracy": "usefulness beside real images",
}
LOWER_IS_BETTER = {"kid": "KID", "fid": "FID"}
HALF_IS_BEST = {"nearer_to_train": "share nearer to training than to held-out images (50 % is best)"}
IMAGES_AS_GIVEN = ("recall", "coverage", "utility_accuracy", "augment_accuracy", "utility_recall", "nearer_to_train")


def title_of(name: str) -> str:
    """What readers call a figure of `Quality.outcomes`, as in the table of what got worse."""
    key, of, label = name.partition(" of ")
    titles = {**HIGHER_IS_BETTER, **LOWER_IS_BETTER, **HALF_IS_BEST, "utility_recall": "usefulness"}
    return titles.get(key, key) + of + label


def what_got_worse(
    before: dict[str, Any], after: dict[str, Any], intervals: dict[str, Interval]
) -> list[dict[str, Any]]:
    """Every figure that is worse after than before, the gravest first.

    Args:
        before: Metrics of one set, as in metrics.json.
        after: The same of the other set.
        intervals: Name of a figure -> interval of its paired change, where there is one.

    Returns:
        Rows of `name`, `before`, `after`, `difference`, `interval` (or None), `verdict` and `notable`. The verdict is
        `clear` where the interval excludes 0, `chance` where it holds 0, and `no interval` where there is none.
        It is `open` where the interval excludes 0 but is too narrow: those of `IMAGES_AS_GIVEN` resample real images
        and take the generated ones as given, or the other way round; of equal generators one in seven seems to differ
        in recall or coverage. `notable` is true of the clear ones.
    """
    pairs = [
        (label, before.get(key), after.get(key), badness, key)
        for titles, badness in ((HIGHER_IS_BETTER, _too_low), (LOWER_IS_BETTER, float), (HALF_IS_BEST, _off_half))
        for key, label in titles.items()
    ]
    for group, key, text, badness in (
        ("per_class", "plausible_share", "plausible share of", _too_low),
        ("per_class", "utility_recall", "usefulness of", _too_low),
        ("per_criterion", "failed_share", "share failing", float),
    ):
        pairs += [
            (f"{text} {name}", entry.get(key), after[group][name].get(key), badness, key)
            for name, entry in before[group].items()
            if name in after[group]
        ]
    rows = []
    for label, old, new, badness, key in pairs:
        if old is None or new is None or badness(new) <= badness(old):
            continue
        interval = intervals.get(label)
        verdict = _verdict(interval, key in IMAGES_AS_GIVEN)
        rows.append(
            {
                "name": label,
                "before": old,
                "after": new,
                "difference": new - old,
                "interval": interval,
                "verdict": verdict,
                "notable": verdict == "clear",
            }
        )
    return sorted(rows, key=lambda row: (not row["notable"], -abs(row["difference"])))


def _verdict(interval: Interval | None, images_as_given: bool) -> str:
    if interval is None:
        return "no interval"
    if interval[0] <= 0 <= interval[1]:
        return "chance"
    return "open" if images_as_given else "clear"


def _too_low(value: float) -> float:
    return -value


def _off_half(value: float) -> float:
    return abs(value - 0.5)
