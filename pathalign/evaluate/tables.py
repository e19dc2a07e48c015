"""The tables of the report, row by row."""

from __future__ import annotations

from typing import Any

from pathalign.evaluate.explained import LEAST_OF_A_KIND
from pathalign.evaluate.figures import CURVES, SET_TITLES
from pathalign.evaluate.page import (
    NOT_MEASURED,
    Cell,
    Table,
    TableRow,
    interval_text,
    measured_cell,
    number,
    percent,
    points,
)

VERDICTS = {
    "clear": Cell("▼ clear"),
    "chance": Cell("may be chance"),
    "open": Cell("may be chance or not", "the interval takes the images as given"),
    "no interval": Cell("no interval"),
}


def worse(metrics: dict[str, Any]) -> Table:
    """Every figure that is worse after than before."""
    rows = [
        TableRow(
            row["name"],
            (
                Cell(number(row["before"])),
                Cell(number(row["after"])),
                Cell(f"{row['difference']:+.3f}", interval_text(row["interval"])),
                VERDICTS[row["verdict"]],
            ),
        )
        for row in metrics["worse"]
    ]
    level = percent(metrics["confidence"], 0)
    caption = (
        f"Every figure that is worse after than before. “Clear”: the paired {level} interval excludes 0. An interval "
        "that takes the images as given is too narrow to say so; without an interval, look how far apart the sets are "
        "in the table of all metrics."
    )
    return Table(caption, ("Figure", "Before", "After", "Change", "Verdict"), rows, text_columns=(4,))


def gains(metrics: dict[str, Any], titles: dict[str, str]) -> Table | None:
    """What changed from before and from the control to after, with paired intervals; None where that was not measured.

    Args:
        metrics: Content of `metrics.json`; `gains` and `gains_over_control` hold `gain` and `ci` by metric.
        titles: Key of a metric that is a share -> its title.
    """
    over = {name: metrics.get(name) or {} for name in ("gains", "gains_over_control")}
    rows = [
        TableRow(title, [_points(found.get(key)) for found in over.values()])
        for key, title in titles.items()
        if any(key in found for found in over.values())
    ]
    caption = (
        f"Change in percentage points, with the {percent(metrics['confidence'], 0)} interval over pairs: of the same "
        "real image for recall, coverage and usefulness, of the same seed for all others. An interval that holds 0 "
        "leaves open whether anything changed; those over real images take the generated ones as given and are too "
        "narrow."
    )
    return Table(caption, ("Metric", "After less before", "After less control"), rows) if rows else None


def _points(entry: dict[str, Any] | None) -> Cell:
    return Cell(NOT_MEASURED) if entry is None else Cell(points(entry["gain"]), interval_text(entry["ci"], 100))


def classes(metrics: dict[str, Any]) -> Table:
    """The judge's plausible share of each class in every set."""
    return _grouped(metrics, "per_class", "plausible_share", "Class", "Share judged plausible in each class")


def criteria(metrics: dict[str, Any]) -> Table:
    """Share that fails each of the judge's criteria in every set."""
    return _grouped(
        metrics, "per_criterion", "failed_share", "Criterion", "Share that fails each criterion of the judge", "lower"
    )


def eyes(metrics: dict[str, Any]) -> Table | None:
    """Each criterion in the eyes of the reward model and of the judge, before and after; None without its rewards."""
    before, after = (metrics["metrics"][name] for name in ("before", "after"))
    if not before.get("per_criterion_reward"):
        return None
    names = list(dict.fromkeys([*before["per_criterion_reward"], *before["per_criterion"]]))
    rows = [
        TableRow(
            name.replace("_", " "),
            [
                *(
                    measured_cell(values["per_criterion_reward"].get(name), "mean_reward", "mean_reward_ci")
                    for values in (before, after)
                ),
                *(_met(values["per_criterion"].get(name)) for values in (before, after)),
            ],
        )
        for name in names
    ]
    caption = (
        f"Mean reward of each criterion, and the share that meets it by the judge (both: higher is better), with "
        f"{percent(metrics['confidence'], 0)} intervals. A criterion that only one of them has is not measured by the "
        "other."
    )
    return Table(caption, ("Criterion", "Reward before", "Reward after", "Judge before", "Judge after"), rows)


def _met(entry: dict[str, Any] | None) -> Cell:
    """The share that meets a criterion, from the share that fails it."""
    if entry is None:
        return measured_cell(None, "met")
    low, high = entry["failed_share_ci"]
    met = {"met": 1 - entry["failed_share"], "interval": [1 - high, 1 - low], "n": entry["n"]}
    return measured_cell(met, "met", "interval", share=True)


def skill(metrics: dict[str, Any]) -> Table | None:
    """How well the rewards of the criteria tell right from wrong on held-out grades; None if that was not measured."""
    measured = metrics.get("criterion_skill")
    if not measured:
        return None
    rows = [
        TableRow(
            name.replace("_", " "), [measured_cell(entry, key, count=None) for key in ("roc_auc", "n_failed", "n")]
        )
        for name, entry in measured.items()
    ]
    caption = (
        "The rewards of the criteria on held-out grades. ROC AUC: of an image that met the criterion and one that "
        "failed it, how often the first has the higher reward; 0.5 is a coin, 1 always. Not measured where fewer than "
        f"{LEAST_OF_A_KIND} images failed it, or met it."
    )
    return Table(caption, ("Criterion", "ROC AUC", "Failed", "Graded"), rows)


def _grouped(metrics: dict[str, Any], group: str, key: str, heading: str, text: str, better: str = "higher") -> Table:
    sets = metrics["metrics"]
    rows = [
        TableRow(
            label.replace("_", " ") if group == "per_criterion" else label,
            [
                measured_cell(((sets.get(name) or {}).get(group) or {}).get(label), key, f"{key}_ci", share=True)
                for name in SET_TITLES
            ],
        )
        for label in sets["before"][group]
    ]
    caption = f"{text} ({better} is better), with {percent(metrics['confidence'], 0)} intervals."
    return Table(caption, (heading, *SET_TITLES.values()), rows)


def reward_model(metrics: dict[str, Any]) -> Table | None:
    """What the reward stage measured on held-out grades; None if there is nothing."""
    measured = metrics["reward"]
    names = sorted(name for name, value in measured.items() if isinstance(value, int | float))
    rows = [TableRow(name, [measured_cell(measured, name, f"{name}_ci", count=None)]) for name in names]
    caption = "The reward model on held-out grades, with the 95 % interval of ROC AUC."
    return Table(caption, ("Figure", "Value"), rows) if rows else None


def checks(training: dict[str, Any]) -> Table:
    """The figures of each check of the adapter's training."""
    rows = [
        TableRow(str(check["epoch"]), [measured_cell(check, name, count=None) for name in CURVES])
        for check in training["checks"]
    ]
    caption = f"Checks of the training, n = {training['n_check_images']} each."
    return Table(caption, ("Epoch", *(title for title, *_ in CURVES.values())), rows)
