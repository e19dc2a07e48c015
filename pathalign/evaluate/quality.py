"""All figures of an evaluation that rest on image features: fidelity, variety, memorization and usefulness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pathalign.augment import ORIENTATIONS
from pathalign.evaluate import alignment, auditing, fidelity, memorization, utility
from pathalign.evaluate.features import FeatureStore
from pathalign.evaluate.fidelity import MatchedRows
from pathalign.evaluate.neighbours import Neighbours
from pathalign.evaluate.subjects import Subjects
from pathalign.settings.evaluate import EvaluateConfig

CLOSEST_PAIRS = 8
CLASS_IMAGES_PER_NEIGHBOUR = 4  # fewer images of a class than so many times `neighbours` say nothing about it


@dataclass(frozen=True)
class Quality:
    """What was measured on the features of all sets.

    Attributes:
        figures: Set name -> figures of the whole set, as metrics.json holds them.
        per_class: Set name -> class name -> figures of that class, None where it has too few images.
        outcomes: Set name -> figure -> the values of single images whose mean it is. Row i belongs to the same seed or
            the same real image in every set but `real`, so that two sets can be compared pairwise.
        closest: Closest pairs of `after` and training images.
    """

    figures: dict[str, dict[str, Any]]
    per_class: dict[str, dict[str, dict[str, Any]]]
    outcomes: dict[str, dict[str, np.ndarray]]
    closest: list[dict[str, Any]]


@dataclass(frozen=True)
class _Compared:
    """Features of all sets, and which rows of them are compared."""

    features: dict[str, np.ndarray]
    train: np.ndarray
    turned: np.ndarray
    rows: MatchedRows
    test_classes: np.ndarray
    train_classes: np.ndarray


def measure_images(
    config: EvaluateConfig, subjects: Subjects, encoder: nn.Module, scratch: Path, device: torch.device
) -> Quality:
    """Make the features of all images and measure every set on them.

    Args:
        config: Encoder, neighbours, confidence, bootstrap and seed.
        subjects: The sets.
        encoder: Turns pixel values into features of shape `(n, d)`.
        scratch: Folder for the features.
        device: Where the encoder runs.

    Raises:
        InputError: If too few images of each kind are left for `neighbours`.
    """
    rows = fidelity.match_rows(subjects.generated, subjects.test, config.neighbours, config.seed)
    store = FeatureStore(encoder, config.encoder, scratch, device)
    turned = store.features(subjects.train.images, "training images, eight orientations", ORIENTATIONS)
    compared = _Compared(
        features={name: store.features(images.images, name) for name, images in subjects.judged().items()},
        train=turned[: len(subjects.train)],
        turned=turned,
        rows=rows,
        test_classes=subjects.test.class_ids.numpy(),
        train_classes=subjects.train.class_ids.numpy(),
    )
    quality = Quality({name: {} for name in subjects.judged()}, {}, {name: {} for name in subjects.judged()}, [])
    _measure_fidelity(config, subjects, compared, quality)
    _measure_memorization(config, subjects, compared, quality)
    _measure_usefulness(config, subjects, compared, quality)
    return quality


def _measure_fidelity(config: EvaluateConfig, subjects: Subjects, compared: _Compared, quality: Quality) -> None:
    rows = compared.rows
    reference = compared.features["real"][rows.reference]
    reference_classes = compared.test_classes[rows.reference]
    pca = fidelity.reduce_dimensions(compared.train, len(reference))
    for name, images in subjects.judged().items():
        chosen = rows.floor if name == "real" else rows.generated[name]
        features, classes = compared.features[name][chosen], images.class_ids.numpy()[chosen]
        found = fidelity.neighbourhoods(reference, features, config.neighbours)
        quality.figures[name] |= _distances(config, reference, features, found, pca)
        quality.outcomes[name] |= {
            "precision": found.surrounding > 0,
            "recall": found.reached,
            "density": found.surrounding / found.neighbours,
            "coverage": found.covered,
        }
        quality.per_class[name] = {
            label: _class_distances(config, reference[reference_classes == class_id], features[classes == class_id])
            for class_id, label in enumerate(images.class_names)
        }


def _distances(
    config: EvaluateConfig, reference: np.ndarray, features: np.ndarray, found: fidelity.Neighbourhoods, pca: Any
) -> dict[str, Any]:
    count = len(reference)
    values: dict[str, Any] = found.metrics()
    for name in ("precision", "recall", "coverage"):  # shares of `count` images
        values[f"{name}_ci"] = alignment.wilson(round(values[name] * count), count, config.confidence)
    values |= auditing.supports(reference, features, config.neighbours).integrated()
    values["kid"], values["kid_sd"] = fidelity.kernel_distance(reference, features, np.random.default_rng(config.seed))
    values["kid_unbiased"] = fidelity.whole_kernel_distance(reference, features)
    if pca is not None:
        reference, features = pca.transform(reference), pca.transform(features)
    values["fid"] = fidelity.frechet_distance(reference, features)
    return {**values, "n_fidelity": count, "fid_dimensions": reference.shape[1], "fid_reduced": pca is not None}


def _class_distances(config: EvaluateConfig, reference: np.ndarray, features: np.ndarray) -> dict[str, Any]:
    """Fidelity within one class, of which both sides hold the same number; None where that is too small."""
    count = len(reference)
    found: dict[str, Any] = {"n_fidelity": count}
    if count < CLASS_IMAGES_PER_NEIGHBOUR * config.neighbours:
        return {**found, **dict.fromkeys(("precision", "recall", "density", "coverage", "kid_unbiased"))}
    found |= fidelity.neighbourhood_metrics(reference, features, config.neighbours)
    return {**found, "kid_unbiased": fidelity.whole_kernel_distance(reference, features)}


def _measure_memorization(config: EvaluateConfig, subjects: Subjects, compared: _Compared, quality: Quality) -> None:
    copies = memorization.CopyCheck.fit(compared.turned, compared.features["real"])
    train_rows, held_out_rows, others = memorization.match_real_rows(
        compared.train_classes, compared.test_classes, config.seed
    )
    train = Neighbours(compared.train[train_rows])
    held_out = Neighbours(compared.features["real"][held_out_rows])
    for name in subjects.judged():
        features = compared.features[name]
        nearest = copies.check(features)
        if name == "after":
            quality.closest.extend(nearest.closest(CLOSEST_PAIRS))
        authentic = auditing.authentic(compared.train, features)
        closeness = memorization.closeness(
            train,
            held_out,
            features[others] if name == "real" else features,
            compared.train_classes[train_rows],
            compared.test_classes[held_out_rows],
        )
        quality.figures[name] |= {
            **alignment.share(nearest.no_near_copy, config.confidence, "no_near_copy"),
            **alignment.share(authentic, config.confidence, "authenticity"),
            **closeness.metrics(config.confidence),
            "n_memorization": len(closeness.rows),
        }
        quality.outcomes[name] |= {
            "no_near_copy": nearest.no_near_copy,
            "authenticity": authentic,
            "nearer_to_train": closeness.nearer_to_train,
        }


def _measure_usefulness(config: EvaluateConfig, subjects: Subjects, compared: _Compared, quality: Quality) -> None:
    chosen = utility.match_training_rows(subjects.generated, subjects.train, config.seed)
    test = compared.features["real"], compared.test_classes
    train = compared.train, compared.train_classes
    real_alone = utility.correct_on_real(*train, *test)
    for name, images in subjects.judged().items():
        rows = chosen[name]
        if name == "real":
            features, classes, augmented, count = train[0][rows], train[1][rows], real_alone, len(train[1])
        else:
            features, classes = compared.features[name][rows], images.class_ids.numpy()[rows]
            both = [train[0], features], np.concatenate([train[1], classes])
            augmented, count = utility.correct_on_real(*both, *test), len(both[1])
        correct = utility.correct_on_real(features, classes, *test)
        gain, interval = alignment.paired_gain(
            real_alone, augmented, config.bootstrap_samples, config.confidence, config.seed
        )
        quality.figures[name] |= {
            **alignment.share(correct, config.confidence, "utility_accuracy"),
            "n_utility": len(rows),
            "n_utility_test": len(test[1]),
            **alignment.share(augmented, config.confidence, "augment_accuracy"),
            "augment_gain": gain,
            "augment_gain_ci": interval,
            "n_augment": count,
        }
        quality.outcomes[name] |= {"utility_accuracy": correct, "augment_accuracy": augmented}
        for class_id, label in enumerate(images.class_names):
            own = correct[test[1] == class_id]
            if not len(own):
                quality.per_class[name][label] |= {"utility_recall": None, "n_utility_recall": 0}
                continue
            quality.per_class[name][label] |= {
                **alignment.share(own, config.confidence, "utility_recall"),
                "n_utility_recall": len(own),
            }
            quality.outcomes[name][f"utility_recall of {label}"] = own
