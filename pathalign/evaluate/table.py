"""The table that metrics on features take: streamed into an arrow file on disk, read back as memory-mapped arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import evaluate
import numpy as np
import pyarrow as pa

from pathalign.evaluate.checked import CheckedMetric, refuse_unknown, texts
from pathalign.schema import InputError

INPUTS = """
Args:
    features (array of shape `(n, d)`, float32): Features of images by any encoder, the same for all rows. One row is
        one image; call `add_batch` as often as you like, rows gather in a file, not in memory.
    source (list of n strings): Where each image comes from, one of {sources}.
    class_label (list of n strings, or None): Class of each image; None leaves out the figures of single classes.
"""


@dataclass(frozen=True)
class Rows:
    """The rows of one source.

    Attributes:
        features: Shape `(n, d)`, float32, memory-mapped.
        labels: Shape `(n,)`, class of each image as text; None where some image has none.
    """

    features: np.ndarray
    labels: np.ndarray | None

    def __len__(self) -> int:
        return len(self.features)

    def of_class(self, label: str) -> np.ndarray:
        """Features of one class, shape `(n, d)`, in memory."""
        assert self.labels is not None
        return self.features[self.labels == label]


class FeatureMetric(CheckedMetric):
    """A metric on features of images from several sources: columns `features`, `source` and `class_label`.

    A subclass names its sources, describes itself, and measures: `measure` takes the `Rows` of each source by name and
    the options. Made directly, none of them needs a network.
    """

    SOURCES: tuple[str, ...] = ()
    DESCRIPTION = CITATION = RESULTS = ""
    REFERENCES: tuple[str, ...] = ()

    def _info(self) -> Any:
        info = evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation=self.CITATION,
            inputs_description=INPUTS.format(sources=", ".join(map(repr, self.SOURCES))) + self.RESULTS,
            features=datasets.Features(
                {
                    "features": datasets.List(datasets.Value("float32")),
                    "source": datasets.Value("string"),
                    "class_label": datasets.Value("string"),
                }
            ),
            reference_urls=list(self.REFERENCES),
        )
        info.format = "arrow"  # memory-mapped columns; the constructor of evaluate 0.4.6 takes no format for lists
        return info

    def add_batch(
        self,
        *,
        features: Any = None,
        source: Sequence[str] | np.ndarray | None = None,
        class_label: Sequence[str | None] | np.ndarray | None = None,
        **unknown: Any,
    ) -> None:
        """Add rows to the file on disk.

        Raises:
            InputError: If shapes do not belong together, a value is not finite, a source is not one of the metric's, or
                there is no column of a name.
        """
        refuse_unknown(self.name, unknown, self.features)
        values = np.ascontiguousarray(features, dtype=np.float32)
        if values.ndim != 2 or not values.shape[1]:
            raise InputError(f"`features` has the shape {values.shape}; give (images, dimensions).")
        if not np.isfinite(values).all():
            raise InputError("`features` holds values that are not finite; look at the encoder that made them.")
        sources = texts(() if source is None else source)
        labels = [None] * len(values) if class_label is None else texts(class_label)
        if not len(values) == len(sources) == len(labels):
            raise InputError(
                f"`features` has {len(values)} rows, `source` {len(sources)} and `class_label` {len(labels)}; "
                "give one of each for every image."
            )
        if foreign := sorted(set(map(str, sources)) - set(self.SOURCES)):
            raise InputError(f"`source` holds {foreign[0]!r}; {self.name} knows {', '.join(map(repr, self.SOURCES))}.")
        if self.writer is None:
            self.selected_feature_format = self.features
            self._init_writer()
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        self.writer.write_table(
            pa.table(
                {
                    "features": pa.ListArray.from_arrays(offsets, pa.array(values.ravel())),
                    "source": pa.array(sources, pa.string()),
                    "class_label": pa.array(labels, pa.string()),
                }
            )
        )

    def add(self, *, features: Any = None, source: Any = None, class_label: Any = None, **unknown: Any) -> None:
        """Add one image: features of shape `(d,)`, its source and its class; errors as in `add_batch`."""
        self.add_batch(
            features=np.asarray(features)[None],
            source=[source],
            class_label=None if class_label is None else [class_label],
            **unknown,
        )

    def _compute(self, *, features: Any, source: Any, class_label: Any, **options: Any) -> dict[str, Any]:
        # Beside the file of the rows, not in the system's folder for temporary files, which may lie in memory.
        with TemporaryDirectory(dir=self.data_dir) as folder:
            columns = {"features": features, "source": source, "class_label": class_label}
            return self.measure(self._rows(columns, Path(folder)), **options)

    def _batches(self, columns: dict[str, Any]) -> Iterator[Any]:
        """Record batches of all rows; the file is read and not mapped, so that its pages do not count as memory."""
        if self.file_paths is None:  # `keep_in_memory`
            yield from pa.table(columns).to_batches()
        for path in self.file_paths or ():
            with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
                yield from reader

    def _rows(self, columns: dict[str, Any], folder: Path) -> dict[str, Rows]:
        names = np.asarray(columns["source"].to_pylist(), dtype=object)
        counts = {name: int((names == name).sum()) for name in self.SOURCES}
        if missing := [name for name, count in counts.items() if not count]:
            raise InputError(f"There are no rows with the source {missing[0]!r}; {self.name} needs {self.SOURCES}.")
        stores: dict[str, np.ndarray] = {}
        done, width, first = dict.fromkeys(counts, 0), None, 0
        for batch in self._batches(columns):
            lists = batch.column("features")
            widths = {*np.unique(np.diff(lists.offsets.to_numpy())).tolist(), *([width] if width else [])}
            if len(widths) > 1:
                raise InputError(f"`features` has rows of the lengths {sorted(widths)}; use one encoder for all.")
            width = widths.pop()
            block = lists.flatten().to_numpy().reshape(-1, width)
            for name, count in counts.items():
                if name not in stores:
                    stores[name] = np.memmap(folder / f"{name}.f32", np.float32, "w+", shape=(count, width))
                own = block[names[first : first + len(block)] == name]
                stores[name][done[name] : done[name] + len(own)] = own
                done[name] += len(own)
            first += len(block)
        labels = np.asarray(columns["class_label"].to_pylist(), dtype=object)
        rows = {}
        for name, store in stores.items():
            own = labels[names == name]
            rows[name] = Rows(store, None if any(label is None for label in own) else own.astype(str))
        return rows


def classes_of(*rows: Rows) -> list[str]:
    """Classes that all of several sources hold, sorted; none where one of them has no labels."""
    if any(part.labels is None for part in rows):
        return []
    return sorted(set.intersection(*(set(part.labels.tolist()) for part in rows if part.labels is not None)))


def equal_rows(first: Rows, second: Rows, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sorted rows of two sources, as many of both, in each class where both have labels."""
    if first.labels is None or second.labels is None:
        groups = [(np.arange(len(first)), np.arange(len(second)))]
    else:
        pairs = classes_of(first, second)
        groups = [(np.flatnonzero(first.labels == label), np.flatnonzero(second.labels == label)) for label in pairs]
    chosen: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for own, other in groups:
        count = min(len(own), len(other))
        chosen[0].append(rng.permutation(own)[:count])
        chosen[1].append(rng.permutation(other)[:count])
    empty = [np.empty(0, dtype=np.int64)]
    rows = [np.sort(np.concatenate([*empty, *part])) for part in chosen]
    return rows[0], rows[1]
