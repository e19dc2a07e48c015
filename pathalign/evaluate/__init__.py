"""The `evaluate` stage: compare candidate sets that were made with the same seeds, before and after alignment."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

from pathalign.artefacts import artefact, write_atomically
from pathalign.evaluate import alignment, explained, report
from pathalign.evaluate.quality import Quality, measure_images
from pathalign.evaluate.report import Exhibits, summary_table
from pathalign.evaluate.subjects import GENERATED, Subjects, load_subjects
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet
from pathalign.pinning import identity, model_file, pinned
from pathalign.progress import say
from pathalign.remote import parse
from pathalign.reward import RewardModel, load_reward_model
from pathalign.reward.encoders import load_encoder
from pathalign.reward.explanation import require_captum, reward_parts
from pathalign.schema import InputError, RunRecord
from pathalign.settings.evaluate import EvaluateConfig

METRICS = {
    "AuditMetrics": "metrics",
    "FrechetDistance": "metrics",
    "KernelDistance": "metrics",
    "Memorization": "metrics",
    "NeighbourhoodMetrics": "metrics",
    "PlausibleShare": "plausible_share",
    "Usefulness": "metrics",
}
__all__ = ["EvaluateConfig", "evaluate", "summary_table", *METRICS]


@dataclass(frozen=True)
class Panel:
    """Who judges and measures."""

    judge: SimulatedGrader
    grader: SimulatedGrader | None
    reward_model: RewardModel | None
    encoder: nn.Module
    device: torch.device


@dataclass(frozen=True)
class Answers:
    """What the panel says about each image of one set."""

    judge: alignment.Verdicts
    grader: alignment.Verdicts | None
    rewards: np.ndarray | None
    criteria: np.ndarray | None  # rewards of the reward model's criteria, (n, criteria)


def evaluate(config: EvaluateConfig, output_dir: str | Path) -> RunRecord:
    """Measure all sets and write `metrics.json`, `report.html` and `figures/`.

    Args:
        config: The inputs; nothing is sampled here.
        output_dir: Folder that the artefact becomes.

    Returns:
        The run record; its `metrics` are the content of `metrics.json`.

    Raises:
        InputError: If an input is missing, class names or image sizes differ, or sets that shall be compared pairwise
            were not made with the same seeds and classes.
    """
    started = time.monotonic()
    config = pinned(config)
    subjects, panel, training = load_subjects(config), load_panel(config), training_checks(config.adapter)
    with artefact(output_dir) as folder:
        answers = {name: consult(panel, images) for name, images in subjects.judged().items()}
        scratch = Path(config.feature_cache) if config.feature_cache else folder / "checkpoints"
        quality = measure_images(config, subjects, panel.encoder, scratch, panel.device)
        metrics = assemble(config, subjects, panel, answers, quality, training)
        bins, metrics["criterion_skill"] = held_out(panel, subjects.feedback)
        record = RunRecord(
            stage="evaluate",
            config=asdict(config),
            inputs={name: identity(value) for name, value in _inputs(config).items()},
            seeds={"subsets_and_bootstrap": config.seed},
            metrics=metrics,
        )
        write_atomically(folder / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True, allow_nan=False) + "\n")
        exhibits = Exhibits(
            sets=subjects.judged(),
            verdicts={name: answer.judge for name, answer in answers.items()},
            rewards={name: answer.rewards for name, answer in answers.items() if answer.rewards is not None},
            train=subjects.train,
            closest=quality.closest,
            calibration=bins,
            phantom=subjects.phantom,
            close_look=close_look(panel, subjects, answers),
        )
        report.write(folder, metrics, exhibits, record)
        record.wall_s = time.monotonic() - started
        record.save(folder)
    say(summary_table(metrics))
    return record


def load_panel(config: EvaluateConfig) -> Panel:
    """Load the judge and, where they are given, the grader and the reward model, onto the machine's device."""
    device, encoder = PartialState().device, parse(config.encoder)
    if config.reward_model:
        require_captum()
    model = load_reward_model(config.reward_model).to(device).eval() if config.reward_model else None
    return Panel(
        judge=SimulatedGrader.load(config.judge).to(device),
        grader=SimulatedGrader.load(config.grader).to(device) if config.grader else None,
        reward_model=model,
        encoder=load_encoder(encoder.name, revision=encoder.revision, trust_remote_code=config.trust_remote_code),
        device=device,
    )


def consult(panel: Panel, images: ImageSet) -> Answers:
    """Ask judge, grader and reward model about every image of a set."""
    rewards = _rewards(panel, images) if panel.reward_model else None
    return Answers(
        judge=alignment.ask(panel.judge, images),
        grader=alignment.ask(panel.grader, images) if panel.grader else None,
        rewards=None if rewards is None else rewards[:, 0],
        criteria=None if rewards is None else rewards[:, 1:],
    )


def _rewards(panel: Panel, images: ImageSet) -> np.ndarray:
    """Rewards in column 0, those of the criteria after it."""
    assert panel.reward_model is not None
    model = panel.reward_model
    parts = partial(reward_parts, model)
    return alignment.rewards_of(parts, model.config.class_names, images, panel.device)


def held_out(panel: Panel, feedback: ImageSet | None) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Calibration bins of the rewards and skill of the criteria's, on held-out feedback; empty if there is none."""
    if feedback is None or panel.reward_model is None:
        return [], {}
    rewards = _rewards(panel, feedback)
    plausible = np.asarray(feedback.columns["plausible"], dtype=float)
    criteria = tuple(panel.reward_model.config.criteria)
    skill = explained.criterion_skill(criteria, rewards[:, 1:], feedback)
    return alignment.reliability(rewards[:, 0], plausible), skill


def close_look(panel: Panel, subjects: Subjects, answers: dict[str, Answers]) -> explained.CloseLook:
    """Images that say most about the reward model, explained; empty without one."""
    if panel.reward_model is None:
        return explained.CloseLook()
    rewards = {name: answer.rewards for name, answer in answers.items() if answer.rewards is not None}
    criteria = {name: answer.criteria for name, answer in answers.items() if answer.criteria is not None}
    return explained.look_closely(panel.reward_model, subjects.generated, rewards, criteria)


def assemble(
    config: EvaluateConfig,
    subjects: Subjects,
    panel: Panel,
    answers: dict[str, Answers],
    quality: Quality,
    training: dict[str, Any] | None,
) -> dict[str, Any]:
    """Everything that `metrics.json` holds. A set that was not given is null there."""
    sets: dict[str, Any] = dict.fromkeys((*GENERATED, "real"))
    for name, images in subjects.judged().items():
        answer = answers[name]
        judged = alignment.judged_metrics(answer.judge, images, config.confidence)
        for label, figures in judged["per_class"].items():
            figures.update(quality.per_class[name][label])
        sets[name] = {
            **judged,
            **quality.figures[name],
            **_reward_metrics(config, answer),
            "per_criterion_reward": _criterion_metrics(config, panel, answer),
            **_grader_metrics(config, answer),
        }
    metrics = {
        "reward": reward_evaluation(config.reward_model),
        "training": training,
        "metrics": sets,
        **compare(config, subjects, answers, quality, sets),
        "confidence": config.confidence,
        "simulated": True,
        "phantom": subjects.phantom,
    }
    metrics["headline"] = report.hacking_warning(metrics) or report.headline(metrics)
    return metrics


def _reward_metrics(config: EvaluateConfig, answer: Answers) -> dict[str, Any]:
    if answer.rewards is None:
        return {"mean_reward": None, "mean_reward_ci": None}
    draws = alignment.resampled_means([answer.rewards], config.bootstrap_samples, np.random.default_rng(config.seed))[0]
    interval = alignment.percentile_interval(draws, config.confidence)
    return {"mean_reward": float(answer.rewards.mean()), "mean_reward_ci": interval}


def _criterion_metrics(config: EvaluateConfig, panel: Panel, answer: Answers) -> dict[str, Any]:
    if panel.reward_model is None or answer.criteria is None:
        return {}
    names = tuple(panel.reward_model.config.criteria)
    return explained.criterion_metrics(names, answer.criteria, config.bootstrap_samples, config.confidence, config.seed)


def _grader_metrics(config: EvaluateConfig, answer: Answers) -> dict[str, Any]:
    if answer.grader is None:
        return {"grader_share": None, "grader_share_ci": None, "grader_judge_kappa": None}
    return {
        **alignment.share(answer.grader.plausible, config.confidence, "grader_share"),
        "grader_judge_kappa": alignment.kappa(answer.grader.plausible, answer.judge.plausible),
    }


def compare(
    config: EvaluateConfig, subjects: Subjects, answers: dict[str, Answers], quality: Quality, sets: dict[str, Any]
) -> dict[str, Any]:
    """Gains with paired intervals, the gap closed, what got worse, and whether the reward was hacked."""

    def gain(first: np.ndarray, second: np.ndarray) -> tuple[float, list[float]]:
        return alignment.paired_gain(first, second, config.bootstrap_samples, config.confidence, config.seed)

    before, after = answers["before"], answers["after"]
    judge_gain = gain(before.judge.plausible, after.judge.plausible)
    changes = {"plausible share": judge_gain}
    if before.rewards is not None and after.rewards is not None:
        changes["mean reward"] = gain(before.rewards, after.rewards)
    if before.grader is not None and after.grader is not None:
        changes["grader's plausible share"] = gain(before.grader.plausible, after.grader.plausible)
    ids = subjects.generated["before"].class_ids.numpy()
    for class_id, name in enumerate(subjects.test.class_names):
        rows = ids == class_id
        changes[f"plausible share of {name}"] = gain(before.judge.plausible[rows], after.judge.plausible[rows])
    for column, name in enumerate(before.judge.criteria):
        changes[f"share failing {name}"] = gain(before.judge.failed[:, column], after.judge.failed[:, column])
    over_control: tuple[float | None, list[float] | None] = (None, None)
    if "control" in answers:
        over_control = gain(answers["control"].judge.plausible, after.judge.plausible)
    closed, closed_ci = alignment.gap_closed(
        before.judge.plausible,
        after.judge.plausible,
        answers["real"].judge.plausible,
        config.bootstrap_samples,
        config.confidence,
        config.seed,
    )
    gains = {
        name: alignment.paired_gains(
            quality.outcomes[name],
            quality.outcomes["after"],
            config.bootstrap_samples,
            config.confidence,
            config.seed,
        )
        for name in ("before", "control")
        if name in quality.outcomes
    }
    changes |= {alignment.title_of(name): found for name, found in gains["before"].items()}
    proxies = [changes[name][0] if name in changes else None for name in ("mean reward", "grader's plausible share")]
    intervals = {name: interval for name, (_, interval) in changes.items()}
    return {
        "plausible_gain": judge_gain[0],
        "plausible_gain_ci": judge_gain[1],
        "gain_over_control": over_control[0],
        "gain_over_control_ci": over_control[1],
        "gap_closed": closed,
        "gap_closed_ci": closed_ci,
        "gains": _as_figures(gains["before"]),
        "gains_over_control": _as_figures(gains["control"]) if "control" in gains else None,
        "reward_gain": proxies[0],
        "reward_gain_ci": intervals.get("mean reward"),
        "reward_hacking": alignment.reward_hacking(judge_gain[0], *proxies),
        "worse": alignment.what_got_worse(sets["before"], sets["after"], intervals),
    }


def _as_figures(gains: dict[str, tuple[float, list[float]]]) -> dict[str, dict[str, Any]]:
    return {name: {"gain": gain, "ci": interval} for name, (gain, interval) in gains.items()}


def reward_evaluation(reward_model: str | None) -> dict[str, Any]:
    """What the reward stage measured on held-out grades, overall figures at the top; empty where there is no file."""
    path = model_file(reward_model, "evaluation.json") if reward_model else None
    if path is None:
        return {}
    measured = json.loads(path.read_text())
    return {**measured.pop("overall"), **measured}


def training_checks(adapter: str | None) -> dict[str, Any] | None:
    """The checks of an adapter's training and what came of them, from its run record; None if it made none.

    Raises:
        InputError: If there is no run record.
    """
    path = model_file(adapter, RunRecord.FILE_NAME) if adapter else None
    if adapter and path is None:
        raise InputError(f"{adapter} has no {RunRecord.FILE_NAME}, which says how it was trained; leave `adapter` out.")
    measured = RunRecord.load(path.parent).metrics if path else {}
    names = ("checks", "n_check_images", "reward_hacking", "stopped_at", "kept_epoch")
    return {name: measured[name] for name in names} if "checks" in measured else None


def _inputs(config: EvaluateConfig) -> dict[str, str]:
    names = ("data", *GENERATED, "judge", "grader", "reward_model", "feedback", "adapter")
    return {name: value for name in names if (value := getattr(config, name))}


def __getattr__(name: str) -> Any:
    # The library `evaluate` takes seconds to import; only who measures by hand waits for it.
    if name in METRICS:
        return getattr(import_module(f"pathalign.evaluate.{METRICS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
