"""Killed at any line: what was acknowledged is there, what was sent is sent again byte for byte, nothing is doubled."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hub import HubServer, serve
from test_outbox import AT_ONCE, NOON, grade, kept, session

from pathalign.grading import batches, database, hub_sink, ledger, outbox, sinks
from pathalign.grading.hub_sink import HubSink
from pathalign.grading.outbox import Outbox
from pathalign.grading.sinks import FolderSink, Sink

WATCHED = {module.__file__ for module in (batches, database, hub_sink, ledger, outbox, sinks)}
KILLED, FINISHED = 99, 0


def kill_at_line(number: int) -> None:
    """End this process, as SIGKILL would, at the n-th line of the watched modules that it comes to from now on."""
    left = number

    def trace(frame: FrameType, event: str, _: Any) -> Callable | None:
        nonlocal left
        if frame.f_code.co_filename not in WATCHED:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os._exit(KILLED)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)


def visit(state: Path, sink: Sink, start: int, acknowledged: int) -> None:
    """What a server does: start, record, send, record more, send; ids are written to a pipe once acknowledged."""
    kept_here = Outbox(state, sink, start=False, retry=AT_ONCE, clock=lambda: NOON)
    for rows in ([grade(start), grade(start + 1), session(f"s{start}")], [grade(start + 2)]):
        ids = kept_here.record(rows)
        os.write(acknowledged, "".join(f"{row_id}\n" for row_id in ids).encode())
        kept_here.flush()


def killed_visit(state: Path, sink: Sink, start: int, line: int) -> tuple[bool, list[str]]:
    """Run `visit` in a child that is killed at a line. Returns whether it came to its end, and what it acknowledged."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            kill_at_line(line)
            visit(state, sink, start, writer)
            code = FINISHED
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        acknowledged = pipe.read().split()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (KILLED, FINISHED)
    return code == FINISHED, acknowledged


def files(sink: Sink) -> dict[str, bytes | None]:
    return {path: sink.read(path) for path in [*sink.list("grades/"), *sink.list("sessions/")]}


def check(sink: Sink, state: Path, before: dict[str, bytes | None], acknowledged: list[str]) -> dict[str, bytes | None]:
    """Let a new process finish, then look: nothing changed that was there, all acknowledged rows once."""
    restarted = Outbox(state, sink, start=False, retry=AT_ONCE, clock=lambda: NOON + 86_400)
    frozen = {batch.path: batch.content for batch in iter_unsaved(restarted)}
    assert restarted.flush()
    after = files(sink)
    assert before.items() <= after.items(), "a file was replaced"
    assert frozen.items() <= after.items(), "a frozen batch went out with other bytes"
    rows = [*kept(sink), *kept(sink, "sessions/")]
    ids = Counter(row.get("grade_id") or row["session_id"] for row in rows)
    assert [row_id for row_id in acknowledged if ids[row_id] != 1] == []
    assert max(ids.values(), default=1) == 1
    restarted.database.close()
    return after


def iter_unsaved(restarted: Outbox) -> list[ledger.Batch]:
    found, number = [], 0
    while batch := restarted._ledger.next_batch(number):
        found.append(batch)
        number = batch.number
    return found


def kill_at_every(stride: int, folder: Path, sink: Callable[[str], Sink]) -> int:
    """Kill visits at one line after the other; 20 in a row share a disk and a sink. Returns the number of kills."""
    kills, line = 0, 1
    while True:
        name = f"{kills // 20:03d}"
        if kills % 20 == 0:
            before: dict[str, bytes | None] = {}
            acknowledged: list[str] = []
        finished, ids = killed_visit(folder / f"state{name}", sink(name), 10 * line, line)
        acknowledged += ids
        before = check(sink(name), folder / f"state{name}", before, acknowledged)
        if finished:
            return kills
        kills, line = kills + 1, line + stride


def test_a_kill_at_any_line_loses_and_doubles_nothing_in_a_folder(tmp_path: Path):
    assert kill_at_every(11, tmp_path, lambda name: FolderSink(tmp_path / name)) > 20


@pytest.mark.slow
def test_a_kill_at_one_line_in_six_loses_and_doubles_nothing_in_a_folder(tmp_path: Path):
    assert kill_at_every(6, tmp_path, lambda name: FolderSink(tmp_path / name)) > 40


@pytest.fixture
def hub(tmp_path: Path):
    with serve(tmp_path / "hub") as server:
        yield server


@pytest.mark.hub
@pytest.mark.slow
def test_a_kill_at_any_line_loses_and_doubles_nothing_on_the_hub(hub: HubServer, tmp_path: Path):
    def sink(name: str) -> HubSink:
        if name not in names:
            hub.store.create("datasets", f"lab/{name}", private=True)
            names.add(name)
        return HubSink(f"lab/{name}", hub.token, endpoint=hub.endpoint)

    names: set[str] = set()
    assert kill_at_every(29, tmp_path, sink) > 8


def test_what_a_killed_server_had_acknowledged_is_what_a_restarted_one_knows(tmp_path: Path):
    sink = FolderSink(tmp_path / "sink")
    for line in range(40, 400, 24):
        _, acknowledged = killed_visit(tmp_path / f"state{line}", sink, 10 * line, line)
        restarted = Outbox(tmp_path / f"state{line}", sink, start=False)
        known = [json.dumps(row, sort_keys=True) for kind in ("grade", "session") for row in restarted.rows(kind)]
        assert all(any(f'"{row_id}"' in row for row in known) for row_id in acknowledged)
