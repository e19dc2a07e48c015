"""Which item each kept row is about: the index behind undo, progress and resuming, made from the rows themselves."""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pathalign.grading.assignments import Assignments, Showing
from pathalign.grading.order import PAIRWISE, pair_key
from pathalign.grading.outbox import Outbox

TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    entry INTEGER PRIMARY KEY AUTOINCREMENT, answer_id TEXT NOT NULL UNIQUE, grader TEXT NOT NULL,
    item_id TEXT NOT NULL, body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_by_item ON answers (item_id);
"""
ID_KEYS = {"grade": "grade_id", "preference": "preference_id"}
BREAK_S = 300.0  # a longer gap between two answers is a pause, not work
PACE_OVER = 30  # answers
ASKED_AT_ONCE = 500  # ids in one query; SQLite bounds its variables


@dataclass(frozen=True)
class Answer:
    """A kept row and the item that it is about."""

    answer_id: str
    grader: str
    item_id: str
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Done:
    """How far a grader is: items answered in all and since midnight (UTC), and items an hour at work, if known."""

    done: int
    today: int
    per_hour: float | None


class Answers:
    """The index of kept rows.

    Args:
        assignments: Where it is noted which items are answered.
        outbox: Where the rows are.

    Attributes:
        graders: Pseudonyms of all who answered something, as far as this process knows.
    """

    def __init__(self, assignments: Assignments, outbox: Outbox) -> None:
        self.assignments, self.outbox = assignments, outbox
        with outbox.transaction() as connection:
            for statement in TABLES.split(";"):
                connection.execute(statement)
        self.graders = {grader for (grader,) in outbox.connection.execute("SELECT DISTINCT grader FROM answers")}

    def catch_up(self) -> int:
        """Index all rows of the outbox that are not indexed yet: restored ones, and those before a crash.

        Returns:
            How many there were.
        """
        rows = [(key, row) for kind, key in ID_KEYS.items() for row in self.outbox.rows(kind)]
        known = {row["answer_id"] for row in self.outbox.connection.execute("SELECT answer_id FROM answers")}
        rows = [(key, row) for key, row in rows if row[key] not in known]
        rows.sort(key=lambda entry: recorded_at(entry[1]))
        with self.outbox.transaction() as connection:
            for key, row in rows:
                showing = self._showing_of(connection, row)
                self._add(connection, Answer(row[key], row["grader"], showing.item_id, row), showing)
        return len(rows)

    def add(self, answers: Sequence[tuple[Answer, Showing]]) -> None:
        """Index rows that the outbox has recorded."""
        with self.outbox.transaction() as connection:
            for answer, showing in answers:
                self._add(connection, answer, showing)

    def _add(self, connection: sqlite3.Connection, answer: Answer, showing: Showing) -> None:
        connection.execute(
            "INSERT OR IGNORE INTO answers (answer_id, grader, item_id, body) VALUES (?, ?, ?, ?)",
            (answer.answer_id, answer.grader, answer.item_id, json.dumps(answer.row, sort_keys=True)),
        )
        self.graders.add(answer.grader)
        self.assignments.mark_answered(connection, answer.grader, showing, recorded_at(answer.row))

    def _showing_of(self, connection: sqlite3.Connection, row: Mapping[str, Any]) -> Showing:
        """From a row alone: the item that it corrects, or the grader's next look at that image."""
        pair = "left_image_id" in row
        unit = pair_key(row["left_image_id"], row["right_image_id"]) if pair else row["image_id"]
        query = "SELECT showings.number FROM answers JOIN showings USING (item_id) WHERE answer_id = ? AND unit = ?"
        corrected = connection.execute(query, (row.get("supersedes"), unit)).fetchone()
        if corrected:
            number = corrected["number"]
        else:
            query = "SELECT COUNT(*) FROM showings WHERE grader = ? AND unit = ? AND place IS NOT NULL"
            looks = connection.execute(query, (row["grader"], unit)).fetchone()[0]
            # What it corrects may be lost with the disk: then it is about the last look that is known.
            number = max(0, looks - 1) if row.get("supersedes") else min(looks, 0 if pair else 1)
        item_id = self.assignments.item_id(row["grader"], unit, number)
        return Showing(item_id, unit, number, PAIRWISE if pair else row.get("mode", "single"))

    def find(self, answer_id: str) -> Answer | None:
        """A row by its id."""
        query = "SELECT answer_id, grader, item_id, body FROM answers WHERE answer_id = ?"
        return _answer(self.outbox.connection.execute(query, (answer_id,)).fetchone())

    def standing(self, item_id: str) -> Answer | None:
        """The last answer on an item."""
        query = "SELECT answer_id, grader, item_id, body FROM answers WHERE item_id = ? ORDER BY entry DESC LIMIT 1"
        return _answer(self.outbox.connection.execute(query, (item_id,)).fetchone())

    def latest(self, grader: str, count: int) -> list[tuple[Showing, Answer]]:
        """The grader's newest items, newest first, with their standing answers."""
        query = (
            "SELECT item_id, unit, number, mode FROM showings WHERE grader = ? AND place IS NOT NULL "
            "ORDER BY place DESC LIMIT ?"
        )
        showings = [Showing(*row) for row in self.outbox.connection.execute(query, (grader, count))]
        return [(item, answer) for item in showings if (answer := self.standing(item.item_id))]

    def done(self, grader: str, pairwise: bool, now: float) -> Done:
        """How far a grader is with images, or with pairs."""
        midnight = now - now % 86_400
        query = (
            "SELECT COUNT(*), COALESCE(SUM(answered_at >= ?), 0) FROM showings "
            "WHERE grader = ? AND place IS NOT NULL AND (mode = ?) = ?"
        )
        row = self.outbox.connection.execute(query, (midnight, grader, PAIRWISE, pairwise)).fetchone()
        query = (
            "SELECT answered_at FROM showings WHERE grader = ? AND place IS NOT NULL AND (mode = ?) = ? "
            f"ORDER BY place DESC LIMIT {PACE_OVER + 1}"
        )
        times = [at for (at,) in self.outbox.connection.execute(query, (grader, PAIRWISE, pairwise))]
        gaps = [gap for later, earlier in itertools.pairwise(times) if (gap := later - earlier) < BREAK_S]
        return Done(done=row[0], today=row[1], per_hour=round(3600 * len(gaps) / sum(gaps), 1) if sum(gaps) else None)

    def own(self, grader: str, answer_ids: Sequence[str]) -> list[str]:
        """Those of these ids that are of rows by this grader."""
        found: list[str] = []
        for start in range(0, len(answer_ids), ASKED_AT_ONCE):
            asked = answer_ids[start : start + ASKED_AT_ONCE]
            query = f"SELECT answer_id FROM answers WHERE grader = ? AND answer_id IN ({','.join('?' * len(asked))})"
            found += [answer_id for (answer_id,) in self.outbox.connection.execute(query, (grader, *asked))]
        return found

    def numbers(self) -> dict[str, int]:
        """Row id -> 0 for a first look, 1 for a hidden repeat."""
        query = "SELECT answer_id, showings.number FROM answers JOIN showings USING (item_id)"
        return dict(self.outbox.connection.execute(query))


def recorded_at(row: Mapping[str, Any]) -> float:
    """When a row was recorded, in seconds since 1970; 0 without a time. Without a zone it is UTC."""
    if not row.get("recorded_at"):
        return 0.0
    time = datetime.fromisoformat(row["recorded_at"])
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _answer(row: sqlite3.Row | None) -> Answer | None:
    return Answer(row["answer_id"], row["grader"], row["item_id"], json.loads(row["body"])) if row else None
