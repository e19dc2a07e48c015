"""Usefulness: a classifier trained on synthetic images and tested on real ones, beside one trained on real images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pathalign.evaluate.fidelity import rows_of_class
from pathalign.evaluate.neighbours import blocks
from pathalign.images import ImageSet

SCALED_ROWS = 4096


def match_training_rows(generated: dict[str, ImageSet], train: ImageSet, seed: int) -> dict[str, np.ndarray]:
    """Rows that give every training set of the comparison the same number of images in each class.

    Args:
        generated: The generated sets, by name.
        train: The real training images.
        seed: Draws from `train`.

    Returns:
        Set name -> rows, with `real` for the real training images. A class that one set lacks is left out of all.
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in (*generated, "real")}
    for class_id in range(len(train.class_names)):
        own = {name: rows_of_class(images, class_id) for name, images in generated.items()}
        own["real"] = rng.permutation(rows_of_class(train, class_id))
        count = min(map(len, own.values()))
        for name, found in own.items():
            rows[name].append(found[:count])
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def correct_on_real(
    train_features: np.ndarray | Sequence[np.ndarray],
    train_classes: np.ndarray,
    test_features: np.ndarray,
    test_classes: np.ndarray,
) -> np.ndarray:
    """Whether `predict_real` names the class of each real test image, of `test_classes` `(m,)`. Shape `(m,)`, bool."""
    return np.asarray(predict_real(train_features, train_classes, test_features) == test_classes)


def predict_real(
    train_features: np.ndarray | Sequence[np.ndarray], train_classes: np.ndarray, test_features: np.ndarray
) -> np.ndarray:
    """Class ids that a logistic regression, trained on one set, gives real test images. Shape `(m,)`.

    Args:
        train_features: Shape `(n, d)`, standardized inside; or a list of such arrays, one after the other, all to be
            trained on together.
        train_classes: Shape `(n,)`, class ids or names; at least two classes.
        test_features: Shape `(m, d)`.

    Source: train on synthetic, test on real (arXiv:1706.02633).
    """
    parts = [train_features] if isinstance(train_features, np.ndarray) else list(train_features)
    # Block by block, since the scaler works in float64: the one copy of the training features is that in float32.
    scaler = StandardScaler()
    for part in parts:
        for rows in blocks(len(part), SCALED_ROWS):
            scaler.partial_fit(part[rows])
    scaled, first = np.empty((len(train_classes), parts[0].shape[1]), dtype=parts[0].dtype), 0
    for part in parts:
        for rows in blocks(len(part), SCALED_ROWS):
            scaled[first + rows.start : first + rows.stop] = scaler.transform(part[rows])
        first += len(part)
    classifier = LogisticRegression(C=0.1, max_iter=1000).fit(scaled, train_classes)
    found = [
        classifier.predict(scaler.transform(test_features[rows])) for rows in blocks(len(test_features), SCALED_ROWS)
    ]
    return np.concatenate(found)
