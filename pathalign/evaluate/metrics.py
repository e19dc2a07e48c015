"""The metrics of pathalign as `evaluate.Metric` classes, one for each family. Made directly, they need no network.

    from pathalign.evaluate import KernelDistance

    metric = KernelDistance()
    for features, labels in batches:
        metric.add_batch(features=features, source=["generated"] * len(features), class_label=labels)
    metric.add_batch(features=real_features, source=["real"] * len(real_features), class_label=real_labels)
    metric.compute()["kid"]

All take the table of `pathalign.evaluate.table`. Results of single classes stand under `per_class`, null for a class
with too few images.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pathalign.evaluate import alignment, auditing, fidelity, memorization, utility
from pathalign.evaluate.neighbours import Neighbours
from pathalign.evaluate.plausible_share import BOOTSTRAP_SAMPLES, CONFIDENCE
from pathalign.evaluate.table import FeatureMetric, Rows, classes_of, equal_rows
from pathalign.schema import InputError

REAL_AND_GENERATED = ("real", "generated")


class NeighbourhoodMetrics(FeatureMetric):
    """Precision, recall, density and coverage."""

    SOURCES = REAL_AND_GENERATED
    DESCRIPTION = (
        "Precision and recall ask whether images of one set lie within the k-nearest-neighbour balls of the other; "
        "density counts the real balls around generated images, and coverage the real balls that hold a generated one. "
        "Neighbours are exact. All four depend on the numbers of images: compare like with like."
    )
    CITATION = "Kynkaanniemi et al. 2019, arXiv:1904.06991; Naeem et al. 2020, arXiv:2002.09797"
    REFERENCES = ("https://arxiv.org/abs/1904.06991", "https://arxiv.org/abs/2002.09797")
    RESULTS = """    neighbours (int): k, by default 5; less than the number of images of each source.

Returns:
    precision, recall, coverage in [0, 1], density in [0, number of real images / k]; all better higher.
    per_class: The same within each class.
"""

    def measure(self, rows: dict[str, Rows], neighbours: int = 5) -> dict[str, Any]:
        """Compute the results from the rows of each source; options and results are in `inputs_description`."""
        real, generated = rows["real"], rows["generated"]
        _need(self, rows, neighbours + 1, f"`neighbours` = {neighbours}")
        return {
            **fidelity.neighbourhood_metrics(real.features, generated.features, neighbours),
            "per_class": _per_class(
                rows,
                neighbours + 1,
                lambda own: fidelity.neighbourhood_metrics(own["real"], own["generated"], neighbours),
            ),
        }


class AuditMetrics(FeatureMetric):
    """Alpha-precision, beta-recall and authenticity."""

    SOURCES = ("real", "generated", "train")
    DESCRIPTION = (
        "Alpha-precision: how evenly generated images fill the balls around the centre that hold a share alpha of the "
        "real ones. Beta-recall: how evenly real images find generated ones, from the most central ones on, no farther "
        "than their k-th real neighbour. Authenticity: share of generated images farther from their nearest training "
        "image than that is from the next one; none of copies; compare it with real images that were not trained on. "
        "Works on the features as given, with the mean as centre: the paper's one-class embedding is left out."
    )
    CITATION = "Alaa et al. 2022, arXiv:2102.08921"
    REFERENCES = ("https://arxiv.org/abs/2102.08921",)
    RESULTS = f"""    neighbours (int): k of beta-recall, by default 5.
    levels (int): Points of the curves, by default {auditing.LEVELS}.
    confidence (float): Of the interval, by default {CONFIDENCE}.

Returns:
    alpha_precision, beta_recall: IP_alpha and IR_beta, at most 1, which equal distributions reach (beta-recall up to
        2^-k). For real images take others than under 'train'.
    levels, alpha_precision_curve, beta_recall_curve: Lists of the same length, in [0, 1].
    authenticity, authenticity_ci: In [0, 1], with its Wilson interval.
    per_class: The same within each class, without curves.
"""

    def measure(
        self,
        rows: dict[str, Rows],
        neighbours: int = 5,
        levels: int = auditing.LEVELS,
        confidence: float = CONFIDENCE,
    ) -> dict[str, Any]:
        """Compute the results from the rows of each source; options and results are in `inputs_description`."""
        _need(self, rows, neighbours + 1, f"`neighbours` = {neighbours}")

        def figures(own: dict[str, np.ndarray]) -> tuple[dict[str, Any], auditing.Supports]:
            curves = auditing.supports(own["real"], own["generated"], neighbours, levels)
            authentic = auditing.authentic(own["train"], own["generated"])
            return {**curves.integrated(), **alignment.share(authentic, confidence, "authenticity")}, curves

        overall, curves = figures({name: part.features for name, part in rows.items()})
        return {
            **overall,
            "levels": curves.levels.tolist(),
            "alpha_precision_curve": curves.alpha_precision.tolist(),
            "beta_recall_curve": curves.beta_recall.tolist(),
            "per_class": _per_class(rows, neighbours + 1, lambda own: figures(own)[0]),
        }


class KernelDistance(FeatureMetric):
    """KID, the kernel inception distance, on any features."""

    SOURCES = REAL_AND_GENERATED
    DESCRIPTION = (
        "Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3. `kid_unbiased` takes all pairs of images at "
        "once; `kid` and `kid_sd` are the mean and standard deviation over random subsets, as in the literature. "
        "Unbiased, so that it may be below 0. Not comparable with figures from other features."
    )
    CITATION = "Binkowski et al. 2018, arXiv:1801.01401"
    REFERENCES = ("https://arxiv.org/abs/1801.01401",)
    RESULTS = """    subsets (int): By default 100.
    subset_size (int): By default 1000, at most half of the smaller source.
    seed (int): Draws the subsets, by default 0.

Returns:
    kid, kid_sd, kid_unbiased: Lower is better, 0 for equal distributions.
    per_class: kid_unbiased within each class.
"""

    def measure(
        self, rows: dict[str, Rows], subsets: int = 100, subset_size: int = 1000, seed: int = 0
    ) -> dict[str, Any]:
        """Compute the results from the rows of each source; options and results are in `inputs_description`."""
        real, generated = rows["real"].features, rows["generated"].features
        _need(self, rows, 4, "a subset")
        mean, deviation = fidelity.kernel_distance(real, generated, np.random.default_rng(seed), subsets, subset_size)
        return {
            "kid": mean,
            "kid_sd": deviation,
            "kid_unbiased": fidelity.whole_kernel_distance(real, generated),
            "per_class": _per_class(
                rows, 2, lambda own: {"kid_unbiased": fidelity.whole_kernel_distance(own["real"], own["generated"])}
            ),
        }


class FrechetDistance(FeatureMetric):
    """FID, the Frechet inception distance, on any features, with its floor."""

    SOURCES = REAL_AND_GENERATED
    DESCRIPTION = (
        "Squared Frechet distance of the Gaussians fitted to both sets, in float64 by running moments. Biased with few "
        "images: beside it stands the floor, the distance of two halves of the real images from each other."
    )
    CITATION = "Heusel et al. 2017, arXiv:1706.08500"
    REFERENCES = ("https://arxiv.org/abs/1706.08500",)
    RESULTS = """    seed (int): Draws the halves, by default 0.

Returns:
    fid: At least 0, lower is better.
    fid_floor: The same between two halves of the real images, n_floor each. A generator like the real images reaches
        about that with n_floor images on both sides, less with more.
    per_class: fid within each class of at least twice as many images as dimensions.
"""

    def measure(self, rows: dict[str, Rows], seed: int = 0) -> dict[str, Any]:
        """Compute the results from the rows of each source; options and results are in `inputs_description`."""
        real, generated = rows["real"].features, rows["generated"].features
        _need(self, rows, 4, "a covariance")
        half = len(real) // 2
        order = np.random.default_rng(seed).permutation(len(real))
        first, second = (real[np.sort(part)] for part in (order[:half], order[half : 2 * half]))
        return {
            "fid": fidelity.frechet_distance(real, generated),
            "fid_floor": fidelity.frechet_distance(first, second),
            "n_floor": half,
            "per_class": _per_class(
                rows,
                2 * real.shape[1],
                lambda own: {"fid": fidelity.frechet_distance(own["real"], own["generated"])},
            ),
        }


class Usefulness(FeatureMetric):
    """Train on synthetic, test on real; and train on both, test on real."""

    SOURCES = ("real", "generated", "train")
    DESCRIPTION = (
        "Accuracy on real images of a logistic regression trained on generated images, on real training images, and on "
        "both together; and what the generated ones add to the real ones, with an interval over pairs of verdicts on "
        "the same real image. Needs the class of every image."
    )
    CITATION = "Esteban et al. 2017, arXiv:1706.02633 (train on synthetic, test on real)"
    REFERENCES = ("https://arxiv.org/abs/1706.02633",)
    RESULTS = f"""    confidence (float): Of the intervals, by default {CONFIDENCE}.
    bootstrap_samples (int): By default {BOOTSTRAP_SAMPLES}.
    seed (int): Of the bootstrap, by default 0.

Returns:
    utility_accuracy, real_accuracy, augment_accuracy, each with `_ci` (Wilson): in [0, 1], higher is better.
    augment_gain, augment_gain_ci: augment_accuracy - real_accuracy. Intervals take the training images as given.
    per_class: utility_recall, real_recall, augment_recall: share of the real images of the class that are recognised.
"""

    def measure(
        self,
        rows: dict[str, Rows],
        confidence: float = CONFIDENCE,
        bootstrap_samples: int = BOOTSTRAP_SAMPLES,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Compute the results from the rows of each source; options and results are in `inputs_description`."""
        test, generated, train = rows["real"], rows["generated"], rows["train"]
        labels = [part.labels for part in (test, generated, train)]
        if any(found is None or len(set(found)) < 2 for found in labels):
            raise InputError("Usefulness needs `class_label` of every image, and at least two classes in each source.")
        truth, made, known = (np.asarray(found) for found in labels)
        correct = {
            "utility": utility.correct_on_real(generated.features, made, test.features, truth),
            "real": utility.correct_on_real(train.features, known, test.features, truth),
            "augment": utility.correct_on_real(
                [train.features, generated.features],
                np.concatenate([known, made]),
                test.features,
                truth,
            ),
        }
        result: dict[str, Any] = {}
        for name, values in correct.items():
            result |= alignment.share(values, confidence, f"{name}_accuracy")
        result["augment_gain"], result["augment_gain_ci"] = alignment.paired_gain(
            correct["real"], correct["augment"], bootstrap_samples, confidence, seed
        )
        result["per_class"] = {
            str(label): {f"{name}_recall": float(values[truth == label].mean()) for name, values in correct.items()}
            for label in np.unique(truth)
        }
        return result


class Memorization(FeatureMetric):
    """Whether generated images lie nearer to training images than to as many held-out ones."""

    SOURCES = ("real", "generated", "train")
    DESCRIPTION = (
        "Share of generated images whose nearest training image is nearer than the nearest of as many held-out real "
        "ones, half without memorization, a tie counting half. Generated images that share a nearest real image are "
        "not independent, so interval and test ask what the share would be if other ones of the real images, drawn "
        "within each class, had been the training images. Also the median of the ratio of both distances, and the "
        "closest pairs, to be looked at."
    )
    CITATION = "Meehan et al. 2020, arXiv:2004.05675 (three-sample test of data copying; here with the plain share)"
    REFERENCES = ("https://arxiv.org/abs/2004.05675",)
    RESULTS = f"""    pairs (int): Closest pairs to return, by default 8.
    confidence (float): Of the interval, by default {CONFIDENCE}.
    seed (int): Draws as many images of the larger of 'train' and 'real' as the smaller has, in each class; default 0.

Returns:
    nearer_to_train, nearer_to_train_ci, nearer_to_train_p: Share, interval and two-sided p against 1/2, which is best.
    train_distance_ratio: Median of distance to training over distance to held-out images; null where it is infinite,
        since most generated images coincide with held-out ones.
    n_train: Training images compared, and as many held-out ones.
    closest: Rows among the generated and the training images in the order they were added, with both distances.
    per_class: Share, interval, test and ratio of the generated images of each class.
"""

    def measure(
        self,
        rows: dict[str, Rows],
        pairs: int = 8,
        confidence: float = CONFIDENCE,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Compute the results from the rows of each source; options and results are in `inputs_description`."""
        train, held_out, generated = rows["train"], rows["real"], rows["generated"]
        train_rows, held_out_rows = equal_rows(train, held_out, np.random.default_rng(seed))
        if not len(train_rows):
            raise InputError("The sources 'train' and 'real' have no class in common; give images of the same classes.")
        classes = [np.zeros(len(train_rows))] * 2
        if train.labels is not None and held_out.labels is not None:
            classes = [train.labels[train_rows], held_out.labels[held_out_rows]]
        found = memorization.closeness(
            Neighbours(train.features[train_rows]),
            Neighbours(held_out.features[held_out_rows]),
            generated.features,
            *classes,
        )
        return {
            **found.metrics(confidence),
            "n_train": len(train_rows),
            "closest": [{**pair, "train_row": int(train_rows[pair["train_row"]])} for pair in found.closest(pairs)],
            "per_class": {
                label: found.of(np.flatnonzero(generated.labels == label)).metrics(confidence)
                for label in classes_of(generated)
            },
        }


def _need(metric: FeatureMetric, rows: dict[str, Rows], count: int, reason: str) -> None:
    for name, part in rows.items():
        if len(part) < count:
            raise InputError(f"{metric.name}: {reason} needs {count} images, {name!r} has {len(part)}; add more.")


def _per_class(rows: dict[str, Rows], least: int, figures: Any) -> dict[str, dict[str, Any] | None]:
    """Figures within each class that all sources hold; None where one of them has fewer than `least` images of it."""
    result: dict[str, dict[str, Any] | None] = {}
    for label in classes_of(*rows.values()):
        own = {name: part.of_class(label) for name, part in rows.items()}
        result[label] = figures(own) if min(map(len, own.values())) >= least else None
    return result
