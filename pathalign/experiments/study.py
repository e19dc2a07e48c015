"""Experiments from names to result pages."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from pathalign.artefacts import write_atomically
from pathalign.config import ConfigError
from pathalign.experiments import page
from pathalign.experiments.measures import Figure, Place, checks, evaluation, rare_class, reward_ranking
from pathalign.experiments.recipe import Experiment, load, names
from pathalign.experiments.results import Figures, as_json, summarize
from pathalign.experiments.running import check, execute, runs_of
from pathalign.experiments.subtypes import concepts
from pathalign.ledger import Ledger
from pathalign.progress import say
from pathalign.schema import InputError, RunRecord, library_versions

ALL = "all"
MEASURED: dict[str, Callable[[Place], dict[str, Figure]]] = {
    "evaluation": evaluation,
    "reward_ranking": reward_ranking,
    "checks": checks,
    "rare_class": rare_class,
    "concepts": concepts,
}


def run(
    sources: Sequence[str],
    output_dir: Path,
    data: str | None = None,
    seeds: Sequence[int] | None = None,
    scale: str = "cpu",
    minutes: float | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Run experiments and write a folder for each: `index.html`, `results.json`, `results.md`, `figures/`.

    Args:
        sources: Names, YAML files, or `all`.
        output_dir: Folder of all experiments; their runs share what they can.
        data: Real images. Without them an experiment must name its own.
        seeds: Of the runs, in place of the experiments' own.
        scale: `cpu` or `full`.
        minutes: Scales each run; None leaves the recipe as it is.
        workers: Runs at a time.

    Returns:
        Name -> content of `results.json`, with `table` (text) and `page` (path).

    Raises:
        ConfigError: If an experiment cannot be run as it stands; before anything starts.
        InputError: If a run fails. What is done is kept.
    """
    wanted = [name for source in sources for name in (names() if source == ALL else [source])]
    experiments = [_varied(load(source, scale), scale, minutes, seeds) for source in dict.fromkeys(wanted)]
    homeless = [one.name for one in experiments if not (data or (one.settings.get("data") or {}).get("source"))]
    if homeless:
        raise ConfigError(
            f"Experiment {', '.join(homeless)}",
            ["no real images are named; give `--data DIR_OR_HUB_ID` (`--data phantom` only shows that it runs)."],
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    every_run = [run for one in experiments for run in runs_of(one, output_dir)]
    check(every_run, data, minutes)
    command = _command(sources, data, seeds, scale, minutes, workers)
    results, failures = {}, []
    with closing(execute(every_run, output_dir, workers, data, minutes)) as over:
        for experiment, failure in over:
            try:
                if failure:
                    raise failure
                results[experiment.name] = _finish(experiment, output_dir, data, command)
            except InputError as error:
                failures.append(str(error))
                say(str(error))
    if failures:
        raise InputError(f"{len(failures)} of {len(experiments)} experiments failed; the first says: {failures[0]}")
    say(f"Behind {', '.join(results)}: {_compute([run.folder for run in every_run])}.")
    return results


def _varied(experiment: Experiment, scale: str, minutes: float | None, seeds: Sequence[int] | None) -> Experiment:
    """With a name of its own at another scale or with other seeds: a trial must not take the place of a result."""
    name = experiment.name + (f"-{scale}" if scale != "cpu" else "") + (f"-{minutes:g}min" if minutes else "")
    if seeds is None or (own := tuple(dict.fromkeys(seeds))) == experiment.seeds:
        return replace(experiment, name=name)
    return replace(experiment, name=f"{name}-seeds-{'-'.join(map(str, own))}", seeds=own)


def _finish(experiment: Experiment, output_dir: Path, data: str | None, command: str) -> dict[str, Any]:
    folder = output_dir / experiment.name
    places = {
        arm.name: {
            seed: Place(
                experiment,
                arm,
                run_dir=folder / "runs" / arm.of / f"seed-{seed}",
                first=folder / "runs" / experiment.arms[0].name / f"seed-{seed}",
            )
            for seed in experiment.seeds
        }
        for arm in experiment.arms
    }
    measure = MEASURED[experiment.measure]
    figures: Figures = {name: {seed: measure(place) for seed, place in some.items()} for name, some in places.items()}
    known = {name for by_seed in figures.values() for found in by_seed.values() for name in found}
    if missing := sorted(set(experiment.show) - known):
        raise InputError(f"`show` of {experiment.name} names {missing}; its measure has {', '.join(sorted(known))}.")
    summaries = summarize(experiment, figures)
    origin = {
        "command": command,
        "version": library_versions()["pathalign"],
        "commit": _commit(),
        "data": Path(data or experiment.settings["data"]["source"]).name,
        "compute": _compute([place.run_dir for some in places.values() for place in some.values()]),
    }
    simulated = _simulated(places)
    page.write(folder, experiment, summaries, places, origin, simulated)
    result = {**as_json(experiment, figures, summaries), "simulated": simulated, "origin": origin}
    write_atomically(folder / "results.json", json.dumps(result, indent=2) + "\n")
    text = page.markdown(experiment, summaries, origin, simulated)
    write_atomically(folder / "results.md", text)
    say(f"{experiment.name}: {folder / 'index.html'}")
    return {**result, "table": text, "page": str(folder / "index.html")}


def _command(
    sources: Sequence[str],
    data: str | None,
    seeds: Sequence[int] | None,
    scale: str,
    minutes: float | None,
    workers: int,
) -> str:
    """What to type for the same; folders of this machine are left out."""
    words = ["pathalign", "experiment", *(Path(source).name for source in sources)]
    options = {
        "--data": "DIR" if data and Path(data).is_dir() else data,
        "--seeds": ",".join(map(str, seeds)) if seeds is not None else None,
        "--scale": scale if scale != "cpu" else None,
        "--minutes": f"{minutes:g}" if minutes else None,
        "--workers": str(workers) if workers > 1 else None,
    }
    return shlex.join([*words, *(word for name, value in options.items() if value for word in (name, value))])


def _commit() -> str:
    """Commit of pathalign's own checkout; a mark where this is none, or has changes."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return "unknown (no checkout)"
    command = ["git", "-C", str(checkout), "describe", "--always", "--abbrev=10", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git)"


def _simulated(places: dict[str, dict[int, Place]]) -> bool:
    """Whether any run learned from simulated grades."""
    folders = {place.run_dir for some in places.values() for place in some.values()}
    return any(RunRecord.load(folder / "feedback").metrics["simulated"] for folder in folders)


def _compute(run_dirs: Sequence[Path]) -> str:
    """Time and memory of all steps in these runs, each counted once, whoever made it."""
    steps = {entry["key"]: entry for folder in set(run_dirs) for entry in Ledger(folder).steps.values()}
    wall, peak = sum(entry["wall_s"] for entry in steps.values()), max(entry["peak_rss_mb"] for entry in steps.values())
    return f"{len(steps)} steps of {wall / 60:.0f} minutes together, {peak:,.0f} MB at most"
