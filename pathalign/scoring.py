"""A candidate set -> its rewards: one reward for each image, shard by shard, by one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from pathalign.artefacts import fingerprint
from pathalign.generate import known_ids
from pathalign.images import ImageSet, Shards, dataset_shards, read_table, shard_name, to_pixel_values
from pathalign.pinning import identity, pinned
from pathalign.progress import Progress, say
from pathalign.reward import RewardModel, load_reward_model
from pathalign.schema import RunRecord
from pathalign.settings.score import ScoreConfig
from pathalign.shards import Process, write_shards

CRITERION = "criterion_"  # and a criterion's name: the probability that it is met


def score_set(config: ScoreConfig, output_dir: str | Path) -> RunRecord:
    """Write a dataset of the candidates' shards with the columns `image_id`, `label`, `reward` and one per criterion.

    Several processes share the shards; those that an interrupted call finished are kept.

    Raises:
        InputError: If the candidates or the reward model cannot be read, or it does not know one of the classes.
    """
    config, process = pinned(config), Process.current()
    shards = dataset_shards(config.candidates, config.split)
    model = load_reward_model(config.reward_model).to(process.device()).eval()
    inputs = {"candidates": _content(shards), "reward_model": identity(config.reward_model)}
    record = RunRecord(stage="score", config=asdict(config), inputs=inputs)

    def make(index: int, scratch: Path, progress: Progress) -> None:
        found = ImageSet.read(shards.path(index))
        columns = dict(found.columns) if config.with_images else {}
        columns |= judge(model, found, config.batch_size)
        scored = ImageSet(found.images, found.class_ids, found.class_names, found.image_ids, columns)
        scored.save(scratch, config.split, (index, len(shards)), with_images=config.with_images)
        progress.update()

    def finish(folder: Path, paths: list[Path]) -> None:
        record.metrics = summary(paths)
        for name, row in record.metrics["by_class"].items():
            say(f"{name}: {row['n']} images, reward {row['reward']:.3f}, {row['above_half']:.1%} above one half")

    parts = {shard_name(config.split, index, len(shards)): 1 for index in range(len(shards))}
    return write_shards(output_dir, record, parts, "shard", make, finish)


@torch.no_grad()
def judge(model: RewardModel, images: ImageSet, batch_size: int) -> dict[str, list[float]]:
    """Columns `reward` and `criterion_<name>`, probabilities in 0..1 for each image.

    Raises:
        InputError: If the reward model does not know one of the classes.
    """
    parts: dict[str, list[float]] = {"reward": [], **{f"{CRITERION}{name}": [] for name in model.config.criteria}}
    ids = known_ids(model, images.class_ids.tolist(), images.class_names)
    for pixels, class_ids in zip(images.images.split(batch_size), ids.split(batch_size), strict=True):
        found = model(pixel_values=to_pixel_values(pixels).to(model.device), class_ids=class_ids.to(model.device))
        parts["reward"] += found.rewards.tolist()
        for index, name in enumerate(model.config.criteria):
            parts[f"{CRITERION}{name}"] += found.criteria_logits[:, index].sigmoid().tolist()
    return parts


def summary(paths: Sequence[Path]) -> dict[str, Any]:
    """Number of images, mean reward and share of rewards above one half: in all, and by class."""
    labels, rewards, names = [], [], []
    for path in paths:
        table = read_table(path, ["label", "reward"])
        names = datasets.Features.from_arrow_schema(table.schema)["label"].names
        labels.append(table.column("label").to_numpy())
        rewards.append(table.column("reward").to_numpy())
    classes, values = np.concatenate(labels), np.concatenate(rewards)
    by_class = {name: _measures(values[classes == index]) for index, name in enumerate(names) if index in classes}
    return {**_measures(values), "by_class": by_class}


def _measures(rewards: np.ndarray) -> dict[str, Any]:
    return {"n": len(rewards), "reward": float(rewards.mean()), "above_half": float((rewards > 0.5).mean())}


def _content(shards: Shards) -> str:
    """What tells one candidate set from another: ids and classes of the images of a folder, or the Hub's commit."""
    if not Path(shards.source).is_dir():
        return f"{shards.source}@{shards.revision or 'main'}"
    tables = (read_table(shards.path(index), ["image_id", "label"]) for index in range(len(shards)))
    return fingerprint([fingerprint(table.to_pydict()) for table in tables])
