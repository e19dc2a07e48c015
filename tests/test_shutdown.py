"""SIGTERM under a running uvicorn, as a Space's container gets it: rows are sent, then the server ends as it would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from hub import serve
from test_outbox import grade, kept

from pathalign.grading.hub_sink import HubSink
from pathalign.grading.outbox import Outbox
from pathalign.grading.sinks import FolderSink

PROJECT = Path(__file__).resolve().parents[1]
SERVER = """
import asyncio, contextlib, os, socket, sys, threading, time
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from pathalign.grading.outbox import Outbox, install_sigterm
from pathalign.grading.sinks import open_sink

state, sink, when = sys.argv[1:]
outbox = Outbox(state, open_sink(sink), flush_every_s=3600)

@contextlib.asynccontextmanager
async def lifespan(app):
    if when in ("after", "both"):
        install_sigterm(outbox, timeout_s=3)
    yield

async def record(request):
    row = await request.json()
    await asyncio.sleep(float(request.query_params.get("work_s", 0)))
    kept = await asyncio.to_thread(outbox.record, [("grade", row["grade_id"], row)])
    return JSONResponse(kept)

app = Starlette(routes=[Route("/", record, methods=["POST"])], lifespan=lifespan)
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
if when in ("before", "both", "thread"):
    install_sigterm(outbox, timeout_s=3)
if when == "thread":  # as gradio does: uvicorn in a thread, the main thread waits
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while True:
        time.sleep(0.1)
server.run(sockets=[listener])
"""


@contextmanager
def server(folder: Path, sink: str, when: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    command = [sys.executable, "-c", SERVER, str(folder / "state"), sink, when]
    variables = {**os.environ, "PYTHONPATH": str(PROJECT), **environment}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        address = f"http://127.0.0.1:{(process.stdout.readline() if process.stdout else '').strip()}/"
        for _ in range(200):
            try:
                assert post(address, 0) == ["g0"]
                break
            except OSError:
                time.sleep(0.05)
        yield process, address
    finally:
        process.kill()
        process.wait()


def post(address: str, number: int, work_s: float = 0) -> list[str]:
    body = json.dumps(grade(number)[2]).encode()
    with urlopen(Request(f"{address}?work_s={work_s}", data=body, method="POST"), timeout=20) as answer:
        return json.load(answer)


@pytest.mark.parametrize("when", ["before", "after", "both", "thread"])
def test_rows_are_sent_before_the_server_ends(tmp_path: Path, when: str):
    with server(tmp_path, str(tmp_path / "sink"), when) as (process, address):
        for number in range(1, 6):
            assert post(address, number) == [f"g{number}"]
        assert FolderSink(tmp_path / "sink").list("") == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == -signal.SIGTERM
    assert sorted(row["grade_id"] for row in kept(FolderSink(tmp_path / "sink"))) == [f"g{n}" for n in range(6)]


@pytest.mark.parametrize("when", ["before", "both"])
def test_a_request_that_is_answered_while_the_server_ends_is_sent_too(tmp_path: Path, when: str):
    with server(tmp_path, str(tmp_path / "sink"), when) as (process, address):
        answers: list[list[str]] = []
        slow = threading.Thread(target=lambda: answers.append(post(address, 1, work_s=1.5)))
        slow.start()
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        slow.join()
        assert process.wait(15) == -signal.SIGTERM
    assert answers == [["g1"]]
    assert sorted(row["grade_id"] for row in kept(FolderSink(tmp_path / "sink"))) == ["g0", "g1"]


@pytest.mark.hub
def test_rows_reach_the_hub_before_the_server_ends(tmp_path: Path):
    with serve(tmp_path / "hub", "lab/grades") as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
        with server(tmp_path, "hf://datasets/lab/grades", "before", **variables) as (process, address):
            post(address, 1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == -signal.SIGTERM
        rows = kept(HubSink("lab/grades", hub.token, endpoint=hub.endpoint))
    assert sorted(row["grade_id"] for row in rows) == ["g0", "g1"]


def test_a_sink_that_cannot_be_reached_holds_the_end_up_for_the_time_limit_only(tmp_path: Path):
    (tmp_path / "sink").write_text("in the way")
    with server(tmp_path, str(tmp_path / "sink"), "before") as (process, address):
        post(address, 1)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == -signal.SIGTERM
        assert time.monotonic() - began < 7
    again = Outbox(tmp_path / "state", FolderSink(tmp_path / "other"), start=False)
    assert [row["grade_id"] for row in again.rows("grade")] == ["g0", "g1"]
    assert again.flush()


def test_a_second_sigterm_does_not_wait(tmp_path: Path):
    (tmp_path / "sink").write_text("in the way")
    with server(tmp_path, str(tmp_path / "sink"), "thread") as (process, _):
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == -signal.SIGTERM
        assert time.monotonic() - began < 4


@pytest.mark.parametrize("previous", ["lambda *_: print('previous', flush=True)", "signal.SIG_IGN"])
def test_what_sigterm_did_before_is_done_after(tmp_path: Path, previous: str):
    code = f"""
import signal, time
signal.signal(signal.SIGTERM, {previous})
from pathalign.grading.outbox import Outbox, install_sigterm
from pathalign.grading.sinks import FolderSink
outbox = Outbox({str(tmp_path / "state")!r}, FolderSink({str(tmp_path / "sink")!r}), flush_every_s=3600)
outbox.record([{grade(1)!r}])
install_sigterm(outbox)
signal.raise_signal(signal.SIGTERM)
for _ in range(100):
    time.sleep(0.05)
    if not outbox.pending():
        break
time.sleep(0.3)
print("alive", outbox.saved(["g1"]))
"""
    variables = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    expected = ["alive {'g1'}"] if previous == "signal.SIG_IGN" else ["previous", "alive {'g1'}"]
    assert done.stdout.splitlines() == expected
