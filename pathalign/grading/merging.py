"""Files of several servers -> the grades and preferences that stand, and what of the candidates still lacks grades."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pathalign.grades import current_grades, parse_grade
from pathalign.grading.batches import Row, kind_of, read_batch
from pathalign.grading.preferences import standing_preferences
from pathalign.schema import Grade, InputError, Preference

SHOWN = 5  # examples named in an error
NAMED_HASH = re.compile(r"-\d{6,}-([0-9a-f]{16})\.jsonl$")


@dataclass(frozen=True)
class Merged:
    """What stands.

    Attributes:
        grades: Oldest first; no row twice, none that a later one corrects.
        preferences: The same of pairwise choices, by their ids.
        rows: Read from all files.
        duplicates: Left out because a row of the same id says the same.
        superseded: Left out because a later row corrects them.
    """

    grades: tuple[Grade, ...]
    preferences: tuple[Preference, ...]
    rows: int
    duplicates: int
    superseded: int


@dataclass(frozen=True)
class ClassCoverage:
    """How far a class is graded: its candidates, how many of them have a grade, and how many grades these have."""

    candidates: int
    graded: int
    grades: int

    @property
    def grades_per_image(self) -> float:
        """Mean over those that have any."""
        return self.grades / self.graded if self.graded else 0.0


def merge(files: Mapping[str, bytes]) -> Merged:
    """Merge the files of all servers of a study.

    Args:
        files: Path -> bytes, as `batches.batch_path` names them, or compacted ones.

    Raises:
        InputError: With all files whose bytes are not those that their name tells and all rows that cannot be read; or
            with the ids that stand for different rows; or if corrections cannot be followed.
    """
    rows: dict[tuple[str, str], tuple[str, Row]] = {}
    problems: list[str] = []
    conflicts: list[str] = []
    count = 0
    for path, content in sorted(files.items()):
        if not _is_what_it_is_called(path, content):
            problems.append(f"{path}: its bytes are not those that the hash in its name tells")
            continue
        try:
            found = read_batch(path, content, kind_of(path) or "")
        except InputError as error:
            problems.append(str(error))
            continue
        for row in found:
            count += 1
            first_path, first = rows.setdefault((row.kind, row.row_id), (path, row))
            if first is row:
                problems += _refused(path, row)
            elif not first.says_the_same_as(row):
                conflicts.append(f"{row.kind} {row.row_id}: in {first_path} and in {path}")
    if problems:
        raise InputError(
            "Files or rows cannot be used, so nothing was written. Mend these where they are, or take them away "
            f"({len(problems)}):\n{_examples(problems)}"
        )
    if conflicts:
        raise InputError(
            "Rows of one id say different things, so nothing was written. Find out which is right, and take the other "
            f"away ({len(conflicts)}):\n{_examples(conflicts)}"
        )
    grades = [Grade.from_mapping(row.content) for _, row in rows.values() if row.kind == "grade"]
    preferences = [Preference.from_mapping(row.content) for _, row in rows.values() if row.kind == "preference"]
    current = current_grades(grades)
    standing = sorted(standing_preferences(preferences), key=lambda row: row.preference_id)
    superseded = current.superseded + len(preferences) - len(standing)
    return Merged(current.grades, tuple(standing), count, count - len(rows), superseded)


def coverage(grades: Sequence[Grade], labels: Mapping[str, str]) -> dict[str, ClassCoverage]:
    """How far each class is graded.

    Args:
        grades: Those that stand; grades of other images do not count.
        labels: Image id -> class, of all candidates.

    Returns:
        Class -> counts, classes in alphabetical order.
    """
    candidates = Counter(labels.values())
    known = [grade.image_id for grade in grades if grade.image_id in labels]
    total = Counter(labels[image_id] for image_id in known)
    graded = Counter(labels[image_id] for image_id in set(known))
    return {name: ClassCoverage(count, graded[name], total[name]) for name, count in sorted(candidates.items())}


def lacking(grades: Sequence[Grade], labels: Mapping[str, str]) -> dict[str, list[str]]:
    """Class -> sorted ids of its candidates that have no grade yet; classes in alphabetical order."""
    graded: Collection[str] = {grade.image_id for grade in grades}
    found: dict[str, list[str]] = {name: [] for name in sorted(set(labels.values()))}
    for image_id, name in sorted(labels.items()):
        if image_id not in graded:
            found[name].append(image_id)
    return found


def _is_what_it_is_called(path: str, content: bytes) -> bool:
    found = NAMED_HASH.search(path)
    return found is None or hashlib.sha256(content).hexdigest().startswith(found[1])


def _refused(path: str, row: Row) -> list[str]:
    """Why no reader would take a row; nothing if all is well."""
    try:
        if row.kind == "grade":
            parse_grade(row.content)
        else:
            Preference.from_mapping(row.content)
    except ValueError as error:
        return [f"{path}: {row.kind} {row.row_id}: {error}"]
    return []


def _examples(lines: Sequence[str]) -> str:
    more = [f"- and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([f"- {line}" for line in lines[:SHOWN]] + more)
