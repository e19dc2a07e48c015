"""Labelled images in memory and on disk: the layout in which every stage passes images on.

A folder or Hub dataset repo with `data/<split>-00000-of-00001.parquet`, or several such files, the shards of a set that
is too large for one, as `datasets.load_dataset` reads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pathalign.config import DATASET
from pathalign.pinning import unusable
from pathalign.remote import parse
from pathalign.schema import InputError


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    Attributes:
        images: Shape `(n, 3, height, width)`, uint8 RGB.
        class_ids: Shape `(n,)`, int64, indices into `class_names`.
        class_names: Names of all classes, in the order of their ids.
        image_ids: Content hash of each image, see `content_id`.
        columns: Further columns by name, each a list of length n (attributes, seeds, verdicts, ...).
    """

    images: Tensor
    class_ids: Tensor
    class_names: tuple[str, ...]
    image_ids: tuple[str, ...]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def build(
        cls, images: Tensor, class_ids: Tensor, class_names: Sequence[str], columns: dict[str, list[Any]] | None = None
    ) -> ImageSet:
        """Make a set and compute the image ids; shapes as in the class's attributes."""
        return cls(
            images=images,
            class_ids=class_ids.long(),
            class_names=tuple(class_names),
            image_ids=tuple(content_id(image) for image in images),
            columns=dict(columns or {}),
        )

    @property
    def image_size_px(self) -> int:
        """Width and height in pixels; images here are square."""
        return self.images.shape[-1]

    def labels(self) -> list[str]:
        """Class name of each image."""
        return [self.class_names[index] for index in self.class_ids.tolist()]

    def pixel_values(self) -> Tensor:
        """Shape `(n, 3, height, width)`, float32 in [-1, 1]."""
        return to_pixel_values(self.images)

    def select(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at `indices` (or where a boolean tensor is true), in that order."""
        index = torch.as_tensor(indices)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long()
        rows = index.tolist()
        return ImageSet(
            images=self.images[index],
            class_ids=self.class_ids[index],
            class_names=self.class_names,
            image_ids=tuple(self.image_ids[row] for row in rows),
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
        )

    def first_per_class(self, count: int) -> ImageSet:
        """At most `count` images of each class, the first ones, ordered by class."""
        rows = [(self.class_ids == class_id).nonzero().flatten()[:count] for class_id in range(len(self.class_names))]
        return self.select(torch.cat(rows))

    @classmethod
    def joined(cls, sets: Sequence[ImageSet]) -> ImageSet:
        """Several sets as one, in their order, with the class ids of the first and the columns that all have.

        Raises:
            InputError: If they differ in their classes or in the size of their images.
        """
        first = sets[0]
        if len(sets) == 1:
            return first
        for other in sets[1:]:
            if set(other.class_names) != set(first.class_names) or other.image_size_px != first.image_size_px:
                raise InputError(
                    f"Image sets of {first.image_size_px} px with the classes {list(first.class_names)} and of "
                    f"{other.image_size_px} px with {list(other.class_names)} cannot be joined; give sets of one model."
                )
        ids = [torch.tensor([first.class_names.index(name) for name in part.class_names]) for part in sets]
        shared = [name for name in first.columns if all(name in part.columns for part in sets)]
        return cls(
            images=torch.cat([part.images for part in sets]),
            class_ids=torch.cat([own[part.class_ids] for own, part in zip(ids, sets, strict=True)]),
            class_names=first.class_names,
            image_ids=tuple(image_id for part in sets for image_id in part.image_ids),
            columns={name: [value for part in sets for value in part.columns[name]] for name in shared},
        )

    def save(
        self, folder: str | Path, split: str = "train", shard: tuple[int, int] = (0, 1), with_images: bool = True
    ) -> None:
        """Write `data/<split>-00000-of-00001.parquet` below `folder`, images as PNG; the file appears whole.

        Args:
            folder: Made if need be.
            split: Name of the split.
            shard: Which of how many files this is, where the set is one part of a larger one.
            with_images: Whether the images go into the file, or their ids and columns only.
        """
        import datasets

        features = {
            "image_id": datasets.Value("string"),
            "label": datasets.ClassLabel(names=list(self.class_names)),
        }
        rows: dict[str, list[Any]] = {"image_id": list(self.image_ids), "label": self.class_ids.tolist()}
        if with_images:
            features = {"image": datasets.Image(), **features}
            images = [Image.fromarray(image) for image in self.images.permute(0, 2, 3, 1).numpy()]
            rows = {"image": images, **rows}
        extra = datasets.Dataset.from_dict(self.columns).features if self.columns else {}
        table = datasets.Dataset.from_dict({**rows, **self.columns}, features=datasets.Features({**features, **extra}))
        path = Path(folder) / "data" / shard_name(split, *shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    @classmethod
    def load(cls, path_or_repo_id: str | Path, split: str = "train", revision: str | None = None) -> ImageSet:
        """Read all that `save` wrote, from a folder or a Hub dataset repo, into memory.

        Raises:
            InputError: If there is no such folder, repo or split, a shard is missing or damaged, or it lacks the
                columns `image` and `label`.
        """
        parts = list(cls.shards(path_or_repo_id, split, revision))
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        for part in parts:
            if part.class_names != first.class_names or set(part.columns) != set(first.columns):
                raise InputError(f"The shards of {path_or_repo_id} differ in classes or columns; make the set anew.")
        if len(sizes := {part.images.shape[1:] for part in parts}) > 1:
            raise InputError(f"The shards of {path_or_repo_id} hold images of several sizes, {sorted(sizes)}.")
        return cls(
            images=torch.cat([part.images for part in parts]),
            class_ids=torch.cat([part.class_ids for part in parts]),
            class_names=first.class_names,
            image_ids=tuple(chain.from_iterable(part.image_ids for part in parts)),
            columns={name: list(chain.from_iterable(part.columns[name] for part in parts)) for name in first.columns},
        )

    @classmethod
    def shards(
        cls, path_or_repo_id: str | Path, split: str = "train", revision: str | None = None
    ) -> Iterator[ImageSet]:
        """The same one file after another, for sets that are larger than the memory; errors as in `load`."""
        found = dataset_shards(path_or_repo_id, split, revision)
        for index in range(len(found)):
            yield cls.read(found.path(index))

    @classmethod
    def read(cls, path: Path) -> ImageSet:
        """Read one Parquet file.

        Raises:
            InputError: If it is damaged, or lacks a column.
        """
        table = read_table(path)
        missing = {"image", "image_id", "label"} - set(table.column_names)
        if missing:
            raise InputError(
                f"{path} lacks the columns {sorted(missing)}; make it with `pathalign data` or `generate`."
            )
        import datasets

        names = datasets.Features.from_arrow_schema(table.schema)["label"].names
        images = np.stack([decode(cell["bytes"].as_py()) for cell in table.column("image")])
        return cls(
            images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
            class_ids=torch.tensor(table.column("label").to_pylist(), dtype=torch.int64),
            class_names=tuple(names),
            image_ids=tuple(table.column("image_id").to_pylist()),
            columns={
                name: table.column(name).to_pylist()
                for name in table.column_names
                if name not in ("image", "image_id", "label")
            },
        )


def shard_name(split: str, index: int, count: int) -> str:
    """Name of one of `count` files of a split."""
    return f"{split}-{index:05d}-of-{count:05d}.parquet"


def read_table(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Columns of a Parquet file, all by default.

    Raises:
        InputError: If it is damaged.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path, columns=columns)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as parquet ({error}); fetch it again or make it anew.") from error


@dataclass(frozen=True)
class Shards:
    """The files of one split, in their order.

    Attributes:
        source: Folder or Hub dataset.
        names: Their paths in it.
        revision: Commit of the Hub dataset, or what was asked for where the Hub cannot be reached.
    """

    source: str
    names: tuple[str, ...]
    revision: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """One file, downloaded first from a Hub; errors as in `dataset_file`."""
        return dataset_file(self.source, self.names[index], self.revision)


def dataset_shards(path_or_repo_id: str | Path, split: str = "train", revision: str | None = None) -> Shards:
    """Find the files of a split in a folder or Hub dataset; a download starts when one is opened.

    Raises:
        InputError: If there is no such folder, repo or split, or a shard is missing.
    """
    reference = parse(path_or_repo_id, revision)
    source, revision, folder = reference.name, reference.revision, Path(reference.name)
    if folder.is_dir():
        names, commit = [f"data/{path.name}" for path in (folder / "data").glob(f"{split}-*.parquet")], revision
    else:
        names, commit = _hub_files(source, revision)
    pattern = re.compile(rf"data/{re.escape(split)}-\d{{5,}}-of-(\d{{5,}})\.parquet")
    counts = sorted({int(found[1]) for name in names if (found := pattern.fullmatch(name))})
    if not counts:
        single = f"data/{shard_name(split, 0, 1)}"
        dataset_file(source, single, revision)  # says what is wrong, or finds it in the cache
        return Shards(source, (single,), revision)
    if len(counts) > 1:
        raise InputError(f"{path_or_repo_id} holds the shards of several sets of {split!r}, of {counts}: keep one set.")
    wanted = tuple(f"data/{shard_name(split, index, counts[0])}" for index in range(counts[0]))
    if missing := [name for name in wanted if name not in names]:
        raise InputError(
            f"{path_or_repo_id} lacks {len(missing)} of {len(wanted)} shards, such as {missing[0]}; fetch or make them."
        )
    return Shards(source, wanted, commit)


def _hub_files(repo_id: str, revision: str | None) -> tuple[list[str], str | None]:
    """Files of a Hub dataset and its commit, or without a connection what the cache holds; none if it cannot be read.

    Whoever opens a file of it then says why.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionResolutionError

    where = {"repo_type": "dataset", "allow_patterns": "data/*.parquet", "local_files_only": True}
    api = HfApi()
    try:
        commit = api.resolve_revision(repo_id, repo_type="dataset", revision=revision).resolved
    except (HTTPError, HFValidationError, RevisionResolutionError):
        return [], revision
    try:
        return api.list_repo_files(repo_id, repo_type="dataset", revision=commit), commit
    except (HTTPError, OSError):  # no connection
        try:
            cached = Path(str(snapshot_download(repo_id, revision=commit, **where)))  # type: ignore[call-overload]
        except OSError:
            return [], commit
        return [f"data/{path.name}" for path in (cached / "data").glob("*.parquet")], commit


def dataset_file(path_or_repo_id: str | Path, name: str, revision: str | None = None) -> Path:
    """One file of a dataset: below a folder, or downloaded from a Hub dataset, `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Raises:
        InputError: If there is no such folder, repo or file.
    """
    reference = parse(path_or_repo_id, revision)
    folder = Path(reference.name)
    if folder.is_dir():
        if not (folder / name).is_file():
            found = sorted({path.name.split("-0")[0] for path in (folder / "data").glob("*.parquet")})
            raise InputError(f"{folder} has no {name}; its splits are {found or 'none'}.")
        return folder / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(reference.name, name, repo_type="dataset", revision=reference.revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise unusable(error, reference, DATASET) from error


def decode(content: bytes) -> np.ndarray:
    """PNG or JPEG bytes to an array of shape `(height, width, 3)`, uint8 RGB."""
    import io

    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def content_id(image: Tensor) -> str:
    """Hash of an image's size and pixels, 16 hex digits: equal images have equal ids wherever they come from."""
    array = np.ascontiguousarray(image.numpy())
    return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()[:16]


def to_pixel_values(images: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_images(pixel_values: Tensor) -> Tensor:
    """Float in [-1, 1] to uint8 0..255, rounded; values outside are clamped."""
    return ((pixel_values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def contact_sheet(images: Tensor, columns: int, scale: int = 2, gap_px: int = 2) -> Image.Image:
    """A grid of images on white. `images`: shape `(n, 3, height, width)`, uint8; enlarged `scale` times."""
    _, _, height, width = images.shape
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width * scale + gap_px), rows * (height * scale + gap_px)), "white")
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        tile = Image.fromarray(image).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
        row, column = divmod(index, columns)
        sheet.paste(tile, (column * (width * scale + gap_px), row * (height * scale + gap_px)))
    return sheet
