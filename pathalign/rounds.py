"""Jobs of a run, and those of its further rounds: draw with the last round's adapter, grade, learn from all grades.

    round 1:  base           -> candidates -> grades -> feedback ------------> reward -> adapter
    round 2:  base + adapter -> candidates -> grades -> feedback of both ----> reward -> adapter

Each round's adapter is trained on the base anew, with a reward model that has learnt from all grades so far: what is
loaded in the end is one base and one adapter. What does not depend on grades, such as the base, is made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pathalign.config import StageConfig
from pathalign.stages import SEEDS_PER_ROUND, Stage, Step


@dataclass(frozen=True)
class Job:
    """A step with its configuration and the folder it makes; `round` counts from 1."""

    stage: Stage
    step: Step
    config: StageConfig
    folder: Path
    round: int = 1

    @property
    def run_dir(self) -> Path:
        """Directory that the step's folder is named from."""
        return self.folder.parents[len(Path(self.step.folder).parts) - 1]

    @property
    def label(self) -> str:
        """Stage, which part of it where it has several, and which round from the second on."""
        alone = len(self.stage.steps) == 1 or self.step.part == self.stage.name
        name = self.stage.name if alone else f"{self.stage.name} ({self.step.part})"
        return name if self.round == 1 else f"round {self.round}, {name}"


def next_round(first: Sequence[Job], last: Sequence[Job], number: int, run_dir: Path) -> list[Job]:
    """Jobs of round `number`, from 2: the candidates, and all that depends on them.

    Args:
        first: Jobs of the first round, with the settings that hold for every round.
        last: Jobs of the round before.
        number: Of the round.
        run_dir: Directory of the run; the round's folders are made in `round-<number>/` below it.

    Raises:
        ConfigError: If a seed becomes one that a stage does not take.
    """
    before = {Path(job.step.folder).name: job for job in last}
    jobs: dict[str, Job] = {}
    for job in first:
        inputs = dict(job.step.inputs)
        values: dict[str, Any] = {}
        for name, folder in job.step.inputs.items():
            own, made = str(run_dir / folder), jobs.get(folder)
            value = getattr(job.config, name, None)
            if made is not None and value == own:
                inputs[name], values[name] = made.step.folder, str(made.folder)
            elif made is not None and value == [own]:  # all rounds' together
                values[name] = [*getattr(before[job.step.folder].config, name), str(made.folder)]
        for name, source in job.step.from_last.items():
            if hasattr(job.config, name):
                home = last[0].folder.parent if number > 2 else run_dir
                inputs[name] = (home / source).relative_to(run_dir).as_posix()
                values[name] = str(home / source)
        if not values and not job.step.from_last:
            continue
        if job.step.from_last:
            values["seed"] = getattr(job.config, "seed", 0) + (number - 1) * SEEDS_PER_ROUND
        known = {name: value for name, value in values.items() if hasattr(job.config, name)}
        step = replace(job.step, folder=f"round-{number}/{job.step.folder}", inputs=inputs)
        folder_path = run_dir / step.folder
        jobs[job.step.folder] = Job(job.stage, step, replace(job.config, **known), folder_path, number)
    return list(jobs.values())
