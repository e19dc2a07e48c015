"""The outbox's tables: rows, the frozen batches they are in, and which of these the sink has.

All that is written is written in one transaction of `Database`, so a kill leaves each row waiting, frozen or saved.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pathalign.grading.batches import KINDS, Row, batch_content, batch_path
from pathalign.grading.database import Database

LARGEST_BATCH = 5_000  # rows
ASKED_AT_ONCE = 500  # ids in one query; SQLite bounds its variables
TABLES = """
CREATE TABLE IF NOT EXISTS outbox_about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outbox_batches (
    batch INTEGER PRIMARY KEY AUTOINCREMENT, path TEXT NOT NULL UNIQUE, content BLOB, saved INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS outbox_rows (
    number INTEGER PRIMARY KEY AUTOINCREMENT, row_id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, grader TEXT,
    body TEXT NOT NULL, batch INTEGER REFERENCES outbox_batches (batch)
);
CREATE INDEX IF NOT EXISTS outbox_rows_by_grader ON outbox_rows (kind, grader);
CREATE INDEX IF NOT EXISTS outbox_rows_by_batch ON outbox_rows (batch, grader);
CREATE INDEX IF NOT EXISTS outbox_unsaved ON outbox_batches (batch) WHERE saved = 0
"""
WAITING = "(batch IS NULL OR batch IN (SELECT batch FROM outbox_batches WHERE saved = 0))"


@dataclass(frozen=True)
class Batch:
    """A frozen file: path and bytes never change again, whatever happens to the process."""

    number: int
    path: str
    content: bytes


class Ledger:
    """Rows and batches of one state folder.

    Attributes:
        replica: Random name of this state folder; it is in the path of every file that is frozen here.
    """

    def __init__(self, database: Database) -> None:
        self.database = database
        with database.transaction() as connection:
            for statement in TABLES.split(";"):
                connection.execute(statement)
            connection.execute("INSERT OR IGNORE INTO outbox_about VALUES ('replica', ?)", (secrets.token_hex(6),))
            found = connection.execute("SELECT value FROM outbox_about WHERE name = 'replica'").fetchone()
        self.replica: str = found["value"]

    def add(self, rows: Sequence[Row]) -> list[str]:
        """Keep rows; returns the ids of those that are kept now or were before, in one form or another of `SAID`.

        Raises:
            StorageError: If the disk is full or cannot be written to; none of them was kept.
        """
        with self.database.transaction() as connection:
            return [row.row_id for row in rows if _insert(connection, row, None)]

    def rows(self, kind: str, grader: str | None) -> list[dict[str, Any]]:
        """Parsed rows in the order in which they came; of one grader, or of all for None."""
        query = "SELECT kind, row_id, body FROM outbox_rows WHERE kind = ?"
        query, values = (query, [kind]) if grader is None else (f"{query} AND grader = ?", [kind, grader])
        return [Row(*row).content for row in self.database.connection.execute(f"{query} ORDER BY number", values)]

    def saved(self, row_ids: Sequence[str]) -> set[str]:
        """Which of these rows the sink has."""
        found: set[str] = set()
        for start in range(0, len(row_ids), ASKED_AT_ONCE):
            asked = list(row_ids[start : start + ASKED_AT_ONCE])
            query = "SELECT row_id FROM outbox_rows JOIN outbox_batches USING (batch) WHERE saved AND row_id IN "
            marks = f"({','.join('?' * len(asked))})"
            found.update(row["row_id"] for row in self.database.connection.execute(query + marks, asked))
        return found

    def unsaved(self, grader: str | None = None) -> int:
        """Number of rows that the sink is not known to have."""
        query = f"SELECT count(*) FROM outbox_rows WHERE {WAITING}"
        query, values = (query, []) if grader is None else (f"{query} AND grader = ?", [grader])
        count: int = self.database.connection.execute(query, values).fetchone()[0]
        return count

    def unfrozen(self) -> int:
        """Number of rows that are in no batch yet."""
        query = "SELECT count(*) FROM outbox_rows WHERE batch IS NULL"
        count: int = self.database.connection.execute(query).fetchone()[0]
        return count

    def next_batch(self, after: int) -> Batch | None:
        """The first frozen batch with a number above `after` that the sink is not known to have."""
        query = "SELECT batch, path, content FROM outbox_batches WHERE saved = 0 AND batch > ? ORDER BY batch LIMIT 1"
        found = self.database.connection.execute(query, (after,)).fetchone()
        return Batch(*found) if found else None

    def mark_saved(self, batch: Batch) -> None:
        """The sink has it, read back."""
        with self.database.transaction() as connection:
            statement = "UPDATE outbox_batches SET saved = 1, content = NULL WHERE batch = ?"
            connection.execute(statement, (batch.number,))

    def freeze(self, date: str) -> bool:
        """Fix path and bytes of the files for waiting rows, one for each kind.

        Args:
            date: UTC, `YYYY-MM-DD`, for the path.

        Returns:
            Whether there were any.
        """
        query = "SELECT kind, row_id, body FROM outbox_rows WHERE batch IS NULL AND kind = ? ORDER BY number LIMIT ?"
        frozen = False
        with self.database.transaction() as connection:
            for kind in KINDS:
                rows = [Row(*row) for row in connection.execute(query, (kind, LARGEST_BATCH))]
                if not rows:
                    continue
                last = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'outbox_batches'").fetchone()
                number = (last["seq"] if last else 0) + 1
                content = batch_content(rows)
                path = batch_path(kind, date, self.replica, number, content)
                connection.execute("INSERT INTO outbox_batches VALUES (?, ?, ?, 0)", (number, path, content))
                marks = [(number, row.row_id) for row in rows]
                connection.executemany("UPDATE outbox_rows SET batch = ? WHERE row_id = ?", marks)
                frozen = True
        return frozen

    def paths(self) -> set[str]:
        """Paths of all files that were frozen here or taken in."""
        return {row["path"] for row in self.database.connection.execute("SELECT path FROM outbox_batches")}

    def take_in(self, path: str, rows: Sequence[Row]) -> int:
        """Add a file of the sink. A row that waits here and is in it needs no sending any more.

        Returns:
            How many rows were not known.
        """
        added = 0
        with self.database.transaction() as connection:
            done = connection.execute("INSERT OR IGNORE INTO outbox_batches VALUES (NULL, ?, NULL, 1)", (path,))
            if done.rowcount == 0:
                return 0
            for row in rows:
                before = connection.total_changes
                same = _insert(connection, row, done.lastrowid)
                added += connection.total_changes - before
                if same:
                    marks = (done.lastrowid, row.row_id)
                    connection.execute("UPDATE outbox_rows SET batch = ? WHERE row_id = ? AND batch IS NULL", marks)
        return added


def _insert(connection: sqlite3.Connection, row: Row, batch: int | None) -> bool:
    """Add a row unless its id is taken. Returns whether this row is there now, or one that says the same."""
    done = connection.execute(
        "INSERT OR IGNORE INTO outbox_rows (row_id, kind, grader, body, batch) VALUES (?, ?, ?, ?, ?)",
        (row.row_id, row.kind, row.grader, row.body, batch),
    )
    if done.rowcount == 1:
        return True
    query = "SELECT kind, row_id, body FROM outbox_rows WHERE row_id = ?"
    return row.says_the_same_as(Row(*connection.execute(query, (row.row_id,)).fetchone()))
