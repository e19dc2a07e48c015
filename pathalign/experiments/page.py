"""The result page of an experiment: answer, pictures, table, figures, method; and the same table as Markdown."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes

from pathalign.evaluate import figures
from pathalign.evaluate.glossary import terms
from pathalign.evaluate.page import (
    NOT_MEASURED,
    Cell,
    Table,
    TableRow,
    write_page,
)
from pathalign.experiments.answers import Summaries, answers, other_answers, possible, span, text, title_of
from pathalign.experiments.measures import CONFIDENCE, Place, last_round, training_of
from pathalign.experiments.recipe import Arm, Experiment
from pathalign.experiments.results import FEWEST_SEEDS, Summary
from pathalign.experiments.subtypes import samples_of
from pathalign.schema import InputError

TEMPLATE = "experiment.html.jinja"
LINES = {"judge_share": "-", "reward": "--"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
MARKERS = "os^DvPX"
CLASS_PREFIX = "plausible share of "


def main_table(experiment: Experiment, summaries: Summaries) -> Table:
    """The figures that the experiment shows, a line for each arm."""
    return _table(
        experiment,
        summaries,
        experiment.show,
        f"{_which_seeds(experiment)}{_which_interval(experiment)}, and the difference "
        f"from “{experiment.arm(experiment.against).title}”, seed by seed (* its interval excludes 0).",
    )


def _which_seeds(experiment: Experiment) -> str:
    first, *others = map(str, experiment.seeds)
    return f"Mean over the seeds {', '.join([first, *others])}" if others else f"Seed {first}"


def _which_interval(experiment: Experiment) -> str:
    if len(experiment.seeds) == 1:
        return f", its {100 * CONFIDENCE:.0f} % interval over images"
    few = len(experiment.seeds) < FEWEST_SEEDS
    return ", the values of both" if few else f", its {100 * CONFIDENCE:.0f} % interval over seeds"


def _intervals(experiment: Experiment) -> str:
    """What intervals are over, and what they leave out."""
    if len(experiment.seeds) == 1:
        return "Intervals are over images; they say nothing of another training run, or of other data."
    if len(experiment.seeds) < FEWEST_SEEDS:
        count = len(experiment.seeds)
        return f"{count} seeds are too few for an interval over seeds; those of single seeds are over images."
    return (
        f"Intervals are over the {len(experiment.seeds)} seeds: another draw of data split, base model, grades, "
        "training and images, but the same source of real images. They say nothing of other data."
    )


def class_table(experiment: Experiment, summaries: Summaries) -> Table | None:
    """Plausible share of each class, where the experiment measures it."""
    prefix = CLASS_PREFIX.replace(" ", "_", 1)
    names = tuple(name for name in summaries[experiment.arms[0].name] if name.startswith(prefix))
    caption = "Plausible share of each class, likewise."
    return _table(experiment, summaries, names, caption, CLASS_PREFIX) if names else None


def _table(
    experiment: Experiment, summaries: Summaries, names: tuple[str, ...], caption: str, prefix: str = ""
) -> Table:
    columns = [title_of(name)[0].removeprefix(prefix) for name in names]
    rows = []
    for arm in experiment.arms:
        cells = [_cell(summaries[arm.name].get(name), title_of(name)[1]) for name in names]
        rows.append(TableRow(arm.title, cells))
    return Table(caption, ["Arm", *columns], rows)


def _cell(summary: Summary | None, share: bool) -> Cell:
    if summary is None:
        return Cell(NOT_MEASURED)
    below = span(summary.interval, share)
    if not below and 1 < len(summary.by_seed) < FEWEST_SEEDS:
        below = " and ".join(text(value, share) for value in summary.by_seed)
    if summary.difference is not None:
        below += f"{'; ' if below else ''}{text(summary.difference, share, sign=True)}{'*' if summary.clear else ''}"
    return Cell(text(summary.mean, share), below)


def seed_table(experiment: Experiment, summaries: Summaries) -> Table:
    """The first figure of each arm and seed, with its interval over images."""
    name = experiment.show[0]
    title, share = title_of(name)
    rows = []
    for arm in experiment.arms:
        summary = summaries[arm.name].get(name)
        pairs = zip(summary.by_seed, summary.by_seed_interval, strict=True) if summary else ()
        cells = [Cell(text(value, share), span(interval, share)) for value, interval in pairs]
        rows.append(TableRow(arm.title, cells, f"n = {summary.n}" if summary and summary.n else ""))
    columns = ["Arm", *(f"seed {seed}" for seed in experiment.seeds)]
    return Table(f"{title} of each seed, with {100 * CONFIDENCE:.0f} % intervals over images.", columns, rows)


def markdown(experiment: Experiment, summaries: Summaries, origin: dict[str, Any], simulated: bool) -> str:
    """The main table and where it comes from, as Markdown."""
    table = main_table(experiment, summaries)
    lines = [f"## {experiment.title}", "", experiment.question, ""]
    lines += ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
    for row in table.rows:
        cells = [f"{cell.value} ({cell.interval})" if cell.interval else cell.value for cell in row.cells]
        lines.append("| " + " | ".join([row.title, *cells]) + " |")
    first = summaries[experiment.arms[0].name][experiment.show[0]]
    count = f"; n = {first.n} for each seed" if first.n else ""
    graded = "Grader and judge are simulated" if simulated else "The judge is simulated"
    lines += ["", table.caption.replace("“", '"').replace("”", '"') + f" {graded}{count}."]
    lines += ["", *(f"- {note}" for note in experiment.notes)] if experiment.notes else []
    lines += ["", f"`{origin['command']}`, commit {origin['commit']}, {origin['compute']}."]
    return "\n".join(lines) + "\n"


def write(
    folder: Path,
    experiment: Experiment,
    summaries: Summaries,
    places: dict[str, dict[int, Place]],
    origin: dict[str, Any],
    simulated: bool,
) -> None:
    """Write `index.html` and `figures/`.

    Args:
        folder: Of the experiment.
        experiment: What was asked.
        summaries: Arm -> name -> summary.
        places: Arm -> seed -> where its run lies.
        origin: `command`, `commit`, `compute`, `version` and `data`, as texts.
        simulated: Whether simulated graders gave the feedback.
    """
    (folder / "figures").mkdir(exist_ok=True)
    write_page(
        folder / "index.html",
        TEMPLATE,
        Path(__file__).parent,
        experiment=experiment,
        answers=[*answers(experiment, summaries), *other_answers(experiment, summaries)],
        sheets=_sheets(experiment, places),
        tables=[table for table in (main_table(experiment, summaries), class_table(experiment, summaries)) if table],
        seeds=seed_table(experiment, summaries),
        charts=_charts(folder / "figures", experiment, summaries, places),
        settings=[(arm.title, _settings(experiment, arm)) for arm in experiment.arms],
        shared=yaml.safe_dump(experiment.settings, sort_keys=False) if experiment.settings else "",
        origin=origin,
        simulated=simulated,
        intervals=_intervals(experiment),
        terms=terms({*experiment.show, "judge", "grader"}),
    )


def _settings(experiment: Experiment, arm: Arm) -> str:
    if not arm.runs:
        return f"set `{arm.set}` of “{experiment.arm(arm.of).title}”"
    return yaml.safe_dump(arm.settings, sort_keys=False).strip() if arm.settings else f"the recipe {experiment.base}"


def _sheets(experiment: Experiment, places: dict[str, dict[int, Place]]) -> list[dict[str, Any]]:
    """Sheets of the first seed's images: of new classes, and of every arm whose evaluation drew one."""
    found = []
    for arm in experiment.arms:
        place = places[arm.name][experiment.seeds[0]]
        if experiment.measure == "concepts" and arm.set == "after":
            names, folder = samples_of(place)
            found.append(
                {
                    "title": f"{arm.title}: {', '.join(names)}; seeds of their own",
                    "png": (folder / "samples.png").read_bytes(),
                }
            )
        try:
            evaluation = last_round(place.run_dir, "evaluation")
        except InputError:
            continue
        sheet = evaluation / "figures" / f"samples_{arm.set}.png"
        if sheet.is_file():
            found.append({"title": arm.title, "png": sheet.read_bytes()})
    return found


def _charts(
    folder: Path, experiment: Experiment, summaries: Summaries, places: dict[str, dict[int, Place]]
) -> list[dict[str, Any]]:
    name = experiment.show[0]
    title = title_of(name)[0]
    if experiment.axis:
        chart = figures.draw(folder / "curve", lambda axes: curve(axes, experiment, summaries, name))
    else:
        chart = figures.draw(folder / "arms", lambda axes: points(axes, experiment, summaries, name))
    small = "; small marks are single seeds" if len(experiment.seeds) > 1 else ""
    caption = f"{title}. {_which_seeds(experiment)}{_which_interval(experiment)}{small}."
    found = [{"chart": chart, "alt": f"{title} of each arm; the numbers are in the table", "caption": caption}]
    if experiment.measure == "checks":
        for seed in experiment.seeds:
            trainings = {arm.title: training_of(places[arm.name][seed]) for arm in experiment.arms}
            drawn = figures.draw(folder / f"training-seed-{seed}", partial(trained, trainings=trainings))
            caption = f"Seed {seed}: judge's share (solid) and reward (dashed) while training goes on."
            found.append({"chart": drawn, "alt": caption, "caption": caption})
    return found


def points(axes: Axes, experiment: Experiment, summaries: Summaries, name: str) -> None:
    """A line for each arm: mean with interval, single seeds small."""
    share = title_of(name)[1]
    scale = 100 if share else 1
    arms = [arm for arm in experiment.arms if name in summaries[arm.name]]
    for row, arm in enumerate(arms):
        summary = summaries[arm.name][name]
        colour = COLOURS[6] if arm.name == experiment.against else COLOURS[0]
        axes.plot(scale * np.array(summary.by_seed), [row] * len(summary.by_seed), ".", color=colour, alpha=0.6)
        ends = possible(summary.interval or [summary.mean] * 2, share)
        reach = scale * np.abs(np.array(ends) - summary.mean)[:, None]
        axes.errorbar(scale * summary.mean, row, xerr=reach, fmt="o", color=colour, capsize=3)
    axes.set_yticks(range(len(arms)), [arm.title for arm in arms])
    axes.invert_yaxis()
    axes.set_xlabel(title_of(name)[0] + (" (%)" if share else ""))
    axes.grid(axis="x", alpha=0.25)


def curve(axes: Axes, experiment: Experiment, summaries: Summaries, name: str) -> None:
    """A figure against the arms' `x`, a curve for each `line`; arms without `x` are horizontal lines."""
    share = title_of(name)[1]
    scale = 100 if share else 1
    arms = [arm for arm in experiment.arms if name in summaries[arm.name]]
    lines = dict.fromkeys(arm.line for arm in arms if arm.x is not None)
    last = max(arm.x for arm in arms if arm.x is not None)
    for index, line in enumerate(lines):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        on_it = sorted((arm for arm in arms if arm.x is not None and arm.line == line), key=lambda arm: arm.x or 0)
        if index:  # curves end where all grades are used, whichever came first
            on_it += [arm for arm in arms if arm.x == last and arm.line != line]
        found = [summaries[arm.name][name] for arm in on_it]
        beside = 0.015 * last * (index - (len(lines) - 1) / 2)  # so that no curve hides another
        x = np.array([arm.x or 0 for arm in on_it]) + beside
        y = scale * np.array([summary.mean for summary in found])
        ends = np.array([possible(summary.interval or [summary.mean] * 2, share) for summary in found])
        reach = np.abs(scale * ends.T - y)
        axes.errorbar(x, y, yerr=reach, capsize=3, label=line or None, color=colour, marker=marker)
        for place, summary in zip(x, found, strict=True):
            seeds = scale * np.array(summary.by_seed)
            axes.plot([place] * len(seeds), seeds, ".", color=colour, alpha=0.5)
    for index, arm in enumerate(arm for arm in arms if arm.x is None):
        style = ("--", ":", "-.")[index % 3]
        axes.axhline(scale * summaries[arm.name][name].mean, linestyle=style, color=COLOURS[6], label=arm.title)
    axes.set_xlabel(experiment.axis)
    axes.set_ylabel(title_of(name)[0] + (" (%)" if share else ""))
    axes.grid(axis="y", alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def trained(axes: Axes, trainings: dict[str, dict[str, Any]]) -> None:
    """Judge's share and reward at each check of each arm's training; a dot marks what was kept."""
    for index, (arm, training) in enumerate(trainings.items()):
        colour = COLOURS[index % len(COLOURS)]
        for key, style in LINES.items():
            rows = [(row["epoch"], row[key]) for row in training["checks"]]
            label = arm if key == "judge_share" else None
            axes.plot(*zip(*rows, strict=True), linestyle=style, color=colour, label=label)
            kept = [pair for pair in rows if pair[0] == training["kept_epoch"]]
            axes.plot(*zip(*kept, strict=True), "o", color=colour)
    axes.set_xlabel("epochs")
    axes.locator_params(axis="x", integer=True)
    axes.set_ylabel("mean over the check's images")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=1, fontsize=8)
