"""The table of stages: what each is called, which function it is, and which earlier folders it reads.

    data -> pretrain -> graders -> generate -> grade -> feedback -> reward -> align -> control -> sample -> evaluate

A stage has one step or several (`graders` fits a grader and a judge), and each step makes one folder. Functions and
settings are named here and imported when they are needed: the command line's help does not wait for torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

SEEDS_PER_RUN = 1_000_000  # Image i has seed `seed + i`: runs whose seeds differ by 1 must not share any
CANDIDATE_SEED = 500_000  # Graded images must not be the ones that are measured


@dataclass(frozen=True)
class Step:
    """One folder of a run.

    Attributes:
        folder: Name below the run directory.
        inputs: Setting -> folder of the earlier step that it is filled with.
        defaults: Settings whose defaults are others here.
        fixed: Settings that are not the user's to choose here.
    """

    folder: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """Name of the step within a stage of several, also of its own settings in the stage's section."""
        return self.folder.removeprefix("samples_")


@dataclass(frozen=True)
class Stage:
    """What the user knows by one name, and configures in one section.

    Attributes:
        name: Its name in `--from`, `--until` and the configuration.
        entry: `module:function` that makes an artefact from a configuration and a folder.
        settings: `module:class` of that configuration.
        steps: The folders it makes, in order.
        files: Further settings that may name a file or folder of the user's.
        inherits: Stage whose section gives the values that this one's section lacks.
        seed: The configuration's seed from the run's.
    """

    name: str
    entry: str
    settings: str
    steps: tuple[Step, ...]
    files: tuple[str, ...] = ()
    inherits: str | None = None
    seed: Callable[[int], int] = int


_PRETRAIN = ("pathalign.trainers.pretrain:pretrain", "pathalign.settings.pretrain:PretrainConfig")
_GENERATE = ("pathalign.generate:generate", "pathalign.settings.generate:GenerateConfig")
STAGES: tuple[Stage, ...] = (
    Stage("data", "pathalign.data:prepare", "pathalign.settings.data:DataConfig", (Step("data"),), files=("source",)),
    Stage("pretrain", *_PRETRAIN, (Step("base", {"data": "data"}),)),
    Stage(
        "graders",
        "pathalign.grading.fitting:fit",
        "pathalign.settings.graders:GraderConfig",
        (
            Step("grader", {"data": "data"}, {"architecture": "resnet"}, {"role": "grader"}),
            Step("judge", {"data": "data"}, {"architecture": "regnet"}, {"role": "judge"}),
        ),
        files=("rubric",),
    ),
    Stage(
        "generate",
        *_GENERATE,
        (Step("candidates", {"model": "base"}),),
        seed=lambda seed: seed * SEEDS_PER_RUN + CANDIDATE_SEED,
    ),
    Stage(
        "grade",
        "pathalign.grading.simulated:grade",
        "pathalign.settings.grade:GradeConfig",
        (Step("grades", {"candidates": "candidates", "grader": "grader"}),),
    ),
    Stage(
        "feedback",
        "pathalign.feedback:build",
        "pathalign.settings.feedback:FeedbackConfig",
        (Step("feedback", {"candidates": "candidates", "grades": "grades"}),),
    ),
    Stage(
        "reward",
        "pathalign.trainers.reward:train_reward",
        "pathalign.settings.reward:RewardConfig",
        (Step("reward", {"feedback": "feedback", "data": "data"}),),
    ),
    Stage(
        "align",
        "pathalign.trainers.reward_weighted:align",
        "pathalign.settings.reward_weighted:RewardWeightedConfig",
        (Step("adapter", {"base_model": "base", "reward_model": "reward", "data": "data"}),),
    ),
    Stage("control", *_PRETRAIN, (Step("control", {"initial_model": "base", "data": "data"}),), inherits="pretrain"),
    Stage(
        "sample",
        *_GENERATE,
        (
            Step("samples_before", {"model": "base"}),
            Step("samples_after", {"model": "base", "adapter": "adapter"}),
            Step("samples_control", {"model": "control"}),
            Step("samples_best_of_n", {"model": "base", "reward_model": "reward"}, {"best_of": 4}),
        ),
        seed=lambda seed: seed * SEEDS_PER_RUN,
    ),
    Stage(
        "evaluate",
        "pathalign.evaluate:evaluate",
        "pathalign.settings.evaluate:EvaluateConfig",
        (
            Step(
                "evaluation",
                {
                    "data": "data",
                    "before": "samples_before",
                    "after": "samples_after",
                    "control": "samples_control",
                    "best_of_n": "samples_best_of_n",
                    "judge": "judge",
                    "grader": "grader",
                    "reward_model": "reward",
                    "feedback": "feedback",
                },
            ),
        ),
    ),
)


def load(reference: str) -> Any:
    """Import `module:name`."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def stage_names() -> list[str]:
    """Names of all stages in their order."""
    return [stage.name for stage in STAGES]
