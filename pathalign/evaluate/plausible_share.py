"""The metric on verdicts: share of plausible images, and what changed against images of the same seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import pyarrow as pa

from pathalign.evaluate import alignment
from pathalign.evaluate.checked import CheckedMetric, refuse_unknown, texts
from pathalign.schema import InputError

CONFIDENCE, BOOTSTRAP_SAMPLES = 0.95, 2000


class PlausibleShare(CheckedMetric):
    """Share of images that a judge finds plausible, and what changed against images of the same seeds."""

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description=(
                "Share of images that an expert or a judge finds plausible, with its Wilson interval; given verdicts "
                "on images of the same seeds by another model, also the gain, with a bootstrap interval over pairs."
            ),
            citation="Wilson 1927; Efron and Tibshirani 1993, chapter 13 (percentile interval)",
            inputs_description=f"""
Args:
    plausible (list of n bools): Verdict on each image.
    before (list of n bools or None, or None): Verdict on the image of the same seed by the model to compare with;
        images without one are in no pair.
    class_label (list of n strings, or None): Class of each image.
    confidence (float): Of the intervals, by default {CONFIDENCE}.
    bootstrap_samples (int): By default {BOOTSTRAP_SAMPLES}.
    seed (int): Of the bootstrap, by default 0.

Returns:
    n, plausible_share, plausible_share_ci: In [0, 1], higher is better.
    plausible_gain, plausible_gain_ci: Mean of `plausible` minus `before` over the pairs; null where there is none.
    n_pairs: Images with a verdict `before`.
    per_class: The same for each class.
""",
            features=datasets.Features(
                {
                    "plausible": datasets.Value("bool"),
                    "before": datasets.Value("bool"),
                    "class_label": datasets.Value("string"),
                }
            ),
        )

    def add_batch(
        self,
        *,
        plausible: Sequence[bool] | np.ndarray | None = None,
        before: Sequence[bool | None] | np.ndarray | None = None,
        class_label: Sequence[str | None] | np.ndarray | None = None,
        **unknown: Any,
    ) -> None:
        """Add verdicts to the file on disk.

        Raises:
            InputError: If the columns differ in length, `plausible` is missing anywhere, or there is no column of a
                name.
        """
        refuse_unknown(self.name, unknown, self.features)
        columns: dict[str, list[Any]] = {
            name: [None if value is None else bool(value) for value in values]
            for name, values in (("plausible", plausible), ("before", before))
            if values is not None
        }
        if class_label is not None:
            columns["class_label"] = texts(class_label)
        lengths = {name: len(values) for name, values in columns.items()}
        count = lengths.get("plausible", 0)
        if set(lengths.values()) != {count} or not count or None in columns["plausible"]:
            raise InputError(
                f"The columns have the lengths {lengths}; give `plausible`, true or false, and one value an image."
            )
        if self.writer is None:
            self.selected_feature_format = self.features
            self._init_writer()
        types = {"plausible": pa.bool_(), "before": pa.bool_(), "class_label": pa.string()}
        table = {name: pa.array(columns.get(name, [None] * count), kind) for name, kind in types.items()}
        self.writer.write_table(pa.table(table))

    def add(self, *, plausible: Any = None, before: Any = None, class_label: Any = None, **unknown: Any) -> None:
        """Add the verdict on one image."""
        row = {"plausible": plausible, "before": before, "class_label": class_label}
        self.add_batch(**{name: None if value is None else [value] for name, value in row.items()}, **unknown)

    def _compute(self, *, plausible: Any, before: Any, class_label: Any, **options: Any) -> dict[str, Any]:
        return self.measure(plausible, before, class_label, **options)

    def measure(
        self,
        plausible: Sequence[bool],
        before: Sequence[bool | None],
        class_label: Sequence[str | None],
        confidence: float = CONFIDENCE,
        bootstrap_samples: int = BOOTSTRAP_SAMPLES,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Compute the results from the columns; options and results are in `inputs_description`."""
        verdicts, labels = np.asarray(plausible, dtype=bool), np.asarray(class_label, dtype=object)
        known, earlier = np.array([verdict is not None for verdict in before]), np.array(before, dtype=bool)

        def figures(chosen: np.ndarray) -> dict[str, Any]:
            gain: tuple[float | None, list[float] | None] = (None, None)
            paired = chosen & known
            if paired.any():
                gain = alignment.paired_gain(earlier[paired], verdicts[paired], bootstrap_samples, confidence, seed)
            return {
                "n": len(verdicts[chosen]),
                **alignment.share(verdicts[chosen], confidence, "plausible_share"),
                "plausible_gain": gain[0],
                "plausible_gain_ci": gain[1],
                "n_pairs": int(paired.sum()),
            }

        names = [] if None in labels else sorted(set(labels))
        return {
            **figures(np.ones(len(verdicts), dtype=bool)),
            "per_class": {name: figures(labels == name) for name in names},
        }
