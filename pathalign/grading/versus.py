"""Two models against each other: the same class, the same seeds; side by side, or as a blind vote.

A vote is a `Preference` row that goes through the same outbox as a grade. The images that are voted on are drawn once
and kept as a candidate set beside the votes, with the column `role` (`base` or `aligned`), so that votes can become a
preference dataset and be counted for a model.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathalign.artefacts import fingerprint
from pathalign.diffusion import lora
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.generate import SCHEDULERS, load_pipeline, sample, set_scheduler
from pathalign.grading.outbox import Outbox
from pathalign.grading.preferences import standing_preferences
from pathalign.grading.sinks import Sink
from pathalign.images import ImageSet
from pathalign.schema import CHOICES, InputError, Preference, unknown_name

BASE, ALIGNED = "base", "aligned"
FIRST_VOTE_SEED = 2**20  # nobody has seen these side by side with their names
SHORTEST_LOOK_S = 0.3  # a second click that came with the first is no vote on the next pair
CACHED_DRAWS = 64
NAMING = (
    "No models are named. Name a base pipeline and what to compare it with, as folders or Hub ids: `BASE_MODEL` and "
    "`ALIGNED_ADAPTER` (an adapter on the same pipeline), or `BASE_MODEL` and `ALIGNED_MODEL` (another pipeline). "
    "`BASE_ADAPTER` puts one on the base too. They are variables in the settings of a Space, or options: "
    "`python spaces/compare/app.py --base-model runs/demo/base --aligned-adapter runs/demo/adapter`."
)


@dataclass(frozen=True)
class Contender:
    """A model: a pipeline with or without an adapter, folders or Hub ids."""

    model: str
    adapter: str | None = None

    def load(self, scheduler: str) -> ClassConditionalPipeline:
        """The pipeline, ready to draw.

        Raises:
            InputError: If it or its adapter cannot be loaded.
        """
        pipeline = load_pipeline(self.model)
        if self.adapter:
            lora.load(pipeline, self.adapter)
        set_scheduler(pipeline, scheduler)
        return pipeline


def contenders(
    base_model: str | None, base_adapter: str | None, aligned_model: str | None, aligned_adapter: str | None
) -> tuple[Contender, Contender]:
    """The two models that are named; the second one's pipeline is the first one's unless it has one of its own.

    Raises:
        InputError: If models are missing, or both are the same.
    """
    if not base_model or not (aligned_model or aligned_adapter):
        raise InputError(NAMING)
    first = Contender(base_model, base_adapter or None)
    second = Contender(aligned_model or base_model, aligned_adapter or None)
    if first == second:
        raise InputError(f"Both models are {first.model} with the same adapter. {NAMING}")
    return first, second


class Comparison:
    """Draws the same classes and seeds from two models.

    Args:
        first: The base.
        second: What it is compared with.
        scheduler: Sampler of both.
        inference_steps: Denoising steps of both.
        guidance_scale: Of both.
        around: Wraps the function that draws, such as `spaces.GPU`.

    Raises:
        InputError: If a model cannot be loaded, or they have no class in common.
    """

    def __init__(
        self,
        first: Contender,
        second: Contender,
        scheduler: str = "dpmsolver++",
        inference_steps: int = 10,
        guidance_scale: float = 1.0,
        around: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda draw: draw,
    ) -> None:
        if scheduler not in SCHEDULERS:
            raise InputError(unknown_name("sampler", scheduler, SCHEDULERS))
        self.models = {BASE: first, ALIGNED: second}
        self._pipelines = {role: contender.load(scheduler) for role, contender in self.models.items()}
        names = [pipeline.class_names for pipeline in self._pipelines.values()]
        self.class_names = tuple(name for name in names[0] if name in names[1])
        if not self.class_names:
            raise InputError(f"The models have no class in common: {names[0]} against {names[1]}.")
        self._options = inference_steps, guidance_scale
        self.draw = lru_cache(CACHED_DRAWS)(around(self._draw))

    def _draw(self, class_label: str, seeds: tuple[int, ...]) -> dict[str, Tensor]:
        """Role -> images `(seeds, 3, size, size)`, uint8; row i of both starts from the same noise."""
        return {
            role: sample(pipeline, [pipeline.class_names.index(class_label)] * len(seeds), seeds, *self._options)
            for role, pipeline in self._pipelines.items()
        }

    def pool(self, pairs_per_class: int) -> ImageSet:
        """Images to vote on: rows 2i and 2i + 1 are the base's and the aligned model's image of one class and seed.

        Raises:
            InputError: If the models draw images of different sizes.
        """
        seeds = tuple(range(FIRST_VOTE_SEED, FIRST_VOTE_SEED + pairs_per_class))
        images: list[Tensor] = []
        class_ids: list[int] = []
        roles: list[str] = []
        for class_id, name in enumerate(self.class_names):
            drawn = self.draw(name, seeds)
            if drawn[BASE].shape != drawn[ALIGNED].shape:
                raise InputError("The models draw images of different sizes; a vote on them would not be blind.")
            for pair in zip(drawn[BASE], drawn[ALIGNED], strict=True):
                images += pair
            class_ids += [class_id] * 2 * pairs_per_class
            roles += [BASE, ALIGNED] * pairs_per_class
        columns: dict[str, list[Any]] = {
            "seed": [seed for _ in self.class_names for seed in seeds for _ in (BASE, ALIGNED)],
            "role": roles,
            "model": [self.models[role].model for role in roles],
            "adapter": [self.models[role].adapter or "" for role in roles],
            "kind": ["synthetic"] * len(roles),
        }
        return ImageSet.build(torch.stack(images), torch.tensor(class_ids), self.class_names, columns)


def keep_pool(pool: ImageSet, sink: Sink) -> str:
    """Put the images beside the votes, once; returns the folder, a candidate set for `pathalign grade export`."""
    folder = f"candidates/{fingerprint([pool.image_ids, pool.columns['role']])}"
    path = f"{folder}/data/train-00000-of-00001.parquet"
    if path not in sink.list(f"{folder}/"):
        with tempfile.TemporaryDirectory() as scratch:
            pool.save(scratch)
            sink.put(path, (Path(scratch) / "data/train-00000-of-00001.parquet").read_bytes())
    return folder


@dataclass(frozen=True)
class Showing:
    """A pair as it is shown to somebody: sides are random, and nothing here goes to the browser but two pictures."""

    preference_id: str
    class_label: str
    left_id: str
    right_id: str
    shown_at: float


class Votes:
    """Blind votes on a pool, one for each pair and grader. Thread-safe.

    Args:
        pool: See `Comparison.pool`.
        outbox: Where votes are kept; what it has is counted as done.
        secret: Orders the pairs differently for each grader.
        clock: Seconds since 1970.
    """

    def __init__(self, pool: ImageSet, outbox: Outbox, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self.pool, self.outbox, self._secret, self._clock = pool, outbox, secret, clock
        rows = zip(pool.image_ids[::2], pool.image_ids[1::2], pool.labels()[::2], strict=True)
        self.pairs = {frozenset((first, second)): label for first, second, label in rows if first != second}

    def progress(self, grader: str) -> tuple[int, int]:
        """How many pairs of how many the grader has judged."""
        return len(self.pairs) - len(self._open(grader)), len(self.pairs)

    def next_showing(self, grader: str) -> Showing | None:
        """A pair that the grader has not judged, in the grader's own order; None when all are done."""
        waiting = self._open(grader)
        if not waiting:
            return None
        pair = min(waiting, key=lambda ids: hashlib.sha256(self._secret + f"{grader}|{sorted(ids)}".encode()).digest())
        left, right = random.SystemRandom().sample(sorted(pair), 2)
        return Showing(uuid.uuid4().hex, self.pairs[pair], left, right, self._clock())

    def record(self, grader: str, showing: Showing, choice: str, session: str) -> bool:
        """Keep a vote; it is on the disk when this returns.

        Returns:
            False for a click that came too soon after the pair to be about it; nothing is kept then.

        Raises:
            InputError: If the choice is not one of `CHOICES`.
        """
        if choice not in CHOICES:
            raise InputError(unknown_name("choice", choice, CHOICES))
        now = self._clock()
        if now - showing.shown_at < SHORTEST_LOOK_S:
            return False
        row = Preference(
            preference_id=showing.preference_id,
            class_label=showing.class_label,
            left_image_id=showing.left_id,
            right_image_id=showing.right_id,
            choice=choice,
            grader=grader,
            session=session,
            app_version=f"pathalign {version('pathalign')} compare",
            recorded_at=datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        )
        return showing.preference_id in self.outbox.record([("preference", row.preference_id, asdict(row))])

    def _open(self, grader: str) -> list[frozenset[str]]:
        rows = [Preference.from_mapping(row) for row in self.outbox.rows("preference", grader)]
        done = {frozenset((row.left_image_id, row.right_image_id)) for row in standing_preferences(rows)}
        return [pair for pair in self.pairs if pair not in done]


def seeds_from(first_seed: int, count: int) -> tuple[int, ...]:
    """Seeds to look at side by side; they never run into those that are voted on."""
    start = first_seed % (FIRST_VOTE_SEED - count)
    return tuple(range(start, start + count))
