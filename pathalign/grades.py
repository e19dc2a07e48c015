"""Reading grades: every line is accounted for, sent twice counts once, and a correction replaces what it corrects."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pathalign.schema import Grade, InputError

SHOWN = 5  # examples named in an error
OTHER_ROWS = ("preferences", "sessions")  # folders of a study's sink
COMPACTED_KEY = b"pathalign_rows"  # in the metadata of a compacted Parquet file: the kind of its rows
REQUIRED_TEXT = ("grade_id", "image_id", "class_label", "verdict", "grader")


@dataclass(frozen=True)
class CurrentGrades:
    """The grades that stand.

    Attributes:
        grades: Oldest first, by `recorded_at`, then in the order they were read in.
        duplicates: Rows left out because their `grade_id` had been read before.
        superseded: Grades left out because a later one corrects them.
    """

    grades: tuple[Grade, ...]
    duplicates: int
    superseded: int


def read_grades(path: str | Path) -> list[Grade]:
    """Read grades: of a `.jsonl` file, of a compacted `.parquet`, or of all such files below a folder.

    A folder's files come in the order of their paths. What a study keeps beside its grades, in `preferences/` and
    `sessions/`, is left out, and so are Parquet files that `pathalign feedback compact` did not write.

    Raises:
        InputError: If there are no grades, or a line cannot be read; names the files and lines.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"There are no grades at {path}: give a .jsonl file or a folder with .jsonl files.")
    files = grade_files(path) if path.is_dir() else [path]
    grades, problems = [], []
    for file in files:
        for number, entry in enumerate(_entries(file), start=1):
            if not entry:
                continue
            try:
                grades.append(parse_grade(entry))
            except (ValueError, TypeError) as error:  # InputError, bad JSON and bad UTF-8 are ValueErrors
                problems.append(f"{file}:{number}: {error}")
    if problems:
        raise InputError(
            f"{len(problems)} of {len(grades) + len(problems)} grades cannot be read; nothing was written. "
            f"Correct these lines or move them to another file:\n{_examples(problems)}"
        )
    if not grades:
        raise InputError(
            f"{path} has no grades in {len(files)} .jsonl files; grade images with `pathalign grade` first."
        )
    return grades


def grade_files(folder: Path) -> list[Path]:
    """The files below a folder that hold grades, sorted."""
    others = [folder / name for name in OTHER_ROWS]
    found = [
        path for path in folder.rglob("*") if path.is_file() and not any(other in path.parents for other in others)
    ]
    return sorted(
        path
        for path in found
        if path.suffix == ".jsonl" or (path.suffix == ".parquet" and compacted_kind(path) == "grade")
    )


def compacted_kind(table: Path | bytes) -> str | None:
    """Kind of the rows of a Parquet file that `pathalign feedback compact` wrote; None for any other file."""
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_schema(_openable(table)).metadata or {}
    except (pyarrow.ArrowException, OSError):
        return None
    kind: bytes | None = metadata.get(COMPACTED_KEY)
    return kind.decode() if kind else None


def table_rows(table: Path | bytes) -> list[dict[str, Any]]:
    """Rows of a Parquet file; an empty cell is an absent key, which means the same to all that read rows.

    Raises:
        InputError: If it cannot be read.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(_openable(table)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        name = table if isinstance(table, Path) else "The file"
        raise InputError(f"{name} cannot be read as Parquet ({error}); fetch or compact it again.") from error
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def _openable(table: Path | bytes) -> Any:
    return table if isinstance(table, Path) else io.BytesIO(table)


def _entries(file: Path) -> Iterator[bytes | dict[str, Any]]:
    if file.suffix == ".parquet":
        yield from table_rows(file)
    else:
        yield from (line.strip() for line in file.read_bytes().splitlines())


def current_grades(grades: Sequence[Grade]) -> CurrentGrades:
    """Leave out rows that were sent twice and grades that a later one supersedes, through any number of corrections.

    Raises:
        InputError: If two different grades have one id, if a correction is about another image or by another grader
            than what it corrects, or if corrections go round in a circle.
    """
    by_id: dict[str, Grade] = {}
    conflicts = []
    for grade in grades:
        first = by_id.setdefault(grade.grade_id, grade)
        if (first.image_id, first.grader, first.verdict) != (grade.image_id, grade.grader, grade.verdict):
            conflicts.append(f"{grade.grade_id}: {_summary(first)}, then {_summary(grade)}")
    if conflicts:
        raise InputError(
            f"{len(conflicts)} grade ids stand for different grades; give each grade an id of its own:\n"
            f"{_examples(conflicts)}"
        )
    corrected = {grade.supersedes for grade in by_id.values()} & set(by_id)
    standing = [grade for grade in by_id.values() if grade.grade_id not in corrected]
    _check_corrections(by_id, standing)
    return CurrentGrades(
        grades=tuple(sorted(standing, key=recorded_at)),
        duplicates=len(grades) - len(by_id),
        superseded=len(by_id) - len(standing),
    )


def recorded_at(grade: Grade) -> datetime:
    """When a grade was given; without a time it counts as older than all that have one. Without a zone it is UTC.

    Raises:
        ValueError: If the time is not ISO 8601.
    """
    if not grade.recorded_at:
        return datetime.min.replace(tzinfo=UTC)
    time = datetime.fromisoformat(grade.recorded_at)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _check_corrections(by_id: dict[str, Grade], standing: Sequence[Grade]) -> None:
    problems = []
    reached = {grade.grade_id for grade in standing}
    for grade in standing:
        while grade.supersedes in by_id and grade.supersedes not in reached:
            reached.add(grade.supersedes)
            grade = by_id[grade.supersedes]
    if circle := sorted(set(by_id) - reached):
        problems.append(f"{', '.join(circle[:SHOWN])}: corrections that supersede each other in a circle")
    for grade in by_id.values():
        old = by_id.get(grade.supersedes or "")
        if old and (old.image_id, old.grader) != (grade.image_id, grade.grader):
            problems.append(
                f"{grade.grade_id} ({_summary(grade)}) supersedes {old.grade_id} ({_summary(old)}): "
                "a grader can only correct an own grade of the same image"
            )
    if problems:
        raise InputError(f"Corrections cannot be followed; mend `supersedes` of these grades:\n{_examples(problems)}")


def parse_grade(entry: bytes | dict[str, Any]) -> Grade:
    """A grade of a line of JSON or of a parsed row.

    Raises:
        ValueError: If it is no JSON, a key is missing, unknown or of another type, or the time is not ISO 8601.
    """
    row = json.loads(entry) if isinstance(entry, bytes) else entry
    if not isinstance(row, dict):
        raise InputError(f"holds a {type(row).__name__}; a grade is a JSON object.")
    grade = Grade.from_mapping(row)
    wrong = [key for key in REQUIRED_TEXT if not isinstance(row[key], str)]
    if wrong:
        raise InputError(f"{wrong} must be text.")
    failed = row.get("failed_criteria") or []
    if not isinstance(failed, list) or not all(isinstance(name, str) for name in failed):
        raise InputError(f"`failed_criteria` is {failed!r}; it must be a list of names.")
    recorded_at(grade)
    return grade


def _summary(grade: Grade) -> str:
    return f"image {grade.image_id} is {grade.verdict}, by {grade.grader}"


def _examples(lines: Sequence[str]) -> str:
    more = [f"- and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"- {line}" for line in lines[:SHOWN]] + more)
