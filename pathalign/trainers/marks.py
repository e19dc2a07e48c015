"""Subtype marks: where they come from, which new classes they make, and a classifier that spreads them further.

Marks are few. A logistic regression on the features of all blocks of a frozen encoder learns them, says by
cross-validation how well, and marks images that no expert has seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pathalign.augment import ORIENTATIONS, orient
from pathalign.images import ImageSet, to_pixel_values
from pathalign.randomness import seeded
from pathalign.reward.encoders import Encoder
from pathalign.schema import InputError
from pathalign.settings.concepts import ConceptsConfig, concept_name
from pathalign.settings.subtypes import subtype_of, subtype_rule

CHOICE = 5  # stream of random numbers: which marks are used
FOLDS = 5
REGULARIZATION = 1e-2  # of the logistic regression: thousands of features from a hundred images
BATCH_SIZE = 100
LEAST_VARIANCE = 1e-6  # of a block's output over an image


@dataclass(frozen=True)
class Concept:
    """A new class: its name, the class that it is split off from, and the experts' word for it."""

    name: str
    parent: str
    subtype: str


@dataclass(frozen=True)
class Marks:
    """Images with the new class that they were marked as.

    Attributes:
        concepts: The new classes, sisters beside each other.
        images: Shape `(n, 3, size, size)`, uint8.
        concept_ids: Shape `(n,)`, int64, indices into `concepts`.
        real: Shape `(n,)`, bool: real images; the others are graded synthetic ones.
        image_ids: Content hash of each.
    """

    concepts: tuple[Concept, ...]
    images: Tensor
    concept_ids: Tensor
    real: Tensor
    image_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def sisters(self, parent: str) -> list[int]:
        """Indices of the concepts of one class."""
        return [index for index, concept in enumerate(self.concepts) if concept.parent == parent]

    @property
    def parents(self) -> list[str]:
        """The classes that are split."""
        return list(dict.fromkeys(concept.parent for concept in self.concepts))


def collect_marks(config: ConceptsConfig, real: ImageSet, class_names: Sequence[str]) -> Marks:
    """The marks of the feedback and of the real training images, at most `max_marks`, drawn at random.

    Subtypes are drawn from in turn, so that a rare one is not outnumbered while it has marks. Of graded images only
    those that came out plausible count: nothing is to be learned from the others' looks.

    Args:
        config: Where marks come from.
        real: Real training images with their attributes.
        class_names: Classes of the base model.

    Raises:
        InputError: If an attribute or class is unknown, marks are missing, or a name is taken.
    """
    sources = [(real, _marks_of_real(config, real, class_names), True)]
    if config.feedback is not None:
        feedback = ImageSet.load(config.feedback, "train")
        if feedback.image_size_px != real.image_size_px:
            raise InputError(
                f"{config.feedback} has images of {feedback.image_size_px} px, the base model draws "
                f"{real.image_size_px} px; use feedback about images of this base model."
            )
        given = feedback.columns.get("subtype", [""] * len(feedback))
        plausible = feedback.columns["majority"]
        sources.append((feedback, [mark if fine else "" for mark, fine in zip(given, plausible, strict=True)], False))
    rows = [
        (source, index, image_set.labels()[index], mark)
        for source, (image_set, marks, _) in enumerate(sources)
        for index, mark in enumerate(marks)
        if mark
    ]
    order = torch.randperm(len(rows), generator=seeded(config.seed, CHOICE)).tolist()
    chosen = [rows[place] for place in sorted(in_turn(order, [row[2:] for row in rows])[: config.max_marks])]
    concepts = name_concepts(Counter((parent, mark) for *_, parent, mark in chosen), config, class_names)
    places = {(concept.parent, concept.subtype): index for index, concept in enumerate(concepts)}
    kept = [row for row in chosen if row[2:] in places]
    return Marks(
        concepts=tuple(concepts),
        images=torch.stack([sources[source][0].images[index] for source, index, *_ in kept]),
        concept_ids=torch.tensor([places[parent, mark] for *_, parent, mark in kept]),
        real=torch.tensor([sources[source][2] for source, *_ in kept]),
        image_ids=tuple(sources[source][0].image_ids[index] for source, index, *_ in kept),
    )


def in_turn(order: Sequence[int], groups: Sequence[Hashable]) -> list[int]:
    """The order with its groups one after another: the first of each, then the second of each, and so on."""
    seen: Counter[Hashable] = Counter()
    turns = []
    for place in order:
        turns.append(seen[groups[place]])
        seen[groups[place]] += 1
    return [place for _, place in sorted(zip(turns, order, strict=True), key=lambda pair: pair[0])]


def _marks_of_real(config: ConceptsConfig, real: ImageSet, class_names: Sequence[str]) -> list[str]:
    rules = [subtype_rule(text) for text in config.subtypes]
    for rule in rules:
        if rule.class_name not in class_names:
            raise InputError(f"`subtypes` names the class {rule.class_name!r}; the base model has {list(class_names)}.")
        if rule.attribute not in real.columns:
            known = sorted(name for name, values in real.columns.items() if values and isinstance(values[0], str))
            raise InputError(
                f"`subtypes` names the attribute {rule.attribute!r}, which {config.data} lacks; it has {known}."
            )
    attributes = [{rule.attribute: real.columns[rule.attribute][index] for rule in rules} for index in range(len(real))]
    return [subtype_of(rules, label, own) for label, own in zip(real.labels(), attributes, strict=True)]


def name_concepts(
    counts: Mapping[tuple[str, str], int], config: ConceptsConfig, class_names: Sequence[str]
) -> list[Concept]:
    """New classes of all subtypes with enough marks, sorted by parent and subtype.

    Args:
        counts: Class and subtype -> number of marks.
        config: Names, and how many marks are enough.
        class_names: Classes of the base model.

    Raises:
        InputError: If no class has two such subtypes, or a name is taken.
    """
    given = {(parent, subtype): name for parent, subtype, name in map(concept_name, config.names)}
    enough = {key for key, count in counts.items() if count >= config.min_marks}
    split = {parent for parent, count in Counter(parent for parent, _ in enough).items() if count > 1}
    if not split:
        found = ", ".join(f"{parent} {mark!r} {count}" for (parent, mark), count in sorted(counts.items())) or "none"
        raise InputError(
            f"No class has two subtypes with {config.min_marks} marks each; marks are: {found}. Mark more images while "
            "grading and build the feedback again, or take marks of the real images with `subtypes`."
        )
    concepts = [
        Concept(given.get((parent, subtype), f"{subtype} {parent}"), parent, subtype)
        for parent, subtype in sorted(enough)
        if parent in split
    ]
    names = [*class_names, *(concept.name for concept in concepts)]
    if taken := sorted(name for name, count in Counter(names).items() if count > 1):
        raise InputError(f"Two classes would be called {taken[0]!r}; give another name with `names`.")
    return concepts


class BlockFeatures(nn.Module):
    """What all blocks of an encoder see: mean and spread of each one's outputs, beside the encoder's own features.

    Parts of a cell show in the middle of a network whose end knows dogs from cars.

    Args:
        encoder: Its longest list of modules are the blocks; one without such a list has its own features only.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self._outputs: list[Tensor] = []
        lists = [module for module in encoder.modules() if isinstance(module, nn.ModuleList)]
        for block in max(lists, key=len, default=()):
            block.register_forward_hook(self._keep)

    def _keep(self, _block: nn.Module, _inputs: Any, output: Any) -> None:
        self._outputs.append(output[0] if isinstance(output, tuple) else output)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images `(n, 3, height, width)` in [-1, 1] to features `(n, d)`, float32; gradients reach the images."""
        self._outputs.clear()
        features = [self.encoder(pixel_values)]
        for output in self._outputs:
            places = output.flatten(2) if output.ndim == 4 else output.transpose(1, 2)  # convolutions, or tokens
            variance = places.var(dim=2, correction=0)
            features += [places.mean(dim=2), (variance + LEAST_VARIANCE).sqrt()]  # a root has no slope at 0
        self._outputs.clear()
        return torch.cat([values.float() for values in features], dim=1)


class MarkClassifier:
    """P(new class | image, its parent), learned from the marks.

    Args:
        encoder: Frozen; images in [-1, 1] to features.
        marks: What it learns.
    """

    def __init__(self, encoder: Encoder, marks: Marks) -> None:
        self.encoder, self.marks = BlockFeatures(encoder), marks
        self.features = self.encode(marks.images)
        self.models = {}
        for parent in marks.parents:
            own = torch.isin(marks.concept_ids, torch.tensor(marks.sisters(parent)))
            self.models[parent] = fit(self.features[own.numpy()], marks.concept_ids[own].numpy())
        self.weight, self.bias = self._linear()

    @torch.no_grad()
    def encode(self, images: Tensor) -> np.ndarray:
        """Features of uint8 images in all orientations, shape `(n, orientations, features)`: a cell has no up."""
        device = next(self.encoder.parameters()).device
        parts = []
        for batch in images.split(BATCH_SIZE):
            pixel_values = to_pixel_values(batch).to(device)
            turned = [self.encoder(orient(pixel_values, index)) for index in range(ORIENTATIONS)]
            parts.append(torch.stack(turned, dim=1).cpu())
        return torch.cat(parts).numpy()

    def probabilities(self, images: Tensor, parents: Sequence[str]) -> Tensor:
        """Of each concept for each image, shape `(n, concepts)`, float32; rows of split classes add up to 1.

        Args:
            images: Shape `(n, 3, size, size)`, uint8.
            parents: Class of each; one that is not split has a row of zeros.
        """
        result = torch.zeros(len(images), len(self.marks.concepts))
        for parent, model in self.models.items():
            rows = torch.tensor([index for index, name in enumerate(parents) if name == parent], dtype=torch.int64)
            if len(rows):
                found = torch.from_numpy(predict(model, self.encode(images[rows]))).float()
                columns = torch.from_numpy(model[-1].classes_)
                result[rows[:, None], columns[None]] = found
        return result

    def log_probabilities(self, pixel_values: Tensor, concept_ids: Tensor) -> Tensor:
        """Logarithm of P(concept | image, its parent), shape `(n,)`; gradients reach the images.

        Args:
            pixel_values: Shape `(n, 3, height, width)`, in [-1, 1].
            concept_ids: Shape `(n,)`, which concept each shall be.
        """
        logits = self.encoder(pixel_values) @ self.weight.T.to(pixel_values) + self.bias.to(pixel_values)
        parents = [concept.parent for concept in self.marks.concepts]
        sisters = torch.tensor([[one == other for other in parents] for one in parents], device=logits.device)
        among = logits.masked_fill(~sisters[concept_ids], -torch.inf).log_softmax(dim=1)
        return among.gather(1, concept_ids[:, None])[:, 0]

    def _linear(self) -> tuple[Tensor, Tensor]:
        """All models as one layer on plain features: weights `(concepts, features)` and biases."""
        weight = np.zeros((len(self.marks.concepts), self.features.shape[-1]))
        bias = np.zeros(len(weight))
        for scaler, regression in self.models.values():
            rows = regression.classes_[-len(regression.coef_) :]  # of two sisters the first one's log-odds are 0
            weight[rows] = regression.coef_ / scaler.scale_
            bias[rows] = regression.intercept_ - weight[rows] @ scaler.mean_
        return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()

    def cross_validated(self, seed: int) -> dict[str, Any]:
        """How well held-out marks are told: count, accuracy, mean of the concepts' accuracies, and that of guessing."""
        from sklearn.model_selection import StratifiedKFold

        ids = self.marks.concept_ids.numpy()
        right = np.zeros(len(ids), dtype=bool)
        for parent in self.marks.parents:
            own = np.flatnonzero(np.isin(ids, self.marks.sisters(parent)))
            folds = min(FOLDS, int(np.bincount(ids[own]).max()), int(np.unique(ids[own], return_counts=True)[1].min()))
            for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(own, ids[own]):
                model = fit(self.features[own[train]], ids[own[train]])
                guess = model[-1].classes_[predict(model, self.features[own[test]]).argmax(1)]
                right[own[test]] = guess == ids[own[test]]
        shares = [float(right[ids == index].mean()) for index in range(len(self.marks.concepts))]
        return {
            "n": len(ids),
            "accuracy": float(right.mean()),
            "balanced_accuracy": float(np.mean(shares)),
            "guessing": len(self.marks.parents) / len(self.marks.concepts),
        }


def surest(probabilities: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Of the images recognised as each concept the surest ones.

    Args:
        probabilities: Shape `(n, concepts)`.
        share: What is kept of each concept's images, at least one of them.

    Returns:
        Rows that are kept, and their concepts, both of shape `(m,)`.
    """
    sure, best = probabilities.max(dim=1) if len(probabilities) else (torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    kept = []
    for concept in best.unique().tolist():
        rows = (best == concept).nonzero()[:, 0]
        kept.append(rows[sure[rows].argsort(descending=True, stable=True)[: max(1, round(share * len(rows)))]])
    rows = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)
    return rows, best[rows]


def fit(features: np.ndarray, concept_ids: np.ndarray) -> Any:
    """Logistic regression on features `(n, orientations, d)`, standardized, every concept as heavy as the next."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count, turns, width = features.shape
    model = make_pipeline(
        StandardScaler(), LogisticRegression(C=REGULARIZATION, max_iter=1000, class_weight="balanced")
    )
    return model.fit(features.reshape(count * turns, width), np.repeat(concept_ids, turns))


def predict(model: Any, features: np.ndarray) -> np.ndarray:
    """Probabilities of the model's classes, mean over orientations, shape `(n, classes)`."""
    count, turns, width = features.shape
    found: np.ndarray = model.predict_proba(features.reshape(count * turns, width))
    return found.reshape(count, turns, -1).mean(axis=1)
