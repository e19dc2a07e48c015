"""The outbox: on disk before acknowledged, frozen before sent, read back before saved, and nothing ever lost."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pathalign.grading.database import StorageError
from pathalign.grading.outbox import Outbox, Retry
from pathalign.grading.sinks import FolderSink, SinkBusy, SinkRefused
from pathalign.schema import InputError

AT_ONCE = Retry(first_s=0.01, longest_s=0.05, refused_s=0.1)
NOON = 1_772_366_400.0  # 2026-03-01, 12:00 UTC


def grade(number: int, grader: str = "grader-1", **changes: object) -> tuple[str, str, dict]:
    row = {
        "grade_id": f"g{number}",
        "image_id": f"i{number}",
        "class_label": "a",
        "verdict": "plausible",
        "grader": grader,
    }
    return "grade", f"g{number}", {**row, **changes}


def session(name: str) -> tuple[str, str, dict]:
    return "session", name, {"session_id": name, "grader": "grader-1"}


class MoodySink(FolderSink):
    """A folder that goes wrong on request: `before` and `after` are called around each `put`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        self.puts: list[tuple[str, bytes]] = []

    def put(self, path: str, content: bytes) -> None:
        self.puts.append((path, content))
        self.before()
        super().put(path, content)
        self.after()


def refuse(error: Exception) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


def quiet(folder: Path, sink: FolderSink | None = None, **options: object) -> Outbox:
    """An outbox that sends only when it is told to."""
    sink = sink or FolderSink(folder / "sink")
    return Outbox(folder / "state", sink, start=False, retry=AT_ONCE, clock=lambda: NOON, **options)


def kept(sink: FolderSink, prefix: str = "grades/") -> list[dict]:
    """All rows of a sink as they lie there, copies among them."""
    lines = [line for path in sink.list(prefix) for line in (sink.read(path) or b"").splitlines()]
    return [json.loads(line) for line in lines]


def wait_until(done: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.01)


def test_a_row_is_on_the_disk_when_record_returns(tmp_path: Path):
    outbox = quiet(tmp_path)
    assert outbox.record([grade(1), grade(2), session("s1")]) == ["g1", "g2", "s1"]
    other = quiet(tmp_path)  # another process would see the same
    assert other.rows("grade") == [grade(1)[2], grade(2)[2]]
    assert other.rows("session") == [session("s1")[2]]
    assert (other.pending(), other.saved(["g1", "s1"])) == (3, set())


def test_rows_of_one_grader_or_of_all_come_in_the_order_of_recording(tmp_path: Path):
    outbox = quiet(tmp_path)
    outbox.record([grade(3, "grader-2"), grade(1), grade(2, "grader-2")])
    assert [row["grade_id"] for row in outbox.rows("grade")] == ["g3", "g1", "g2"]
    assert [row["grade_id"] for row in outbox.rows("grade", "grader-2")] == ["g3", "g2"]
    assert (outbox.pending("grader-2"), outbox.pending("grader-1"), outbox.pending("nobody")) == (2, 1, 0)


def test_a_row_sent_twice_is_recorded_once_and_acknowledged_twice(tmp_path: Path):
    outbox = quiet(tmp_path)
    assert outbox.record([grade(1, recorded_at="2026-03-01T12:00:00+00:00")]) == ["g1"]
    assert outbox.record([grade(1, recorded_at="2026-03-01T12:00:05+00:00"), grade(2)]) == ["g1", "g2"]
    assert outbox.record([grade(3), grade(3)]) == ["g3", "g3"]
    assert [row["grade_id"] for row in outbox.rows("grade")] == ["g1", "g2", "g3"]
    assert outbox.rows("grade")[0]["recorded_at"].endswith("00:00+00:00")


def test_an_id_that_belongs_to_another_row_is_not_acknowledged_and_takes_nothing_away(tmp_path: Path):
    outbox = quiet(tmp_path)
    outbox.record([grade(1)])
    assert outbox.record([grade(1, verdict="implausible"), grade(2)]) == ["g2"]
    assert outbox.record([grade(1, grader="grader-2")]) == []
    assert outbox.rows("grade") == [grade(1)[2], grade(2)[2]]


def test_one_malformed_row_keeps_all_rows_of_the_call_out(tmp_path: Path):
    outbox = quiet(tmp_path)
    with pytest.raises(InputError, match="grade_id"):
        outbox.record([grade(1), ("grade", "g2", {"grade_id": "other"})])
    assert outbox.rows("grade") == []
    assert outbox.record([]) == []


def test_rows_go_to_one_file_a_kind_and_are_saved_once_they_are_read_back(tmp_path: Path):
    outbox = quiet(tmp_path)
    outbox.record([grade(1), grade(2), session("s1")])
    assert outbox.flush()
    paths = outbox.sink.list("")
    assert [path.split("/")[0] for path in paths] == ["grades", "sessions"]
    assert all(path.split("/")[1].startswith(f"2026-03-01-{outbox._ledger.replica}-00000") for path in paths)
    assert kept(outbox.sink) == [grade(1)[2], grade(2)[2]]
    assert outbox.saved(["g1", "g2", "s1", "unknown"]) == {"g1", "g2", "s1"}
    assert (outbox.pending(), outbox.problem()) == (0, None)
    assert outbox.flush()
    assert outbox.sink.list("") == paths


def test_many_ids_can_be_asked_about_at_once(tmp_path: Path):
    outbox = quiet(tmp_path)
    outbox.record([grade(number) for number in range(1203)])
    outbox.flush()
    assert len(outbox.saved([f"g{number}" for number in range(2000)])) == 1203


def test_a_row_that_cannot_be_read_back_is_not_called_saved(tmp_path: Path):
    sink = MoodySink(tmp_path / "sink")
    outbox = quiet(tmp_path, sink)
    outbox.record([grade(1)])
    sink.read = lambda path: None
    assert not outbox.flush()
    sink.read = lambda path: b"something else"
    assert not outbox.flush()
    assert "reads back with other bytes" in (outbox.problem() or "")
    assert outbox.saved(["g1"]) == set()
    del sink.read
    assert outbox.flush()
    assert outbox.saved(["g1"]) == {"g1"}
    assert len({(path, content) for path, content in sink.puts}) == 1


def test_a_batch_is_sent_again_with_the_same_bytes_whatever_was_recorded_since(tmp_path: Path):
    sink = MoodySink(tmp_path / "sink")
    sink.after = refuse(SinkBusy("500 after it was committed"))
    outbox = quiet(tmp_path, sink)
    outbox.record([grade(1)])
    assert not outbox.flush()
    again = quiet(tmp_path, sink)  # the process was killed here, and a day went by
    again.clock = lambda: NOON + 86_400
    again.record([grade(2)])
    assert not again.flush()
    sink.after = lambda: None
    assert again.flush()
    assert sink.puts[0] == sink.puts[1] == sink.puts[2]
    assert [row["grade_id"] for row in kept(sink)] == ["g1", "g2"]
    assert len(sink.puts) == 4


def test_two_replicas_never_write_the_same_path_even_for_the_same_row(tmp_path: Path):
    sink = FolderSink(tmp_path / "sink")
    for name in ("one", "two", "three"):
        outbox = Outbox(tmp_path / name, sink, start=False, clock=lambda: NOON)
        outbox.record([grade(1)])
        assert outbox.flush()
    assert len(sink.list("grades/")) == 3


def test_a_copied_disk_writes_paths_of_its_own_for_rows_of_its_own(tmp_path: Path):
    outbox = quiet(tmp_path)
    outbox.record([grade(1)])
    outbox.flush()
    outbox.close()
    (tmp_path / "copy").mkdir()
    for file in (tmp_path / "state").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    for folder, number in (("state", 2), ("copy", 3)):
        copied = Outbox(tmp_path / folder, outbox.sink, start=False, clock=lambda: NOON)
        copied.record([grade(number)])
        assert copied.flush()
    assert sorted(row["grade_id"] for row in kept(outbox.sink)) == ["g1", "g2", "g3"]


def test_a_wiped_disk_overwrites_nothing_and_gets_its_rows_back(tmp_path: Path):
    first = quiet(tmp_path)
    first.record([grade(1), grade(2, "grader-2"), session("s1")])
    first.flush()
    before = {path: first.sink.read(path) for path in first.sink.list("")}
    wiped = Outbox(tmp_path / "fresh", first.sink, start=False, clock=lambda: NOON)
    assert wiped.restore() == 3
    assert wiped.rows("grade") == first.rows("grade")
    assert wiped.rows("grade", "grader-2") == [grade(2, "grader-2")[2]]
    assert wiped.saved(["g1", "g2", "s1"]) == {"g1", "g2", "s1"}
    assert wiped.record([grade(1)]) == ["g1"]  # the browser had not heard that it is saved
    assert wiped.pending() == 0
    wiped.record([grade(3)])
    assert wiped.flush()
    assert {path: first.sink.read(path) for path in before} == before
    assert sorted(row["grade_id"] for row in kept(first.sink)) == ["g1", "g2", "g3"]


def test_restoring_again_reads_only_what_is_new(tmp_path: Path):
    mine, other = quiet(tmp_path), Outbox(tmp_path / "other", FolderSink(tmp_path / "sink"), start=False)
    mine.record([grade(1)])
    mine.flush()
    other.record([grade(2)])
    other.flush()
    read = []
    original = mine.sink.read
    mine.sink.read = lambda path: read.append(path) or original(path)
    assert (mine.restore(), mine.restore()) == (1, 0)
    assert len(read) == 1


def test_a_waiting_row_that_the_sink_has_from_elsewhere_is_not_sent_again(tmp_path: Path):
    other = Outbox(tmp_path / "other", FolderSink(tmp_path / "sink"), start=False)
    other.record([grade(1)])
    other.flush()
    outbox = quiet(tmp_path)
    outbox.record([grade(1), grade(2)])
    outbox.restore()
    assert outbox.saved(["g1"]) == {"g1"}
    assert outbox.flush()
    assert sorted(row["grade_id"] for row in kept(outbox.sink)) == ["g1", "g2"]


def test_a_file_that_cannot_be_read_does_not_keep_the_others_from_being_restored(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    first = quiet(tmp_path)
    first.record([grade(1)])
    first.flush()
    (tmp_path / "sink" / "grades" / "0-broken.jsonl").write_text("{ no json\n")
    (tmp_path / "sink" / "grades" / "notes.txt").write_text("by hand\n")
    fresh = Outbox(tmp_path / "fresh", first.sink, start=False)
    assert fresh.restore() == 1
    assert "0-broken.jsonl:1" in capfd.readouterr().err


def test_a_sink_that_is_down_for_long_only_delays_and_makes_few_files(tmp_path: Path):
    sink = MoodySink(tmp_path / "sink")
    sink.before = refuse(SinkBusy("503"))
    outbox = Outbox(tmp_path / "state", sink, flush_every_s=0.01, flush_rows=1, retry=AT_ONCE)
    for number in range(200):
        outbox.record([grade(number)])
        time.sleep(0.001)
    assert outbox.pending() == 200
    assert outbox.saved([f"g{number}" for number in range(200)]) == set()
    sink.before = lambda: None
    wait_until(lambda: outbox.pending() == 0)
    wait_until(lambda: outbox.problem() is None)  # a moment after the last row is saved
    assert sorted(row["grade_id"] for row in kept(sink)) == sorted(f"g{number}" for number in range(200))
    assert len(sink.list("grades/")) <= 3
    outbox.close()


def test_the_thread_sends_after_a_while_and_at_once_when_many_rows_wait(tmp_path: Path):
    outbox = Outbox(tmp_path / "state", FolderSink(tmp_path / "sink"), flush_every_s=0.05, flush_rows=1000)
    outbox.record([grade(1)])
    wait_until(lambda: outbox.saved(["g1"]) == {"g1"})
    outbox.close()
    outbox = Outbox(tmp_path / "state", FolderSink(tmp_path / "sink"), flush_every_s=3600, flush_rows=3)
    outbox.record([grade(2), grade(3)])
    time.sleep(0.1)
    assert outbox.pending() == 2
    outbox.record([grade(4)])
    wait_until(lambda: outbox.pending() == 0)
    outbox.close()


def test_waits_double_with_jitter_up_to_a_limit_and_heed_what_the_sink_asks_for():
    retry = Retry(first_s=1, longest_s=60, refused_s=300)
    for failures, longest in ((1, 1), (2, 2), (5, 16), (7, 60), (1000, 60)):
        waits = [retry.wait_s(failures, SinkBusy("503")) for _ in range(200)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert retry.wait_s(1, SinkBusy("429", retry_after_s=120)) == 120
    assert 240 <= retry.wait_s(1, SinkRefused("403")) <= 360


def test_a_refusal_is_shown_and_retried_slowly_and_loses_nothing(tmp_path: Path):
    sink = MoodySink(tmp_path / "sink")
    sink.before = refuse(SinkRefused("The token may not write to it."))
    outbox = Outbox(tmp_path / "state", sink, flush_every_s=0.01, retry=Retry(first_s=0.001, refused_s=0.5))
    outbox.record([grade(1)])
    wait_until(lambda: outbox.problem() is not None)
    problem = outbox.problem() or ""
    assert problem.startswith(f"1 row waits in {tmp_path / 'state'}")
    assert problem.endswith("The token may not write to it.")
    time.sleep(0.2)
    assert len(sink.puts) == 1
    sink.before = lambda: None
    wait_until(lambda: outbox.problem() is None)  # a moment after the row is saved
    assert outbox.pending() == 0
    outbox.close()


def test_a_busy_sink_is_shown_only_after_some_failures(tmp_path: Path):
    sink = MoodySink(tmp_path / "sink")
    sink.before = refuse(SinkBusy("The Hub answered 503."))
    outbox = quiet(tmp_path, sink)
    outbox.record([grade(1)])
    seen = []
    for _ in range(3):
        outbox.flush()
        seen.append(outbox.problem())
    assert seen[:2] == [None, None]
    assert "The Hub answered 503." in seen[2]


def test_one_file_in_conflict_does_not_keep_others_from_being_sent(tmp_path: Path):
    outbox = quiet(tmp_path)
    outbox.record([grade(1)])
    outbox._ledger.freeze("2026-03-01")
    batch = outbox._ledger.next_batch(0)
    place = tmp_path / "sink" / batch.path
    place.parent.mkdir(parents=True)
    place.write_text("somebody's notes")
    outbox.record([grade(2)])
    assert not outbox.flush()
    assert outbox.saved(["g1", "g2"]) == {"g2"}
    assert "move that file" in (outbox.problem() or "")
    assert place.read_text() == "somebody's notes"
    place.unlink()
    assert outbox.flush()
    assert outbox.saved(["g1", "g2"]) == {"g1", "g2"}


def test_an_unexpected_error_of_a_sink_does_not_end_the_thread(tmp_path: Path):
    sink = MoodySink(tmp_path / "sink")
    sink.before = refuse(KeyError("a bug"))
    outbox = Outbox(tmp_path / "state", sink, flush_every_s=0.01, retry=AT_ONCE)
    outbox.record([grade(1)])
    wait_until(lambda: "a bug" in (outbox.problem() or ""))
    sink.before = lambda: None
    wait_until(lambda: outbox.pending() == 0)
    outbox.close()


def test_a_full_disk_acknowledges_nothing_and_goes_on_when_there_is_space_again(tmp_path: Path):
    outbox = quiet(tmp_path)
    outbox.record([grade(0)])
    pages = outbox.connection.execute("PRAGMA page_count").fetchone()[0]
    outbox.connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match=r"the disk is full.*Nothing was recorded"):
        outbox.record([grade(number, comment="x" * 5000) for number in range(1, 5)])
    assert [row["grade_id"] for row in outbox.rows("grade")] == ["g0"]
    outbox.connection.execute("PRAGMA max_page_count = 1000000")
    assert outbox.record([grade(number, comment="x" * 5000) for number in range(1, 5)]) == ["g1", "g2", "g3", "g4"]
    assert outbox.flush()


def test_flush_with_a_time_limit_tries_again_and_gives_up_in_time(tmp_path: Path):
    sink = MoodySink(tmp_path / "sink")
    outbox = quiet(tmp_path, sink)
    outbox.record([grade(1)])
    sink.before = lambda: time.sleep(3)  # a sink that hangs
    began = time.monotonic()
    assert not outbox.flush(timeout_s=0.3)
    assert time.monotonic() - began < 1
    failures = iter([SinkBusy("503"), SinkBusy("409")])

    def fail_twice() -> None:
        for error in failures:
            raise error

    sink.before = fail_twice
    assert outbox.flush(timeout_s=20)
    assert outbox.pending() == 0


def test_close_sends_what_waits_and_can_be_called_twice(tmp_path: Path):
    outbox = Outbox(tmp_path / "state", FolderSink(tmp_path / "sink"), flush_every_s=3600)
    outbox.record([grade(1)])
    outbox.close()
    outbox.close()
    assert kept(FolderSink(tmp_path / "sink")) == [grade(1)[2]]


def test_many_threads_record_while_batches_are_sent_and_each_row_is_kept_once(tmp_path: Path):
    outbox = Outbox(tmp_path / "state", FolderSink(tmp_path / "sink"), flush_every_s=0.005, flush_rows=5)
    acknowledged: list[str] = []

    def work(start: int) -> None:
        for number in range(start, start + 40):
            for _ in range(2):  # every row is sent twice
                acknowledged.extend(outbox.record([grade(number)]))

    threads = [threading.Thread(target=work, args=(40 * index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outbox.close()
    assert len(acknowledged) == 640
    assert sorted(row["grade_id"] for row in kept(FolderSink(tmp_path / "sink"))) == sorted(set(acknowledged))


def test_two_processes_on_one_state_folder_send_each_row_once(tmp_path: Path):
    one, two = quiet(tmp_path), quiet(tmp_path)
    for number in range(20):
        (one if number % 2 else two).record([grade(number)])
        threads = [threading.Thread(target=outbox.flush) for outbox in (one, two)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert one.pending() == 0
    assert sorted(row["grade_id"] for row in kept(one.sink)) == sorted(f"g{number}" for number in range(20))
