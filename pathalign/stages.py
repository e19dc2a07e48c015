"""The table of stages: what each is called, which function it is, and which earlier folders it reads.

    data -> pretrain -> graders -> generate -> grade -> feedback -> select -> reward -> align -> control -> sample
         -> evaluate

A stage has one step or several (`graders` fits a grader and a judge), and each step makes one folder; `align` has a
choice of methods. Functions and settings are named here and imported when they are needed: help waits for no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from pathalign.settings.pull import STUDY

SEEDS_PER_RUN = 1_000_000  # Image i has seed `seed + i`: runs whose seeds differ by 1 must not share any
CANDIDATE_SEED = 500_000  # Graded images must not be the ones that are measured
MOST_ROUNDS = 10
SEEDS_PER_ROUND = 50_000  # so that all rounds' candidates fit below the next run's seeds


@dataclass(frozen=True)
class Step:
    """One folder of a run.

    Attributes:
        folder: Name below the run directory.
        inputs: Setting -> folder of the earlier step that it is filled with; one that a method lacks is left out.
        defaults: Settings whose defaults are others here.
        fixed: Settings that are not the user's to choose here.
        seed_offset: Added to the stage's seed.
        wanted_as: Setting of a later step that the folder is made for: if none reads it from here, it is not made.
        beside: Defaults of the stage's other steps where this one is made.
        instead_of: Folder in whose place later steps read this one, where the configuration has its stage's section.
        from_last: Setting -> what of the round before it is filled with, from the second round on. A step that has any
            is made in every round, with new seeds; see `rounds.py`.
    """

    folder: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    seed_offset: int = 0
    wanted_as: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    instead_of: str | None = None
    from_last: Mapping[str, str] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """Name of the step within a stage of several, also of its own settings in the stage's section."""
        return self.folder.rpartition("/")[2].removeprefix("samples_")


@dataclass(frozen=True)
class Method:
    """One way to do a stage: its name, its `module:function`, and the `module:class` of its settings."""

    name: str
    entry: str
    settings: str


@dataclass(frozen=True)
class Stage:
    """What the user knows by one name, and configures in one section.

    Attributes:
        name: Its name in `--from`, `--until` and the configuration.
        entry: `module:function` that makes an artefact from a configuration and a folder.
        settings: `module:class` of that configuration.
        steps: The folders it makes, in order.
        files: Further settings that may name files, folders or reward functions of the user's.
        inherits: Stage whose section gives the values that this one's section lacks.
        seed: The configuration's seed from the run's.
        methods: What `method:` in its section chooses from, if there is a choice; `entry` and `settings` are those of
            the one that is chosen, at first the first.
        method: Name of that method; may be empty for the first one, which then was there before there was a choice.
    """

    name: str
    entry: str
    settings: str
    steps: tuple[Step, ...]
    files: tuple[str, ...] = ()
    inherits: str | None = None
    seed: Callable[[int], int] = int
    methods: tuple[Method, ...] = ()
    method: str = ""

    def by(self, name: str) -> Stage:
        """This stage, done by the method of that name, which must be one of `methods`."""
        method = next(method for method in self.methods if method.name == name)
        return replace(self, method=name, entry=method.entry, settings=method.settings)


METHODS = (
    Method(
        "reward-weighted",
        "pathalign.trainers.reward_weighted:align",
        "pathalign.settings.reward_weighted:RewardWeightedConfig",
    ),
    Method("ddpo", "pathalign.trainers.ddpo:align", "pathalign.settings.ddpo:DDPOConfig"),
    Method("grpo", "pathalign.trainers.ddpo:align", "pathalign.settings.ddpo:GRPOConfig"),
    Method("draft", "pathalign.trainers.draft:align", "pathalign.settings.draft:DraftConfig"),
    Method("dpo", "pathalign.trainers.dpo:align", "pathalign.settings.dpo:DPOConfig"),
    Method("concepts", "pathalign.trainers.concepts:align", "pathalign.settings.concepts:ConceptsConfig"),
)
PULL = "pull"  # the method by which experts grade
GRADE_METHODS = (
    Method("simulate", "pathalign.grading.simulated:grade", "pathalign.settings.grade:GradeConfig"),
    Method(PULL, "pathalign.grading.commission:collect", "pathalign.settings.pull:CollectConfig"),
)
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
        (Step("candidates", {"model": "base"}, from_last={"adapter": "adapter"}),),
        seed=lambda seed: seed * SEEDS_PER_RUN + CANDIDATE_SEED,
    ),
    Stage(
        "grade",
        GRADE_METHODS[0].entry,
        GRADE_METHODS[0].settings,
        (
            Step(
                "grades",
                {"candidates": "candidates", "grader": "grader", "references": "data"},
                {"min_grades": 100},
                from_last={"study": STUDY},
            ),
        ),
        methods=GRADE_METHODS,
    ),
    Stage(
        "feedback",
        "pathalign.feedback:build",
        "pathalign.settings.feedback:FeedbackConfig",
        (Step("feedback", {"candidates": "candidates", "grades": "grades"}),),
    ),
    Stage(
        "select",
        "pathalign.trainers.selection:select",
        "pathalign.settings.select:SelectConfig",
        (Step("selection", {"feedback": "feedback", "data": "data"}, wanted_as="feedback", instead_of="feedback"),),
    ),
    Stage(
        "reward",
        "pathalign.trainers.reward:train_reward",
        "pathalign.settings.reward:RewardConfig",
        (
            Step("reward", {"feedback": "feedback", "data": "data"}),
            Step(
                "held_out_reward",
                {"feedback": "feedback", "data": "data"},
                # Another network and other graded images. Of 1,040 on real cells (two seeds) half cost no ROC AUC:
                # 0.88 and 0.85 with all, 0.90 and 0.86 with half. This network on the other half: 0.84 and 0.84.
                {"encoder": "densenet", "grades": "odd"},
                seed_offset=1,
                wanted_as="held_out_reward_model",
                beside={"grades": "even"},
            ),
        ),
    ),
    Stage(
        "align",
        METHODS[0].entry,
        METHODS[0].settings,
        (
            Step(
                "adapter",
                {
                    "base_model": "base",
                    "reward_model": "reward",
                    "data": "data",
                    "feedback": "feedback",
                    "held_out_reward_model": "held_out_reward",
                    "judge": "judge",
                },
            ),
        ),
        files=("other_rewards",),
        methods=METHODS,
        method=METHODS[0].name,
    ),
    Stage(
        "control",
        *_PRETRAIN,
        (Step("control", {"initial_model": "base", "data": "data"}, wanted_as="model"),),
        inherits="pretrain",
    ),
    Stage(
        "sample",
        *_GENERATE,
        (
            Step("samples_before", {"model": "base"}),
            Step("samples_after", {"model": "base", "adapter": "adapter"}),
            Step("samples_control", {"model": "control"}, wanted_as="control"),
            Step(
                "samples_best_of_n",
                {"model": "base", "reward_model": "reward"},
                {"best_of": 4},
                wanted_as="best_of_n",
            ),
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
                    "adapter": "adapter",
                },
            ),
        ),
    ),
)
# No stage of a run: it is done beside it, on sets of any size.
SCORE = Stage("score", "pathalign.scoring:score_set", "pathalign.settings.score:ScoreConfig", ())


def load(reference: str) -> Any:
    """Import `module:name`."""
    module, _, name = reference.partition(":")
    return getattr(import_module(module), name)


def stage_names() -> list[str]:
    """Names of all stages in their order."""
    return [stage.name for stage in STAGES]
