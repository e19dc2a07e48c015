"""Many small files of a sink -> one Parquet file, without losing a row: `pathalign feedback compact`."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from pathalign.artefacts import write_atomically
from pathalign.grades import COMPACTED_KEY, compacted_kind, grade_files, table_rows
from pathalign.grading.batches import FOLDERS, ID_KEYS, KINDS, Row, kind_of, read_batch
from pathalign.grading.sinks import SinkError, open_sink
from pathalign.schema import Grade, InputError, Preference

SHOWN = 5  # examples named in an error
SCHEMAS = {"grade": Grade, "preference": Preference}


@dataclass(frozen=True)
class Compacted:
    """What became of the files.

    Attributes:
        path: The Parquet file.
        kind: Of its rows.
        rows: It holds.
        duplicates: Left out because a row with the same id says the same.
        files: That were read, an earlier Parquet file at `path` among them.
    """

    path: str
    kind: str
    rows: int
    duplicates: int
    files: int


def compact(source: str | Path, output: str | Path, kind: str = "grade") -> Compacted:
    """Write all rows of a kind into one Parquet file that `read_grades` and a restarting server can read.

    Corrected grades stay in it, beside their corrections. Rows of an earlier file at `output` stay too, so that the
    small files may be removed and more may come later. The sources are not touched.

    Args:
        source: A sink (a folder, or `hf://datasets/USER/REPO`), any folder with `.jsonl` files of grades, or one file.
        output: The Parquet file; it appears whole or not at all.
        kind: `grade`, `preference` or `session`.

    Raises:
        InputError: If there are no rows, a row cannot be read, two different rows have one id, the sink cannot be
            read, or the file cannot be written; nothing was changed then.
    """
    output = Path(output)
    if output.suffix != ".parquet":
        raise InputError(f"The output is {output}; give a file whose name ends in .parquet.")
    if kind not in KINDS:
        raise InputError(f"The kind is {kind!r}; use one of {', '.join(KINDS)}.")
    if output.exists() and compacted_kind(output) != kind:
        raise InputError(f"{output} is there and is no compacted file of this kind; choose another output.")
    earlier = [(str(output), output.read_bytes())] if output.exists() else []
    rows: dict[str, Row] = {}
    conflicts, files, read = [], 0, 0
    for name, content in [*earlier, *_files(source, kind, output)]:
        files += 1
        for row in read_batch(name, content, kind):
            _check(name, row)
            read += 1
            if not rows.setdefault(row.row_id, row).says_the_same_as(row):
                conflicts.append(f"{row.row_id} in {name}")
    if conflicts:
        shown = "\n".join(f"- {text}" for text in conflicts[:SHOWN])
        raise InputError(f"{len(conflicts)} {kind} ids stand for different rows; give each an id of its own:\n{shown}")
    if not rows:
        raise InputError(f"{source} has no rows of kind {kind}; is it the folder or dataset that grades go to?")
    content = parquet_bytes(kind, list(rows.values()))
    _check_whole(kind, rows, content)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, content)
    return Compacted(str(output), kind, len(rows), read - len(rows), files)


def parquet_bytes(kind: str, rows: Sequence[Row]) -> bytes:
    """A table with one column for each key; keys that a row lacks are empty cells."""
    import pyarrow
    import pyarrow.parquet

    contents = [row.content for row in rows]
    hints = _column_hints(kind)
    names = list(dict.fromkeys([*hints, *(key for content in contents for key in content)]))
    arrays = []
    for name in names:
        values = [content.get(name) for content in contents]
        arrays.append(pyarrow.array(values, _column_type(name, values, hints.get(name, "string"))))
    table = pyarrow.table(arrays, names=names).replace_schema_metadata({COMPACTED_KEY: kind.encode()})
    written = io.BytesIO()
    pyarrow.parquet.write_table(table, written, compression="zstd")
    return written.getvalue()


def _files(source: str | Path, kind: str, output: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the files that hold rows of a kind."""
    path = Path(source)
    if path.is_file():
        yield str(path), path.read_bytes()
        return
    is_hub = str(source).startswith("hf://")
    if not is_hub and not path.is_dir():
        raise InputError(f"There is no folder {path}: give the folder or dataset that grades go to.")
    if kind == "grade" and not is_hub:
        yield from (
            (str(file), file.read_bytes()) for file in grade_files(path) if file.absolute() != output.absolute()
        )
        return
    sink = open_sink(source)
    try:
        for name in sink.list(f"{FOLDERS[kind]}/"):
            if kind_of(name) == kind and (is_hub or (path / name).absolute() != output.absolute()):
                yield name, sink.read(name) or b""
    except SinkError as error:
        raise InputError(f"{source} cannot be read: {error}") from error


def _check(name: str, row: Row) -> None:
    """Refuse what no reader would take: it must not vanish among thousands of rows."""
    if schema := SCHEMAS.get(row.kind):
        try:
            schema.from_mapping(row.content)  # type: ignore[attr-defined]
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


def _check_whole(kind: str, rows: dict[str, Row], content: bytes) -> None:
    """Read back what is about to be written: every row is there and says what it said."""
    found = [Row.make(kind, row[ID_KEYS[kind]], row) for row in table_rows(content)]
    counts = Counter(row.row_id for row in found)
    differing = [row.row_id for row in found if not _same(row.content, rows[row.row_id].content)]
    if set(counts) != set(rows) or max(counts.values()) > 1 or differing:
        raise InputError(
            f"The table does not give back what was put into it ({len(found)} of {len(rows)} rows, {len(differing)} "
            f"that differ, such as {differing[:1]}); nothing was written. Please report this."
        )


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows have the same values; an absent key and an empty one are the same."""
    return all(one.get(key) == other.get(key) for key in {*one, *other})


def _column_hints(kind: str) -> dict[str, str]:
    """Column types by the schema, for columns that are empty in all rows."""
    words = {"tuple": "list", "bool": "bool", "int": "int64", "float": "float64"}  # in the text of a type hint
    hints = get_type_hints(SCHEMAS[kind]) if kind in SCHEMAS else {}
    return {
        name: next((column for word, column in words.items() if word in str(hint)), "string")
        for name, hint in hints.items()
    }


def _column_type(name: str, values: Sequence[Any], hint: str) -> Any:
    import pyarrow

    text_list = pyarrow.list_(pyarrow.string())
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return text_list if hint == "list" else pyarrow.type_for_alias(hint)
    types = {
        bool: pyarrow.bool_(),
        int: pyarrow.int64(),
        float: pyarrow.float64(),
        str: pyarrow.string(),
        list: text_list,
    }
    if kinds <= {int, float} and bool not in kinds:
        return types[float if float in kinds or hint == "float64" else int]
    if len(kinds) > 1 or kinds - set(types):
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"The key {name!r} holds {found} in different rows, which no table can; mend those rows.")
    return types[kinds.pop()]
