"""Where rewards come from: reward models, Python functions, and weighted sums of them.

All look like a `RewardModel` to those who ask: `rewards(pixel_values, class_ids)`, and a `config` that names the
classes whose positions `class_ids` are.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from pathalign import pinning
from pathalign.artefacts import fingerprint
from pathalign.cards import Grading
from pathalign.images import to_images
from pathalign.reward import RewardModel, RewardModelConfig, load_reward_model
from pathalign.schema import InputError, unknown_name
from pathalign.settings.adapter import AdapterConfig, GuardedConfig, is_function, weighted_source

Result = TypeVar("Result")
Function = Callable[[Tensor, list[str]], Sequence[float]]


class RewardFunction(nn.Module):
    """A Python function in the place of a reward model.

    Args:
        source: `module:function`. The function gets `images`, a uint8 tensor `(n, 3, height, width)` on the CPU, and
            `labels`, n class names; it returns n finite numbers (list, array or tensor) in any range, higher is better.
        class_names: Classes that ids stand for.

    Raises:
        InputError: If the module or the function does not exist.
    """

    place: Tensor
    config: RewardModelConfig

    def __init__(self, source: str, class_names: Sequence[str]) -> None:
        super().__init__()
        self.source, self.function = source, load_function(source)
        grading = dataclasses.asdict(Grading(simulated=False, functions=(source,)))
        self.config = RewardModelConfig(class_names=list(class_names), grading=grading)
        self.register_buffer("place", torch.zeros(()), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where rewards are returned; the function itself works on the CPU."""
        return self.place.device

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        """Rewards of images `(n, 3, height, width)` in [-1, 1], shape `(n,)`, float32, without a gradient.

        Raises:
            InputError: If a gradient is wanted, or the function does not return n finite numbers.
        """
        if pixel_values.requires_grad and torch.is_grad_enabled():
            raise InputError(no_gradient([self.source]))
        images = to_images(pixel_values.detach().float().cpu())
        labels = [self.config.class_names[class_id] for class_id in class_ids.tolist()]
        returned = self.function(images, labels)
        try:
            rewards = torch.as_tensor(returned, dtype=torch.float32).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"Reward {self.source} returned a {type(returned).__name__} that is no list of numbers ({error}); "
                f"return one number for each of the {len(images)} images."
            ) from error
        if rewards.shape != (len(images),):
            raise InputError(
                f"Reward {self.source} returned {rewards.numel()} values of shape {tuple(rewards.shape)} for "
                f"{len(images)} images; return one number for each."
            )
        return require_finite_rewards(rewards, self.source).to(pixel_values.device)


class RewardPart(NamedTuple):
    """One term of a weighted sum: what it is called, what gives the rewards, and its weight."""

    source: str
    reward: Reward
    weight: float


class WeightedRewards(nn.Module):
    """A weighted sum of rewards.

    Args:
        parts: Terms of the sum, the main one first. It says who graded.
        class_names: Classes that ids stand for; each part has its own order.

    Raises:
        InputError: If a part does not know a class.
    """

    config: RewardModelConfig

    def __init__(self, parts: Sequence[RewardPart], class_names: Sequence[str]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(part.reward for part in parts)
        self.sources, self.weights = [part.source for part in parts], [part.weight for part in parts]
        configs: list[RewardModelConfig] = [part.reward.config for part in parts]
        self.class_maps = [
            class_map(config.class_names, class_names, source)
            for config, source in zip(configs, self.sources, strict=True)
        ]
        gradings = [Grading(**(config.grading or {"simulated": False})) for config in configs]
        grading = dataclasses.replace(
            gradings[0],
            simulated=any(grading.simulated for grading in gradings),
            functions=tuple(name for grading in gradings for name in grading.functions),
        )
        self.config = RewardModelConfig(class_names=list(class_names), grading=dataclasses.asdict(grading))

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return cast(Any, self.terms[0]).device

    def rewards(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        """Sum over the parts of weight times reward; arguments and result as of `RewardModel.rewards`.

        Raises:
            InputError: If a part's reward is not finite, or a function cannot be used.
        """
        total = torch.zeros(len(pixel_values), device=pixel_values.device)
        for term, weight, ids, source in zip(self.terms, self.weights, self.class_maps, self.sources, strict=True):
            part = cast(Any, term).rewards(pixel_values, ids.to(class_ids.device)[class_ids])
            total = total + weight * require_finite_rewards(part, source)
        return total


Reward = RewardModel | RewardFunction | WeightedRewards


def load_reward(source: str, class_names: Sequence[str]) -> RewardModel | RewardFunction:
    """A reward model from a folder or Hub id, or `module:function`.

    Raises:
        InputError: If it cannot be loaded, or does not know one of the classes.
    """
    if is_function(source):
        return RewardFunction(source, class_names)
    model = load_reward_model(source)
    class_map(model.config.class_names, class_names, source)
    return model


def load_rewards(config: AdapterConfig, class_names: Sequence[str]) -> Reward:
    """What a run is rewarded by: `reward_model`, with `other_rewards` added where there are any.

    Raises:
        InputError: If one cannot be loaded, or does not know one of the classes.
    """
    main = load_reward(config.reward_model, class_names)
    others = [weighted_source(text) for text in config.other_rewards] if isinstance(config, GuardedConfig) else []
    if not others:
        return main
    parts = [RewardPart(config.reward_model, main, 1.0)]
    parts += [RewardPart(source, load_reward(source, class_names), weight) for source, weight in others]
    return WeightedRewards(parts, class_names)


def load_function(source: str) -> Function:
    """The function `module:function`; a module may lie in the current folder.

    Raises:
        InputError: If it cannot be imported, or is no function.
    """
    module_name, _, name = source.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise InputError(
            f"Reward {source!r}: module {module_name!r} cannot be imported ({error}). Write `module:function`, and run "
            "where Python finds the module: in its folder, or with it installed."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        problem = unknown_name("function", name, known) if function is None else f"`{name}` is no function."
        raise InputError(f"Reward {source!r}: {problem} Write `module:function`.")
    return cast(Function, function)


def class_map(known: Sequence[str], class_names: Sequence[str], source: str) -> Tensor:
    """Positions in `known` of `class_names`, shape `(len(class_names),)`: turns one's class ids into the other's.

    Raises:
        InputError: If a class is unknown there.
    """
    unknown = sorted(set(class_names) - set(known))
    if unknown:
        raise InputError(
            f"{source} does not know the classes {unknown}; it was trained on {list(known)}. Use one that was trained "
            "on images or feedback of this base model's classes."
        )
    return torch.tensor([list(known).index(name) for name in class_names])


def require_finite_rewards(rewards: Tensor, source: str) -> Tensor:
    """`rewards` of shape `(n,)` as they are, in float32.

    Raises:
        InputError: If one is NaN or infinite.
    """
    wrong = ~torch.isfinite(rewards)
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise InputError(
            f"Reward {source} gave {int(wrong.sum())} values of {len(rewards)} that are not finite, the first "
            f"{float(rewards[first])} for image {first}; every reward must be a finite number. Lower "
            "`learning_rate` if the images are broken, or train the reward model again."
        )
    return rewards.float()


def without_gradient(reward: Reward) -> list[str]:
    """Sources of `reward` that no gradient passes: Python functions."""
    terms = list(reward.terms) if isinstance(reward, WeightedRewards) else [reward]
    return [term.source for term in terms if isinstance(term, RewardFunction)]


def no_gradient(sources: Sequence[str]) -> str:
    """Say that a method needs gradients which functions do not have."""
    return (
        f"This method follows the gradient of the reward, and {', '.join(sources)} has none: it is a Python function. "
        "Use reward models only, or a method that needs no gradient, such as ddpo."
    )


def identity(source: str) -> str:
    """What tells one version of a source from another: a folder's fingerprint, that of a function's file, or the id."""
    if is_function(source):
        path = getattr(sys.modules.get(source.partition(":")[0]), "__file__", None)
        return f"{source}@{fingerprint(Path(path))}" if path else source
    return pinning.identity(source)


class AsynchronousRewards(Generic[Result]):
    """Scores batches in a worker thread, one after the other, while the caller draws the next; without gradients.

    A context: leaving it drops what has not begun and waits for what has.

    Args:
        score: Called with each batch's images and class ids.
    """

    def __init__(self, score: Callable[[Tensor, Tensor], Result]) -> None:
        self.score = score
        self.pending: list[Future[Result]] = []
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rewards")

    def submit(self, images: Tensor, class_ids: Tensor) -> None:
        """Give the worker one more batch; neither tensor may be changed afterwards."""
        self.pending.append(self.worker.submit(self._scored, images, class_ids))

    def results(self) -> list[Result]:
        """Wait for all batches submitted since the last call; scores in the order of submission.

        Raises:
            Exception: The first that `score` raised, in the order of submission.
        """
        pending, self.pending = self.pending, []
        return [future.result() for future in pending]

    def _scored(self, images: Tensor, class_ids: Tensor) -> Result:
        with torch.no_grad():  # a thread has a gradient mode of its own
            return self.score(images, class_ids)

    def __enter__(self) -> AsynchronousRewards[Result]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.worker.shutdown(wait=True, cancel_futures=True)
