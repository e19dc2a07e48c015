"""Pipeline -> candidate set: images with everything that is needed to draw each of them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from torch import Tensor

from pathalign.diffusion import lora
from pathalign.diffusion.loading import BaseModel, load_base, pipeline_kind
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.images import ImageSet, contact_sheet, shard_name, to_images, to_pixel_values
from pathalign.pinning import identity, pinned
from pathalign.progress import Progress
from pathalign.reward import RewardModelConfig, load_reward_model
from pathalign.schema import InputError, RunRecord, unknown_name
from pathalign.settings.generate import GenerateConfig
from pathalign.shards import Process, write_shards

SCHEDULERS = {
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
SEEDS_PER_ATTEMPT = 2**24  # a generator on the CPU heeds the lowest 32 bits of its seed only


@dataclass(frozen=True)
class Sampling:
    """How images are drawn: denoising steps, guidance, images at once, seed of the first image, draws for each kept."""

    inference_steps: int
    guidance_scale: float
    batch_size: int
    first_seed: int
    best_of: int = 1


class ImageReward(Protocol):
    """A reward model, or what answers as one: `class_ids` are positions in `config.class_names`."""

    config: RewardModelConfig

    @property
    def device(self) -> torch.device:
        """Where images and class ids have to be."""

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        """Rewards of images `(n, 3, height, width)` in [-1, 1], shape `(n,)`."""


def load_pipeline(path_or_repo_id: str, revision: str | None = None) -> ClassConditionalPipeline:
    """A class-conditional pipeline from a folder or the Hub, on the GPU where there is one.

    Raises:
        InputError: If it cannot be loaded, or is of another kind.
    """
    if pipeline_kind(path_or_repo_id, revision) is not ClassConditionalPipeline:
        raise InputError(f"{path_or_repo_id} is Stable Diffusion; give a pipeline made by `pathalign pretrain`.")
    return load_base(path_or_repo_id, revision)


def set_scheduler(pipeline: BaseModel, name: str) -> None:
    """Change the sampler and keep the training schedule; names are the keys of `SCHEDULERS`."""
    pipeline.scheduler = SCHEDULERS[name].from_config(pipeline.scheduler.config)


def judged_names(pipeline: BaseModel) -> list[str]:
    """What the images of each class are judged as, in the order of the ids: a concept as the class it came from."""
    return [pipeline.concepts.get(name, name) for name in pipeline.class_names]


def sample(
    pipeline: BaseModel,
    class_ids: Sequence[int],
    seeds: Sequence[int],
    inference_steps: int,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Images of the given classes and seeds, shape `(n, 3, size, size)`, uint8, on the CPU."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(
        list(class_ids),
        generators,
        num_inference_steps=inference_steps,
        guidance_scale=guidance_scale,
        output_type="pt",
    )[0]
    return to_images(images)


def generate(config: GenerateConfig, output_dir: str | Path) -> RunRecord:
    """Sample a candidate set; batches and shards that an interrupted call finished are kept.

    Several processes share the shards of `images_per_shard` images; each draws its own without waiting for others.
    Concepts that the adapter brings are drawn where `classes` names them. Their images bear the label of their parent,
    as whose they are judged, and the column `concept` says which they are.

    Raises:
        InputError: If the pipeline, adapter or reward model cannot be loaded, or a class is unknown.
    """
    config = pinned(config)
    device = Process.current().device()
    pipeline = load_base(config.model, config.revision, config.classes, config.prompt, device)
    names = config.classes or pipeline.class_names
    if config.adapter is not None:
        lora.load(pipeline, config.adapter, config.adapter_scale, any_base=config.any_base)
    for name in names:
        if name not in pipeline.class_names:
            raise InputError(unknown_name("class", name, pipeline.class_names))
    set_scheduler(pipeline, config.scheduler)
    reward_model = load_reward_model(config.reward_model).to(device) if config.reward_model else None
    labels = [pipeline.class_names.index(name) for name in names for _ in range(config.images_per_class)]
    inputs = {"model": identity(config.model, config.revision)}
    inputs |= {name: identity(source) for name in ("adapter", "reward_model") if (source := getattr(config, name))}
    record = RunRecord(
        stage="generate",
        config=asdict(config),
        inputs=inputs,
        seeds={"seed": config.seed},
        metrics={"n": len(labels)},
    )
    size = config.images_per_shard or len(labels)
    parts = [range(start, min(start + size, len(labels))) for start in range(0, len(labels), size)]

    def make(index: int, scratch: Path, progress: Progress) -> None:
        drawn = _draw_rows(pipeline, reward_model, labels, parts[index], config, inputs, scratch, progress)
        drawn.save(scratch, shard=(index, len(parts)))

    def finish(folder: Path, paths: list[Path]) -> None:
        ids = torch.tensor(labels)
        firsts = torch.cat([(ids == class_id).nonzero()[:12, 0] for class_id in range(len(pipeline.class_names))])
        sheet = contact_sheet(_images_of(firsts.tolist(), paths, size), columns=min(12, config.images_per_class))
        sheet.save(folder / "samples.png")

    shards = {shard_name("train", index, len(parts)): len(rows) for index, rows in enumerate(parts)}
    return write_shards(output_dir, record, shards, "image", make, finish)


def _draw_rows(
    pipeline: BaseModel,
    reward_model: ImageReward | None,
    labels: Sequence[int],
    rows: range,
    config: GenerateConfig,
    inputs: Mapping[str, str],
    scratch: Path,
    progress: Progress,
) -> ImageSet:
    """Draw some of a set's images: row i is drawn in turn i modulo the number of turns, whatever `rows` are."""
    turns = config.varied_steps or [config.inference_steps]
    parts, drawn = [], []
    for turn, steps in enumerate(turns):
        own = [row for row in rows if row % len(turns) == turn]
        if own:
            first_seed = config.seed + turn * len(labels) + own[0] // len(turns)
            sampling = Sampling(steps, config.guidance_scale, config.batch_size, first_seed, config.best_of)
            folder = scratch / f"steps-{turn}"
            folder.mkdir(exist_ok=True)
            class_ids = [labels[row] for row in own]
            parts += draw(pipeline, reward_model, class_ids, sampling, folder, progress=progress)
            drawn += own
    order = torch.tensor(drawn).argsort()  # back in the order of the labels
    columns: dict[str, list[Any]] = {
        "seed": _reordered([seed for part in parts for seed in part["seeds"]], order),
        "model": [inputs["model"]] * len(rows),
        "adapter": [inputs.get("adapter", "")] * len(rows),
        "scheduler": [config.scheduler] * len(rows),
        "steps": [turns[row % len(turns)] for row in rows],
        "guidance": [config.guidance_scale] * len(rows),
        "kind": ["synthetic"] * len(rows),
    }
    if reward_model is not None:
        columns["reward"] = _reordered([reward for part in parts for reward in part["rewards"]], order)
    images = torch.cat([part["images"] for part in parts])[order]
    names, judged = pipeline.class_names, judged_names(pipeline)
    class_names = [name for name in names if name not in pipeline.concepts]
    asked = [labels[row] for row in rows]
    if len(class_names) <= max(labels):
        columns["concept"] = [names[label] if names[label] in pipeline.concepts else "" for label in asked]
    parents = torch.tensor([class_names.index(judged[label]) for label in asked])
    return ImageSet.build(images, parents, class_names, columns)


def _images_of(rows: Sequence[int], paths: Sequence[Path], size: int) -> Tensor:
    """Images at some rows of a set in files of `size` rows, one file in memory at a time."""
    found: dict[int, Tensor] = {}
    for index in sorted({row // size for row in rows}):
        images = ImageSet.read(paths[index]).images
        found |= {row: images[row % size].clone() for row in rows if row // size == index}
    return torch.stack([found[row] for row in rows])


def _reordered(values: list[Any], order: Tensor) -> list[Any]:
    return [values[row] for row in order.tolist()]


def draw(
    pipeline: BaseModel,
    reward_model: ImageReward | None,
    class_ids: Sequence[int],
    sampling: Sampling,
    scratch: Path,
    process: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Draw images batch by batch; every finished batch is a file in `scratch`, where a later call finds it.

    Args:
        pipeline: With its scheduler set and its adapter loaded.
        reward_model: Scores the images, and chooses among `best_of` draws; None gives rewards of 0.
        class_ids: One for each image; image i has seed `sampling.first_seed + i`.
        sampling: How images are drawn.
        scratch: Existing folder.
        process: Index and number of processes; each draws its own share of the batches.
        progress: Counts the images; by default one of these images alone.

    Returns:
        Batches with `start`, `images` (n, 3, size, size) uint8, `seeds` and `rewards`.
    """
    parts = []
    index, processes = process
    starts = range(index * sampling.batch_size, len(class_ids), processes * sampling.batch_size)
    own = nullcontext(progress) if progress else Progress("generate", len(class_ids) // processes, unit="image")
    with own as progress:
        for start in starts:
            path = scratch / f"batch-{start:08d}.pt"
            labels = class_ids[start : start + sampling.batch_size]
            if not path.is_file():
                part = _best_batch(pipeline, reward_model, labels, sampling, sampling.first_seed + start)
                torch.save({"start": start, **part}, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
            parts.append(torch.load(path, weights_only=True))
            progress.update(len(labels))
    return parts


def _best_batch(
    pipeline: BaseModel,
    reward_model: ImageReward | None,
    class_ids: Sequence[int],
    sampling: Sampling,
    first_seed: int,
) -> dict[str, Any]:
    """Draw `best_of` images for each label and keep the one of the highest reward; draw 0 has the plain seed."""
    best: dict[str, Any] = {}
    for attempt in range(sampling.best_of):
        seeds = [first_seed + index + attempt * SEEDS_PER_ATTEMPT for index in range(len(class_ids))]
        images = sample(pipeline, class_ids, seeds, sampling.inference_steps, sampling.guidance_scale)
        rewards = (
            score(reward_model, images, class_ids, judged_names(pipeline)) if reward_model else torch.zeros(len(seeds))
        )
        if not best:
            best = {"images": images, "seeds": seeds, "rewards": rewards.tolist()}
            continue
        for index in (rewards > torch.tensor(best["rewards"])).nonzero()[:, 0].tolist():
            best["images"][index] = images[index]
            best["seeds"][index] = seeds[index]
            best["rewards"][index] = float(rewards[index])
    return best


def known_ids(reward_model: ImageReward, class_ids: Sequence[int], class_names: Sequence[str]) -> Tensor:
    """The reward model's own ids of classes that are named otherwise here, shape `(n,)`.

    Raises:
        InputError: If it does not know one of the classes.
    """
    known = list(reward_model.config.class_names)
    missing = sorted({class_names[class_id] for class_id in class_ids} - set(known))
    if missing:
        raise InputError(f"The reward model does not know the classes {missing}; it was trained on {known}.")
    return torch.tensor([known.index(class_names[class_id]) for class_id in class_ids])


@torch.no_grad()
def score(reward_model: ImageReward, images: Tensor, class_ids: Sequence[int], class_names: Sequence[str]) -> Tensor:
    """Rewards of uint8 images `(n, 3, size, size)`, shape `(n,)`, on the CPU; `class_ids` index `class_names`.

    Raises:
        InputError: If the reward model does not know one of the classes.
    """
    ids = known_ids(reward_model, class_ids, class_names).to(reward_model.device)
    pixel_values = to_pixel_values(images).to(reward_model.device)
    parts = [
        reward_model.rewards(pixels, part) for pixels, part in zip(pixel_values.split(250), ids.split(250), strict=True)
    ]
    return torch.cat(parts).cpu()
