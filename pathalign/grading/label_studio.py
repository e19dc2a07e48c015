"""Grades out of a Label Studio export: its JSON (tasks with annotations) or JSON-MIN (one object an annotation).

Fields of the labelling interface are told by what they hold: choices that are verdicts, free text, a rating. Whoever
annotated is numbered; names and e-mail addresses of the export are never stored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pathalign.artefacts import fingerprint
from pathalign.schema import VERDICTS, Grade, InputError

WORDS = {
    "plausible": ("plausible", "realistic", "real", "yes", "accept", "good", "normal"),
    "implausible": ("implausible", "not plausible", "unrealistic", "fake", "no", "reject", "bad", "abnormal"),
    "unsure": ("unsure", "uncertain", "not sure", "don't know", "unknown", "maybe"),
}
STARS = 5  # Label Studio's default `maxRating`
MIN_KEYS = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "image", "image_id")


@dataclass(frozen=True)
class Reading:
    """How the labelling interface is to be read.

    Attributes:
        verdict: `from_name` of the choices that hold the verdict; by default those whose choices are all verdicts.
        criteria: `from_name` of the choices that name failed criteria.
        words: Choice -> verdict, for choices that `WORDS` does not know.
    """

    verdict: str | None = None
    criteria: str = "failed_criteria"
    words: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = sorted({verdict for verdict in self.words.values() if verdict not in VERDICTS})
        if wrong:
            raise InputError(f"Choices are mapped to {wrong}; a verdict is one of {', '.join(VERDICTS)}.")

    def verdict_of(self, choice: str) -> str | None:
        """The verdict that a choice means, if any."""
        text = choice.strip().casefold()
        own = {word.strip().casefold(): verdict for word, verdict in self.words.items()}
        return own.get(text) or next((verdict for verdict, words in WORDS.items() if text in words), None)


@dataclass(frozen=True)
class Answer:
    """One annotation: a grade without its image, and what the task says about the image."""

    grade: Grade
    image: str
    image_id: str | None
    class_label: str | None

    def file_names(self) -> list[str]:
        """Names that the image's file may have: as it is, and without the prefix of an upload."""
        parts = urlsplit(self.image)
        place = parse_qs(parts.query).get("d", [parts.path])[0]
        name = PurePosixPath(unquote(place)).name
        return [name, re.sub(r"^[0-9a-f]{8}-", "", name)]

    def known_id(self, known: Collection[str]) -> str | None:
        """The image's id, if the task or the file name has one that is known."""
        found = [self.image_id, *re.findall(r"[0-9a-f]{16}", self.image)]
        return next((name for name in found if name and name in known), None)


def read(path: Path, reading: Reading) -> tuple[list[Answer], dict[str, int]]:
    """All annotations with a verdict.

    Returns:
        The answers in the order of the file, and how many annotations were left out: `cancelled`, `no verdict`.

    Raises:
        InputError: If it is no such export, or no field holds verdicts.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}); export it from Label Studio as JSON.") from error
    if not isinstance(content, list) or not content or not all(isinstance(task, dict) for task in content):
        raise InputError(f"{path} is no list of tasks; export it from Label Studio as JSON or JSON-MIN.")
    annotations = list(_annotations(content))
    if not annotations:
        raise InputError(f"{path} has {len(content)} tasks and no annotation; label images first.")
    control = reading.verdict or _verdict_field(annotations, reading, path)
    source = fingerprint(path.read_text(encoding="utf-8"))[:8]
    numbers: dict[str, int] = {}
    answers, left_out = [], Counter[str]()
    for entry in annotations:
        verdicts = {reading.verdict_of(choice) for choice in entry.fields.get(control, []) if isinstance(choice, str)}
        verdicts.discard(None)
        if entry.cancelled or len(verdicts) != 1:
            left_out["cancelled" if entry.cancelled else "no verdict"] += 1
            continue
        number = numbers.setdefault(entry.annotator, len(numbers) + 1)
        grade = _grade(entry, str(verdicts.pop()), f"imported-{source}-{number}", control, reading)
        answers.append(Answer(grade, entry.image, entry.image_id, entry.class_label))
    if not answers:
        raise InputError(
            f"None of {len(annotations)} annotations in {path} has a verdict in {control!r} ({dict(left_out)}). "
            "Say which choice means what with `--verdict 'CHOICE=plausible'`."
        )
    return answers, dict(left_out)


@dataclass(frozen=True)
class _Annotation:
    key: str
    image: str
    image_id: str | None
    class_label: str | None
    annotator: str
    cancelled: bool
    created_at: str
    fields: Mapping[str, list[Any]]  # from_name -> choices, texts, ratings


def _annotations(content: Iterable[Mapping[str, Any]]) -> Iterable[_Annotation]:
    for place, task in enumerate(content):
        data = task.get("data", task)
        shared = {
            "image": str(data.get("image") or next((v for v in data.values() if _is_image(v)), "")),
            "image_id": data.get("image_id"),
            "class_label": data.get("class_label") or data.get("label"),
        }
        if "annotations" not in task and "completions" not in task:  # JSON-MIN
            fields = {key: value for key, value in task.items() if key not in MIN_KEYS and not _is_image(value)}
            yield _Annotation(
                key=str(task.get("annotation_id", place)),
                annotator=str(task.get("annotator", "")),
                cancelled=False,
                created_at=str(task.get("created_at") or ""),
                fields={key: _values(value) for key, value in fields.items()},
                **shared,
            )
        for number, entry in enumerate(task.get("annotations") or task.get("completions") or []):
            yield _Annotation(
                key=str(entry.get("id", f"{place}-{number}")),
                annotator=json.dumps(entry.get("completed_by"), sort_keys=True),
                cancelled=bool(entry.get("was_cancelled")),
                created_at=str(entry.get("created_at") or ""),
                fields=_fields(entry.get("result") or []),
                **shared,
            )


def _fields(result: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    for item in result:
        value = item.get("value") or {}
        found = next((value[key] for key in ("choices", "text", "rating", "number") if key in value), None)
        if found is not None:
            fields.setdefault(str(item.get("from_name")), []).extend(_values(found))
    return fields


def _values(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("choices", "text", "rating", "number") if key in value), [])
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_image(value: Any) -> bool:
    return isinstance(value, str) and bool(re.search(r"\.(png|jpe?g|tiff?|bmp|gif|webp)(\?|$)", value.lower()))


def _verdict_field(annotations: Iterable[_Annotation], reading: Reading, path: Path) -> str:
    """The field whose values are all verdicts."""
    seen: dict[str, set[str]] = {}
    for entry in annotations:
        for name, values in entry.fields.items():
            seen.setdefault(name, set()).update(str(value) for value in values)
    fitting = [name for name, values in seen.items() if values and all(map(reading.verdict_of, values))]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(f"{name}: {', '.join(sorted(values)[:6])}" for name, values in sorted(seen.items()))
    raise InputError(
        f"{path} has {len(fitting)} fields whose choices are all verdicts. It holds {listed or 'no fields'}. Name the "
        "field with `--verdict-field`, and its choices with `--verdict 'CHOICE=plausible'` and so on."
    )


def _grade(entry: _Annotation, verdict: str, grader: str, control: str, reading: Reading) -> Grade:
    failed = entry.fields.get(reading.criteria, [])
    comments = [
        str(value)
        for name, values in entry.fields.items()
        if name not in (control, reading.criteria, "confidence", "subtype", "class_label", "label")
        for value in values
        if isinstance(value, str) and value.strip()
    ]
    subtype = entry.fields.get("subtype", [])
    return Grade(
        grade_id=fingerprint(["label-studio", grader, entry.key, entry.image]),
        image_id="",
        class_label="",
        verdict=verdict,
        grader=grader,
        failed_criteria=tuple(dict.fromkeys(str(value) for value in failed)),
        subtype=str(subtype[0]) if subtype else None,
        confidence=_confidence(entry.fields.get("confidence", [])),
        comment="\n".join(comments) or None,
        app_version="label-studio",
        recorded_at=entry.created_at,
    )


def _confidence(values: list[Any]) -> float | None:
    """Stars become a share of five; a number from 0 to 1 stays."""
    if not values or not isinstance(values[0], int | float):
        return None
    value = float(values[0])
    return min(value / STARS if isinstance(values[0], int) or value > 1 else value, 1.0)
