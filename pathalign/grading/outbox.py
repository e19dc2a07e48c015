"""A grade is on this disk before it is acknowledged, and read back from the sink before it is called saved.

    record -> rows (fsync'd) -> freeze -> batch (path and bytes fixed) -> sink.put -> sink.read equals -> saved

A process may be killed between any two of these: what was recorded is there, what was frozen is sent again with the
same bytes to the same path, and what the sink had already is not written twice.
"""

from __future__ import annotations

import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from pathalign.grading.batches import FOLDERS, Row, kind_of, read_batch
from pathalign.grading.database import Database, StorageError
from pathalign.grading.ledger import Ledger
from pathalign.grading.sinks import Sink, SinkBusy, SinkConflict, SinkError, SinkRefused
from pathalign.progress import say
from pathalign.schema import InputError

FILE_NAME = "outbox.sqlite"
CLOSE_TIMEOUT_S = 10.0
SIGTERM_TIMEOUT_S = 20.0  # containers are killed 30 s after SIGTERM
READERS = 8
LONGEST_WAIT_IN_FLUSH_S = 2.0  # somebody waits for it
FAILURES_SHOWN = 3  # of a busy sink in a row, before the owner hears of it


@dataclass(frozen=True)
class Retry:
    """How long to wait after a failure: doubled each time, with jitter, up to a limit.

    Attributes:
        first_s: After the first failure.
        longest_s: At most, unless the sink asks for more.
        refused_s: After a refusal, which somebody must mend.
    """

    first_s: float = 1.0
    longest_s: float = 60.0
    refused_s: float = 300.0

    def wait_s(self, failures: int, error: Exception) -> float:
        """Seconds until the next try."""
        if isinstance(error, SinkRefused):
            return self.refused_s * random.uniform(0.8, 1.2)
        backed_off = min(self.longest_s, self.first_s * 2 ** min(failures - 1, 30)) * random.uniform(0.5, 1.0)
        return max(backed_off, getattr(error, "retry_after_s", None) or 0.0)


class Outbox:
    """Keeps rows and brings them to a sink, in a thread of its own. All methods may be called from any thread.

    Args:
        state_dir: Folder of the database, made if need be. Processes on one machine may share it; servers with disks of
            their own may share a sink, each file in it being written by one of them only.
        sink: Where batches go.
        flush_every_s: A row waits so long at most before it is sent, while the sink answers.
        flush_rows: So many waiting rows are sent at once.
        clock: Seconds since 1970, for the date in file names.
        start: Whether to start the thread; without it only `flush` sends.
        retry: Waiting times after failures.

    Raises:
        StorageError: If the state folder cannot be written to.
    """

    def __init__(
        self,
        state_dir: str | Path,
        sink: Sink,
        *,
        flush_every_s: float = 20,
        flush_rows: int = 200,
        clock: Callable[[], float] = time.time,
        start: bool = True,
        retry: Retry | None = None,
    ) -> None:
        self.database = Database(Path(state_dir) / FILE_NAME)
        self._ledger = Ledger(self.database)
        self.sink, self.clock, self.retry = sink, clock, retry or Retry()
        self.flush_every_s, self.flush_rows = flush_every_s, flush_rows
        self._wake = threading.Condition()
        self._sending = threading.Lock()
        self._urgent = self._stopped = False
        self._problem: str | None = None
        self._failures = 0
        self._thread = threading.Thread(target=self._run, daemon=True, name="pathalign-outbox")
        if start:
            self._thread.start()

    @property
    def connection(self) -> sqlite3.Connection:
        """This thread's connection to the database, in autocommit mode, for the caller's own tables."""
        return self.database.connection

    def transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """A transaction for the caller's own tables, on the disk when it ends; not around `record`."""
        return self.database.transaction()

    def record(self, rows: Sequence[tuple[str, str, Mapping[str, Any]]]) -> list[str]:
        """Keep rows; when this returns they survive a power cut.

        Args:
            rows: `(kind, row_id, row)`; kinds are those of `batches.KINDS`, and the id is in the row too.

        Returns:
            Ids of the given rows that are on the disk. A row that was sent before is there already. An id is missing
            only if it belongs to a row that says something else: tell the sender to choose another.

        Raises:
            InputError: If a row is malformed; none of them was kept.
            StorageError: If the disk is full or cannot be written to; none of them was kept.
        """
        kept = self._ledger.add([Row.make(*row) for row in rows])
        if self._ledger.unfrozen() >= self.flush_rows:
            self._notify()
        return kept

    def saved(self, row_ids: Sequence[str]) -> set[str]:
        """Which of these rows are in the sink, read back from there."""
        return self._ledger.saved(row_ids)

    def rows(self, kind: str, grader: str | None = None) -> list[dict[str, Any]]:
        """All rows known, recorded here or restored, in the order in which they came; of one grader or of all."""
        return self._ledger.rows(kind, grader)

    def pending(self, grader: str | None = None) -> int:
        """How many rows are recorded and not yet saved; of one grader or of all."""
        return self._ledger.unsaved(grader)

    def problem(self) -> str | None:
        """Why rows are not being saved, for the study's owner; None while all goes well."""
        return self._problem

    def flush(self, timeout_s: float | None = None) -> bool:
        """Freeze what waits and send it now.

        Args:
            timeout_s: Go on trying for so long; None to try once.

        Returns:
            Whether all rows are saved.
        """
        if timeout_s is None:
            return self._send_all() is None and self.pending() == 0
        deadline = time.monotonic() + timeout_s
        failures = 0
        while (error := self._send_all_until(deadline)) is not None:
            failures += 1
            wait_s = min(self.retry.wait_s(failures, error), LONGEST_WAIT_IN_FLUSH_S)
            if time.monotonic() + wait_s >= deadline:
                return False
            time.sleep(wait_s)
        return self.pending() == 0

    def restore(self) -> int:
        """Read rows from the sink that are not here: all of them on a fresh disk, other servers' new ones later.

        A file that cannot be read is reported on stderr and left out; files are read once.

        Returns:
            How many rows were new.

        Raises:
            SinkError: If the sink cannot be read; what was read until then is kept, and a later call goes on.
        """
        known = self._ledger.paths()
        paths = [path for folder in FOLDERS.values() for path in self.sink.list(f"{folder}/")]
        missing = [path for path in paths if path not in known and kind_of(path)]
        count = 0
        with ThreadPoolExecutor(READERS) as pool:
            for path, content in zip(missing, pool.map(self.sink.read, missing), strict=True):
                if content is not None:
                    count += self._take_in(path, content)
        return count

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Send what waits, for so long at most, and stop. Rows that could not be sent stay in the state folder."""
        if self._stopped:
            return
        self.flush(timeout_s)
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self.database.close()

    def hasten(self) -> None:
        """Send every row at once from now on: the server is being shut down."""
        self.flush_every_s, self.flush_rows = min(self.flush_every_s, 0.2), 1
        self._notify()

    def _notify(self) -> None:
        with self._wake:
            self._urgent = True
            self._wake.notify_all()

    def _run(self) -> None:
        """The thread: wait, send, and after a failure wait longer."""
        wait_s = self.flush_every_s
        while not self._rest(wait_s):
            error = self._send_all()
            wait_s = self.retry.wait_s(self._failures, error) if error else self.flush_every_s

    def _rest(self, wait_s: float) -> bool:
        """Wait; many new rows end it, unless the sink has just failed. Returns whether to stop."""
        with self._wake:
            self._wake.wait_for(lambda: self._stopped or (self._urgent and not self._failures), wait_s)
            self._urgent = False
            return self._stopped

    def _send_all_until(self, deadline: float) -> Exception | None:
        """One pass, waited for until the deadline; a sink that hangs longer is left to itself."""
        outcome: list[Exception | None] = []
        thread = threading.Thread(target=lambda: outcome.append(self._send_all()), daemon=True)
        thread.start()
        thread.join(max(0.0, deadline - time.monotonic()))
        return outcome[0] if outcome else SinkBusy("The sink has not answered yet.")

    def _send_all(self) -> Exception | None:
        """One pass over all that waits; returns what ended it early, or was refused."""
        with self._sending:
            error: Exception | None
            try:
                error = self._send_batches()
                count = self.pending()
            except Exception as unexpected:  # the thread must outlive whatever a sink or a disk does
                error, count = unexpected, None
            self._failures = self._failures + 1 if error else 0
            grave = error is not None and (not isinstance(error, SinkBusy) or self._failures >= FAILURES_SHOWN)
            shown = "Rows wait" if count is None else f"{count} {'row waits' if count == 1 else 'rows wait'}"
            self._problem = f"{shown} in {self.database.path.parent}: {error}" if grave else None
            return error

    def _send_batches(self) -> SinkError | None:
        """Send frozen batches, oldest first, then freeze what waits and send that.

        While the sink is down nothing new is frozen: what is recorded until it is back goes in few large files.
        """
        conflict: SinkError | None = None
        after = 0
        while True:
            batch = self._ledger.next_batch(after)
            if batch is None:
                date = datetime.fromtimestamp(self.clock(), UTC).date().isoformat()
                if not self._ledger.freeze(date):
                    return conflict
                continue
            after = batch.number
            try:
                self._send(batch.path, batch.content)
            except SinkConflict as error:  # concerns this file only
                conflict = error
            except SinkError as error:
                return error
            else:
                self._ledger.mark_saved(batch)

    def _send(self, path: str, content: bytes) -> None:
        self.sink.put(path, content)
        there = self.sink.read(path)
        if there is None:
            raise SinkBusy(f"{path} was sent and cannot be read back yet.")
        if there != content:
            raise SinkConflict(f"{path} reads back with other bytes than were sent; look at that file.")

    def _take_in(self, path: str, content: bytes) -> int:
        try:
            return self._ledger.take_in(path, read_batch(path, content, kind_of(path) or ""))
        except StorageError:
            raise
        except InputError as error:
            say(f"{self.sink!r}: {error}")
            return 0


def install_sigterm(outbox: Outbox, timeout_s: float = SIGTERM_TIMEOUT_S) -> None:
    """Send what waits when the process is told to end, then do what SIGTERM did before this was called.

    The server goes on answering meanwhile, and rows that it records in its last seconds are sent at once. Before a
    server (uvicorn) starts or after it has set its own handlers: both work, and calling it at both times covers the
    rows of its last requests too. A second SIGTERM does not wait.

    Args:
        outbox: What to flush.
        timeout_s: How long at most; rows that cannot be sent stay in the state folder.
    """
    previous = signal.getsignal(signal.SIGTERM)
    begun = threading.Event()

    def flush_and_go_on() -> None:
        outbox.hasten()
        outbox.flush(timeout_s)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def handle(number: int, frame: FrameType | None) -> None:
        if not begun.is_set():  # not here: the code that was interrupted may hold what flushing needs
            begun.set()
            threading.Thread(target=flush_and_go_on, name="pathalign-sigterm").start()
        elif callable(previous):
            previous(number, frame)
        elif previous != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, handle)
