"""What a browser sends, checked before it is kept: nothing in it is taken on trust, and each refusal says why."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from pathalign.grading.order import PAIRWISE
from pathalign.schema import CHOICES, VERDICTS, Grade, Preference

IDENTIFIER = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
LONGEST_COMMENT, LONGEST_SUBTYPE, LONGEST_NOTE = 2000, 80, 500
LONGEST_TIME_MS = 10**12
TIMES = ("active_ms", "idle_ms", "hidden_ms")
SHARED_KEYS = ("grade_id", "item_id", "mode", "supersedes", "session", *TIMES)
GRADE_KEYS = (*SHARED_KEYS, "verdict", "failed_criteria", "subtype", "confidence", "comment")
CHOICE_KEYS = (*SHARED_KEYS, "choice")
LONGEST_ECHO = 80  # characters of an input in a message
_ECHO = reprlib.Repr()  # looks at no more than it shows
_ECHO.maxstring = _ECHO.maxlong = _ECHO.maxother = LONGEST_ECHO


class RowError(ValueError):
    """A row that is not kept; the message is for the grader."""


def check_row(row: Any, modes: Sequence[str], criteria: Sequence[str], reason_for: Sequence[str]) -> dict[str, Any]:
    """A row with everything in it of the right kind and size, and nothing else.

    Args:
        row: As it came.
        modes: Those of the study.
        criteria: Names in the checklist.
        reason_for: Verdicts that need a failed criterion or a comment.

    Returns:
        All keys of `GRADE_KEYS`, or of `CHOICE_KEYS` for a pair; what was left out is None, or empty.

    Raises:
        RowError: If anything in it cannot be used.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"A grade must be an object with named values, not {as_sent(row)}.")
    for key in ("grade_id", "item_id"):
        if not is_identifier(row.get(key)):
            raise RowError(f"`{key}` is {as_sent(row.get(key))}; it must be 1 to 64 letters, digits or any of . : _ -")
    if row.get("mode") not in modes:
        raise RowError(f"`mode` is {as_sent(row.get('mode'))}; it must be one of {', '.join(modes)}.")
    keys = CHOICE_KEYS if row["mode"] == PAIRWISE else GRADE_KEYS
    if unknown := sorted(str(key) for key in set(row) - set(keys) if row[key] not in (None, "", [])):
        raise RowError(f"There is no place for {as_sent(unknown)} in mode {row['mode']}, only for {', '.join(keys)}.")
    for key in ("supersedes", "session"):
        if row.get(key) is not None and not is_identifier(row[key]):
            what = "an earlier grade" if key == "supersedes" else "the session"
            raise RowError(f"`{key}` is {as_sent(row[key])}; it must be the id of {what}, or left out.")
    for key in TIMES:
        if row.get(key) is not None and not _is_whole(row[key]):
            wanted = f"a whole number of milliseconds from 0 to {LONGEST_TIME_MS}"
            raise RowError(f"`{key}` is {as_sent(row[key])}; it must be {wanted}.")
    checked = {key: row.get(key) for key in keys}
    if row["mode"] == PAIRWISE:
        if row.get("choice") not in CHOICES:
            raise RowError(f"The choice is {as_sent(row.get('choice'))}; it must be one of {', '.join(CHOICES)}.")
        return checked
    reasons = () if row["mode"] == "grid" else reason_for  # a grid of images has no room for them
    return {**checked, **_judgement(row, criteria, reasons)}


def _judgement(row: Mapping[str, Any], criteria: Sequence[str], reason_for: Sequence[str]) -> dict[str, Any]:
    """Verdict and reasons."""
    verdict, failed, confidence = row.get("verdict"), row.get("failed_criteria") or [], row.get("confidence")
    if verdict not in VERDICTS:
        raise RowError(f"The verdict is {as_sent(verdict)}; it must be one of {', '.join(VERDICTS)}.")
    wrong = [name for name in failed if name not in criteria] if isinstance(failed, list) else failed
    if wrong:
        wanted = f"a list of names of this checklist: {', '.join(criteria)}"
        raise RowError(f"`failed_criteria` has {as_sent(wrong)}; it must be {wanted}.")
    is_number = isinstance(confidence, int | float) and not isinstance(confidence, bool)
    if confidence is not None and not (is_number and 0 <= confidence <= 1):
        raise RowError(f"The confidence is {as_sent(confidence)}; it must be a number from 0 to 1.")
    comment = _text(row.get("comment"), "comment", LONGEST_COMMENT)
    if verdict in reason_for and not failed and comment is None:
        raise RowError(f"The verdict {verdict} needs a reason: mark a criterion that fails, or write a comment.")
    return {
        "verdict": verdict,
        "failed_criteria": [name for name in criteria if name in failed],
        "confidence": confidence,
        "comment": comment,
        "subtype": _text(row.get("subtype"), "subtype", LONGEST_SUBTYPE),
    }


def kept_row(row: Mapping[str, Any], about: Mapping[str, Any]) -> Grade | Preference:
    """The row that is kept: what the grader said, and what the server knows about it.

    Args:
        row: From `check_row`.
        about: The remaining fields of a `Preference` for a pair, else of a `Grade`.
    """
    said = {key: row[key] for key in row if key not in ("grade_id", "item_id", "supersedes", "mode")}
    if row["mode"] == PAIRWISE:
        return Preference(preference_id=row["grade_id"], **said, **about)
    failed = tuple(said.pop("failed_criteria"))
    return Grade(grade_id=row["grade_id"], mode=row["mode"], failed_criteria=failed, **said, **about)


def session_row(session: Any) -> dict[str, Any]:
    """What is kept of a browser's account of itself: bounded, and without what cannot be used."""
    given = session if isinstance(session, Mapping) else {}
    ratio: Any = given.get("device_pixel_ratio")
    usable = isinstance(ratio, int | float) and not isinstance(ratio, bool) and 0 < ratio <= 100
    return {
        "session_id": given["session_id"] if is_identifier(given.get("session_id")) else None,
        "user_agent": _shortened(given.get("user_agent"), 200),
        "viewport": _shortened(given.get("viewport"), 40),
        "device_pixel_ratio": float(ratio) if usable else None,
        "colour_note": _shortened(given.get("colour_note"), LONGEST_NOTE),
    }


def _text(value: Any, what: str, longest: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise RowError(f"The {what} is {as_sent(value)}; it must be text.")
    if len(value) > longest:
        raise RowError(f"The {what} has {len(value)} characters; it may have {longest}.")
    return _clean(value)


def _shortened(value: Any, longest: int) -> str | None:
    return _clean(value[:longest]) if isinstance(value, str) else None


def _clean(value: str) -> str | None:
    """Text that any encoding can write; what is empty or blank is nothing."""
    return value.encode("utf-8", "replace").decode().replace("\0", "").strip() or None


def as_sent(value: Any) -> str:
    """What a browser sent, as a message names it: at most `LONGEST_ECHO` characters, in any encoding."""
    try:
        text = _ECHO.repr(value)
    except ValueError:
        text = "a number of thousands of digits"  # Python does not spell it out
    return text if len(text) <= LONGEST_ECHO else f"{text[: LONGEST_ECHO - 3]}..."


def is_identifier(value: Any) -> bool:
    """Whether this can be the id of a row, an item or a session."""
    return isinstance(value, str) and IDENTIFIER.fullmatch(value) is not None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LONGEST_TIME_MS
