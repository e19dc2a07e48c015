"""Trains the reward model on graded images and real pairs, calibrates it, and measures it on held-out grades.

Source: arXiv:2306.12438, section 3. Temperature: arXiv:1706.04599.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.integrations import TensorBoardCallback
from transformers.utils import logging as transformers_logging

from pathalign.artefacts import artefact, fingerprint, write_atomically
from pathalign.cards import write_card
from pathalign.images import ImageSet
from pathalign.pinning import pinned
from pathalign.progress import Progress, say
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.reward.calibration import evaluation, fit_temperature, negative_log_likelihood
from pathalign.reward.encoders import FROM_SCRATCH, encoder_spec
from pathalign.reward.inputs import RewardInputs
from pathalign.reward.pairs import GradedImages, TrainingPairs, real_count, targets
from pathalign.schema import InputError, RunRecord, peak_rss_mb
from pathalign.settings.reward import RewardConfig

COMPLETE = "complete"  # written into a checkpoint last, so that one without it is known to be half-written
LOG_EVERY_STEPS = 10


def train_reward(config: RewardConfig, output_dir: Path) -> RunRecord:
    """Train a reward model and write it as a transformers folder, with `evaluation.json` and `log.jsonl`.

    A run that was interrupted goes on from its last whole checkpoint and ends as it would have; on a CPU bit for bit.

    Raises:
        InputError: If an input cannot be used, or the loss stops being a number.
    """
    started = time.monotonic()
    config = pinned(config)
    inputs = RewardInputs.load(config)
    model_config = model_configuration(config, inputs)
    with artefact(output_dir) as folder, _quiet_transformers():
        model, history = fit(config, inputs, model_config, folder)
        report = calibrate_and_evaluate(model, inputs, config)
        model.save_with_processor(folder)
        (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "log.jsonl").write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in history))
        record = RunRecord(
            stage="reward",
            config=dataclasses.asdict(config),
            inputs=inputs.fingerprints,
            seeds={"seed": config.seed},
            metrics=report["overall"],
            wall_s=time.monotonic() - started,
            peak_rss_mb=peak_rss_mb(),
        )
        names = inputs.train.class_names
        write_card(folder, "reward_model", record, report, grading=inputs.grading, class_names=names)
        record.save(folder)
    return record


def model_configuration(config: RewardConfig, inputs: RewardInputs) -> RewardModelConfig:
    """Configuration of the model to train; reads a pretrained encoder's configuration, but not its weights.

    Raises:
        InputError: If the encoder is unknown.
    """
    size = config.image_size_px or (inputs.train.image_size_px if config.encoder in FROM_SCRATCH else None)
    spec = encoder_spec(config.encoder, size, config.encoder_revision)
    return RewardModelConfig(
        class_names=list(inputs.train.class_names),
        criteria=inputs.criteria,
        encoder=spec.name,
        backbone_config=spec.backbone_config,
        image_size_px=spec.image_size_px,
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
        freeze_encoder=config.freeze_encoder,
        num_members=config.num_members,
        grading=dataclasses.asdict(inputs.grading),
        criteria_weight=config.criteria_weight,
    )


def fit(
    config: RewardConfig, inputs: RewardInputs, model_config: RewardModelConfig, folder: Path
) -> tuple[RewardModel, list[dict[str, float]]]:
    """Train with `transformers.Trainer`; returns the model of the best validated epoch and the log."""
    checkpoints = folder / "checkpoints"
    resume_from = whole_checkpoint(checkpoints, fingerprint([dataclasses.asdict(config), inputs.fingerprints]))
    graded_in_batch = config.batch_size - real_count(config.batch_size, config.real_share)
    steps_per_epoch = math.ceil(
        len(inputs.train) / graded_in_batch if graded_in_batch else len(inputs.real) / config.batch_size
    )
    total_steps = config.max_steps or config.epochs * steps_per_epoch
    state = TrainerState.load_from_json(str(resume_from / "trainer_state.json")) if resume_from else TrainerState()
    if state.global_step < total_steps and not out_of_patience(state, config):
        with Progress("reward", total_steps, done=state.global_step) as progress:
            trainer = _trainer(config, inputs, model_config, folder, steps_per_epoch, total_steps, progress)
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
            state = trainer.state
    model = RewardModel.from_pretrained(checkpoints / f"checkpoint-{state.best_global_step}")
    say(
        f"reward: kept step {state.best_global_step} of {state.global_step}, {config.select_by} {state.best_metric:.3f}"
    )
    # Left out: the summary at the end, and timings, which differ between equal runs.
    rows = [row for row in state.log_history if "train_loss" not in row]
    timings = ("runtime", "per_second")
    return model, [{key: value for key, value in row.items() if not key.endswith(timings)} for row in rows]


def _trainer(
    config: RewardConfig,
    inputs: RewardInputs,
    model_config: RewardModelConfig,
    folder: Path,
    steps_per_epoch: int,
    total_steps: int,
    progress: Progress,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=total_steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=4 * config.batch_size,
        train_sampling_strategy="sequential",  # the data set is in order of training
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,  # a share of all steps
        eval_strategy="steps",
        eval_steps=min(steps_per_epoch, total_steps),
        save_strategy="steps",
        save_steps=min(steps_per_epoch, total_steps),
        save_total_limit=2,
        metric_for_best_model=config.select_by,
        greater_is_better=config.select_by == "roc_auc",
        logging_steps=LOG_EVERY_STEPS,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[name for name in config.trackers if name != "tensorboard"] or "none",
        project="pathalign",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=config.seed,
    )
    size = model_config.image_size_px
    trainer = Trainer(
        model_init=lambda: _new_model(model_config, config),  # after Trainer has seeded
        args=arguments,
        data_collator=default_data_collator,
        train_dataset=TrainingPairs(
            graded=inputs.train,
            real=inputs.real,
            criteria=inputs.criteria,
            image_size_px=size,
            batches=total_steps,
            batch_size=config.batch_size,
            real_share=config.real_share,
            augmentation=config.augment,
            label_smoothing=config.label_smoothing,
            seed=config.seed,
        ),
        eval_dataset=GradedImages(inputs.validation, inputs.criteria, size),
        compute_metrics=validation_metrics,
        callbacks=[RunLife(config, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    if "tensorboard" in config.trackers:
        from torch.utils.tensorboard import SummaryWriter

        trainer.add_callback(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"))))
    return trainer


def _new_model(model_config: RewardModelConfig, config: RewardConfig) -> RewardModel:
    model = RewardModel(model_config)
    if config.encoder not in FROM_SCRATCH:
        model.load_pretrained_encoder(config.encoder, config.encoder_revision)
    return model


def validation_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`roc_auc` against the majority verdict and `nll` against the soft label, of uncalibrated logits."""
    logits, labels = np.asarray(prediction.predictions[0], float), np.asarray(prediction.label_ids, float)
    decided = labels != 0.5
    return {
        "roc_auc": float(roc_auc_score(labels[decided] > 0.5, logits[decided])),
        "nll": negative_log_likelihood(logits, labels),
    }


class RunLife(TrainerCallback):
    """Progress, completeness of checkpoints, early stopping, and an end to a run whose loss is no number."""

    def __init__(self, config: RewardConfig, progress: Progress) -> None:
        self.config, self.progress = config, progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Log whenever a checkpoint is due: mean losses then begin anew, as they do after an interruption."""
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **shown: Any) -> None:
        """Stop at a loss that is not finite."""
        loss = shown["logs"].get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise InputError(
                f"The loss became {loss} at step {state.global_step} of the reward model. Lower `learning_rate` "
                f"(now {self.config.learning_rate}) and run the same command again."
            )
        self.progress.update(state.global_step - self.progress.count, loss=loss)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark a checkpoint as whole; each is saved just after its validation, so early stopping is decided here."""
        write_atomically(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE, "")
        if out_of_patience(state, self.config):
            control.should_training_stop = True


def out_of_patience(state: TrainerState, config: RewardConfig) -> bool:
    """Whether `patience_epochs` validations have passed since the best one."""
    validated = [row["step"] for row in state.log_history if f"eval_{config.select_by}" in row]
    best = state.best_global_step
    return best is not None and sum(step > best for step in validated) >= config.patience_epochs


def whole_checkpoint(checkpoints: Path, run_id: str) -> Path | None:
    """The newest whole checkpoint of this very run; half-written ones, and those of other settings, are removed."""
    owner = checkpoints / "run_id"
    if not owner.is_file() or owner.read_text() != run_id:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        write_atomically(owner, run_id)
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for path in found:
        if not (path / COMPLETE).is_file():
            shutil.rmtree(path)
    whole = [path for path in found if path.is_dir()]
    return whole[-1] if whole else None


@torch.no_grad()
def predict_logits(model: RewardModel, graded: ImageSet, batch_size: int) -> np.ndarray:
    """Uncalibrated log-odds of plausible, shape `(n,)`, float64; the model in evaluation mode."""
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        GradedImages(graded, [], model.config.image_size_px), batch_size=batch_size, collate_fn=default_data_collator
    )
    logits = [
        model(pixel_values=rows["pixel_values"].to(model.device), class_ids=rows["class_ids"].to(model.device)).logits
        for rows in loader
    ]
    return torch.cat(logits).double().cpu().numpy()


def calibrate_and_evaluate(model: RewardModel, inputs: RewardInputs, config: RewardConfig) -> dict[str, Any]:
    """Fit the model's temperature on the validation split and measure its rewards on the test split."""
    labels = targets(inputs.validation, [])[0].double().numpy()
    logits = predict_logits(model, inputs.validation, config.batch_size)
    temperature = fit_temperature(logits, labels)
    model.config.temperature = temperature
    test_logits = predict_logits(model, inputs.test, config.batch_size)
    report = evaluation(
        rewards=1 / (1 + np.exp(-test_logits / temperature)),
        plausible=targets(inputs.test, [])[0].double().numpy(),
        class_ids=inputs.test.class_ids.numpy(),
        class_names=list(inputs.test.class_names),
        seed=config.seed,
    )
    report["temperature"] = temperature
    report["validation_nll"] = {
        "uncalibrated": negative_log_likelihood(logits, labels),
        "calibrated": negative_log_likelihood(logits, labels, temperature),
        "n": len(labels),
    }
    return report


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars, which would write lines between ours."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
