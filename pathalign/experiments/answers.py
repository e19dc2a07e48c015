"""What an experiment found, in words: what its figures are called, and a sentence for each arm and figure."""

from __future__ import annotations

import numpy as np

from pathalign.evaluate.page import interval_text, number, percent, points
from pathalign.evaluate.report import ROWS
from pathalign.experiments.measures import CONFIDENCE
from pathalign.experiments.recipe import Experiment
from pathalign.experiments.results import Summary

# What the table calls the figures that no evaluation has, and whether they are shares.
TITLES = {
    "roc_auc_by_grader": ("ROC AUC (faultless grader)", False),
    "roc_auc_by_judge": ("ROC AUC (judge)", False),
    "reward_roc_auc": ("ROC AUC of the reward model", False),
    "judge_first": ("Judge before training", True),
    "judge_last": ("Judge at the end", True),
    "judge_kept": ("Judge, of what is kept", True),
    "judge_best": ("Judge, at its best", True),
    "judge_kept_less_best": ("Judge, what is kept less its best", True),
    "reward_first": ("Reward before training", False),
    "reward_last": ("Reward at the end", False),
    "kept_epoch": ("Epoch that is kept", False),
    "best_epoch": ("Epoch of the judge's best", False),
    "epochs": ("Epochs", False),
    "subtype_right": ("Right subtype", True),
    "concepts_plausible": ("Plausible (judge), new classes", True),
    "subtype_judge_on_real": ("Subtype judge on unseen real cells", True),
    "subtype_judge_balanced": ("the same, mean over subtypes", True),
    "marks": ("Marks", False),
    "class_recall": ("Cells of the class that are found", True),
    "f1": ("F1", True),
    "accuracy": ("Accuracy, all classes", True),
}
Summaries = dict[str, dict[str, Summary]]


def title_of(name: str) -> tuple[str, bool]:
    """What readers call a figure, and whether it is a share, shown in percent."""
    if name in TITLES:
        return TITLES[name]
    figure, _, part = name.partition(" of ")
    if part and figure in TITLES:
        return f"{TITLES[figure][0]}: {part}", TITLES[figure][1]
    row = next((row for row in ROWS if row.key == name), None)
    return (row.title, row.kind == "share") if row else (name.replace("_", " "), "share" in name)


def text(value: float, share: bool, sign: bool = False) -> str:
    """A share in percent, or a number."""
    if share:
        return points(value) if sign else percent(value)
    return f"{value:+.3f}" if sign else str(int(value)) if value == int(value) else number(value)


def possible(interval: list[float], share: bool) -> list[float]:
    """A share's interval without what lies beyond 0 to 100 %, as Student's t does not know; of a loss, -100 to 0 %."""
    if not share:
        return interval
    limits = (0, 1) if sum(interval) >= 0 else (-1, 0)
    clipped: list[float] = np.clip(interval, *limits).tolist()
    return clipped


def span(interval: list[float] | None, share: bool, difference: bool = False) -> str:
    """`low to high`, or nothing."""
    if interval and not difference:
        interval = possible(interval, share)
    return interval_text(interval, 100 if share else 1)


def answers(experiment: Experiment, summaries: Summaries) -> list[str]:
    """One sentence for each arm that is compared: how far its first figure lies from the one compared with."""
    name = experiment.show[0]
    title, share = title_of(name)
    other = experiment.arm(experiment.against)
    found = []
    for arm in experiment.arms:
        summary = summaries[arm.name].get(name)
        if summary is None or arm is other:
            continue
        if summary.difference is None:
            within = f" ({span(summary.interval, share)})" if summary.interval else ""
            found.append(f"{arm.title}: {title.lower() if share else title} {text(summary.mean, share)}{within}.")
            continue
        unit = " points" if share else ""
        line = (
            f"{arm.title}: {title.lower() if share else title} {text(summary.mean, share)} against "
            f"{text(summaries[other.name][name].mean, share)} of {other.title!r}, "
            f"{text(summary.difference, share, sign=True)}{unit}"
        )
        if summary.difference_interval is None:
            pairs = zip(summary.by_seed, summaries[other.name][name].by_seed, strict=True)
            each = " and ".join(text(value - base, share, sign=True) for value, base in pairs)
            several = f"{each}, " if len(summary.by_seed) > 1 else ""
            line += f" ({_count(experiment)}: {several}too few for an interval)."
        else:
            verdict = "" if summary.clear else ", which may be chance"
            within = span(summary.difference_interval, share, difference=True)
            line += f" ({100 * CONFIDENCE:.0f} % over seeds: {within}{verdict})."
        found.append(line)
    return found


def other_answers(experiment: Experiment, summaries: Summaries) -> list[str]:
    """One sentence for each further figure: which arms are clearly above or below the one compared with, which not."""
    found = []
    for name in experiment.show[1:]:
        title, share = title_of(name)
        kinds: dict[str, list[str]] = {"clearly higher": [], "clearly lower": [], "may be chance": []}
        for arm in experiment.arms:
            summary = summaries[arm.name].get(name)
            if summary and summary.difference is not None and summary.difference_interval:
                side = "clearly higher" if summary.difference > 0 else "clearly lower"
                said = f"{arm.title} ({text(summary.difference, share, sign=True)})"
                kinds[side if summary.clear else "may be chance"].append(said)
        if any(kinds.values()):
            parts = "; ".join(f"{kind}: {', '.join(arms)}" for kind, arms in kinds.items() if arms)
            found.append(f"{title} against {experiment.arm(experiment.against).title!r}: {parts}.")
    return found


def _count(experiment: Experiment) -> str:
    count = len(experiment.seeds)
    return "one seed" if count == 1 else f"{count} seeds"
