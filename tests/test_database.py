"""The state folder's database: durable transactions, a connection for each thread, plain words when it cannot write."""

from __future__ import annotations

import os
import resource
import sqlite3
import threading
from pathlib import Path

import pytest

from pathalign.grading.database import Database, StorageError


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path / "state" / "some.sqlite")
    with made.transaction() as connection:
        connection.execute("CREATE TABLE words (word TEXT PRIMARY KEY)")
    return made


def words(database: Database) -> list[str]:
    return [row["word"] for row in database.connection.execute("SELECT word FROM words ORDER BY word")]


def test_every_connection_syncs_its_log_at_each_commit(database: Database):
    seen = []

    def look() -> None:
        connection = database.connection
        seen.append([connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")])

    threads = [threading.Thread(target=look) for _ in range(3)]
    look()
    for thread in threads:
        thread.start()
        thread.join()
    assert seen == [["wal", 2]] * 4  # 2 is FULL


def test_each_thread_has_a_connection_of_its_own_and_sees_what_others_committed(database: Database):
    mine, others = database.connection, []
    with database.transaction() as connection:
        connection.execute("INSERT INTO words VALUES ('here')")
    thread = threading.Thread(target=lambda: others.append((database.connection is mine, words(database))))
    thread.start()
    thread.join()
    assert others == [(False, ["here"])]
    assert database.connection is mine


def test_connections_of_threads_that_are_gone_are_closed(database: Database):
    for _ in range(30):
        thread = threading.Thread(target=lambda: words(database))
        thread.start()
        thread.join()
    assert len(database._opened) <= 2


def test_a_transaction_that_fails_leaves_nothing(database: Database):
    with pytest.raises(ZeroDivisionError), database.transaction() as connection:
        connection.execute("INSERT INTO words VALUES ('half')")
        raise ZeroDivisionError
    assert words(database) == []
    with database.transaction() as connection:
        connection.execute("INSERT INTO words VALUES ('whole')")
    assert words(database) == ["whole"]


def test_a_transaction_inside_another_is_refused_since_it_could_not_be_durable(database: Database):
    with database.transaction(), pytest.raises(RuntimeError, match="A transaction is open"), database.transaction():
        pass


def test_writers_in_many_threads_wait_for_each_other(database: Database):
    def write(start: int) -> None:
        for number in range(start, start + 20):
            with database.transaction() as connection:
                connection.execute("INSERT INTO words VALUES (?)", (f"{number:03d}",))

    threads = [threading.Thread(target=write, args=(20 * index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert words(database) == [f"{number:03d}" for number in range(120)]


def test_a_full_database_says_so_and_keeps_nothing_of_the_transaction(database: Database):
    database.connection.execute("PRAGMA max_page_count = 4")
    with (
        pytest.raises(StorageError, match=r"is full.*Nothing was recorded\. Free some space there"),
        database.transaction() as connection,
    ):
        connection.execute("INSERT INTO words VALUES ('small')")
        connection.execute("INSERT INTO words VALUES (?)", ("x" * 50_000,))
    assert words(database) == []
    database.connection.execute("PRAGMA max_page_count = 1000000")
    with database.transaction() as connection:
        connection.execute("INSERT INTO words VALUES ('again')")
    assert words(database) == ["again"]


def test_a_disk_that_takes_no_more_bytes_says_so_and_keeps_nothing(database: Database):
    """The limit on file sizes is the process's own, so a child does it; it tells by its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
            with database.transaction() as connection:
                connection.execute("INSERT INTO words VALUES (?)", ("x" * 200_000,))
        except StorageError as error:
            code = 0 if "disk is full" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert words(Database(database.path)) == []


def test_a_state_folder_that_cannot_be_made_is_said_with_what_to_do(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot be opened.*choose another state folder"):
        Database(tmp_path / "file" / "some.sqlite")


def test_a_file_that_is_no_database_is_named_and_left_alone(tmp_path: Path):
    (tmp_path / "some.sqlite").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StorageError, match=r"is no database.*Move it away"):
        Database(tmp_path / "some.sqlite")
    assert (tmp_path / "some.sqlite").read_bytes().startswith(b"not a database")


def test_a_mistake_in_sql_stays_what_it_is(database: Database):
    with pytest.raises(sqlite3.OperationalError, match="no such table"), database.transaction() as connection:
        connection.execute("INSERT INTO absent VALUES (1)")
