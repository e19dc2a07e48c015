"""Folders that batches go to: whole files, never replaced."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from pathalign.grading import sinks
from pathalign.grading.hub_sink import HubSink
from pathalign.grading.sinks import FolderSink, SinkBusy, SinkConflict, SinkRefused, open_sink
from pathalign.schema import InputError


def test_a_file_is_kept_once_and_the_same_bytes_again_are_a_success(tmp_path: Path):
    sink = FolderSink(tmp_path / "kept")
    assert sink.list("grades/") == []
    assert sink.read("grades/a.jsonl") is None
    for _ in range(2):
        sink.put("grades/a.jsonl", b"one\n")
    sink.put("sessions/b.jsonl", b"two\n")
    assert sink.read("grades/a.jsonl") == b"one\n"
    assert sink.list("grades/") == ["grades/a.jsonl"]
    assert sorted(path.name for path in (tmp_path / "kept").rglob("*.*")) == ["a.jsonl", "b.jsonl"]


def test_other_bytes_at_a_path_are_refused_and_stay(tmp_path: Path):
    sink = FolderSink(tmp_path)
    sink.put("grades/a.jsonl", b"one\n")
    with pytest.raises(SinkConflict, match="holds other bytes"):
        sink.put("grades/a.jsonl", b"two\n")
    assert sink.read("grades/a.jsonl") == b"one\n"


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sink = FolderSink(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sinks.os, "fsync", fail)
    with pytest.raises(SinkBusy, match=r"No space left on device\. Free some space; grades wait"):
        sink.put("grades/a.jsonl", b"one\n")
    assert list(tmp_path.rglob("*.*")) == []
    monkeypatch.undo()
    sink.put("grades/a.jsonl", b"one\n")
    assert sink.list("grades/") == ["grades/a.jsonl"]


def test_two_writers_of_the_same_file_both_succeed(tmp_path: Path):
    sink = FolderSink(tmp_path)
    content = b"x" * 200_000
    failures = []

    def write() -> None:
        try:
            sink.put("grades/a.jsonl", content)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sink.read("grades/a.jsonl") == content
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.jsonl"]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(sinks.os, "link", refuse)
    sink = FolderSink(tmp_path)
    sink.put("grades/a.jsonl", b"one\n")
    assert sink.list("grades/") == ["grades/a.jsonl"]
    with pytest.raises(SinkConflict):
        sink.put("grades/a.jsonl", b"two\n")


def test_a_place_that_is_no_folder_is_a_refusal_with_what_to_do(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkRefused, match="Mend the rights of the folder, or name another one"):
        FolderSink(tmp_path / "file").put("grades/a.jsonl", b"one\n")


def test_a_sink_is_opened_by_what_the_study_names(tmp_path: Path):
    assert isinstance(open_sink(tmp_path), FolderSink)
    hub = open_sink("hf://datasets/lab/some.grades-1")
    assert isinstance(hub, HubSink)
    assert repr(hub) == "HubSink('lab/some.grades-1')"
    for wrong in (
        "hf://lab/grades",
        "hf://datasets/lab",
        "hf://datasets/lab/grades/deeper",
        "hf://spaces/a/b",
        "s3://bucket",
    ):
        with pytest.raises(InputError, match="hf://datasets/USER/REPO"):
            open_sink(wrong)
