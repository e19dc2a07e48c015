"""One SQLite file in the state folder: what is committed here has reached the disk before anybody is told so.

Write-ahead log with `synchronous=FULL`: a commit returns after the log is fsync'd, readers never wait for the writer,
and a process that is killed at any moment leaves whole transactions behind, never a part of one.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pathalign.schema import InputError

BUSY_TIMEOUT_S = 30.0
FREE_SPACE = "Free some space there."
TROUBLE = {  # SQLite's primary result code -> what it means for the file, and what to do
    sqlite3.SQLITE_FULL: ("cannot grow: the disk is full", FREE_SPACE),
    sqlite3.SQLITE_IOERR: ("cannot be written to: the disk is full or fails", FREE_SPACE),
    sqlite3.SQLITE_BUSY: ("is locked by another program", "End that program."),
    sqlite3.SQLITE_READONLY: ("cannot be written to", "Mend its rights, or choose another state folder."),
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", "Mend the folder's rights, or choose another state folder."),
    sqlite3.SQLITE_CORRUPT: ("is damaged", "Move it away: saved grades are read back from the sink."),
    sqlite3.SQLITE_NOTADB: ("is no database", "Move it away, or choose another state folder."),
}


class StorageError(InputError):
    """The state folder cannot be written to. Nothing of the transaction was kept, and nothing was acknowledged."""


class Database:
    """A SQLite file that threads, and processes, share: each thread has a connection of its own.

    Attributes:
        path: The file; `-wal` and `-shm` stand beside it.

    Raises:
        StorageError: If the file cannot be made or opened.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._local = threading.local()
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # SQLite's own waiting is a poll that grows to 100 ms; threads can do better
        self._opened: list[tuple[threading.Thread, sqlite3.Connection]] = []
        with _explained(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            _sync_folder(self.path.parent)

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection, in autocommit mode: write inside `transaction()`. Rows are `sqlite3.Row`."""
        found: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = self._open()
        return found

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and on the disk when the block has ended.

        Raises:
            StorageError: If the disk is full or the file cannot be written to; nothing was kept.
            RuntimeError: If this thread is inside a transaction already: what it does could not be called durable.
        """
        connection = self.connection
        if connection.in_transaction:
            raise RuntimeError("A transaction is open in this thread; end it before the next one begins.")
        with self._turn, _explained(self.path):
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                _roll_back(connection)
                raise

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for _, connection in self._opened:
                connection.close()
            self._opened.clear()
        self._local = threading.local()

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL").fetchone()
        connection.execute("PRAGMA synchronous=FULL")
        with self._lock:  # a server's threads come and go: close what the gone ones had open
            for thread, other in self._opened:
                if not thread.is_alive():
                    other.close()
            self._opened = [entry for entry in self._opened if entry[0].is_alive()]
            self._opened.append((threading.current_thread(), connection))
        return connection


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:  # a full disk ends it by itself
        connection.execute("ROLLBACK")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say in plain words what SQLite and the system mean; a mistake in SQL stays what it is."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        code = getattr(error, "sqlite_errorcode", None)
        trouble = TROUBLE.get(code & 0xFF) if code is not None else TROUBLE[sqlite3.SQLITE_CANTOPEN]
        if trouble is None:
            raise
        cause, advice = trouble
        raise StorageError(
            f"{path} {cause} ({error}). Nothing was recorded. {advice} What was not acknowledged is sent again."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the names of new files in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
