"""What is measured of one arm and one seed: named figures, with interval and number of images where they have any."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from sklearn.metrics import f1_score, roc_auc_score

from pathalign.config import read_yaml
from pathalign.evaluate import alignment, utility
from pathalign.evaluate.features import FeatureStore
from pathalign.evaluate.fidelity import rows_of_class
from pathalign.evaluate.report import ROWS
from pathalign.experiments.recipe import CONFIG_NAME, Arm, Experiment, features_of
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet
from pathalign.remote import parse
from pathalign.reward import load_reward_model
from pathalign.reward.calibration import roc_auc_interval
from pathalign.reward.encoders import load_encoder
from pathalign.schema import InputError, RunRecord

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """A value; `interval` is over images, `n` their number."""

    value: float
    interval: list[float] | None = None
    n: int | None = None


def proportion(right: np.ndarray) -> Figure:
    """Share of true values of shape `(n,)`, with its Wilson interval."""
    share = alignment.share(right, CONFIDENCE, "share")
    return Figure(share["share"], share["share_ci"], len(right))


@dataclass(frozen=True)
class Place:
    """Where to look: run directories of the arm and of the experiment's first arm, with the same seed."""

    experiment: Experiment
    arm: Arm
    run_dir: Path
    first: Path


def last_round(run_dir: Path, folder: str) -> Path:
    """`folder` of the last of the run's rounds that makes it.

    Raises:
        InputError: If none has.
    """
    rounds = int(read_yaml(run_dir / CONFIG_NAME).get("rounds", 1))
    places = [run_dir / (f"round-{number}/{folder}" if number > 1 else folder) for number in range(rounds, 0, -1)]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise InputError(f"{run_dir} has no {folder}; its arm ends before that (`until`).")
    return found


def evaluation(place: Place) -> dict[str, Figure]:
    """Everything that `metrics.json` says of the arm's set, and of the reward model behind it."""
    metrics = json.loads((last_round(place.run_dir, "evaluation") / "metrics.json").read_text())
    own = metrics["metrics"][place.arm.set]
    if own is None:
        raise InputError(f"The evaluation of arm {place.arm.of!r} has no set `{place.arm.set}`; leave the arm out.")
    found = figures_in(own)
    for group, key in (("per_class", "plausible_share"), ("per_criterion", "failed_share")):
        for name, entry in own[group].items():
            found[f"{key} of {name}"] = Figure(entry[key], entry[f"{key}_ci"], entry["n"])
    if place.arm.set == "after":
        reward = metrics["reward"]
        if reward:
            found["reward_roc_auc"] = Figure(reward["roc_auc"], reward["roc_auc_ci"], reward["n"])
        found |= {
            name: Figure(metrics[name], metrics[f"{name}_ci"], own["n"])
            for name in ("plausible_gain", "gain_over_control", "gap_closed")
            if metrics[name] is not None
        }
        found |= {f"gain of {name}": Figure(entry["gain"], entry["ci"]) for name, entry in metrics["gains"].items()}
    return found


def figures_in(entry: dict[str, Any]) -> dict[str, Figure]:
    """The figures of one set in `metrics.json`: numbers, with interval and number of images where they have any."""
    rows = {row.key: row for row in ROWS}
    found = {}
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name.startswith("n_") or name == "n":
            continue
        row = rows.get(name)
        count = entry.get(row.count) if row and row.count else None
        found[name] = Figure(float(value), entry.get(row.interval) if row and row.interval else None, count)
    return found


def reward_ranking(place: Place) -> dict[str, Figure]:
    """How well the arm's reward model ranks images that no arm has seen, by the faultless grader and by the judge.

    The images are the base's samples that the first arm's evaluation looks at: their seeds are no candidate's.
    """
    images = ImageSet.load(place.first / "samples_before")
    model = load_reward_model(str(last_round(place.run_dir, "reward"))).to(PartialState().device).eval()
    rewards = alignment.rewards_of(model.rewards, model.config.class_names, images, PartialState().device)
    found = {}
    for name in ("grader", "judge"):
        verdicts = alignment.ask(SimulatedGrader.load(place.first / name), images).plausible
        found[f"roc_auc_by_{name}"] = Figure(
            float(roc_auc_score(verdicts, rewards)), roc_auc_interval(rewards, verdicts, seed=0), len(images)
        )
    return found


def checks(place: Place) -> dict[str, Figure]:
    """How reward and judge went while the adapter was trained, and what came of it in the end."""
    training = training_of(place)
    rows, n = training["checks"], training["n_check_images"]
    judged = [row["judge_share"] for row in rows]
    best = max(rows, key=lambda row: row["judge_share"])
    kept = next(row for row in rows if row["epoch"] == training["kept_epoch"])

    def accepted(share: float) -> Figure:
        return Figure(share, alignment.wilson(round(share * n), n, CONFIDENCE), n)

    return {
        "judge_first": accepted(judged[0]),
        "judge_last": accepted(judged[-1]),
        "judge_kept": accepted(kept["judge_share"]),
        "judge_best": Figure(best["judge_share"], None, n),
        "judge_kept_less_best": Figure(kept["judge_share"] - best["judge_share"], None, n),
        "reward_first": Figure(rows[0]["reward"], None, n),
        "reward_last": Figure(rows[-1]["reward"], None, n),
        "epochs": Figure(rows[-1]["epoch"]),
        "kept_epoch": Figure(training["kept_epoch"]),
        "best_epoch": Figure(best["epoch"]),
    }


def training_of(place: Place) -> dict[str, Any]:
    """What the run record of the arm's adapter says of its training."""
    return RunRecord.load(last_round(place.run_dir, "adapter")).metrics


def rare_class(place: Place) -> dict[str, Figure]:
    """What the arm's images add to a classifier of real images that has few of one class, tested on unseen real images.

    `options`: `class`, and `added`, how many generated images of it join the real ones. The arm `real` adds none.
    """
    name, added = str(place.experiment.options["class"]), int(place.experiment.options["added"])
    data = place.run_dir / "data"
    train, test = ImageSet.load(data, "train"), ImageSet.load(data, "test")
    generated = None
    if place.arm.set != "real":
        generated = ImageSet.load(last_round(place.run_dir, f"samples_{place.arm.set}"))
        rows = rows_of_class(generated, generated.class_names.index(name))
        if len(rows) < added:
            raise InputError(f"{place.arm.title} has {len(rows)} images of {name}, not {added}; raise `sample`'s.")
        generated = generated.select(rows[:added].tolist())
    encoder = parse(RunRecord.load(place.first / "evaluation").config["encoder"])
    network = load_encoder(encoder.name, revision=encoder.revision)
    store = FeatureStore(network, str(encoder), features_of(place.first.parents[3]), PartialState().device)
    features = store.features(train.images, "real training images")
    class_ids = train.class_ids.numpy()
    if generated is not None:
        features = np.concatenate([features, store.features(generated.images, f"{place.arm.title} of {name}")])
        class_ids = np.concatenate([class_ids, np.full(len(generated), train.class_names.index(name))])
    predicted = utility.predict_real(features, class_ids, store.features(test.images, "real test images"))
    true, rare = test.class_ids.numpy(), test.class_names.index(name)
    return {
        "class_recall": proportion(predicted[true == rare] == rare),
        "f1": Figure(float(f1_score(true, predicted, labels=[rare], average="macro")), None, len(true)),
        "accuracy": proportion(predicted == true),
        "added": Figure(0 if generated is None else len(generated)),
        "real_of_class": Figure(int((train.class_ids == rare).sum())),
    }
