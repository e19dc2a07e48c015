"""Guards against reward hacking, on scripted rewards: when a run stops, which weights it keeps, what it shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from brightness import CLASSES, log_rows, small_inputs
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from scipy.stats import ttest_rel
from torch import Tensor, nn

from pathalign import workflow
from pathalign.artefacts import artefact
from pathalign.diffusion import lora
from pathalign.generate import load_pipeline, sample, set_scheduler
from pathalign.grading.simulated import Judgement, SimulatedGrader
from pathalign.images import ImageSet, contact_sheet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import InputError, RunRecord
from pathalign.settings.adapter import GuardedConfig
from pathalign.trainers import epochs, guarded
from pathalign.trainers.guarded import (
    FIRST_CHECK_SEED,
    Check,
    GuardedTrainer,
    best_of,
    reward_hacked,
    significantly_below,
)

IMAGES = 12  # of a check: four of each class
CLIMBING = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
TURNING = [0.5, 0.6, 0.7, 0.4, 0.3, 0.2]


class Clock:
    """Epochs done, of the run that is going on."""

    epoch = 0


class Scripted(nn.Module):
    """Rewards whose mean is written down for each epoch, with the same small differences between images."""

    def __init__(self, clock: Clock, means: list[float], noise: Mapping[int, Tensor] | None = None) -> None:
        super().__init__()
        self.config = RewardModelConfig(class_names=list(CLASSES[::-1]))
        self.device, self.clock, self.means, self.noise = torch.device("cpu"), clock, means, noise or {}
        self.spread = torch.linspace(-0.05, 0.05, IMAGES)

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        values = self.means[self.clock.epoch] + self.spread[: len(pixel_values)]
        return values + self.noise.get(self.clock.epoch, torch.zeros(IMAGES))[: len(pixel_values)]


class Judge(nn.Module):
    """Finds plausible what the others do not: every image after the first epoch."""

    class_names: ClassVar[list[str]] = ["b", "c", "a"]

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def judge(self, pixel_values: Tensor, class_ids: Tensor) -> Judgement:
        return Judgement(torch.full((len(class_ids), 1), float(self.clock.epoch > 0)), ("class",))


class Walk(GuardedTrainer[GuardedConfig]):
    """Each epoch adds 0.01 to all weights; `interrupt_at` raises Ctrl-C before that epoch."""

    clock: ClassVar[Clock]
    interrupt_at: ClassVar[int | None] = None

    def epoch(self, number: int) -> dict[str, float]:
        if number == type(self).interrupt_at:
            type(self).interrupt_at = None
            raise KeyboardInterrupt
        self.clock.epoch = number + 1
        self.use([parameter.data + 0.01 for parameter in self.parameters])
        return {"reward": CLIMBING[number]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """An untrained pipeline and its images."""
    folder = tmp_path_factory.mktemp("inputs")
    small_inputs(folder)
    return folder


class Run:
    """Runs `Walk` with scripted rewards in one folder."""

    def __init__(self, inputs: Path, folder: Path, models: dict[str, nn.Module], clock: Clock) -> None:
        self.inputs, self.folder, self.models, self.clock = inputs, folder, models, clock
        self.first: list[Tensor] = []
        self.trainer: Walk

    def __call__(self, name: str = "adapter", **changes) -> RunRecord:
        settings = {
            "base_model": str(self.inputs / "base"),
            "reward_model": "reward",
            "held_out_reward_model": "held_out",
            "epochs": 5,
            "check_every_epochs": 1,
            "check_images_per_class": 4,
            "check_inference_steps": 2,
            "sample_batch_size": 12,
            "lora_rank": 1,
            "checkpoint_every_steps": 2,
        }
        config = GuardedConfig(**settings | changes)
        Walk.clock = self.clock
        self.clock.epoch = 0
        pipeline = load_pipeline(config.base_model)
        with artefact(self.folder / name) as folder:
            real = ImageSet.load(self.inputs / "data")
            self.trainer = Walk(pipeline, self.models["reward"], real, config, folder)
            self.first = [parameter.detach().clone() for parameter in self.trainer.parameters]
            return self.trainer.train()

    def epochs_kept(self) -> float:
        """Epochs that the weights of the written adapter have seen."""
        steps = [(now.detach() - then).flatten() for now, then in zip(self.trainer.parameters, self.first, strict=True)]
        return float(torch.cat(steps).mean()) / 0.01


@pytest.fixture
def run(inputs, tmp_path, monkeypatch) -> Run:
    clock = Clock()
    models = {"reward": Scripted(clock, CLIMBING), "held_out": Scripted(clock, TURNING)}
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda source: models[source])
    monkeypatch.setattr(SimulatedGrader, "load", lambda source: Judge(clock))
    monkeypatch.setattr(Walk, "interrupt_at", None)
    return Run(inputs, tmp_path, models, clock)


@pytest.mark.parametrize("standard_errors", [0.0, 1.0, 2.0, 3.0])
def test_significance_is_that_of_the_paired_t_statistic(standard_errors):
    rng = np.random.default_rng(0)
    answers = set()
    for shift in np.linspace(-0.4, 0.2, 25):
        before = rng.normal(size=40)
        after = before + rng.normal(shift, 0.5, 40)
        expected = ttest_rel(after, before).statistic < -standard_errors
        found = significantly_below(torch.tensor(after), torch.tensor(before), standard_errors)
        assert found == expected
        answers.add(found)
    assert answers == {True, False}


def test_pairing_counts_equal_values_are_not_below_and_a_common_loss_is():
    values = torch.linspace(0, 1, 8)
    assert not significantly_below(values, values, 0.0)
    assert significantly_below(values - 1e-3, values, 3.0)  # every pair falls, though the spread is far greater


def test_hacking_needs_a_held_out_reward_that_falls_and_a_reward_that_does_not():
    values = torch.linspace(0, 1, 8)
    best = Check(2, values, held_out=values)
    assert reward_hacked(Check(3, values + 0.1, held_out=values - 0.1), best, 3.0)
    assert reward_hacked(Check(3, values, held_out=values - 0.1), best, 3.0)
    assert not reward_hacked(Check(3, values - 0.01, held_out=values - 0.1), best, 3.0)
    assert not reward_hacked(Check(3, values + 0.1, held_out=values + 0.1), best, 3.0)


def test_when_the_held_out_reward_turns_the_run_ends_and_the_best_checks_weights_are_written(run, capsys):
    record = run()
    assert record.metrics["reward_hacking"] is True
    assert (record.metrics["stopped_at"], record.metrics["kept_epoch"]) == (3, 2)
    assert run.epochs_kept() == pytest.approx(2, abs=1e-3)
    checks = record.metrics["checks"]
    assert [check["epoch"] for check in checks] == [0, 1, 2, 3]
    assert [check["reward"] for check in checks] == pytest.approx(CLIMBING[:4], abs=1e-6)
    assert [check["held_out_reward"] for check in checks] == pytest.approx(TURNING[:4], abs=1e-6)
    assert "Reward hacking after epoch 3: since epoch 2 the held-out reward fell from 0.7000 to 0.4000" in (
        capsys.readouterr().err
    )
    saved = RunRecord.load(run.folder / "adapter")
    assert saved.metrics == record.metrics and saved.inputs["held_out_reward_model"] == "held_out"
    pipeline = load_pipeline(str(run.inputs / "base"))
    lora.load(pipeline, str(run.folder / "adapter"))
    loaded = [parameter.detach() for parameter in lora.parameters(pipeline.unet).values()]
    assert all(torch.equal(a, b.detach()) for a, b in zip(loaded, run.trainer.parameters, strict=True))


@pytest.mark.parametrize(("choice", "stopped_at", "kept"), [("stop", 3, 3), ("continue", None, 5)])
def test_stop_ends_as_it_is_and_continue_only_says_so(run, choice, stopped_at, kept):
    record = run(on_reward_hacking=choice)
    assert record.metrics["reward_hacking"] is True
    assert (record.metrics["stopped_at"], record.metrics["kept_epoch"]) == (stopped_at, kept)
    assert run.epochs_kept() == pytest.approx(kept, abs=1e-3)
    assert [row["step"] for row in log_rows(run.folder / "adapter")] == list(range(kept + 1))


def test_a_fall_within_the_noise_of_the_images_stops_nothing(run):
    """The mean falls by 2 of its standard errors: not by 3, which stops, as a limit of 1.5 does here."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(IMAGES, generator=generator)
    noise = (noise - noise.mean()) / noise.std()
    error = 0.1 / IMAGES**0.5
    run.models["held_out"] = Scripted(
        run.clock, [0.5, 0.7, *[0.7 - 2 * error] * 4], dict.fromkeys(range(2, 6), 0.1 * noise)
    )
    record = run(on_reward_hacking="continue")
    assert (record.metrics["reward_hacking"], record.metrics["stopped_at"]) == (False, None)
    assert record.metrics["kept_epoch"] == 5 and run.epochs_kept() == pytest.approx(5, abs=1e-3)
    assert run("patient", patience=0).metrics["stopped_at"] is None
    strict = run("strict", check_standard_errors=1.5)
    assert (strict.metrics["stopped_at"], strict.metrics["kept_epoch"]) == (2, 1)


def test_a_fall_of_both_rewards_is_no_hacking_but_the_best_check_still_wins_at_the_end(run):
    run.models["reward"].means = [0.1, 0.2, 0.3, 0.2, 0.2, 0.1]
    record = run()
    assert (record.metrics["reward_hacking"], record.metrics["stopped_at"]) == (False, None)
    assert record.metrics["kept_epoch"] == 2 and run.epochs_kept() == pytest.approx(2, abs=1e-3)


def test_of_checks_that_do_not_clearly_differ_the_earliest_is_the_best():
    noise = torch.randn(50, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std() * 50**0.5 / 100  # a standard error of 0.01
    flat = torch.zeros(50)
    levels = [0.0, 0.02, 0.025, 0.028, 0.055, 0.02]
    checks = [Check(epoch, flat, held_out=level + epoch * noise) for epoch, level in enumerate(levels)]
    # Two checks differ by as many standard errors of 0.01 as epochs lie between them.
    assert [best_of(checks[: count + 1]).epoch for count in range(6)] == [0, 1, 1, 1, 4, 4]


@pytest.mark.parametrize(("patience", "stopped_at"), [(2, 4), (3, None), (0, None)])
def test_a_run_whose_held_out_reward_rises_no_more_is_ended_and_the_best_adapter_kept(
    run, capsys, patience, stopped_at
):
    run.models["held_out"].means = [0.5, 0.6, 0.7, 0.7, 0.7, 0.7]
    record = run(patience=patience)
    assert (record.metrics["reward_hacking"], record.metrics["stopped_at"]) == (False, stopped_at)
    assert record.metrics["kept_epoch"] == 2 and run.epochs_kept() == pytest.approx(2, abs=1e-3)
    said = "has not clearly risen since epoch 2: the run ends here" in capsys.readouterr().err
    assert said == (stopped_at is not None)


def test_without_a_held_out_model_the_reward_is_logged_and_the_run_says_that_nothing_guards_it(run, capsys):
    record = run(held_out_reward_model=None, check_every_epochs=2)
    assert "nothing guards this run against reward hacking" in capsys.readouterr().err
    assert [check["epoch"] for check in record.metrics["checks"]] == [0, 2, 4, 5]
    assert all(set(check) == {"epoch", "reward"} for check in record.metrics["checks"])
    assert record.metrics["reward_hacking"] is False and record.metrics["kept_epoch"] == 5
    found = {row["step"]: set(row) for row in log_rows(run.folder / "adapter")}
    checked = {"step", "reward", "check_reward"}
    assert found == {0: {"step", "check_reward"}, 1: {"step", "reward"}, 2: checked, 3: {"step", "reward"}} | {
        4: checked,
        5: checked,
    }


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an adapter that must not depend on interruptions."""
    record = RunRecord.load(folder)
    files = {path.name: path.read_bytes() for path in folder.glob("*.*") if path.name not in ("run.json", "README.md")}
    return files | {"metrics": json.dumps(record.metrics).encode()}


@pytest.mark.parametrize("interrupt", [0, 1, 3, 4])
def test_the_same_call_after_an_interruption_ends_with_equal_checks_and_weights(run, interrupt):
    changes = {"on_reward_hacking": "continue" if interrupt == 4 else "rollback", "judge": "judge"}
    if interrupt != 4:
        run.models["held_out"].means = [0.5, 0.6, 0.7, 0.7, 0.4, 0.4]  # turns after the newest checkpoint
    run("straight", **changes)
    Walk.interrupt_at = interrupt
    with pytest.raises(KeyboardInterrupt):
        run("stopped", **changes)
    run("stopped", **changes)
    straight = contents(run.folder / "straight")
    assert {lora.WEIGHTS_NAME, "log.jsonl", "metrics", "samples-000004.png"} <= set(straight)
    assert contents(run.folder / "stopped") == straight


def test_the_judge_is_logged_and_decides_nothing(run):
    without = run("without")
    beside = run("beside", judge="judge")
    weights = [(run.folder / name / lora.WEIGHTS_NAME).read_bytes() for name in ("without", "beside")]
    assert weights[0] == weights[1]
    shares = [check.pop("judge_share") for check in beside.metrics["checks"]]
    assert shares == [0.0, 1.0, 1.0, 1.0]
    assert beside.metrics == without.metrics
    assert [row["check_judge_share"] for row in log_rows(run.folder / "beside")] == shares


def test_every_check_writes_a_sheet_of_the_same_seeds_by_the_usual_sampler(run):
    run(held_out_reward_model=None, check_every_epochs=3, check_images_per_class=3, sample_batch_size=4)
    sheets = sorted(path.name for path in (run.folder / "adapter").glob("samples-*.png"))
    assert sheets == ["samples-000000.png", "samples-000003.png", "samples-000005.png"]
    pipeline = load_pipeline(str(run.inputs / "base"))
    set_scheduler(pipeline, "dpmsolver++")
    ids = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    parts = [
        sample(pipeline, ids[i : i + 4], range(FIRST_CHECK_SEED + i, FIRST_CHECK_SEED + min(i + 4, 9)), 2)
        for i in (0, 4, 8)
    ]
    expected = np.asarray(contact_sheet(torch.cat(parts), columns=3, scale=4))
    found = [np.asarray(Image.open(run.folder / "adapter" / name)) for name in sheets]
    np.testing.assert_array_equal(found[0], expected)  # an adapter that has learned nothing
    assert not np.array_equal(found[1], found[0])


def test_a_check_leaves_the_methods_sampler_and_weights_as_they_were(run, monkeypatch):
    seen = []

    def spy(pipeline, *arguments):
        seen.append(type(pipeline.scheduler))
        return sample(pipeline, *arguments)

    monkeypatch.setattr(guarded, "sample", spy)
    run(epochs=1)
    trainer = run.trainer
    trainer.pipeline.scheduler = DDIMScheduler.from_config(trainer.pipeline.scheduler.config)
    scheduler, weights = trainer.pipeline.scheduler, [parameter.detach() + 1 for parameter in trainer.parameters]
    torch._foreach_copy_([parameter.data for parameter in trainer.parameters], weights)
    trainer.observe(7)
    assert trainer.pipeline.scheduler is scheduler
    assert all(torch.equal(a, b.detach()) for a, b in zip(weights, trainer.parameters, strict=True))
    assert set(seen) == {DPMSolverMultistepScheduler}


def test_rewards_get_the_class_ids_of_the_reward_model_and_must_be_finite(run):
    run.models["reward"].rewards = lambda pixel_values, class_ids: class_ids.double()
    run(epochs=1)
    rewards = run.trainer.rewards(torch.zeros(3, 3, 16, 16), torch.tensor([0, 1, 2]))
    assert rewards.tolist() == [2.0, 1.0, 0.0] and rewards.dtype == torch.float32  # its classes are c, b, a
    run.models["reward"].rewards = lambda pixel_values, class_ids: class_ids / 0
    with pytest.raises(InputError, match=r"Reward reward gave 3 values of 3 that are not finite"):
        run.trainer.rewards(torch.zeros(3, 3, 16, 16), torch.tensor([0, 1, 2]))


def test_observers_that_do_not_know_a_class_are_refused_before_anything_is_drawn(run, monkeypatch):
    monkeypatch.setattr(guarded, "sample", lambda *_: pytest.fail("drawn"))
    run.models["held_out"].config.class_names = ["a", "b"]
    with pytest.raises(InputError, match=r"held_out does not know the classes \['c'\]"):
        run()
    run.models["held_out"].config.class_names = list(CLASSES)
    monkeypatch.setattr(Judge, "class_names", ["a", "c"])
    with pytest.raises(InputError, match=r"judge does not know the classes \['b'\]"):
        run(judge="judge")


def test_a_method_that_follows_the_gradient_refuses_a_function_before_anything_is_drawn(run, monkeypatch):
    monkeypatch.setattr(guarded, "sample", lambda *_: pytest.fail("drawn"))
    monkeypatch.setattr(Walk, "follows_gradient", True)
    monkeypatch.setitem(run.models, "reward", guarded.load_reward("math:fsum", CLASSES))
    with pytest.raises(InputError, match=r"follows the gradient of the reward, and math:fsum has none"):
        run(reward_model="math:fsum")


def test_check_seeds_are_those_of_no_candidate_measured_image_or_training_round():
    checked = range(FIRST_CHECK_SEED, FIRST_CHECK_SEED + 5 * 1000)
    assert checked.stop <= epochs.FIRST_SEED
    for seed in (0, 1, 2, 2000):
        jobs = {job.step.folder: job.config for job in workflow.plan({"seed": seed}, Path("x"))}
        drawn = [config for name, config in jobs.items() if name == "candidates" or name.startswith("samples_")]
        assert len(drawn) == 5
        for config in drawn:
            images = config.images_per_class * 20 * max(1, len(config.varied_steps))
            for attempt in range(config.best_of):
                first = config.seed + attempt * 2**24
                assert first + images <= checked.start
