"""The Hub as a sink, with the stock client over HTTP: faults only delay, refusals are explained, tokens stay secret."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import HubServer, serve
from hub.faults import Fault
from test_outbox import AT_ONCE, grade, kept, session, wait_until

from pathalign.grading.hub_sink import HubSink
from pathalign.grading.outbox import Outbox
from pathalign.grading.sinks import SinkBusy, SinkConflict, SinkError, SinkRefused

pytestmark = pytest.mark.hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "hub", "lab/grades") as server:
        yield server


def sink_of(hub: HubServer, token: str | None = None, name: str = "lab/grades", timeout_s: float = 60) -> HubSink:
    return HubSink(name, token or hub.token, endpoint=hub.endpoint, timeout_s=timeout_s)


def commits(hub: HubServer) -> list[str]:
    """Titles of the repo's commits, newest first, without the one that made it."""
    repo = hub.store.repo("datasets", "lab/grades", hub.token)
    return [title for _, title, _ in hub.store.history(repo, hub.store.resolve(repo, "main"))][:-1]


def test_files_are_kept_listed_and_read(hub: HubServer):
    sink = sink_of(hub)
    assert sink.list("grades/") == []
    assert sink.read("grades/a.jsonl") is None
    sink.put("grades/a.jsonl", b"one\n")
    sink.put("sessions/b.jsonl", b"one\ntwo\n")
    assert sink.read("grades/a.jsonl") == b"one\n"
    assert (sink.list("grades/"), sink.list("sessions")) == (["grades/a.jsonl"], ["sessions/b.jsonl"])
    assert commits(hub) == ["Add 2 rows of sessions", "Add 1 row of grades"]


def test_long_listings_come_in_pages(hub: HubServer):
    repo = hub.store.repo("datasets", "lab/grades", hub.token)
    value = {"content": "e30K", "encoding": "base64"}
    lines = [{"key": "file", "value": {**value, "path": f"grades/{number:05d}.jsonl"}} for number in range(2345)]
    hub.store.commit(repo, "main", [{"key": "header", "value": {"summary": "many"}}, *lines])
    assert sink_of(hub).list("grades/") == [f"grades/{number:05d}.jsonl" for number in range(2345)]


def test_the_same_bytes_again_make_no_commit_and_other_bytes_are_refused(hub: HubServer):
    sink = sink_of(hub)
    for _ in range(3):
        sink.put("grades/a.jsonl", b"one\n")
    assert len(commits(hub)) == 1
    with pytest.raises(SinkConflict, match=r"other bytes at grades/a\.jsonl"):
        sink.put("grades/a.jsonl", b"two\n")
    assert sink.read("grades/a.jsonl") == b"one\n"
    assert len(commits(hub)) == 1


@pytest.mark.parametrize("status", [408, 409, 412, 425, 429, 500, 502, 503, 504])
def test_a_commit_that_is_not_taken_is_busy_and_goes_well_the_next_time(hub: HubServer, status: int):
    sink = sink_of(hub)
    hub.faults.set(Fault("POST .*/commit/", status, times=1))
    with pytest.raises(SinkBusy, match=f"answered {status}"):
        sink.put("grades/a.jsonl", b"one\n")
    assert sink.read("grades/a.jsonl") is None
    sink.put("grades/a.jsonl", b"one\n")
    assert len(commits(hub)) == 1


@pytest.mark.parametrize("status", [0, 500, 503], ids=["connection cut", "500", "503"])
def test_a_commit_that_was_taken_without_our_hearing_of_it_is_not_made_again(hub: HubServer, status: int):
    sink = sink_of(hub)
    hub.faults.set(Fault("POST .*/commit/", status, after=True, times=1))
    with pytest.raises(SinkBusy):
        sink.put("grades/a.jsonl", b"one\n")
    sink.put("grades/a.jsonl", b"one\n")
    assert len(commits(hub)) == 1
    assert sum("/commit/" in request for request in hub.faults.requests) == 1


def test_the_time_that_the_hub_asks_for_is_heeded(hub: HubServer):
    hub.faults.set(
        Fault("/commit/", 429, times=1, headers={"Retry-After": "17"}),
        Fault("/commit/", 429, times=1, headers={"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed"'}),
        Fault("/commit/", 429, times=1, headers={"Retry-After": "soon"}),
    )
    asked = []
    for _ in range(3):
        with pytest.raises(SinkBusy) as caught:
            sink_of(hub).put("grades/a.jsonl", b"one\n")
        asked.append(caught.value.retry_after_s)
    assert asked == [17, 55, None]


def test_a_hub_that_hangs_is_left_after_the_time_limit_and_nothing_is_doubled(hub: HubServer):
    sink = sink_of(hub, timeout_s=0.5)
    hub.faults.set(Fault("/commit/", 200, delay_s=1.5, times=1))
    with pytest.raises(SinkBusy, match=r"did not answer within 0.5 s"):
        sink.put("grades/a.jsonl", b"one\n")
    wait_until(lambda: sink.read("grades/a.jsonl") == b"one\n")
    sink.put("grades/a.jsonl", b"one\n")
    assert len(commits(hub)) == 1


def test_a_hub_that_is_not_there_is_busy():
    with pytest.raises(SinkBusy, match="cannot be reached"):
        HubSink("lab/grades", "hf_x", endpoint="http://127.0.0.1:9").put("grades/a.jsonl", b"one\n")


def test_refusals_say_what_to_do(hub: HubServer):
    hub.store.add_token("hf_reader", "lab", writes="")
    hub.store.add_token("hf_other", "visitor")
    cases = [
        (sink_of(hub, "hf_wrong"), "answered 401.*set HF_TOKEN"),
        (sink_of(hub, "hf_reader"), "answered 403.*give it write access"),
        (sink_of(hub, "hf_other"), "answered 404.*may not see it"),
        (sink_of(hub, name="lab/absent"), "answered 404.*create it"),
        (sink_of(hub, name="no such name"), "cannot be used"),
    ]
    for sink, said in cases:
        with pytest.raises(SinkRefused, match=said):
            sink.put("grades/a.jsonl", b"one\n")
    for status in (402, 413):
        hub.faults.set(Fault("/commit/", status))
        with pytest.raises(SinkRefused, match=f"answered {status}"):
            sink_of(hub).put("grades/a.jsonl", b"one\n")


def test_the_token_is_the_argument_or_the_environment_never_a_saved_login(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    from huggingface_hub import constants

    saved = tmp_path / "token"
    saved.write_text(hub.token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(saved))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SinkRefused, match="401"):
        HubSink("lab/grades", endpoint=hub.endpoint).put("grades/a.jsonl", b"one\n")
    monkeypatch.setenv("HF_TOKEN", f"{hub.token}\n")
    HubSink("lab/grades", endpoint=hub.endpoint).put("grades/a.jsonl", b"one\n")


def test_the_token_is_in_no_message(hub: HubServer):
    token = "hf_verysecret"
    hub.store.add_token(token, "lab")
    said = [repr(sink_of(hub, token))]
    for fault in (Fault(".", 500), Fault(".", 403), Fault("/commit/", 0), Fault("/commit/", 400)):
        hub.faults.set(fault)
        with pytest.raises(SinkError) as caught:
            sink_of(hub, token, timeout_s=2).put("grades/a.jsonl", b"one\n")
        error: BaseException | None = caught.value
        while error is not None:
            said.append(f"{error!r} {error}")
            error = error.__cause__
    assert len(said) >= 6
    assert [text for text in said if "verysecret" in text] == []


def test_an_outbox_brings_rows_to_the_hub_through_every_fault(hub: HubServer, tmp_path: Path):
    faults = [Fault("/commit/", status, times=2) for status in (409, 412, 429, 500, 503)]
    faults += [Fault("/commit/", 500, after=True, times=2), Fault("/commit/", 0, after=True, times=1)]
    faults += [Fault("/commit/", 0, times=1), Fault("paths-info", 503, times=2), Fault("GET /datasets", 503, times=2)]
    hub.faults.set(*faults)
    outbox = Outbox(tmp_path / "state", sink_of(hub), flush_every_s=0.02, flush_rows=3, retry=AT_ONCE)
    for number in range(40):
        assert outbox.record([grade(number)]) == [f"g{number}"]
        time.sleep(0.02)
    outbox.record([session("s1")])
    wait_until(lambda: outbox.pending() == 0, 60)
    outbox.close()
    assert [rule.times for rule in faults] == [0] * len(faults)
    assert sorted(row["grade_id"] for row in kept(sink_of(hub))) == sorted(f"g{number}" for number in range(40))
    files = len(sink_of(hub).list("grades/")) + len(sink_of(hub).list("sessions/"))
    assert len(commits(hub)) == files


def test_a_fresh_disk_gets_the_rows_of_all_replicas_back_and_one_of_those_that_two_have(hub: HubServer, tmp_path: Path):
    for name, first in (("one", 0), ("two", 5)):
        outbox = Outbox(tmp_path / name, sink_of(hub), start=False)
        outbox.record([grade(number) for number in range(first, first + 10)])
        assert outbox.flush()
    assert len(kept(sink_of(hub))) == 20
    fresh = Outbox(tmp_path / "fresh", sink_of(hub), start=False)
    assert fresh.restore() == 15
    assert sorted(row["grade_id"] for row in fresh.rows("grade")) == sorted(f"g{number}" for number in range(15))


def test_restoring_from_a_hub_that_is_down_says_so_and_can_be_tried_again(hub: HubServer, tmp_path: Path):
    outbox = Outbox(tmp_path / "one", sink_of(hub), start=False)
    outbox.record([grade(1)])
    outbox.flush()
    fresh = Outbox(tmp_path / "fresh", sink_of(hub), start=False)
    hub.faults.set(Fault("GET /datasets", 503))
    with pytest.raises(SinkBusy):
        fresh.restore()
    hub.faults.set()
    assert fresh.restore() == 1


def test_the_environment_names_the_hub_and_the_token(hub: HubServer, tmp_path: Path):
    """As on a Space: nothing but variables, read when the client is imported."""
    code = f"""
from pathalign.grading.outbox import Outbox
from pathalign.grading.sinks import open_sink
outbox = Outbox({str(tmp_path / "state")!r}, open_sink("hf://datasets/lab/grades"))
outbox.record([{grade(1)!r}])
outbox.close(30)
print(outbox.saved(["g1"]))
"""
    variables = hub.variables(tmp_path / "home")
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'g1'}"
    assert json.dumps(grade(1)[2], sort_keys=True).encode() in (
        sink_of(hub).read(sink_of(hub).list("grades")[0]) or b""
    )
