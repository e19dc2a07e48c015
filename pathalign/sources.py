"""Where labelled images come from: a folder, parquet files, a Hub dataset or the phantom. Listed here, read later."""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pathalign import phantom
from pathalign.artefacts import fingerprint
from pathalign.config import DATASET, unknown_key
from pathalign.pinning import unusable
from pathalign.remote import Reference, explained, parse
from pathalign.schema import InputError
from pathalign.settings.data import DataConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(("validation", "val", "valid", "dev"), "validation")
LABELS_WANTED = (
    "A class is the name of a folder (`class/image.png`), the part of a file name before its last `_` "
    "(`class_001.png`), or the column `label` of a parquet file."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One image of a source, not yet read. `label` is None where the source names no class."""

    name: str
    label: str | None
    split: str | None
    open: Callable[[], Image.Image]
    columns: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source holds: its rows, its classes in their order, and the Hub commit or the hash of its files."""

    rows: list[Row]
    class_names: tuple[str, ...]
    revision: str
    left_out: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # names of splits and columns


def find_rows(config: DataConfig) -> Source:
    """List the images of `config.source` without reading them.

    Raises:
        InputError: If the source is missing, holds no images, or names no classes.
    """
    path = Path(config.source).expanduser()
    if config.source == "phantom":
        chosen_classes(config.classes, phantom.CLASS_NAMES)
        source = _phantom(config)
    elif path.is_dir():
        tables = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
        source = _from_parquet(tables) if tables else _from_folder(path)
        source = dataclasses.replace(source, revision=fingerprint(path))
    elif path.is_file() and path.suffix == ".parquet":
        source = dataclasses.replace(_from_parquet([path]), revision=fingerprint(path))
    elif path.is_file():
        raise InputError(f"{path} is one file; `source` must be a folder of images, parquet files or a Hub dataset id.")
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(@.*)?", config.source):
        return _from_hub(parse(config.source, config.revision))
    else:
        near = difflib.get_close_matches(path.name, _names_in(path.parent), n=1)
        raise InputError(f"There is no folder {path}." + (f" Did you mean {path.with_name(near[0])}?" if near else ""))
    if config.revision:
        raise InputError(f"`revision` is {config.revision!r}, but {config.source} is no Hub dataset; leave it out.")
    return source


def _names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _phantom(config: DataConfig) -> Source:
    drawn = phantom.draw(config.phantom_per_class, config.image_size_px, config.seed)
    rows = [
        Row(f"phantom {i}", label, None, partial(Image.fromarray, array), {k: v[i] for k, v in drawn.columns.items()})
        for i, (label, array) in enumerate(zip(drawn.labels(), drawn.images.permute(0, 2, 3, 1).numpy(), strict=True))
    ]
    return Source(rows, drawn.class_names, f"phantom, seed {config.seed}")


def _from_folder(folder: Path) -> Source:
    """`[split/]class/.../image`, or `[split/]<class>_<number>.<suffix>` where no class has a folder."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    files = [path for path in files if not any(part.startswith((".", "__")) for part in path.parts)]
    if not files:
        raise InputError(f"{folder} holds no images ({', '.join(SUFFIXES)}) and no parquet files.")
    tops = {path.parts[0].lower() for path in files if len(path.parts) > 1}
    others = sorted(tops - set(SPLITS))
    has_splits = bool(tops) and ("train" in {SPLITS.get(top) for top in tops} or not others)
    if has_splits and others:
        raise InputError(f"{folder} has folders of splits and others beside them, {others}: rename or move the others.")
    depth = int(has_splits)
    has_class_folders = any(len(path.parts) > depth + 1 for path in files)
    rows = []
    for path in files:
        split = SPLITS.get(path.parts[0].lower()) if has_splits and len(path.parts) > 1 else None
        inner = path.parts[1:] if split else path.parts
        label = (inner[0] if len(inner) > 1 else "") if has_class_folders else path.stem.rpartition("_")[0]
        rows.append(Row(str(path), label or None, split, partial(_open_file, folder / path)))
    return Source(rows, _sorted_names(row.label for row in rows), "")


def _from_parquet(paths: Sequence[Path]) -> Source:
    import pyarrow
    import pyarrow.parquet

    tables = {}
    for path in paths:
        try:
            tables[path.stem] = pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{path} cannot be read as parquet ({error}); fetch or write it again.") from error
    return _from_tables(tables)


def _from_hub(reference: Reference) -> Source:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    name, asked = reference.name, reference.revision
    try:
        commit = HfApi().resolve_revision(name, repo_type="dataset", revision=asked).resolved
        loaded = datasets.load_dataset(name, revision=commit)
    except RepositoryNotFoundError as error:
        raise unusable(error, reference, DATASET) from error
    except Exception as error:  # of httpx, of datasets, of its readers: `explained` tells them apart
        raise explained(error, name, "dataset", asked) from error
    read = [address for part in loaded.values() for address in part.info.download_checksums or ()]
    if any(f"@{commit}/" not in address for address in read):
        # Without connection datasets 5.2 takes what it prepared last, whatever revision was asked for.
        raise InputError(
            f"Without connection only the revision of {name} can be read that was read last, and that is not {commit}. "
            f"Connect, or give the folder that `hf download {name} --repo-type dataset --revision {commit}` names."
        )
    source = _from_tables({split: part.data.table for split, part in loaded.items()})
    return dataclasses.replace(source, revision=commit)


def _from_tables(tables: dict[str, Any]) -> Source:
    """Rows of arrow tables; a table's name begins with its split, such as `train-00000-of-00001`."""
    import datasets

    if not tables:
        raise InputError("The dataset has no rows.")
    splits = {name: SPLITS.get(re.split(r"[-_.]", name.lower())[0]) for name in tables}
    unknown = [name for name, split in splits.items() if split is None]
    if len(unknown) < len(tables):
        tables = {name: table for name, table in tables.items() if splits[name]}
    features = {name: datasets.Features.from_arrow_schema(table.schema) for name, table in tables.items()}
    rows: list[Row] = []
    ordered: list[str] = []
    # Columns of one simple type in all tables; ours are made anew.
    kinds = set.intersection(*({(name, _kind(each[name])) for name in each} for each in features.values()))
    plain = {name for name, kind in kinds if kind} - {"image", "image_id", "label"}
    left_out = sorted(set.union(*map(set, features.values())) - plain)
    for name, table in tables.items():
        image_key, label_key = _image_and_label(features[name], name)
        left_out = [key for key in left_out if key not in (image_key, label_key)]
        label_feature = features[name][label_key]
        ordered += getattr(label_feature, "names", None) or []
        labels = [_label(label_feature, value) for value in table.column(label_key).to_pylist()]
        kept = [key for key in table.column_names if key in plain - {image_key, label_key}]
        extra = {key: [_value(features[name][key], value) for value in table.column(key).to_pylist()] for key in kept}
        rows += [
            Row(f"{name} row {i}", labels[i], splits[name], partial(_open_cell, table.column(image_key), i), values)
            for i, values in enumerate({key: extra[key][i] for key in extra} for i in range(len(table)))
        ]
    present = _sorted_names(row.label for row in rows)
    names = tuple(name for name in dict.fromkeys([*ordered, *present]) if name in present)
    return Source(rows, names, "", {"splits": unknown if len(unknown) < len(splits) else [], "columns": left_out})


def _image_and_label(features: Any, table_name: str) -> tuple[str, str]:
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    images += [name for name in ("image", "img") if name in features]
    labels = [name for name in ("label",) if name in features]
    labels += [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images or not labels:
        raise InputError(f"{table_name} needs the columns `image` and `label`; it has {list(features)}.")
    return images[0], labels[0]


def _kind(feature: Any) -> str | None:
    """`string`, `int`, `float` or `bool`; None for lists, structures, dates, images and sounds."""
    if getattr(feature, "names", None) is not None:
        return "string"
    found = re.match(r"(?:large_)?(string)|u?(int)|(float)|(bool)", str(getattr(feature, "dtype", "")))
    return found and found[found.lastindex or 0]


def _value(feature: Any, value: Any) -> Any:
    """A cell: text, a number, or the name of a class. None where there is none; Hub datasets say -1 for no class."""
    names = getattr(feature, "names", None)
    if names is None:
        return value
    return names[value] if value is not None and value >= 0 else None


def _label(feature: Any, value: Any) -> str | None:
    """Name of the class that a cell of the label column means; `class_<number>` where numbers have no names."""
    value = _value(feature, value)
    if isinstance(value, int):
        return f"class_{value}" if value >= 0 else None
    return str(value) if value not in (None, "") else None


def _sorted_names(labels: Iterable[str | None]) -> tuple[str, ...]:
    """Distinct names in alphabetical order, numbers within them by value: class_2 before class_10."""
    present = {label for label in labels if label}

    def by_value(name: str) -> list[tuple[int, str]]:
        return [(int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]

    return tuple(sorted(present, key=by_value))


def _open_file(path: Path) -> Image.Image:
    return Image.open(io.BytesIO(path.read_bytes()))


def _open_cell(column: Any, index: int) -> Image.Image:
    cell = column[index].as_py()
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return Image.open(io.BytesIO(content)) if content else _open_file(Path(cell["path"]))


def chosen_classes(wanted: Sequence[str], present: Sequence[str]) -> tuple[str, ...]:
    """The classes to use: `wanted` in its order, or all that are present.

    Raises:
        InputError: If a wanted one is not present, or fewer than two remain.
    """
    if not present:
        raise InputError(f"No image has a label. {LABELS_WANTED}")
    unknown = [unknown_key(name, present) for name in wanted if name not in present]
    if unknown:
        raise InputError("Unknown names in `classes`: " + " ".join(unknown))
    chosen = tuple(dict.fromkeys(wanted or present))
    if len(chosen) == 1:
        raise InputError(f"There is only one class, {chosen[0]!r}; at least two are needed. {LABELS_WANTED}")
    return chosen
