"""Labelled images in memory and on disk: the layout in which every stage passes images on.

A folder or Hub dataset repo with `data/<split>-00000-of-00001.parquet`, as `datasets.load_dataset` reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
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

    def save(self, folder: str | Path, split: str = "train") -> None:
        """Write `data/<split>-00000-of-00001.parquet` below `folder`, images as PNG."""
        import datasets

        features = datasets.Features(
            {
                "image": datasets.Image(),
                "image_id": datasets.Value("string"),
                "label": datasets.ClassLabel(names=list(self.class_names)),
            }
        )
        rows: dict[str, list[Any]] = {
            "image": [Image.fromarray(image) for image in self.images.permute(0, 2, 3, 1).numpy()],
            "image_id": list(self.image_ids),
            "label": self.class_ids.tolist(),
        }
        extra = datasets.Dataset.from_dict(self.columns).features if self.columns else {}
        table = datasets.Dataset.from_dict({**rows, **self.columns}, features=datasets.Features({**features, **extra}))
        path = Path(folder) / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path)

    @classmethod
    def load(cls, path_or_repo_id: str | Path, split: str = "train", revision: str | None = None) -> ImageSet:
        """Read what `save` wrote, from a folder or a Hub dataset repo.

        Raises:
            InputError: If there is no such folder, repo or split, it is damaged, or it lacks the columns `image` and
                `label`.
        """
        import pyarrow.parquet

        path = dataset_file(path_or_repo_id, f"data/{split}-00000-of-00001.parquet", revision)
        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowException as error:
            raise InputError(f"{path} cannot be read as parquet ({error}); fetch it again or make it anew.") from error
        missing = {"image", "image_id", "label"} - set(table.column_names)
        if missing:
            raise InputError(
                f"{path} lacks the columns {sorted(missing)}; make it with `pathalign data` or `generate`."
            )
        import datasets

        names = datasets.Features.from_arrow_schema(table.schema)["label"].names
        images = np.stack([decode(row["bytes"]) for row in table.column("image").to_pylist()])
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


def dataset_file(path_or_repo_id: str | Path, name: str, revision: str | None = None) -> Path:
    """One file of a dataset: below a folder, or downloaded from a Hub dataset, `OWNER/NAME` or `OWNER/NAME@REVISION`.

    Raises:
        InputError: If there is no such folder, repo or file.
    """
    reference = parse(path_or_repo_id, revision)
    folder = Path(reference.name)
    if folder.is_dir():
        if not (folder / name).is_file():
            found = sorted(path.name.split("-0")[0] for path in (folder / "data").glob("*.parquet"))
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
