"""The tables of the report, row by row."""

from __future__ import annotations

from typing import Any

from pathalign.evaluate.figures import CURVES, SET_TITLES
from pathalign.evaluate.page import (
    Cell,
    Table,
    TableRow,
    interval_text,
    measured_cell,
    number,
    percent,
)


def worse(metrics: dict[str, Any]) -> Table:
    """Every figure that is worse after than before."""
    rows = [
        TableRow(
            row["name"],
            (
                Cell(number(row["before"])),
                Cell(number(row["after"])),
                Cell(f"{row['difference']:+.3f}", interval_text(row["interval"])),
                Cell("▼ clear" if row["notable"] else "may be chance"),
            ),
        )
        for row in metrics["worse"]
    ]
    level = percent(metrics["confidence"], 0)
    caption = (
        f"Every figure that is worse after than before. “Clear”: the paired {level} interval excludes "
        "0, or, where there is none, the loss exceeds 5 points (5 % for distances). The rest may be chance."
    )
    return Table(caption, ("Figure", "Before", "After", "Change", "Verdict"), rows, text_columns=(4,))


def classes(metrics: dict[str, Any]) -> Table:
    """The judge's plausible share of each class in every set."""
    return _grouped(metrics, "per_class", "plausible_share", "Class", "Share judged plausible in each class")


def criteria(metrics: dict[str, Any]) -> Table:
    """Share that fails each of the judge's criteria in every set."""
    return _grouped(
        metrics, "per_criterion", "failed_share", "Criterion", "Share that fails each criterion of the judge", "lower"
    )


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
    measured = {name: value for name, value in sorted(metrics["reward"].items()) if isinstance(value, int | float)}
    rows = [TableRow(name, [measured_cell(measured, name, count=None)]) for name in measured]
    return Table("The reward model on held-out grades.", ("Figure", "Value"), rows) if rows else None


def checks(training: dict[str, Any]) -> Table:
    """The figures of each check of the adapter's training."""
    rows = [
        TableRow(str(check["epoch"]), [measured_cell(check, name, count=None) for name in CURVES])
        for check in training["checks"]
    ]
    caption = f"Checks of the training, n = {training['n_check_images']} each."
    return Table(caption, ("Epoch", *(title for title, *_ in CURVES.values())), rows)
