"""In which order a grader sees images: where controls and repeats come, what is drawn at random, which pairs.

Everything follows from the study's seed and the grader's pseudonym, so that a restarted server draws the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pathalign.artefacts import write_atomically
from pathalign.images import ImageSet

if TYPE_CHECKING:
    from pathalign.reward import RewardModel

CONTROL, REPEAT, RANDOM, UNCERTAINTY, PAIRWISE = "control", "repeat", "random", "uncertainty", "pairwise"
SETTLING = 10  # an image that is owed is given within about so many


@dataclass(frozen=True)
class Counts:
    """How many images of each sort a grader was shown so far."""

    control: int = 0
    repeat: int = 0
    random: int = 0
    uncertainty: int = 0

    @property
    def shown(self) -> int:
        """All of them."""
        return self.control + self.repeat + self.random + self.uncertainty


@dataclass(frozen=True)
class Shares:
    """Shares of what is shown (controls, repeats), and of the candidates (random)."""

    control: float
    repeat: float
    random: float  # 1 where everything is drawn at random


@dataclass(frozen=True)
class Plan:
    """Everything one grader may be shown, each list in this grader's own order."""

    random: tuple[str, ...]
    uncertainty: tuple[str, ...]  # in the order of a model, or of a proposal
    controls: tuple[str, ...]
    pairs: tuple[str, ...]


def choose(counts: Counts, shares: Shares, seed: str) -> str:
    """What comes next: `control`, `repeat`, `random` or `uncertainty`.

    Each hidden sort has its share as a chance at every place, a little more while it has fallen behind and less while
    it is ahead, from 0 to twice the share: the shares are kept, and no place gives a sort away. Candidates drawn at
    random never fall below their share.

    Args:
        counts: What was shown before.
        shares: What is wanted.
        seed: Of this place in the grader's sequence.
    """
    drawn = random.Random(seed)
    where = drawn.random()
    control = _chance(shares.control, counts.control, counts.shown)
    if where < control:
        return CONTROL
    if where < control + _chance(shares.repeat, counts.repeat, counts.shown):
        return REPEAT
    behind = counts.random < shares.random * (counts.random + counts.uncertainty + 1)
    return RANDOM if behind or drawn.random() < shares.random / 4 else UNCERTAINTY


def _chance(share: float, given: int, shown: int) -> float:
    behind = share * (shown + 1) - given
    return min(max(share + behind / SETTLING, 0.0), 2 * share)


def random_sample(candidates: Sequence[str], share: float, seed: int) -> frozenset[str]:
    """The candidates that are drawn at random whatever a model says of them, the same for all graders.

    They are a uniform sample of all candidates, so that figures on them are unbiased.
    """
    return frozenset(random.Random(f"{seed}|random").sample(list(candidates), math.ceil(share * len(candidates))))


def plan(
    grader: str,
    candidates: Sequence[str],
    most_uncertain_first: Sequence[str],
    controls: Sequence[str],
    pairs: Sequence[str],
    seed: int,
) -> Plan:
    """One grader's order.

    Args:
        grader: Pseudonym.
        candidates: Those drawn at random.
        most_uncertain_first: The others, in the order in which all graders get them.
        controls: Real images.
        pairs: Keys of pairs.
        seed: The study's.
    """
    orders = []
    for name, ids in (("random", candidates), ("controls", controls), ("pairs", pairs)):
        order = list(ids)
        random.Random(f"{seed}|{grader}|{name}").shuffle(order)
        orders.append(tuple(order))
    return Plan(random=orders[0], uncertainty=tuple(most_uncertain_first), controls=orders[1], pairs=orders[2])


def rank_by_uncertainty(images: ImageSet, reward_model: str, cache: Path | None = None) -> list[str]:
    """Ids of images, those first whose reward is nearest to one half.

    Args:
        images: No image twice.
        reward_model: Folder or Hub id.
        cache: JSON file of rewards: what this model gave before is read from it, and what is new is added.

    Raises:
        InputError: If the reward model cannot be loaded or does not know a class.
    """
    if not len(images):
        return []
    from pathalign.generate import score
    from pathalign.reward import load_reward_model

    model = load_reward_model(reward_model)
    version = _version(model)
    rewards = _cached_rewards(cache, version)
    keys = [f"{label}/{image_id}" for label, image_id in zip(images.labels(), images.image_ids, strict=True)]
    new = [row for row, key in enumerate(keys) if key not in rewards]
    if new:
        unknown = images.select(new)
        found = score(model, unknown.images, unknown.class_ids.tolist(), unknown.class_names).tolist()
        rewards |= dict(zip((keys[row] for row in new), found, strict=True))
        if cache:
            with contextlib.suppress(OSError):  # then it is computed again at the next start
                write_atomically(cache, json.dumps({"reward_model": version, "rewards": rewards}))
    distances = {image_id: abs(rewards[key] - 0.5) for image_id, key in zip(images.image_ids, keys, strict=True)}
    return sorted(distances, key=lambda image_id: (distances[image_id], image_id))


def _version(model: RewardModel) -> str:
    """What tells this model from any other, wherever it was loaded from: a hash of its configuration and weights."""
    import torch

    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cached_rewards(cache: Path | None, version: str) -> dict[str, float]:
    """Class and image id -> reward by this version of the model; none if the file is missing or cannot be used."""
    try:
        kept = json.loads(cache.read_text()) if cache else {}
        return dict(kept["rewards"]) if kept.get("reward_model") == version else {}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return {}


def draw_pairs(labels: Mapping[str, str], pairs_per_class: int, seed: int) -> list[str]:
    """Keys of pairs of images of one class; no pair twice, and images as evenly used as can be.

    Args:
        labels: Image id -> class.
        pairs_per_class: So many of each class, or all that there are.
        seed: The study's.
    """
    pairs: list[str] = []
    for name in dict.fromkeys(labels.values()):
        ids = sorted(image_id for image_id, label in labels.items() if label == name)
        random.Random(f"{seed}|pairs|{name}").shuffle(ids)
        # Step 1 pairs neighbours on a ring, step 2 those two apart, ...: after each round all were used equally often.
        rounds = (
            (ids[i], ids[(i + step) % len(ids)]) for step in range(1, len(ids) // 2 + 1) for i in _ring(ids, step)
        )
        pairs += [pair_key(*pair) for pair, _ in zip(rounds, range(pairs_per_class), strict=False)]
    return pairs


def _ring(ids: Sequence[str], step: int) -> Sequence[int]:
    """Starting points of a round; the middle step of an even ring meets each pair twice."""
    count = len(ids) // 2 if 2 * step == len(ids) else len(ids)
    order = list(range(0, count, 2)) + list(range(1, count, 2))
    return order if step == 1 else range(count)


def pair_key(one: str, other: str) -> str:
    """Name of a pair, whichever of its images comes first."""
    return "|".join(sorted((one, other)))
