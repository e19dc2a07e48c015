"""What an experiment is: its question, its arms, its seeds, and what is measured; read from a YAML file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pathalign.config import ConfigError, read_yaml, unknown_choice, unknown_key
from pathalign.rounds import Job
from pathalign.stages import stage_names
from pathalign.workflow import RECIPES, merge, plan, recipe

FOLDER = RECIPES / "experiments"
CONFIG_NAME = "config.yaml"
SETS = ("after", "before", "control", "best_of_n", "real")
OPTIONS = {
    "evaluation": (),
    "reward_ranking": (),
    "checks": (),
    "rare_class": ("class", "added"),
    "concepts": ("images", "guidance_scale"),
}
NEED_EVALUATION = ("evaluation", "rare_class", "concepts")
MEASURES = tuple(OPTIONS)
BASES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
TRAINED = ("pretrain", "align", "control")  # in bf16 where the device computes in it, unless settings say otherwise
FEATURES = "features"
NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Arm:
    """One row of an experiment's table.

    Attributes:
        name: Key in the recipe, also the name of its folder.
        title: What readers see.
        settings: What it changes of the recipe; an arm without any is the recipe itself.
        of: Name of the arm in whose run it is found: its own, or the one whose evaluation holds `set`.
        set: Which set of that evaluation it is.
        until: Last stage of its run.
        x: Place on the horizontal axis, where the figure is a curve.
        line: Name of the curve that it lies on.
    """

    name: str
    title: str
    settings: dict[str, Any]
    of: str
    set: str = "after"
    until: str = "evaluate"
    x: float | None = None
    line: str = ""

    @property
    def runs(self) -> bool:
        """Whether it has a run of its own."""
        return self.of == self.name


@dataclass(frozen=True)
class Experiment:
    """A study, see `load`.

    Attributes:
        name: Of its folder.
        title: Of its page.
        question: In one sentence.
        base: Recipe of the package that every arm starts from.
        seeds: Of the runs; each arm is run with each of them.
        settings: What all arms change of it.
        arms: At least two, the first with a run.
        measure: Where the figures come from, one of `MEASURES`.
        show: Names of the figures in the table, the first being the one that the figure shows.
        against: Name of the arm that the others are compared with, seed by seed.
        axis: Title of the horizontal axis, where the figure is a curve.
        notes: What readers must know to judge the result.
        options: What the measure needs to know besides.
    """

    name: str
    title: str
    question: str
    base: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    arms: tuple[Arm, ...]
    measure: str
    show: tuple[str, ...]
    against: str
    axis: str
    notes: tuple[str, ...]
    options: dict[str, Any]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def values(self, arm: Arm, seed: int, data: str | None, minutes: float | None) -> dict[str, Any]:
        """What `pathalign run` gets for one arm and one seed.

        Args:
            arm: With a run of its own.
            seed: Of the run.
            data: Real images, in place of the recipe's.
            minutes: Scales the recipe's steps and images; None leaves them.
        """
        values = recipe(self.base, minutes)
        changed = merge(self.settings, arm.settings)
        method = (changed.get("align") or {}).get("method")
        if method not in (None, (values.get("align") or {}).get("method")):
            values = {**values, "align": {}}  # the recipe's settings are those of its own method
        trained: dict[str, Any] = {stage: {"mixed_precision": "auto"} for stage in TRAINED if stage in values}
        values = merge(values, merge(trained, changed))
        if arm is not self.arms[0]:  # what is compared with is measured once
            values = merge({"evaluate": {"control": None, "best_of_n": None}}, values)
        return merge(values, {"seed": seed, "data": {"source": data} if data else {}})

    def jobs(self, arm: Arm, seed: int, run_dir: Path, data: str | None, minutes: float | None) -> list[Job]:
        """All steps of one run; checks every setting.

        Raises:
            ConfigError: With everything that is wrong.
        """
        title = f"Arm {arm.name!r} of {self.name}"
        return plan(self.values(arm, seed, data, minutes), run_dir, title=title)


def features_of(output_dir: Path) -> Path:
    """Where all experiments of a directory keep the features of their images."""
    return output_dir / FEATURES


def names() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def catalogue(scale: str = "cpu") -> list[dict[str, Any]]:
    """Name, question, seeds and number of runs of each experiment of the package."""
    found = [load(name, scale) for name in names()]
    return [
        {
            "name": one.name,
            "title": one.title,
            "question": one.question,
            "seeds": list(one.seeds),
            "runs": len(one.seeds) * sum(arm.runs for arm in one.arms),
        }
        for one in found
    ]


def load(source: str, scale: str = "cpu") -> Experiment:
    """Read an experiment.

    Args:
        source: Name of one that comes with the package, or a YAML file. The file has `title`, `question`, `base`,
            `seeds`, `settings`, `arms` (name -> `title`, `settings`, `of`, `set`, `until`, `x`, `line`), `measure`,
            `show`, `against`, `axis`, `notes` and `options`; `full` holds what is other at that scale.
        scale: `cpu`, for two cores and an evening, or `full`.

    Raises:
        ConfigError: With everything that is wrong in it.
    """
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        if source not in names():
            raise ConfigError("Experiments", [unknown_choice("NAME", source, names()) + " Or give a YAML file."])
        path = FOLDER / f"{source}.yaml"
    values = read_yaml(path)
    full = values.pop("full", None) or {}
    return _build(path.stem, merge(values, full if scale == "full" else {}), str(path))


def _build(name: str, values: Mapping[str, Any], title: str) -> Experiment:
    known = [item.name for item in fields(Experiment) if item.name != "name"]
    problems = [unknown_key(key, [*known, "full"]) for key in values if key not in known]
    problems += [f"`{key}` is missing." for key in ("title", "question", "arms", "show") if not values.get(key)]
    if problems:
        raise ConfigError(title, problems)
    written = values["arms"].values() if isinstance(values["arms"], Mapping) else ["no mapping"]
    if not all(isinstance(arm, Mapping | None) for arm in written):
        raise ConfigError(title, ["`arms` must hold `name: {title: ..., settings: ...}` lines, one for each arm."])
    arms = [_arm(key, entry or {}, problems) for key, entry in values["arms"].items()]
    running = [arm.name for arm in arms if arm.runs]
    if not arms[0].runs:
        problems.append(f"the first arm, `{arms[0].name}`, must have a run of its own; it has `set: {arms[0].set}`.")
    arms = [arm if arm.of else replace(arm, of=arms[0].name) for arm in arms]
    problems += [
        f"`arms.{arm.name}.of`: {unknown_choice('of', arm.of, running)}" for arm in arms if arm.of not in running
    ]
    against, base = values.get("against", arms[0].name), values.get("base", "demo_real")
    measured, options = values.get("measure", MEASURES[0]), values.get("options") or {}
    for key, value, choices in (
        ("measure", measured, MEASURES),
        ("base", base, BASES),
        ("against", against, [arm.name for arm in arms]),
    ):
        if value not in choices:
            problems.append(unknown_choice(key, value, choices))
    for key in ("show", "notes"):
        if not isinstance(values.get(key, []), list):
            problems.append(f"`{key}` is {values[key]!r}; give a list.")
    if measured in OPTIONS and set(options) != set(OPTIONS[measured]):
        wanted = ", ".join(OPTIONS[measured]) or "nothing"
        problems.append(f"`options` has {', '.join(options) or 'nothing'}; the measure {measured} wants {wanted}.")
    if measured in NEED_EVALUATION:
        problems += [
            f"`arms.{arm.name}.until` is {arm.until!r}; the measure {measured} needs `evaluate`."
            for arm in arms
            if arm.runs and arm.until != "evaluate"
        ]
    if name == FEATURES:
        problems.append(f"an experiment cannot be called {FEATURES}: the folder of that name holds image features.")
    seeds = values.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(not isinstance(seed, int) or seed < 0 for seed in seeds):
        problems.append(f"`seeds` is {seeds!r}; give a list of whole numbers from 0.")
        seeds = [0]
    if problems:
        raise ConfigError(title, problems)
    return Experiment(
        name=name,
        title=values["title"],
        question=values["question"],
        base=base,
        seeds=tuple(dict.fromkeys(seeds)),
        settings=values.get("settings") or {},
        arms=tuple(arms),
        measure=measured,
        show=tuple(values["show"]),
        against=against,
        axis=values.get("axis", ""),
        notes=tuple(values.get("notes") or ()),
        options=options,
    )


def _arm(name: str, entry: Mapping[str, Any], problems: list[str]) -> Arm:
    """One arm; `of` is empty where it is the first arm's."""
    known = [item.name for item in fields(Arm) if item.name != "name"]
    problems += [f"`arms.{name}`: {unknown_key(key, known)}" for key in entry if key not in known]
    if not NAME.fullmatch(str(name)):
        problems.append(f"`arms` has {name!r}; use small letters, digits and hyphens, it becomes a folder.")
    chosen, until = entry.get("set", SETS[0]), entry.get("until", "evaluate")
    for key, value, choices in (("set", chosen, SETS), ("until", until, stage_names())):
        if value not in choices:
            problems.append(f"`arms.{name}`: {unknown_choice(key, value, choices)}")
    own = "set" not in entry and "of" not in entry
    return Arm(
        name=str(name),
        title=str(entry.get("title", name)),
        settings=entry.get("settings") or {},
        of=str(name) if own else str(entry.get("of", "")),
        set=chosen,
        until=until,
        x=entry.get("x"),
        line=str(entry.get("line", "")),
    )
