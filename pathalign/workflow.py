"""All stages in their order, run in one directory by `pathalign run` and `pathalign demo`.

A step is not run again while its settings and the contents of its inputs are what they were when its folder was made;
`stages.json` in the run directory keeps account of that. Nothing here imports torch before a step runs.
"""

from __future__ import annotations

import gc
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from pathalign.artefacts import fingerprint, partial_dir, write_atomically
from pathalign.config import ConfigError, StageConfig, build, read_yaml, unknown_choice, unknown_key
from pathalign.progress import say
from pathalign.schema import InputError, library_versions
from pathalign.settings.adapter import is_function, weighted_source
from pathalign.stages import STAGES, Stage, Step, load, stage_names

TOP_KEYS = ("output_dir", "seed", "minutes")
LEDGER_NAME = "stages.json"
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


@dataclass(frozen=True)
class Job:
    """A step with its configuration and the folder it makes."""

    stage: Stage
    step: Step
    config: StageConfig
    folder: Path

    @property
    def label(self) -> str:
        """Stage, and which part of it where it has several."""
        alone = len(self.stage.steps) == 1 or self.step.part == self.stage.name
        return self.stage.name if alone else f"{self.stage.name} ({self.step.part})"


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
    seed = values.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        problems.append(f"`seed` is {seed!r}; it must be a whole number from 0.")
        seed = 0
    jobs = []
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
            stage = stage.by(name)
        inherited = values.get(stage.inherits or "") or {}
        for step in stage.steps:
            try:
                config = _configure(stage, step, section, inherited, seed, run_dir)
                jobs.append(Job(stage, step, config, run_dir / step.folder))
            except ConfigError as error:
                problems += [f"`{stage.name}`: {text}" for text in error.problems]
    jobs = _only_wanted(jobs, values)
    problems += _shared_networks(jobs)
    if problems:
        raise ConfigError(title, dict.fromkeys(problems))
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
    read = {str(value) for job in jobs for name, value in vars(job.config).items() if name in job.step.inputs}
    kept = [job for job in jobs if job.step.wanted_as is None or str(job.folder) in read]
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


# What has been done.


class Ledger:
    """`stages.json`: from what each folder of a run directory was made, and what it held then."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LEDGER_NAME
        self.steps: dict[str, dict[str, Any]] = {}
        self.in_progress: dict[str, str] = {}
        self.forced_from: str | None = None
        if self.path.is_file():
            try:
                content = json.loads(self.path.read_text())
                self.steps, self.in_progress = content["steps"], content["in_progress"]
                self.forced_from = content["forced_from"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path} cannot be read; delete it, and every stage is run again.") from error

    def save(self) -> None:
        """Write the file, whole or not at all."""
        content = {"steps": self.steps, "in_progress": self.in_progress, "forced_from": self.forced_from}
        write_atomically(self.path, json.dumps(content, indent=2) + "\n")

    def force(self, stage: str) -> None:
        """Forget `stage` and all after it, once: the same command after an interruption goes on instead."""
        if self.forced_from != stage:
            for later in STAGES[stage_names().index(stage) :]:
                for step in later.steps:
                    self.steps.pop(step.folder, None)
                    self.in_progress.pop(step.folder, None)
            self.forced_from = stage
            self.save()

    def content(self, job: Job, key: str) -> str | None:
        """Fingerprint of the folder of `job` if it was made from `key` and holds what it held then, else None."""
        entry = self.steps.get(job.step.folder)
        if entry is None or entry["key"] != key or not job.folder.is_dir():
            return None
        if _signature(job.folder) != entry["signature"] and fingerprint(job.folder) != entry["content"]:
            return None
        return str(entry["content"])

    def begin(self, job: Job, key: str) -> None:
        """Note that `job` is being made; what another configuration left half made is removed."""
        if self.in_progress.get(job.step.folder) != key:
            shutil.rmtree(partial_dir(job.folder), ignore_errors=True)
        self.in_progress[job.step.folder] = key
        self.save()

    def finish(self, job: Job, key: str, wall_s: float) -> str:
        """Note that the folder of `job` is complete. Returns its fingerprint."""
        content = fingerprint(job.folder)
        self.in_progress.pop(job.step.folder, None)
        self.steps[job.step.folder] = {
            "key": key,
            "content": content,
            "signature": _signature(job.folder),
            "wall_s": round(wall_s, 2),
            "peak_rss_mb": round(peak_rss_mb(), 1),
        }
        self.save()
        return content


def _signature(path: Path) -> str:
    """Hash of names, sizes and times of all files below `path`: says cheaply that nothing has changed."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file.relative_to(path)), file.stat()) for file in files if file.is_file()]
    return fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])


def _key(job: Job, contents: Mapping[str, str]) -> str:
    """Hash of all that decides what a step makes; the run directory's own place is no part of it."""
    config, inputs = asdict(job.config), {}
    for name in (*job.step.inputs, *job.stage.files):
        if name not in config:
            continue  # a method without this input
        folder = job.step.inputs.get(name)
        if folder is not None and config[name] == str(job.folder.with_name(folder)):
            config[name], inputs[name] = folder, contents[folder]
        elif isinstance(config[name], list):
            inputs |= {f"{name} {source}": _held(weighted_source(source)[0]) or "" for source in config[name]}
        elif (held := _held(config[name] or "")) is not None:
            inputs[name] = held
    entry = " ".join([job.stage.entry, job.stage.method]).rstrip()
    return fingerprint({"entry": entry, "config": config, "inputs": inputs, "version": _version()})


def _held(source: str) -> str | None:
    """What a file, a folder or the file of a reward function's module holds now; None if there is none."""
    path: Path | None = Path(source)
    if is_function(source):
        module = source.partition(":")[0].replace(".", "/")
        files = (Path(folder, module + ending) for folder in (*sys.path, "") for ending in (".py", "/__init__.py"))
        path = next((file for file in files if file.is_file()), None)
    return _signature(path) if source and path is not None and path.exists() else None


@cache
def _version() -> str:
    return library_versions()["pathalign"]


# Doing it.


@dataclass(frozen=True)
class StepResult:
    """What became of one step: `status` is `made` or `kept`; `wall_s` and `peak_rss_mb` are of when it was made."""

    stage: str
    folder: Path
    status: str
    wall_s: float
    peak_rss_mb: float


def execute(jobs: list[Job], run_dir: Path, start: str | None = None, until: str | None = None) -> list[StepResult]:
    """Make all folders that are not there yet, or were made from something else.

    Args:
        jobs: All jobs, from `plan`.
        run_dir: Directory of the folders; one process at a time may work in it.
        start: Stage that is run in any case, as all after it are.
        until: Last stage that is run.

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
    last = names.index(until) if until else len(names) - 1
    jobs = [job for job in jobs if names.index(job.stage.name) <= last]
    with _locked(run_dir):
        ledger = Ledger(run_dir)
        if start:
            ledger.force(start)
        contents: dict[str, str] = {}
        results = [_execute(job, f"[{number}/{len(jobs)}]", ledger, contents) for number, job in enumerate(jobs, 1)]
        ledger.forced_from = None
        ledger.save()
    return results


def _execute(job: Job, place: str, ledger: Ledger, contents: dict[str, str]) -> StepResult:
    name, key = job.step.folder, _key(job, contents)
    kept = ledger.content(job, key)
    if kept is not None:
        say(f"{place} {job.label}: unchanged, not run again")
        contents[name] = kept
    else:
        say(f"{place} {job.label} -> {job.folder}")
        ledger.begin(job, key)
        started = time.monotonic()
        load(job.stage.entry)(job.config, job.folder)
        gc.collect()  # A trainer's networks hang in reference cycles; the next stage needs their memory
        contents[name] = ledger.finish(job, key, time.monotonic() - started)
        say(f"{place} {job.label}: done in {time.monotonic() - started:.0f} s")
    entry = ledger.steps[name]
    status = "made" if kept is None else "kept"
    return StepResult(job.stage.name, job.folder, status, entry["wall_s"], entry["peak_rss_mb"])


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout  # brings asyncio along, for which help need not wait

    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run_dir / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"Another pathalign run is working in {run_dir}. Wait until it ends, or choose another `--output-dir`."
        ) from error
    except OSError as error:
        raise InputError(f"Cannot write to {run_dir}: {error.strerror}. Choose another `--output-dir`.") from error
    try:
        yield
    finally:
        lock.release()


def peak_rss_mb() -> float:
    """Largest resident memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)
