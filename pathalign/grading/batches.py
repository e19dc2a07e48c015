"""Rows and the files they travel in: one line of JSON a row, at paths that nobody else writes.

`grades/2026-03-01-<replica>-<sequence>-<hash of the content>.jsonl`. The replica is drawn at random for each new disk
and the sequence counts on it, so two servers, or one whose disk was wiped, never write the same path; the hash keeps
even a copied disk from doing so.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from pathalign.grades import table_rows
from pathalign.schema import InputError

KINDS = ("grade", "preference", "session")
FOLDERS = {"grade": "grades", "preference": "preferences", "session": "sessions"}
ID_KEYS = {"grade": "grade_id", "preference": "preference_id", "session": "session_id"}
SUFFIXES = (".jsonl", ".parquet")
SAID = (  # what a person said; the server's times and versions may differ when a row is sent again
    "grader",
    "image_id",
    "class_label",
    "verdict",
    "failed_criteria",
    "subtype",
    "confidence",
    "comment",
    "supersedes",
    "mode",
    "left_image_id",
    "right_image_id",
    "choice",
)


@dataclass(frozen=True)
class Row:
    """One thing to keep.

    Attributes:
        kind: One of `KINDS`.
        row_id: Made by the client; the same in `ID_KEYS[kind]` of the body.
        body: Canonical JSON, one line.
    """

    kind: str
    row_id: str
    body: str

    @classmethod
    def make(cls, kind: str, row_id: str, content: Mapping[str, Any]) -> Row:
        """Check a row and write it canonically.

        Raises:
            InputError: If the kind is unknown, the id is empty or not the row's own, or the row is no JSON.
        """
        if kind not in KINDS:
            raise InputError(f"A row is of kind {kind!r}; use one of {', '.join(KINDS)}.")
        if not isinstance(row_id, str) or not row_id or content.get(ID_KEYS[kind]) != row_id:
            raise InputError(
                f"The {kind} {row_id!r} has {content.get(ID_KEYS[kind])!r} as `{ID_KEYS[kind]}`; both must be the same "
                "non-empty text."
            )
        try:
            row_id.encode()  # an id with half a character could not be looked up again
            body = json.dumps(_whole_characters(dict(content)), sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"The {kind} {row_id!r} cannot be written as JSON: {error}.") from error
        return cls(kind, row_id, body)

    @property
    def content(self) -> dict[str, Any]:
        """The parsed body."""
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed

    @property
    def grader(self) -> str | None:
        """Pseudonym of who said it."""
        return self.content.get("grader")

    def says_the_same_as(self, other: Row) -> bool:
        """Whether this is the other row sent again, perhaps with another time of arrival or app version."""
        mine, others = self.content, other.content
        said = all(mine.get(key) == others.get(key) for key in SAID)
        by_like = bool(mine.get("simulated")) == bool(others.get("simulated"))  # false where it is left out
        return self.kind == other.kind and said and by_like


def _whole_characters(value: Any) -> Any:
    """Browsers send half a surrogate pair where text was cut inside an emoji; Parquet takes no such text."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, Mapping):
        return {key: _whole_characters(entry) for key, entry in value.items()}
    return [_whole_characters(entry) for entry in value] if isinstance(value, list | tuple) else value


def batch_content(rows: Sequence[Row]) -> bytes:
    """Bytes of the file that holds these rows, in this order."""
    return "".join(f"{row.body}\n" for row in rows).encode()


def batch_path(kind: str, date: str, replica: str, sequence: int, content: bytes) -> str:
    """Where these bytes go; only a writer of the same bytes can arrive at the same path.

    Args:
        kind: Of the rows, one of `KINDS`.
        date: UTC, `YYYY-MM-DD`.
        replica: Random name of the disk that the rows were recorded on.
        sequence: Counts the batches of the replica.
        content: The file's bytes.
    """
    return f"{FOLDERS[kind]}/{date}-{replica}-{sequence:06d}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"


def kind_of(path: str) -> str | None:
    """Kind of the rows at a path such as `grades/x.jsonl` or `grades.parquet`; None if it holds no rows."""
    found = PurePosixPath(path)
    folder = found.parts[0] if len(found.parts) > 1 else found.stem
    kinds = {name: kind for kind, name in FOLDERS.items()}
    return kinds.get(folder) if found.suffix in SUFFIXES else None


def read_batch(path: str, content: bytes, kind: str) -> list[Row]:
    """Rows of a `.jsonl` file, or of the `.parquet` that `pathalign feedback compact` makes of many.

    Raises:
        InputError: If a line is no row of this kind; names the file and the lines.
    """
    rows, problems = [], []
    entries = table_rows(content) if path.endswith(".parquet") else content.split(b"\n")
    for number, entry in enumerate(entries, start=1):
        if isinstance(entry, bytes) and not entry.strip():
            continue
        try:
            parsed = json.loads(entry) if isinstance(entry, bytes) else entry
            if not isinstance(parsed, dict):
                raise InputError(f"holds a {type(parsed).__name__}; a {kind} is a JSON object.")
            rows.append(Row.make(kind, parsed.get(ID_KEYS[kind], ""), parsed))
        except ValueError as error:  # InputError, bad JSON and bad UTF-8 are ValueErrors
            problems.append(f"{path}:{number}: {error}")
    if problems:
        shown = "\n".join(f"- {text}" for text in problems[:5])
        raise InputError(f"{len(problems)} of {len(rows) + len(problems)} rows cannot be read:\n{shown}")
    return rows
