"""Columns of image sets that may leave, and what they say of the images: which class, and whether they are real.

A column that pathalign did not write may be called anything and hold anything, so it stays.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pathalign.ratings import REPEAT
from pathalign.schema import InputError

SYNTHETIC = ("synthetic", REPEAT)  # values of `kind`; all others are real
TEXTS = ("image_id", "model", "adapter", "concept", "scheduler", "kind", "subtype")
NUMBERS = ("label", "seed", "steps", "guidance", "reward", "plausible", "majority", "n_grades")
SHARES = "failed_"  # and a criterion


def is_picture(kind: Any) -> bool:
    """Whether a column's type is that of `datasets.Image`."""
    import pyarrow

    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {part.name for part in kind}


def drop_unknown(path: Path) -> list[str]:
    """Take all columns out of a Parquet file that pathalign does not write, and what else its schema says.

    Returns:
        Names of the columns.

    Raises:
        InputError: If it was not written by pathalign.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    kept = [field.name for field in table.schema if _is_known(field)]
    features = _features(table, path)
    told = {b"huggingface": json.dumps({"info": {"features": {name: features[name] for name in kept}}}).encode()}
    dropped = [name for name in table.column_names if name not in kept]
    if dropped or set(table.schema.metadata) != set(told) or _info(table) != _info_of(told):
        pyarrow.parquet.write_table(table.select(kept).replace_schema_metadata(told), path)
    return dropped


def count_images(path: Path, all_real: bool = False, synthetic: Collection[str] = ()) -> tuple[Counter[str], int]:
    """Images of each class in a Parquet file, and how many of all are real.

    Args:
        path: Of the file.
        all_real: Whether they are, whatever the file says.
        synthetic: Ids of images that are known not to be, where the file has no column `kind`.
    """
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    names = _features(table, path)["label"]["names"]
    counts = Counter(names[label] for label in table.column("label").to_pylist())
    if all_real:
        return counts, table.num_rows
    if "kind" in table.column_names:
        return counts, sum(kind not in SYNTHETIC for kind in table.column("kind").to_pylist())
    return counts, sum(name not in synthetic for name in table.column("image_id").to_pylist())


def _is_known(field: Any) -> bool:
    """By name and type: text under the name of a number is not what pathalign writes."""
    from pyarrow import types

    if field.name == "image":
        return is_picture(field.type)
    if field.name in TEXTS:
        return bool(types.is_string(field.type))
    number = types.is_integer(field.type) or types.is_floating(field.type) or types.is_boolean(field.type)
    return number and (field.name in NUMBERS or field.name.startswith(SHARES))


def _info(table: Any) -> Any:
    return _info_of(table.schema.metadata or {})


def _info_of(metadata: Any) -> Any:
    return json.loads(metadata.get(b"huggingface", b"null"))


def _features(table: Any, path: Path) -> dict[str, Any]:
    """What `datasets` knows of the columns."""
    try:
        features: dict[str, Any] = _info(table)["info"]["features"]
        if {"image", "image_id", "label"} <= features.keys() and "names" in features["label"]:
            return features
    except (KeyError, TypeError, ValueError):
        pass
    raise InputError(f"{path.name} is no image set that `pathalign data` or `pathalign generate` made; make it anew.")
