"""All stages in their order, run in one directory by `pathalign run` and `pathalign demo`.

A step is not run again while its settings and the contents of its inputs are what they were when its folder was made;
`stages.json` in the run directory keeps account of that. Nothing here imports torch before a step runs.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from pathalign.artefacts import fingerprint
from pathalign.config import ConfigError, StageConfig, build, read_yaml, unknown_choice, unknown_key
from pathalign.ledger import Ledger, locked, run_dirs, shared, signature
from pathalign.progress import say
from pathalign.rounds import Job, next_round
from pathalign.schema import library_versions
from pathalign.settings.adapter import is_function, weighted_source
from pathalign.settings.pull import STUDY
from pathalign.stages import MOST_ROUNDS, PULL, STAGES, Stage, Step, load, stage_names

TOP_KEYS = ("output_dir", "seed", "minutes", "rounds")
RECIPES = Path(__file__).parent / "recipes"
# What `--minutes` scales, and the least that still is something.
FLOORS = {
    "steps": 20,
    "steps_per_round": 4,
    "warmup_steps": 1,
    "validate_every_steps": 10,
    "checkpoint_every_steps": 10,
    "images_per_class": 12,
}

# What is to be done: every configuration is made and checked before anything starts.


def plan(values: Mapping[str, Any], run_dir: Path, title: str = "The configuration") -> list[Job]:
    """Make the jobs of all stages.

    Args:
        values: Top keys (`TOP_KEYS`) and a section for each stage; the section of a stage of several steps may hold a
            section for each of them, whose values come before the shared ones; that of a stage with a choice of
            methods may hold `method`.
        run_dir: Directory in which the steps make their folders.
        title: What an error calls the configuration.

    Raises:
        ConfigError: With everything that is wrong in any section.
    """
    problems = [
        unknown_key(key, [*TOP_KEYS, *stage_names()]) for key in values if key not in {*TOP_KEYS, *stage_names()}
    ]
    seed, rounds = values.get("seed", 0), values.get("rounds", 1)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        problems.append(f"`seed` is {seed!r}; it must be a whole number from 0.")
        seed = 0
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= MOST_ROUNDS:
        problems.append(f"`rounds` is {rounds!r}; it must be a whole number from 1 to {MOST_ROUNDS}.")
        rounds = 1
    jobs = []
    read_instead: dict[str, str] = {}
    for stage in STAGES:
        section = values.get(stage.name) or {}
        if not isinstance(section, Mapping):
            problems.append(f"`{stage.name}` is {section!r}; it must hold `key: value` lines.")
            continue
        if stage.methods and "method" in section:
            section = dict(section)
            name, names = section.pop("method"), [method.name for method in stage.methods]
            if name not in names:
                problems.append(f"`{stage.name}`: {unknown_choice('method', name, names)}")
                continue
            stage = stage if name == names[0] else stage.by(name)
        inherited = values.get(stage.inherits or "") or {}
        for step in stage.steps:
            inputs = {key: read_instead.get(folder, folder) for key, folder in step.inputs.items()}
            step = replace(step, inputs=inputs)
            try:
                config = _configure(stage, step, section, inherited, seed, run_dir)
                jobs.append(Job(stage, step, config, run_dir / step.folder))
            except ConfigError as error:
                problems += [f"`{stage.name}`: {text}" for text in error.problems]
        read_instead |= {
            step.instead_of: step.folder for step in stage.steps if step.instead_of and stage.name in values
        }
    jobs = _only_wanted(jobs, values)
    problems += _shared_networks(jobs)
    if problems:
        raise ConfigError(title, dict.fromkeys(problems))
    first, last = jobs, jobs
    for number in range(2, rounds + 1):
        last = next_round(first, last, number, run_dir)
        jobs = jobs + last
    return jobs


def _configure(
    stage: Stage, step: Step, section: Mapping[str, Any], inherited: Any, seed: int, run_dir: Path
) -> StageConfig:
    config_class: type[StageConfig] = load(stage.settings)
    known = [item.name for item in fields(config_class) if item.name not in step.fixed]
    parts = {other.part for other in stage.steps} if len(stage.steps) > 1 else set()
    own = section.get(step.part, {}) if parts else {}
    if not isinstance(own, Mapping):
        raise ConfigError(stage.name, [f"`{step.part}` is {own!r}; it must hold `key: value` lines."])
    unknown = [unknown_key(key, [*known, *sorted(parts)]) for key in section if key not in {*known, *parts}]
    unknown += [unknown_key(key, known) for key in own if key not in known]
    given = {
        **(inherited if isinstance(inherited, Mapping) else {}),
        **{name: str(run_dir / folder) for name, folder in step.inputs.items()},
        **step.defaults,
        "seed": stage.seed(seed) + step.seed_offset,
        **{key: value for key, value in section.items() if key not in parts},
        **own,
        **step.fixed,
    }
    try:
        config = build(config_class, {key: value for key, value in given.items() if key in {*known, *step.fixed}})
    except ConfigError as error:
        raise ConfigError(stage.name, [*unknown, *error.problems]) from error
    if unknown:
        raise ConfigError(stage.name, unknown)
    return config


def _only_wanted(jobs: list[Job], values: Mapping[str, Any]) -> list[Job]:
    """Without the steps that no other reads; the steps beside one that is read get their other defaults."""
    kept: list[Job] = []
    read: set[str] = set()
    for job in reversed(jobs):
        if job.step.wanted_as is None or str(job.folder) in read:
            kept.insert(0, job)
            read |= {str(value) for name, value in vars(job.config).items() if name in job.step.inputs}
    for optional in [job for job in kept if job.step.wanted_as is not None]:
        for index, job in enumerate(kept):
            if job.stage is optional.stage and job is not optional:
                section = values.get(job.stage.name) or {}
                chosen = {*section, *(section.get(job.step.part) or {})}
                defaults = {key: value for key, value in optional.step.beside.items() if key not in chosen}
                kept[index] = replace(job, config=replace(job.config, **defaults))
    return kept


def _shared_networks(jobs: list[Job]) -> list[str]:
    """Whoever watches another must not share its network, and with it its blind spots."""
    configs = {job.step.folder: job.config for job in jobs}
    found = []
    for stage, names, setting in (
        ("graders", ("grader", "judge"), "architecture"),
        ("reward", ("reward", "held_out_reward"), "encoder"),
    ):
        used = [getattr(configs.get(name), setting, None) for name in names]
        if used[0] is not None and used[0] == used[1]:
            found.append(
                f"`{stage}`: {names[0]} and {names[1]} both have `{setting}: {used[0]}`; give `{names[1]}` another."
            )
    return found


def merge(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `overrides` on top, section by section."""
    merged = dict(values)
    for key, value in overrides.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def recipe(name: str, minutes: float | None = None) -> dict[str, Any]:
    """Read a recipe of the package, with the counts in `FLOORS` scaled from the minutes it is made for to `minutes`.

    Deterministic: no clock is read, so that a recipe gives the same numbers on a slower machine, only later.
    """
    values = read_yaml(RECIPES / f"{name}.yaml")
    return values if minutes is None else _scale(values, minutes / values["minutes"])


def _scale(values: Mapping[str, Any], factor: float) -> dict[str, Any]:
    scaled: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            scaled[key] = _scale(value, factor)
        elif key in FLOORS and isinstance(value, int):
            scaled[key] = max(min(FLOORS[key], value), round(value * factor))
        else:
            scaled[key] = value
    return scaled


# What it is made from.


def _key(job: Job, contents: Mapping[str, str]) -> str:
    """Hash of all that decides what a step makes; the run directory's own place is no part of it."""
    config = {name: value for name, value in asdict(job.config).items() if name not in job.config.incidental}
    made = {str(job.run_dir / folder): folder for folder in contents}
    inputs: dict[str, str] = {}
    for name in (*job.step.inputs, *job.stage.files):
        if name not in config:
            continue  # a method without this input
        listed = isinstance(config[name], list)
        if listed and name in job.stage.files:
            inputs |= {f"{name} {source}": _held(weighted_source(source)[0]) or "" for source in config[name]}
            continue
        values = config[name] if listed else [config[name]]
        for value in values:
            held = contents[made[value]] if value in made else _held(value or "")
            if held is not None:
                inputs[name if len(values) == 1 else f"{name} {made.get(value, value)}"] = held
        folders = [made.get(value, value) for value in values]
        config[name] = folders[0] if len(folders) == 1 else folders
    entry = " ".join([job.stage.entry, job.stage.method]).rstrip()
    return fingerprint({"entry": entry, "config": config, "inputs": inputs, "version": _version()})


def _held(source: str) -> str | None:
    """What a file, a folder or the file of a reward function's module holds now; None if there is none."""
    path: Path | None = Path(source)
    if is_function(source):
        module = source.partition(":")[0].replace(".", "/")
        files = (Path(folder, module + ending) for folder in (*sys.path, "") for ending in (".py", "/__init__.py"))
        path = next((file for file in files if file.is_file()), None)
    return signature(path) if source and path is not None and path.exists() else None


@cache
def _version() -> str:
    return library_versions()["pathalign"]


# Doing it.


@dataclass(frozen=True)
class StepResult:
    """What became of one step: `status` is `made`, `kept` or `taken` from another run.

    `wall_s` and `peak_rss_mb` are of when it was made.
    """

    stage: str
    folder: Path
    status: str
    wall_s: float
    peak_rss_mb: float


def execute(
    jobs: list[Job],
    run_dir: Path,
    start: str | None = None,
    until: str | None = None,
    new_grades: bool = False,
    reuse: Path | None = None,
) -> list[StepResult]:
    """Make all folders that are not there yet, or were made from something else.

    Args:
        jobs: All jobs, from `plan`.
        run_dir: Directory of the folders; one process at a time may work in it.
        start: Stage that is run in any case, as all after it are; in the last round that has it.
        until: Last stage that is run, in the last round that has it.
        new_grades: Whether to look for grades that have come since they were taken, each time that it is asked for.
        reuse: Folder of other runs: what one of them made from the same settings and inputs is linked to, and what one
            of them is making now is waited for.

    Raises:
        ConfigError: If there is no such stage, or `until` comes before `start`.
        InputError: If another process works in `run_dir`, or a stage cannot use its input.
    """
    names = stage_names()
    problems = [unknown_key(name, names) for name in (start, until) if name is not None and name not in names]
    if not problems and start and until and names.index(until) < names.index(start):
        problems = [f"`{until}` comes before `{start}`; the order is {', '.join(names)}."]
    if problems:
        raise ConfigError("Stages", problems)
    first = _places(jobs, start)[0] if start else len(jobs)
    jobs = jobs[: _places(jobs, until)[-1] + 1] if until else jobs
    with locked(run_dir):
        ledger = Ledger(run_dir)
        if start:
            ledger.force(start, [job.step.folder for job in jobs[first:]])
        held = _held_by_graders(jobs, ledger)
        contents: dict[str, str] = {}
        results = []
        for number, job in enumerate(jobs, 1):
            place = f"[{number}/{len(jobs)}]"
            look = new_grades and job.stage.name == "grade"
            others = None if start and number > first else reuse  # what is asked for is made, not taken over
            key = _key(job, contents)
            with shared(others, key):
                results.append(_execute(job, key, place, ledger, contents, job.step.folder in held, look, others))
        ledger.forced_from = None
        ledger.save()
    return results


def _places(jobs: list[Job], stage: str) -> list[int]:
    """Where the steps of a stage stand in the last round that has it."""
    last = max((job.round for job in jobs if job.stage.name == stage), default=1)
    return [place for place, job in enumerate(jobs) if job.stage.name == stage and job.round == last]


def _held_by_graders(jobs: list[Job], ledger: Ledger) -> set[str]:
    """Folders that candidates rest on which experts may have seen, and these: other images would be without grades."""
    by_folder = {job.step.folder: job for job in jobs}
    given = [getattr(job.config, "candidates", None) for job in jobs if job.stage.method == PULL]
    waiting = [
        name
        for name, job in by_folder.items()
        if str(job.folder) in given and name in ledger.steps and (job.folder.parent / STUDY).is_file()
    ]
    held: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in by_folder and name not in held:
            held.add(name)
            waiting += by_folder[name].step.inputs.values()
    return held


def _execute(
    job: Job,
    key: str,
    place: str,
    ledger: Ledger,
    contents: dict[str, str],
    held: bool = False,
    again: bool = False,
    reuse: Path | None = None,
) -> StepResult:
    """Make a folder, or keep it if it is as it was made; one of `again` is made anew, and its old state known if that
    fails.
    """
    name = job.step.folder
    kept = None if again else ledger.content(job, key) or (ledger.content(job) if held else None)
    taken = ledger.take_over(job, key, run_dirs(reuse)) if reuse and kept is None and not again else None
    if kept is not None and ledger.steps[name]["key"] != key:
        why = "kept, though settings or inputs have changed: images that graders have rest on it"
        say(f"{place} {job.label}: {why} (another `--output-dir` starts afresh)")
        contents[name] = kept
    elif kept is not None:
        say(f"{place} {job.label}: unchanged, not run again")
        contents[name] = kept
    elif taken is not None:
        say(f"{place} {job.label}: made in another run, taken from there")
        contents[name] = taken
    else:
        say(f"{place} {job.label} -> {job.folder}")
        ledger.begin(job, key)
        started = time.monotonic()
        load(job.stage.entry)(job.config, job.folder)
        gc.collect()  # A trainer's networks hang in reference cycles; the next stage needs their memory
        contents[name] = ledger.finish(job, key, time.monotonic() - started)
        say(f"{place} {job.label}: done in {time.monotonic() - started:.0f} s")
    entry = ledger.steps[name]
    status = "kept" if kept is not None else "taken" if taken is not None else "made"
    return StepResult(job.stage.name, job.folder, status, entry["wall_s"], entry["peak_rss_mb"])
