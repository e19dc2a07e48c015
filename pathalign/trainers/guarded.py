"""Trainers that follow a reward, epoch by epoch, and are watched for reward hacking.

Every few epochs the averaged adapter draws images of the same seeds. A reward model that nothing is trained on scores
them too: when its mean turns while the trained reward does not, the policy has learned the reward model's mistakes.
Often it only stops rising while images get worse: kept is the earliest adapter that no later check clearly beats.

Source: over-optimization of a proxy reward, measured by one that is held out, arXiv:2210.10760.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pathalign.diffusion.loading import BaseModel
from pathalign.generate import sample, set_scheduler
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet, contact_sheet, to_pixel_values
from pathalign.progress import say
from pathalign.schema import InputError, RunRecord
from pathalign.settings.adapter import GuardedConfig, weighted_source
from pathalign.trainers.adapter import AdapterTrainer
from pathalign.trainers.rewards import (
    AsynchronousRewards,
    Reward,
    class_map,
    load_reward,
    no_gradient,
    require_finite_rewards,
    without_gradient,
)

Guarded = TypeVar("Guarded", bound=GuardedConfig)
# Below the seeds of reward-weighted rounds, and above those of candidates and of measured images of runs with seeds
# below 2,000: what a check sees is neither trained on nor measured.
FIRST_CHECK_SEED = 2**31 - 2**20
CLEARLY_BETTER = 1.0  # standard errors
SHEET_COLUMNS = 12
UNGUARDED = "No `held_out_reward_model`: nothing guards this run against reward hacking, only the reward is watched."


@dataclass(frozen=True)
class Check:
    """What was said of one check's images; row i of all checks has the same seed and class.

    Attributes:
        epoch: Epochs done before it.
        rewards: Shape `(n,)`, float32: what is trained on.
        held_out: Shape `(n,)`, float32; None without a held-out reward model.
        plausible: Shape `(n,)`, bool: the judge's verdicts; None without a judge.
    """

    epoch: int
    rewards: Tensor
    held_out: Tensor | None = None
    plausible: Tensor | None = None

    def figures(self) -> dict[str, float]:
        """Means by name; those of absent observers are left out."""
        columns = {"reward": self.rewards, "held_out_reward": self.held_out, "judge_share": self.plausible}
        return {name: float(values.double().mean()) for name, values in columns.items() if values is not None}


def best_of(checks: Sequence[Check]) -> Check:
    """The first check, until a later one's held-out reward is clearly better, and so on: of equals the earliest."""
    best = checks[0]
    for check in checks[1:]:
        assert check.held_out is not None and best.held_out is not None
        if significantly_below(best.held_out, check.held_out, CLEARLY_BETTER):
            best = check
    return best


def significantly_below(values: Tensor, reference: Tensor, standard_errors: float) -> bool:
    """Whether `values` are on average less than `reference`, beyond so many standard errors of the paired difference.

    Shapes `(n,)`, n > 1; row i of both belongs together.
    """
    difference = (values - reference).double()
    error = float(difference.std()) / len(difference) ** 0.5
    return float(difference.mean()) < -standard_errors * error


def reward_hacked(check: Check, best: Check, standard_errors: float) -> bool:
    """Whether the held-out reward lies below its best check, see `significantly_below`, and the reward does not."""
    assert check.held_out is not None and best.held_out is not None
    turned = significantly_below(check.held_out, best.held_out, standard_errors)
    return turned and check.figures()["reward"] >= best.figures()["reward"]


class GuardedTrainer(AdapterTrainer[Guarded]):
    """Epochs of acting, scoring and updating; a method adds `epoch`, and calls `rewards`.

    Raises:
        InputError: If the held-out reward model or the judge cannot be loaded or does not know a class, or the method
            needs the gradient of a reward that has none.
    """

    unit: ClassVar[str] = "epoch"
    shown: ClassVar[tuple[str, ...]] = ("reward",)
    follows_gradient: ClassVar[bool] = False  # whether `rewards` is differentiated

    def __init__(
        self,
        pipeline: BaseModel,
        reward_model: Reward,
        real: ImageSet,
        config: Guarded,
        folder: Path,
    ) -> None:
        names = pipeline.class_names
        if self.follows_gradient and (functions := without_gradient(reward_model)):
            raise InputError(no_gradient(functions))
        self.reward_classes = class_map(reward_model.config.class_names, names, config.reward_model)
        self.held_out = load_reward(config.held_out_reward_model, names) if config.held_out_reward_model else None
        if self.held_out is not None:
            self.held_out_classes = class_map(
                self.held_out.config.class_names, names, str(config.held_out_reward_model)
            )
        self.judge = SimulatedGrader.load(config.judge) if config.judge else None
        if self.judge is not None:
            self.judge_classes = class_map(self.judge.class_names, names, str(config.judge))
        super().__init__(pipeline, reward_model, real, config, folder)
        for observer in (self.held_out, self.judge):
            if observer is not None:
                observer.to(self.device).eval()
        self.checks: list[Check] = []
        self.best_weights: list[Tensor] = []  # of the check of the highest held-out reward
        self.reward_hacking = False
        self.stopped_at: int | None = None

    def sources(self) -> dict[str, str]:
        """Models that the run rests on or is watched by."""
        others = {
            f"other_reward_{number}": weighted_source(text)[0]
            for number, text in enumerate(self.config.other_rewards, 1)
        }
        watching = {"held_out_reward_model": self.config.held_out_reward_model, "judge": self.config.judge}
        return {**super().sources(), **others, **{name: source for name, source in watching.items() if source}}

    @property
    def total(self) -> int:
        """Epochs of the run: fewer than planned once it was stopped."""
        return self.config.epochs if self.stopped_at is None else self.stopped_at

    @abstractmethod
    def epoch(self, number: int) -> dict[str, float]:
        """Do epoch `number`, from 0; the figures to log have the mean `reward` among them."""

    def train(self) -> RunRecord:
        """Do all epochs that are left, unless a check ends the run, then write the adapter."""
        if self.held_out is None:
            say(UNGUARDED)
        return super().train()

    def step(self, number: int) -> dict[str, float]:
        """One epoch, and a check of the averaged adapter when one is due; one more comes before the first epoch."""
        if number == 0:
            self.run.log(0, **self.check(0))
        figures = self.epoch(number)
        done = number + 1
        if done % self.config.check_every_epochs == 0 or done == self.total:
            figures |= self.check(done)
        return figures

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        """Rewards of images `(n, 3, h, w)` in [-1, 1], shape `(n,)`, float32; differentiable if all sources are.

        Raises:
            InputError: If a reward is not finite.
        """
        ids = self.reward_classes.to(class_ids.device)[class_ids]
        return require_finite_rewards(self.reward_model.rewards(pixel_values, ids), self.config.reward_model)

    def check(self, epoch: int) -> dict[str, float]:
        """Draw with the averaged adapter, write the sample sheet, and see whether the held-out reward has turned.

        Returns:
            Figures to log: `check_reward` and, where there are such observers, `check_held_out_reward` and
            `check_judge_share`.
        """
        images, check = self.observe(epoch)
        if self.accelerator.is_main_process:
            self.save_sheet(epoch, images)
        self.checks.append(check)
        if self.held_out is not None:
            self.guard(check)
        return {f"check_{name}": value for name, value in check.figures().items()}

    def guard(self, check: Check) -> None:
        """Keep the weights of the best check; at reward hacking, or when nothing gets better, end the run."""
        best = best_of(self.checks)
        waited = sum(other.epoch > best.epoch for other in self.checks)
        may_end = self.config.on_reward_hacking != "continue"
        if check is best:
            self.best_weights = [weights.clone() for weights in self.average]
        elif reward_hacked(check, best, self.config.check_standard_errors):
            now, then = check.figures(), best.figures()
            say(
                f"Reward hacking after epoch {check.epoch}: since epoch {best.epoch} the held-out reward fell from "
                f"{then['held_out_reward']:.4f} to {now['held_out_reward']:.4f}, while the reward went from "
                f"{then['reward']:.4f} to {now['reward']:.4f}."
            )
            self.reward_hacking = True
            if may_end:
                self.stopped_at = check.epoch
        elif may_end and check.epoch < self.total and 0 < self.config.patience <= waited:
            say(f"The held-out reward has not clearly risen since epoch {best.epoch}: the run ends here.")
            self.stopped_at = check.epoch

    def observe(self, epoch: int) -> tuple[Tensor, Check]:
        """Images of the fixed seeds, shape `(classes * check_images_per_class, 3, size, size)`, and what is said."""
        config, (index, processes) = self.config, (self.accelerator.process_index, self.accelerator.num_processes)
        class_ids = torch.arange(len(self.pipeline.class_names)).repeat_interleave(config.check_images_per_class)
        starts = range(index * config.sample_batch_size, len(class_ids), processes * config.sample_batch_size)
        drawn = []
        with (
            self.weights_of(self.average),
            usual_sampler(self.pipeline),
            AsynchronousRewards(self.appraise) as appraisals,
        ):
            for start in starts:
                ids = class_ids[start : start + config.sample_batch_size]
                seeds = range(FIRST_CHECK_SEED + start, FIRST_CHECK_SEED + start + len(ids))
                drawn.append(
                    sample(
                        self.pipeline, ids.tolist(), seeds, config.check_inference_steps, config.check_guidance_scale
                    )
                )
                appraisals.submit(drawn[-1], ids)
            said = appraisals.results()
        # Every process decides from the same numbers, gathered: a decision of its own could differ by rounding.
        own = [
            {"start": start, "images": images, **values}
            for start, images, values in zip(starts, drawn, said, strict=True)
        ]
        parts = sorted(gather_object(own), key=lambda part: int(part["start"]))
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "start"}
        return columns.pop("images"), Check(epoch, **columns)

    def appraise(self, images: Tensor, class_ids: Tensor) -> dict[str, Tensor]:
        """What rewards and observers say of uint8 images, by the fields of `Check`, on the CPU."""
        pixel_values, ids = to_pixel_values(images).to(self.device), class_ids.to(self.device)
        said = {"rewards": self.rewards(pixel_values, ids)}
        if self.held_out is not None:
            held_out = self.held_out.rewards(pixel_values, self.held_out_classes.to(self.device)[ids])
            said["held_out"] = require_finite_rewards(held_out, str(self.config.held_out_reward_model))
        if self.judge is not None:
            said["plausible"] = self.judge.judge(pixel_values, self.judge_classes.to(self.device)[ids]).plausible
        return {name: values.cpu() for name, values in said.items()}

    def save_sheet(self, epoch: int, images: Tensor) -> None:
        """Write `samples-<epoch>.png`: a row of the first images of each class, in the order of class names."""
        count = self.config.check_images_per_class
        columns = min(count, SHEET_COLUMNS)
        shown = images.unflatten(0, (-1, count))[:, :columns].flatten(0, 1)
        sheet = contact_sheet(shown, columns, scale=max(1, 64 // images.shape[-1]))
        sheet.save(self.folder / f"samples-{epoch:06d}.png")

    def extra_state(self) -> dict[str, Any]:
        """The checks and the best weights; a method that adds to it keeps these."""
        return {
            "checks": [asdict(check) for check in self.checks],
            "best_weights": self.best_weights,
            "reward_hacking": self.reward_hacking,
        }

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        self.checks = [Check(**values) for values in state["checks"]]
        self.best_weights, self.reward_hacking = state["best_weights"], state["reward_hacking"]

    def metrics(self) -> dict[str, Any]:
        """The checks and what came of them; with `rollback` the best check's weights are those that are kept."""
        kept = self.checks[-1]
        if self.held_out is not None and self.config.on_reward_hacking == "rollback":
            kept = best_of(self.checks)
            say(f"The held-out reward was best after epoch {kept.epoch}: the adapter of then is kept.")
            self.use(self.best_weights)
        return {
            "checks": [{"epoch": check.epoch, **check.figures()} for check in self.checks],
            "n_check_images": len(kept.rewards),
            "reward_hacking": self.reward_hacking,
            "stopped_at": self.stopped_at,
            "kept_epoch": kept.epoch,
        }


@contextmanager
def usual_sampler(pipeline: BaseModel) -> Iterator[None]:
    """Context in which the pipeline samples by dpmsolver++, as users do, whatever the method samples with."""
    kept = pipeline.scheduler
    set_scheduler(pipeline, "dpmsolver++")
    try:
        yield
    finally:
        pipeline.scheduler = kept
