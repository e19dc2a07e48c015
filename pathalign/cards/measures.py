"""Figures for cards: each with its sample count and interval, in a table, in `model-index` and in `.eval_results`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pathalign.cards.facts import NOT_MEASURED, MeasuredOn

COLUMNS = {  # name in the report -> what readers see
    "before": "base",
    "after": "aligned",
    "control": "continued pretraining",
    "best_of_n": "best of N",
    "real": "real",
}
IMAGE_MEASURES = {
    "plausible_share": "plausible, by the judge",
    "n_fidelity": "images that the measures below rest on",
    "precision": "precision (fidelity)",
    "recall": "recall (diversity)",
    "density": "density (fidelity)",
    "coverage": "coverage (diversity)",
    "no_near_copy": "no near-copies of training images",
    "authenticity": "authenticity (farther from training images than these from each other)",
    "kid": "KID (less is better)",
}
REWARD_MEASURES = {
    "roc_auc": "ROC AUC",
    "average_precision": "average precision",
    "brier": "Brier score (less is better)",
    "ece": "expected calibration error (less is better)",
}
OF_ALL_IMAGES = (
    "plausible_share",
    "no_near_copy",
    "authenticity",
)  # of the image measures; the others rest on `n_fidelity`
EVAL_RESULTS_FILE = ".eval_results/pathalign.yaml"


def by_present_names(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    """Figures of a set in `metrics.json`, under the names they have now.

    Until `no_near_copy` had its name, it was called `authenticity`, which is now that of arXiv:2102.08921.
    """
    if not _is_older(figures):
        return figures
    renamed = {"authenticity": "no_near_copy", "authenticity_ci": "no_near_copy_ci"}
    return {renamed.get(key, key): value for key, value in figures.items()}


def losses(report: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The rows of `metrics.json` on what got worse, under the names they have now; None without any."""
    rows: list[Mapping[str, Any]] | None = report.get("worse")
    if rows is None or not any(_is_older(figures or {}) for figures in (report.get("metrics") or {}).values()):
        return rows
    return [{**row, "name": "share without near-copies"} if row["name"] == "authenticity" else row for row in rows]


def _is_older(figures: Mapping[str, Any]) -> bool:
    return "authenticity" in figures and "no_near_copy" not in figures


@dataclass(frozen=True)
class Measure:
    """One figure: its name in the report, its name for readers, its value, the samples and the interval behind it."""

    key: str
    title: str
    value: float
    n: int | None
    interval: tuple[float, float] | None

    @property
    def notes(self) -> str:
        """Sample count and interval in words."""
        between = (
            f"interval {round(self.interval[0], 9):.4g} to {round(self.interval[1], 9):.4g}"
            if self.interval
            else "interval not measured"
        )
        return f"n = {NOT_MEASURED if self.n is None else self.n}, {between}"


def interval_of(figures: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The interval of a figure, if it has one."""
    found = figures.get("plausible_ci" if key == "plausible_share" else f"{key}_ci")
    return (float(found[0]), float(found[1])) if found else None


def image_measures(figures: Mapping[str, Any], simulated_judge: bool) -> list[Measure]:
    """The measured ones of a set of images in `metrics.json`."""
    titles = {key: title for key, title in IMAGE_MEASURES.items() if key != "n_fidelity"}
    if simulated_judge:
        titles["plausible_share"] = "plausible, by a simulated judge"
    return _measures(by_present_names(figures), titles, lambda key: "n" if key in OF_ALL_IMAGES else "n_fidelity")


def reward_measures(figures: Mapping[str, Any], simulated_graders: bool) -> list[Measure]:
    """The measured ones of a reward model's `evaluation.json`, overall."""
    against = ", against simulated grades" if simulated_graders else ""
    titles = {key: f"{title}{against}" for key, title in REWARD_MEASURES.items()}
    return _measures(figures, titles, lambda key: "n")


def _measures(figures: Mapping[str, Any], titles: Mapping[str, str], count: Any) -> list[Measure]:
    return [
        Measure(key, title, float(figures[key]), figures.get(count(key)), interval_of(figures, key))
        for key, title in titles.items()
        if figures.get(key) is not None
    ]


def model_index(measures: Sequence[Measure], task: str, measured_on: MeasuredOn) -> list[Any] | None:
    """The figures as `huggingface_hub.EvalResult` for a card's front matter; None if nothing was measured."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type=measured_on.dataset or "not-on-the-hub",
            dataset_name=measured_on.dataset or "held-out images that are not on the Hub",
            dataset_split=measured_on.split,
            dataset_revision=measured_on.revision,
            metric_type=measure.key,
            metric_name=measure.title,
            metric_value=measure.value,
            metric_args={"n": measure.n, "interval": list(measure.interval) if measure.interval else None},
        )
        for measure in measures
    ] or None


def eval_results(measures: Sequence[Measure], measured_on: MeasuredOn, date: str) -> str | None:
    """The same figures as the Hub's `.eval_results/*.yaml`; None where they name no Hub dataset, as that must.

    Args:
        measures: See `image_measures` and `reward_measures`.
        measured_on: The dataset, its split and revision.
        date: When they were measured, ISO 8601; may be empty.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    if not measured_on.dataset or not measures:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=measured_on.dataset,
            task_id=measure.key,
            value=measure.value,
            dataset_revision=measured_on.revision,
            date=date or None,
            notes=f"{measure.title}; {measure.notes}; split {measured_on.split}",
        )
        for measure in measures
    ]
    return str(yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def image_table(metrics: Mapping[str, Mapping[str, Any] | None], columns: Sequence[str]) -> dict[str, Any]:
    """Header and rows of the table of image measures; columns nothing is known of are left out, except the first."""
    sets = {name: by_present_names(metrics.get(name) or {}) for name in columns}
    shown = [name for index, name in enumerate(columns) if index == 0 or sets[name]]
    return {
        "header": [f"{COLUMNS[name]}, n = {sets[name].get('n', NOT_MEASURED)}" for name in shown],
        "rows": [(title, [number(sets[name], key) for name in shown]) for key, title in IMAGE_MEASURES.items()],
    }


def number(figures: Mapping[str, Any], key: str) -> str:
    """`0.712 (0.68 to 0.74)`, the interval where there is one; a count as it is; or "not measured"."""
    value = figures.get(key)
    if value is None:
        return NOT_MEASURED
    if isinstance(value, int):
        return str(value)
    interval = interval_of(figures, key)
    rounded = [f"{round(bound, 9):.3g}" for bound in interval or ()]  # bounds of a share of 0 are rounding noise
    return f"{value:.3g}" + (f" ({rounded[0]} to {rounded[1]})" if interval else "")
