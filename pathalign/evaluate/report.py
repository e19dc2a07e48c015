"""The report: one HTML file that needs no network, its figures as files, and a plain table for the command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pathalign.augment import orient
from pathalign.evaluate import figures, tables
from pathalign.evaluate.alignment import Verdicts
from pathalign.evaluate.explained import CloseLook
from pathalign.evaluate.fidelity import rows_of_class
from pathalign.evaluate.figures import SET_TITLES
from pathalign.evaluate.glossary import term_of, terms
from pathalign.evaluate.page import (
    NOT_MEASURED,
    Cell,
    Table,
    TableRow,
    measured_cell,
    percent,
    write_page,
)
from pathalign.evaluate.wording import hacking_warning, headline, in_plain_words
from pathalign.images import ImageSet
from pathalign.schema import DISCLAIMER, RunRecord

PAIRS_PER_CLASS = 6
CRITERIA_SHOWN = 5  # of an image
TEMPLATE = "report.html.jinja"
GENERAL_TERMS = {"judge", "grader", "interval", "seed", "control", "best_of_n", "criterion_reward", "saliency"}
SECTIONS = (  # id and heading
    ("pictures", "Before and after, same seeds"),
    ("shares", "Plausible share"),
    ("metrics", "All metrics"),
    ("terms", "What the words mean"),
    ("worse", "What got worse"),
    ("classes", "By class and by criterion"),
    ("looks", "What the reward model sees, and where"),
    ("copies", "Closest to a training image"),
    ("reward", "Reward model"),
    ("method", "Method and limits"),
)


@dataclass(frozen=True)
class Exhibits:
    """What the report shows besides numbers.

    Attributes:
        sets: Images by set name; `before` and `after` pair up row by row.
        verdicts: The judge's verdicts on each set.
        rewards: Rewards of each set, shape `(n,)`; empty without a reward model.
        train: Real training images.
        closest: Closest pairs of `after` and training images, see `memorization.NearestTraining.closest`.
        calibration: Bins of `alignment.reliability`; empty without feedback.
        phantom: Whether the "real" images are drawn.
        close_look: Images by reward, with the rewards of their criteria and where the reward model looks.
    """

    sets: dict[str, ImageSet]
    verdicts: dict[str, Verdicts]
    rewards: dict[str, np.ndarray]
    train: ImageSet
    closest: list[dict[str, Any]]
    calibration: list[dict[str, float]]
    phantom: bool
    close_look: CloseLook = field(default_factory=CloseLook)


@dataclass(frozen=True)
class Row:
    """One line of the metric table."""

    key: str
    title: str
    kind: Literal["share", "number"]
    better: str  # "higher" or "lower"; empty where neither is, which `meaning` then says
    meaning: str
    interval: str | None = None  # key of the interval
    count: str | None = "n"  # key of the number of images


ROWS = (
    Row("plausible_share", "Plausible (judge)", "share", "higher", "images that the judge finds plausible",
        "plausible_ci"),
    Row("grader_share", "Plausible (grader)", "share", "higher", "the same by the grader who gave the feedback",
        "grader_share_ci"),
    Row("grader_judge_kappa", "Grader-judge kappa", "number", "higher", "their agreement beyond chance, 1 being full"),
    Row("mean_reward", "Mean reward", "number", "higher", "what the reward model gives, 0 to 1", "mean_reward_ci"),
    Row("precision", "Precision", "share", "higher", "generated images among real ones", "precision_ci", "n_fidelity"),
    Row("recall", "Recall", "share", "higher", "real images among generated ones", "recall_ci", "n_fidelity"),
    Row("density", "Density", "number", "higher", "how densely real images surround them", None, "n_fidelity"),
    Row("coverage", "Coverage", "share", "higher", "real images that have one near", "coverage_ci", "n_fidelity"),
    Row("alpha_precision", "Alpha-precision", "number", "higher",
        "how evenly generated images fill the real ones' range, 1 being fully", None, "n_fidelity"),
    Row("beta_recall", "Beta-recall", "number", "higher", "how evenly real images have generated ones near", None,
        "n_fidelity"),
    Row("kid", "KID", "number", "lower", "kernel distance to real images", None, "n_fidelity"),
    Row("fid", "FID", "number", "lower", "Frechet distance to real images", None, "n_fidelity"),
    Row("no_near_copy", "No near-copy", "share", "higher", "images that are no near-copies of training images",
        "no_near_copy_ci"),
    Row("authenticity", "Authenticity", "share", "",
        "images farther from their nearest training image than that one lies from its own nearest neighbour; compare "
        "with Real", "authenticity_ci"),
    Row("nearer_to_train", "Nearer to training", "share", "",
        "images nearer to a training image than to a held-out one; 50 % is best", "nearer_to_train_ci",
        "n_memorization"),
    Row("utility_accuracy", "Usefulness", "share", "higher",
        "accuracy on real images of a classifier trained on this set", "utility_accuracy_ci", "n_utility_test"),
    Row("augment_accuracy", "Usefulness, added", "share", "higher",
        "the same with all real training images added", "augment_accuracy_ci", "n_utility_test"),
)  # fmt: skip


def cell(row: Row, measured: dict[str, Any] | None) -> Cell:
    """Value, interval and n of one figure of one set, as text."""
    return measured_cell(measured, row.key, row.interval, row.count, share=row.kind == "share")


def summary_table(metrics: dict[str, Any]) -> str:
    """The metrics of all sets as plain text for the command line, with the gain and the gap closed below.

    Args:
        metrics: Content of `metrics.json`.
    """
    sets = metrics["metrics"]
    lines = [f"{'':20}" + "".join(f"{title:>12}" for title in SET_TITLES.values())]
    lines.append(f"{'images':20}" + "".join(f"{sets[name]['n'] if sets.get(name) else '-':>12}" for name in SET_TITLES))
    for row in ROWS:
        values = [cell(row, sets.get(name)).value.replace(NOT_MEASURED, "-") for name in SET_TITLES]
        lines.append(f"{row.title:20}" + "".join(f"{value:>12}" for value in values))
    lines += [
        "",
        headline(metrics),
        "- is not measured. The judge and the grader of this table are simulated. " + DISCLAIMER,
    ]
    return "\n".join([warning, "", *lines] if (warning := hacking_warning(metrics)) else lines)


def metric_table(metrics: dict[str, Any]) -> Table:
    """All metrics of all sets."""
    rows = [
        TableRow(
            row.title,
            [cell(row, metrics["metrics"].get(name)) for name in SET_TITLES],
            row.meaning + (f"; {row.better} is better" if row.better else ""),
            term_of(row.key),
        )
        for row in ROWS
    ]
    caption = (
        f"Value, {percent(metrics['confidence'], 0)} interval and number of images. “Real” is unseen real images, the "
        "mark to reach."
    )
    return Table(caption, ("Metric", *SET_TITLES.values()), rows)


def write(folder: Path, metrics: dict[str, Any], exhibits: Exhibits, record: RunRecord) -> None:
    """Write `report.html` and `figures/` into `folder`."""
    (folder / "figures").mkdir(exist_ok=True)
    training = metrics.get("training")
    write_page(
        folder / "report.html",
        TEMPLATE,
        Path(__file__).parent,
        metrics=metrics,
        record=record,
        phantom=exhibits.phantom,
        sections=SECTIONS,
        warning=hacking_warning(metrics),
        plain_words=in_plain_words(metrics),
        headline=headline(metrics).replace(" %", "\u00a0%"),
        table=metric_table(metrics),
        gains=tables.gains(metrics, {row.key: row.title for row in ROWS if row.kind == "share"}),
        worse=tables.worse(metrics),
        classes=tables.classes(metrics),
        criteria=tables.criteria(metrics),
        reward_table=tables.reward_model(metrics),
        checks=tables.checks(training) if training else None,
        terms=terms({row.key for row in ROWS} | GENERAL_TERMS),
        class_rows=class_rows(exhibits),
        eyes=tables.eyes(metrics),
        skill=tables.skill(metrics),
        extremes=extremes(exhibits),
        changed=changed_pairs(exhibits),
        criteria_shown=CRITERIA_SHOWN,
        closest=closest_pairs(exhibits),
        charts=draw_charts(folder / "figures", metrics, exhibits),
        calibration=exhibits.calibration,
        training=training,
    )


def draw_charts(folder: Path, metrics: dict[str, Any], exhibits: Exhibits) -> dict[str, figures.Chart]:
    """Draw every chart and sheet that there is data for; returns the charts to embed, by name."""
    sets = metrics["metrics"]
    charts = {
        "plausible_share": figures.draw(folder / "plausible_share", lambda axes: figures.plausible_shares(axes, sets)),
        "per_class": figures.draw(folder / "per_class", lambda axes: figures.class_shares(axes, sets)),
    }
    if exhibits.rewards:
        charts["rewards"] = figures.draw(
            folder / "rewards", lambda axes: figures.reward_histogram(axes, exhibits.rewards)
        )
    if exhibits.calibration:
        charts["calibration"] = figures.draw(
            folder / "calibration", lambda axes: figures.calibration_plot(axes, exhibits.calibration)
        )
    if sets["after"].get("per_criterion_reward"):
        charts["criteria"] = figures.draw(folder / "criteria", lambda axes: figures.criterion_rewards(axes, sets))
    if training := metrics.get("training"):
        charts["checks"] = figures.draw(folder / "checks", lambda axes: figures.check_curves(axes, training))
    for name in ("before", "after"):
        sheet = exhibits.sets[name].first_per_class(2 * PAIRS_PER_CLASS).images
        figures.save_sheet(folder / f"samples_{name}.png", sheet, 2 * PAIRS_PER_CLASS)
    save_close_look(folder, exhibits)
    pairs = exhibits.closest
    generated = exhibits.sets["after"].images[[pair["row"] for pair in pairs]]
    figures.save_sheet(
        folder / "closest_training_pairs.png", figures.side_by_side(generated, nearest_training(exhibits)), 2
    )
    return charts


def save_close_look(folder: Path, exhibits: Exhibits) -> None:
    """Write each group of images that are looked at closely as a sheet: image, map, image, map, ..."""
    look = exhibits.close_look
    if look.chosen is None:
        return
    groups = {
        "lowest": [("after", row) for row in look.chosen.lowest],
        "highest": [("after", row) for row in look.chosen.highest],
        "risen": [(name, row) for row in look.chosen.risen for name in ("before", "after")],
        "fallen": [(name, row) for row in look.chosen.fallen for name in ("before", "after")],
    }
    for group, shown in groups.items():
        if shown:
            tiles = [(exhibits.sets[name].images[row], look.overlays[name][row]) for name, row in shown]
            figures.save_overlays(folder / f"looks_{group}.png", tiles)


def tile(exhibits: Exhibits, name: str, row: int) -> dict[str, Any]:
    """One image with what was said about it."""
    images, verdicts = exhibits.sets[name], exhibits.verdicts[name]
    rewards = exhibits.rewards.get(name)
    failed = [criterion for criterion, no in zip(verdicts.criteria, verdicts.failed[row], strict=True) if no]
    return {
        "png": figures.png_bytes(images.images[row]),
        "set": SET_TITLES[name],
        "label": images.class_names[int(images.class_ids[row])],
        "seed": images.columns["seed"][row],
        "plausible": bool(verdicts.plausible[row]),
        "failed": failed,
        "reward": None if rewards is None else float(rewards[row]),
    }


def class_rows(exhibits: Exhibits) -> list[dict[str, Any]]:
    """The first images of each class, not chosen by looks: before and after of the same seed beside each other."""
    before = exhibits.sets["before"]
    return [
        {
            "label": label,
            "pairs": [
                [tile(exhibits, name, int(row)) for name in ("before", "after")]
                for row in rows_of_class(before, class_id)[:PAIRS_PER_CLASS]
            ],
        }
        for class_id, label in enumerate(before.class_names)
    ]


def close_tile(exhibits: Exhibits, name: str, row: int) -> dict[str, Any]:
    """A tile with where the reward model looks, and its rewards of all criteria, the lowest first."""
    look = exhibits.close_look
    rewards = look.criteria_rewards[name][row]
    criteria = sorted(zip(look.criteria, rewards.tolist(), strict=True), key=lambda pair: pair[1])
    return tile(exhibits, name, row) | {"overlay": look.overlays[name][row], "criteria": criteria}


def extremes(exhibits: Exhibits) -> dict[str, list[dict[str, Any]]]:
    """Aligned samples of the lowest and the highest reward; empty without a reward model."""
    chosen = exhibits.close_look.chosen
    if chosen is None:
        return {}
    return {
        name: [close_tile(exhibits, "after", row) for row in rows]
        for name, rows in (("lowest", chosen.lowest), ("highest", chosen.highest))
    }


def changed_pairs(exhibits: Exhibits) -> dict[str, list[dict[str, Any]]]:
    """Pairs of the same seed whose reward rose and fell most, and their criteria, those that changed most first."""
    look = exhibits.close_look
    if look.chosen is None:
        return {}

    def pair(row: int) -> dict[str, Any]:
        before, after = (look.criteria_rewards[name][row].tolist() for name in ("before", "after"))
        moved = [entry for entry in zip(look.criteria, before, after, strict=True) if _visible(entry)]
        changes = sorted(moved, key=_change, reverse=True)
        tiles = {name: close_tile(exhibits, name, row) for name in ("before", "after")}
        return tiles | {"changes": changes[:CRITERIA_SHOWN]}

    return {
        name: [pair(row) for row in rows]
        for name, rows in (("risen", look.chosen.risen), ("fallen", look.chosen.fallen))
    }


def _visible(entry: tuple[str, float, float]) -> bool:
    """Whether a change shows in two digits."""
    return f"{entry[1]:.2f}" != f"{entry[2]:.2f}"


def _change(entry: tuple[str, float, float]) -> float:
    return abs(entry[2] - entry[1])


def nearest_training(exhibits: Exhibits) -> Tensor:
    """The training images of the closest pairs, turned as they were found. Shape `(pairs, 3, height, width)`."""
    return torch.stack(
        [orient(exhibits.train.images[pair["train_row"]], pair["orientation"]) for pair in exhibits.closest]
    )


def closest_pairs(exhibits: Exhibits) -> list[dict[str, Any]]:
    """Each aligned sample that lies closest to a training image, and that image."""
    return [
        {
            "sample": tile(exhibits, "after", pair["row"]),
            "training_png": figures.png_bytes(image),
            "training_label": exhibits.train.labels()[pair["train_row"]],
            "distance": pair["distance"],
            "near_copy": pair["near_copy"],
        }
        for pair, image in zip(exhibits.closest, nearest_training(exhibits), strict=True)
    ]
